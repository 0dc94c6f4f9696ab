"""Copy answers and token rows from other runs, and runs from an address."""

from __future__ import annotations

import atexit
import logging
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stethoscope.core.errors import ArtefactError, ConfigError
from stethoscope.core.files import jsonable, link_or_copy, replacing
from stethoscope.core.text import one_line
from stethoscope.storage.lock import RunLock
from stethoscope.storage.records import FAILED, Record, encode_line, read_lines
from stethoscope.storage.run_dir import MAPS, RunStore
from stethoscope.storage.run_fingerprint import answer_fingerprint, digest

if TYPE_CHECKING:
    from stethoscope.adapters.base import Adapter
    from stethoscope.core.types import Generation
    from stethoscope.tasks.base import Task

logger = logging.getLogger(__name__)

LOCKS = ".answers"  # folder with a lock file per set of answers


def copy_task(source: RunStore, folder: Path, task: str) -> RunStore:
    """Create a run directory with one task of another run, to train another detector.

    ``tokens.parquet`` is a hard link where the file system allows (it is only ever replaced, never written into); the
    task's lines of ``samples.jsonl`` are copied, with stored pictures and heat maps.

    Args:
        source: the other run; the task must be finished there.
        folder: the new directory, or one that this function created before.
        task: name of the task.

    Returns:
        The new run.

    Raises:
        ArtefactError: the other run has no such task, or has not finished it.
        ConfigError: the folder holds a run with other answers.
    """
    records = list(source.records(task))
    if any(record.part for record in records):
        raise ArtefactError(f"the run in {source.run_dir} has not finished {task}; run its command again to finish it")
    fingerprint = dict(source.fingerprints().get(task, {}))
    features = fingerprint.pop("features", None)
    target = RunStore(folder)
    target.open_task(task, fingerprint, features, overwrite="features")
    link_or_copy(source.token_files.merged, target.token_files.merged)
    if (source.run_dir / MAPS).is_file():  # appended to by `extract`, so never the same file on disk
        with (source.run_dir / MAPS).open("rb") as maps, replacing(target.run_dir / MAPS) as file:
            shutil.copyfileobj(maps, file)
    with replacing(target.samples_file) as file:
        file.writelines(encode_line(replace(record, part="").to_dict()) for record in records)
    if task in source.metrics():
        target.write_metrics(task, source.metrics()[task])
    target.set_status(task, source.status().get(task, "finished"))
    return RunStore(folder)


