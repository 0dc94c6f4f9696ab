"""What ``report`` and ``compare`` have in common: their words, and the task of a finished run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stethoscope.errors import ArtefactError, ConfigError, unknown

if TYPE_CHECKING:
    from stethoscope.report.source import Source
    from stethoscope.task import Task


def parse(command: str, words: Sequence[str], defaults: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """Runs and settings among the words of a command.

    A word is a setting if what stands before its ``=`` is a name; paths of swept runs have the sign in them too.

    Raises:
        ConfigError: an unknown setting or option.
    """
    runs, settings = [], dict(defaults)
    for word in words:
        key, equals, value = word.partition("=")
        if word.startswith("-"):
            raise ConfigError(f"stethoscope {command} has no option {word}; `stethoscope {command} --help` explains it")
        if equals and key.isidentifier():
            if key not in settings:
                raise ConfigError(unknown(f"setting of {command}", key, settings))
            settings[key] = value
        else:
            runs.append(word)
    return runs, settings


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
    from omegaconf import DictConfig, OmegaConf

    from stethoscope.build import build
    from stethoscope.task import Task

    found = source.store.fingerprints().get(name, {}).get("task", {})
    file = source.folder / "config.yaml"
    config = OmegaConf.load(file) if file.is_file() else {}
    nodes: list[Any] = [node for node in config.values() if isinstance(node, DictConfig)]
    mine = [node for node in nodes if node.get("_target_") == found.get("class")]
    if "class" not in found:
        raise ArtefactError(f"{source.folder / 'fingerprint.json'} does not say what {name} is")
    node = dict(OmegaConf.to_container(mine[0])) if mine else {"_target_": found["class"], **found.get("settings", {})}
    if offline and "local_files_only" in node:
        node["local_files_only"] = True
    return build(node, Task, name, plugins)
