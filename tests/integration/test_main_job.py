"""The main job on a few scenes of the embedded model: everything that the full one leaves behind, and its honesty."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import wandb_reader

from stethoscope import Detector, testbed
from stethoscope.cli import main
from stethoscope.core.component import choices
from stethoscope.core.token_table import feature_names, mention_rows
from stethoscope.detection import leaderboard
from stethoscope.report.examples import read_examples
from stethoscope.report.run_source import RunReader
from stethoscope.storage.run_dir import RunStore

LIMIT = 120
SUBSETS = ("random", "popular", "adversarial")


@pytest.fixture(scope="module", autouse=True)
def few_shuffles():
    """Detectors of shuffled labels take most of the time; three of the twenty are enough here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leaderboard, "SHUFFLES", 3)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory, few_shuffles):
    """A run directory that the benchmark has left; the tests below only read it."""
    folder = tmp_path_factory.mktemp("main_job")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with pytest.raises(SystemExit) as end:
            main(["benchmark", f"limit={LIMIT}", "name=small"])
    assert end.value.code == 0
    return folder / "runs" / "small"


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of that run directory, to write into."""
    shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("wandb"))
    return tmp_path / "run"


def test_the_run_directory_is_complete(finished):
    names = {path.name for path in finished.iterdir() if not path.name.startswith(".lock")}
    assert names == {
        "config.yaml", "overrides.yaml", "environment.json", "fingerprint.json", "status.json", "planned.json",
        "samples.jsonl", "tokens.parquet", "metrics.json", "warnings.jsonl", "events.jsonl", "maps.jsonl", "detector",
        "wandb",
    }  # fmt: skip
    assert {path.name for path in (finished / "detector").iterdir()} == {
        "README.md",
        "detector.safetensors",
        "manifest.json",
    }
    assert {path.name for path in finished.parent.parent.iterdir()} == {"runs"}


def test_every_figure_has_its_interval(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    assert set(metrics) == {"pope", "chair", "detector"}
    names = {(row["metric"], row["subset"]) for row in metrics["pope"]["metrics"]}
    rates = {"accuracy", "balanced_accuracy", "precision", "recall", "f1", "tpr", "tnr", "yes_rate"}
    assert names == {(name, subset) for name in rates for subset in SUBSETS} | {("accuracy", "mean"), ("f1", "mean")}
    assert {row["metric"] for row in metrics["chair"]["metrics"]} == {"chair_i", "chair_s", "recall", "length"}
    rows = [*metrics["pope"]["metrics"], *metrics["chair"]["metrics"]]
    rows += [interval for row in metrics["detector"]["leaderboard"]["rows"] for interval in row["metrics"].values()]
    for row in rows:
        assert row["value"] is None or row["low"] <= row["high"]
    for task in ("pope", "chair"):
        assert metrics[task]["counts"]["samples"] == metrics[task]["counts"]["ok"] == LIMIT


def test_the_detector_stands_beside_its_baselines(finished):
    board = json.loads((finished / "metrics.json").read_text())["detector"]["leaderboard"]
    kinds = {row["name"]: row["kind"] for row in board["rows"]}
    assert kinds["detector"] == "detector"
    assert {name for name, kind in kinds.items() if kind == "baseline"} == {
        "constant", "position only", "text prior", "shuffled labels"
    }  # fmt: skip
    assert {"nll", "svar", "attn_image_l00", "lens_rank_l00"} <= set(kinds)
    against = {row["other"] for row in board["differences"]}
    assert {"position only", "text prior"} < against


def test_wandb_holds_the_same_figures(finished):
    summary = wandb_reader.read(finished / "wandb").summary
    metrics = json.loads((finished / "metrics.json").read_text())
    for task in ("pope", "chair"):
        for row in metrics[task]["metrics"]:
            if row["value"] is not None:
                assert summary[f"{task}/{row['subset']}/{row['metric']}"] == row["value"]
        assert summary[f"{task}/{metrics[task]['primary']}"] in [row["value"] for row in metrics[task]["metrics"]]
    paths = {"detector": "detector", "position only": "baseline/position", "text prior": "baseline/text_prior"}
    rows = {row["name"]: row for row in metrics["detector"]["leaderboard"]["rows"]}
    for name, path in paths.items():
        for metric, interval in rows[name]["metrics"].items():
            if interval["value"] is not None:
                assert summary[f"{path}/{metric}"] == interval["value"]


def test_wandb_can_group_and_sort_by_every_setting(finished):
    run = wandb_reader.read(finished / "wandb")
    assert run.job_type == "benchmark"
    assert run.tags == ["testbed", "default", "logistic"]
    assert run.config["choices"]["detector"] == "logistic"
    assert run.config["choices"]["features"] == "default"
    assert (run.config["seed"], run.config["command"], run.config["limit"]) == (0, "benchmark", LIMIT)
    assert run.config["overrides"] == [f"limit={LIMIT}", "name=small"]
    assert run.config["detector"]["_target_"] == "stethoscope.detection.detector.Detector"
    assert run.config["chair"]["source"] == "testbed"  # as given, and what became of it
    assert run.config["chair"]["task"]["version"]
    table = run.tables["detector/leaderboard"]
    board = json.loads((finished / "metrics.json").read_text())["detector"]["leaderboard"]["rows"]
    assert [row[0] for row in table["data"]] == [row["name"] for row in board]
    auroc = table["columns"].index("auroc")
    assert [row[auroc] for row in table["data"]] == [row["metrics"]["auroc"]["value"] for row in board]
    assert table["columns"][auroc : auroc + 3] == ["auroc", "auroc low", "auroc high"]


def test_labels_follow_from_the_scenes(finished):
    """Label 1 exactly where the caption names what its scene does not show; tokens spell the answers."""
    table, store = RunStore(finished).tokens("chair"), RunStore(finished)
    truth = {scene.id: set(scene.visible) for scene in testbed.scenes(1000)}
    judged = mention_rows(table)
    assert len(judged) > LIMIT
    for row in judged.itertuples():
        assert row.label == int(row.object not in truth[row.group])
    for record in store.records("chair"):
        rows = table[table["sample_id"] == record.sample_id]
        assert tuple(rows["token_id"]) == record.answer.token_ids
        assert np.allclose(rows["nll"], -np.array(record.answer.logprobs), atol=1e-4)


def test_warnings_are_the_saved_detectors_own(finished):
    table = RunStore(finished).tokens("chair")
    detector = Detector.load(finished / "detector")
    assert set(detector.schema.names) == set(feature_names(table))
    warnings = pd.DataFrame(map(json.loads, (finished / "warnings.jsonl").read_text().splitlines()))
    named = table[(table["mention_index"] >= 0) & table["is_first_subtoken"]].reset_index(drop=True)
    own, repeated = detector.predict(named), named["repeat_index"].to_numpy() > 0
    assert np.allclose(own[~repeated], warnings["probability"][~repeated], atol=1e-6)
    assert warnings.groupby(["sample_id", "object"])["probability"].nunique().max() == 1
    assert warnings.groupby("group")["fold"].nunique().max() == 1
    texts = {record.sample_id: record.answer.text for record in RunStore(finished).records("chair")}
    agreements = [texts[row.sample_id][row.start : row.end].strip() == row.object for row in warnings.itertuples()]
    assert np.mean(agreements) > 0.9  # the rest are synonyms


def test_people_can_look_at_a_default_run(copy, tmp_path, stethoscope):
    """No feature of it needs a backward pass; report and gallery show where every name attends, and say so."""
    stethoscope("report", copy, code=0)
    captions = re.findall('alt="([^"]*)"', (copy / "report.html").read_text())
    assert len(captions) > 8
    assert all(re.fullmatch("where [a-z ]+ attends", caption) for caption in captions[1::2])
    stethoscope("export", f"run={copy}", "to=html", f"out={tmp_path / 'public'}", code=0)
    page = (tmp_path / "public" / "index.html").read_text()
    rows = json.loads(page.partition('id="data">')[2].partition("</script>")[0])["rows"]
    named = [row for row in rows if row["mentions"]]
    assert len(named) > LIMIT / 2
    for row in named:
        assert row["maps"]["caption"] == ["where ", " attends"]
        assert {str(mention[3]) for mention in row["mentions"]} <= set(row["maps"]["values"])
    examples = read_examples(RunReader.read(copy), 3)
    assert {example.shows for example in examples} == {"attention"}
    assert all(example.images[1][1] == f"where {example.object} attends" for example in examples)  # as W&B has it


@pytest.mark.slow
def test_the_same_command_does_nothing_again(copy, tmp_path, stethoscope):
    before = json.loads((copy / "metrics.json").read_text())
    (tmp_path / "runs").mkdir()
    copy.rename(tmp_path / "runs" / "small")
    stethoscope("benchmark", f"limit={LIMIT}", "name=small", "logger=none", code=0)
    assert json.loads((tmp_path / "runs" / "small" / "metrics.json").read_text()) == before


@pytest.mark.slow
def test_train_again_and_refuse_other_features(copy, stethoscope):
    out = stethoscope("train", f"run={copy}", "detector=boosting", "overwrite=true", code=0)
    assert "text prior" in out
    words = ["task=chair", "limit=6", "callbacks=none", "logger=none", "name=other"]
    stethoscope("evaluate", *words, code=0)
    extract = ["extract", "run=runs/other", "callbacks=none", f"warn={copy / 'detector'}"]
    assert "mentions warned" in stethoscope(*extract, code=0)
    table = Path("runs/other/tokens.parquet").read_bytes()
    line = stethoscope(*extract, "features=fast")
    assert "was trained on 4 features that features= does not choose: hidden_last_c, hidden_last_q" in line
    assert Path("runs/other/tokens.parquet").read_bytes() == table  # it is said before anything is replaced


@pytest.mark.slow
def test_exported_files_give_the_same_metrics(tmp_path, stethoscope):
    """Scenes written as COCO annotations, POPE's JSON lines and PNG files, read back as published files are."""
    scenes = testbed.scenes(8)
    testbed.export(tmp_path / "coco", scenes)
    common = ["callbacks=none", "logger=none"]
    coco = tmp_path / "coco"
    files = {
        "pope": [f"task.questions={coco}", f"task.images={coco / 'images'}"],
        "chair": [
            f"task.instances={coco / 'instances.json'}",
            f"task.captions={coco / 'captions.json'}",
            f"task.images={coco / 'images'}",
        ],
    }
    for task, words in files.items():
        stethoscope("evaluate", f"task={task}", "task.scenes=8", "name=made", *common, code=0)
        stethoscope("evaluate", f"task={task}", "task.source=files", *words, "name=read", *common, code=0)
    written, read = (json.loads((tmp_path / "runs" / name / "metrics.json").read_text()) for name in ("made", "read"))
    assert written == read
    assert written["chair"]["counts"]["ok"] == 8


