"""Every file of a finished run damaged in every way: commands end with one line or work, and other runs are not hit."""

import json
import os
import shutil

import pytest
from helpers.made_up_runs import made_up_run

from stethoscope.app.runs import Runs
from stethoscope.core.errors import StethoscopeError
from stethoscope.detection import leaderboard
from stethoscope.detection.detector import Detector
from stethoscope.detection.training import fit
from stethoscope.evaluation.evaluator import Evaluator
from stethoscope.report import compare
from stethoscope.report.run_report import collect_report
from stethoscope.report.run_source import RunReader
from stethoscope.storage.run_dir import RunStore

TASK = {"class": "stethoscope.tasks.chair.Chair", "name": "chair", "version": "1", "settings": {"scenes": 4}}
FILES = [
    *("config.yaml", "overrides.yaml", "environment.json", "fingerprint.json", "status.json", "metrics.json"),
    *("warnings.jsonl", "samples.jsonl", "maps.jsonl", "tokens.parquet", "events.jsonl", "detector/manifest.json"),
]


def nested(data, value):
    """The JSON of a file with the first value of its first sections replaced."""
    try:
        content = json.loads(data.split(b"\n")[0] if b"\n{" in data else data)
    except ValueError:
        return b"a: {b: [" + json.dumps(value).encode() + b"]}\n"
    inside = content
    while isinstance(inside, dict) and inside and isinstance(next(iter(inside.values())), dict):
        inside = next(iter(inside.values()))
    for key in list(inside if isinstance(inside, dict) else {}):
        inside[key] = value
    return json.dumps(content).encode() + b"\n"


DAMAGE = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "zeros": lambda data: bytes(len(data)),
    "binary": lambda data: bytes(range(256)) * 4,
    "null": lambda data: b"null\n",
    "list": lambda data: b"[1, 2]\n",
    "text": lambda data: b'"x"\n',
    "encoding": lambda data: data + "é".encode("latin-1"),
    "deep": lambda data: b"[" * 10_000,
    "nothing inside": lambda data: nested(data, None),
    "numbers inside": lambda data: nested(data, 10**400),
    "infinite inside": lambda data: nested(data, 0.5).replace(b"0.5", b"1e999"),
    "texts inside": lambda data: nested(data, "x"),
    "lists inside": lambda data: nested(data, [[]]),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with a detector, as the commands leave it, without a model."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    shuffles, leaderboard.SHUFFLES = leaderboard.SHUFFLES, 2
    made_up_run(folder)
    store = RunStore(folder)
    fingerprint = {"adapter": {"model_id": "made-up"}, "task": TASK, "generation": {}}
    (folder / "fingerprint.json").write_text(json.dumps({"chair": fingerprint}))
    interval = {"value": 0.5, "low": 0.4, "high": 0.6, "items": 9, "groups": 9}
    counts = dict.fromkeys(("samples", "ok", "unparsed", "failed", "truncated"), 1)
    metrics = [{"metric": "chair_i", "subset": "all", **interval}]
    store.write_metrics("chair", {"primary": "chair_i", "counts": counts, "metrics": metrics})
    fit(store, "chair", Detector(), (0.6, 0.2, 0.2), 0)
    leaderboard.SHUFFLES = shuffles
    store.write_config({"model": {"name": "made-up"}, "task": {"_target_": TASK["class"]}}, ["task=chair"])
    (folder / "maps.jsonl").write_text('{"task": "chair", "sample_id": "0", "answer": "", "picture": ""}\n')
    (folder / "events.jsonl").write_text('{"time": 1, "event": "status"}\n')
    collect_report(RunReader.read(folder), examples=2).html()
    return folder


def damage_of(path, kind):
    data = path.read_bytes()
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    elif kind != "missing":
        path.write_bytes(DAMAGE[kind](data))


def compare_runs(run, other):
    sources, heads = [RunReader.read(run), RunReader.read(other)], ("one", "other")
    for table in (compare.summary_table, compare.leaderboard_table, compare.setting_table):
        table(sources, heads)
    compare.run_names(sources)
    compare.detector_table(*sources, heads)


def line_of(use):
    """The message of an error of ours; any other goes through and fails the test."""
    try:
        use()
    except StethoscopeError as error:
        return str(error)
    return ""


KINDS = [*DAMAGE, "missing", "folder", "pipe", "loop"]


def cases():
    """Every file with every damage; one damage of each file is fast, the others are slow."""
    for position, name in enumerate(FILES):
        for kind in KINDS:
            fast = kind == ("texts inside", "cut")[position % 2]
            yield pytest.param(name, kind, marks=[] if fast else pytest.mark.slow)


@pytest.mark.parametrize(("name", "kind"), cases())
def test_a_damaged_file_is_one_line_or_no_matter(finished, tmp_path, name, kind):
    run = tmp_path / "runs" / "bad"
    shutil.copytree(finished, run)
    (tmp_path / "runs" / "good").symlink_to(finished)
    damage_of(run / name, kind)

    def train():
        store = RunStore(run)
        store.traced_tasks()
        store.tokens("chair")
        list(store.records("chair"))

    for use in (
        lambda: collect_report(RunReader.read(run), examples=0).html(),
        lambda: compare_runs(finished, run),
        train,
        lambda: Detector.load(run / "detector"),
    ):
        message = line_of(use)
        assert len(message.splitlines()) <= 1, message
        assert len(message) < 1000
    assert "good" in Runs(tmp_path / "runs", None, tmp_path).names


def test_a_damaged_run_is_left_out_of_what_others_take_over(finished, tmp_path):
    from helpers.tiny_world import TinyAdapter, TinyTask

    from stethoscope.core.types import Generation
    from stethoscope.storage.reuse import reuse_answers

    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/samples.jsonl").write_bytes(bytes(100))
    (tmp_path / "bad/fingerprint.json").write_bytes(b"{")
    adapter, task = TinyAdapter(), TinyTask(4)
    with (
        pytest.warns(UserWarning, match=r"bad.*is damaged"),
        reuse_answers(tmp_path, tmp_path / "new", adapter, task, Generation()),
    ):
        assert Evaluator(run_dir=tmp_path / "new").run(adapter, task).counts["ok"] == 4
