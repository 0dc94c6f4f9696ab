"""Results as tables and in a terminal: which rows of the leaderboard are shown, and what the notes say about it."""

from dataclasses import replace

import pytest
from helpers.tiny_world import TinyAdapter, TinyTask

from stethoscope.core.files import append
from stethoscope.core.types import Answer
from stethoscope.detection.detector_results import DetectorResults, Leaderboard, LeaderboardRow
from stethoscope.evaluation.evaluator import Evaluator
from stethoscope.evaluation.results import TaskResults
from stethoscope.metrics.bootstrap import Interval, MetricRow
from stethoscope.report.metrics_tables import (
    SINGLE_FEATURES,
    leaderboard_tables,
    print_answer,
    print_results,
    shown_rows,
    task_table,
)
from stethoscope.report.tables import markdown, text
from stethoscope.storage.records import Record, encode_line
from stethoscope.storage.run_dir import RunStore

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


def test_the_note_names_features_that_never_change():
    plain = results(3, NAMES[0])
    assert "never change" not in next(leaderboard_tables(plain)).note
    board = replace(plain.leaderboard, constant=("flat", "still"))
    note = next(leaderboard_tables(replace(plain, leaderboard=board))).note
    assert note.endswith(" Features that never change in the training images, and so say nothing: flat, still.")


def test_results_print_as_text_and_markdown(capsys):
    results = Evaluator().run(TinyAdapter("a model"), TinyTask(count=40))
    table = task_table(results)
    lines = text(table).splitlines()
    assert lines[:2] == ["tiny", "metric    easy                  hard                  mean"]
    assert lines[2].startswith("accuracy  1.000 [1.000, 1.000]  0.000 [0.000, 0.000]  0.500 [")
    assert lines[-1].startswith("40 samples: 40 ok, 0 unparsed, 0 failed; 0 truncated")
    assert lines[-1].endswith("From 20 images.")
    assert markdown(table).splitlines()[3] == "| --- | --- | --- | --- |"
    print_results(results)
    assert capsys.readouterr().out.splitlines()[-2:] == [results.summary(), "From 20 images."]


def test_few_images_have_no_interval(capsys):
    results = replace(Evaluator().run(TinyAdapter("a model"), TinyTask(count=8)), notes=("A note.",))
    line = text(task_table(results)).splitlines()[2]
    assert line.split() == ["accuracy", "1.000", "–", "0.000", "–", "0.500", "–"]
    print_results(results)
    notes = [results.summary(), "A note.", "From 4 images. –: no interval, from fewer than 10 images."]
    assert capsys.readouterr().out.splitlines()[-3:] == notes
    assert {row["low"] for row in results.to_dict()["metrics"]} == {None}


def test_names_of_subsets_are_no_markup(capsys):
    rows = [MetricRow("right", name, Interval(0.5, 0.4, 0.6, 2, 2)) for name in ("[/x]", "[red]a[/red]")]
    counts = dict.fromkeys(("samples", "ok", "unparsed", "failed", "truncated"), 0)
    print_results(TaskResults("[b]", "right", tuple(rows), counts))
    out = capsys.readouterr().out
    assert "[/x]" in out
    assert "[red]a[/red]" in out


def test_the_answer_that_is_shown_is_one_of_the_task(tmp_path, capsys):
    store = RunStore(tmp_path)
    for task, probability in (("chair", 0.9), ("other", 0.99)):  # of samples of one name
        answer = Answer("a dog", (1, 2), ((0, 1), (1, 5)), (-0.1, -0.1))
        store.open_task(task, {"adapter": {}, "task": {}})
        store.append([Record(task, "1" if task == "chair" else "2", "g", "all", "x.png", "What?", answer=answer)])
        line = {"task": task, "sample_id": "1" if task == "chair" else "2", "group": "g", "object": "dog", "start": 2}
        line |= {"end": 5, "fold": "test", "label": 1, "probability": probability, "evidence": None, "prior": None}
        append(tmp_path / "warnings.jsonl", encode_line({**line, "visual_evidence": [], "warned": True}))
    print_answer(store, "chair")
    assert "a dog [90%]" in capsys.readouterr().out
