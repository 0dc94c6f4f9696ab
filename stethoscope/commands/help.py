"""Write the help of ``stethoscope COMMAND --help``: groups, settings and their comments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from string import Template
from textwrap import fill
from typing import Any, cast

import yaml

from stethoscope.commands.command_line import search_path
from stethoscope.core.component import choices, compose, conf_folder

WIDTH, COLUMN = 118, 28
"""Width of the page, and column at which comments behind settings start."""


@dataclass(frozen=True)
class Comments:
    """Comment lines of one setting: those above it, and those behind it and below."""

    above: tuple[str, ...] = ()
    behind: tuple[str, ...] = ()


def help_text(command: str, overrides: Sequence[str], folder: str | None = None) -> str:
    """Write a command's help for the configuration that overrides choose.

    With ``task=chair`` it explains CHAIR's settings.

    Args:
        command: a file of ``conf`` with a ``hydra.help.template``.
        overrides: such as ``task=chair``.
        folder: of the user's configuration files, ``--config-dir``.
    """
    from omegaconf import OmegaConf

    config = compose([*overrides, *search_path(folder)], command, hydra=True)
    sources = config.hydra.runtime.config_sources
    folders = [Path(source.path) for source in sources if source.schema == "file"] + [conf_folder()]
    chosen = {key: name for key, name in config.hydra.runtime.choices.items() if not key.startswith("hydra/")}
    comments, heads = read_comments(command, folders), list[str]()
    defaults = (yaml.safe_load(_read(command, folders)) or {}).get("defaults", [])
    for group in (key for entry in defaults if isinstance(entry, dict) for key in entry):
        if group not in chosen and isinstance(config.get(group), Mapping):  # of a list Hydra keeps no record
            chosen[group] = None
            comments |= _of_list(group, config[group], folders)
    for key, name in chosen.items():
        group, _, package = key.partition("@")
        if name is None:
            continue
        file, prefix = f"{group}/{name}", f"{package or group}."
        if group == "experiment":  # it changes settings of others, and its title may explain what to do first
            opening = takewhile(lambda line: line.startswith("#"), _read(file, folders).splitlines())
            heads = [f"# {key}={name}", *(line for line in opening if "@package" not in line)]  # a directive to Hydra
            prefix = ""
        comments |= {f"{prefix}{setting}": lines for setting, lines in read_comments(file, folders).items()}
        comments[package or group] = Comments((f"{key}={name}: {_names(group, folders).get(name, '')}",))
    packages = [key.rpartition("@")[2] for key in chosen]
    whole = cast("dict[str, Any]", OmegaConf.to_container(config, resolve=False))  # the root is a mapping
    plain = {key: value for key, value in whole.items() if key not in ("hydra", *packages)}
    parts = [plain, *({key: whole[key]} for key in packages if whole.get(key) is not None)]
    shown = ["\n".join(heads), *("\n".join(_settings(part, "", comments)) for part in parts)]
    return Template(config.hydra.help.template).substitute(
        APP_CONFIG_GROUPS="\n".join(_group(key, folders) for key in sorted(chosen)),
        CONFIG="\n\n".join(filter(None, shown)),
    )


def _of_list(group: str, names: Iterable[str], folders: Sequence[Path]) -> dict[str, Comments]:
    """Collect the comments of several files of a group, each of which has its settings under its own name."""
    titles, comments = _names(group, folders), dict[str, Comments]()
    for name in names:
        lines = read_comments(f"{group}/{name}", folders)
        comments |= {f"{group}.{setting}": value for setting, value in lines.items()}
        comments[f"{group}.{name}"] = Comments((titles.get(name, ""),))
    return comments


def _read(name: str, folders: Sequence[Path]) -> str:
    """Read the first configuration file of a name; empty without one."""
    files = (folder / f"{name}.yaml" for folder in folders)
    return next((file.read_text(encoding="utf-8") for file in files if file.is_file()), "")


def _names(group: str, folders: Sequence[Path]) -> dict[str, str]:
    """Map the names of a group to their titles."""
    return {name: title for folder in reversed(folders) for name, title in choices(group, folder).items()}


def _group(key: str, folders: Sequence[Path]) -> str:
    names = ", ".join(sorted(_names(key.partition("@")[0], folders)))
    return fill(f"{key}: {names}", WIDTH, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)


def _settings(node: Mapping[str, Any], path: str, comments: Mapping[str, Comments]) -> Iterator[str]:
    """Yield the lines of a mapping of settings, as in a YAML file."""
    indent = "  " * path.count(".")
    for key, value in node.items():
        lines = comments.get(f"{path}{key}", Comments())
        yield from (f"{indent}# {text}" for text in lines.above)
        inner = isinstance(value, dict) and bool(value)
        shown = "" if inner else " " + yaml.safe_dump(value, default_flow_style=True, width=10**6).split("\n...")[0]
        line = f"{indent}{key}:{shown.rstrip()}"
        first, *more = lines.behind or ("",)
        column = max(COLUMN, len(line) + 2)
        yield f"{line:<{column}}# {first}" if first else line
        yield from (f"{'':<{column}}# {text}" for text in more)
        if inner:
            yield from _settings(value, f"{path}{key}.", comments)


def read_comments(name: str, folders: Sequence[Path]) -> dict[str, Comments]:
    """Read the comments on the settings of a configuration file, and of those that it builds on.

    The comment at the start of the file is its title, and does not belong to its first setting.

    Args:
        name: of the file, such as ``model/hf``.
        folders: to search, the user's before the package's.

    Returns:
        The comments of each dotted key that has some.
    """
    text = _read(name, folders)
    root = yaml.compose(text)
    if not isinstance(root, yaml.MappingNode):
        return {}
    comments: dict[str, Comments] = {}
    group = name.rpartition("/")[0]
    for base in yaml.safe_load(text).get("defaults", []):
        if isinstance(base, str) and base != "_self_":
            comments |= read_comments(f"{group}/{base}".lstrip("/"), folders)
    ends: dict[int, int] = {}  # column where a line's last token ends; lines of comments alone have none
    for token in yaml.scan(text):
        if isinstance(token, yaml.StreamStartToken):
            continue
        ends[token.end_mark.line] = max(token.end_mark.column, ends.get(token.end_mark.line, 0))
    remarks: dict[int, tuple[int, str]] = {}  # of a line: column of its sign, text
    for number, line in enumerate(text.splitlines()):
        position = line.find("#", ends.get(number, 0))
        if position >= 0:
            remarks[number] = position, line[position + 1 :].strip()

    def alone(number: int, column: int) -> bool:
        return number in remarks and number not in ends and remarks[number][0] == column

    for key, row, column in _keys(root, ""):
        first, last = row, row + 1
        while alone(first - 1, column):
            first -= 1
        while row in remarks and alone(last, remarks[row][0]):
            last += 1
        above = [remarks[number][1] for number in range(first, row) if first > 0]
        behind = [remarks[number][1] for number in range(row, last) if row in remarks]
        if above or behind:
            comments[key] = Comments(tuple(above), tuple(behind))
    return comments


def _keys(node: yaml.MappingNode, path: str) -> Iterator[tuple[str, int, int]]:
    """Yield (dotted key, line, column) of every setting of a file."""
    for name, value in node.value:
        yield f"{path}{name.value}", name.start_mark.line, name.start_mark.column
        if isinstance(value, yaml.MappingNode):
            yield from _keys(value, f"{path}{name.value}.")
