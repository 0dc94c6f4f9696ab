"""Token rows on disk: made per answer, written in parts while a run goes on, merged into one file at its end."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stethoscope.records import Answer, Mention, Sample

if TYPE_CHECKING:
    import pandas as pd

Key = tuple[str, str]
"""Task name and sample id."""

ROWS_AT_ONCE = 50_000
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
    ]
)
"""Key columns (``stethoscope.table.KEY_COLUMNS`` explains them); float32 feature columns follow."""


def token_table(
    task: str, sample: Sample, answer: Answer, mentions: Sequence[Mention], features: Mapping[str, np.ndarray]
) -> pa.Table:
    """One row per answer token: key columns, then a column for every feature, each (T,).

    A token belongs to the first mention that shares a character with it.
    """
    count = len(answer.token_ids)
    owner: list[Mention | None] = [None] * count
    first = [False] * count
    for mention in mentions:
        covered = [index for index in answer.covering(mention.start, mention.end) if owner[index] is None]
        for index in covered:
            owner[index] = mention
        if covered:
            first[covered[0]] = True
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
    }
    arrays = [pa.array(columns[field.name], field.type) for field in SCHEMA]
    values = [pa.array(np.asarray(column, dtype=np.float32)) for column in features.values()]
    return pa.Table.from_arrays([*arrays, *values], names=[*SCHEMA.names, *features])


class TokenFiles:
    """``tokens.parquet`` and the parts ``tokens/part-*.parquet`` that have not been merged into it yet.

    A Parquet file cannot be appended to, hence the parts. Which file holds the valid rows of a sample is said by its
    record; rows that no record speaks for (a killed process, a sample done again) are left behind by the next merge.
    """

    def __init__(self, run_dir: Path) -> None:
        """Names the files in a run directory; nothing is read or written."""
        self.merged = run_dir / "tokens.parquet"
        self.folder = run_dir / "tokens"
        self._parts = 0

    def write(self, tables: Sequence[pa.Table]) -> str:
        """Writes the rows of some samples as one part and returns the part's name."""
        self.folder.mkdir(parents=True, exist_ok=True)
        while (path := self.folder / f"part-{self._parts:06d}.parquet").exists():
            self._parts += 1
        _write(path, [pa.concat_tables(tables, promote_options="default")])
        return path.name

    def keep(self, parts: Iterable[str]) -> None:
        """Deletes all parts but the named ones."""
        wanted = set(parts)
        for path in self.folder.glob("*"):
            if path.name not in wanted:
                path.unlink()
        if not wanted and self.folder.is_dir():
            self.folder.rmdir()

    def keys(self, part: str) -> set[Key]:
        """Whose rows a part holds; those of the merged file where ``part`` is empty."""
        path = self._path(part)
        if not path.is_file():
            return set()
        table = pq.read_table(path, columns=["task", "sample_id"])
        return set(zip(table["task"].to_pylist(), table["sample_id"].to_pylist(), strict=True))

    def merge(self, order: Sequence[tuple[Key, str]]) -> None:
        """Makes ``tokens.parquet`` anew from samples in this order, each with its part ("" for the merged file)."""
        if order:
            _write(self.merged, self._tables(order))
        else:
            self.merged.unlink(missing_ok=True)

    def frame(self, order: Sequence[tuple[Key, str]]) -> pd.DataFrame:
        """The rows of samples in this order, each with its part ("" for the merged file)."""
        return pa.concat_tables([SCHEMA.empty_table(), *self._tables(order)], promote_options="default").to_pandas()

    def _path(self, part: str) -> Path:
        return self.folder / part if part else self.merged

    def _tables(self, order: Sequence[tuple[Key, str]]) -> Iterator[pa.Table]:
        """Tables of about ``ROWS_AT_ONCE`` rows with the rows of samples in this order; no sample is split."""
        places = {part: self._places(part) for part in {part for _, part in order}}
        read = lru_cache(maxsize=4)(lambda part, row_group: pq.ParquetFile(self._path(part)).read_row_group(row_group))
        schema = pa.unify_schemas([SCHEMA, *(pq.read_schema(self._path(part)) for part in sorted(places))])
        slices: list[tuple[str, int, int, int]] = []
        for key, part in order:
            row_group, start, length = places[part][key]
            if slices and slices[-1][:2] == (part, row_group) and slices[-1][2] + slices[-1][3] == start:
                slices[-1] = (part, row_group, slices[-1][2], slices[-1][3] + length)
            else:
                slices.append((part, row_group, start, length))
        pending: list[pa.Table] = []
        for part, row_group, start, length in slices:
            pending.append(read(part, row_group).slice(start, length))
            if sum(map(len, pending)) >= ROWS_AT_ONCE:
                yield pa.concat_tables([schema.empty_table(), *pending], promote_options="default")
                pending = []
        if pending:
            yield pa.concat_tables([schema.empty_table(), *pending], promote_options="default")

    def _places(self, part: str) -> dict[Key, tuple[int, int, int]]:
        """Where each sample lies in a file: row group, first row within it, number of rows."""
        found: dict[Key, tuple[int, int, int]] = {}
        file = pq.ParquetFile(self._path(part))
        for row_group in range(file.num_row_groups):
            table = file.read_row_group(row_group, columns=["task", "sample_id"])
            for row, key in enumerate(zip(table["task"].to_pylist(), table["sample_id"].to_pylist(), strict=True)):
                _, start, length = found.get(key, (row_group, row, 0))
                found[key] = (row_group, start, length + 1)
        return found


def _write(path: Path, tables: Iterable[pa.Table]) -> None:
    """Writes tables as the row groups of one file that appears whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    writer: pq.ParquetWriter | None = None
    try:
        for table in tables:
            writer = writer or pq.ParquetWriter(temporary, table.schema, compression="zstd")
            writer.write_table(table, row_group_size=max(len(table), 1))
    finally:
        if writer is not None:
            writer.close()
    os.replace(temporary, path)
