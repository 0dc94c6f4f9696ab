"""A real server on loopback that answers, fails, dawdles and talks nonsense; every outcome is an answer or one line."""

import asyncio
import json
import socket
import threading
import time

import pytest
from helpers.chat_server import MODEL, Scripted, completion, free_port, parts, serving

from stethoscope.core.errors import CapabilityError, ConfigError, DataError
from stethoscope.core.types import Generation
from stethoscope.evaluation import chat_client
from stethoscope.evaluation.chat_client import ChatClient, Engine, pause
from stethoscope.evaluation.chat_protocol import parse_reply, request_settings, retry_after
from stethoscope.storage.answer_file import AnswerFile
from stethoscope.storage.logged_answers import read_answers

KEY = "sk-made-up-0123456789"
GREEDY = Generation(max_new_tokens=16)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Pauses of hundredths of a second, and no key of the user's."""
    monkeypatch.setattr(chat_client, "FIRST_PAUSE", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def ask(scripted, times=1, generation=GREEDY, **settings):
    """Replies of a server to so many questions, one after another."""

    async def run(url):
        async with ChatClient(Engine(base_url=url, **{"retries": 2, **settings}), generation) as client:
            served = await client.find_model()
            return served, [await client.ask("Is there a dog?", b"bytes of a file", "png") for _ in range(times)]

    with serving(scripted) as url:
        return asyncio.run(run(url))


def fails(kind, scripted, **settings):
    """The one line of an error."""
    with pytest.raises(kind) as error:
        ask(scripted, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_answer_comes_with_all_that_the_server_gives():
    scripted = Scripted()
    served, (reply,) = ask(scripted)
    assert served == (MODEL, "vllm")
    assert reply.text in ("Yes", "No")
    assert (reply.finish_reason, reply.logprobs) == ("stop", (-0.25, -0.5))
    assert reply.token_ids[1:] == (2,)
    assert reply.prompt_token_ids[:3] == (1, 7, 7)
    body = scripted.requests[0]
    assert parts(body) == ("Is there a dog?", b"bytes of a file")
    others = {name: value for name, value in body.items() if name != "messages"}
    assert others == {
        "model": MODEL, "max_tokens": 16, "temperature": 0.0, "logprobs": True, "return_token_ids": True,
    }  # fmt: skip
    assert "authorization" not in scripted.headers[0]


def test_sampling_settings_are_sent_and_beams_refused():
    sampled = Generation(max_new_tokens=4, do_sample=True, temperature=0.7, top_p=0.9, seed=3, stop=("###",))
    assert request_settings(sampled) == {
        "max_tokens": 4, "temperature": 0.7, "top_p": 0.9, "seed": 3, "stop": ["###"],
    }  # fmt: skip
    with pytest.raises(ConfigError, match="num_beams=5"):
        request_settings(Generation(max_new_tokens=4, num_beams=5))


# --- tries ------------------------------------------------------------------------------------------------------------


def test_a_busy_server_is_asked_again_when_it_says():
    scripted = Scripted((429, "slow down", {"Retry-After": "0.4"}), None)
    ask(scripted)
    assert len(scripted.times) == 2
    assert 0.4 <= scripted.times[1] - scripted.times[0] < 60  # how much more: test_pauses_grow_and_differ


def test_a_server_that_fails_for_a_while_is_asked_again():
    scripted = Scripted(500, (503, "loading"), None)
    ask(scripted)
    assert len(scripted.requests) == 3


def test_a_server_that_goes_on_failing_costs_the_sample():
    error = fails(DataError, Scripted((500, {"error": {"message": "CUDA error:\nout of luck"}})))
    assert error == "500 CUDA error: out of luck, 3 times"


def test_a_slow_server_costs_the_sample():
    start = time.monotonic()
    error = fails(DataError, Scripted(delay=600), timeout=0.2, retries=1)
    assert error == "no answer within 0.2 s (engine.timeout), 2 times"
    assert time.monotonic() - start < 120


def test_a_wait_of_hours_ends_the_work():
    assert "to wait 7200 s" in fails(CapabilityError, Scripted((429, "quota", {"Retry-After": "7200"})))


def test_pauses_grow_and_differ():
    draws = [[pause(attempt) for _ in range(200)] for attempt in range(12)]
    for attempt, values in enumerate(draws):
        middle = min(60.0, 0.01 * 2**attempt)
        assert 0.5 * middle <= min(values) < max(values) <= 1.5 * middle
    assert 3 <= pause(0, wait=3.0) <= 3.01


def test_dates_in_retry_after():
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert retry_after("nan") is None


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "body", "part"),
    [
        (413, {"error": {"message": "image too large"}}, "413 image too large"),
        (418, "<h1>no</h1>", "418 <h1>no</h1>"),
    ],
)
def test_other_refusals_cost_the_sample_at_once(status, body, part):
    scripted = Scripted((status, body))
    assert part in fails(DataError, scripted)
    assert len(scripted.requests) == 1


