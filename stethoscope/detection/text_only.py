"""Detect hallucinated objects from a caption alone: no picture, no model, no torch.

The detector reads where an object is named first, how often, what else is named before it and beside it, how well it
fits the scene that the other words describe, and how often that name and that very word were wrong in training. It is
the floor that every detector with access to a model must beat, and works on captions of any model.

A label is about an object in a picture, so all mentions of one object in a caption get one probability.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stethoscope.core.errors import ArtefactError, DataError, unknown
from stethoscope.core.files import as_path, atomic_write, check_shape, read_bytes
from stethoscope.detection.array_classifiers import TreeEnsemble
from stethoscope.detection.artifact import Arrays, dump_arrays, load_arrays
from stethoscope.detection.caption_objects import (
    CO_OCCURRENCE,
    INDEX,
    SCENE,
    SHAPE,
    PairPrior,
    ReadCaption,
    ScenePrior,
    read_caption,
)
from stethoscope.metrics.bootstrap import split_groups
from stethoscope.tasks.object_extraction import OBJECTS

SCHEMA_VERSION = 1
SHIPPED = "text_only.safetensors"
BATCH = 256  # captions judged at once
FOLDS = 4  # by image, so that what is learned about objects in the first step is not read back in the second
PSEUDO_COUNT = 10.0  # mentions that a rate counts as if seen at the rate of what is more general
RATES = ("name_rate", "surface_rate")
COLUMNS = (*SHAPE, *CO_OCCURRENCE, *SCENE, *RATES)
"""Inputs of the classifier, for every object of a caption."""

RISING = {"first_word": 1, "log_first_word": 1, "order": 1, "count": -1, **dict.fromkeys(SCENE, -1),
          **dict.fromkeys(RATES, 1)}  # fmt: skip
"""Columns with which the probability may only rise (1) or fall (-1), whatever a training set says about a corner."""


class JudgedMention(NamedTuple):
    """A mention of an object with its probability.

    Attributes:
        name: canonical COCO name.
        start, end: character span in the caption.
        probability: that the object is not in the picture, in [0, 1].
    """

    name: str
    start: int
    end: int
    probability: float


@dataclass(frozen=True)
class NameRates:
    """How often each name, and each word for it, was hallucinated in training.

    Attributes:
        overall: share of all objects. ``names``: (objects,) shares by name, shrunk towards it.
        surfaces: share by name and word in lower case, shrunk towards that of the name.
    """

    overall: float
    names: np.ndarray
    surfaces: Mapping[tuple[int, str], float]

    @classmethod
    def fit(cls, captions: Sequence[ReadCaption], labels: Sequence[np.ndarray]) -> NameRates:
        """Count the objects of captions; a rate is (hallucinated + s r) / (all + s), s = ``PSEUDO_COUNT``."""
        hits, counts = np.zeros(len(INDEX)), np.zeros(len(INDEX))
        by_surface: dict[tuple[int, str], list[float]] = {}
        for caption, label in zip(captions, labels, strict=True):
            np.add.at(hits, caption.objects, label)
            np.add.at(counts, caption.objects, 1)
            for name, surface, hit in zip(caption.objects, caption.surfaces, label, strict=True):
                sums = by_surface.setdefault((int(name), surface), [0.0, 0.0])
                sums[0] += float(hit)
                sums[1] += 1
        overall = float(hits.sum() / max(counts.sum(), 1))
        names = (hits + PSEUDO_COUNT * overall) / (counts + PSEUDO_COUNT)
        surfaces = {
            key: float((hit + PSEUDO_COUNT * names[key[0]]) / (count + PSEUDO_COUNT))
            for key, (hit, count) in sorted(by_surface.items())
            if count >= PSEUDO_COUNT / 2
        }
        return cls(overall, names, surfaces)

    @classmethod
    def restore(cls, arrays: Arrays, surfaces: Sequence[tuple[int, str]]) -> NameRates:
        """Restore and check what ``arrays`` returned."""
        rates = arrays.numbers("surfaces", len(surfaces)).tolist()
        names = arrays.numbers("names", len(INDEX))
        return cls(float(arrays.numbers("overall")), names, dict(zip(surfaces, rates, strict=True)))

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by name; the words of ``surfaces`` stand in the file's header."""
        rates = np.array(list(self.surfaces.values()), dtype=float)
        return {"overall": np.array(self.overall), "names": self.names, "surfaces": rates}

    def columns(self, caption: ReadCaption) -> np.ndarray:
        """Compute the columns of ``RATES``, (objects of the caption, 2)."""
        names = self.names[caption.objects]
        pairs = zip(caption.objects.tolist(), caption.surfaces, names.tolist(), strict=True)
        return np.stack([names, [self.surfaces.get((name, word), rate) for name, word, rate in pairs]], axis=1)


