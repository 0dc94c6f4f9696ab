"""Store token rows: built per answer, appended during a run, merged at its end."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stethoscope.core.files import damaged, open_regular, replacing
from stethoscope.core.types import Answer, Mention, Sample, required
from stethoscope.features.registry import TokenColumns, without_vectors
from stethoscope.features.relevancy import image_tokens

if TYPE_CHECKING:
    import pandas as pd

    from stethoscope.tracing.trace import Trace

Key = tuple[str, str]
"""Task name and sample id."""

ROWS_AT_ONCE = 25_000
_BUFFER = 2**20  # bytes of rows on their way to a part
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
        *((name, pa.int32()) for name in ("mention_index", "repeat_index")),
        ("is_first_subtoken", pa.bool_()),
        ("prompt_hash", pa.string()),
        ("labeller", pa.string()),
        ("picture", pa.string()),
        ("image_tokens", pa.string()),
    ]
)
"""Key columns, explained by ``stethoscope.core.token_table.KEY_COLUMNS``; float32 feature columns follow."""
OPTIONAL = frozenset({"picture", "image_tokens"})
"""Key columns that tables of older versions lack."""
_PACKED, _NAMES = "values", b"names"  # column of all features of a token, and their names in its metadata


class TokenRows(NamedTuple):
    """The answer to a sample, with what its token rows are built from.

    Attributes:
        sample: that was answered.
        answer: with T tokens.
        owners: T labelled mentions that the tokens belong to, see ``Answer.owners``; None for no mention.
        features: (T,) values by name.
        prompt: in the model's chat format; its digest tells prompts apart.
        picture: profile of the picture as text.
        image_tokens: of the picture as text (``pack_vectors``).
    """

    sample: Sample
    answer: Answer
    owners: Sequence[Mention | None]
    features: TokenColumns
    prompt: str = ""
    picture: str = ""
    image_tokens: str = ""

    @classmethod
    def of_trace(
        cls,
        sample: Sample,
        trace: Trace,
        mentions: Sequence[Mention],
        columns: Mapping[str, np.ndarray],
        prompt: str = "",
        picture: str = "",
    ) -> TokenRows:
        """Collect what the rows of a traced answer are built from.

        Tokens that name nothing lose their vectors.

        Args:
            sample: that was answered.
            trace: of the answer.
            mentions: labelled objects that the answer names.
            columns: (T,) features of the trace by column name.
            prompt: in the model's chat format.
            picture: profile of the picture as text.
        """
        owners = trace.answer.owners(mentions)
        features = without_vectors(columns, [mention is not None for mention in owners])
        tokens = image_tokens(trace, features.names)
        return cls(sample, trace.answer, owners, features, prompt, picture, tokens)

    def frame(self, task: str, version: str = "") -> pd.DataFrame:
        """Build the T token rows of a task's answer as a table in pandas; ``version`` is that of the task."""
        return as_frame(unpacked(token_tables(task, [self], version)[0]))


def token_tables(task: str, answers: Sequence[TokenRows], version: str = "") -> list[pa.Table]:
    """Build the token rows of several answers, with all features of a token in one column.

    ``unpacked`` splits it.

    There may be a thousand features, and what Arrow does with a few rows takes as long as there are columns.

    Args:
        task: name of the task.
        answers: with their samples, mentions and features.
        version: of the task, which labelled the mentions.
    """
    features = [item.features for item in answers]
    if len({part.names for part in features}) > 1:
        return [token_tables(task, [item], version)[0] for item in answers]
    columns: dict[str, list[Any]] = {field.name: [] for field in SCHEMA}
    for item in answers:
        for name, values in _keys(task, item, version).items():
            columns[name] += values
    arrays = [pa.array(columns[field.name], field.type) for field in SCHEMA]
    schema = _packed_schema(features[0].names)
    if features[0].names:
        matrix = np.concatenate([part.matrix.T.reshape(-1) for part in features])
        arrays.append(pa.FixedSizeListArray.from_arrays(matrix, type=schema.field(_PACKED).type))
    table = pa.Table.from_arrays(arrays, schema=schema)
    counts = [len(item.answer.token_ids) for item in answers]
    return [table.slice(start, count) for start, count in zip(accumulate(counts, initial=0), counts, strict=False)]


