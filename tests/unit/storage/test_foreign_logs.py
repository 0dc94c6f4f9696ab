"""Logs of other tools on the embedded model give the metrics of our own run; each format's traps are read rightly."""

import io
import json
import sys
import zipfile
import zlib
from pathlib import Path

import pyarrow
import pytest

from stethoscope.core.errors import CapabilityError, DataError
from stethoscope.core.types import Answer
from stethoscope.storage import inspect_logs
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


def test_inspect_logs_probabilities_and_the_end():
    log = read_answers(LOGS / "inspect_pope.eval")
    assert (log.engine, log.model, log.notes) == ("inspect_ai 0.3.285", "embedded/testbed", ())
    assert len(log.answers[0].logprobs) == 2  # " Yes" and the end of the sequence
    assert log.answers[0].finished is True


def test_names_come_from_the_file_of_results():
    log = read_answers(find("lm_eval/samples_scenes_{}_*.jsonl", "pope"))
    assert (log.engine, log.model, log.revision) == ("lm_eval 0.4.13", "model", "main")
    assert log.answers[0].prompt == "USER: <image>\nIs there a book in the image? ASSISTANT:"
    log = read_answers(find("lmms_eval/*_samples_scenes_{}.jsonl", "pope"))
    assert (log.engine, log.model) == ("lmms_eval", "model")


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


@pytest.fixture
def write(tmp_path):
    def write_file(content, name="log.jsonl"):
        path = tmp_path / name
        if isinstance(content, list):
            content = "\n".join(json.dumps(row) for row in content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write_file


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


def test_excel_needs_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(CapabilityError, match=r"`pip install lvlm-stethoscope\[xlsx\]` to read it"):
        read_answers(LOGS / "vlmevalkit_pope.xlsx")


def chat(**choice):
    return {"object": "chat.completion", "model": "m", "choices": [{"index": 0, "finish_reason": "stop", **choice}]}


def test_bodies_of_servers(write):
    token = {"token": "token_id:17", "logprob": -0.5}
    bodies = [
        chat(message={"content": "Yes", "reasoning_content": "a dog"}, logprobs={"content": [token]}),
        chat(message={"content": [{"type": "text", "text": "Yes"}], "reasoning": ""}, token_ids=[3, 4]),
        chat(message={"content": None, "refusal": "I cannot."}),
        {**chat(text="Yes", logprobs={"tokens": ["Yes"], "token_logprobs": [-1.5]}), "prompt_token_ids": [1, 2]},
        {"object": "response", "status": "incomplete", "model": "m", "output": [
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "a dog"}]},
            {"type": "message", "content": [{"type": "output_text", "text": "Yes"}]},
        ]},
        {**chat(), "choices": [
            {"index": 1, "message": {"content": "second"}}, {"index": 0, "message": {"content": "first"}},
        ]},
    ]  # fmt: skip
    plain = read_answers(write(bodies))
    assert plain.format == "openai_batch"
    assert [answer.row for answer in plain.answers] == list(range(6))
    rows = [{"custom_id": f"s{n}", "response": {"status_code": 200, "body": body}} for n, body in enumerate(bodies)]
    log = read_answers(write(rows))
    assert [answer.id for answer in log.answers] == [f"s{n}" for n in range(6)]
    assert log.notes == ("1 further answers (choices) are left out",)
    assert log.model == "m"
    assert [answer.text for answer in log.answers] == [answer.text for answer in plain.answers]
    thought, parts, refused, completion, response, first = log.answers
    assert thought.text == "<think>\na dog\n</think>\n\nYes" == response.text
    assert thought.text[thought.reasoning[0][1] :] == "Yes"
    assert (thought.token_ids, thought.logprobs) == ((17,), (-0.5,))
    assert (parts.text, parts.token_ids) == ("Yes", (3, 4))
    assert refused.text == "I cannot."
    assert (completion.text, completion.logprobs, completion.prompt_token_ids) == ("Yes", (-1.5,), (1, 2))
    assert (response.finished, first.text) == (False, "first")


