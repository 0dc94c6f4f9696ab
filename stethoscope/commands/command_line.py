"""Read the ``key=value`` arguments of a command line and rewrite them in Hydra's grammar.

Paths and free text are used as typed, without quotes around the whole of them. In other settings brackets make
lists and mappings, as YAML, JSON or Python write them, and ``None`` is null. With ``--multirun`` a comma outside of
brackets and quotes separates values.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from stethoscope.core.component import choices, groups
from stethoscope.core.errors import ConfigError, unknown
from stethoscope.core.redaction import redact_override
from stethoscope.core.text import visible

TEXTS = {"question", "answer", "suffix", "prompt", "system", "follow_up", "description", "subset", "auth",
         "organization", "url", "brief"}  # fmt: skip
"""Settings of free text, by the last part of their key: used as typed."""
PATHS = {
    "answers", "beside", "captions", "dataset", "entity", "file", "filename", "folder", "group", "host", "image",
    "images", "history", "instances", "job_type", "live", "llm", "model_id", "name", "offload_folder", "out", "project",
    "projector", "qformer", "questions", "recalibrate", "revision", "run", "run_dir", "runs", "space", "spacy", "split",
    "tower", "tower_revision", "push", "uri", "extraction", "warn", "base_url", "api_key_env", "engine.model", "repope",
    "mitigation.detector", "mitigation.drop.detector", "mitigation.promise.detector", "mitigation.ask.detector",
    "mitigation.backtrack.detector", "mitigation.rerank.detector",
    "id", "label", "object", "letters", "positive", "negative", "variant",
    "hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.job.name", "hydra.launcher.submitit_folder",
}  # fmt: skip
"""Settings of a file, folder or name: used as typed, but for interpolations such as ``${oc.env:USER}``."""
LISTS = {"test", "image_ids", "vision", "answers.file", "hydra.searchpath", "hydra.launcher.setup"}
"""Settings that hold a path, or a list or mapping of paths in brackets."""
PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
"""Suffixes of picture files."""
COMMON_GROUPS = ("task", "model", "features", "detector", "generation", "mitigation", "logger", "experiment")
"""Groups whose choices are looked through for a bare word, in this order."""
NOT_CHOSEN = {("train", "features")}
"""Groups besides ``experiment`` of which a command chooses none by default."""
ALIASES = {(command, "detector"): "detector.folder" for command in ("app", "diagnose", "mitigate")}
"""Aliases of settings: ``detector=`` by itself would choose a file of ``conf/detector``."""
FLAGS = {"--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r", "--multirun", "-m",
         "--shell-completion", "-sc", "--info", "-i"}  # fmt: skip
WITH_VALUE = {"--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd",
              "--experimental-rerun"}  # fmt: skip
"""Hydra's options, without and with a value."""
_FUNCTION = re.compile(r"(choice|range|interval|glob|sort|shuffle|tag|int|float|str|bool|json_str)\((.*)\)", re.DOTALL)
INTERPOLATION = re.compile(r"\$\{(?:[a-z_][\w.]*:[^{}]*|[a-z_]\w*(?:\.\w+)*)\}")
"""Interpolations, which Hydra replaces by a value, except in free text."""
_KEY = re.compile(r"(\+\+?|~)?[\w$.\-/]+(@[\w$.\-:]*)?")
_BARE = re.compile(rf"(?:[A-Za-z0-9_/\-+.%*@?|:]|{INTERPOLATION.pattern})+")
_PLAIN = re.compile(r"[A-Za-z_/][A-Za-z0-9_/\-]*(?:\.[A-Za-z_/][A-Za-z0-9_/\-]*)*")
_CLOSING = {"(": ")", "[": "]", "{": "}"}


class Quoted(str):
    """Text that was typed in quotes."""


