"""Figures that ask for several right answers at once: both questions about an image, one question about all figures."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

from stethoscope.core.types import Sample
from stethoscope.task import Judged

Key = Callable[[Sample], Hashable | None]
"""Which set a sample belongs to; None for none."""


def complete_sets(judged: Judged, samples: Iterable[Sample], key: Key) -> list[list[int]]:
    """Places in ``judged`` of the samples that belong together, for the sets of which every sample was judged.

    A set with a sample that failed, or that a limited run did not ask, is left out: what it would have come to is not
    known, and to judge it by the rest would take the wrong ones and leave the right ones.

    Args:
        judged: samples of a run.
        samples: all samples of the task.
        key: which set a sample belongs to.

    Returns:
        Sets in the order of their first sample.
    """
    sizes = Counter(name for sample in samples if (name := key(sample)) is not None)
    places: dict[Hashable, list[int]] = defaultdict(list)
    for place, (sample, _) in enumerate(judged):
        if (name := key(sample)) is not None:
            places[name].append(place)
    return [some for name, some in places.items() if len(some) == sizes[name]]


def set_counts(name: str, rights: Sequence[float], reads: Sequence[float]) -> Mapping[str, float]:
    """What one complete set adds to the totals.

    Args:
        name: prefix of the counts.
        rights: 1 for every answer of the set that is right, else 0.
        reads: 1 for every answer that could be read, else 0.

    Returns:
        ``<name>``: sets of which every answer was read; ``<name>_right``: those with every answer right;
        ``<name>_asked``: all sets.

    >>> dict(set_counts("pairs", [1, 0], [1, 1]))
    {'pairs': 1.0, 'pairs_right': 0.0, 'pairs_asked': 1.0}
    """
    values = {"": all(reads), "_right": all(rights), "_asked": True}
    return {name + end: float(value) for end, value in values.items()}