def test_failed_requests_of_a_batch(write):
    rows = [
        {"custom_id": "a", "response": None, "error": {"code": "server_error", "message": "try\nagain"}},
        {"custom_id": "b", "response": {"status_code": 400, "body": {"error": {"message": "no image"}}}, "error": None},
        {"custom_id": "c", "response": {"status_code": 502, "body": "<html>"}, "error": None},
    ]
    assert [answer.error for answer in read_answers(write(rows)).answers] == ["try again", "no image", "HTTP 502"]


def test_questions_of_a_batch_lie_beside_it(write):
    log = read_answers(LOGS / "openai_batch_pope.jsonl")
    assert log.notes == ("questions are taken from openai_requests_pope.jsonl",)
    alone = read_answers(write((LOGS / "openai_batch_pope.jsonl").read_bytes()))
    assert alone.notes == ()
    assert {answer.question for answer in alone.answers} == {None}


def test_llama_cpp_without_ids_and_cut_prompts(write):
    rows = [
        {"content": "Yes", "tokens": [], "truncated": True, "stop_type": "limit"},
        {"content": "", "stop_type": "eos"},
    ]
    log = read_answers(write(rows))
    assert (log.format, log.engine) == ("llama_cpp", "llama.cpp")
    assert [(answer.row, answer.token_ids, answer.finished) for answer in log.answers] == [
        (0, None, False),
        (1, None, True),
    ]
    assert log.notes == ("1 prompts were cut by the server (truncated)",)


def test_llama_cpp_has_no_probabilities_of_a_stop_word(write):
    probabilities = [{"id": 3, "logprob": -1}]
    rows = [
        {"content": "Yes", "stop_type": "word", "tokens": [3, 4], "completion_probabilities": probabilities},
        {"content": None, "stop_type": "none", "error": "busy"},
    ]
    log = read_answers(write(rows))
    assert (log.answers[0].token_ids, log.answers[0].logprobs) == ((3, 4), None)
    assert log.answers[1].error == "busy"
    assert log.notes == ("1 answers have log-probabilities of some tokens only; they are left out",)


def test_values_of_other_kinds_count_as_missing(write):
    rows = [
        {"object": "response", "output": [{"content": 3}, 4]},
        chat(text="a", logprobs={"content": [1, None]}),
        {**chat(text="a"), "error": ["busy"]},
    ]
    log = read_answers(write(rows))
    assert [answer.error for answer in log.answers] == ["the answer is empty", "", "['busy']"]
    assert log.answers[1].logprobs is None
    with pytest.raises(DataError, match="'choices' or 'output' was looked for in object, model, choices"):
        read_answers(write([{**chat(), "choices": 1.5}]))


# --- inspect_ai -------------------------------------------------------------------------------------------------------

HEADER = {"version": 2, "status": "success", "eval": {"model": "m", "packages": {"inspect_ai": "0.3"}}}


def sample(id_=1, epoch=1, content="Yes", **values):
    choice = {"message": {"role": "assistant", "content": content}, "stop_reason": "stop"}
    return {"id": id_, "epoch": epoch, "input": "Is it?", "output": {"choices": [choice]}, **values}


def archive(*samples, header="header.json", method=zipfile.ZIP_DEFLATED, names=None):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", method) as file:
        if header:
            values = HEADER if header == "header.json" else {"version": 2, "eval": HEADER["eval"]}
            file.writestr(header, json.dumps(values))
        for index, values in enumerate(samples):
            name = names[index] if names else f"samples/{values['id']}_epoch_{values['epoch']}.json"
            file.writestr(name, json.dumps(values))
    return data.getvalue()


