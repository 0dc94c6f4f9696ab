"""Mask secrets in settings and texts, and shorten the paths of this machine."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

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


def redact_text(text: str) -> str:
    """Mask secrets in a text.

    These are credentials in URLs, tokens of known forms, and values of secret environment variables.

    >>> redact_text("no answer from https://me:pw@host/x?token=abc"), redact_text("model.hub_token=abc limit=3")
    ('no answer from https://***@host/x?token=***', 'model.hub_token=*** limit=3')
    """
    return _mask_secrets(_environment_secrets(), text)


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
