"""Implement ``stethoscope export``: write a finished run for other tools, without a model."""

from __future__ import annotations

import time
from pathlib import Path

from omegaconf import DictConfig

from stethoscope.commands.common import as_list, picture_loader
from stethoscope.core.errors import ConfigError, unknown
from stethoscope.report.export import EXPORTERS, ExportSettings, RunExport, export
from stethoscope.report.hub_export import push
from stethoscope.storage.reuse import is_address, local_run


def run(config: DictConfig) -> None:
    """Write the files of one target, print their names, and upload them if ``push`` says so."""
    from stethoscope.report.run_source import RunReader, readable

    if config.to not in EXPORTERS:
        raise ConfigError(unknown("target of export", str(config.to), EXPORTERS))
    if config.push is not None:
        check_push(str(config.push), config.to)
    settings = ExportSettings(
        organization=str(config.organization),
        relationship=config.relationship,
        dataset=config.dataset,
        url=config.url,
        pictures=config.pictures,
        time=time.time(),
    )
    if is_address(str(config.out)):
        raise ConfigError(f"the export of {config.run} needs a folder of this machine: out=FOLDER")
    source = RunReader.read(local_run(str(config.run)))
    names = [results.task for results in source.results] if config.tasks is None else as_list(config.tasks)
    by_name = {results.task: results for results in source.results}
    for name in names:
        if name not in by_name:
            raise ConfigError(unknown(f"task of {config.run}", str(name), by_name))
    chosen = tuple(by_name[name] for name in dict.fromkeys(names))
    picture = picture_loader(source.store, config.plugins, "the log has only the pictures that the run has kept")
    with readable(source.folder):
        files = export(RunExport(source, chosen, settings, picture), config.to, Path(config.out))
    print("\n".join(map(str, files)))
    if config.push is not None:
        kind = "dataset" if config.to == "dataset" else "model"
        print(push(Path(config.out), str(config.push), kind, config.private))


def check_push(repo_id: str, target: str) -> None:
    """Check, before anything is written, that a target can be uploaded to a repository.

    Raises:
        ConfigError: the target has no upload, or the name is no repository's.
    """
    if target not in ("dataset", "hub_results"):
        raise ConfigError(f"push={repo_id} is for to=dataset and to=hub_results; to={target} only writes files")
    owner, slash, name = repo_id.partition("/")
    if not (owner and slash and name) or "/" in name or repo_id.startswith(("/", ".", "~")):
        raise ConfigError(f"push={repo_id} should be a repository on the hub, owner/name")
