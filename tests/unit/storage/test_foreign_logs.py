"""Logs of other tools on the embedded model give the metrics of our own run; each format's traps are read rightly."""

import json
import sys
import zipfile
from pathlib import Path

import pytest

from stethoscope.core.errors import CapabilityError, DataError
from stethoscope.core.types import Answer
from stethoscope.storage import foreign_logs
from stethoscope.storage.logged_answers import read_answers
from stethoscope.tasks.chair import Chair
from stethoscope.tasks.pope import Pope

LOGS = Path(__file__).parent / "logs"
TASKS = {
    "pope": lambda: Pope("testbed", subsets=["adversarial"], scenes=2, per_scene=2),
    "chair": lambda: Chair("testbed", scenes=4),
}
FILES = [
    ("inspect", "inspect_{}.eval"),
    ("inspect", "inspect_pope.json"),
    ("lm_eval", "lm_eval/samples_scenes_{}_*.jsonl"),
    ("lmms_eval", "lmms_eval/*_samples_scenes_{}.jsonl"),
    ("openai_batch", "openai_batch_{}.jsonl"),
    ("llama_cpp", "llama_cpp_{}.jsonl"),
    ("vlmevalkit", "vlmevalkit_{}.xlsx"),
    ("vlmevalkit", "vlmevalkit_{}.tsv"),
    ("vlmevalkit", "vlmevalkit_{}.json"),
    ("jsonl", "ours_{}.jsonl"),
]
CASES = [(task, *file) for task in TASKS for file in FILES if "{}" in file[1] or task in file[1]]


def find(pattern, task):
    (path,) = LOGS.glob(pattern.format(task))
    if path.suffix == ".xlsx":
        pytest.importorskip("openpyxl")
    return path


@pytest.mark.parametrize(("name", "format_", "pattern"), CASES)
def test_metrics_equal_those_of_our_run(name, format_, pattern):
    log = read_answers(find(pattern, name))
    assert log.format == format_
    task = TASKS[name]()
    task.setup()
    samples = task.samples()
    ours = [json.loads(line) for line in (LOGS / f"ours_{name}.jsonl").read_text().splitlines()]
    by_id, by_row = ({getattr(answer, key): answer for answer in log.answers} for key in ("id", "row"))
    assert len(log.answers) == len(samples)
    for row, (sample, record) in enumerate(zip(samples, ours, strict=True)):
        assert sample.id == record["sample_id"]
        answer = by_id.get(sample.id) or by_row[row]
        assert answer.question in (sample.question, None)
        assert answer.text.strip() == record["answer"]["text"]
        assert not answer.error
        score = task.score(sample, Answer(answer.text, (), (), (), True))
        assert (score.status, score.counts) == (record["status"], record["score"]["counts"])


@pytest.mark.parametrize("pattern", ["openai_batch_{}.jsonl", "llama_cpp_{}.jsonl", "ours_{}.jsonl"])
def test_token_ids_and_log_probabilities(pattern):
    records = [json.loads(line)["answer"] for line in (LOGS / "ours_chair.jsonl").read_text().splitlines()]
    for answer, record in zip(read_answers(find(pattern, "chair")).answers, records, strict=True):
        assert list(answer.token_ids) == record["token_ids"]
        assert list(answer.logprobs) == record["logprobs"]
        assert answer.finished is record["finished"]


def test_names_come_from_the_file_of_results():
    log = read_answers(find("lm_eval/samples_scenes_{}_*.jsonl", "pope"))
    assert (log.engine, log.model, log.revision) == ("lm_eval 0.4.13", "model", "main")
    assert log.answers[0].prompt == "USER: <image>\nIs there a book in the image? ASSISTANT:"
    log = read_answers(find("lmms_eval/*_samples_scenes_{}.jsonl", "pope"))
    assert (log.engine, log.model) == ("", "model")


def test_a_folder_with_one_log_or_several(tmp_path):
    with pytest.raises(DataError, match=r"lmms_eval is a folder with 2 logs, \d+_\d+_samples_scenes_chair.jsonl, "):
        read_answers(LOGS / "lmms_eval")
    with pytest.raises(DataError, match="is a folder with no log in it; answers"):
        read_answers(tmp_path)
    (tmp_path / "model").mkdir()
    log = find("lmms_eval/*_samples_scenes_{}.jsonl", "pope")
    (tmp_path / "model" / log.name).write_bytes(log.read_bytes())
    assert read_answers(tmp_path).path == tmp_path / "model" / log.name


# --- traps of each format ---------------------------------------------------------------------------------------------


def lmms(doc_id, **values):
    return {"doc_id": doc_id, "target": "yes", "input": "Is it?", "filtered_resps": "Yes", **values}


def test_lmms_eval_takes_the_raw_response(write):
    thought = "<think>a dog</think>Yes"
    rows = [
        lmms(0, resps=thought),
        lmms(1, resps=[thought, "other"]),  # two repeats
        lmms(2, resps=[["Yes", "No", "No"]]),
        lmms(3, filtered_resps=["Yes"]),
        lmms(4, filtered_resps=[]),
        lmms(5, input=[{"role": "user"}]),
    ]
    log = read_answers(write(rows))
    assert [answer.text for answer in log.answers] == [thought, thought, "Yes", "Yes", "", "Yes"]
    assert log.answers[0].reasoning == ((0, 20),)
    assert log.notes == ("3 further answers (repeats) are left out",)
    assert [answer.row for answer in log.answers] == list(range(6))
    assert log.answers[4].error == "the answer is empty"
    assert log.answers[5].question is None