def unpacked(table: pa.Table) -> pa.Table:
    """Split the features of token rows into a column each; a table with such columns stays as it is."""
    names = _packed_names(table.schema)
    if not names:
        return table
    matrix, start = np.empty((len(names), len(table)), np.float32), 0
    for chunk in table[_PACKED].chunks:
        matrix[:, start : start + len(chunk)] = chunk.flatten().to_numpy().reshape(len(chunk), len(names)).T
        start += len(chunk)
    flat = pa.array(matrix.reshape(-1))
    columns = [flat.slice(index * len(table), len(table)) for index in range(len(names))]
    keys = table.drop_columns([_PACKED]).columns
    return pa.Table.from_arrays([*keys, *columns], schema=_unpacked_schema(table.schema))


def as_frame(table: pa.Table) -> pd.DataFrame:
    """Convert token rows to pandas, with the image tokens of an answer in all of its rows."""
    import pandas as pd

    frame = table.to_pandas()
    stored = frame[frame["image_tokens"].fillna("") != ""]
    tokens = dict(zip(zip(stored["task"], stored["sample_id"], strict=True), stored["image_tokens"], strict=True))
    answers = zip(frame["task"], frame["sample_id"], strict=True)
    if tokens:  # shared by the rows of an answer, which a column of text would copy
        values = [tokens.get(answer, "") for answer in answers]
        frame["image_tokens"] = pd.Series(values, frame.index, dtype=object)
    return frame


def _packed_names(schema: pa.Schema) -> tuple[str, ...]:
    """Return the names of the features in the packed column; none without one."""
    index = schema.get_field_index(_PACKED)
    if index < 0 or not pa.types.is_fixed_size_list(schema.field(index).type):
        return ()
    return tuple(schema.field(index).metadata[_NAMES].decode().split("\n"))


def _unpacked_schema(schema: pa.Schema) -> pa.Schema:
    """Return the schema of the same rows ``unpacked``."""
    names = _packed_names(schema)
    keys = [field for field in schema if field.name != _PACKED]
    return pa.schema([*keys, *((name, pa.float32()) for name in names)]) if names else schema


def _keys(task: str, item: TokenRows, version: str) -> dict[str, list[Any]]:
    """Return the values of the key columns by name."""
    sample, answer = item.sample, item.answer
    count, owners = len(answer.token_ids), item.owners
    first = {mention: token for token, mention in reversed(list(enumerate(owners))) if mention}
    return {
        "task": [task] * count,
        "subset": [sample.subset] * count,
        "sample_id": [sample.id] * count,
        "group": [sample.group] * count,
        "token": list(range(count)),
        "token_id": list(answer.token_ids),
        "text": list(answer.tokens),
        "start": [start for start, _ in answer.offsets],
        "end": [end for _, end in answer.offsets],
        "label": [mention.label if mention else -1 for mention in owners],
        "object": [mention.object if mention else "" for mention in owners],
        "mention_index": [mention.mention_index if mention else -1 for mention in owners],
        "repeat_index": [mention.repeat_index if mention else -1 for mention in owners],
        "is_first_subtoken": [bool(mention and first[mention] == token) for token, mention in enumerate(owners)],
        "prompt_hash": [hashlib.sha256(item.prompt.encode()).hexdigest()[:16]] * count,
        "labeller": [f"{task}/{version}"] * count,
        "picture": [item.picture] * count,
        "image_tokens": [item.image_tokens if token == 0 else "" for token in range(count)],
    }


@lru_cache(maxsize=16)
def _packed_schema(names: tuple[str, ...]) -> pa.Schema:
    """Return the schema of token rows with features of these names in one column."""
    packed = pa.field(_PACKED, pa.list_(pa.float32(), len(names)), metadata={_NAMES: "\n".join(names)})
    return pa.schema([*SCHEMA, packed]) if names else SCHEMA


