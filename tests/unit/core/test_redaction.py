"""Secrets are masked by the name of a setting and by the look of a value."""

import os
import threading

import pytest

from stethoscope.core.redaction import MASK, hide_paths, is_secret, redact, redact_override, redact_text

SECRET = "Ab3" + "x9Y" * 6


@pytest.mark.parametrize(
    "text",
    [
        f"https://user:{SECRET}@host.example/path",
        f"postgres://{SECRET}@host",
        f"https://host.example/x?a=1&token={SECRET}&b=2",
        f"https://host.example/x?X-Amz-Signature={SECRET}",
        f"Authorization: Bearer {SECRET}",
        f"Proxy-Authorization: Basic {SECRET}",
        f"X-Api-Key: {SECRET}",
        f"Cookie: {SECRET}",
        f"hf_{SECRET}",
        f"could not load with hf_{SECRET}.",
        f"ghp_{SECRET}",
        f"model.hub_token={SECRET} limit=3",
        f"WANDB_API_KEY={SECRET} stethoscope evaluate",
        f"export AWS_SECRET_ACCESS_KEY='{SECRET}'",
        f"{{'password': '{SECRET}'}}",
        f'{{"api_key": "{SECRET}"}}',
        f"app auth=user:{SECRET}",
        f"+more={{hub_token:{SECRET}}}",
        f"+more={{limit:3,auth:{SECRET},seed:0}}",
        f"+more={{ password: [{SECRET}, b] }}",
        f"model:\n  hub_token: {SECRET}\n",
        f"app:\n  auth: {SECRET}\n",
    ],
)
def test_secrets_in_a_text_are_masked(text):
    assert SECRET not in redact_text(text)
    assert "***" in redact_text(text)


@pytest.mark.parametrize(
    "text",
    [
        "prompt tokens: 576",
        "max_new_tokens=4 scope=token",
        "eos_token_id: 2, image_token: <image>",
        "a dog at the door, password on the wall",
        "a dog, password: on the wall",
        "bearer of bad news",
        "runs/study/max_new_tokens=4",
        "me@example.com, https://host.example/@user/x",
        "hf_transfer and sk-learn",
        "revision 0123456789abcdef0123456789abcdef01234567",
    ],
)
def test_other_text_stays(text):
    assert redact_text(text) == text


@pytest.mark.parametrize(
    "part", ["a", "-", "a_", "x-", "sk-", "eyJ", "a.", "q: v  ", "  ", "token=", "a://", "{a:", "{  ", ",a:"]
)
def test_long_runs_are_read_once(part):
    text = part * (40_000 // len(part))  # as of a model that repeats itself; each letter was read thousands of times
    assert len(redact_text(f"q: v{text}")) >= 10
    assert len(redact_override(f"x={text}")) >= 5


def test_values_of_the_environment(monkeypatch):
    monkeypatch.setenv("MY_SERVICE_PASSWORD", "correct horse battery")
    monkeypatch.setenv("SHORT_SECRET", "abc")
    monkeypatch.setenv("KEY_FILE_SECRET", "/etc/keys/abc")
    text = "correct horse battery abc /etc/keys/abc"
    assert redact_text(text) == "*** abc /etc/keys/abc"
    assert redact({"x": text}, environment=False) == {"x": text}


def test_secrets_in_settings_are_masked():
    before = {
        "hubToken": "x",
        "auth": ["a", "b"],
        "max_new_tokens": 5,
        "subtokens": "first",
        "n": {"apiKey": "y", "z": None},
    }
    assert redact(before) == {
        "hubToken": "***", "auth": "***", "max_new_tokens": 5, "subtokens": "first", "n": {"apiKey": "***", "z": None}
    }  # fmt: skip
    assert redact({"token": None, "secret": False, "x": ["hf_" + SECRET]}) == {
        "token": None,
        "secret": False,
        "x": ["***"],
    }
    assert not is_secret("patience")
    assert redact_override("x.y={'password': a}") == "x.y=***"
    assert redact_override(f"model.model_id=https://u:{SECRET}@h/x") == "model.model_id=https://***@h/x"


def test_help_texts_stay_readable():
    for text in ("stethoscope app share=true auth=USER:PASSWORD", "auth: null  # a file of accounts"):
        assert redact_text(text) == text
    assert redact_text("auth: me:secret  # mine") == "auth: ***  # mine"


def test_variables_that_a_thread_sets_meanwhile(monkeypatch):
    ends = threading.Event()

    def change():
        while not ends.is_set():
            for name in ("STETHOSCOPE_A_DIR", "STETHOSCOPE_B_DIR"):
                os.environ[name] = "x"
                del os.environ[name]

    monkeypatch.setenv("MY_SECRET", "open sesame")
    thread = threading.Thread(target=change)
    thread.start()
    try:
        assert all(redact_text("it is open sesame") == f"it is {MASK}" for _ in range(5000))
    finally:
        ends.set()
        thread.join()


def test_paths_where_neither_home_nor_present_folder_says_anything(monkeypatch):
    monkeypatch.setenv("HOME", "/")
    monkeypatch.chdir("/")
    assert hide_paths("yes/no and /data/coco/1.jpg", known_only=True) == "yes/no and /data/coco/1.jpg"
    assert hide_paths("yes/no and /data/coco/1.jpg") == "yes/no and .../1.jpg"
