"""Append, index and rewrite the records of a run: ``samples.jsonl``, and one shard per process of a distributed run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from stethoscope.core.files import append, replacing
from stethoscope.storage.records import Record, encode_line, read_lines
from stethoscope.storage.tokens import Key, TokenFiles


class RecordEntry(NamedTuple):
    """Position of a sample's last line, with the fields of it that the store needs.

    Attributes:
        file: ``samples.jsonl`` or a shard.
        offset: byte at which the line starts.
        tokens: number of its token rows.
        part: file in ``tokens/`` with these rows; empty for ``tokens.parquet``.
    """

    file: Path
    offset: int
    tokens: int
    part: str


class RecordFiles:
    """The record files of one run directory. Lines are only ever appended; the last line of a sample counts.

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
        with replacing(self.main) as target:
            for entry, line in zip(entries.values(), self.read(entries.values()), strict=True):
                if entry.part or not entry.tokens:
                    values = {**json.loads(line), "tokens": entry.tokens}
                    values.pop("part", None)
                    line = encode_line(values)
                target.write(line)
        self.repair()

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
        if self.shards.is_dir():
            self.shards.rmdir()
        self._token_files.prune(entry.part for entry in self.entries().values() if entry.part)

    def _read_state(self) -> list[tuple[Path, int, int, int]]:
        """List the files to index, shards last, each with inode, size and time, which change when it is written.

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
                    self._entries[key] = entry._replace(tokens=0, part="")


def _truncate_broken_end(file: Path) -> None:
    """Cut a half-written last line, which a kill leaves, off a file of records."""
    end = max((offset + length for offset, length, _ in read_lines(file)), default=0)
    if end < file.stat().st_size:
        os.truncate(file, end)