@dataclass(frozen=True)
class Part:
    """A value of an override, or an item of one.

    Attributes:
        value: text, a list or a mapping.
        source: as typed.
    """

    value: str | list[Part] | dict[str, Part]
    source: str


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate Hydra's options from the settings.

    Raises:
        ConfigError: an option is unknown, or lacks its value.

    >>> split(["-m", "seed=0,1", "--config-dir", "a=b"])
    (['-m', '--config-dir', 'a=b'], ['seed=0,1'])
    """
    options: list[str] = []
    overrides: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        name, equals, _ = argument.partition("=")
        if not argument.startswith("-"):
            overrides.append(argument)
        elif name not in FLAGS | WITH_VALUE:
            known = [option for option in FLAGS | WITH_VALUE if option[:2] == "--"]
            setting = name.lstrip("-").replace("-", "_")
            if setting.isidentifier() and len(setting) > 1 and not difflib.get_close_matches(name, known, cutoff=0.8):
                given = argument.partition("=")[2] or next(remaining, "value")
                raise ConfigError(f"{name} is no option; settings are written without dashes: {setting}={given}")
            raise ConfigError(unknown("option", name, known))
        else:
            options.append(argument)
            if name in WITH_VALUE and not equals:
                value = next(remaining, None)
                if value is None:
                    raise ConfigError(f"{name} needs a value")
                options.append(value)
    return options, overrides


def option(options: Sequence[str], *names: str) -> str | None:
    """Return the value of one of Hydra's options; None where it is not given.

    >>> option(["-m", "--config-dir", "a=b"], "--config-dir", "-cd")
    'a=b'
    """
    for index, word in enumerate(options):
        name, equals, value = word.partition("=")
        if name in names:
            return value if equals else options[index + 1]
    return None


def spell(word: str, command: str, sweep: bool = False) -> str:
    """Rewrite an override for Hydra.

    Args:
        word: ``key=value`` as typed.
        command: that it is given to.
        sweep: whether commas separate the values of several jobs.

    Returns:
        The override in Hydra's grammar; empty where it only names the default.

    Raises:
        ConfigError: it is not an override, or has an invalid value.

    >>> spell("run=runs/study/limit=4", "train"), spell("detector.C=None", "train")
    ("run='runs/study/limit=4'", 'detector.C=null')
    >>> spell("detector.threshold={'max_false_alarms': 0.2}", "train")
    'detector.threshold={max_false_alarms:0.2}'
    >>> spell("run=runs/a=1,runs/b", "extract", sweep=True)
    "run='runs/a=1',runs/b"
    """
    key, equals, value = word.partition("=")
    if not equals and not key.startswith("~"):
        raise ConfigError(f"{word!r} should be a setting, key=value, for example {_setting_of(word)}={word}")
    plain = key.lstrip("+~")
    if "/" in plain and plain.partition("/")[0] not in ("hydra", *groups()):
        raise ConfigError(f"{word!r} should be a setting, key=value, for example run={word}")
    if not _KEY.fullmatch(key):
        raise ConfigError(f"{word!r} is not a setting: the name before '=' has letters, digits, '_', '.' and '/' only")
    alias = ALIASES.get((command, plain))
    if alias is not None:
        key, plain = key[: len(key) - len(plain)] + alias, alias
    if not value:
        return word if alias is None else f"{key}{equals}"
    kinds = [(kind, name) for name in (plain, plain.rpartition(".")[2]) for kind in (TEXTS, PATHS, LISTS)]
    kind = next((kind for kind, name in kinds if name in kind), None)
    sweep = sweep and not (kind is not None and plain.startswith("hydra."))  # it has one value for all jobs
    if kind in (TEXTS, None):
        _check_unicode(key, value)
    function = _FUNCTION.fullmatch(value)
    if sweep and function and function[1] == "choice":
        value = function[2]
    elif function and (kind is None or sweep):
        return f"{key}={_function(key, value, sweep)}"
    parts = [_whole(value)] if kind is not None and not sweep else list(_parts(value, ","))
    if len(parts) > 1 and not sweep:
        word, value = redact_override(word), redact_override(word).partition("=")[2]
        raise ConfigError(
            f"{word} gives several values: --multirun makes a run of each, '{key}=[{value}]' is one list, and quotes "
            f"of its own make one text of it: '{key}=\"{value}\"'"
        )
    group = plain.partition("@")[0]
    if group in groups() and any(part.source in ("null", "None") for part in parts):
        return _without(key, command, group, len(parts))
    if group in groups() and not all(_is_name(part) for part in parts):
        raise ConfigError(f"{word} should name a choice, as in {group}={next(iter(choices(group)), 'name')}")
    writer = _value if kind is None else _path_or_list if kind is LISTS else _text
    return f"{key}={','.join(writer(part, kind is not TEXTS) for part in parts)}"


def _setting_of(word: str) -> str:
    """Guess the setting that a bare word was meant for.

    It is the group with such a choice, ``image`` or ``run``.

    >>> _setting_of("chair"), _setting_of("china.jpg"), _setting_of("runs/study")
    ('task', 'image', 'run')
    """
    if Path(word).suffix.lower() in PICTURES:
        return "image"
    return next((group for group in COMMON_GROUPS if word in choices(group)), "run")


def _is_name(part: Part) -> bool:
    """Return whether a value is a text, or a list of texts."""
    items = part.value if isinstance(part.value, list) else [part]
    return all(isinstance(item.value, str) for item in items)


def _without(key: str, command: str, group: str, values: int) -> str:
    """Rewrite ``group=null``, which chooses no configuration file and which Hydra cannot express.

    Raises:
        ConfigError: the group requires a choice.

    >>> _without("logger", "train", "logger", 1), _without("experiment", "train", "experiment", 1)
    ('logger=none', '')
    """
    if "none" in choices(group) and values == 1:
        return f"{key}=none"
    default = group == "experiment" or (command, group) in NOT_CHOSEN
    if default and values == 1:
        return ""
    condition = " in a sweep" if default else ""
    raise ConfigError(f"{key}=null is not possible{condition}; there are: {', '.join(choices(group))}")


def quote(text: str, interpolations: bool = False) -> str:
    """Quote text for Hydra's grammar, so that it reads the very same text.

    Args:
        text: to quote.
        interpolations: leave ``${...}`` to OmegaConf.

    >>> quote("it's ${x}"), quote("${x}", interpolations=True)
    ("'it\\\\'s \\\\${x}'", "'${x}'")
    """
    pieces = re.split(f"({INTERPOLATION.pattern})", text) if interpolations else [text]
    # only backslashes before a quote or an interpolation need escaping
    quoted = [piece if index % 2 else re.sub(r"(\\*)('|\$\{|\Z)", _escape, piece) for index, piece in enumerate(pieces)]
    return f"'{''.join(quoted)}'"


def search_path(folder: str | None) -> list[str]:
    """Return the override by which Hydra finds the user's configuration files; none without such a folder.

    Args:
        folder: of ``--config-dir``.
    """
    return [] if folder is None else [f"hydra.searchpath=[{quote(f'file://{Path(folder).resolve()}')}]"]


def unquoted(word: str) -> str:
    """Convert an override from Hydra's grammar to readable text, without quotes.

    >>> unquoted("run='runs/a=1'"), unquoted(r"x=http\://a"), unquoted("features=['a',b]")
    ('run=runs/a=1', 'x=http://a', "features=['a',b]")
    """
    key, equals, value = word.partition("=")
    text, end = _quoted(value, 0)
    if text is None or end != len(value):
        return word if value[:1] in ("[", "{") else key + equals + re.sub(r"\\([\\()\[\]{}:=, \t])", r"\1", value)
    return key + equals + re.sub(r"(\\*)\\(?=\$\{)", lambda match: match[1][: len(match[1]) // 2], text)


def _escape(match: re.Match[str]) -> str:
    slashes, special = match.groups()
    return slashes * 2 + (f"\\{special}" if special else "")


def _check_unicode(key: str, value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"{key}={visible(value)} is not UTF-8 text; the shell or the script that calls should be set to UTF-8"
        ) from None


def _function(key: str, value: str, sweep: bool) -> str:
    """Check a function of Hydra's grammar, such as ``range(0,10)``, or quote what only looks like one.

    Raises:
        ConfigError: it gives several values without a sweep, or values that no sweep of ours can use.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    word = f"{key}={value}"
    try:
        override = OverridesParser.create().parse_overrides([word])[0]
    except HydraException:
        if sweep:
            raise ConfigError(
                f"{word} cannot be read: a sweep takes values between commas, choice(a,b) or range(0,10,2); quotes of "
                f"its own make it one text: '{key}=\"{value}\"'"
            ) from None
        return quote(value)
    if override.is_sweep_override() and not sweep:
        raise ConfigError(f"{word} gives several values: --multirun makes a run of each")
    if override.is_sweep_override() and not override.is_discrete_sweep():
        raise ConfigError(f"{word} has no end: a sweep takes values one by one, as in {key}=0.1,0.5 or range(0,10,2)")
    return value


