"""HumbleBench: questions with four options and "None of the above", which is right for a part of them.

Tong et al., "Measuring Epistemic Humility in Multimodal Large Language Models", arXiv 2509.09658: does a model reject
options of which none is right, and does it choose one where it cannot see anything?
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from stethoscope.core.errors import DataError
from stethoscope.core.json_rows import read_rows, shown
from stethoscope.core.types import UNKNOWN, Answer, ImageRef, Mention, Sample, Score
from stethoscope.tasks import choice
from stethoscope.tasks.base import Metric
from stethoscope.tasks.counts import share
from stethoscope.tasks.image_folder import ImageFolder
from stethoscope.tasks.questions import ACCURACY, QuestionTask, label_text, question_text
from stethoscope.tasks.sources import DataSource, HubSource, SourceRow, check_choice, setting_path

if TYPE_CHECKING:
    from PIL.Image import Image

KEYS = ("label", "question", "type", "question_id")
LETTERS = "ABCDE"
NONE = "E"
"""Letter of "None of the above"."""
VARIANTS = ("standard", "E", "GN")
SUFFIX = (
    "\nPlease respond with only the letter of the correct choice (A, B, C, D, or E). Do not include the option text or "
    "any other explanation."
)
_OPTION = re.compile(r"\s*([A-E])\.\s*(.*?)\s*")
_NOISE_SIDE = 256


class HumbleBench(QuestionTask):
    """Questions about objects, attributes and relations with the options A to E, where E is "None of the above".

    ``accuracy`` is over all questions, ``e_accuracy`` over those of which E is right; ``chose_A`` and so on are the
    shares of answers that chose a letter. Of the variants, ``E`` takes the right option away, so that E is right
    everywhere, and ``GN`` shows one picture of grey noise instead of every picture: what a model then gets right, it
    knows from the text.
    """

    name = "humble_bench"
    version: ClassVar[str] = "1"
    primary = "accuracy"
    max_new_tokens: int = 16

    def __init__(
        self,
        source: str = "hub",
        variant: str = "standard",
        parser: str = "lone_letter",
        suffix: str = SUFFIX,
        file: str | None = None,
        images: str | None = None,
        dataset: str = "maifoundations/HumbleBench",
        split: str = "train",
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> None:
        """Store and check the settings; ``conf/task/humble_bench.yaml`` explains every argument.

        Raises:
            ConfigError: an unknown source, variant or parser, or a path that the source needs.
        """
        paths = {"file": (file, "metadata.jsonl"), "images": (images, "the folder of its images")}
        readers = {"files": self._read_files, "hub": self._read_hub}
        super().__init__(DataSource("humble_bench", source, readers, paths))
        check_choice("variant of humble_bench", variant, VARIANTS)
        check_choice("parser of humble_bench", parser, choice.PARSERS)
        self.source, self.variant, self.parser, self.suffix = source, variant, parser, suffix
        self.file, self.images = file, images
        self.hub = HubSource(dataset, split, revision, local_files_only)

    def _read_files(self) -> Iterator[SourceRow]:
        images = ImageFolder(setting_path(self.images))
        for _, origin, row in read_rows(setting_path(self.file), (*KEYS, "file_name")):
            yield SourceRow(row, images.find(str(row["file_name"]), origin), origin)

    def _read_hub(self) -> Iterator[SourceRow]:
        return self.hub.rows(KEYS, None)

    def read_row(self, row: SourceRow) -> Iterable[Sample]:
        """Make the sample of a row in the chosen variant."""
        values, origin, image = row.values, row.origin, row.image
        question = question_text(values["question"], origin)
        label = label_text(values["label"], origin, LETTERS)
        kind = str(values["type"]).strip()
        if not kind:
            raise DataError(f"{origin}: type {shown(values['type'])} is empty")
        if self.variant == "E" and label != NONE:
            question, label = without_option(question, label), NONE
        if self.variant == "GN":
            image = ImageRef(image.name, noise_image)
        yield Sample(
            id=str(values["question_id"]),
            image=image,
            question=question + self.suffix,
            group=row.image.group,  # also where all see the same noise
            subset=kind,
            reference={"label": label, "options": read_options(question)},
        )

    def reply(self, sample: Sample, text: str) -> str | None:
        """Read a letter by the chosen parser."""
        return choice.PARSERS[self.parser](text, dict.fromkeys(LETTERS, "") | sample.reference["options"])

    def score(self, sample: Sample, answer: Answer) -> Score:
        """Count the letter that was read; ``unparsed`` if none was."""
        score, label = super().score(sample, answer), sample.reference["label"]
        reply = score.detail["reply"]
        counts = choice.reply_counts(reply, label, LETTERS) | {
            "e_asked": float(label == NONE),
            "e_read": float(label == NONE and reply is not None),
            "e_right": float(label == NONE == reply),
            "e_exact": float(label == NONE == answer.text),
        }
        return Score(score.status, counts, score.detail)

    def mentions(self, sample: Sample, answer: Answer) -> tuple[Mention, ...]:
        """Return the chosen letter as a mention of its option, hallucinated if it is wrong; E claims nothing."""
        reply, reference = self.reply(sample, answer.text), sample.reference
        if reply == NONE:
            return ()
        return choice.claim(answer.text, reply, reference["label"], reference["options"])

    def metrics(self) -> Mapping[str, Metric]:
        """Return accuracy, also where E is right, and the shares of the letters, from 0 to 1.

        ``e_accuracy_published`` counts nothing but the answer "E", as the authors' code does, though all other figures
        of theirs read the letter out of the answer.
        """
        return {
            "accuracy": ACCURACY["accuracy"],
            "e_accuracy": share("e_right", "e_read"),
            "accuracy_published": ACCURACY["accuracy_published"],
            "e_accuracy_published": share("e_exact", "e_asked"),
            **{f"chose_{letter}": share(f"chose_{letter}", "read") for letter in LETTERS},
        }


def read_options(question: str) -> dict[str, str]:
    r"""Read the texts of the options out of a question that lists them, one on each line.

    >>> read_options("What is it?\nA. A dog\nB. A cat\nE. None of the above")
    {'A': 'A dog', 'B': 'A cat', 'E': 'None of the above'}
    """
    matches = map(_OPTION.fullmatch, question.split("\n")[1:])
    return {match[1]: match[2] or UNKNOWN for match in matches if match}


def without_option(question: str, letter: str) -> str:
    r"""Take one option out of a question; the others keep their letters.

    >>> without_option("What is it?\nA. A dog\nB. A cat", "A")
    'What is it?\nB. A cat'
    """
    first, *lines = question.split("\n")
    return "\n".join([first, *(line for line in lines if not line.strip().startswith(f"{letter}."))])


def noise_image() -> Image:
    """Return grey noise of 256 x 256 pixels: every grey value as probable as any other, always the same.

    The authors draw theirs anew in every run.
    """
    from PIL import Image

    grey = np.random.default_rng(0).integers(0, 256, (_NOISE_SIDE, _NOISE_SIDE), dtype=np.uint8)
    return Image.fromarray(grey).convert("RGB")
