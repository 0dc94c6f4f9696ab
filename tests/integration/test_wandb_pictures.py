"""What W&B gets to look at, read back from the files of an offline run; and what others get instead."""

import json
import re
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny_world import TinyAdapter, TinyTask
from helpers.wandb_reader import read
from PIL import Image

from stethoscope.core.errors import ConfigError
from stethoscope.evaluation.callbacks import SampleTable
from stethoscope.evaluation.evaluator import Evaluator
from stethoscope.loggers.base import Logger, Marked, TablePicture
from stethoscope.loggers.combined import Loggers
from stethoscope.loggers.file_loggers import JsonLogger
from stethoscope.loggers.wandb import WandbLogger
from stethoscope.report import curves
from stethoscope.report.examples import KINDS, LOGGED_COLUMNS, log_detector_files, read_examples
from stethoscope.report.run_source import RunReader
from stethoscope.storage.run_dir import RunStore
from stethoscope.storage.saved_heatmaps import HeatmapFile

pytest.importorskip("wandb")

pytestmark = pytest.mark.slow
EVIL = "<script>alert(1)</script> **b** [a](javascript:alert(1)) "


@pytest.fixture(scope="module")
def greedy(finished):
    return finished / "greedy"


@pytest.fixture(scope="module")
def logged(greedy):
    """What W&B has of it."""
    return read(greedy)


def test_mentions_with_their_pictures_heat_maps_and_marked_answers(greedy, logged):
    table = logged.tables["detector/mentions"]
    assert table["columns"] == list(LOGGED_COLUMNS)
    source = RunReader.read(greedy)
    examples = read_examples(source, 3)
    assert 4 < len(table["data"]) == len(examples) <= 9
    assert {row[0] for row in table["data"]} <= set(KINDS)
    file = HeatmapFile(greedy)
    for row, case in zip(table["data"], examples, strict=True):
        cells = dict(zip(LOGGED_COLUMNS, row, strict=True))
        assert (cells["kind"], cells["sample"], cells["object"]) == (case.kind, case.sample_id, case.object)
        assert cells["probability"] == pytest.approx(case.probability)
        view = file.find(RunStore(greedy).find("chair", case.sample_id))
        assert np.array_equal(np.asarray(Image.open(logged.media[cells["picture"]["path"]])), np.asarray(view.picture))
        heat = Image.open(logged.media[cells["heat map"]["path"]])
        assert heat.size == case.heatmap.size
        assert np.array_equal(np.asarray(heat.convert("RGB")), np.asarray(case.heatmap))
        html = logged.media[cells["answer"]["path"]].read_text()
        start = case.text.index("«")
        mention = case.text[start + 1 : case.text.index("»", start)]
        assert re.search(f"<span style=[^>]*bold[^>]*>{re.escape(mention)}</span>", html)


def test_curves_are_those_of_the_report(greedy, logged):
    source = RunReader.read(greedy)
    tables = {name: table for name, table in logged.tables.items() if name.startswith("detector/")}
    x, y = curves.roc(source.held_out["label"], source.held_out["probability"])
    assert np.allclose([row[:2] for row in tables["detector/roc_table"]["data"]], np.stack([x, y], 1))
    wanted = {f"detector/{name}_table" for name in ("roc", "precision_recall", "reliability", "auroc_by_position")}
    assert tables.keys() == {*wanted, "detector/leaderboard", "detector/mentions"}
    assert logged.summary["detector/auroc"] == pytest.approx(source.detector.detector.metrics["auroc"].value)


def test_the_detector_is_an_artifact_with_its_manifest(greedy, logged):
    (artifact,) = logged.artifacts
    manifest = json.loads((greedy / "detector" / "manifest.json").read_text())
    assert (artifact.name, artifact.type) == ("greedy-detector", "detector")
    assert json.loads(artifact.metadata) == manifest
    entries = {entry.path: entry.size for entry in artifact.manifest.contents}
    assert all(Path(entry.local_path).is_relative_to(greedy / "wandb") for entry in artifact.manifest.contents)
    assert entries == {path.name: path.stat().st_size for path in (greedy / "detector").iterdir()}


