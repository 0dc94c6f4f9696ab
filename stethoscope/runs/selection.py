"""Selection of the samples of a run: those of the task, at most so many, or those that have a record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from stethoscope.errors import ArtefactError, DataError
from stethoscope.records import Sample

if TYPE_CHECKING:
    from stethoscope.runs.store import RunStore
    from stethoscope.task import Task


def select(samples: Sequence[Sample], limit: int | None) -> tuple[Sample, ...]:
    """Take at most ``limit`` samples, in turn from the subsets, in the order of the task."""
    if limit is None or limit >= len(samples):
        return tuple(samples)
    seen: dict[str, int] = {}
    turns = []
    for index, sample in enumerate(samples):
        turns.append((seen.setdefault(sample.subset, 0), index))
        seen[sample.subset] += 1
    return tuple(samples[index] for index in sorted(index for _, index in sorted(turns)[:limit]))


def checked(task: Task) -> Sequence[Sample]:
    """Read the samples of a task.

    Raises:
        DataError: there are none, or two have the same id.
    """
    samples = task.samples()
    ids = [sample.id for sample in samples]
    if not ids:
        raise DataError(f"task {task.name!r} has no samples")
    if len(set(ids)) < len(ids):
        double = next(name for index, name in enumerate(ids) if name in ids[:index])
        raise DataError(f"task {task.name!r} has two samples with the id {double!r}")
    return samples


def recorded(store: RunStore, task: Task, available: Sequence[Sample], samples: Sequence[Sample]) -> tuple[Sample, ...]:
    """Keep the samples that a run directory has a record of.

    Args:
        store: of the run directory.
        task: whose records.
        available: all samples of the task.
        samples: those to choose from.

    Raises:
        DataError: it has records of samples that the task no longer has.
        ArtefactError: it has none of the samples.
    """
    ids = set(store.sample_ids(task.name))
    gone = ids - {sample.id for sample in available}
    if gone:
        raise DataError(
            f"{len(gone)} of {len(ids)} samples that {store.run_dir} has answers to are not in the data of "
            f"{task.name} any more, such as {min(gone)}; give it the data that it was asked about"
        )
    samples = tuple(sample for sample in samples if sample.id in ids)
    if not samples:
        raise ArtefactError(f"{store.run_dir} has no answer to {task.name}; the command that began it goes on")
    return samples
