"""Our own JSON lines, and values that are refused whatever the format."""

import hashlib
import json
import time

import pytest

from stethoscope.core.errors import ConfigError, DataError
from stethoscope.storage.log_values import reasoning_spans
from stethoscope.storage.logged_answers import read_answers

FULL = {
    "id": 7, "image": "a.png", "question": "Is there a dog?", "answer": "<think>hm</think> Yes.",
    "answer_token_ids": [3, 4], "answer_logprobs": [-0.5, 0], "prompt": "USER: Is there a dog?",
    "prompt_token_ids": [1, 2], "model": "llava", "revision": "abc", "engine": "vllm 0.11", "finish_reason": "length",
    "subset": "random", "label": "yes",
}  # fmt: skip


def test_all_fields(write):
    path = write([FULL])
    log = read_answers(path)
    assert (log.path, log.format, log.engine, log.model, log.revision) == (path, "jsonl", "vllm 0.11", "llava", "abc")
    assert log.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    (answer,) = log.answers
    assert (answer.id, answer.row, answer.question, answer.text) == ("7", None, FULL["question"], FULL["answer"])
    assert (answer.token_ids, answer.logprobs) == ((3, 4), (-0.5, 0.0))
    assert (answer.prompt, answer.prompt_token_ids) == (FULL["prompt"], (1, 2))
    assert answer.text[slice(*answer.reasoning[0])] == "<think>hm</think>"
    assert (answer.finished, answer.error, answer.origin) == (False, "", f"{path}, line 1")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"question_id": 3, "prompt": "What?", "text": "A dog.", "model_id": "m"},
            ("3", None, "What?", "A dog."),
        ),  # LLaVA
        ({"image_id": 42, "caption": "A dog."}, ("42", None, None, "A dog.")),  # CHAIR
        ({"id": 5, "response": "A dog."}, ("5", None, None, "A dog.")),  # AMBER
        (
            {"question_id": "1", "question": "Is it?", "model_prediction": "No."},
            (None, 0, "Is it?", "No."),
        ),  # HallusionBench
        ({"question": "Is it?", "answer": "yes"}, (None, 0, "Is it?", "yes")),  # POPE
        ({"row": 9, "answer": "yes"}, (None, 9, None, "yes")),
        ({"id": 2.0, "row": 3.0, "answer": "yes"}, ("2", 3, None, "yes")),  # as pandas writes them
    ],
)
def test_files_of_benchmark_scripts(write, row, expected):
    for content in ([row], json.dumps([row], indent=1)):
        (answer,) = read_answers(write(content)).answers
        assert (answer.id, answer.row, answer.question, answer.text) == expected


def test_missing_and_empty_answers_are_data(write):
    rows = [{"id": 1, "answer": " "}, {"id": 2, "error": {"message": "HTTP 500\nlater"}}, {"id": 3, "answer": "yes"}]
    errors = [answer.error for answer in read_answers(write(rows)).answers]
    assert errors == ["the answer is empty", "HTTP 500 later", ""]


def test_several_models_are_noted(write):
    log = read_answers(write([{"id": n, "answer": "yes", "model": f"m{n}"} for n in range(3)]))
    assert log.model == "m0, m1, m2"
    assert log.notes == ("the log names 3 models: m0, m1, m2",)


def test_reasoning():
    assert reasoning_spans("<think>a</think>b<thinking>c") == ((0, 16), (17, 28))
    assert reasoning_spans("a</think>b<think>c</think>") == ((0, 9), (10, 26))
    assert reasoning_spans("1 < 2 </b>") == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"id": 1, "answer": "a"}, {"id": "1", "answer": "b"}], "line 2: id 1 is used before, in"),
        ([{"row": 1, "answer": "a"}, {"row": 1, "answer": "b"}], "line 2: row 1 is used before, in"),
        ([{"id": 1, "answer": 3}], "line 1: answer 3 is no text"),
        ([{"id": True, "answer": "a"}], "id True should be text or a whole number"),
        ([{"id": [1], "answer": "a"}], "id [1] should be text or a whole number"),
        ([{"row": -1, "answer": "a"}], "row -1 should be a whole number from 0 on"),
        ([{"id": 1, "answer": "a", "question": 3}], "question 3 is no text"),
        ([{"id": 1, "answer": "a", "answer_token_ids": "12"}], "answer_token_ids '12' should be a list of whole"),
        ([{"id": 1, "answer": "a", "answer_token_ids": [1, 2.5]}], "answer_token_ids[1] is 2.5; a token id is a whole"),
        ([{"id": 1, "answer": "a", "answer_token_ids": [-100]}], "answer_token_ids[0] is -100; a token id is"),
        ([{"id": 1, "answer": "a", "answer_token_ids": [10**30]}], "answer_token_ids[0] is 1000"),
        ([{"id": 1, "answer": "a", "answer_token_ids": [1], "answer_logprobs": [-1, -2]}], "1 token ids but 2 log-"),
        ([{"id": 1, "answer": "a", "answer_logprobs": [0.3]}], "answer_logprobs[0] is 0.3; a log-probability is"),
        ('{"id": 1, "answer": "a", "answer_logprobs": [NaN]}', "answer_logprobs[0] is nan; a log-probability is"),
        ('{"id": 1, "answer": "a", "answer_logprobs": [-Infinity]}', "answer_logprobs[0] is -inf; a log-probability"),
        ('{"id": 1, "answer": "a"}\n{"id": 2, "ans', "line 2: not JSON"),
        ('{"id": 1, "answer": ' + "[" * 100000, "line 1: not JSON"),
        ('{"id": ' + "1" * 5000 + ', "answer": "a"}', "line 1: not JSON that can be read"),
        ("", "is empty"),
        ("[]", "holds no answer"),
        (b"\xff\xfe\x00\xd8", "is not UTF-16 text"),
        (b'{"answer": "caf\xe9"}', "is not UTF-8 text"),
        ([{"id": 1, "replies": "a"}], "line 1: no answer; keys 'answer', 'response', 'caption', 'text', "),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(refused, content, message):
    refused(content, message, "jsonl")


def test_nine_thousand_answers_take_less_than_a_second(write):
    rows = [{"id": f"random-{n}", "question": "Is there a dog in the image?", "answer": "Yes."} for n in range(9000)]
    path = write(rows)
    start = time.process_time()
    assert len(read_answers(path).answers) == 9000
    assert time.process_time() - start < 1


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_byte_order_marks(write, encoding):
    content = '{"id": "ä", "answer": "Büro"}'.encode(encoding)
    assert read_answers(write(content)).answers[0].text == "Büro"


def test_unknown_format_and_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"unknown answers.format 'json'; did you mean 'jsonl'"):
        read_answers(tmp_path / "a", "json")
    with pytest.raises(DataError, match="a does not exist"):
        read_answers(tmp_path / "a")
