"""Make text safe for the terminal: escape control characters, mask secrets; print log messages."""

from __future__ import annotations

import logging
import os
import platform
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, TextIO

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


MASK = "***"

_SECRET_NAME = re.compile(
    r"secret|wandb_?key|passw|passphrase|pwd$|credential|cookie|authoriz|bearer|(api|access|private|signing|session|account)[_-]?key"
    r"|(^|[_.-])(auth|sig|signature|sas|pat|token)$|^token[_-]|[a-z0-9]Token$|(api|access|auth|hub|hf|bot|refresh)[_-]?token",
    re.IGNORECASE,
)
"""Names of settings, headers and variables that hold a secret."""

_TEXT_TOKEN_NAME = re.compile(
    r"(^|[_.-])(audio|begin|bo[sit]|cls|end|eo[sit]|first|image|last|mask|next|pad|per|row|scope|sep|special|start|stop|sub"
    r"|unk|video)[_-]?token$|^token[_-](ids?|types?|index|count)",
    re.IGNORECASE,
)
"""Names of tokens of a tokenizer."""

# each pattern reads a run of letters once, from its start, as answers may repeat one letter thousands of times
_SECRET_VALUE = re.compile(
    r"(?P<address>(?<![A-Za-z0-9+.-])[A-Za-z0-9+.-]++://)[^\s/?#'\"<>]*@"  # user:password@host
    r"|(?P<scheme>\b(?:[Bb]earer|[Bb]asic)\s+)(?=\S*[A-Z0-9=_])[A-Za-z0-9+/=._~-]{8,}"
    r"|\bhf_(?:(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{8,}|[a-z]{16,})|\bapi_org_[A-Za-z0-9]{16,}"
    r"|\b(?:gh[pousr]|github_pat|glpat|sk|xox[abeprs]|npm|pypi)[_-](?=[A-Za-z_-]{0,200}[0-9])[A-Za-z0-9_-]{16,}"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bAIza[A-Za-z0-9_-]{30,}|\beyJ[A-Za-z0-9_-]{8,4096}+\.[A-Za-z0-9._-]+"
)
"""Values that look like secrets, whatever their names."""

_ASSIGNMENT = re.compile(
    r"""(?P<name>(?<![\w.\-+~$@])[\w.\-+~$@]++)(?P<sign>['"]?\s?=\s?|['"]:\s*)(?P<value>"[^"]*"|'[^']*'|[^\s&,;'"{}\[\]]+)"""
)
_FLOW = re.compile(
    r"""(?P<name>(?<={)[ \t]*+[\w.\-]++|(?<=,)[\w.\-]++)(?P<sign>:[ \t]*)"""
    r"""(?P<value>"[^"]*"|'[^']*'|\[[^\[\]]*\]|[^\s,;'"{}\[\]]+)"""
)
"""A key of a flow mapping, as in an override: ``{hub_token:abc}``."""
_HEADER = re.compile(
    r"(?P<name>(?i:(?<![\w-])[\w-]++(?<=authorization)|(?:set-)?cookie|(?<![\w-])(?=[\w-]*?x-[\w-])[\w-]++)"
    r"|(?<!\w)\w(?=\w*?_\w)\w++)(?P<sign>:\s+)(?P<value>(?!\*{3})[^\s,;'\"}\]]+)"
)
_NOT_SECRET = {"null", "None", "none", "true", "false", "FILE", "USER:PASSWORD", "OPENAI_API_KEY"}
"""Values that are choices, and placeholders of help texts."""

_YAML_LINE = re.compile(
    r"^(?P<name>[ \t-]*\w+)(?P<sign>:[ \t]+)(?P<value>(?!''|\*{3})[^\s#].*?)(?P<comment>(?<![ \t])[ \t]++#.*)?$",
    re.MULTILINE,
)


@lru_cache(maxsize=4096)
def is_secret(name: str) -> bool:
    """Return whether a setting of this name holds a secret.

    >>> [is_secret(name) for name in ("hub_token", "HF_TOKEN", "auth", "max_new_tokens", "eos_token_id", "subtokens")]
    [True, True, True, False, False, False]
    """
    return bool(_SECRET_NAME.search(name)) and not _TEXT_TOKEN_NAME.search(name)


