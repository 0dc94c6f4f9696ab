"""Text never steers the terminal, and secrets are masked by the name of a setting and by the look of a value."""

import io
import logging
import os
import subprocess
import sys
import threading

import pytest
from rich.progress import Progress
from rich.table import Table
from tqdm import tqdm

from stethoscope.core.text import (
    MASK,
    VisibleStream,
    console,
    hide_paths,
    is_secret,
    logged_to_stderr,
    one_line,
    redact,
    redact_override,
    redact_text,
    visible,
    visible_output,
    wrap_streams,
)

HOSTILE = "a\x1b[31mred\x1b]8;;http://x\x07link\x1b]52;c;eA==\x07\r\b\x00\x9b2J\u202eb\u2066\u2028[red]c[/red]\udce4"
STEERING = set("\x1b\x07\r\b\x00\x9b\u202e\u2066\u2028\udce4")


@pytest.fixture
def streams(monkeypatch):
    """Wraps standard output and error; gives what reaches them."""

    def wrap():
        raw = [io.StringIO(), io.StringIO()]
        monkeypatch.setattr(sys, "stdout", raw[0])
        monkeypatch.setattr(sys, "stderr", raw[1])
        wrap_streams()
        return raw

    return wrap


def test_visible():
    assert visible("é\t日本\n👩‍👩‍👧") == "é\t日本\n👩‍👩‍👧"  # no steering in those
    assert not STEERING & set(visible(HOSTILE))
    assert visible("\x1b\u202e\udce4\U000e0041") == r"\x1b\u202e\xe4\U000e0041"
    assert one_line("a\n\n b\r\nc\x1b") == r"a b c\x1b"


def test_print_and_errors(streams):
    streams = streams()
    print(HOSTILE)
    print(HOSTILE, file=sys.stderr)
    sys.stdout.writelines([HOSTILE])
    for stream in streams:
        assert "red" in stream.getvalue()
        assert not STEERING & set(stream.getvalue())


def test_secrets_are_masked_too(streams):
    streams = streams()
    print("https://me:pw@host")
    assert streams[0].getvalue() == "https://***@host\n"


def test_tables_and_styles_of_rich(streams, monkeypatch):
    streams = streams()
    monkeypatch.setenv("FORCE_COLOR", "1")
    terminal = console()
    table = Table("name", title=HOSTILE)
    table.add_row(HOSTILE, style="bold")
    terminal.print(table, markup=False)
    terminal.print(HOSTILE, markup=False)
    text = streams[0].getvalue()
    assert "\x1b[1m" in text  # our own style
    for code in ("\x1b[31m", "\x1b]8", "\x1b]52", *STEERING - {"\x1b"}):
        assert code not in text


def test_beside_a_bar(streams, monkeypatch):
    """A bar of rich replaces the streams and would decode styles of what is printed meanwhile."""
    streams = streams()
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Progress(console=console(stderr=True)) as bar:
        bar.add_task("work", total=2)
        wrap_streams()
        print(HOSTILE, file=sys.stderr)
        print(HOSTILE)
    text = "".join(stream.getvalue() for stream in streams)
    assert "red" in text
    for code in ("\x1b[31m", "\x1b]8", "\x1b]52", "\x07", "\u202e"):
        assert code not in text


def test_bars_of_downloads_move_the_cursor(streams):
    streams = streams()
    for _ in tqdm(range(3), desc=HOSTILE, file=sys.stderr):
        pass
    text = streams[1].getvalue()
    assert "\r" in text
    assert not (STEERING - {"\r"}) & set(text)


def test_streams_are_as_before(monkeypatch):
    before = sys.stdout, sys.stderr
    with visible_output():
        assert isinstance(sys.stdout, VisibleStream)
        with visible_output():
            assert not isinstance(sys.stdout.raw, VisibleStream)
    assert (sys.stdout, sys.stderr) == before
    with pytest.raises(SystemExit), visible_output():
        sys.exit()
    assert (sys.stdout, sys.stderr) == before


def test_a_traceback_of_ours_and_an_old_terminal():
    script = "from stethoscope.core.text import visible_output\nwith visible_output():\n    print('é')\n    "
    script += "raise ValueError('\\x1b[31m')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env={"PYTHONIOENCODING": "ascii"})
    assert done.stdout == b"\\xe9\n"
    assert done.stderr.endswith(b"ValueError: \\x1b[31m\n")


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
    assert redact_text(text, environment=False) == text


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


def test_log_messages_of_the_package_are_printed_within_the_block_once(capsys):
    logger = logging.getLogger("stethoscope.storage.reuse")
    logger.info("before")
    with visible_output(), logged_to_stderr(), logged_to_stderr():
        logger.info("%d answers\x1b[31m", 3)
        logger.debug("details")
    logger.info("after")
    assert capsys.readouterr().err == "3 answers\\x1b[31m\n"


def test_paths_where_neither_home_nor_present_folder_says_anything(monkeypatch):
    monkeypatch.setenv("HOME", "/")
    monkeypatch.chdir("/")
    assert hide_paths("yes/no and /data/coco/1.jpg", known_only=True) == "yes/no and /data/coco/1.jpg"
    assert hide_paths("yes/no and /data/coco/1.jpg") == "yes/no and .../1.jpg"
