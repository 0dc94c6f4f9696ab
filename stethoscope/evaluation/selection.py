"""Load the samples of a task, and choose those of a run: all, those it has answers to, or a limited number.

A limited run draws them spread over subsets, images and labels; a longer run draws the same ones first.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from stethoscope.core.errors import ArtefactError, DataError
from stethoscope.core.types import Sample

if TYPE_CHECKING:
    from stethoscope.storage.run_dir import RunStore
    from stethoscope.tasks.base import Task

MOST_LABELS = 26
"""Reference labels that are balanced, at most so many different ones; more of them are texts rather than classes."""


def load_samples(task: Task) -> Sequence[Sample]:
    """Load the samples of a task and check their ids.

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


def recorded_samples(
    store: RunStore, task: Task, available: Sequence[Sample], samples: Sequence[Sample]
) -> tuple[Sample, ...]:
    """Select the samples of which a run directory has a record.

    Args:
        store: of the run directory.
        task: that the records belong to.
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


def select_samples(
    samples: Sequence[Sample], limit: int | None, unit: Callable[[Sample], Hashable] = lambda sample: sample.id
) -> tuple[Sample, ...]:
    """Draw at most ``limit`` samples, as evenly as can be from subsets, from their labels, and from images.

    The draw is fixed: it depends on the ids of the samples alone, and those of a smaller limit are among those of a
    larger one. For n samples in K classes (subsets times labels) it takes O(n log n) + O(limit K log n) steps.

    Args:
        samples: of a task.
        limit: largest number of samples; None for all.
        unit: which samples are drawn together, as ``Task.unit``; only the last ones may be cut apart by the limit.

    Returns:
        The samples in the order of the task.
    """
    if limit is None or limit >= len(samples):
        return tuple(samples)
    members: dict[Hashable, list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        members[unit(sample)].append(index)
    drawn: list[int] = []
    for indices in _draw([_Unit.of(samples, indices) for indices in members.values()]):
        drawn += indices
        if len(drawn) >= limit:
            break
    return tuple(samples[index] for index in sorted(drawn[:limit]))


class _Unit(NamedTuple):
    """Samples that are drawn together.

    Attributes:
        lot: number that decides the order among equals, from the first sample's id.
        subset: of the first sample.
        label: reference labels of all samples; empty where they have none.
        image: of the first sample.
        indices: of the samples.
    """

    lot: bytes
    subset: str
    label: str
    image: str
    indices: list[int]

    @classmethod
    def of(cls, samples: Sequence[Sample], indices: list[int]) -> _Unit:
        first = samples[indices[0]]
        labels = sorted({str(samples[index].reference.get("label", "")) for index in indices})
        lot = hashlib.blake2b(first.id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return cls(lot, first.subset, "+".join(labels), first.group, indices)


def _draw(units: Sequence[_Unit]) -> Iterator[list[int]]:
    """Yield the indices of unit after unit.

    The next subset is the one drawn from least; of its labels the one drawn least in it, then in all; of the images
    with that label the one drawn least, whatever the subset.
    """
    units = sorted(units)  # by lot
    labelled = len({unit.label for unit in units}) <= MOST_LABELS
    queues: dict[tuple[str, str, str], deque[list[int]]] = defaultdict(deque)
    images: dict[tuple[str, str], list[tuple[int, int, str]]] = defaultdict(list)  # heaps: times drawn, order, image
    order: dict[str, int] = {}
    labels: dict[str, dict[str, None]] = defaultdict(dict)
    for unit in units:
        label = unit.label if labelled else ""
        queue = queues[unit.subset, label, unit.image]
        if not queue:
            images[unit.subset, label].append((0, order.setdefault(unit.image, len(order)), unit.image))
        labels[unit.subset][label] = None
        queue.append(unit.indices)
    for heap in images.values():
        heapq.heapify(heap)
    subsets = [(0, turn, subset) for turn, subset in enumerate(sorted(labels))]
    by_label: Counter[str] = Counter()
    by_class: Counter[tuple[str, str]] = Counter()
    by_image: Counter[str] = Counter()
    while subsets:
        times, turn, subset = heapq.heappop(subsets)
        label = min(labels[subset], key=lambda name: (by_class[subset, name], by_label[name], name))
        heap = images[subset, label]
        while heap[0][0] < by_image[heap[0][2]]:  # drawn meanwhile with another label or subset
            _, position, image = heap[0]
            heapq.heapreplace(heap, (by_image[image], position, image))
        uses, position, image = heapq.heappop(heap)
        queue = queues[subset, label, image]
        yield queue.popleft()
        by_label[label] += 1
        by_class[subset, label] += 1
        by_image[image] += 1
        if queue:
            heapq.heappush(heap, (uses + 1, position, image))
        if not heap:
            del labels[subset][label]
        if labels[subset]:
            heapq.heappush(subsets, (times + 1, turn, subset))
