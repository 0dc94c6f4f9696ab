"""MMVP: pairs of pictures that CLIP takes for nearly the same, with one question that has another answer for each.

Tong et al., "Eyes Wide Shut? Exploring the Visual Shortcomings of Multimodal LLMs", CVPR 2024, arXiv 2401.06209. The
paper's figure is the share of pairs with both answers right.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

from stethoscope.core.errors import DataError
from stethoscope.core.json_rows import shown
from stethoscope.core.types import Answer, Mention, Sample
from stethoscope.tasks import choice
from stethoscope.tasks.annotations import read_table
from stethoscope.tasks.base import Metric
from stethoscope.tasks.image_folder import ImageFolder
from stethoscope.tasks.questions import ACCURACY, QuestionTask, label_text, question_text, set_share
from stethoscope.tasks.sources import DataSource, HubSource, SourceRow, check_choice, setting_path

COLUMNS = ("Index", "Question", "Options", "Correct Answer")
SUFFIX = "Answer with the option's letter from the given choices directly."
CORRECTED = {99: "B", 100: "A", 279: "B", 280: "A"}
"""Index from 1 -> right letter where the original file is wrong. Source: issue 1018 of lmms-eval, whose copy on the hub
has them right, and issue 30 of tsb0601/MMVP."""
SWAPPED = {"tusks", "elderly person"}
"""What the questions of these rows ask about, so that no other file is changed."""
LABELS = ("corrected", "original")
_OPTIONS = re.compile(r"\(\s*([a-z])\s*\)", re.IGNORECASE)


class Mmvp(QuestionTask):
    """Two-choice questions, each asked about both pictures of a pair, which have different answers.

    ``pair_accuracy`` is the share of pairs with both answers right, ``accuracy`` that of right answers.
    """

    name = "mmvp"
    version: ClassVar[str] = "1"
    primary = "pair_accuracy"
    max_new_tokens: int = 16
    sets: ClassVar[Mapping[str, tuple[str, ...]]] = {"pairs": ("pair",)}

    def __init__(
        self,
        source: str = "hub",
        labels: str = "corrected",
        parser: str = "directed_letter",
        suffix: str = SUFFIX,
        file: str | None = None,
        images: str | None = None,
        dataset: str = "lmms-lab-eval/MMVP",
        split: str = "train",
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> None:
        """Store and check the settings; ``conf/task/mmvp.yaml`` explains every argument.

        Raises:
            ConfigError: an unknown source, parser or kind of labels, or a path that the source needs.
        """
        paths = {"file": (file, "Questions.csv"), "images": (images, "the folder 'MMVP Images' with 1.jpg to 300.jpg")}
        readers = {"files": self._read_files, "hub": self._read_hub}
        super().__init__(DataSource("mmvp", source, readers, paths))
        check_choice("parser of mmvp", parser, choice.PARSERS)
        check_choice("labels of mmvp", labels, LABELS)
        self.source, self.labels, self.parser, self.suffix = source, labels, parser, suffix
        self.file, self.images = file, images
        self.hub = HubSource(dataset, split, revision, local_files_only)

    def _read_files(self) -> Iterator[SourceRow]:
        images = ImageFolder(setting_path(self.images))
        for row in read_table(setting_path(self.file), COLUMNS):
            yield SourceRow(row.values, images.find(f"{row.values['Index'].strip()}.jpg", row.origin), row.origin)

    def _read_hub(self) -> Iterator[SourceRow]:
        return self.hub.rows(COLUMNS, lambda row: str(row["Index"]))

    def read_row(self, row: SourceRow) -> Iterable[Sample]:
        """Make the sample of a row, with the right letter of ``labels``."""
        values, origin = row.values, row.origin
        text = str(values["Index"]).strip()
        if not text.isdecimal() or int(text) < 1:
            raise DataError(f"{origin}: Index {shown(values['Index'])} is no whole number from 1")
        index, question = int(text), question_text(values["Question"], origin)
        options = read_options(values["Options"], origin)
        label = label_text(choice.bare_letter(str(values["Correct Answer"])), origin, list(options))
        if index in CORRECTED and any(words in question for words in SWAPPED):
            corrected = CORRECTED[index]
            label = corrected if self.labels == "corrected" else {"A": "B", "B": "A"}[corrected]
        lines = [question, choice.list_options(options), *([self.suffix] if self.suffix else [])]
        yield Sample(
            id=text,
            image=row.image,
            question="\n".join(lines),
            group=f"pair {(index + 1) // 2}",
            reference={"label": label, "options": options, "pair": (index + 1) // 2},
        )

    def reply(self, sample: Sample, text: str) -> str | None:
        """Read the letter of an option by the chosen parser."""
        return choice.PARSERS[self.parser](text, sample.reference["options"])

    def mentions(self, sample: Sample, answer: Answer) -> tuple[Mention, ...]:
        """Return the chosen letter as a mention of its option, hallucinated if the other one is right."""
        reference = sample.reference
        return choice.claim(answer.text, self.reply(sample, answer.text), reference["label"], reference["options"])

    def metrics(self) -> Mapping[str, Metric]:
        """Return the accuracy of pairs and of answers, from 0 to 1."""
        pairs, pairs_published = set_share("pairs")
        accuracy, accuracy_published = ACCURACY.values()
        return {
            "pair_accuracy": pairs,
            "accuracy": accuracy,
            "pair_accuracy_published": pairs_published,
            "accuracy_published": accuracy_published,
        }


def read_options(value: Any, origin: str) -> dict[str, str]:
    """Split options as MMVP writes them into letters and texts.

    Args:
        value: such as ``(a) Open (b) Closed``.
        origin: file and line, for messages.

    Raises:
        DataError: they are not the two options (a) and (b).

    >>> read_options("(a) Open (b) Closed", "line 2")
    {'A': 'Open', 'B': 'Closed'}
    """
    parts = _OPTIONS.split(str(value))
    options = {letter.upper(): text.strip() for letter, text in zip(parts[1::2], parts[2::2], strict=True)}
    if list(options) != ["A", "B"] or parts[0].strip() or not all(options.values()):
        raise DataError(f"{origin}: options {shown(value)} should be of the form '(a) Open (b) Closed'")
    return options