@pytest.mark.parametrize(
    ("reply", "part"),
    [
        ((401, {"error": {"message": "no key"}}), "it wants a key in OPENAI_API_KEY"),
        ((403, {"detail": "not allowed"}), "403 not allowed"),
        ((404, {"message": "The model does not exist.", "code": 404}), "404 The model does not exist."),
        ((307, "", {"Location": "http://elsewhere.test/v1"}), "a redirection to http://elsewhere.test/v1"),
        ((429, {"error": {"message": "pay", "code": "insufficient_quota"}}), "429 pay (insufficient_quota)"),
    ],
)
def test_what_no_sample_would_pass_ends_the_work(reply, part):
    scripted = Scripted(reply)
    assert part in fails(ConfigError, scripted)
    assert len(scripted.requests) == 1


@pytest.mark.parametrize(
    ("message", "unknown"),
    [
        ("Unrecognized request argument supplied: return_token_ids", {"return_token_ids"}),
        ("Unexpected fields in the request: {'return_token_ids', 'logprobs'}", {"return_token_ids", "logprobs"}),
        ("extra fields not permitted", {"return_token_ids", "logprobs"}),
    ],
)
def test_unknown_fields_are_left_out_with_one_notice(message, unknown, recwarn):
    def strict(body, headers):
        return (422, {"detail": message}) if unknown & body.keys() else None

    scripted = Scripted(strict)
    _, replies = ask(scripted, times=3)
    assert len(replies) == 3
    assert len(scripted.requests) == 4
    assert not unknown & scripted.requests[-1].keys()
    notices = [str(warning.message) for warning in recwarn if "refuses" in str(warning.message)]
    assert len(notices) == 1
    assert all(name in notices[0] for name in unknown)


def test_a_bad_sample_does_not_cost_the_others_their_token_ids(recwarn):
    def picky(body, headers):
        return (400, {"error": "broken image"}) if len(scripted.requests) <= 2 else None

    scripted = Scripted(picky)

    async def run(url):
        async with ChatClient(Engine(base_url=url), GREEDY) as client:
            with pytest.raises(DataError, match="400 broken image"):
                await client.ask("?", b"broken", "png")
            return await client.ask("?", b"whole", "png")

    with serving(scripted) as url:
        assert asyncio.run(run(url)).token_ids
    assert not [warning for warning in recwarn if "refuses" in str(warning.message)]


def test_a_server_that_wants_the_newer_name_of_the_length():
    def newer(body, headers):
        problem = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
        return (400, {"error": {"message": problem}}) if "max_tokens" in body else None

    scripted = Scripted(newer)
    ask(scripted, times=2)
    assert len(scripted.requests) == 3
    assert scripted.requests[-1]["max_completion_tokens"] == 16
    assert scripted.requests[-1]["return_token_ids"] is True


# --- nonsense ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ("<html>a page</html>", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ({"choices": []}, "has no choices"),
        ([1, 2], "has no choices"),
        ({"choices": [{"message": {"content": None}, "finish_reason": "length"}]}, "no text: finish_reason length"),
        ({"choices": [{"message": {"content": "x"}, "finish_reason": "content_filter"}]}, "withheld"),
    ],
    ids=["page", "nested", "empty", "list", "none", "withheld"],
)
def test_garbage_is_an_error_of_that_sample(body, part):
    scripted = Scripted((200, body))
    assert part in fails(DataError, scripted)
    assert len(scripted.requests) == 1


def test_token_ids_and_log_probabilities_are_taken_only_whole():
    def reply(**values):
        data = completion("Yes", **values)
        return parse_reply(json.dumps(data).encode())

    assert reply(ids=[5, 2], logprobs=[-0.1]).logprobs is None
    assert reply(ids=[5, 2], logprobs=[-0.1]).token_ids == (5, 2)
    assert reply(ids=[5, "2"]).token_ids is None
    assert reply(ids=[5, 2**31]).token_ids is None  # which no reader of answers takes
    assert reply(ids=[5], logprobs=[float("nan")]).logprobs is None
    assert reply(ids=[5], logprobs=[1e-9]).logprobs == (0.0,)
    entries = [{"id": 5, "token": "Yes", "logprob": -0.1}, {"id": 2, "token": "", "logprob": -0.2}]  # llama.cpp
    data = completion("Yes")
    data["choices"][0]["logprobs"] = {"content": entries}
    assert parse_reply(json.dumps(data).encode()).token_ids == (5, 2)


