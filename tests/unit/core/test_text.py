"""Text never steers the terminal, and secrets are not printed."""

import io
import logging
import subprocess
import sys

import pytest
from rich.progress import Progress
from rich.table import Table
from tqdm import tqdm

from stethoscope.core.text import (
    VisibleStream,
    console,
    logged_to_stderr,
    one_line,
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


def test_log_messages_of_the_package_are_printed_within_the_block_once(capsys):
    logger = logging.getLogger("stethoscope.storage.reuse")
    logger.info("before")
    with visible_output(), logged_to_stderr(), logged_to_stderr():
        logger.info("%d answers\x1b[31m", 3)
        logger.debug("details")
    logger.info("after")
    assert capsys.readouterr().err == "3 answers\\x1b[31m\n"
