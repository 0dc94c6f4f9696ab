"""M-HalDetect: descriptions that InstructBLIP wrote of COCO pictures, judged by people phrase by phrase.

Gunjal, Yin and Bas, "Detecting and Preventing Hallucinations in Large Vision Language Models", AAAI 2024, arXiv
2308.06394. The model that reads the descriptions is another one than the model that wrote them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from stethoscope.core.errors import DataError, unknown
from stethoscope.core.json_rows import clipped, read_rows, shown
from stethoscope.core.types import Sample
from stethoscope.tasks.annotations import image_id
from stethoscope.tasks.halloc import GROUNDED, UNKNOWN_LABEL, WORD, GivenAnswers, LabelledSpan
from stethoscope.tasks.image_folder import ImageFolder
from stethoscope.tasks.questions import parsed_cell, question_text
from stethoscope.tasks.sources import DataSource, HubSource, SourceRow, check_flags, setting_path

KEYS = ("question", "response", "annotations")
HALLUCINATED = "hallucinated"
LABELS = {"ACCURATE": GROUNDED, "INACCURATE": HALLUCINATED, "ANALYSIS": UNKNOWN_LABEL, "UNSURE": UNKNOWN_LABEL}
"""Label of a segment -> kind of its words: what is analysis, or what the annotator was unsure about, is not judged."""
WRITER = "InstructBLIP"


class MHalDetect(GivenAnswers):
    """Given descriptions whose phrases people have judged; every word has the label of its phrase.

    Words of inaccurate phrases are hallucinated, those of accurate ones grounded; all others, outside of every phrase
    too, are not judged: they are rows of the run without a label.
    """

    name = "mhal_detect"
    version: ClassVar[str] = "1"
    kinds: ClassVar[tuple[str, ...]] = (HALLUCINATED,)

    def __init__(
        self,
        source: str = "hub",
        text_only: bool = False,
        file: str | None = None,
        images: str | None = None,
        dataset: str = "MM-Hallu/mhal-detect",
        split: str = "validation",
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> None:
        """Store and check the settings; ``conf/task/mhal_detect.yaml`` explains every argument.

        Raises:
            ConfigError: an unknown source, or a path that the source needs.
        """
        paths = {"file": (file, "val_raw.json or train_raw.json"), "images": (images, "the folder val2014 of COCO")}
        self.data = DataSource("mhal_detect", source, {"files": self._read_files, "hub": self._read_hub}, paths)
        check_flags(text_only=text_only)
        self.source, self.text_only, self.file, self.images = source, text_only, file, images
        self.hub = HubSource(dataset, split, revision, local_files_only)
        self._samples: list[Sample] = []

    def setup(self) -> None:
        """Read the descriptions and check segments and images.

        Raises:
            DataError: the source is missing or broken; the message names file and line.
        """
        if self._samples:
            return
        lost = count = 0
        samples = []
        for number, row in enumerate(self.data.rows(), 1):
            answer = row.values["response"]
            if not isinstance(answer, str) or not answer.strip():
                raise DataError(f"{row.origin}: response {shown(answer)} is no text")
            segments = read_segments(row.values["annotations"], answer, row.origin)
            spans = [span for span in segments if span]
            count, lost = count + len(segments), lost + len(segments) - len(spans)
            samples.append(
                Sample(
                    id=str(number),
                    image=self.shown_image(row.image),
                    question=question_text(row.values["question"], row.origin),
                    group=row.image.group,
                    reference={"answer": answer, "spans": spans, "writer": WRITER},
                    answer=answer,
                )
            )
        if not samples:
            raise DataError(f"{self.file or self.hub.dataset} holds no description")
        if lost:
            warnings.warn(
                f"mhal_detect: {lost} of {count} segments have another text than stands between their start and end; "
                "their words are not judged",
                stacklevel=2,
            )
        self._samples = samples

    def _read_files(self) -> Iterator[SourceRow]:
        images = ImageFolder(setting_path(self.images))
        for _, origin, row in read_rows(setting_path(self.file), (*KEYS, "image")):
            id_ = image_id(row["image"])
            names = [str(row["image"]), *([f"COCO_val2014_{id_:012d}.jpg"] if isinstance(id_, int) else [])]
            yield SourceRow(row, images.find_first(names, origin), origin)

    def _read_hub(self) -> Iterator[SourceRow]:
        return self.hub.rows(KEYS, None)

    def label_words(self, text: str, spans: Sequence[LabelledSpan]) -> list[LabelledSpan]:
        """Return every word with the label of its segment; one of segments that contradict each other is not judged."""
        kinds = [UNKNOWN_LABEL] * len(text)
        judged: set[int] = set()
        for start, end, kind in spans:
            for index in range(start, end):
                kinds[index] = UNKNOWN_LABEL if index in judged and kinds[index] != kind else kind
                judged.add(index)
        words = [word.span() for word in WORD.finditer(text)]
        kinds_by_word = [set(kinds[start:end]) for start, end in words]
        return [
            (*word, own.pop() if len(own) == 1 else UNKNOWN_LABEL)
            for word, own in zip(words, kinds_by_word, strict=True)
        ]

    def notes(self, samples: Sequence[Sample]) -> Sequence[str]:
        """Name the model that wrote the answers."""
        return [f"The answers were written by {WRITER} and judged by people; the model here only reads them."]


def read_segments(value: Any, answer: str, origin: str) -> list[LabelledSpan | None]:
    """Read the judged segments of a description; None for one whose text is not where it should be.

    Args:
        value: list of objects with ``start``, ``end`` and ``label``, and perhaps ``text``; or this as JSON in a text.
        answer: the description.
        origin: file and line, for messages.

    Returns:
        Start, end (half-open) and kind of every segment that is not blank.

    Raises:
        DataError: it is no such list, a label is unknown, or a segment is no span of the description.

    >>> read_segments([{"start": 2, "end": 4, "text": "dog", "label": "INACCURATE"}], "A dog.", "line 1")
    [(2, 5, 'hallucinated')]
    """
    value = parsed_cell(value, f"{origin}: annotations")
    if not isinstance(value, list):
        raise DataError(f"{origin}: annotations should be a list of segments, not {shown(value)}")
    segments: list[LabelledSpan | None] = []
    for index, segment in enumerate(value):
        location = f"{origin}, annotations[{index}]"
        if not isinstance(segment, dict) or not {"start", "end", "label"} <= segment.keys():
            raise DataError(f"{location}: an object with start, end and label was expected, not {shown(segment)}")
        start, end, label = segment["start"], segment["end"], str(segment["label"]).strip().upper()
        if label not in LABELS:
            raise DataError(f"{location}: {unknown('label', clipped(segment['label']), LABELS)}")
        if not (type(start) is int and type(end) is int and 0 <= start <= end <= len(answer)):
            raise DataError(f"{location}: {shown(start)} to {shown(end)} is no span of {len(answer)} characters")
        ends = [end, end + 1]  # whichever the text says: after the last character, or the last character
        if isinstance(segment.get("text"), str):
            words = segment["text"].split()
            ends = [stop for stop in ends if answer[start:stop].split() == words]
        if not ends:
            segments.append(None)
        elif answer[start : ends[0]].strip():
            segments.append((start, ends[0], LABELS[label]))
    return segments
