"""What ``report`` and ``compare`` have in common: their words, and the task of a finished run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING

from stethoscope.errors import ArtefactError, ConfigError, unknown

if TYPE_CHECKING:
    from stethoscope.report.source import Source
    from stethoscope.task import Task


def parse(command: str, words: Sequence[str], defaults: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """Runs and settings among the words of a command.

    A word is a setting if what stands before its ``=`` is a name, and no file is called so: paths of swept runs have
    the sign in them too. ``None`` stands for the default.

    Raises:
        ConfigError: an unknown setting or option.
    """
    runs, settings = [], dict(defaults)
    for word in words:
        key, equals, value = word.partition("=")
        if word.startswith("-"):
            raise ConfigError(f"stethoscope {command} has no option {word}; `stethoscope {command} --help` explains it")
        if equals and key.isidentifier() and (key in settings or not Path(word).exists()):
            if key not in settings:
                raise ConfigError(unknown(f"setting of {command}", key, settings))
            settings[key] = defaults[key] if value in ("None", "null") else value
        else:
            runs.append(word)
    return runs, settings


def package_names(text: str) -> list[str]:
    """Package names of the setting ``plugins``, with or without the brackets of the other commands.

    >>> package_names("[mine,yours]"), package_names("mine"), package_names("")
    (['mine', 'yours'], ['mine'], [])
    """
    return [name.strip() for name in text.strip("[]").split(",") if name.strip()]


def saved_task(source: Source, name: str, plugins: Sequence[str] = (), offline: bool = False) -> Task:
    """The task that a run was asked with, made again from its configuration or else from its fingerprint.

    Args:
        source: the run.
        name: of the task.
        plugins: packages besides our own that it may come from; the run's file does not decide that.
        offline: a task that could fetch its data uses only what is on this machine.

    Raises:
        ArtefactError: the run does not say how its task is made.
        ConfigError: the task cannot be made.
    """
    from stethoscope.build import TARGET, build, import_class
    from stethoscope.commands.session import saved_config
    from stethoscope.task import Task

    described = source.store.fingerprints().get(name, {}).get("task", {})
    path, settings = described.get("class"), described.get("settings", {})
    if path is None or not isinstance(settings, dict):
        raise ArtefactError(f"{source.folder / 'fingerprint.json'} does not say what {name} is")
    nodes = saved_config(source.folder).values() if (source.folder / "config.yaml").is_file() else ()
    configured = (node for node in nodes if isinstance(node, dict) and node.get(TARGET) == path)
    node = next(configured, {TARGET: path, **settings})
    if offline and "local_files_only" in signature(import_class(path, Task, f"{name}.{TARGET}", plugins)).parameters:
        node = {**node, "local_files_only": True}  # also where the file does not have the key
    return build(node, Task, name, plugins)