@dataclass(frozen=True)
class _Priors:
    """What the first step learns about objects, before any position is looked at."""

    co_occurrence: PairPrior
    scene: ScenePrior
    rates: NameRates

    @classmethod
    def fit(cls, captions: Sequence[ReadCaption], presence: np.ndarray, groups: np.ndarray) -> _Priors:
        pictures = np.unique(groups, return_index=True)[1]
        labels = [1 - row[caption.objects] for caption, row in zip(captions, presence, strict=True)]
        return cls(
            co_occurrence=PairPrior.fit(presence[pictures]),
            scene=ScenePrior.fit(captions, presence),
            rates=NameRates.fit(captions, labels),
        )

    def columns(self, captions: Iterable[ReadCaption]) -> np.ndarray:
        """Compute the columns of ``COLUMNS`` for the objects of several captions, (objects, columns)."""
        parts = (self.co_occurrence, self.scene, self.rates)
        rows = [np.hstack([caption.shape, *(part.columns(caption) for part in parts)]) for caption in captions]
        return np.concatenate(rows) if rows else np.zeros((0, len(COLUMNS)))


class TextOnlyDetector:
    """Probability that each COCO object a caption names is not in its picture, from the caption alone.

    ``TextOnlyDetector.load()`` is the one that comes with the package.

    >>> detector = TextOnlyDetector.load()
    >>> caption = "A man rides a wave on a surfboard. There is also a handbag."
    >>> [(mention.name, mention.probability > 0.1) for mention in detector.predict_one(caption)]
    [('person', False), ('surfboard', False), ('handbag', True)]
    """

    def __init__(self) -> None:
        self._priors: _Priors | None = None
        self._trees: TreeEnsemble | None = None
        self.facts: dict[str, Any] = {}
        """What it learned from: numbers of captions, pictures and objects; for the shipped one also the data."""

    def fit(
        self,
        captions: Sequence[str],
        objects: Sequence[Collection[str]],
        groups: Sequence[Any] | np.ndarray,
        facts: Mapping[str, Any] | None = None,
    ) -> TextOnlyDetector:
        """Learn from captions of pictures with known content. Needs scikit-learn; about 20 s for 5,000 captions.

        The priors of an object are learned on all captions. The classifier that reads them is trained on values
        that come from other images (``FOLDS`` folds), so it sees them as they will be on new ones.

        Args:
            captions: n texts.
            objects: n sets of the COCO objects that the picture of each caption shows, by canonical name.
            groups: n image ids; an image may have several captions.
            facts: to remember in ``facts``.

        Raises:
            DataError: lengths differ, an object is unknown, or there are too few images or only one label.
        """
        if not len(captions) == len(objects) == len(groups):
            raise DataError(f"{len(captions)} captions, {len(objects)} sets of objects and {len(groups)} groups differ")
        presence = np.zeros((len(captions), len(INDEX)))
        for row, names in enumerate(objects):
            for name in names:
                if name not in INDEX:
                    raise DataError(unknown("COCO object", name, INDEX))
                presence[row, INDEX[name]] = 1
        return self.fit_read([read_caption(caption) for caption in captions], presence, np.asarray(groups, str), facts)

    def fit_read(
        self,
        captions: Sequence[ReadCaption],
        presence: np.ndarray,
        groups: np.ndarray,
        facts: Mapping[str, Any] | None = None,
    ) -> TextOnlyDetector:
        """Do as ``fit`` with captions that are read already.

        Args:
            captions: n captions.
            presence: (n, objects) of 0 and 1, what the picture of each shows, in the order of ``OBJECTS``.
            groups: (n,) image ids as text.
            facts: to remember in ``facts``.
        """
        from stethoscope.detection.estimators import make_estimator  # scikit-learn

        labels = [1 - row[caption.objects] for caption, row in zip(captions, presence, strict=True)]
        label = np.concatenate([*labels, np.zeros(0)])
        pictures = len(np.unique(groups))
        if pictures < 5 * FOLDS or len(np.unique(label)) < 2:
            raise DataError(
                f"{len(label)} objects in captions of {pictures} pictures, {int(label.sum())} of them hallucinated, "
                f"are not enough to learn from: it takes {5 * FOLDS} pictures or more, and both labels"
            )
        sizes = [len(caption.objects) for caption in captions]
        columns = np.zeros((len(label), len(COLUMNS)))
        folds = split_groups(groups, {str(fold): 1 / FOLDS for fold in range(FOLDS)})
        for fold in folds.values():
            others = np.flatnonzero(~fold).tolist()
            priors = _Priors.fit([captions[index] for index in others], presence[others], groups[others])
            columns[np.repeat(fold, sizes)] = priors.columns(captions[index] for index in np.flatnonzero(fold).tolist())
        trees = make_estimator("boosting").set_params(monotonic_cst=[RISING.get(name, 0) for name in COLUMNS])
        self._trees = TreeEnsemble.compile(trees.fit(columns, label))
        self._priors = _Priors.fit(captions, presence, groups)
        counts = {"captions": len(captions), "pictures": pictures, "objects": len(label)}
        self.facts = {**counts, "hallucinated": int(label.sum()), **(facts or {})}
        return self

    def predict_objects(self, captions: Sequence[ReadCaption]) -> np.ndarray:
        """Compute the probability of each object of some captions, (objects,), in the order of ``read_caption``.

        Raises:
            ArtefactError: it was not fitted.
        """
        if self._priors is None or self._trees is None:
            raise ArtefactError("this text-only detector was not fitted; TextOnlyDetector.load() is the shipped one")
        return 1 / (1 + np.exp(-self._trees.decision_function(self._priors.columns(captions))))

    def predict_one(self, caption: str) -> list[JudgedMention]:
        """Judge one caption; see ``predict``."""
        return next(self.predict([caption]))

    def predict(self, captions: Iterable[str]) -> Iterator[list[JudgedMention]]:
        """Judge captions, ``BATCH`` at a time; a caption's result does not depend on the others, but for rounding.

        Yields:
            The mentions of each caption in reading order, with probabilities of hallucination; empty without any.

        Raises:
            ArtefactError: it was not fitted.
            DataError: a single text is given, whose characters would be read as captions.
        """
        if isinstance(captions, str):
            raise DataError("captions should be texts in a list or the like; predict_one judges a single caption")
        remaining = iter(captions)
        while batch := [read_caption(caption) for caption in islice(remaining, BATCH)]:
            probabilities, start = self.predict_objects(batch).tolist(), 0
            for caption in batch:
                pairs = zip(caption.mentions, caption.mention_objects, strict=True)
                yield [JudgedMention(*mention, probabilities[start + index]) for mention, index in pairs]
                start += len(caption.objects)

    def save(self, path: str | Path) -> None:
        """Write one file of arrays (safetensors) with the words in its header; nothing in it can run.

        Raises:
            ArtefactError: it was not fitted, or the file cannot be written.
        """
        path = as_path(path, "path")
        if self._priors is None or self._trees is None:
            raise ArtefactError("this text-only detector was not fitted; there is nothing to save")
        parts = {**vars(self._priors), "trees": self._trees}
        arrays = {f"{name}.{key}": array for name, part in parts.items() for key, array in part.arrays().items()}
        header = {
            "kind": "text-only",
            "schema_version": SCHEMA_VERSION,
            "columns": list(COLUMNS),
            "objects": list(OBJECTS),
            "words": list(self._priors.scene.words),
            "surfaces": [list(key) for key in self._priors.rates.surfaces],
            "facts": self.facts,
        }
        try:
            atomic_write(path, dump_arrays(arrays, header))
        except OSError as error:
            raise ArtefactError(f"the text-only detector cannot be written to {path}: {error}") from None

    @classmethod
    def load(cls, path: str | Path | None = None) -> TextOnlyDetector:
        """Read the detector that comes with the package, or one that ``save`` wrote.

        Args:
            path: of the file; None for the shipped one.

        Raises:
            ArtefactError: the file is missing, damaged, or of another version.
        """
        file = str(files("stethoscope.detection").joinpath(SHIPPED)) if path is None else as_path(path, "path")
        data = read_bytes(file)
        try:
            return cls._restore(*load_arrays(data))
        except ArtefactError as error:
            raise ArtefactError(f"the text-only detector {file} cannot be used: {error}") from None

    @classmethod
    def _restore(cls, arrays: Arrays, header: Any) -> TextOnlyDetector:
        shape = {"kind": str, "schema_version": int, "columns": [str], "objects": [str], "words": [str],
                 "surfaces": [[(int, str)]], "facts": dict}  # fmt: skip
        check_shape("its header", header, shape)
        expected = ("text-only", SCHEMA_VERSION, list(COLUMNS), list(OBJECTS))
        if tuple(header[key] for key in ("kind", "schema_version", "columns", "objects")) != expected:
            raise ArtefactError(
                f"it is no text-only detector of version {SCHEMA_VERSION} for these columns and objects"
            )
        surfaces = []
        for pair in header["surfaces"]:
            if [type(item) for item in pair] != [int, str] or not 0 <= pair[0] < len(OBJECTS):
                raise ArtefactError("its header names a word of no object")
            surfaces.append((pair[0], pair[1]))
        detector = cls()
        detector._priors = _Priors(
            co_occurrence=PairPrior.restore(arrays.under("co_occurrence")),
            scene=ScenePrior.restore(arrays.under("scene"), header["words"]),
            rates=NameRates.restore(arrays.under("rates"), surfaces),
        )
        detector._trees = TreeEnsemble.restore(arrays.under("trees"), len(COLUMNS))
        arrays.finish()
        detector.facts = header["facts"]
        return detector
