"""Results in a terminal."""

from dataclasses import replace

from helpers.tiny_world import TinyAdapter, TinyTask

from stethoscope.core.files import append
from stethoscope.core.types import Answer
from stethoscope.evaluation.evaluator import Evaluator
from stethoscope.evaluation.results import TaskResults
from stethoscope.metrics.bootstrap import Interval, MetricRow
from stethoscope.report.console import print_answer, print_results
from stethoscope.report.metrics_tables import task_table
from stethoscope.report.tables import markdown, text
from stethoscope.storage.records import Record, encode_line
from stethoscope.storage.run_dir import RunStore


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
