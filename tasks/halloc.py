"""Answers written elsewhere, with the words that are hallucinated marked by type, as HalLoc has them.

Park et al., "HalLoc: Token-level Localization of Hallucinations for Vision Language Models", CVPR 2025, arXiv
2506.10286: objects, attributes, relations and scenes, put into answers by another model than the one that reads them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from stethoscope.core.errors import ConfigError, DataError, unknown
from stethoscope.core.types import Answer, ImageRef, Mention, Sample, Score
from stethoscope.task import Task, Totals
from stethoscope.tasks.given import moved
from stethoscope.tasks.image_folder import ImageFolder
from stethoscope.tasks.published import clipped, read_rows, shown
from stethoscope.tasks.totals import ratio

if TYPE_CHECKING:
    from PIL.Image import Image

TYPES = ("object", "attribute", "relation", "scene")
_WORD = re.compile(r"\w+(?:['’-]\w+)*")
_GREY = (127, 127, 127)


class HalLoc(Task):
    """Given answers, read by the model (teacher forcing) and not written by it; every word is labelled.

    Nothing is generated, so nothing is scored: what the run is for are the labelled tokens and their features. The
    metrics say how surprised the model is, in nats per token, by what is grounded and by what is not.

    Who wrote the hallucinations into an answer left traces of it in the text alone. A detector that finds them has
    looked at the image only if it does better than the same run with ``text_only=true``, where every picture is grey,
    and than the leaderboard's ``text prior``.
    """

    name: ClassVar[str] = "halloc"
    version: ClassVar[str] = "2"
    primary: ClassVar[str] = "nll_gap"

    def __init__(self, file: str | None = None, images: str | None = None, text_only: bool = False) -> None:
        """Stores and checks; see ``conf/task/halloc.yaml`` for every argument.

        Raises:
            ConfigError: no file or no folder.
        """
        if not (file and images):
            raise ConfigError("halloc needs task.file, a JSON-lines file, and task.images, the folder of its images")
        self.file, self.images, self.text_only = file, images, text_only
        self._samples: list[Sample] = []

    def setup(self) -> None:
        """Reads the answers and checks spans and images.

        Raises:
            DataError: the file is missing or broken; the message names file and line.
        """
        if self._samples:
            return
        path, images = Path(self.file).expanduser(), ImageFolder(Path(self.images).expanduser())
        seen: dict[str, str] = {}
        for number, where, row in read_rows(path, ("image", "question", "answer", "spans")):
            id_ = str(row.get("id", "")).strip() or str(number)
            if id_ in seen:
                raise DataError(f"{where}: id {clipped(id_)} is used before, in {seen[id_]}")
            seen[id_] = where
            for key in ("question", "answer"):
                if not isinstance(row[key], str) or not row[key].strip():
                    raise DataError(f"{where}: {key} {shown(row[key])} is no text")
            image = images.find(str(row["image"]), where)
            self._samples.append(
                Sample(
                    id=id_,
                    image=_grey(image) if self.text_only else image,
                    question=row["question"].strip(),
                    group=image.group,
                    subset=str(row.get("subset", "all")),
                    reference={"answer": row["answer"], "spans": read_spans(row["spans"], row["answer"], where)},
                    answer=row["answer"],
                )
            )
        if not self._samples:
            raise DataError(f"{path} holds no answer")

    def samples(self) -> Sequence[Sample]:
        """Answers in the order of the file."""
        return self._samples

    def _labelled(self, sample: Sample, answer: Answer) -> list[tuple[int, int, str | None]] | None:
        """(start, end, type or None) of every marked span and every other word; None if the text did not come back."""
        reference = sample.reference
        spans = [(start, end) for start, end, _ in reference["spans"]]
        places = moved(reference["answer"], spans, answer.text)
        if places is None:
            return None
        marked = [(*place, kind) for place, (_, _, kind) in zip(places, reference["spans"], strict=True)]
        taken = {at for start, end, _ in marked for at in range(start, end)}
        words = [word.span() for word in _WORD.finditer(answer.text)]
        return sorted([*marked, *((*word, None) for word in words if taken.isdisjoint(range(*word)))])

    def score(self, sample: Sample, answer: Answer) -> Score:
        """Adds up surprise by type; ``unparsed`` if the model's tokenizer cannot write the answer."""
        counts = Counter({f"{what}_{kind}": 0.0 for what in ("tokens", "nll") for kind in ("grounded", *TYPES)})
        found = self._labelled(sample, answer)
        if found is None:
            return Score("unparsed", dict(counts), {"reason": f"the model's tokenizer makes {answer.text!r} of it"})
        for start, end, kind in found:
            for token in answer.covering(start, end):
                counts[f"tokens_{kind or 'grounded'}"] += 1
                counts[f"nll_{kind or 'grounded'}"] -= answer.logprobs[token]
        return Score("ok", dict(counts), {"hallucinated": [[answer.text[a:b], kind] for a, b, kind in found if kind]})

    def mentions(self, sample: Sample, answer: Answer) -> tuple[Mention, ...]:
        """Marked spans as hallucinated, all other words as grounded; the words themselves name the object.

        The type is not part of the name: only what is hallucinated has one, so it would give the label away. None is
        a repetition: people have judged every place, and the same word can be right in one and wrong in the next.
        """
        return tuple(
            Mention(start, end, answer.text[start:end].lower(), int(kind is not None), number, 0)
            for number, (start, end, kind) in enumerate(self._labelled(sample, answer) or ())
        )

    def metrics(self) -> Mapping[str, Callable[[Totals], np.ndarray]]:
        """Surprise in nats per token by type, the share of hallucinated tokens, and the gap between the two kinds."""

        def total(totals: Totals, what: str) -> np.ndarray:
            return sum(totals[f"{what}_{kind}"] for kind in TYPES)

        def surprise(kind: str) -> Callable[[Totals], np.ndarray]:
            return lambda totals: ratio(totals[f"nll_{kind}"], totals[f"tokens_{kind}"])

        def hallucinated(totals: Totals) -> np.ndarray:
            return ratio(total(totals, "nll"), total(totals, "tokens"))

        grounded = surprise("grounded")
        return {
            "nll_gap": lambda totals: hallucinated(totals) - grounded(totals),
            "nll_grounded": grounded,
            **{f"nll_{kind}": surprise(kind) for kind in TYPES},
            "hallucinated": lambda totals: ratio(
                total(totals, "tokens"), total(totals, "tokens") + totals["tokens_grounded"]
            ),
        }