@pytest.mark.slow
def test_all_published_detectors_on_one_leader_board(tmp_path, stethoscope):
    """The command of the README, on few scenes: every set of ``features=paper/...`` has a row, and so have ours."""
    small = ["chair.scenes=40", "pope.scenes=4", "callbacks=none", "logger=none"]
    out = stethoscope("benchmark", "experiment=detectors", "name=all", *small, code=0)
    board = json.loads((tmp_path / "runs" / "all" / "metrics.json").read_text())["detector"]["leaderboard"]
    kinds = {row["name"]: row["kind"] for row in board["rows"]}
    papers = {name for name in choices("features") if name.startswith("paper/")}
    assert {name for name, kind in kinds.items() if kind == "published"} == papers
    assert {"detector", "default_relevancy", "one_pass", "full", "full_verified"} == {
        n for n, kind in kinds.items() if kind == "detector"
    }
    assert re.search(r"one more question per mention \([\w, ]*questions", " ".join(out.split()))
    assert "detector − best published" in out
    table = RunStore(tmp_path / "runs" / "all").tokens("chair")
    named = (table["mention_index"] >= 0).to_numpy()
    np.testing.assert_array_equal(table["verify_yes"].notna(), named)
    np.testing.assert_array_equal(table["masked_prob"].notna(), named)
    distinct = table[named].groupby(["sample_id", "object"])["verify_yes"].nunique()
    assert (distinct == 1).all()  # later mentions and all sub-tokens share the question
