"""Define a sample's record and read and write its line of ``samples.jsonl``, one JSON object."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stethoscope.core.digests import jsonable
from stethoscope.core.errors import ArtefactError, DataError
from stethoscope.core.files import open_regular
from stethoscope.core.types import Answer, Mention, Sample, Score

if TYPE_CHECKING:
    from stethoscope.storage.run_dir import RunStore
    from stethoscope.tasks.base import Task

OK, UNPARSED, FAILED = "ok", "unparsed", "failed"

_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=jsonable)
_REMEDY = "remove it, and run the command that made the run again"
_TEXT_FIELDS = (
    "group", "subset", "image", "question", "prompt", "status", "error", "prompt_sha256", "image_sha256", "untraced",
)  # fmt: skip


@dataclass(frozen=True)
class Record:
    """Everything a run stores about one sample: a line of ``samples.jsonl``.

    Attributes:
        task, sample_id, group, subset, question, reference: as in the sample; ``image`` is the image's name.
        prompt: in the model's chat format, before image placeholders are expanded; empty if encoding failed.
        status: ``ok``, ``unparsed`` (the task cannot read the answer) or ``failed`` (see ``error``).
        error: why the sample failed, else empty.
        answer, score: None where the sample failed before they were computed.
        mentions: labelled objects that the answer names.
        prompt_sha256: digest of the prompt's token ids as the model read them, see ``Encoded.sha256``; empty if there
            was no prompt.
        image_sha256: digest of the image, see ``ImageRef.sha256``; empty if it could not be loaded.
        seconds: time by stage (``encode``, ``generate``, ``score``, ``trace``), a batch's time divided evenly.
        untraced: why ``extract`` could not add token rows; empty if it did, or never tried.
        tokens: number of rows in the token table.
        part: file in ``tokens/`` with these rows; empty once they are in ``tokens.parquet``.
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
    prompt_sha256: str = ""
    image_sha256: str = ""
    untraced: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)
    tokens: int = 0
    part: str = ""

    @property
    def truncated(self) -> bool:
        """Whether the answer was cut off at the maximum length."""
        return self.answer is not None and not self.answer.finished

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain values, as its line holds it; the task's own values are left unchanged."""
        answer, score = self.answer, self.score
        values = {
            **vars(self),
            "answer": answer and {**vars(answer), "logprobs": [round(value, 6) for value in answer.logprobs]},
            "score": score and {"counts": score.counts, "detail": score.detail},
            "mentions": [vars(mention) for mention in self.mentions],
            "seconds": {stage: round(value, 6) for stage, value in self.seconds.items()},
        }
        if not self.part:
            del values["part"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Record:
        """Build the record from what ``to_dict`` returned.

        Raises:
            ArtefactError: a key is missing, or a value has another type.
        """
        try:
            record = cls(**{**values, **_decode_parts(values)})
            wrong = [name for name in _TEXT_FIELDS if not isinstance(getattr(record, name), str)]
            if wrong or not isinstance(record.reference, dict) or not isinstance(record.seconds, dict):
                raise TypeError(f"{wrong[0] if wrong else 'reference or seconds'} is of another type")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtefactError(
                f"the record of sample {values.get('sample_id')!r:.80} is damaged ({str(error)!r:.80}); "
                "remove its line from samples.jsonl and run the same command again"
            ) from None
        return record

    def changes(self, sample: Sample) -> list[str]:
        """List what has changed in the sample since it was answered: question, picture, label, group, subset.

        Images are compared by name and digest, see ``ImageRef.differs``.
        """
        picture = self.image != sample.image.name or (self.image_sha256 and sample.image.differs(self.image_sha256))
        changed = {
            "question": self.question != sample.question,
            "picture": picture,
            "label": self.reference != jsonable(sample.reference),
            "group": self.group != sample.group,
            "subset": self.subset != sample.subset,
        }
        return [name for name, differs in changed.items() if differs]


def _decode_parts(values: Mapping[str, Any]) -> dict[str, Any]:
    """Build answer, score and mentions from the plain values of a line."""
    answer, score = values["answer"], values["score"]
    if answer:
        offsets = tuple((start, end) for start, end in answer["offsets"])
        ids, logprobs = tuple(answer["token_ids"]), tuple(answer["logprobs"])
        answer = Answer(answer["text"], ids, offsets, logprobs, answer["finished"])
    if score:
        score = Score(values["status"], dict(score["counts"]), score["detail"])
    return {"answer": answer, "score": score, "mentions": tuple(Mention(**mention) for mention in values["mentions"])}


def encode_line(values: Mapping[str, Any]) -> bytes:
    """Encode plain values as one line of UTF-8 JSON; numbers that are not finite become null."""
    try:
        text = _ENCODER.encode(values)
    except ValueError:  # JSON has no infinity and no NaN
        text = _ENCODER.encode(jsonable(values))
    return text.encode("utf-8", errors="backslashreplace") + b"\n"  # half a surrogate pair becomes its JSON escape


def read_lines(path: Path, strict: bool = True) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yield offset, length (bytes) and content of every line, but for broken ones at the end, which a kill leaves.

    Args:
        path: of the file.
        strict: reject broken lines before the end, instead of skipping them.

    Raises:
        ArtefactError: a line before the end is broken.
    """
    offset, broken = 0, 0
    with open_regular(path, _REMEDY) as file:
        for number, line in enumerate(file, 1):
            try:
                values = json.loads(line)
                whole = line.endswith(b"\n") and isinstance(values, dict) and _has_keys(values)
            except (ValueError, RecursionError):
                whole = False
            if whole and broken and strict:
                raise ArtefactError(f"{path}:{broken} is damaged; remove the line, or the run, and start it again")
            if whole:
                yield offset, len(line), values
            else:
                broken = broken or number
            offset += len(line)


def _has_keys(values: Mapping[str, Any]) -> bool:
    """Return whether a line names its task and sample, with a valid ``part`` and ``tokens`` if it has them."""
    names = (values.get("task"), values.get("sample_id"), values.get("part", ""))
    return all(isinstance(name, str) for name in names) and isinstance(values.get("tokens", 0), int)


def select_samples(samples: Sequence[Sample], limit: int | None) -> tuple[Sample, ...]:
    """Select at most ``limit`` samples, evenly from the subsets, in the order of the task."""
    if limit is None or limit >= len(samples):
        return tuple(samples)
    seen: dict[str, int] = {}
    turns = []
    for index, sample in enumerate(samples):
        turns.append((seen.setdefault(sample.subset, 0), index))
        seen[sample.subset] += 1
    return tuple(samples[index] for index in sorted(index for _, index in sorted(turns)[:limit]))


def load_samples(task: Task) -> Sequence[Sample]:
    """Load the samples of a task and check their ids.

    Raises:
        DataError: there are none, or two have the same id.
    """
    samples = task.samples()
    ids = [sample.id for sample in samples]
    if not ids:
        raise DataError(f"task {task.name!r} has no samples")
    if len(set(ids)) < len(ids):
        double = next(name for index, name in enumerate(ids) if name in ids[:index])
        raise DataError(f"task {task.name!r} has two samples with the id {double!r}")
    return samples


def recorded_samples(
    store: RunStore, task: Task, available: Sequence[Sample], samples: Sequence[Sample]
) -> tuple[Sample, ...]:
    """Select the samples of which a run directory has a record.

    Args:
        store: of the run directory.
        task: that the records belong to.
        available: all samples of the task.
        samples: those to choose from.

    Raises:
        DataError: it has records of samples that the task no longer has.
        ArtefactError: it has none of the samples.
    """
    ids = set(store.sample_ids(task.name))
    gone = ids - {sample.id for sample in available}
    if gone:
        raise DataError(
            f"{len(gone)} of {len(ids)} samples that {store.run_dir} has answers to are not in the data of "
            f"{task.name} any more, such as {min(gone)}; give it the data that it was asked about"
        )
    samples = tuple(sample for sample in samples if sample.id in ids)
    if not samples:
        raise ArtefactError(f"{store.run_dir} has no answer to {task.name}; the command that began it goes on")
    return samples