def test_inspect_epochs_attachments_and_reasoning(write):
    parts = [{"type": "reasoning", "reasoning": "attachment://h"}, {"type": "text", "text": "Yes"}]
    secret = [{"type": "reasoning", "reasoning": "gAAA", "redacted": True}, {"type": "text", "text": "No"}]
    messages = [
        {"role": "user", "content": [{"type": "image", "image": "attachment://i"}, {"type": "text", "text": "Q"}]}
    ]
    samples = [
        sample(1, 2, "other"),
        sample(1, 1, parts, attachments={"h": "a dog", "i": "data:"}, messages=messages),
        sample(2, 1, secret),
        sample(3, 1, "", error={"message": "out of\nmemory", "traceback": "..."}),
    ]
    log = read_answers(write(archive(*samples), "a.eval"))
    assert log.notes == (
        "1 further answers (epochs, choices) are left out", "1 answers have encrypted reasoning, which is left out",
    )  # fmt: skip
    thought, hidden, failed = sorted(log.answers, key=lambda answer: answer.id)
    assert thought.text == "<think>\na dog\n</think>\n\nYes"
    assert (thought.question, thought.id, thought.row) == ("Q", "1", 0)
    assert (hidden.text, hidden.question) == ("No", "Is it?")
    assert (failed.text, failed.error) == ("", "out of memory")


def test_inspect_unfinished_and_odd_names(write):
    names = ["samples/../../etc/a_epoch_1.json", "samples/C:\\b/c_epoch_1.json"]
    path = write(archive(sample("a"), sample("b"), header="_journal/start.json", names=names), "a.eval")
    log = read_answers(path)
    assert [answer.id for answer in log.answers] == ["a", "b"]
    assert log.notes == ("the log's status is started: it may not have all samples",)
    assert sorted(path.parent.iterdir()) == [path]


def raw_archive(entries):
    """An archive of (name, method, packed bytes, declared size, checksum), written by hand."""
    body, listing = b"", b""
    for name, method, packed, size, crc in entries:
        fields = b"".join(
            value.to_bytes(width, "little")
            for value, width in (
                (20, 2), (0, 2), (method, 2), (0, 4), (crc, 4), (len(packed), 4), (size, 4), (len(name), 2), (0, 2),
            )
        )  # fmt: skip
        offset = len(body)
        body += b"PK\3\4" + fields + name.encode() + packed
        listing += b"PK\1\2" + (20).to_bytes(2, "little") + fields + bytes(10) + offset.to_bytes(4, "little")
        listing += name.encode()
    count = len(entries).to_bytes(2, "little")
    sizes = len(listing).to_bytes(4, "little") + len(body).to_bytes(4, "little")
    return body + listing + b"PK\5\6" + bytes(4) + count + count + sizes + bytes(2)


def entry(name, values, method=93, declared=None):
    data = json.dumps(values).encode() if not isinstance(values, bytes) else values
    packed = pyarrow.compress(data, codec="zstd", asbytes=True) if method == 93 else data
    return (name, method, packed, len(data) if declared is None else declared, zlib.crc32(data))


