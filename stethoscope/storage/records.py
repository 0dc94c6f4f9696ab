"""A sample's record and the file of them, ``samples.jsonl``: one JSON object per line, only ever appended to."""

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

_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=jsonable)


_REMEDY = "remove it, and run the command that made the run again"


OK, UNPARSED, FAILED = "ok", "unparsed", "failed"


_TEXTS = (
    "group", "subset", "image", "question", "prompt", "status", "error", "prompt_sha256", "image_sha256", "untraced",
)  # fmt: skip


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
        prompt_sha256: digest of the prompt's token ids as the model read them, see ``Encoded.sha256``; empty if there
            was no prompt.
        image_sha256: digest of the picture that was asked about, see ``ImageRef.sha256``; empty if it could not be
            loaded.
        seconds: time spent by stage (``encode``, ``generate``, ``score``, ``trace``); a batch's time is shared evenly.
        untraced: why ``extract`` could not add token rows; empty if it did, or was never asked to.
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
    prompt_sha256: str = ""
    image_sha256: str = ""
    untraced: str = ""
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
        """The record that ``to_dict`` gave.

        Raises:
            ArtefactError: it did not give this.
        """
        try:
            record = cls(**{**found, **_parts(found)})
            odd = [name for name in _TEXTS if not isinstance(getattr(record, name), str)]
            if odd or not isinstance(record.reference, dict) or not isinstance(record.seconds, dict):
                raise TypeError(f"{odd[0] if odd else 'reference or seconds'} is of another type")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtefactError(
                f"the record of sample {found.get('sample_id')!r:.80} is damaged ({str(error)!r:.80}); remove its line "
                "from samples.jsonl and run the same command again"
            ) from None
        return record

    def about(self, sample: Sample) -> bool:
        """Whether the record's sample asked the same as this one, about the same picture.

        A changed data file or picture makes old answers worthless.
        """
        return not self.changes(sample)

    def changes(self, sample: Sample) -> list[str]:
        """Name what of the sample is not as it was asked: question, picture, label, group, subset.

        Of the picture see ``ImageRef.differs``.
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


def _parts(found: Mapping[str, Any]) -> dict[str, Any]:
    """Answer, score and mentions of a line."""
    answer, score = found["answer"], found["score"]
    if answer:
        offsets = tuple((start, end) for start, end in answer["offsets"])
        ids, logprobs = tuple(answer["token_ids"]), tuple(answer["logprobs"])
        answer = Answer(answer["text"], ids, offsets, logprobs, answer["finished"])
    if score:
        score = Score(found["status"], dict(score["counts"]), score["detail"])
    return {"answer": answer, "score": score, "mentions": tuple(Mention(**mention) for mention in found["mentions"])}


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
    with open_regular(path, _REMEDY) as file:
        for number, line in enumerate(file, 1):
            try:
                found = json.loads(line)
                whole = line.endswith(b"\n") and isinstance(found, dict) and _named(found)
            except (ValueError, RecursionError):
                whole = False
            if whole and broken and strict:
                raise ArtefactError(f"{path}:{broken} is damaged; remove the line, or the run, and start it again")
            if whole:
                yield offset, len(line), found
            else:
                broken = broken or number
            offset += len(line)


def _named(found: Mapping[str, Any]) -> bool:
    """Whether a line says whose it is, and how many token rows belong to it, if any."""
    names = (found.get("task"), found.get("sample_id"), found.get("part", ""))
    return all(isinstance(name, str) for name in names) and isinstance(found.get("tokens", 0), int)


def select(samples: Sequence[Sample], limit: int | None) -> tuple[Sample, ...]:
    """Take at most ``limit`` samples, in turn from the subsets, in the order of the task."""
    if limit is None or limit >= len(samples):
        return tuple(samples)
    seen: dict[str, int] = {}
    turns = []
    for index, sample in enumerate(samples):
        turns.append((seen.setdefault(sample.subset, 0), index))
        seen[sample.subset] += 1
    return tuple(samples[index] for index in sorted(index for _, index in sorted(turns)[:limit]))


def checked(task: Task) -> Sequence[Sample]:
    """Read the samples of a task.

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


def recorded(store: RunStore, task: Task, available: Sequence[Sample], samples: Sequence[Sample]) -> tuple[Sample, ...]:
    """Keep the samples that a run directory has a record of.

    Args:
        store: of the run directory.
        task: whose records.
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