@contextmanager
def reuse_answers(folder: Path, run_dir: Path, adapter: Adapter, task: Task, generation: Generation) -> Iterator[None]:
    """Let several runs generate the same answers once: the first writes, the others copy.

    Answers are the same if model, task and generation have the same fingerprint. The block should evaluate the task;
    a run in any process that needs the same answers meanwhile waits to enter its own block. The answers of a killed run
    are copied too.

    Args:
        folder: of the runs.
        run_dir: of this run.
        adapter: the model; it is set up here.
        task: the benchmark; it is set up here.
        generation: settings of decoding.

    Raises:
        ConfigError: the run directory belongs to a run with other settings.
    """
    from filelock import FileLock, Timeout

    adapter.setup()
    task.setup()
    length = generation.max_new_tokens
    generation = replace(generation, max_new_tokens=task.max_new_tokens if length is None else length)
    fingerprint = jsonable(answer_fingerprint(adapter, task, generation))
    (folder / LOCKS).mkdir(parents=True, exist_ok=True)
    lock = FileLock((folder / LOCKS).resolve() / f"{digest(fingerprint)[:16]}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        logger.info("%s: waiting for the job that writes the same answers to %s ...", run_dir, task.name)
        lock.acquire()
    try:
        copied = copy_answers(folder, RunStore(run_dir), task.name, fingerprint)
        if copied:
            logger.info("%s: %d answers to %s are those of another job", run_dir, copied, task.name)
        yield
    finally:
        lock.release()


def copy_answers(folder: Path, target: RunStore, task: str, fingerprint: Mapping[str, Any]) -> int:
    """Copy a task's answers, without token rows, from the run in a folder that has the most.

    Args:
        folder: of the runs.
        target: the run to copy to.
        task: name of the task.
        fingerprint: that the copied answers must have.

    Returns:
        Number of answers that were new to the target.
    """
    runs = (path.parent for path in folder.glob("*/samples.jsonl"))
    others = [path for path in runs if path.resolve() != target.run_dir.resolve()]
    matching = []
    for path in others:
        try:
            if _stored_fingerprint(RunStore(path), task) == fingerprint:
                matching.append(path)
        except ArtefactError as error:  # a damaged run must not stop another one
            warnings.warn(f"no answers are copied from {path}: {error}", stacklevel=3)
    if not matching:
        return 0
    present = set()
    if _stored_fingerprint(target, task) is not None:
        present = {record.sample_id for record in target.records(task) if record.status != FAILED}
    records: list[Record] = []
    for path in sorted(matching, key=lambda path: (path / "samples.jsonl").stat().st_size, reverse=True):
        try:
            records = [record for record in _last_records(path, task) if record.sample_id not in present]
            break
        except ArtefactError as error:
            warnings.warn(f"no answers are copied from {path}: {error}", stacklevel=3)
    if records:
        with RunLock(target.run_dir):
            target.open_task(task, fingerprint)
            target.append(records)
    return len(records)


def _last_records(run_dir: Path, task: str) -> list[Record]:
    """Read the records of one task that did not fail, without token rows.

    The file is read once from its start to its end, as its job may append to it or replace it meanwhile.
    """
    lines = {line["sample_id"]: line for _, _, line in read_lines(run_dir / "samples.jsonl") if line["task"] == task}
    return [
        Record.from_dict({**line, "tokens": 0, "part": ""}) for line in lines.values() if line.get("status") != FAILED
    ]


def _stored_fingerprint(store: RunStore, task: str) -> dict[str, Any] | None:
    """Read the fingerprint of a run's answers to one task; None without answers.

    That of the token rows is left out.
    """
    fingerprint = store.fingerprints().get(task)
    return None if fingerprint is None else {key: value for key, value in fingerprint.items() if key != "features"}


# --- runs at an address -----------------------------------------------------------------------------------------------

FILES = (
    "samples.jsonl", "status.json", "planned.json", "metrics.json", "fingerprint.json", "environment.json",
    "config.yaml", "overrides.yaml", "warnings.jsonl", "notes.jsonl", "maps.jsonl", "tokens.parquet",
    "detector/manifest.json", "detector/detector.safetensors",
)  # fmt: skip
"""Files of a run that are copied where they are there: no others, whatever the address holds."""


def is_address(path: str) -> bool:
    """Return whether a run is named by an address, and not by a folder of this machine.

    >>> is_address("s3://bucket/runs/one"), is_address("runs/one")
    (True, False)
    """
    return re.match(r"[a-z][a-z0-9+.-]*://", path) is not None


def local_run(path: str) -> Path:
    """Return the folder of a run; copy one at an address to a temporary folder.

    The copy goes with the process.

    Args:
        path: of a folder, or an address of a file system that fsspec knows, such as ``s3://`` with s3fs installed.

    Raises:
        ConfigError: there is no run at the address, or it cannot be read.
    """
    if not is_address(path):
        return Path(path).expanduser()
    from fsspec.core import url_to_fs  # comes with datasets; few commands need it

    copied = Path(tempfile.mkdtemp(prefix="stethoscope-run-"))
    atexit.register(shutil.rmtree, copied, ignore_errors=True)
    try:
        files, root = url_to_fs(path.rstrip("/"))
        folder = copied / (re.sub(r"[^\w.=+-]", "-", root.rpartition("/")[2]).lstrip(".") or "run")
        sizes = {name: files.size(f"{root}/{name}") for name in FILES if files.isfile(f"{root}/{name}")}
        if "samples.jsonl" not in sizes:
            raise ConfigError(f"{path} is no run: it has no samples.jsonl")
        print(f"copying {path}, {sum(size or 0 for size in sizes.values()) / 1e6:.1f} MB ...", file=sys.stderr)
        (folder / "detector").mkdir(parents=True)
        for name in sizes:
            files.get_file(f"{root}/{name}", str(folder / name))
    except ConfigError:
        raise
    except Exception as error:  # every kind of storage has its own
        raise ConfigError(f"{path} cannot be read: {one_line(error) or type(error).__name__}") from error
    if not any((folder / "detector").iterdir()):
        (folder / "detector").rmdir()
    return folder
