"""Define a sample's record and its line of ``samples.jsonl``, and keep the files of lines.

Each process writes a shard of its own.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from stethoscope.core.errors import ArtefactError
from stethoscope.core.files import append, jsonable, open_regular, replacing
from stethoscope.core.types import Answer, Mention, Sample, Score
from stethoscope.storage.tokens import Key, TokenFiles

OK, UNPARSED, FAILED = "ok", "unparsed", "failed"

_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=jsonable)
_REMEDY = "remove it, and run the command that made the run again"
_TEXT_FIELDS = (
    "group", "subset", "image", "question", "prompt", "status", "error", "prompt_sha256", "image_sha256", "untraced",
    "asks",
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
        given: of an answer that the model read and did not write, how, see ``given_answers.read_answer``; else empty.
        tokens: number of rows in the token table.
        part: file in ``tokens/`` with these rows; empty once they are in ``tokens.parquet``.
        asks: as in the sample; the line of a question leaves it out.
        edit: how a mitigation has edited the answer (``mitigation.answers.edit_record``): the text as it was, its
            mentions with their probabilities, and what was removed; where it was chosen among candidates, all of them
            with their scores; or what was taken back while it was written. Empty, and left out, where nothing was done.
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
    given: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    tokens: int = 0
    part: str = ""
    asks: str = "question"
    edit: Mapping[str, Any] = field(default_factory=dict)

    @property
    def truncated(self) -> bool:
        """Whether the answer was cut off at the maximum length."""
        return self.answer is not None and not self.answer.finished

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain values, as its line holds it; the task's own values are left unchanged."""
        score = self.score
        values = {
            **vars(self),
            "answer": self.answer and _encode_answer(self.answer),
            "score": score and {"counts": score.counts, "detail": score.detail},
            "mentions": [vars(mention) for mention in self.mentions],
            "seconds": {stage: round(value, 6) for stage, value in self.seconds.items()},
        }
        for key in ("part", "given", "edit"):
            if not values[key]:
                del values[key]
        if self.asks == "question":
            del values["asks"]
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
            plain = ("reference", "given", "edit", "seconds")
            wrong += [name for name in plain if not isinstance(getattr(record, name), dict)]
            if wrong:
                raise TypeError(f"{wrong[0]} is of another type")
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


def _encode_answer(answer: Answer) -> dict[str, Any]:
    """Return an answer as plain values, without those that only given answers have."""
    values = {**vars(answer), "logprobs": [round(value, 6) for value in answer.logprobs]}
    if answer.argmax is None:
        del values["argmax"]
    if not answer.reasoning:
        del values["reasoning"]
    return values