def test_parts_and_reasoning():
    message = {"content": [{"type": "text", "text": "Yes"}, {"type": "text", "text": "."}], "reasoning_content": "hm"}
    reply = parse_reply(json.dumps({"choices": [{"message": message}]}).encode())
    assert (reply.text, reply.reasoning, reply.finish_reason) == ("Yes.", "hm", None)
    cut = {"choices": [{"message": {"content": None, "reasoning": "hm"}, "finish_reason": "length"}]}
    assert parse_reply(json.dumps(cut).encode()).whole == "<think>hm"


def test_half_a_surrogate_pair_becomes_a_replacement_character(tmp_path):
    message = {"content": "a \ud83d dog \U0001f415", "reasoning": "\udc15"}
    reply = parse_reply(json.dumps({"choices": [{"message": message}]}).encode())
    assert (reply.text, reply.reasoning) == ("a \ufffd dog \U0001f415", "\ufffd")
    file = AnswerFile(tmp_path / "answers.jsonl")
    file.append({"id": "1", "answer": reply.whole})
    assert read_answers(file.path).answers[0].text == reply.whole  # a half would spoil the whole file


# --- the key ----------------------------------------------------------------------------------------------------------


def test_the_key_goes_to_the_server_and_nowhere_else(monkeypatch):
    monkeypatch.setenv("SERVER_PASS", KEY)

    def telltale(body, headers):
        assert headers["authorization"] == f"Bearer {KEY}"
        return (400, {"error": {"message": f"bad request with {headers['authorization']}"}})

    assert KEY not in fails(DataError, Scripted(telltale), api_key_env="SERVER_PASS")
    echo = Scripted((200, completion(f"Your key is {KEY}.")))
    _, (reply,) = ask(echo, api_key_env="SERVER_PASS")
    assert reply.text == "Your key is ***."
    assert "not accepted" in fails(ConfigError, Scripted((401, f"wrong: {KEY}")), api_key_env="SERVER_PASS")


def test_a_short_key_is_no_secret_and_changes_no_answer(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "EMPTY")
    _, (reply,) = ask(Scripted((200, completion("The box is EMPTY."))))
    assert reply.text == "The box is EMPTY."


def test_a_key_that_no_header_can_carry(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "clé\n")
    with pytest.raises(ConfigError, match="OPENAI_API_KEY holds characters"):
        ChatClient(Engine(base_url="http://127.0.0.1:1/v1"), GREEDY)


# --- the first check --------------------------------------------------------------------------------------------------


def test_nobody_there():
    port = free_port()
    with pytest.raises(CapabilityError, match=rf"base_url=http://127.0.0.1:{port}/v1 cannot be reached"):
        asyncio.run(_find(f"http://127.0.0.1:{port}/v1"))


async def _find(url, **settings):
    async with ChatClient(Engine(base_url=url, **settings), GREEDY) as client:
        return await client.find_model()


def test_the_wanted_model_must_be_served():
    two = Scripted(models=(("llava-1.5-7b", "sglang"), ("qwen2-vl", "someone")))
    with serving(two) as url:
        with pytest.raises(ConfigError, match=r"unknown engine.model 'llava-1.5'; did you mean 'llava-1.5-7b'\?"):
            asyncio.run(_find(url, model="llava-1.5"))
        with pytest.raises(ConfigError, match=r"engine.model must be given: .* serves 2 models \(llava-1.5-7b, qwen"):
            asyncio.run(_find(url))
        assert asyncio.run(_find(url, model="llava-1.5-7b")) == ("llava-1.5-7b", "sglang")
        assert asyncio.run(_find(url, model="mine", check_model=False)) == ("mine", "openai")
        with pytest.raises(ConfigError, match="ends with /v1"):
            asyncio.run(_find(url.removesuffix("/v1")))


def test_another_kind_of_server():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n<html>hi</html>")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(ConfigError, match="gives no list of models"):
            asyncio.run(_find(f"http://127.0.0.1:{listener.getsockname()[1]}/v1"))
        thread.join()


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"base_url": "127.0.0.1:8000"}, "engine.base_url=127.0.0.1:8000 should be an address"),
        ({"base_url": "http://user:secret@/v1"}, "engine.base_url=http://***@/v1 should be an address"),
        ({"concurrency": 0}, "engine.concurrency=0 should be a whole number from 1 to 1024"),
        ({"retries": True}, "engine.retries=True"),
        ({"timeout": -1}, "engine.timeout=-1"),
        ({"model": 7}, "engine.model=7 should be text"),
        ({"check_model": "no"}, "engine.check_model='no'"),
    ],
)
def test_settings_out_of_range(settings, part):
    with pytest.raises(ConfigError) as error:
        Engine(**{"base_url": "http://127.0.0.1/v1", **settings})
    assert part in str(error.value)
