"""Published detectors on the leader board: which there are, how each is judged, whom ours is compared with."""

from dataclasses import replace

import numpy as np
import pytest
from helpers.token_tables import token_table

from stethoscope.core.errors import ConfigError
from stethoscope.core.token_table import feature_names, mention_rows
from stethoscope.detection import leaderboard as board
from stethoscope.detection.baselines import baselines
from stethoscope.detection.detector import Detector
from stethoscope.detection.detector_results import Leaderboard
from stethoscope.detection.leaderboard import AREAS
from stethoscope.detection.learners import make_learner
from stethoscope.detection.published import available_methods, cost_of, left_out, refits, score_published
from stethoscope.detection.training import train_detector
from stethoscope.features import named_set, set_names
from stethoscope.metrics import classification
from stethoscope.metrics.bootstrap import split_groups
from stethoscope.report.metrics_tables import leaderboard_tables

FRACTIONS = {"train": 0.5, "calibration": 0.2, "test": 0.3}


def made_up():
    """``nll`` low where it should be high, a lens of which the second layer tells, heads, a question, a contrast."""
    random = np.random.default_rng(0)
    table = token_table(300, seed=2)
    evidence = table["nll"].to_numpy()
    noise = random.normal(size=(5, len(table))).astype(np.float32)
    named = (table["mention_index"] >= 0).to_numpy()
    return table.drop(columns=["mass", "noise"]).assign(
        nll=-evidence,
        contextual_lens_c_l00=noise[0],
        contextual_lens_c_l01=-evidence,
        head_image_q_l00h00=evidence + noise[1],
        head_image_q_l00h01=evidence + noise[2],
        verify_yes=np.where(named, -evidence - noise[3] / 2, np.nan).astype(np.float32),
        vcd_gap=-evidence,
        vcd_logprob=noise[4],
        noise_divergence=noise[4],
        hidden_middle_q_d0000=noise[4],
    )


TABLE = made_up()
NAMES = ["contextual_lens", "nll", "self_verification", "svar_heads", "vcd"]


@pytest.fixture(scope="module")
def parts():
    folds = split_groups(TABLE["group"].to_numpy(str), FRACTIONS, seed=1)
    return {fold: mention_rows(TABLE[mask]) for fold, mask in folds.items()}


@pytest.fixture(scope="module")
def trained():
    before, board.SHUFFLES = board.SHUFFLES, 2
    try:
        return train_detector(TABLE, Detector(), seed=1, replicates=100, published=True, sets=["full"])
    finally:
        board.SHUFFLES = before


def method(name):
    return next(score for score in available_methods(TABLE) if score.name == f"paper/{name}")


def test_those_are_there_of_which_all_features_are():
    assert [score.name for score in available_methods(TABLE)] == [f"paper/{name}" for name in NAMES]
    assert [score.name for score in available_methods(TABLE.drop(columns="vcd_logprob"))] == [
        f"paper/{name}" for name in NAMES if name != "vcd"
    ]
    empty = TABLE.assign(nll=np.float32(np.nan))
    assert "paper/nll" not in [score.name for score in available_methods(empty)]


def test_pas_is_the_mass_on_the_earlier_answer_in_layer_0():
    """Where a table has that column and not PAS's own."""
    table = TABLE.assign(attn_previous_l00=TABLE["nll"], attn_previous_l01=TABLE["vcd_logprob"])
    pas = next(each for each in available_methods(table) if each.name == "paper/pas")
    assert (pas.columns, pas.score) == (("attn_previous_l00",), ("attn_previous_l00",))
    own = next(each for each in available_methods(table.assign(pas_q=table["nll"])) if each.name == "paper/pas")
    assert own.score == ("pas_q",)


def test_what_is_not_measured_is_named(trained):
    names = left_out(available_methods(TABLE))
    assert {"paper/haloprobe", "paper/hidden", "paper/svar"} <= set(names)
    assert not {f"paper/{name}" for name in NAMES} & set(names)
    assert "paper/blank" not in names  # costs a pass more
    board = trained.results.leaderboard
    assert board.left_out == names == Leaderboard.from_dict(board.to_dict()).left_out
    note = next(iter(leaderboard_tables(trained.results))).note
    assert "not here, for lack of their features" in note
    assert "haloprobe" in note


def test_a_score_has_the_papers_direction_even_if_it_is_wrong(parts):
    score = score_published(method("nll"), parts, {})
    np.testing.assert_array_equal(score.values, parts["test"]["nll"].to_numpy())
    assert classification.auroc(parts["test"]["label"].to_numpy(), score.values) < 0.3
    assert (score.sign, score.probability) == (1, False)
    assert score.note == "nll, high for hallucinated by the paper"


def test_a_layer_is_chosen_in_training_where_the_paper_chooses_it(parts):
    score = score_published(method("contextual_lens"), parts, {})
    np.testing.assert_array_equal(score.values, -parts["test"]["contextual_lens_c_l01"].to_numpy())
    assert "layer by the training fold, of 2" in score.note


