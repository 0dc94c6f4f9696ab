"""The one place where text reaches the terminal: characters that could steer it are written as escapes."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from stethoscope.redaction import redact_text

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 150
"""Columns of a table where the output is a file or a pipe, so that it stays in one piece."""
_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 but for tabs and line ends, DEL, C1
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # direction of writing
    "\u2028\u2029\ufeff\U000e0000-\U000e007f"  # line separators, marks and tags that nobody sees
    "\ud800-\udfff]"  # bytes of file names that are no UTF-8
)
_CURSOR = re.compile("\r|\x1b\\[A|\n")  # what tqdm moves its bars with


def visible(text: object) -> str:
    """Text with control characters, direction overrides and bytes that are no text as escapes.

    >>> visible("a\\x1b[31mb\\nc")
    'a\\\\x1b[31mb\\nc'
    """
    return _STEERING.sub(_escaped, str(text))


def one_line(text: object) -> str:
    """Text on one line, as for messages that quote a value.

    >>> one_line("no such\\n  file")
    'no such file'
    """
    return visible(" ".join(filter(None, (line.strip() for line in re.split("[\r\n]+", str(text))))))


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # Python's stand-in for a byte of a file name
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


class VisibleStream:
    """A text stream that escapes what is written to it and masks secrets; all else is the stream's own."""

    def __init__(self, raw: TextIO) -> None:
        """Wrap a stream."""
        self.raw = raw

    def write(self, text: str) -> int:
        """Write text. The bars of tqdm, with which files are downloaded, may move the cursor."""
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
    """Escape everything that is printed within the block, by whatever library.

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


def wrap_streams() -> None:
    """Escape everything that is printed from now on."""
    sys.stdout, sys.stderr = _wrapped(sys.stdout), _wrapped(sys.stderr)


def _wrapped(stream: Any) -> Any:
    if stream is None or isinstance(stream, VisibleStream):
        return stream
    if hasattr(stream, "reconfigure") and (stream.encoding or "").lower().replace("-", "") != "utf8":
        stream.reconfigure(errors="backslashreplace")  # a terminal without accents shows what it can
    return VisibleStream(stream)


def _raw(stream: Any) -> Any:
    """The stream below ours and below those of a progress bar."""
    while True:
        if isinstance(stream, VisibleStream):
            stream = stream.raw
        elif hasattr(stream, "rich_proxied_file"):
            stream = stream.rich_proxied_file
        else:
            return stream


def console(stderr: bool = False) -> Console:
    """A console of rich for standard output or error, of which text is escaped and only its own styles steer."""
    from rich import console as rich_console
    from rich.segment import Segment

    class VisibleConsole(rich_console.Console):
        def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
            for text, style, control in super().render(renderable, options):
                yield Segment(text if control else visible(redact_text(text)), style, control)

        @property
        def file(self) -> Any:
            return _raw(super().file)

    made = VisibleConsole(stderr=stderr)
    return made if made.is_terminal or stderr else VisibleConsole(stderr=stderr, width=WIDTH)
