"""HalLoc: given answers whose hallucinated words are marked by type.

Park et al., "HalLoc: Token-level Localization of Hallucinations for Vision Language Models", CVPR 2025, arXiv
2506.10286: objects, attributes, relations and scenes, put into answers by another model than the one that reads them.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from stethoscope.core.errors import DataError
from stethoscope.core.json_rows import check_line, read_rows, shown
from stethoscope.core.types import Answer, ImageRef, Mention, Sample, Score
from stethoscope.metrics.ranking import divide
from stethoscope.tasks.base import Metric, Task, Totals
from stethoscope.tasks.counts import share, total
from stethoscope.tasks.image_folder import ImageFolder
from stethoscope.tasks.sources import check_flags, check_paths, check_unused, setting_path

if TYPE_CHECKING:
    from PIL.Image import Image

TYPES = ("object", "attribute", "relation", "scene")
GROUNDED, UNKNOWN_LABEL = "grounded", "unknown"
"""Kinds of words that are not hallucinated: right ones, and those that nobody has judged."""
WORD = re.compile(r"\w+(?:['’-]\w+)*")
_GREY = (127, 127, 127)

LabelledSpan = tuple[int, int, str]
"""Start and end in the answer, and its kind."""


class GivenAnswers(Task):
    """Given answers, read by the model (teacher forcing) and not written by it; every word is labelled.

    Nothing is generated, so no answer is right or wrong: the run provides labelled tokens and their features. The
    metrics are the model's surprisal, in nats per token, on grounded and on hallucinated words.

    Attributes:
        kinds: kinds of hallucinated words.
        text_only: whether every picture is shown as a grey one, which is the control for what the text alone betrays.
    """

    kinds: ClassVar[tuple[str, ...]]
    primary = "nll_gap"
    reads_tokens: ClassVar[bool] = True
    text_only: bool
    _samples: list[Sample]

    def samples(self) -> Sequence[Sample]:
        """Return the answers in the order of the source."""
        return self._samples

    def shown_image(self, image: ImageRef) -> ImageRef:
        """Return the image that the model is shown: the answer's own, or a grey one of the same size."""
        return ImageRef(image.name, partial(_grey_image, image)) if self.text_only else image

    @abstractmethod
    def label_words(self, text: str, spans: Sequence[LabelledSpan]) -> list[LabelledSpan]:
        """Label the words of an answer in reading order, each by one of ``kinds``, ``grounded`` or ``unknown``.

        Args:
            text: the answer as the model's tokenizer writes it.
            spans: marked spans in it.
        """

    def _labelled(self, sample: Sample, answer: Answer) -> list[LabelledSpan] | None:
        """Return the labelled words of an answer; None if its text did not come back from the tokenizer."""
        marked = sample.reference["spans"]
        moved = move_spans(sample.reference["answer"], [(start, end) for start, end, _ in marked], answer.text)
        if moved is None:
            return None
        return self.label_words(answer.text, [(*span, kind) for span, (_, _, kind) in zip(moved, marked, strict=True)])

    def score(self, sample: Sample, answer: Answer) -> Score:
        """Add up surprisal by kind; ``unparsed`` if the model's tokenizer cannot write the answer."""
        kinds = (GROUNDED, *self.kinds, UNKNOWN_LABEL)
        counts = dict.fromkeys([f"{unit}_{kind}" for unit in ("tokens", "nll") for kind in kinds], 0.0)
        words = self._labelled(sample, answer)
        if words is None:
            return Score("unparsed", counts, {"reason": f"the model's tokenizer makes {answer.text!r} of it"})
        for start, end, kind in words:
            for token in answer.covering(start, end):
                counts[f"tokens_{kind}"] += 1
                counts[f"nll_{kind}"] -= answer.logprobs[token]
        return Score(
            "ok", counts, {"hallucinated": [[answer.text[a:b], kind] for a, b, kind in words if kind in self.kinds]}
        )

    def mentions(self, sample: Sample, answer: Answer) -> tuple[Mention, ...]:
        """Return every word, labelled hallucinated, grounded or not judged; the words themselves name the object.

        The kind is not part of the name: only what is hallucinated has one, so it would give the label away. None is
        a repetition: people have labelled every occurrence, and one can be right where another is wrong.
        """
        labels = {GROUNDED: 0, UNKNOWN_LABEL: -1}
        return tuple(
            Mention(start, end, answer.text[start:end].lower(), labels.get(kind, 1), number, 0)
            for number, (start, end, kind) in enumerate(self._labelled(sample, answer) or ())
        )

    def metrics(self) -> Mapping[str, Metric]:
        """Return surprisal in nats per token by kind, the share of hallucinated tokens, and ``nll_gap``."""
        tokens, nll = ([f"{unit}_{kind}" for kind in self.kinds] for unit in ("tokens", "nll"))

        def hallucinated(totals: Totals) -> np.ndarray:
            return divide(total(totals, *nll), total(totals, *tokens))

        grounded = share("nll_grounded", "tokens_grounded")
        return {
            "nll_gap": lambda totals: hallucinated(totals) - grounded(totals),
            "nll_grounded": grounded,
            **{f"nll_{kind}": share(f"nll_{kind}", f"tokens_{kind}") for kind in self.kinds},
            "hallucinated": lambda totals: divide(total(totals, *tokens), total(totals, *tokens, "tokens_grounded")),
        }


