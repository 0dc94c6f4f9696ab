"""What one run takes over from another: the answers and token rows of a task, without tracing or asking again."""

from __future__ import annotations

import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stethoscope.core.digests import jsonable
from stethoscope.core.errors import ArtefactError
from stethoscope.core.files import link_or_copy, replacing
from stethoscope.storage.lock import RunLock
from stethoscope.storage.records import FAILED, Record, dump, lines
from stethoscope.storage.run_dir import MAPS, RunStore
from stethoscope.storage.run_fingerprint import answers_of, digest

if TYPE_CHECKING:
    from stethoscope.adapters.base import Adapter
    from stethoscope.core.types import Generation
    from stethoscope.tasks.base import Task

LOCKS = ".answers"  # folder of a lock file for every set of answers


def share_table(source: RunStore, folder: Path, task: str) -> RunStore:
    """A run directory with the answers and token rows of one task of another run, for a detector of its own.

    ``tokens.parquet`` is the same file on disk where the file system allows (it is only ever replaced, never written
    into); the task's lines of ``samples.jsonl`` are copied, and the pictures and heat maps that the run has kept.

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
    link_or_copy(source.token_files.merged, target.token_files.merged)
    if (source.run_dir / MAPS).is_file():  # appended to by `extract`, so never the same file on disk
        with (source.run_dir / MAPS).open("rb") as maps, replacing(target.run_dir / MAPS) as file:
            shutil.copyfileobj(maps, file)
    with replacing(target.samples_file) as file:
        file.writelines(dump(replace(record, part="").to_dict()) for record in records)
    if task in source.metrics():
        target.write_metrics(task, source.metrics()[task])
    target.set_status(task, source.status().get(task, "finished"))
    return RunStore(folder)


@contextmanager
def shared_answers(folder: Path, run_dir: Path, adapter: Adapter, task: Task, generation: Generation) -> Iterator[None]:
    """Lets several runs generate the same answers only once: whoever comes first writes them, others take them over.

    Answers are the same if model, task and generation have one fingerprint. The block is to evaluate the task; a run
    that needs the same answers meanwhile, in whatever process, waits at its own block. What a killed run has left is
    taken over too.

    Args:
        folder: of the runs.
        run_dir: of this one.
        adapter, task: who is asked and what; both are set up here.
        generation: how answers are written.

    Raises:
        ConfigError: the run directory belongs to a run with other settings.
    """
    from filelock import FileLock, Timeout

    adapter.setup()
    task.setup()
    length = generation.max_new_tokens
    generation = replace(generation, max_new_tokens=task.max_new_tokens if length is None else length)
    fingerprint = jsonable(answers_of(adapter, task, generation))
    (folder / LOCKS).mkdir(parents=True, exist_ok=True)
    lock = FileLock((folder / LOCKS).resolve() / f"{digest(fingerprint)[:16]}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        print(f"{run_dir}: waiting for the job that writes the same answers to {task.name} ...", file=sys.stderr)
        lock.acquire()
    try:
        taken = take_over(folder, RunStore(run_dir), task.name, fingerprint)
        if taken:
            print(f"{run_dir}: {taken} answers to {task.name} are those of another job", file=sys.stderr)
        yield
    finally:
        lock.release()


def take_over(folder: Path, target: RunStore, task: str, fingerprint: Mapping[str, Any]) -> int:
    """Copies the answers of one task, without token rows, from the run beside this one that has the most of them.

    Args:
        folder: of the runs.
        target: the run that takes them.
        task: name of the task.
        fingerprint: what its answers must have.

    Returns:
        How many answers were new to the target.
    """
    runs = (path.parent for path in folder.glob("*/samples.jsonl"))
    others = [path for path in runs if path.resolve() != target.run_dir.resolve()]
    same = []
    for path in others:
        try:
            if _answers(RunStore(path), task) == fingerprint:
                same.append(path)
        except ArtefactError as error:  # another run's fault is none of this one's
            warnings.warn(f"no answers are taken from {path}: {error}", stacklevel=3)
    if not same:
        return 0
    source = max(same, key=lambda path: (path / "samples.jsonl").stat().st_size)
    had = set()
    if _answers(target, task) is not None:
        had = {record.sample_id for record in target.records(task) if record.status != FAILED}
    # one pass over one open file: the job it belongs to may go on writing, or put a new file in its place
    found = {line["sample_id"]: line for _, _, line in lines(source / "samples.jsonl") if line["task"] == task}
    records = [
        Record.from_dict({**line, "tokens": 0, "part": ""})
        for name, line in found.items()
        if name not in had and line["status"] != FAILED
    ]
    if records:
        with RunLock(target.run_dir):
            target.begin(task, fingerprint)
            target.append(records)
    return len(records)


def _answers(store: RunStore, task: str) -> dict[str, Any] | None:
    """What identifies the answers of a run to one task; None where it has none."""
    found = store.fingerprints().get(task)
    return None if found is None else {key: value for key, value in found.items() if key != "features"}
