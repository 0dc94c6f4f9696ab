"""Token rows on disk: made per answer, written in parts while a run goes on, merged into one file at its end."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stethoscope.core.files import damaged, open_regular, replacing
from stethoscope.core.types import Answer, Mention, Sample

if TYPE_CHECKING:
    import pandas as pd

Key = tuple[str, str]
"""Task name and sample id."""

ROWS_AT_ONCE = 50_000
_REMEDY = "delete it and run `stethoscope extract` again"
_NUMBERS = {"float", "double", "int32", "int64", "bool"}
_SEAL = b"CRC\0"  # before the checksum of a footer
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("task", "subset", "sample_id", "group")),
        *((name, pa.int32()) for name in ("token", "token_id")),
        ("text", pa.string()),
        *((name, pa.int32()) for name in ("start", "end")),
        ("label", pa.int8()),
        ("object", pa.string()),
        *((name, pa.int32()) for name in ("number", "repeat")),
        ("first", pa.bool_()),
        ("prompt_hash", pa.string()),
        ("labeller", pa.string()),
    ]
)
"""Key columns (``stethoscope.core.token_table.KEY_COLUMNS`` explains them); float32 feature columns follow."""


def token_table(
    task: str,
    sample: Sample,
    answer: Answer,
    mentions: Sequence[Mention],
    features: Mapping[str, np.ndarray],
    prompt: str = "",
    version: str = "",
) -> pa.Table:
    """One row per answer token: key columns, then a column for every feature, each (T,).

    A token belongs to the first mention that shares a character with it. ``prompt`` is the text that the model was
    asked with, ``version`` that of the task, which labelled the mentions.
    """
    count = len(answer.token_ids)
    owner = answer.owners(mentions)
    first = [mention is not None and mention not in owner[:index] for index, mention in enumerate(owner)]
    columns = {
        "task": [task] * count,
        "subset": [sample.subset] * count,
        "sample_id": [sample.id] * count,
        "group": [sample.group] * count,
        "token": range(count),
        "token_id": answer.token_ids,
        "text": answer.tokens,
        "start": [start for start, _ in answer.offsets],
        "end": [end for _, end in answer.offsets],
        "label": [mention.label if mention else -1 for mention in owner],
        "object": [mention.object if mention else "" for mention in owner],
        "number": [mention.number if mention else -1 for mention in owner],
        "repeat": [mention.repeat if mention else -1 for mention in owner],
        "first": first,
        "prompt_hash": [hashlib.sha256(prompt.encode()).hexdigest()[:16]] * count,
        "labeller": [f"{task}/{version}"] * count,
    }
    arrays = [pa.array(columns[field.name], field.type) for field in SCHEMA]
    values = [pa.array(np.asarray(column, dtype=np.float32)) for column in features.values()]
    return pa.Table.from_arrays([*arrays, *values], names=[*SCHEMA.names, *features])


class TokenFiles:
    """``tokens.parquet``, and the parts in ``tokens/`` that have not been merged into it yet.

    A Parquet file cannot be appended to, so every sitting of a run appends to an Arrow stream of its own, of which a
    kill can only damage the end. Which file holds the valid rows of a sample is said by its record; rows that no record
    speaks for (a kill, a sample done again) are left behind by the next merge.
    """

    def __init__(self, run_dir: Path) -> None:
        """Names the files in a run directory; nothing is read or written."""
        self.merged = run_dir / "tokens.parquet"
        self.folder = run_dir / "tokens"
        self.writer = ""  # begins the names of parts where several processes write
        self._part = ""
        self._writer: pa.RecordBatchStreamWriter | None = None
        self._sink: pa.OSFile | None = None
        self._schema: pa.Schema | None = None

    def write(self, tables: Sequence[pa.Table]) -> str:
        """Appends the rows of some samples to this sitting's part and returns the part's name."""
        table = pa.concat_tables(tables, promote_options="default")
        if self._writer is None or table.schema != self._schema:
            self.close()
            self.folder.mkdir(parents=True, exist_ok=True)
            numbers = [int(path.stem.rpartition("-")[2]) for path in self.folder.glob("part-*.arrow")]
            self._part = f"part-{self.writer}{max(numbers, default=-1) + 1:06d}.arrow"
            self._schema = table.schema
            self._sink = pa.OSFile(
                os.fsencode(self.folder / self._part), "wb"
            )  # writes through, as a record's line does
            self._writer = pa.ipc.new_stream(self._sink, self._schema)
        self._writer.write_table(table)
        return self._part

    def sync(self) -> None:
        """Puts what this sitting has appended on disk."""
        if self._sink is not None:
            self._sink.flush()
            with (self.folder / self._part).open("rb") as file:
                os.fsync(file.fileno())

    def close(self) -> None:
        """Ends this sitting's part; the next rows begin another one."""
        if self._writer is not None and self._sink is not None:
            self._writer.close()
            self._sink.close()
            self._writer = self._sink = None

    def keep(self, parts: Iterable[str]) -> None:
        """Deletes all parts but the named ones."""
        self.close()
        wanted = set(parts)
        for path in self.folder.glob("*"):
            if path.name not in wanted:
                path.unlink()
        if not wanted and self.folder.is_dir():
            self.folder.rmdir()

    def keys(self, part: str) -> set[Key]:
        """Whose rows a part holds; those of the merged file where ``part`` is empty."""
        return set(self._places(part))

    def merge(self, order: Sequence[tuple[Key, str]]) -> None:
        """Makes ``tokens.parquet`` anew from samples in this order, each with its part ("" for the merged file)."""
        if order:
            _write_parquet(self.merged, self._tables(order))
        else:
            self.merged.unlink(missing_ok=True)

    def frame(self, order: Sequence[tuple[Key, str]]) -> pd.DataFrame:
        """The rows of samples in this order, each with its part ("" for the merged file)."""
        return pa.concat_tables([SCHEMA.empty_table(), *self._tables(order)], promote_options="default").to_pandas()

    def _chunks(self, part: str, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The row groups of the merged file, or the batches of a part up to the place where a kill cut it off."""
        if not part:
            if os.path.lexists(self.merged):
                try:
                    file = _open_parquet(self.merged)
                    for group in range(file.num_row_groups):
                        yield file.read_row_group(group, columns=columns)
                except (pa.ArrowException, OSError, ValueError, KeyError) as error:
                    raise damaged(self.merged, str(error), _REMEDY) from None
        elif (self.folder / part).is_file():
            try:
                for batch in pa.ipc.open_stream(pa.memory_map(os.fsencode(self.folder / part))):
                    yield pa.Table.from_batches([batch]).select(columns or batch.schema.names)
            except (pa.ArrowInvalid, OSError):
                return

    def _places(self, part: str) -> dict[Key, tuple[int, int, int]]:
        """Where each sample lies in a file: chunk, first row within it, number of rows; the last chunk counts."""
        found: dict[Key, tuple[int, int, int]] = {}
        for chunk, table in enumerate(self._chunks(part, ["task", "sample_id"])):
            keys = zip(table["task"].to_pylist(), table["sample_id"].to_pylist(), strict=True)
            for row, key in enumerate(keys):
                before = found.get(key, (-1, 0, 0))
                start, length = before[1:] if before[0] == chunk else (row, 0)
                found[key] = (chunk, start, length + 1)
        return found

    def _tables(self, order: Sequence[tuple[Key, str]]) -> Iterator[pa.Table]:
        """Tables of about ``ROWS_AT_ONCE`` rows with the rows of samples in this order; no sample is split."""
        parts = sorted({part for _, part in order})
        places = {part: self._places(part) for part in parts}
        read = {part: _Chunks(self._chunks, part) for part in parts}
        schema = pa.unify_schemas([SCHEMA, *(read[part](0).schema for part in parts)])
        pending: list[pa.Table] = []
        rows = 0
        for part, chunk, start, length in _slices((part, *places[part][key]) for key, part in order):
            pending.append(read[part](chunk).slice(start, length))
            rows += length
            if rows >= ROWS_AT_ONCE:
                yield pa.concat_tables([schema.empty_table(), *pending], promote_options="default")
                pending, rows = [], 0
        if pending:
            yield pa.concat_tables([schema.empty_table(), *pending], promote_options="default")


class _Chunks:
    """Chunks of a file by number, read in order and again only when an earlier one is asked for."""

    def __init__(self, chunks: Callable[[str], Iterator[pa.Table]], part: str) -> None:
        self.chunks, self.part, self.at = chunks, part, -1

    def __call__(self, chunk: int) -> pa.Table:
        if chunk < self.at or self.at < 0:
            self.at, self.rest = -1, self.chunks(self.part)
        while self.at < chunk:
            self.table = next(self.rest)
            self.at += 1
        return self.table


def _slices(places: Iterable[tuple[str, int, int, int]]) -> Iterator[tuple[str, int, int, int]]:
    """Places (part, chunk, start, length), with those that follow each other in a file made one."""
    last: tuple[str, int, int, int] | None = None
    for part, chunk, start, length in places:
        if last is not None and last[:2] == (part, chunk) and last[2] + last[3] == start:
            last = (part, chunk, last[2], last[3] + length)
        else:
            if last is not None:
                yield last
            last = (part, chunk, start, length)
    if last is not None:
        yield last


def _write_parquet(path: Path, tables: Iterable[pa.Table]) -> None:
    """Writes tables as the row groups of one file that appears whole or not at all.

    Every page has its checksum, as Parquet knows it. The footer, which names the columns and says where their pages
    are, has none there: its own is put before it, where readers of Parquet do not look.
    """
    with replacing(path) as file:
        writer: pq.ParquetWriter | None = None
        for table in tables:
            writer = writer or pq.ParquetWriter(file, table.schema, compression="zstd", write_page_checksum=True)
            writer.write_table(table, row_group_size=max(len(table), 1))
        if writer is not None:
            writer.close()
            start, footer = _footer(file)
            file.seek(start)
            file.write(_SEAL + zlib.crc32(footer).to_bytes(4, "little") + footer)


def _footer(file: BinaryIO) -> tuple[int, bytes]:
    """Where the footer of a Parquet file starts, and all that follows."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - 8, 0))
    length = int.from_bytes(file.read(4), "little") + 8
    start = max(size - length, 0)
    file.seek(start)
    return start, file.read()


def _open_parquet(path: Path) -> pq.ParquetFile:
    """Opens a file whose footer is as it was written, if ``_write_parquet`` wrote it; its pages are checked as read.

    Raises:
        ValueError: the footer has changed.
    """
    with open_regular(path, _REMEDY) as file:
        start, footer = _footer(file)
        file.seek(max(start - 8, 0))
        seal = file.read(8)
    if seal[:4] == _SEAL and seal[4:] != zlib.crc32(footer).to_bytes(4, "little"):
        raise ValueError("the checksum of its footer does not match")
    parquet = pq.ParquetFile(pa.OSFile(os.fsencode(path)), page_checksum_verification=True)
    types = {field.name: str(field.type).removeprefix("large_") for field in parquet.schema_arrow}
    for field in SCHEMA:
        if types.get(field.name) != str(field.type):
            raise ValueError(f"column {field.name} should be {field.type}, not {types.get(field.name, 'missing')}")
    odd = [name for name, kind in types.items() if name not in SCHEMA.names and kind not in _NUMBERS]
    if odd:
        raise ValueError(f"column {odd[0]} should be float, not {types[odd[0]]}")
    return parquet
