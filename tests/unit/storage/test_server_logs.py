"""Responses of OpenAI-compatible servers, as a batch or line by line, and of llama.cpp."""

from pathlib import Path

import pytest

from stethoscope.core.errors import DataError
from stethoscope.storage.logged_answers import read_answers

LOGS = Path(__file__).parent / "logs"


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


def test_llama_cpp_counts_the_stop_word_among_the_tokens(write):
    row = {"content": "Yes", "stop_type": "word", "tokens": [3, 4]}
    rows = [
        {**row, "completion_probabilities": [{"id": 3, "logprob": -1}]},
        row,
        {**row, "stop_type": "eos"},
        {"content": None, "stop_type": "none", "error": "busy"},
    ]
    log = read_answers(write(rows))
    assert [(answer.token_ids, answer.logprobs) for answer in log.answers] == [
        ((3,), (-1.0,)), (None, None), ((3, 4), None), (None, None),
    ]  # fmt: skip
    assert log.answers[3].error == "busy"
    assert log.notes == ("token ids of 1 answers may have a stop word, which their text has not: left out",)


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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"custom_id": "a", "method": "POST", "body": {}}], "a request of a batch, no response"),
        ([{"custom_id": "a", "response": {"body": {"x": 1}}}], "'choices' or 'output' was looked"),
        ([{"custom_id": "a", "response": {"body": chat(text="a", token_ids=["b"])}}], "token_ids[0] is"),
        ([{**chat(text="a", token_ids=[1, 2], logprobs={"token_logprobs": [-1]})}], "2 token ids but 1 log-prob"),
        ([{**chat(text="a", logprobs={"tokens": ["token_id:x"], "token_logprobs": [-1]})}], "token_id[0] is 'x'"),
        ([{**chat(text="a", logprobs={"tokens": ["token_id:" + "9" * 5000]})}], "token_id[0] is '999999"),
        ([{"content": "a", "stop_type": "eos", "tokens": [10**20]}], "tokens[0] is 1000000000"),
    ],
)  # fmt: skip
def test_bad_responses_give_one_clear_line(refused, content, message):
    refused(content, message)
