"""A detector of one run judged on others: ``stethoscope train run=A test=[B, ...]``."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from helpers.made_up_runs import made_up_run

from stethoscope import Detector
from stethoscope.core.token_table import mention_rows
from stethoscope.detection import leaderboard
from stethoscope.metrics.bootstrap import split_groups
from stethoscope.metrics.classification import auroc, ece
from stethoscope.storage.run_dir import RunStore

pytestmark = pytest.mark.slow

QUICK = ("logger=none", "detector.C=0.1", "published=false")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(leaderboard, "SHUFFLES", 1)


@pytest.fixture
def home(tmp_path):
    return made_up_run(tmp_path / "home")


def _shifted(table):
    return table.assign(nll=table["nll"] + np.float32(1))


def _rows(run):
    return RunStore(run).metrics()["detector"]["transfer"]


def test_a_shifted_feature_keeps_the_ranking_and_breaks_the_calibration(home, tmp_path, stethoscope):
    away = made_up_run(tmp_path / "away", seed=5, change=_shifted)
    out = stethoscope("train", f"run={home}", f"test=[{away}]", "detector.features=[nll]", *QUICK, code=0)
    assert "transferred − trained there" in out
    own, other = _rows(home)
    assert set(own) == {"target", "mentions", "images", "hallucinated", "at home"}
    # one feature under a rising function ranks the same wherever it was fitted
    assert other["transferred"]["auroc"]["value"] == pytest.approx(other["trained there"]["auroc"]["value"])
    assert other["difference"]["auroc"]["low"] == other["difference"]["auroc"]["high"] == 0
    assert other["difference"]["ece"]["low"] > 0.01


def test_figures_are_those_of_the_saved_detector_on_images_it_has_not_seen(home, tmp_path, stethoscope):
    away = made_up_run(tmp_path / "away", images=150, seed=8)
    stethoscope("train", f"run={home}", f"test=[{away}]", "seed=2", *QUICK, code=0)
    detector, table = Detector.load(home / "detector"), RunStore(away).tokens("chair")
    folds = split_groups(table["group"], {"train": 0.5, "calibration": 0.2, "test": 0.3}, seed=2)
    test = mention_rows(table[folds["test"]])
    probabilities, label = detector.predict(test), test["label"].to_numpy()
    row = _rows(home)[1]
    assert (row["mentions"], row["images"]) == (len(test), test["group"].nunique())
    assert row["transferred"]["auroc"]["value"] == pytest.approx(auroc(label, probabilities))
    assert row["transferred"]["ece"]["value"] == pytest.approx(ece(label, probabilities))
    warnings = pd.DataFrame(map(json.loads, (home / "warnings.jsonl").read_text().splitlines()))
    learned = set(warnings.loc[warnings["fold"] != "test", "group"])
    assert not learned & set(test["group"])  # both runs name their images alike


def test_task_to_task_and_subset_to_subset(home, tmp_path, stethoscope):
    def halves(table):
        return table.assign(subset=np.where(table["sample_id"].str[-1].astype(int) % 2, "odd", "even"))

    away = made_up_run(tmp_path / "away", task="pope", seed=9, change=halves)
    words = (f"test=[{away},{{run: {away}, subset: even}}]", *QUICK)
    stethoscope("train", f"run={home}", *words, code=0)
    assert [row["target"] for row in _rows(home)] == ["home", "away pope", "away pope even"]
    assert _rows(home)[1]["mentions"] > _rows(home)[2]["mentions"]
    out = stethoscope("train", f"run={away}", "mentions=pope", "subset=odd", f"test=[{{run: {away}, subset: even}}]",
                      *QUICK, code=0)  # fmt: skip
    assert "away pope even" in out
    assert "unknown subset 'evn'; did you mean 'even'" in stethoscope(
        "train", f"run={home}", f"test=[{{run: {away}, subset: evn}}]", "overwrite=true", *QUICK
    )


def test_another_depth_is_refused_and_its_columns_are_named(home, tmp_path, stethoscope):
    def deeper(table):
        return table.assign(attn_image_l01=table["attn_image_l00"])

    away = made_up_run(tmp_path / "away", change=deeper)
    line = stethoscope("train", f"run={home}", f"test=[{away}]", *QUICK)
    assert "away chair has 1 layers or heads more (attn_image_l01)" in line
    line = stethoscope("train", f"run={away}", f"test=[{home}]", *QUICK)
    assert "home chair lacks 1 column (attn_image_l01)" in line
    words = ("detector.exclude=['*_l*']", *QUICK)
    assert "transfer" in stethoscope("train", f"run={home}", f"test=[{away}]", *words, code=0)
    assert Detector.load(home / "detector").features == ("nll", "position")


def test_states_of_other_weights_are_refused(tmp_path, stethoscope):
    def seeing(table):
        return table.assign(attended_embedding_d0000=table["nll"], attended_embedding_d0001=-table["position"])

    home, away = (made_up_run(tmp_path / name, change=seeing) for name in ("home", "away"))
    for run, weights in ((home, "sha256:a"), (away, "sha256:b")):
        model = {"chair": {"adapter": {"weights": weights, "model_id": f"model of {run.name}"}}}
        (run / "fingerprint.json").write_text(json.dumps(model))
    line = stethoscope("train", f"run={home}", f"test=[{away}]", *QUICK)
    assert "away chair has other weights than the model that the detector learns from, model of home" in line
    assert not (home / "detector").exists()  # it is said before anything is fitted
    for words in (("detector.exclude=['attended_embedding*']",), ("detector.visual_consistency=false",)):
        words += ("overwrite=true", *QUICK)
        assert "transfer" in stethoscope("train", f"run={home}", f"test=[{away}]", *words, code=0)
    (away / "fingerprint.json").write_text((home / "fingerprint.json").read_text())
    assert "transfer" in stethoscope("train", f"run={home}", f"test=[{away}]", "overwrite=true", *QUICK, code=0)


def test_wrong_targets_are_one_line(home, tmp_path, stethoscope):
    assert "is what the detector is trained on" in stethoscope("train", f"run={home}", f"test={home}", *QUICK)
    assert "no samples.jsonl in runs/none" in stethoscope("train", f"run={home}", "test=[runs/none]", *QUICK)
    line = stethoscope("train", f"run={home}", f"test=[{{run: {home}, task: chair}}]", *QUICK)
    assert "should be a run directory or {run: ..., mentions: ..., subset: ...}" in line
    few = made_up_run(tmp_path / "few", images=2)
    assert "few chair" in stethoscope("train", f"run={home}", f"test=[{few}]", *QUICK)


def test_greedy_to_sampled_answers_of_a_model(finished, tmp_path, stethoscope):
    """An experiment on real runs: the home run is left as it is, all figures are in a run of their own."""
    before = (finished / "greedy" / "metrics.json").read_bytes()
    words = (f"run={finished / 'greedy'}", f"test=[{finished / 'sampled'}]", "features=fast", *QUICK)
    out = stethoscope("train", "experiment=transfer_sampling", *words, code=0)
    assert "sampled chair" in out
    assert (finished / "greedy" / "metrics.json").read_bytes() == before
    rows = _rows(tmp_path / "runs" / "transfer-sampling")
    assert [row["target"] for row in rows] == ["greedy", "sampled chair"]
    for figures in (rows[0]["at home"], rows[1]["transferred"], rows[1]["trained there"]):
        assert 0.5 < figures["auroc"]["value"] <= 1


@pytest.mark.parametrize("name", ["task", "split", "sampling", "model"])
def test_every_study_composes_and_says_what_is_missing(name, stethoscope):
    line = stethoscope("train", f"experiment=transfer_{name}", "logger=none")
    assert re.match(r"stethoscope: run=runs/\S+ is no directory; ", line)
    assert f"`stethoscope train experiment=transfer_{name} --help` tells how to make it" in line
    assert "stethoscope extract run=runs/" in stethoscope("train", f"experiment=transfer_{name}", "--help", code=0)


def test_a_shift_is_named_below_the_table_and_recalibration_mends_it(home, tmp_path, stethoscope):
    away = made_up_run(tmp_path / "away", seed=5, change=_shifted)
    out = stethoscope("train", f"run={home}", f"test=[{away}]", *QUICK, code=0)
    assert re.search(r"away chair: shift in the (answers|share of hallucinations)", out)
    assert _rows(home)[1]["shift"].startswith("shift in the")
    new, table = tmp_path / "new", RunStore(away).tokens("chair")
    out = stethoscope(
        "train", f"run={away}", f"recalibrate={home}", f"run_dir={new}", "labels=50", "logger=none", code=0
    )
    assert "recalibrated on 50 pictures with labels" in out
    before, after = Detector.load(home), Detector.load(new)
    test = mention_rows(table)
    errors = [ece(test["label"].to_numpy(), detector.predict(test)) for detector in (before, after)]
    assert errors[1] < 0.6 * errors[0]
    assert after.certificate is None
    again = ("train", f"run={away}", f"recalibrate={home}", f"run_dir={new}", "logger=none", "overwrite=true")
    stethoscope(*again, "labels=0", code=0)
    assert Detector.load(new).notes["recalibrated"]["labelled"] is False
    stethoscope(*again, "labels=-1", code=2)
