"""The contract of a mitigation: a method that leaves fewer hallucinated objects in an answer."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from stethoscope.core.errors import ConfigError
from stethoscope.core.images import file_digest
from stethoscope.core.types import Answer, Generation
from stethoscope.detection.artifact import MANIFEST
from stethoscope.detection.lookup import AUTO, bundled_detectors, check_model, detector_folder

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import LogitsProcessor

    from stethoscope.adapters.base import Adapter
    from stethoscope.adapters.hf import HfAdapter
    from stethoscope.detection.detector import Detector
    from stethoscope.tasks.object_extraction import MentionExtractor
    from stethoscope.tracing.trace import Encoded


class EditedAnswer(NamedTuple):
    """An answer after a mitigation.

    Attributes:
        answer: the edited answer with the log-probabilities that the model gives its tokens, the one that was chosen,
            or the one that was given.
        edit: what was done, as ``samples.jsonl`` has it; empty where nothing was done and the model was asked nothing.
    """

    answer: Answer
    edit: Mapping[str, Any]


class Mitigation(ABC):
    """A method that leaves fewer hallucinated objects in an answer.

    Subclasses are frozen dataclasses: their fields are the settings, and part of what identifies a run's answers.

    Attributes:
        name: how the method is called in configurations and tables.
        source: paper that the method comes from, or what it is.
        passes: forward passes for every answer token, those of the answer itself included, that do not depend on the
            settings; see ``passes_per_token``.
        changes_scores: whether the method changes the scores of the next token at every step, by ``processors``.
        samples: whether it samples by ``generation.seed`` even where the answer itself is greedy.
        writes: whether it writes descriptions itself, by ``write``, instead of ``generate``.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    passes: ClassVar[float] = 1.0
    changes_scores: ClassVar[bool] = False
    samples: ClassVar[bool] = False
    writes: ClassVar[bool] = False

    @property
    def passes_per_token(self) -> float:
        """Forward passes for every answer token with these settings, without the pass that a detector reads."""
        return self.passes

    def check(self, generation: Generation) -> None:  # noqa: B027  (most methods go with all settings)
        """Check that the method goes with the settings of generation, before any model is loaded.

        Raises:
            ConfigError: it does not.
        """

    def identity(self, adapter: Adapter) -> dict[str, Any]:
        """Return settings that identify the method otherwise than by their values, such as files by their contents.

        Args:
            adapter: the model, after ``setup``.
        """
        return {}

    def processors(
        self, adapter: HfAdapter, encoded: Sequence[Encoded], generation: Generation
    ) -> list[LogitsProcessor]:
        """Create the processors for one call of ``generate``; none by default, see ``DecodingMitigation``."""
        return []

    def write(
        self,
        adapter: HfAdapter,
        encoded: Sequence[Encoded],
        generation: Generation,
        extractors: Sequence[MentionExtractor] | None = None,
    ) -> list[EditedAnswer]:
        """Write the answers to a few prompts, where the method ``writes``.

        Args:
            adapter: the model.
            encoded: the prompts.
            generation: settings of decoding.
            extractors: for every prompt, lists the objects that a text names; None for COCO's objects.
        """
        raise NotImplementedError(f"mitigation={self.name} does not write answers itself")


@dataclass(frozen=True)
class DetectorMitigation(Mitigation):
    """A method that a detector guides.

    Attributes:
        detector: its folder, or that of a run that has one; ``auto`` for the one that comes with the embedded model.
    """

    detector: str = AUTO

    def __post_init__(self) -> None:
        if self.detector != AUTO:
            detector_folder(self.detector)  # told before a model is loaded

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


class DecodingMitigation(Mitigation):
    """A method that changes the scores of the next token at every step of decoding."""

    changes_scores: ClassVar[bool] = True

    def check(self, generation: Generation) -> None:
        """See ``Mitigation.check``.

        Raises:
            ConfigError: the answer is searched by beams, whose order changes at every step.
        """
        check_no_beams(self.name, generation)

    @abstractmethod
    def processors(
        self, adapter: HfAdapter, encoded: Sequence[Encoded], generation: Generation
    ) -> list[LogitsProcessor]:
        """Create the processors for one call of ``generate``; they hold its state and are used once.

        Args:
            adapter: the model.
            encoded: B prompts that are answered as one batch.
            generation: settings of decoding.

        Raises:
            CapabilityError: the model cannot do what the method needs.
        """


def check_no_beams(name: str, generation: Generation) -> None:
    """Check that the answer is written token by token, for the mitigation of a name.

    Raises:
        ConfigError: it is searched by beams.
    """
    if generation.num_beams > 1:
        raise ConfigError(
            f"mitigation={name} goes with greedy decoding and sampling, not with "
            f"generation.num_beams={generation.num_beams}; set it to 1"
        )


def check_range(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Check that a setting of a mitigation is a number within a range.

    Args:
        name: such as ``flb.gamma``.
        value: the setting.
        low: smallest value.
        high: largest value.

    Raises:
        ConfigError: it is not.

    >>> check_range("cut.beta", 0.1, 0, 1)
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value <= high:
        raise ConfigError(f"mitigation.{name}={value!r} should be a number {_limits(low, high)}")


def check_whole(name: str, value: int, low: int, high: float = math.inf) -> None:
    """Check that a setting of a mitigation is a whole number within a range; see ``check_range``.

    >>> check_whole("rerank.candidates", 5, 2)
    """
    if type(value) is not int or not low <= value <= high:
        raise ConfigError(f"mitigation.{name}={value!r} should be a whole number {_limits(low, high)}")


def _limits(low: float, high: float) -> str:
    return f"from {low:g} to {high:g}" if high < math.inf else f"of at least {low:g}"