def read_spans(spans: Any, answer: str, where: str) -> list[tuple[int, int, str]]:
    """(start, end, type) of the marked spans of one answer, checked and sorted.

    Args:
        spans: list of objects with ``start``, ``end`` (half-open characters of the answer) and ``type``.
        answer: the text that they mark.
        where: file and line, for messages.

    Raises:
        DataError: not such a list, a span outside the answer or of blanks alone, spans that overlap, an unknown type.
    """

    def checked() -> Iterator[tuple[int, int, str]]:
        for index, span in enumerate(spans):
            here = f"{where}, spans[{index}]"
            if not isinstance(span, dict) or not {"start", "end", "type"} <= span.keys():
                raise DataError(f"{here}: an object with start, end and type was expected, not {shown(span)}")
            start, end, kind = span["start"], span["end"], span["type"]
            if kind not in TYPES:
                raise DataError(f"{here}: {unknown('type of hallucination', clipped(kind), TYPES)}")
            if not (type(start) is int and type(end) is int and 0 <= start < end <= len(answer)):
                raise DataError(
                    f"{here}: {shown(start)} to {shown(end)} is no span of an answer of {len(answer)} characters"
                )
            if not answer[start:end].strip():
                raise DataError(f"{here}: {start} to {end} holds nothing but blanks")
            yield start, end, kind

    if not isinstance(spans, list):
        raise DataError(f"{where}: spans should be a list, not {shown(spans)}")
    found = sorted(checked())
    for one, other in pairwise(found):
        if other[0] < one[1]:
            raise DataError(f"{where}: spans {one[0]}-{one[1]} and {other[0]}-{other[1]} overlap")
    return found


def _grey(image: ImageRef) -> ImageRef:
    return ImageRef(image.name, partial(_grey_image, image))


def _grey_image(image: ImageRef) -> Image:
    from PIL import Image

    return Image.new("RGB", image.load().size, _GREY)