def redact(value: Any, environment: bool = True, text: Callable[[str], str] | None = None) -> Any:
    """Copy nested mappings and lists with secrets masked; numbers and booleans are never secrets.

    Args:
        value: mappings, lists, texts or any other values.
        environment: also mask the values of secret environment variables, so that the result depends on them.
        text: what to do with texts; None for ``redact_text``.

    >>> redact({"hub_token": "hf_abc", "max_new_tokens": 128, "wandb": {"api_key": "x"}, "proxy": "http://me:pw@host:80"})
    {'hub_token': '***', 'max_new_tokens': 128, 'wandb': {'api_key': '***'}, 'proxy': 'http://***@host:80'}
    """
    if text is None:  # what is to be masked is read once for all texts
        text = partial(_mask_secrets, _environment_secrets() if environment else [])
    if isinstance(value, Mapping):
        return {
            key: MASK if is_secret(str(key)) and _is_maskable(item) else redact(item, environment, text)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [redact(item, environment, text) for item in value]
    return text(value) if isinstance(value, str) else value


def _is_maskable(value: Any) -> bool:
    """Return whether a value can be a secret."""
    return value is not None and not isinstance(value, (bool, int, float)) and value not in ("", MASK)


def redact_text(text: str, environment: bool = True) -> str:
    """Mask secrets in a text.

    These are credentials in URLs, tokens of known forms, and values of secret environment variables.

    >>> redact_text("no answer from https://me:pw@host/x?token=abc"), redact_text("model.hub_token=abc limit=3")
    ('no answer from https://***@host/x?token=***', 'model.hub_token=*** limit=3')
    """
    return _mask_secrets(_environment_secrets() if environment else [], text)


def _mask_secrets(secrets: Sequence[str], text: str) -> str:
    """Mask these values, and whatever looks like a secret."""
    for secret in secrets:
        text = text.replace(secret, MASK)
    text = _SECRET_VALUE.sub(_mask_value, text)
    for pattern in (_ASSIGNMENT, _FLOW, _HEADER, _YAML_LINE):
        text = pattern.sub(_mask_assignment, text)
    return text


def _mask_value(match: re.Match[str]) -> str:
    return f"{match['address'] or match['scheme'] or ''}{MASK}{'@' if match['address'] else ''}"


def _mask_assignment(match: re.Match[str]) -> str:
    if match["value"] in _NOT_SECRET or not is_secret(match["name"].strip(" \t-")):
        return match[0]
    return f"{match['name']}{match['sign']}{MASK}{match.groupdict().get('comment') or ''}"


def _environment_secrets() -> list[str]:
    """List the values of environment variables with secret names, longest first, without paths."""
    names = [name for name in list(os.environ) if is_secret(name)]  # a copy: threads of libraries set variables
    values = {os.environ.get(name, "") for name in names}
    return sorted((value for value in values if len(value) >= 8 and value[0] not in "/~."), key=len, reverse=True)


def redact_override(override: str) -> str:
    """Mask the value of an override if its key names a secret or its value holds such a key.

    >>> redact_override("model.hub_token=hf_abc"), redact_override("task=pope"), redact_override("+x={api_key: a}")
    ('model.hub_token=***', 'task=pope', '+x=***')
    """
    key, equals, value = override.partition("=")
    inside = re.findall(r"(?<![\w.-])([\w.-]++)['\"]?\s*[:=]", value)
    return f"{key}={MASK}" if equals and any(map(is_secret, (key, *inside))) else redact_text(override)


_PATH_WORDS = re.compile(
    r"(?<![\w.:/~*-])(?:file://|~)?(?:/[\w.@+%=-]+){2,}/?"  # two parts at least, so that no "/" of a text is meant
    r"|\b[A-Za-z]:\\[\w.@+%=\\-]+"
)


def hide_paths(text: str, known_only: bool = False) -> str:
    r"""Shorten local paths in a text to their last part, and mask this machine's name.

    Args:
        text: of messages and settings.
        known_only: only paths inside the home and the present folder, for texts of a data set, which may hold others.

    >>> hide_paths("/data/coco/1.jpg is missing, see https://host.org/a/b"), hide_paths("yes/no and/or")
    ('.../1.jpg is missing, see https://host.org/a/b', 'yes/no and/or')
    """
    if "/" in text or "\\" in text:
        folders = {os.path.expanduser("~"), os.getcwd(), os.path.realpath(os.getcwd())} - {"/", ""}
        if folders:  # none in a container without a home, started in /
            inside = "|".join(re.escape(folder) for folder in sorted(folders, key=len, reverse=True))
            text = re.sub(rf"(?:file://)?(?:{inside})(?![\w.-])[^\s'\",;:)\]]*", _last_part, text)
        text = text if known_only else _PATH_WORDS.sub(_last_part, text)
    name = "" if known_only else platform.node()
    if len(name) > 2 and name != "localhost":
        text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", MASK, text)
    return text


def _last_part(match: re.Match[str]) -> str:
    return ".../" + re.split(r"[/\\]", match[0].rstrip("/\\"))[-1]
