"""Which rows of the leaderboard its tables show, and what their notes say about it."""

import pytest

from stethoscope.detection.detector_results import DetectorResults, Leaderboard, LeaderboardRow
from stethoscope.metrics.bootstrap import Interval
from stethoscope.report.metrics_tables import SINGLE_FEATURES, leaderboard_tables, shown_rows

NAMES = [f"attn_image_l{layer:02d}" for layer in range(SINGLE_FEATURES + 20)]


def row(name, kind, auroc):
    values = {"auroc": auroc, "auprc_hallucinated": 0.5, "base_rate": 0.25}
    return LeaderboardRow(name, kind, 1, {key: Interval(value, value, value, 100, 50) for key, value in values.items()})


def results(features, best, plugins=()):
    """Made-up results: a detector, a baseline, and columns of our features by falling AUROC in training."""
    names = [*NAMES[:features], *plugins]
    singles = [row(name, "feature", 0.6 + 0.01 * index) for index, name in enumerate(names)]
    board = Leaderboard(
        (row("logistic", "detector", 0.9), row("constant", "baseline", 0.5), *singles),
        (),
        {"auroc": best},
        {"auroc_matched": {"pairs": 12, "items": 40, "share": 0.4}},
    )
    folds = {name: {"images": 50, "mentions": 100, "hallucinated": 25} for name in ("train", "calibration", "test")}
    return DetectorResults({"folds": folds, "mentions": {"repeats": "first"}}, board, (), {})


def test_the_best_features_in_training_are_shown_by_auroc_in_the_test():
    many = results(SINGLE_FEATURES + 20, NAMES[SINGLE_FEATURES + 9])
    names = [item.name for item in shown_rows(many.leaderboard)]
    assert names == ["logistic", NAMES[SINGLE_FEATURES + 9], *reversed(NAMES[:SINGLE_FEATURES]), "constant"]


def test_features_of_plugins_are_shown_with_their_best_column():
    many = results(SINGLE_FEATURES + 1, NAMES[0], plugins=["digits", "mine_l03", "mine_l01"])
    names = [item.name for item in shown_rows(many.leaderboard)]
    assert names == ["logistic", "mine_l03", "digits", *reversed(NAMES[:SINGLE_FEATURES]), "constant"]
    note = next(leaderboard_tables(many)).note
    assert note.endswith("are shown, the best on the training images and those of plugins.")


def test_the_note_says_how_many_features_are_left_out():
    ranking, at_work = leaderboard_tables(results(SINGLE_FEATURES + 20, NAMES[SINGLE_FEATURES + 9]))
    shown, measured = SINGLE_FEATURES + 1, SINGLE_FEATURES + 20
    left_out = f"{shown} of the {measured} single features in metrics.json are shown, the best on the training images."
    assert ranking.note.endswith(left_out)
    assert ranking.note.startswith("100 first mentions of an object in 50 test images, 25.0% hallucinated")
    assert at_work.note.startswith("PRR: 0 rejects mentions in random order, 1 all hallucinated ones first.")


@pytest.mark.parametrize("features", [1, SINGLE_FEATURES])
def test_the_note_is_silent_where_all_features_are_shown(features):
    ranking, _ = leaderboard_tables(results(features, NAMES[0]))
    assert "single features" not in ranking.note
