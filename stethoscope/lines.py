"""A sample's record and the file of them, ``samples.jsonl``: one JSON object per line, only ever appended to."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stethoscope.errors import ArtefactError
from stethoscope.fingerprint import jsonable
from stethoscope.records import Answer, Mention, Sample, Score

_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=jsonable)
OK, UNPARSED, FAILED = "ok", "unparsed", "failed"


@dataclass(frozen=True)
class Record:
    """All that is known of one sample of one run; a line of ``samples.jsonl``.

    Attributes:
        task, sample_id, group, subset, question, reference: as in the sample; ``image`` is the image's name.
        prompt: the model's own prompt, before image placeholders are expanded; empty if it could not be made.
        status: ``ok``, ``unparsed`` (the task cannot read the answer) or ``failed`` (see ``error``).
        error: why the sample failed, else empty.
        answer, score: None where the sample failed before.
        mentions: labelled objects that the answer names.
        image_sha256: digest of the picture that was asked about, see ``ImageRef.sha256``; empty if it could not be
            loaded, and in records of runs from before there was one.
        seconds: time spent by stage (``encode``, ``generate``, ``score``, ``trace``); a batch's time is shared evenly.
        tokens: number of rows in the token table.
        part: file in ``tokens/`` that holds those rows; empty once they are in ``tokens.parquet``.
    """

    task: str
    sample_id: str
    group: str
    subset: str
    image: str
    question: str
    reference: Mapping[str, Any] = field(default_factory=dict)
    prompt: str = ""
    status: str = OK
    error: str = ""
    answer: Answer | None = None
    score: Score | None = None
    mentions: tuple[Mention, ...] = ()
    image_sha256: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)
    tokens: int = 0
    part: str = ""

    @property
    def truncated(self) -> bool:
        """The answer was cut off at the longest length allowed."""
        return self.answer is not None and not self.answer.finished

    def to_dict(self) -> dict[str, Any]:
        """The record as a line holds it; what the task put into it is left as it is."""
        answer, score = self.answer, self.score
        found = {
            **vars(self),
            "answer": answer and {**vars(answer), "logprobs": [round(value, 6) for value in answer.logprobs]},
            "score": score and {"counts": score.counts, "detail": score.detail},
            "mentions": [vars(mention) for mention in self.mentions],
            "seconds": {stage: round(value, 6) for stage, value in self.seconds.items()},
        }
        if not self.part:
            del found["part"]
        return found

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Record:
        """The record that ``to_dict`` gave."""
        answer, score = found["answer"], found["score"]
        return cls(
            **{
                **found,
                "answer": answer
                and Answer(
                    answer["text"],
                    tuple(answer["token_ids"]),
                    tuple((start, end) for start, end in answer["offsets"]),
                    tuple(answer["logprobs"]),
                    answer["finished"],
                ),
                "score": score and Score(found["status"], score["counts"], score["detail"]),
                "mentions": tuple(Mention(**mention) for mention in found["mentions"]),
            }
        )

    def about(self, sample: Sample) -> bool:
        """Whether the record's sample asked the same as this one, about the same picture.

        A changed data file or picture makes old answers worthless. Of the picture see ``ImageRef.differs``.
        """
        mine = (self.group, self.subset, self.image, self.question, self.reference)
        asked = (sample.group, sample.subset, sample.image.name, sample.question, jsonable(sample.reference))
        return mine == asked and not (self.image_sha256 and sample.image.differs(self.image_sha256))


def dump(found: Mapping[str, Any]) -> bytes:
    """One line of the file."""
    try:
        text = _ENCODER.encode(found)
    except ValueError:  # a value that is not finite, which JSON does not have
        text = _ENCODER.encode(jsonable(found))
    return text.encode("utf-8", errors="backslashreplace") + b"\n"  # half a surrogate pair becomes its JSON escape


def lines(path: Path, strict: bool = True) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Offset, length and content of every line; broken lines at the very end, as a kill leaves them, are passed over.

    Args:
        path: of the file.
        strict: minds broken lines before the end, which are passed over otherwise.

    Raises:
        ArtefactError: a line before the end is broken.
    """
    offset, broken = 0, 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                found = json.loads(line)
                whole = line.endswith(b"\n") and isinstance(found, dict) and {"task", "sample_id"} <= found.keys()
            except ValueError:
                whole = False
            if whole and broken and strict:
                raise ArtefactError(f"{path}:{broken} is damaged; remove the line, or the run, and start it again")
            if whole:
                yield offset, len(line), found
            else:
                broken = broken or number
            offset += len(line)