class TokenFiles:
    """Reads and writes ``tokens.parquet`` and the parts that are not merged into it yet.

    A Parquet file cannot be appended to, so every session of a run appends to an Arrow stream of its own, of which a
    kill can only damage the end. A sample's record names the file that holds its valid rows; the next merge leaves out
    rows that no record names (after a kill, or when a sample was answered again).
    """

    def __init__(self, run_dir: Path) -> None:
        """Name the files in a run directory; nothing is read or written."""
        self.merged = run_dir / "tokens.parquet"
        self.folder = run_dir / "tokens"
        self.part_prefix = ""  # in the names of parts, unique to each of several writing processes
        self._part = ""
        self._writer: pa.RecordBatchStreamWriter | None = None
        self._sink: pa.BufferedOutputStream | None = None
        self._schema: pa.Schema | None = None

    def append(self, tables: Sequence[pa.Table]) -> str:
        """Append the rows of some samples to this session's part; return the part's name."""
        same = all(table.schema.equals(tables[0].schema, check_metadata=True) for table in tables)
        # under one schema it takes a tenth of the time
        table = pa.concat_tables(
            tables if same else map(unpacked, tables), promote_options="none" if same else "default"
        )
        if self._schema is None or self._writer is None or not table.schema.equals(self._schema, check_metadata=True):
            self.close()
            self.folder.mkdir(parents=True, exist_ok=True)
            numbers = [int(path.stem.rpartition("-")[2]) for path in self.folder.glob("part-*.arrow")]
            self._part = f"part-{self.part_prefix}{max(numbers, default=-1) + 1:06d}.arrow"
            self._schema = table.schema
            file = pa.OSFile(os.fsencode(self.folder / self._part), "wb")
            self._sink = pa.BufferedOutputStream(file, _BUFFER)  # else every column is written by itself
            self._writer = pa.ipc.new_stream(self._sink, self._schema)
        self._writer.write_table(table.combine_chunks())  # one batch, not one for every sample
        required(self._sink).flush()
        return self._part

    def sync(self) -> None:
        """Wait until the rows of this session would survive a power cut."""
        if self._sink is not None:
            with (self.folder / self._part).open("rb") as file:
                os.fsync(file.fileno())

    def close(self) -> None:
        """Close this session's part; the next rows start another one."""
        if self._writer is not None and self._sink is not None:
            self._writer.close()
            self._sink.close()
            self._writer = self._sink = None

    def prune(self, used: Iterable[str]) -> None:
        """Delete all parts but the used ones."""
        self.close()
        names = set(used)
        for path in self.folder.glob("*"):
            if path.name not in names:
                path.unlink()
        if not names and self.folder.is_dir():
            self.folder.rmdir()

    def keys(self, part: str) -> set[Key]:
        """Return the samples whose rows are in a part, or in the merged file where ``part`` is empty."""
        return set(self._locate_samples(part))

    def merge(self, order: Sequence[tuple[Key, str]]) -> None:
        """Rewrite ``tokens.parquet`` from samples in this order, each with its part ("" for the merged file)."""
        if order:
            _write_parquet(self.merged, self._tables(order))
        else:
            self.merged.unlink(missing_ok=True)

    def frame(self, order: Sequence[tuple[Key, str]]) -> pd.DataFrame:
        """Read the rows of samples in this order, each with its part ("" for the merged file)."""
        return as_frame(pa.concat_tables([SCHEMA.empty_table(), *self._tables(order)], promote_options="default"))

    def _chunks(self, part: str, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Yield the row groups of the merged file, or the batches of a part until a kill cut it off."""
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
                    batch.validate(full=True)  # Arrow trusts offsets: wrong ones read memory beyond the file
                    yield pa.Table.from_batches([batch]).select(columns or batch.schema.names)
            except (pa.ArrowException, OSError, ValueError, KeyError):
                return

    def _locate_samples(self, part: str) -> dict[Key, tuple[int, int, int]]:
        """Map each sample of a file to its chunk, first row and number of rows.

        Of several chunks the last counts.
        """
        locations: dict[Key, tuple[int, int, int]] = {}
        for chunk, table in enumerate(self._chunks(part, ["task", "sample_id"])):
            keys = zip(table["task"].to_pylist(), table["sample_id"].to_pylist(), strict=True)
            for row, key in enumerate(keys):
                last_chunk, start, length = locations.get(key, (-1, 0, 0))
                if last_chunk != chunk:
                    start, length = row, 0
                locations[key] = (chunk, start, length + 1)
        return locations

    def _tables(self, order: Sequence[tuple[Key, str]]) -> Iterator[pa.Table]:
        """Yield the rows of samples in this order, in tables of about ``ROWS_AT_ONCE`` rows.

        No sample is split.
        """
        parts = sorted({part for _, part in order})
        locations = {part: self._locate_samples(part) for part in parts}
        readers = {part: _ChunkReader(self._chunks, part) for part in parts}
        schema = pa.unify_schemas([SCHEMA, *(_unpacked_schema(readers[part].read(0).schema) for part in parts)])
        pending: list[pa.Table] = []
        rows = 0
        for part, chunk, start, length in _join_adjacent((part, *locations[part][key]) for key, part in order):
            pending.append(readers[part].read(chunk).slice(start, length))
            rows += length
            if rows >= ROWS_AT_ONCE:
                yield _joined(schema, pending)
                pending, rows = [], 0
        if pending:
            yield _joined(schema, pending)


def _joined(schema: pa.Schema, tables: Sequence[pa.Table]) -> pa.Table:
    """Join token rows under a schema of unpacked features, which are missing where a table lacks them."""
    groups = (list(group) for _, group in groupby(tables, key=lambda table: _packed_names(table.schema)))
    parts = [unpacked(pa.concat_tables(group, promote_options="default")) for group in groups]
    if len(parts) == 1 and parts[0].schema.equals(schema):  # as in most runs: an empty table of a thousand columns
        return parts[0]  # takes as long as writing them
    return pa.concat_tables([schema.empty_table(), *parts], promote_options="default")


class _ChunkReader:
    """Reads chunks of a file by index, in one pass as long as the indices grow."""

    def __init__(self, chunks: Callable[[str], Iterator[pa.Table]], part: str) -> None:
        self._chunks, self._part, self._index = chunks, part, -1

    def read(self, index: int) -> pa.Table:
        """Read one chunk."""
        if index < self._index or self._index < 0:
            self._index, self._remaining = -1, self._chunks(self._part)
        while self._index < index:
            self._table = next(self._remaining)
            self._index += 1
        return self._table


def _join_adjacent(slices: Iterable[tuple[str, int, int, int]]) -> Iterator[tuple[str, int, int, int]]:
    """Join slices (part, chunk, first row, number of rows) that follow each other in a file."""
    last: tuple[str, int, int, int] | None = None
    for part, chunk, start, length in slices:
        if last is not None and last[:2] == (part, chunk) and last[2] + last[3] == start:
            last = (part, chunk, last[2], last[3] + length)
        else:
            if last is not None:
                yield last
            last = (part, chunk, start, length)
    if last is not None:
        yield last


def _write_parquet(path: Path, tables: Iterable[pa.Table]) -> None:
    """Write tables as the row groups of one file that appears whole or not at all.

    Every page has a checksum, as Parquet defines it. The format has none for the footer, which lists columns and page
    offsets, so ours is written in front of it, where Parquet readers do not look.
    """
    with replacing(path) as file:
        writer: pq.ParquetWriter | None = None
        for table in tables:
            # hardly a feature has a value twice: a dictionary of values takes half the time and a third of the file;
            # with snappy it is a fifth larger than with zstd, in half the time
            keys = [name for name in table.schema.names if name in SCHEMA.names]
            writer = writer or pq.ParquetWriter(
                file,
                table.schema,
                compression="snappy",
                use_dictionary=keys,
                write_statistics=keys,
                write_page_checksum=True,
            )
            writer.write_table(table, row_group_size=max(len(table), 1))
        if writer is not None:
            writer.close()
            start, footer = _footer(file)
            file.seek(start)
            file.write(_SEAL + zlib.crc32(footer).to_bytes(4, "little") + footer)


def _footer(file: BinaryIO) -> tuple[int, bytes]:
    """Return the offset of a Parquet file's footer, and the bytes from there on."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - 8, 0))
    length = int.from_bytes(file.read(4), "little") + 8
    start = max(size - length, 0)
    file.seek(start)
    return start, file.read()


def _open_parquet(path: Path) -> pq.ParquetFile:
    """Open a file after checking its footer, if ``_write_parquet`` wrote it.

    Pages are checked when they are read.

    Raises:
        ValueError: the footer has changed, or a column has another type.
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
        if field.name in OPTIONAL and field.name not in types:
            continue
        if types.get(field.name) != str(field.type):
            raise ValueError(f"column {field.name} should be {field.type}, not {types.get(field.name, 'missing')}")
    wrong = [name for name, kind in types.items() if name not in SCHEMA.names and kind not in _NUMBERS]
    if wrong:
        raise ValueError(f"column {wrong[0]} should be float, not {types[wrong[0]]}")
    return parquet
