"""Make the task of a finished run again, from what its run directory holds."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stethoscope.core.component import TARGET, build, import_class
from stethoscope.core.errors import ArtefactError
from stethoscope.core.files import read_yaml
from stethoscope.tasks.base import Task

if TYPE_CHECKING:
    from stethoscope.storage.run_dir import RunStore


def saved_config(folder: Path) -> dict[str, Any]:
    """Read the configuration that a run directory was made with, as plain data: nothing in it is resolved.

    Raises:
        ArtefactError: there is no such run, or the file is damaged.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        raise ArtefactError(f"{folder} is not a run directory: it has no config.yaml; `stethoscope evaluate` makes one")
    return read_yaml(file, "the command that made the run writes it again")


def saved_task(store: RunStore, name: str, plugins: Sequence[str] = (), offline: bool = False) -> Task:
    """Make the task that a run was asked with, from its configuration or else from its fingerprint.

    Args:
        store: the run.
        name: name of the task.
        plugins: packages besides our own that it may come from; the run's file does not decide that.
        offline: a task that could fetch its data uses only what is on this machine.

    Raises:
        ArtefactError: the run does not say how its task is made.
        ConfigError: the task cannot be made.
    """
    described = store.fingerprints().get(name, {}).get("task", {})
    path, settings = described.get("class"), described.get("settings", {})
    if path is None or not isinstance(settings, dict):
        raise ArtefactError(f"{store.run_dir / 'fingerprint.json'} does not say what {name} is")
    nodes = saved_config(store.run_dir).values() if (store.run_dir / "config.yaml").is_file() else ()
    configured = (node for node in nodes if isinstance(node, dict) and node.get(TARGET) == path)
    node = next(configured, {TARGET: path, **settings})
    if offline and "local_files_only" in signature(import_class(path, Task, f"{name}.{TARGET}", plugins)).parameters:
        node = {**node, "local_files_only": True}  # also where the file does not have the key
    return build(node, Task, name, plugins)