def test_inspect_bombs(write, monkeypatch):
    header = entry("header.json", HEADER)
    bomb = b'{"id": "' + b"a" * 2**24 + b'"}'
    name = "samples/a_epoch_1.json"
    for content, message in (
        ([header, entry(name, bomb)], "bytes that unpack to 16,777,226, "),
        ([header, entry(name, bomb, declared=100)], "not JSON that can be read"),  # the size is a lie
        ([header, entry(name, sample("a"), 12)], "packed by method 12; stored, deflate and zstandard are read"),
        ([header, entry(name, b"[" * 10**5)], "not JSON that can be read"),
        ([header, entry(name, b'{"id": NaN, "epoch": 1}')], "id nan should be text or a whole number"),
        ([header, entry(name, [1])], "a sample of inspect_ai has an 'id', this is [1]"),
        ([header], "samples/..._epoch_1.json is missing, there are: header.json"),
        ([header, entry("samples/a_epoch_1/sample.json", {})], "its samples are in parts (convert-chunked)"),
        ([header, entry(name, sample("a")), entry("samples/b_epoch_1.json", sample("a"))], "id a of epoch 1 is used"),
        (
            [header, entry(name, sample("a", content=[{"type": "text", "text": "attachment://x"}]))],
            "attachment x is miss",
        ),
    ):
        with pytest.raises(DataError) as error:
            read_answers(write(raw_archive(content), "a.eval"))
        assert message in str(error.value)
        assert "\n" not in str(error.value)
    assert read_answers(write(raw_archive([header, entry(name, sample("a"))]), "a.eval")).answers[0].text == "Yes"
    deflated = io.BytesIO()
    with zipfile.ZipFile(deflated, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("header.json", json.dumps(HEADER))
        file.writestr(name, bomb)
    with pytest.raises(DataError, match=r"times as many; at most 200 times is read"):
        read_answers(write(deflated.getvalue(), "a.eval"))
    monkeypatch.setattr(inspect_logs, "LARGEST_ENTRY", 100)
    with pytest.raises(DataError, match=r"it unpacks to [\d,]+ bytes; at most 100 are read"):
        read_answers(LOGS / "inspect_chair.eval")
    monkeypatch.setattr(inspect_logs, "LARGEST_ENTRY", 10**6)
    monkeypatch.setattr(inspect_logs, "LARGEST_LOG", 1000)
    with pytest.raises(DataError, match=r"unpacks to [\d,]+ bytes; at most 1,000 are read"):
        read_answers(LOGS / "inspect_chair.eval")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("once upon a time", "begins with 'once upon a time', which is no log that is known; answers.format is one of"),
        ('{"a": 1, "b": 2}', "has objects with the keys a, b, which is no log that is known; answers.format is one of"),
        ("[1, 2]", "a JSON object was expected, not 1"),
        ("", "is empty"),
        (archive(header="readme.txt"), "is a zip archive of readme.txt, which is no log that is known"),
        (archive(sample())[:-40], "is a damaged zip archive"),
        (archive(sample()).replace(b"PK\3\4", b"PK\3\5", 1), "not JSON that can be read"),
        ([lmms(0), lmms(0, filtered_resps="No")], "doc_id 0 is used before, in"),
        ([lmms(0, filtered_resps=[["-1.5", "False"], ["-2", "True"]])], "is a choice's log-probability; logs"),
        ([lmms(0, filtered_resps=[3])], "response 3 is no text"),
        ([lmms("x")], "row 'x' should be a whole number from 0 on"),
        ([lmms(0), {"doc_id": 1}], "line 2: key 'filtered_resps' is missing"),
        ("index\tprediction\n1\tyes\n2\n", "line 3: 1 cells, but the first line names 2 columns"),
        ('index\tprediction\n1\t"yes', "line 2: no table (unexpected end of data)"),
        ("index,prediction\n1,yes\n1,no\n", "line 3: id 1 is used before, in"),
        ([{"custom_id": "a", "method": "POST", "body": {}}], "a request of a batch, no response"),
        ([{"custom_id": "a", "response": {"body": {"x": 1}}}], "'choices' or 'output' was looked"),
        ([{"custom_id": "a", "response": {"body": chat(text="a", token_ids=["b"])}}], "token_ids[0] is"),
        ([{**chat(text="a", token_ids=[1, 2], logprobs={"token_logprobs": [-1]})}], "2 token ids but 1 log-prob"),
        ([{**chat(text="a", logprobs={"tokens": ["token_id:x"], "token_logprobs": [-1]})}], "token_id[0] is 'x'"),
        ([{"content": "a", "stop_type": "eos", "tokens": [10**20]}], "tokens[0] is 1000000000"),
        (json.dumps({**HEADER, "samples": None}), "a log of inspect_ai has a list 'samples'; this one does not"),
        (json.dumps({**HEADER, "samples": [sample("a"), sample("a")]}), "samples[1]: id a of epoch 1 is used before"),
        (json.dumps({**HEADER, "samples": []}), "holds no answer"),
    ],
)  # fmt: skip
def test_bad_logs_give_one_clear_line(write, content, message):
    path = write(content, "log")
    with pytest.raises(DataError) as error:
        read_answers(path)
    assert message in str(error.value)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 2 * len(str(path)) + 350
