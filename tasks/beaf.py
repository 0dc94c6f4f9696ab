"""BEAF: the same questions before and after an object has been taken out of the picture.

Ye-Bin et al., "BEAF: Observing BEfore-AFter Changes to Evaluate Hallucination in Vision-language Models", ECCV 2024,
arXiv 2407.13442. The score is about change: does an answer follow the picture, and only where the picture has changed?
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import ClassVar

from stethoscope.core.errors import DataError
from stethoscope.core.json_rows import clipped, read_rows, shown
from stethoscope.core.types import ImageRef, Sample
from stethoscope.tasks.base import Metric, ScoredSample
from stethoscope.tasks.counts import CONFUSION, accuracy, f1, harmonic_mean, precision, recall, share, yes_rate
from stethoscope.tasks.image_folder import ImageFolder
from stethoscope.tasks.questions import YesNoTask, asked_object, label_text, question_text, with_suffix
from stethoscope.tasks.sources import DataSource, SourceRow, check_choice, check_positive, setting_path
from stethoscope.tasks.yes_no import PARSERS

KEYS = ("id", "image", "question", "orig_img", "removed_q", "gt")
_EDIT_ENDING = len("_00.png")
OUTCOMES = {
    ("tp", "tn"): "understood",
    ("fn", "fp"): "ignorant",
    ("tp", "fp"): "stubborn_yes",
    ("fn", "tn"): "stubborn_no",
}
"""What answers to a question about the removed object are before and after -> the count that it adds to."""


class Beaf(YesNoTask):
    """Yes/no questions about pictures and about the same pictures without one of their objects.

    For questions about the removed object, whose truth goes from yes to no: ``TU``, true understanding, is the share
    with both answers right, ``IG``, ignorance, with both wrong, ``SB_yes`` and ``SB_no``, stubbornness, with the same
    answer twice. ``ID``, indecision, is the share of other questions to which the answer is right before and wrong
    after, or wrong and then right. All are over pairs of answers that could both be read. ``F1_TUID`` is the harmonic
    mean of TU and 1 - ID; accuracy, precision, recall and F1 are over all answers.

    The authors' script takes an answer without yes and no for the one before it; here it is not read, and counted. It
    also insists on the number of rows of the first version; here they are counted from the file.
    """

    name = "beaf"
    version: ClassVar[str] = "1"
    primary = "F1_TUID"
    max_new_tokens: int = 32

    def __init__(
        self,
        source: str = "testbed",
        parser: str = "contains",
        suffix: str = "",
        scenes: int = 300,
        edits: int = 2,
        scene_seed: int | None = None,
        file: str | None = None,
        images: str | None = None,
    ) -> None:
        """Store and check the settings; ``conf/task/beaf.yaml`` explains every argument.

        Raises:
            ConfigError: an unknown source or parser, a number below 1, or a path that the source needs.
        """
        paths = {"file": (file, "beaf_qna.json"), "images": (images, "the folder of original and edited images")}
        super().__init__(DataSource("beaf", source, {"testbed": self._read_testbed, "files": self._read_files}, paths))
        check_choice("parser of beaf", parser, PARSERS)
        check_positive(scenes=scenes, edits=edits)
        self.source, self.parser, self.suffix = source, parser, suffix
        self.scenes, self.edits, self.scene_seed = scenes, edits, scene_seed
        self.file, self.images = file, images

    def _read_testbed(self) -> Iterator[SourceRow]:
        from stethoscope import testbed  # imports the renderer, which only this source needs
        from stethoscope.testbed.dataset import EVALUATION_SEED

        seed = EVALUATION_SEED if self.scene_seed is None else self.scene_seed
        scenes = testbed.scenes(self.scenes, seed=seed)
        rows, edited = testbed.removal_questions(scenes, self.edits)
        images = {name: ImageRef(name, scene.image) for name, scene in edited.items()}
        for row in rows:
            yield SourceRow(row, images[row["image"]], f"testbed, question {row['id']}")

    def _read_files(self) -> Iterator[SourceRow]:
        images = ImageFolder(setting_path(self.images))
        for _, origin, row in read_rows(setting_path(self.file), KEYS):
            yield SourceRow(row, images.find(str(row["image"]), origin), origin)

    def read_row(self, row: SourceRow) -> Iterable[Sample]:
        """Make the sample of a row."""
        values, origin = row.values, row.origin
        for key in ("orig_img", "removed_q"):
            if not isinstance(values[key], bool):
                raise DataError(f"{origin}: {key} {shown(values[key])} is neither true nor false")
        image, question = str(values["image"]), question_text(values["question"], origin)
        original = original_name(image, origin) if not values["orig_img"] else PurePath(image).stem
        yield Sample(
            id=str(values["id"]),
            image=row.image,
            question=with_suffix(question, self.suffix),
            group=original,  # all versions of a picture
            reference={
                "label": label_text(values["gt"], origin),
                "object": asked_object(question),
                "original": original,
                "edited": not values["orig_img"],
                "removed": values["removed_q"],
            },
        )

    def arrange(self, samples: list[Sample]) -> list[Sample]:
        """Check that questions about edited pictures are asked about the original too; warn of those that are not."""
        asked = {_pair_key(sample) for sample in samples if not sample.reference["edited"]}
        edited = [sample for sample in samples if sample.reference["edited"]]
        lonely = [sample for sample in edited if _pair_key(sample) not in asked]
        if lonely and len(lonely) == len(edited):
            raise DataError(f"beaf: no question about an edited picture is asked about {clipped(lonely[0].group)} too")
        if lonely:
            warnings.warn(
                f"beaf: {len(lonely)} of {len(edited)} questions about edited pictures are not asked about the "
                f"original, the first is {clipped(lonely[0].id)}; they do not count as a change",
                stacklevel=2,
            )
        return samples

    def unit(self, sample: Sample) -> Hashable:
        """Return original picture and question: its answers are compared with each other."""
        return _pair_key(sample)

    def add_counts(self, scored: Sequence[ScoredSample], counts: list[dict[str, float]]) -> None:
        """Count for every question about an edited picture how the answer has changed."""
        for first, second in pairs(scored):
            before, after = (_confusion_cell(scored[index][1]) for index in (first, second))
            labels = [scored[index][0].reference["label"] for index in (first, second)]
            if before is None or after is None:
                continue
            if not scored[second][0].reference["removed"]:
                undecided = (before in ("tp", "tn")) != (after in ("tp", "tn"))
                counts[second] |= {"kept": 1.0, "undecided": float(undecided)}
            elif labels == ["yes", "no"]:  # not one of another edit, which is still there
                counts[second] |= {"removed": 1.0, OUTCOMES[before, after]: 1.0}

    def metrics(self) -> Mapping[str, Metric]:
        """Return BEAF's figures of change and the usual ones, from 0 to 1 (the paper gives them in percent)."""
        understanding, indecision = share("understood", "removed"), share("undecided", "kept")
        return {
            "F1_TUID": lambda totals: harmonic_mean(understanding(totals), 1 - indecision(totals)),
            "TU": understanding,
            "IG": share("ignorant", "removed"),
            "SB_yes": share("stubborn_yes", "removed"),
            "SB_no": share("stubborn_no", "removed"),
            "ID": indecision,
            "accuracy": accuracy,
            "precision": precision,
            "recall": recall,
            "f1": f1,
            "yes_rate": yes_rate,
        }


