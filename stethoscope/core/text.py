"""Write text for people, and print it without control characters and secrets."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TextIO

from stethoscope.core.redaction import redact_text

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 150
"""Columns of a table where the output is a file or a pipe, so that lines are not wrapped."""

_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 but for tabs and line ends, DEL, C1
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # text direction
    "\u2028\u2029\ufeff\U000e0000-\U000e007f"  # line separators, invisible marks and tags
    "\ud800-\udfff]"  # bytes of file names that are not UTF-8
)
_CURSOR = re.compile("\r|\x1b\\[A|\n")  # how tqdm moves its bars


def visible(text: object) -> str:
    """Escape control characters, direction overrides and bytes that are not text.

    >>> visible("a\\x1b[31mb\\nc")
    'a\\\\x1b[31mb\\nc'
    """
    return _CONTROL.sub(_escaped, str(text))


def percent(share: float) -> str:
    """Write a share the way every page and the terminal do: two digits below 10 %, whole percents above.

    >>> [percent(share).replace("\xa0", " ") for share in (0.974, 0.0995, 0.048, 0.0001, 0)]
    ['97 %', '10 %', '4.8 %', '<0.1 %', '0 %']
    """
    if 0 < share < 0.0005:
        return "<0.1\xa0%"
    return f"{100 * share:.{0 if share >= 0.0995 or share == 0 else 1}f}\xa0%"


def counted(number: int, noun: str) -> str:
    """Write a number with its noun in the singular or plural.

    >>> counted(1, "token"), counted(2, "token")
    ('1 token', '2 tokens')
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"


def listed(names: Sequence[str], most: int = 6) -> str:
    """Join names for a message: the first ``most``, and how many more there are.

    >>> listed(["a", "b", "c"], 2), listed(["a", "b"], 2)
    ('a, b and 1 more', 'a, b')
    """
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def one_line(text: object) -> str:
    """Join the lines of a text, for messages that quote a value.

    >>> one_line("no such\\n  file")
    'no such file'
    """
    return visible(" ".join(filter(None, (line.strip() for line in re.split("[\r\n]+", str(text))))))


_MARKDOWN = re.compile(r"([\\`*_{}\[\]|~<>])")


def escape_markdown(text: str) -> str:
    """Escape text so that Markdown shows it as it is, on one line.

    >>> print(escape_markdown("a|b *c* <script>"))
    a\\|b \\*c\\* &lt;script&gt;
    """
    text = " ".join(text.split()).replace("&", "&amp;")
    return _MARKDOWN.sub(r"\\\1", text).replace(r"\<", "&lt;").replace(r"\>", "&gt;")


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # Python's stand-in for a byte of a file name
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


class VisibleStream:
    """A text stream that escapes what is written to it and masks secrets."""

    def __init__(self, raw: TextIO) -> None:
        """Wrap a stream."""
        self.raw = raw

    def write(self, text: str) -> int:
        """Write text; the progress bars of tqdm, as of downloads, may move the cursor."""
        caller = sys._getframe().f_back  # None where the interpreter itself prints a traceback
        if caller is not None and caller.f_globals.get("__name__", "").partition(".")[0] == "tqdm":
            moves = _CURSOR.findall(text)
            pieces = [*map(visible, _CURSOR.split(text))]
            self.raw.write("".join(piece + move for piece, move in zip(pieces, [*moves, ""], strict=True)))
        else:
            self.raw.write(visible(redact_text(text)))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)


@contextmanager
def visible_output() -> Iterator[None]:
    """Escape everything that is printed within the block, by any library.

    An error that ends the program leaves the streams wrapped: its traceback is printed after the block.
    """
    before = sys.stdout, sys.stderr
    wrap_streams()
    try:
        yield
    except Exception:
        raise
    except BaseException:
        sys.stdout, sys.stderr = before
        raise
    sys.stdout, sys.stderr = before


class _StderrHandler(logging.Handler):
    """Prints messages to what standard error is when they are logged."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


@contextmanager
def logged_to_stderr() -> Iterator[None]:
    """Print what this package logs, from level INFO on, to standard error within the block.

    The commands do it; whoever imports the package sees only warnings and errors unless they configure ``logging``.
    """
    logger = logging.getLogger("stethoscope")
    if any(isinstance(handler, _StderrHandler) for handler in logger.handlers):  # a job of a sweep, in its process
        yield
        return
    handler, level = _StderrHandler(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def wrap_streams() -> None:
    """Escape everything that is printed from now on."""
    sys.stdout, sys.stderr = _wrapped(sys.stdout), _wrapped(sys.stderr)


def _wrapped(stream: Any) -> Any:
    if stream is None or isinstance(stream, VisibleStream):
        return stream
    if hasattr(stream, "reconfigure") and (stream.encoding or "").lower().replace("-", "") != "utf8":
        stream.reconfigure(errors="backslashreplace")  # a terminal without Unicode shows what it can
    return VisibleStream(stream)


def _raw(stream: Any) -> Any:
    """Return the stream below ours and below that of a progress bar."""
    while True:
        if isinstance(stream, VisibleStream):
            stream = stream.raw
        elif hasattr(stream, "rich_proxied_file"):
            stream = stream.rich_proxied_file
        else:
            return stream


def console(stderr: bool = False) -> Console:
    """Create a rich console for standard output or error that escapes its text."""
    from rich import console as rich_console
    from rich.segment import Segment

    @lru_cache(maxsize=4096)  # a cell of a table is rendered several times
    def shown(text: str) -> str:
        return visible(redact_text(text))

    class VisibleConsole(rich_console.Console):
        def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
            for text, style, control in super().render(renderable, options):
                yield Segment(text if control else shown(text), style, control)

        @property  # type: ignore[misc]  # rich's own property has a setter, which nothing here needs
        def file(self) -> Any:
            return _raw(super().file)

    wrapped = VisibleConsole(stderr=stderr)
    return wrapped if wrapped.is_terminal or stderr else VisibleConsole(stderr=stderr, width=WIDTH)