def _decode_parts(values: Mapping[str, Any]) -> dict[str, Any]:
    """Build answer, score and mentions from the plain values of a line."""
    answer, score = values["answer"], values["score"]
    if answer:
        offsets = tuple((start, end) for start, end in answer["offsets"])
        ids, logprobs = tuple(answer["token_ids"]), tuple(answer["logprobs"])
        argmax = answer.get("argmax")
        reasoning = tuple((start, end) for start, end in answer.get("reasoning", ()))
        argmax = None if argmax is None else tuple(argmax)
        answer = Answer(answer["text"], ids, offsets, logprobs, answer["finished"], argmax, reasoning)
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
    """Yield offset, length (bytes) and content of every whole line.

    Broken lines at the end, which a kill leaves, are left out.

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
    """Return whether a line names its task and sample, and counts its token rows if it has any."""
    names = (values.get("task"), values.get("sample_id"), values.get("part", ""))
    return all(isinstance(name, str) for name in names) and isinstance(values.get("tokens", 0), int)


class RecordEntry(NamedTuple):
    """Position of a sample's last line, with the fields of it that the store needs.

    Attributes:
        file: ``samples.jsonl`` or a shard.
        offset: byte at which the line starts.
        tokens: number of its token rows.
        part: file in ``tokens/`` with these rows; empty for ``tokens.parquet``.
        lost_rows: whether the rows that the line counts are gone, so that the line says something else.
    """

    file: Path
    offset: int
    tokens: int
    part: str
    lost_rows: bool = False

    def without_rows(self) -> RecordEntry:
        """Return the entry of a sample whose token rows are gone."""
        return self._replace(tokens=0, part="", lost_rows=True)


class RecordFiles:
    """The record files of one run directory.

    Lines are only ever appended; the last line of a sample counts.

    Where several processes write, each appends to a shard of its own in ``shards/``. ``repair`` appends the shards to
    ``samples.jsonl`` once no process writes any more: when the task is finished, or else when the next session opens
    the run.
    """

    def __init__(self, run_dir: Path, token_files: TokenFiles) -> None:
        """Name the files; nothing is read or created.

        Args:
            run_dir: the run directory.
            token_files: its token rows, of which the records say which ones count.
        """
        self.main = self._own = run_dir / "samples.jsonl"
        self.shards = run_dir / "shards"
        self.stop_file = self.shards / "stop"
        self._token_files = token_files
        self._entries: dict[Key, RecordEntry] = {}
        self._state: list[tuple[Path, int, int, int]] | None = None

    def use_shard(self, rank: int) -> None:
        """Append to the shard of process ``rank`` from now on, until the next ``repair``."""
        self.shards.mkdir(exist_ok=True)
        self._own = self.shards / f"samples-{rank}.jsonl"
        self._token_files.part_prefix = f"r{rank}-"

    def append(self, records: Sequence[Record], durable: bool) -> None:
        """Append one line per record in a single write.

        Args:
            records: with ``tokens`` and ``part`` set to the token rows that are already written.
            durable: wait until the lines would survive a power cut.
        """
        entries = self.entries()  # before the write, after which the file no longer has the state that was indexed
        offset = self._own.stat().st_size if self._own.exists() else 0
        lines = [encode_line(record.to_dict()) for record in records]
        append(self._own, b"".join(lines), durable)
        for record, line in zip(records, lines, strict=True):
            entries[record.task, record.sample_id] = RecordEntry(self._own, offset, record.tokens, record.part)
            offset += len(line)
        self._state = self._read_state()

    def entries(self) -> dict[Key, RecordEntry]:
        """Return the entry of every sample, indexed again if another process has changed a file."""
        state = self._read_state()
        if state != self._state:
            self._entries, self._state = {}, state
            for file, *_ in state:
                for offset, _, line in read_lines(file):
                    key = line["task"], line["sample_id"]
                    self._entries[key] = RecordEntry(file, offset, line.get("tokens", 0), line.get("part", ""))
            self._drop_missing_rows()
        return self._entries

    def ordered(self) -> list[tuple[Key, RecordEntry]]:
        """List the entries in the order of their lines: those of ``samples.jsonl``, then shard by shard."""

        def position(item: tuple[Key, RecordEntry]) -> tuple[bool, str, int]:
            entry = item[1]
            return entry.file != self.main, entry.file.name, entry.offset

        return sorted(self.entries().items(), key=position)

    def read(self, entries: Iterable[RecordEntry]) -> Iterator[bytes]:
        """Yield the lines of entries; a file stays open while consecutive entries are in it."""
        with ExitStack() as stack:
            open_file, name = None, None
            for entry in entries:
                if open_file is None or entry.file != name:
                    stack.close()
                    open_file, name = stack.enter_context(entry.file.open("rb")), entry.file
                open_file.seek(entry.offset)
                yield open_file.readline()

    def rewrite(self, entries: Mapping[Key, RecordEntry]) -> None:
        """Make these entries, in this order, the whole run, with all token rows in ``tokens.parquet``."""
        if not self.main.exists():
            return
        stale = self._token_files.keys("") - {key for key, entry in entries.items() if entry.tokens}
        if stale or any(entry.part for entry in entries.values()):
            self._token_files.merge([(key, entry.part) for key, entry in entries.items() if entry.tokens])
        written: dict[Key, RecordEntry] = {}
        offset = 0
        with replacing(self.main) as target:
            for (key, entry), line in zip(entries.items(), self.read(entries.values()), strict=True):
                if entry.part or entry.lost_rows:
                    values = {**json.loads(line), "tokens": entry.tokens}
                    values.pop("part", None)
                    line = encode_line(values)
                target.write(line)
                written[key] = RecordEntry(self.main, offset, entry.tokens, "")
                offset += len(line)
        self._own, self._entries, self._state = self.main, written, self._read_state()
        self._token_files.prune(())

    def repair(self) -> None:
        """Remove what a kill or a distributed run left: half-written last lines, shards, orphaned token parts."""
        self._own, self._state = self.main, None
        if self.main.exists():
            _truncate_broken_end(self.main)
        for shard in self._shard_files():  # parts keep their names; a kill in between duplicates lines at worst
            _truncate_broken_end(shard)
            with shard.open("rb") as source, self.main.open("ab") as target:
                shutil.copyfileobj(source, target)
            shard.unlink()
        self.stop_file.unlink(missing_ok=True)
        with suppress(OSError):  # there is none, or it holds files of others, such as .nfs or .DS_Store
            self.shards.rmdir()
        self._token_files.prune(entry.part for entry in self.entries().values() if entry.part)

    def _read_state(self) -> list[tuple[Path, int, int, int]]:
        """List the files to index, shards last, each with inode, size and time.

        These change when a file is written.

        A process of a distributed run indexes only ``samples.jsonl`` and its own shard.
        """
        files = [self.main, *(self._shard_files() if self._own == self.main else [self._own])]
        stats = [(file, os.stat(file)) for file in files if file.exists()]
        return [(file, stat.st_ino, stat.st_size, stat.st_mtime_ns) for file, stat in stats]

    def _shard_files(self) -> list[Path]:
        return sorted(self.shards.glob("samples-*.jsonl"))

    def _drop_missing_rows(self) -> None:
        """Set ``tokens`` of entries to 0 where their token rows are gone with the file that held them."""
        for part in {entry.part for entry in self._entries.values() if entry.tokens}:
            present = self._token_files.keys(part)
            for key, entry in self._entries.items():
                if entry.tokens and entry.part == part and key not in present:
                    self._entries[key] = entry.without_rows()


def _truncate_broken_end(file: Path) -> None:
    """Cut a half-written last line, which a kill leaves, off a file of records."""
    end = max((offset + length for offset, length, _ in read_lines(file)), default=0)
    if end < file.stat().st_size:
        os.truncate(file, end)