# --- reading ----------------------------------------------------------------------------------------------------------


def _whole(text: str) -> Part:
    """Read a value without separators: a list, a mapping, quoted or bare text."""
    part, end = _read(text, 0, "")
    return Part(part.value if end == len(text) else text, text)


def _parts(text: str, stops: str) -> Iterator[Part]:
    """Yield the values between commas."""
    start = 0
    while start <= len(text):
        part, end = _read(text, start, stops)
        yield part
        start = end + 1


def _read(text: str, start: int, stops: str) -> tuple[Part, int]:
    """Read one value from ``start`` to the next of ``stops`` outside brackets and quotes, or to the end."""
    begin = _skip(text, start, " \t")
    for read in (_quoted, _bracketed):
        value, end = read(text, begin)
        after = _skip(text, end, " \t")
        if value is not None and (after == len(text) or text[after] in stops):
            return Part(value, text[begin:end]), after
    end = _bare_end(text, begin, stops)
    bare = text[begin:end].rstrip(" \t") if stops else text[start:end]
    return Part(bare, bare), end


def _skip(text: str, start: int, blanks: str | None = None) -> int:
    """Return the index of the first character at or after ``start`` that is no blank.

    ``blanks`` has the letters that count as such; None for all white space.
    """
    return len(text) - len(text[start:].lstrip(blanks))


