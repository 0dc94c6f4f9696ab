"""Edit finished answers: remove the mentions that a detector takes for hallucinated, or ask the model about them first.

``drop`` costs no pass beyond the one that the detector reads; ``ask`` puts a question about every doubtful object and
removes those that the model itself denies (as Woodpecker does with an external detector, Yin et al. 2023). Both edit
descriptions only: a yes or no to a question is left as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from stethoscope.core.errors import ConfigError
from stethoscope.core.images import file_digest
from stethoscope.detection.artifact import MANIFEST
from stethoscope.detection.lookup import AUTO, bundled_detectors, check_model, detector_folder
from stethoscope.mitigation.base import Mitigation, check_range

if TYPE_CHECKING:
    from pathlib import Path

    from stethoscope.adapters.base import Adapter
    from stethoscope.detection.detector import Detector


@dataclass(frozen=True)
class Drop(Mitigation):
    """Remove mentions whose probability of hallucination reaches a threshold, with the words around them.

    Attributes:
        detector: its folder, or that of a run that has one; ``auto`` for the one that comes with the embedded model.
        threshold: probability at or above which a mention is removed, in [0, 1]; None for the detector's own.
        max_hallucinated: instead of a threshold, the largest share of the mentions that remain that may be
            hallucinated, in (0, 1), with ``confidence`` over images (``evaluation.removal_guarantee``). The detector
            must be that of a run with labelled descriptions. None for no promise.
        confidence: of the promise, in (0, 1).
        asks: whether the model is asked about a mention before it is removed.
    """

    name: ClassVar[str] = "drop"
    source: ClassVar[str] = "our detector"
    asks: ClassVar[bool] = False
    detector: str = AUTO
    threshold: float | None = None
    max_hallucinated: float | None = None
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if self.threshold is not None:
            check_range("threshold", self.threshold, 0, 1)
        if self.max_hallucinated is not None:
            self._check_promise()
        if self.detector != AUTO:
            detector_folder(self.detector)  # told before a model is loaded

    def _check_promise(self) -> None:
        for name in ("max_hallucinated", "confidence"):
            value = getattr(self, name)
            check_range(name, value, 0, 1)
            if value in (0, 1):
                raise ConfigError(f"mitigation.{name}={value!r} should lie between 0 and 1")
        if self.threshold is not None:
            raise ConfigError("mitigation.threshold and mitigation.max_hallucinated exclude each other: leave one null")
        if self.asks:
            raise ConfigError(
                "mitigation.max_hallucinated goes with mitigation=drop; what the model would say of the calibration "
                "images when it is asked is not known"
            )

    def folder(self, adapter: Adapter) -> Path:
        """Find the detector's folder.

        Args:
            adapter: the model, after ``setup``.

        Raises:
            ConfigError: ``auto``, and no detector comes with this model.
            ArtefactError: there is no such folder, or no detector in it.
        """
        if self.detector != AUTO:
            return detector_folder(self.detector)
        folders = bundled_detectors(adapter)
        if not folders:
            raise ConfigError(
                f"mitigation={self.name} needs a detector of {adapter.name}: mitigation.detector=runs/<name>, a run to "
                "which `stethoscope train` or `benchmark` has given one"
            )
        return folders[0]

    def load(self, adapter: Adapter) -> Detector:
        """Load the detector and check that it belongs to the model.

        Raises:
            ConfigError: see ``folder``; or the detector reads states of another model.
            ArtefactError: see ``folder``; or it is damaged.
        """
        from stethoscope.detection.detector import Detector

        detector = Detector.load(self.folder(adapter))
        check_model(detector, adapter)
        return detector

    def identity(self, adapter: Adapter) -> dict[str, Any]:
        """See ``Mitigation.identity``: the detector counts by its contents, not by its folder."""
        return {"detector": file_digest(self.folder(adapter) / MANIFEST)[:16]}

    def unwanted(
        self, probabilities: Sequence[float], threshold: float, yes_odds: Sequence[float] | None = None
    ) -> set[int]:
        """Choose the mentions to remove.

        Args:
            probabilities: of hallucination, by mention.
            threshold: of the detector, where the method has none of its own.
            yes_odds: by mention, log-odds of a yes when the model is asked whether the object is there.

        Returns:
            Indices of mentions.
        """
        limit = threshold if self.threshold is None else self.threshold
        return {
            index
            for index, probability in enumerate(probabilities)
            if probability >= limit and (yes_odds is None or yes_odds[index] < 0)
        }


@dataclass(frozen=True)
class Ask(Drop):
    """Ask the model about every mention whose probability reaches the threshold, and remove those that it denies."""

    name: ClassVar[str] = "ask"
    asks: ClassVar[bool] = True


def edit_record(
    text: str, spans: Sequence[tuple[int, int]], objects: Sequence[str], probabilities: Sequence[float], parts: Any
) -> Mapping[str, Any]:
    """Describe an edit for the record of a sample, as plain values.

    Args:
        text: the answer as it was written.
        spans: of its mentions.
        objects: their names.
        probabilities: of hallucination, by mention.
        parts: what was removed, ``editing.Removal``.
    """
    mentions = [
        {"start": start, "end": end, "object": name, "probability": round(float(probability), 6)}
        for (start, end), name, probability in zip(spans, objects, probabilities, strict=True)
    ]
    removed = [{**part._asdict(), "mentions": list(part.mentions)} for part in parts]
    return {"text": text, "mentions": mentions, "removed": removed}