def original_name(image: str, origin: str) -> str:
    """Return the name, without ending, of the picture that an edited one was made of.

    Args:
        image: file name of the edited picture, ``<original>_NN.png``.
        origin: file and line, for messages.

    Raises:
        DataError: the name is not of this form.

    >>> original_name("COCO_val2014_000000001171_00.png", "line 1")
    'COCO_val2014_000000001171'
    """
    stem, ending = image[:-_EDIT_ENDING], image[-_EDIT_ENDING:]
    if not stem or ending[0] != "_" or not ending[1:3].isdecimal() or ending[3] != ".":
        raise DataError(f"{origin}: image {shown(image)} of an edited picture should be called <original>_NN.png")
    return PurePath(stem).name


def pairs(scored: Sequence[ScoredSample]) -> Iterator[tuple[int, int]]:
    """Yield the indices of the same question about an original and about an edited picture.

    Args:
        scored: samples with the counts of their scores; a question whose other half is missing is left out.
    """
    originals = {_pair_key(sample): index for index, (sample, _) in enumerate(scored) if not sample.reference["edited"]}
    for index, (sample, _) in enumerate(scored):
        before = originals.get(_pair_key(sample))
        if sample.reference["edited"] and before is not None:
            yield before, index


def _pair_key(sample: Sample) -> tuple[str, str]:
    return sample.reference["original"], sample.question


def _confusion_cell(counts: Mapping[str, float]) -> str | None:
    """Return the cell of the confusion matrix in which an answer is counted; None for one that was not read."""
    return next((cell for cell in CONFUSION if counts[cell]), None)