def test_the_first_answers_come_with_their_pictures(greedy, logged):
    table = logged.tables["pope/samples"]
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [row["picture"] is not None for row in rows] == [True] * 9 + [False] * 23
    from stethoscope import testbed

    scenes = {f"{scene.id}.png": scene for scene in testbed.scenes(60)}
    assert np.array_equal(
        np.asarray(Image.open(logged.media[rows[0]["picture"]["path"]])),
        np.asarray(scenes[rows[0]["image"]].image()),
    )
    assert rows[0]["picture"]["caption"] == rows[0]["image"]


def test_events_get_words_and_no_pictures(greedy):
    events = [json.loads(line) for line in (greedy / "events.jsonl").read_text().splitlines()]
    tables = {event["name"]: event for event in events if event["event"] == "table"}
    columns = [name for name in LOGGED_COLUMNS if name not in ("picture", "heat map")]
    assert tables["detector/mentions"]["columns"] == columns
    first = dict(zip(columns, tables["detector/mentions"]["rows"][0], strict=True))
    case = read_examples(RunReader.read(greedy), 3)[0]
    assert (first["sample"], first["answer"]) == (case.sample_id, case.text)
    assert not {event["event"] for event in events} - {"config", "metrics", "table", "status"}


def test_hostile_words_stay_words(greedy, tmp_path):
    folder = shutil.copytree(greedy, tmp_path / "run", ignore=shutil.ignore_patterns("wandb", "events.jsonl"))
    file = folder / "samples.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        line["answer"]["text"] = (EVIL + line["answer"]["text"])[: len(line["answer"]["text"]) + 20]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    seen = {}

    class Shows(Logger):
        media, pictures = True, 6

        def log_table(self, name, columns, rows):
            seen[name] = [dict(zip(columns, row, strict=True)) for row in rows]

    log_detector_files(Loggers([Shows()]), folder)
    cells = [row["answer"] for row in seen["detector/mentions"]]
    assert cells
    for cell in cells:
        assert "<script" not in cell.html
        assert "&lt;script&gt;" in cell.html
        assert "<script>" in cell.text
    assert all(row["heat map"] is None for row in seen["detector/mentions"])  # it was of another answer


def test_a_service_that_breaks_on_pictures_stops_nothing(tmp_path, monkeypatch):
    def broken(*arguments, **settings):
        raise ConnectionError("no pictures today")

    loggers = Loggers([WandbLogger(), JsonLogger()])
    monkeypatch.setattr(sys.modules["wandb"], "Image", broken)
    evaluator = Evaluator([SampleTable(3)], loggers, run_dir=tmp_path)
    message = r"WandbLogger\.log_table failed, the run goes on without it: no pictures"
    with pytest.warns(UserWarning, match=message):  # noqa: PT031 (W&B works in a thread: its warnings come until the end)
        results = evaluator.run(TinyAdapter(), TinyTask())
        loggers.log_metrics({"after": 1.0})
        loggers.finalize("finished")
    assert results.counts["ok"] == 10
    assert read(tmp_path).summary["after"] == 1.0


def test_what_cannot_be_read_is_warned_of(tmp_path):
    class Shows(Logger):
        media = True

    with pytest.warns(UserWarning, match="the loggers get no pictures of the detector: .* is no run directory"):
        log_detector_files(Loggers([Shows()]), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log_detector_files(Loggers([JsonLogger()]), tmp_path)  # nobody to show it to
        log_detector_files(Loggers([WandbLogger(mode="disabled")]), tmp_path)


def test_loggers_that_show_nothing_get_plain_tables():
    calls = []
    picture, marked = TablePicture(Image.new("RGB", (2, 2)), "a.png"), Marked("<b>x</b>", "x")
    for shows in (True, False):
        logger = Logger()
        logger.media = shows
        logger.log_table = lambda name, columns, rows: calls.append((columns, rows))
        logger.log_curve = lambda *arguments, shows=shows: calls.append(shows)
        loggers = Loggers([logger])
        loggers.log_table("t", ["a", "b", "c"], [[picture, marked, np.float32(0.5)]])
        loggers.log_curve("c", ["x", "y", "curve"], [])
    assert calls == [(["a", "b", "c"], [[picture, marked, 0.5]]), True, (["b", "c"], [["x", 0.5]])]
    with pytest.raises(ConfigError, match=r"logger\.pictures=-1 should be at least 0"):
        WandbLogger(pictures=-1)
