"""What one run takes over from another: the answers and token rows of a task, without tracing or asking again."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

from stethoscope.errors import ArtefactError
from stethoscope.lines import dump
from stethoscope.store import RunStore


def share_table(source: RunStore, folder: Path, task: str) -> RunStore:
    """A run directory with the answers and token rows of one task of another run, for a detector of its own.

    ``tokens.parquet`` is the same file on disk where the file system allows (it is only ever replaced, never written
    into), the task's lines of ``samples.jsonl`` are copied.

    Args:
        source: the other run; the task must be finished there.
        folder: the new directory, or one that was made so before.
        task: whose answers.

    Raises:
        ArtefactError: the other run has no such task, or has not finished it.
        ConfigError: the folder holds a run with other answers.
    """
    records = list(source.records(task))
    if any(record.part for record in records):
        raise ArtefactError(f"the run in {source.run_dir} has not finished {task}; the command that began it goes on")
    fingerprint = dict(source.fingerprints().get(task, {}))
    features = fingerprint.pop("features", None)
    target = RunStore(folder)
    target.begin(task, fingerprint, features, overwrite="features")
    _link(source.token_files.merged, target.token_files.merged)
    temporary = target.samples_file.with_suffix(".tmp")
    temporary.write_bytes(b"".join(dump(replace(record, part="").to_dict()) for record in records))
    os.replace(temporary, target.samples_file)
    if task in source.metrics():
        target.write_metrics(task, source.metrics()[task])
    target.set_status(task, source.status().get(task, "finished"))
    return RunStore(folder)


def _link(source: Path, target: Path) -> None:
    """The same file under another name, or a copy on file systems that cannot do that; it appears whole."""
    temporary = target.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)