def test_what_learns_is_fitted_on_its_columns_and_the_same_folds(parts):
    settings = {"kind": "network", "hidden": [64], "epochs": 50}
    declared = replace(method("svar_heads"), learner=settings)
    score, plain = (score_published(each, parts, {}) for each in (declared, replace(declared, learner=None)))
    own = Detector(features=["head_image_q_*"]).fit(parts["train"], parts["calibration"])
    np.testing.assert_allclose(plain.values, own.predict(parts["test"]))
    network = make_learner(declared.columns, settings, {})
    network.fit(parts["train"], parts["calibration"])
    np.testing.assert_allclose(score.values, network.predict(parts["test"]))
    assert score.note == "network (64 hidden units, 50 epochs) on 2 columns"
    assert score.probability
    assert plain.probability


def test_gaps_are_filled_by_the_training_fold(parts):
    holes = {fold: part.assign(verify_yes=part["verify_yes"].where(part.index % 3 > 0)) for fold, part in parts.items()}
    score = score_published(method("self_verification"), holes, {})
    middle = np.median(holes["train"]["verify_yes"].dropna())
    expected = np.where(parts["test"].index % 3 > 0, parts["test"]["verify_yes"], middle)
    np.testing.assert_allclose(score.values, -expected)


def test_rows_of_the_leader_board(trained):
    rows = {row["name"]: row for row in trained.results.to_dict()["leaderboard"]["rows"]}
    there = [name for name, row in rows.items() if row["kind"] == "published"]
    assert there == [f"paper/{name}" for name in NAMES]
    assert rows["paper/vcd"]["cost"] == "one more forward pass"
    assert rows["detector"]["cost"] == rows["paper/self_verification"]["cost"] == "one more question per mention"
    assert rows["nll"]["cost"] == "same forward pass"
    assert rows["text prior"]["cost"] == ""
    assert "hidden_middle_q_d0000" not in rows  # a dimension means nothing by itself
    assert "ece" in rows["paper/svar_heads"]["metrics"]
    assert "ece" not in rows["paper/nll"]["metrics"]


def test_ours_is_compared_with_the_best_of_one_pass_and_with_self_verification(trained):
    leaderboard_dict = trained.results.to_dict()["leaderboard"]
    rows = {row["name"]: row for row in leaderboard_dict["rows"]}
    single = [f"paper/{name}" for name in ("contextual_lens", "nll", "svar_heads")]
    for metric in AREAS:
        best = max(single, key=lambda name: rows[name]["metrics"][metric]["value"])
        assert leaderboard_dict["best_published"][metric] == best
        others = [
            row["other"]
            for row in leaderboard_dict["differences"]
            if (row["detector"], row["metric"]) == ("detector", metric)
        ]
        assert {best, "paper/self_verification", "position only", "text prior"} <= set(others)
    ahead = next(
        row
        for row in leaderboard_dict["differences"]
        if (row["other"], row["metric"]) == ("paper/self_verification", "auroc")
    )
    expected = [rows[name]["metrics"]["auroc"]["value"] for name in ("detector", "paper/self_verification")]
    assert ahead["value"] == pytest.approx(expected[0] - expected[1])


def test_other_sets_for_the_same_detector():
    detectors = refits(Detector("boosting", seed=3), ["paper/nll", "full"], feature_names(TABLE))
    assert detectors["paper/nll"].settings["features"] == ["nll"]
    assert detectors["paper/nll"].settings["estimator"] == "boosting"
    part = next(name for name in detectors if name.startswith("full"))
    assert part == f"full (8 of {len(named_set('full').names)} features)"
    assert "hidden_middle_q_d0000" in detectors[part].settings["features"]
    with pytest.raises(ConfigError, match="sets=paper/opera: none of its features is computed"):
        refits(Detector(), ["paper/opera"], feature_names(TABLE))
    with pytest.raises(ConfigError, match="unknown feature set 'ful'; did you mean 'full'"):
        refits(Detector(), ["ful"], feature_names(TABLE))


def test_the_dearest_feature_says_the_cost():
    assert cost_of(["nll", "relevancy_peak", "head_image_q_l00h01"]) == "a backward pass"
    assert cost_of(["mine"]) == ""


def test_scores_are_among_their_features():
    scores = {name: named_set(name).score for name in set_names()}
    assert all(score is None for name, score in scores.items() if not name.startswith("paper/"))
    single = [name for name in scores if name.startswith("paper/") and len(named_set(name).features) == 1]
    # one feature is a score by itself, but for the masses of all heads and the dimensions of a state
    states = {name for name in single if named_set(name).features[0].vector}
    assert {name for name in single if scores[name] is None} == {"paper/svar_heads"} | states


def test_a_method_without_values_in_training_is_left_out():
    folds = split_groups(TABLE["group"].to_numpy(str), FRACTIONS, seed=1)
    table = TABLE.assign(verify_yes=TABLE["verify_yes"].where(folds["test"]))
    train = mention_rows(table[folds["train"]])
    assert "paper/self_verification" in [score.name for score in available_methods(table)]
    assert "paper/self_verification" not in [score.name for score in available_methods(train)]


def test_baselines_learn_from_the_rows_that_they_are_measured_on():
    rows = TABLE.assign(is_first_subtoken=TABLE["is_first_subtoken"] & (TABLE["token"] > 5))
    every = mention_rows(rows, "all", "all")
    baseline = baselines("all", "all")["constant"].fit(every)
    assert baseline.predict(every)[0] == pytest.approx(every["label"].mean())