def _quoted(text: str, start: int) -> tuple[Quoted | None, int]:
    """Read text in quotes; backslashes before a quote are doubled, as Hydra writes them."""
    match = re.compile(r"""'((?:[^'\\]|\\.)*)'|"((?:[^"\\]|\\.)*)\"""", re.DOTALL).match(text, start)
    if match is None:
        return None, start
    inner, mark = match[match.lastindex or 1], text[start]
    halved = re.sub(rf"(\\+)({mark}|\Z)", lambda match: "\\" * (len(match[1]) // 2) + match[2], inner)
    return Quoted(halved), match.end()


def _bracketed(text: str, start: int) -> tuple[list[Part] | dict[str, Part] | None, int]:
    """Read a list or a mapping; None where its brackets do not close or an entry of a mapping has no key."""
    opening = text[start : start + 1]
    if opening not in ("[", "{"):
        return None, start
    closing, position = _CLOSING[opening], start + 1
    items: list[Part] = []
    mapping: dict[str, Part] = {}
    while True:
        after = _skip(text, position)
        if text[after : after + 1] == closing:  # also after a last comma
            return (items if opening == "[" else mapping), after + 1
        if opening == "{":
            key, position = _read(text, position, ":,}")
            if text[position : position + 1] != ":" or not isinstance(key.value, str):
                return None, start
            part, position = _read(text, position + 1, ",}")
            mapping[key.value] = part
        else:
            part, position = _read(text, position, ",]")
            items.append(part)
        if position >= len(text):
            return None, start
        position += text[position] == ","


def _bare_end(text: str, start: int, stops: str) -> int:
    """Find the end of bare text; a bracket that never closes does not hide what follows it."""
    open_brackets: list[str] = []
    for index in range(start, len(text)):
        letter = text[index]
        if open_brackets and letter == open_brackets[-1]:
            open_brackets.pop()
        elif letter in _CLOSING:
            open_brackets.append(_CLOSING[letter])
        elif letter in stops and not open_brackets:
            return index
    if not open_brackets:
        return len(text)
    return next((index for index in range(start, len(text)) if text[index] in stops), len(text))


# --- writing ----------------------------------------------------------------------------------------------------------


def strip_quotes(text: str) -> str:
    """Remove quotes around a whole path or text, unless a file is named so.

    >>> strip_quotes("'a=b'"), strip_quotes('"Yes" or "no"')
    ('a=b', '"Yes" or "no"')
    """
    value, end = _quoted(text, 0)
    return text if value is None or end != len(text) or os.path.lexists(text) else str(value)


def _text(part: Part, path: bool) -> str:
    """Write text or a path as typed, without quotes around it.

    ``null`` and ``None`` mean no value, unless they are quoted.
    """
    if part.source in ("null", "None"):
        return "null"
    text = strip_quotes(part.source)
    if path and _PLAIN.fullmatch(text) and text.lower() not in ("true", "false", "null", "none", "nan", "inf"):
        return text  # readable in the name of a sweep's folder
    return quote(text, interpolations=path)


def _path_or_list(part: Part, path: bool) -> str:
    return _text(part, path) if isinstance(part.value, str) else _structure(part, _path_or_list, path)


def _value(part: Part, path: bool) -> str:
    """Write a value of any other setting; Hydra decides on its type."""
    if not isinstance(part.value, str):
        return _structure(part, _value, path)
    if isinstance(part.value, Quoted) or not _BARE.fullmatch(part.value):
        return quote(part.value, interpolations=True)
    return "null" if part.value == "None" else part.value


def _structure(part: Part, write: Callable[[Part, bool], str], path: bool) -> str:
    """Write a list or a mapping; quotes inside belong to its items."""
    if isinstance(part.value, list):
        return f"[{','.join(write(item, path) for item in part.value)}]"
    assert isinstance(part.value, dict)
    return "{" + ",".join(f"{_key(key)}:{write(item, path)}" for key, item in part.value.items()) + "}"


def _key(key: str) -> str:
    """Write a key of a mapping.

    Raises:
        ConfigError: Hydra's grammar cannot express it.
    """
    if not re.fullmatch(r"[A-Za-z0-9_/\-+.%*@?|\\()\[\]{}:=, \t]+", key):
        raise ConfigError(f"the key {key!r} of a mapping cannot be given on the command line; use a configuration file")
    return re.sub(r"([\\()\[\]{}:=, \t])", r"\\\1", key)
