"""``stethoscope train`` on the token table of a made-up run: comparison, ablation, promises, what is left behind."""

import json

import pytest
from helpers.made_up_runs import made_up_run

from stethoscope import Detector
from stethoscope.commands.train import _warn_of_gaps
from stethoscope.core.token_table import mention_rows
from stethoscope.core.types import Mention
from stethoscope.detection import leaderboard
from stethoscope.storage.records import Record
from stethoscope.storage.run_dir import RunStore


@pytest.fixture(autouse=True)
def few_shuffles(monkeypatch):
    monkeypatch.setattr(leaderboard, "SHUFFLES", 2)


@pytest.fixture
def run(tmp_path):
    return made_up_run(tmp_path / "run", 400, task="chair")


def test_one_detector(run, stethoscope):
    out = stethoscope("train", f"run={run}", code=0)
    for word in ("leader board", "same position and word", "shuffled labels", "text prior", "ahead by", "highest F1"):
        assert word in out
    assert {path.name for path in (run / "detector").iterdir()} == {
        "detector.safetensors",
        "manifest.json",
        "README.md",
    }
    assert "made-up" in (run / "detector" / "README.md").read_text()
    detector = Detector.load(run / "detector")
    assert detector.manifest["label"].startswith("first sub-token of the first mention of an object")
    warnings = [json.loads(line) for line in (run / "warnings.jsonl").read_text().splitlines()]
    assert all(
        line["evidence"] + line["prior"] == pytest.approx(_logit(line["probability"]), abs=1e-3) for line in warnings
    )


def test_the_task_is_chosen(run, stethoscope):
    """The key must not be called as a Hydra group is, which an override would choose from."""
    out = stethoscope("train", f"run={run}", "mentions=pope", code=2)
    assert "no token features of task 'pope'" in out
    assert "leader board" in stethoscope("train", f"run={run}", "mentions=chair", code=0)


def test_the_only_task_of_a_run_need_not_be_named(tmp_path, stethoscope):
    run = made_up_run(tmp_path / "run", 400, task="mine")
    assert "leader board" in stethoscope("train", f"run={run}", "detector.C=0.1", code=0)
    assert json.loads((run / "detector" / "manifest.json").read_text())["task"]["name"] == "mine"


def test_answers_without_token_rows_are_told(run):
    store = RunStore(run)
    dog = Mention(0, 3, "dog", 1, 0, 0)
    store.append([Record("chair", f"late-{n}", "late", "all", "x.png", "What?", mentions=(dog,)) for n in range(3)])
    with pytest.warns(UserWarning, match="3 of 3 answers of chair that name an object have no token features"):
        _warn_of_gaps(RunStore(run), "chair")


def _logit(probability):
    from math import log

    return log(probability / (1 - probability))


def test_a_promise_is_printed_kept_in_the_manifest_and_used(run, stethoscope):
    out = stethoscope("train", f"run={run}", "detector.threshold={max_missed: 0.3}", "split.calibration=0.3", code=0)
    assert "at most 0.3 of the hallucinated mentions get none, at confidence 0.95" in out
    assert "calibration images" in out
    detector = Detector.load(run / "detector")
    certificate = json.loads((run / "detector" / "manifest.json").read_text())["threshold"]["certificate"]
    assert certificate == detector.certificate.to_dict()
    section = RunStore(run).metrics()["detector"]
    table = RunStore(run).tokens("chair")
    assert certificate["images"] == section["split"]["folds"]["calibration"]["images"]
    warned = [json.loads(line)["warned"] for line in (run / "warnings.jsonl").read_text().splitlines()]
    assert warned == (detector.predict(mention_rows(table)) >= detector.threshold).tolist()


def test_a_promise_that_cannot_be_given_is_one_line(run, stethoscope):
    line = stethoscope("train", f"run={run}", "detector.threshold={max_false_alarms: 0.01}")
    assert "no threshold can guarantee at most 0.01 of the grounded mentions get a warning" in line
    assert "are needed" in line
    assert "did you mean 'max_missed'" in stethoscope("train", f"run={run}", "detector.threshold={max_mised: 0.1}")


def test_several_detectors_and_ablation(run, stethoscope):
    out = stethoscope("train", f"run={run}", "compare_with=[boosting]", "ablation=true", "detector.repeats=all", code=0)
    assert "boosting − text prior" in out
    assert "detector − boosting" in out
    assert "what each feature group adds" in out
    section = RunStore(run).metrics()["detector"]
    assert {row["other"] for row in section["ablation"]} == {
        "without uncertainty", "without attention", "without lens", "without position"
    }  # fmt: skip
    assert Detector.load(run / "detector").settings["estimator"] == "logistic"
    assert "did you mean 'boosting'" in stethoscope("train", f"run={run}", "compare_with=[bosting]")


def test_every_detector_of_the_configuration_trains(run, stethoscope):
    for name in ("factored", "per_head"):
        stethoscope("train", f"run={run}", f"detector={name}", "detector.C=0.1", "overwrite=true", code=0)
        assert Detector.load(run / "detector").settings["factored"] == (name == "factored")


def test_a_detector_of_other_settings_is_not_replaced_silently(run, stethoscope):
    words = ("train", f"run={run}", "detector.features=[nll]", "logger=none", "published=false")
    stethoscope(*words, "detector.C=0.1", code=0)
    manifest = run / "detector" / "manifest.json"
    before = manifest.read_text()
    line = stethoscope(*words, "detector.C=1", "split.train=0.4")
    assert "detector.C: 0.1 before, 1 now; split.train: 0.5 before, 0.4 now" in line
    assert "overwrite=true" in line
    assert "exists already" in stethoscope("train", f"run={run}", f"recalibrate={run}", "labels=0")
    assert manifest.read_text() == before
    stethoscope(*words, "detector.C=0.1", code=0)  # the same again
    stethoscope(*words, "detector.C=1", "overwrite=true", code=0)
    assert Detector.load(run / "detector").settings["C"] == 1
