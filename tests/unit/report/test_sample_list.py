"""The list of samples: rows of one run, and two runs joined by their samples."""

import json
from dataclasses import replace

import pytest

from stethoscope.core.types import Answer, Mention, Score
from stethoscope.report import sample_list
from stethoscope.report.run_source import RunReader
from stethoscope.report.sample_list import ANSWER_LENGTH, paired_rows, read_state, sample_rows
from stethoscope.storage.records import Record
from stethoscope.storage.run_dir import RunStore

LINE = {"group": "", "fold": "test", "end": 9, "evidence": None, "prior": None, "visual_evidence": []}


def record(sample, text="A dog.", task="chair", **values):
    answer = Answer(text, (1,), ((0, len(text)),), (-0.1,), True)
    mentions = (Mention(2, 5, "dog", 1),)
    return Record(task, sample, sample, "all", f"{sample}.png", "What?", answer=answer, mentions=mentions, **values)


@pytest.fixture
def run_of(tmp_path):
    """Return a function that makes a run, finished unless it is said to be planned larger."""

    def make(name, records, warnings=(), planned=None):
        store = RunStore(tmp_path / name)
        for task in dict.fromkeys(entry.task for entry in records):
            own = [entry for entry in records if entry.task == task]
            store.open_task(task, {"adapter": {"model_id": name}, "task": {"name": task}}, planned=planned)
            store.append(own)
            if planned is None:
                store.finish(task, [entry.sample_id for entry in own])
                store.set_status(task, "finished")
                store.write_metrics(task, {"primary": "chair_i", "counts": {}, "metrics": []})
        lines = [json.dumps({"task": "chair", **LINE, **line}) for line in warnings]
        (tmp_path / name / "warnings.jsonl").write_text("".join(f"{line}\n" for line in lines))
        return RunReader.read(tmp_path / name, in_progress=True)

    return make


def warning(sample, name, label, warned, probability=0.5):
    return {
        "sample_id": sample,
        "object": name,
        "label": label,
        "warned": warned,
        "probability": probability,
        "start": 1,
    }


def test_a_row_says_what_became_of_every_mention(run_of):
    warned = [warning("a", "dog", 1, True, 0.91234), warning("a", "cat", 0, True), warning("b", "dog", 1, False)]
    rows = sample_rows(run_of("one", [record("a"), record("b", "x" * 400), record("c")], warned))
    assert [row["mentions"] for row in rows] == [
        [["dog", "caught", 0.9123, 1, 9], ["cat", "false alarm", 0.5, 1, 9]],
        [["dog", "missed", 0.5, 1, 9]],
        [["dog", "hallucinated", None, 2, 5]],  # labelled, and judged by no detector
    ]
    assert [row["fold"] for row in rows] == ["test", "test", ""]
    assert len(rows[1]["answer"]) == ANSWER_LENGTH + 2
    assert len(sample_rows(run_of("whole", [record("b", "x" * 400)]), None)[0]["answer"]) == 400


def test_an_answer_that_can_be_right_is(run_of):
    scores = [Score("ok", {"tp": 1.0, "fp": 0.0, "tn": 0.0, "fn": 0.0}), Score("ok", {"fp": 1.0}), None]
    entries = [
        record(name, "Yes", "pope", score=score, reference={"label": "yes"})
        for name, score in zip("abc", scores, strict=True)
    ]
    rows = sample_rows(run_of("one", entries))
    assert [(row["right"], row["truth"], len(row["mentions"])) for row in rows] == [
        (True, "yes", 0),
        (False, "yes", 0),
        (None, "yes", 1),
    ]


def test_two_runs_are_joined_by_picture_and_question(run_of):
    first = run_of("first", [record("a"), record("b"), record("c"), record("d"), record("e")])
    changed = [
        record("a", "A cat."),
        replace(record("b"), question="Where?"),
        replace(record("c"), image="other.png"),
        record("d", image_sha256="1"),
        record("f"),
    ]
    rows, remark = paired_rows(first, run_of("other", changed))
    assert [(row["sample"], row["answer"], row["other"]["answer"], row["same"]) for row in rows] == [
        ("a", "A dog.", "A cat.", False),
        ("d", "A dog.", "A dog.", True),
    ]
    assert (
        remark
        == "Left out: 1 sample only in first, 1 sample only in other, 2 samples with another picture or question."
    )


def test_a_list_that_is_cut_says_so(run_of, monkeypatch):
    first, other = run_of("first", [record("a"), record("b")]), run_of("other", [record("b"), record("a")])
    assert sample_list._describe_limit(first) == ""
    monkeypatch.setattr(sample_list, "MOST_SAMPLES", 1)
    assert [row["sample"] for row in sample_rows(first)] == ["a"]
    rows, remark = paired_rows(first, other)
    assert ([row["sample"] for row in rows], remark) == (["a"], "")  # b is in both
    assert sample_list._describe_limit(first) == "chair: only the first 1 samples are listed."


def test_runs_that_share_nothing_say_so(run_of):
    chair, pope = run_of("a", [record("1")]), run_of("b", [record("1", task="pope")])
    assert paired_rows(chair, pope) == (
        [],
        "a (chair) and b (pope) have no task in common, so that nothing can be set side by side.",
    )
    rows, remark = paired_rows(chair, run_of("more", [record("1"), record("1", task="pope")]))
    assert (len(rows), remark) == (1, "Left out: task pope only in more.")
    rows, remark = paired_rows(chair, run_of("c", [record("2")]))
    assert rows == []
    assert remark.startswith("a and c share no sample. Left out: 1 sample only in a")


def test_a_run_in_progress_shows_what_there_is(run_of):
    stale = [warning("a", "dog", 0, False)]  # of the answers that the task had before
    source = run_of("one", [record("a"), record("b")], stale, planned=5)
    assert source.progress() == "chair: 2 of 5 answered, running"
    before = read_state([source.folder])
    with (source.folder / "samples.jsonl").open("a") as file:
        file.write('{"task": "chair", "sample_id": "c", "ans')  # being written
    assert read_state([source.folder]) != before
    reader = RunReader.read(source.folder, in_progress=True)
    assert [row["sample"] for row in sample_rows(reader)] == ["a", "b"]
    assert {row["mentions"][0][1] for row in sample_rows(reader)} == {"hallucinated"}
    (source.folder / "planned.json").unlink()  # of a run by an earlier version
    assert source.progress() == "chair: 2 answered, running"