def test_lm_eval_has_a_line_for_each_filter(write):
    rows = [
        {"doc_id": n, "doc": {"query": "Is it?"}, "arguments": {}, "resps": [["Yes it is"]], "filter": name}
        for n in range(2)
        for name in ("none", "first word")
    ]
    log = read_answers(write(rows))
    assert [(answer.row, answer.text, answer.question) for answer in log.answers] == [
        (0, "Yes it is", "Is it?"),
        (1, "Yes it is", "Is it?"),
    ]
    assert log.notes == ("2 lines repeat an answer under another filter and are left out",)


def test_lm_eval_ids_that_are_not_unique(write):
    rows = [{"doc_id": n, "doc": {"id": id_}, "arguments": {}, "resps": [["Yes"]]} for n, id_ in enumerate((7, 7, 8))]
    log = read_answers(write(rows))
    assert [(answer.id, answer.row) for answer in log.answers] == [(None, 0), (None, 1), (None, 2)]
    assert log.notes == ("ids in the documents are not unique; samples are known by their rows",)
    assert [answer.id for answer in read_answers(write(rows[1:])).answers] == ["7", "8"]


TWO_PARTS = "<think>a</think>b</think>"


def test_vlmevalkit_failed_calls_and_thinking(write):
    rows = [
        {"index": 1, "question": "Is it?", "answer": "yes", "prediction": "Failed to obtain answer via API."},
        {"index": 2, "question": "Is it?", "answer": "yes", "prediction": "yes", "thinking": "a dog"},
        {"index": 3, "question": "Is it?", "answer": "yes", "prediction": "yes", "thinking": TWO_PARTS},
        {"index": 4, "question": "Is it?", "answer": "yes", "prediction": float("nan"), "thinking": None},
        {"index": 5, "question": "Is it?", "answer": "yes", "prediction": 7},
    ]  # fmt: skip
    log = read_answers(write(json.dumps(rows, indent=4)))
    failed, thought, parts, missing, number = log.answers
    assert (failed.text, failed.error) == ("", "Failed to obtain answer via API.")
    assert thought.text[slice(*thought.reasoning[0])] + "yes" == thought.text
    assert parts.text[slice(*parts.reasoning[0])] == TWO_PARTS
    assert (missing.error, number.text) == ("the answer is empty", "7")
    assert [answer.row for answer in log.answers] == [0, 1, 2, 3, 4]


def test_vlmevalkit_cells_of_excel(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in (["index", "question", "prediction"], [0, "Is it?", "a_x000D_b"], [1, "Is it?", None], [2, "?", "x\ny"]):
        book.active.append(row)
    book.save(tmp_path / "log.xlsx")
    assert [answer.text for answer in read_answers(tmp_path / "log.xlsx").answers] == ["a\rb", "", "x\ny"]


@pytest.mark.parametrize(
    ("change", "name"), [(("A1:B2", "A1:XFD2"), "_MOST_CELLS"), (('<row r="2"', '<row r="99999"'), "_MOST_ROWS")]
)
def test_a_sheet_with_a_cell_far_away_is_refused(tmp_path, monkeypatch, change, name):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in (["index", "prediction"], [1, "yes"]):
        book.active.append(row)
    book.save(tmp_path / "near.xlsx")
    with zipfile.ZipFile(tmp_path / "near.xlsx") as near, zipfile.ZipFile(tmp_path / "far.xlsx", "w") as far:
        for entry in near.namelist():
            text = near.read(entry).decode()
            if entry.endswith("sheet1.xml"):
                assert change[0] in text
                text = text.replace(*change)
                text = text if name == "_MOST_CELLS" else text.replace('<dimension ref="A1:B2" />', "")
            far.writestr(entry, text)
    monkeypatch.setattr(foreign_logs, name, 10_000)
    assert len(read_answers(tmp_path / "near.xlsx").answers) == 1
    with pytest.raises(DataError, match=r"has a sheet of more than [\d,]+ rows or [\d,]+ cells"):
        read_answers(tmp_path / "far.xlsx")


def test_excel_needs_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(CapabilityError, match=r"`pip install lvlm-stethoscope\[xlsx\]` to read it"):
        read_answers(LOGS / "vlmevalkit_pope.xlsx")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("once upon a time", "begins with 'once upon a time', which is no log that is known; answers.format is one of"),
        ('{"a": 1, "b": 2}', "has objects with the keys a, b, which is no log that is known; answers.format is one of"),
        ("[1, 2]", "a JSON object was expected, not 1"),
        ("", "is empty"),
        ([lmms(0), lmms(0, filtered_resps="No")], "doc_id 0 is used before, in"),
        ([lmms(0, filtered_resps=[["-1.5", "False"], ["-2", "True"]])], "is a choice's log-probability; logs"),
        ([lmms(0, filtered_resps=[3])], "response 3 is no text"),
        ([lmms("x")], "row 'x' should be a whole number from 0 on"),
        ([lmms(0), {"doc_id": 1}], "line 2: key 'filtered_resps' is missing"),
        ("index\tprediction\n1\tyes\n2\n", "line 3: 1 cells, but the first line names 2 columns"),
        ('index\tprediction\n1\t"yes', "line 2: no table (unexpected end of data)"),
        ("index,prediction\n1,yes\n1,no\n", "line 3: id 1 is used before, in"),
    ],
)  # fmt: skip
def test_bad_logs_give_one_clear_line(refused, content, message):
    refused(content, message)