class HalLoc(GivenAnswers):
    """Given answers with their hallucinated words marked by type; all other words are grounded.

    The inserted hallucinations leave traces in the text alone. A detector uses the image only if it does better than
    the same run with ``text_only=true``, where every picture is grey, and better than the leaderboard's ``text prior``.
    """

    name = "halloc"
    version: ClassVar[str] = "2"
    kinds: ClassVar[tuple[str, ...]] = TYPES

    def __init__(self, file: str | None = None, images: str | None = None, text_only: bool = False) -> None:
        """Store and check the settings; ``conf/task/halloc.yaml`` explains every argument.

        Raises:
            ConfigError: no file or no folder, or ``text_only`` is neither true nor false.
        """
        paths = {"file": (file, "a JSON-lines file"), "images": (images, "the folder of its images")}
        check_paths("halloc", paths)
        check_flags(text_only=text_only)
        self.file, self.images, self.text_only = file, images, text_only
        self._samples: list[Sample] = []

    def setup(self) -> None:
        """Read the answers and check spans and images.

        Raises:
            DataError: the file is missing or broken; the message names file and line.
        """
        if self._samples:
            return
        path, images = setting_path(self.file), ImageFolder(setting_path(self.images))
        origins: dict[str, str] = {}
        samples = []
        for number, origin, row in read_rows(path, ("image", "question", "answer", "spans")):
            id_ = str(row.get("id", "")).strip() or str(number)
            check_unused(origins, id_, origin)
            check_line("halloc", row, origin)
            image = images.find(str(row["image"]), origin)
            samples.append(
                Sample(
                    id=id_,
                    image=self.shown_image(image),
                    question=row["question"].strip(),
                    group=image.group,
                    subset=str(row.get("subset", "all")),
                    reference={"answer": row["answer"], "spans": read_spans(row["spans"], row["answer"], origin)},
                    answer=row["answer"],
                )
            )
        if not samples:
            raise DataError(f"{path} holds no answer")
        self._samples = samples

    def label_words(self, text: str, spans: Sequence[LabelledSpan]) -> list[LabelledSpan]:
        """Return the marked spans, and all other words as grounded."""
        taken = {index for start, end, _ in spans for index in range(start, end)}
        words = [word.span() for word in WORD.finditer(text)]
        return sorted([*spans, *((*word, GROUNDED) for word in words if taken.isdisjoint(range(*word)))])


def read_spans(spans: Sequence[Mapping[str, Any]], answer: str, origin: str) -> list[tuple[int, int, str]]:
    """Check and sort the marked spans of one answer, as (start, end, type).

    Args:
        spans: objects of the schema ``halloc``: ``start``, ``end`` (half-open characters of the answer), ``type``.
        answer: the text that they mark.
        origin: file and line, for messages.

    Raises:
        DataError: a span outside the answer or of blanks alone, or spans that overlap.
    """

    def checked() -> Iterator[tuple[int, int, str]]:
        for index, span in enumerate(spans):
            location = f"{origin}, spans[{index}]"
            start, end, kind = int(span["start"]), int(span["end"]), span["type"]
            if not start < end <= len(answer):
                raise DataError(
                    f"{location}: {shown(start)} to {shown(end)} is no span of an answer of {len(answer)} characters"
                )
            if not answer[start:end].strip():
                raise DataError(f"{location}: {start} to {end} holds nothing but blanks")
            yield start, end, kind

    sorted_spans = sorted(checked())
    for (start, end, _), (next_start, next_end, _) in pairwise(sorted_spans):
        if next_start < end:
            raise DataError(f"{origin}: spans {start}-{end} and {next_start}-{next_end} overlap")
    return sorted_spans


def move_spans(text: str, spans: Sequence[tuple[int, int]], answer: str) -> list[tuple[int, int]] | None:
    """Move character spans of a text to the same text after a tokenizer has split it and put it together.

    Tokenizers take away blanks at the ends, make several blanks one, write small letters. All other characters must
    come back, but for their case.

    Args:
        text: text of the file.
        spans: half-open spans in it, none of blanks alone.
        answer: text that the tokenizer gives back.

    Returns:
        The same spans in ``answer``; None if that is another text (a letter that the tokenizer does not know).

    >>> move_spans(" A  dog.", [(4, 7)], "a dog.")
    [(2, 5)]
    >>> move_spans("A dog", [(2, 5)], "A ?")
    """
    before = [index for index, letter in enumerate(text) if not letter.isspace()]
    after = [index for index, letter in enumerate(answer) if not letter.isspace()]
    if [text[index].lower() for index in before] != [answer[index].lower() for index in after]:
        return None
    moved = dict(zip(before, after, strict=True))
    inside = [[moved[index] for index in range(start, end) if index in moved] for start, end in spans]
    return [(indices[0], indices[-1] + 1) for indices in inside]


def _grey_image(image: ImageRef) -> Image:
    """Return a grey image of the same size."""
    from PIL import Image

    return Image.new("RGB", image.load().size, _GREY)
