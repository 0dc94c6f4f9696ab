"""Sweeps: every launcher, jobs that fail, the table at the end, the W&B group, answers that jobs share."""

import csv
import json

import pytest
import wandb_reader
from made_up_runs import made_up_run

from stethoscope import Detector, leaderboard
from stethoscope.cli import main
from stethoscope.store import RunStore

QUICK = ("detector.strength=0.1",)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(leaderboard, "SHUFFLES", 1)


@pytest.fixture
def call(tmp_path, monkeypatch, capfd):
    """Runs the command in an empty folder; its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")

    def run(*words):
        with pytest.raises(SystemExit) as end:
            main([str(word) for word in words])
        said = capfd.readouterr()
        return end.value.code, said.out, said.err

    return run


def _jobs(folder):
    return json.loads((folder / "sweep.json").read_text())


def test_detectors_and_feature_sets_in_one_table(call, tmp_path):
    source = made_up_run(tmp_path / "made", images=150)
    before = {path.name: path.read_bytes() for path in source.iterdir() if path.is_file()}
    features = "detector.features=[nll],[nll,attn_image_l00]"
    code, out, err = call("--multirun", "train", f"run={source}", "detector=logistic,boosting", features, *QUICK)
    assert code == 0, err
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("sweep-train-detector-features-run=")
    found = _jobs(folder)
    assert [job["settings"] for job in found] == [
        {"detector": kind, "detector.features": names}
        for kind in ("logistic", "boosting") for names in ("[nll]", "[nll,attn_image_l00]")
    ]  # fmt: skip
    runs = [tmp_path / job["run"] for job in found]
    for job, run in zip(found, runs, strict=True):
        row = RunStore(run).metrics()["detector"]["leaderboard"]["rows"][0]
        assert job["figures"]["AUROC"] == row["metrics"]["auroc"]
        assert job["status"] == "finished"
        assert Detector.load(run / "detector").settings["estimator"] == job["settings"]["detector"]
    assert found[0]["above_first"] == {}
    gap = found[1]["above_first"]["AUROC"]
    assert gap["value"] == pytest.approx(found[1]["figures"]["AUROC"]["value"] - found[0]["figures"]["AUROC"]["value"])
    assert gap["low"] <= gap["value"] <= gap["high"]
    page = (folder / "sweep.md").read_text()
    for word in ("| job | detector | detector.features | AUROC | − first |", "[nll,attn\\_image\\_l00]", "finished"):
        assert word in page.replace("\\[", "[").replace("\\]", "]"), page
    with (folder / "sweep.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert {line["metric"] for line in lines} > {"AUROC", "position-controlled", "Brier"}
    assert "− first" in out
    assert {path.name: path.read_bytes() for path in source.iterdir() if path.is_file()} == before
    _check_group(folder, runs)


def _check_group(folder, runs):
    """One W&B group: a run for every job, and one with the table."""
    jobs = [wandb_reader.read(run / "wandb") for run in runs]
    whole = wandb_reader.read(folder / "wandb")
    assert {job.group for job in [*jobs, whole]} == {folder.name}
    assert {job.job_type for job in jobs} == {"train"}
    assert (whole.job_type, whole.name, whole.exit_code) == ("sweep", folder.name, 0)
    for run, job in zip(runs, jobs, strict=True):
        row = RunStore(run).metrics()["detector"]["leaderboard"]["rows"][0]
        assert job.summary["detector/detector/auroc"] == row["metrics"]["auroc"]["value"]
    table = whole.tables["sweep/comparison"]
    assert table["columns"][:3] == ["job", "detector", "detector.features"]
    assert {row[0] for row in table["data"]} == {0, 1, 2, 3}


def test_feature_sets_are_columns_of_the_run(call, tmp_path):
    source = made_up_run(tmp_path / "made", images=120)
    words = ("features.groups=[uncertainty]", "features.names=[]", "logger=none", *QUICK)
    code, _, err = call("train", f"run={source}", "features=fast", *words)
    assert code == 2
    assert "features=fast` computes them" in err
    assert "has no columns of" in err
    words = ("features.groups=[]", "features.names=[nll,attn_image]", "logger=none", *QUICK)
    code, _, err = call("train", f"run={source}", "features=fast", *words)
    assert code == 0, err
    assert Detector.load(source / "detector").schema.names == ("nll", "attn_image_l00")


def test_a_failed_job_is_told_and_does_not_stop_the_others(call, tmp_path):
    source = made_up_run(tmp_path / "made", images=120)
    words = ("detector.features=[nll],[nil],[nll,position]", "logger=none", *QUICK)
    code, out, err = call("train", "--multirun", f"run={source}", "runs=there", *words)
    assert code == 2
    last = err.strip().splitlines()[-1]
    assert last.startswith(
        "stethoscope: 1 of 3 jobs of the sweep did not finish, the first is job 1 (detector.features="
    )
    assert "did you mean 'nll'" in err
    (folder,) = (tmp_path / "there").iterdir()
    found = _jobs(folder)
    assert [job["status"] for job in found] == ["finished", "failed", "finished"]
    assert "unknown feature 'nil'" in found[1]["error"]
    assert "unknown feature 'nil'" in (folder / "sweep.md").read_text()
    assert "job 1 (detector.features=[nil]) failed" in out
    assert found[2]["above_first"]["AUROC"]["p"] > 0


def test_a_wrong_choice_is_refused_before_any_job(call, tmp_path):
    code, out, err = call("train", "--multirun", "detector=logistic,bosting")
    assert code == 2
    assert "did you mean 'boosting'" in err
    assert "[job" not in out


def test_a_bug_in_one_job_does_not_stop_the_others(call, tmp_path, monkeypatch):
    from stethoscope.commands import train

    real = train.fit

    def broken(*arguments, **more):
        if arguments[4] == 1:
            raise RuntimeError("boom")
        return real(*arguments, **more)

    monkeypatch.setattr(train, "fit", broken)
    source = made_up_run(tmp_path / "made", images=120)
    code, _, err = call("train", "--multirun", f"run={source}", "seed=0,1", "logger=none", *QUICK)
    assert code == 2
    assert "Traceback" in err
    assert err.strip().splitlines()[-1].endswith("RuntimeError: boom")
