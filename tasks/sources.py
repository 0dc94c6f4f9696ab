"""Read a benchmark's questions and images from embedded scenes, published files or a data set on the hub.

Of a data set on the Hugging Face hub, or of a folder with the same layout, only the Parquet files in the data set
itself are read. Its card, which may name files elsewhere, and the other builders of ``datasets`` are ignored.
``datasets`` never decodes or fetches an image: images are bytes, or paths inside the data set, and are decoded by
``images.read_image``.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stethoscope.core.errors import ConfigError, DataError, first_line, unknown
from stethoscope.core.images import read_image
from stethoscope.core.json_rows import clipped
from stethoscope.core.types import ImageRef
from stethoscope.tasks.image_folder import Bounds, ImageFolder

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset
    from PIL.Image import Image

    from stethoscope.testbed import Scene

_SHARD = re.compile(r"(?P<split>.+)-(?P<index>\d{5,})-of-(?P<count>\d{5,})")
_OTHER_SPLITS = {"test", "validation", "valid", "val", "dev"}


# --- settings ---------------------------------------------------------------------------------------------------------


def check_choice(kind: str, value: str, known: Collection[str]) -> None:
    """Check that a setting has one of its values.

    Args:
        kind: what the setting chooses, such as ``parser of pope``.
        value: what was chosen.
        known: what there is.

    Raises:
        ConfigError: the value is not among them.
    """
    if value not in known:
        raise ConfigError(unknown(kind, str(value), known))


def check_choices(setting: str, kind: str, values: Sequence[str], known: Collection[str]) -> None:
    """Check that a setting is a list of some of its values, at least one.

    Args:
        setting: name of the setting, such as ``subsets``.
        kind: what each entry chooses, such as ``subset of pope``.
        values: what was chosen.
        known: what there is.

    Raises:
        ConfigError: it is empty or no list, or an entry is not known.
    """
    if isinstance(values, str) or not values:
        raise ConfigError(f"task.{setting}={values!r} should be a list of {', '.join(known)}")
    for value in values:
        check_choice(kind, value, known)


def check_name(name: str | int) -> str:
    """Return the name of a task, which also names files.

    Raises:
        ConfigError: it is empty, or has other characters than letters, digits, - and _.
    """
    if not str(name).replace("_", "").replace("-", "").isalnum():
        raise ConfigError(f"task.name={name!r} should be letters, digits, - and _")
    return str(name)


def check_positive(**settings: int) -> None:
    """Check that settings are whole numbers of at least 1.

    Raises:
        ConfigError: one of them is not.

    >>> check_positive(scenes=1)
    """
    for name, value in settings.items():
        if type(value) is not int or value < 1:
            raise ConfigError(f"task.{name}={value!r} should be a whole number of at least 1")


def check_flags(**settings: object) -> None:
    """Check that settings are true or false; the text "false" would count as true.

    Raises:
        ConfigError: one of them is something else.

    >>> check_flags(text_only=False)
    """
    for name, value in settings.items():
        if not isinstance(value, bool):
            raise ConfigError(f"task.{name}={value!r} should be true or false")


def check_unused(origins: dict[Any, str], id_: Hashable, origin: str, shown: str = "") -> None:
    """Check that no earlier row has this id, and record where it is used.

    Args:
        origins: of the earlier rows by id; changed in place.
        id_: of the row.
        origin: its file and line.
        shown: the id in messages; ``id`` and the id by default.

    Raises:
        DataError: it is used before.

    >>> check_unused({}, 7, "line 1")
    """
    if id_ in origins:
        raise DataError(f"{origin}: {shown or f'id {clipped(id_)}'} is used before, in {origins[id_]}")
    origins[id_] = origin


def check_paths(task: str, paths: Mapping[str, tuple[str | None, str]], others: Collection[str] = ()) -> None:
    """Check that the paths are given that a task cannot do without.

    Args:
        task: name of the task.
        paths: by name of the setting its value, and what it should be.
        others: sources that need no path.

    Raises:
        ConfigError: a path is missing; the message describes each of them.
    """
    if not all(path for path, _ in paths.values()):
        needed = ", and ".join(f"task.{name}, {description}" for name, (_, description) in paths.items())
        hint = f"; or choose {' or '.join(f'task.source={kind}' for kind in others)}" if others else ""
        raise ConfigError(f"{task} needs {needed}{hint}")


def setting_path(path: str | None) -> Path:
    """Return the path of a setting that ``check_paths`` has accepted, with ``~`` expanded.

    Raises:
        ConfigError: it is missing.
    """
    if path is None:
        raise ConfigError("the path of the task's data is missing; see the task's file in conf/task")
    return Path(path).expanduser()


# --- sources ----------------------------------------------------------------------------------------------------------


class SourceRow(NamedTuple):
    """A question, or an image to describe, as read from a source.

    Attributes:
        values: fields of the row by name.
        image: its image.
        origin: file and line, or data set and row, for messages.
    """

    values: Mapping[str, Any]
    image: ImageRef
    origin: str


class DataSource:
    """The source that a benchmark is read from.

    Args:
        task: name of the task, for messages.
        kind: the chosen one of ``readers``: ``testbed``, ``files`` or ``hub``.
        readers: by kind, what yields the rows of that source; only the chosen one is ever called.
        paths: of ``files``, the settings that it needs, as for ``check_paths``.

    Raises:
        ConfigError: the kind is not known, or a path is missing.
    """

    def __init__(
        self,
        task: str,
        kind: str,
        readers: Mapping[str, Callable[[], Iterator[SourceRow]]],
        paths: Mapping[str, tuple[str | None, str]] | None = None,
    ) -> None:
        check_choice(f"source of {task}", kind, readers)
        if kind == "files":
            check_paths(task, paths or {}, [other for other in readers if other != "files"])
        self.rows = readers[kind]


def scene_image(scene: Scene) -> ImageRef:
    """Return the image of an embedded scene, which is rendered when it is needed."""
    return ImageRef(f"{scene.id}.png", scene.image)


@dataclass(frozen=True)
class HubSource:
    """A data set of Parquet files on the hub, or in a folder.

    Attributes:
        dataset: ``owner/name`` on the hub, or a local folder with the same Parquet files.
        split: part of the data set, such as ``test``, after which its files are named.
        revision: branch, tag or commit; None for the newest.
        local_files_only: use what the hub cache holds and never the network.
        folder: one folder of the data set's files, such as that of a configuration; empty for all of them.
        image: column of the images.

    Raises:
        ConfigError: ``local_files_only`` is neither true nor false.
    """

    dataset: str
    split: str
    revision: str | None = None
    local_files_only: bool = False
    folder: str = ""
    image: str = "image"

    def __post_init__(self) -> None:
        check_flags(local_files_only=self.local_files_only)

    def rows(
        self, columns: Iterable[str], image_name: Callable[[Mapping[str, Any]], str] | None
    ) -> Iterator[SourceRow]:
        """Yield the rows of the data set.

        Args:
            columns: columns that it must have beside that of the images.
            image_name: gives the name of a row's image; None to call it after its content, so that rows with the same
                picture are known to share it.

        Raises:
            DataError: as ``load_columns``.
        """
        images, rows = load_columns(self, (*columns, self.image))
        names = images.content_names() if image_name is None else map(image_name, rows)
        for index, (row, name) in enumerate(zip(rows, names, strict=True)):
            yield SourceRow(row, images.ref(index, name), f"data set {self.dataset!r}, row {index}")


# --- Parquet files of a data set --------------------------------------------------------------------------------------


class ImageColumn:
    """The column of images of a data set, whose cells are read one by one."""

    def __init__(self, data: Dataset, source: HubSource, folder: Path) -> None:
        """Check what the column holds, without decoding any picture.

        Args:
            data: data set with the source's column of images.
            source: what it was loaded from.
            folder: where its files are, in which paths are resolved.

        Raises:
            DataError: the column holds neither bytes nor paths, several pictures in a cell, or a path that is not in
                the data set.
        """
        self._column = source.image
        self._data = data.select_columns(self._column).with_format("arrow")
        self._name = f"data set {source.dataset!r}"
        self._files: dict[int, ImageRef] = {}
        kind = data.data.schema.field(self._column).type
        if not _is_image_type(kind):
            raise DataError(
                f"{self._name}: the column {self._column!r} holds {clipped(kind)}; the bytes of image files were "
                "expected, paths inside the data set, or a struct of both as `datasets` writes it"
            )
        paths = self._paths()
        if any(path is not None for path in paths):
            images = ImageFolder(folder, may_be_empty=True)
            for index, path in enumerate(paths):
                if path is not None:
                    self._files[index] = images.find(path, f"{self._name}, row {index}")

    def _paths(self) -> list[str | None]:
        """Return the path of every cell that has no bytes; None for those that have."""
        import pyarrow as pa
        import pyarrow.compute as pc

        paths: list[str | None] = []
        for column in self._chunks():
            if _is_list(column.type):
                for row, length in enumerate(pc.list_value_length(column).to_pylist(), len(paths)):
                    if length != 1:
                        should = f"{self._column!r} should be one picture, not {length or 0}"
                        raise DataError(f"{self._name}, row {row}: {should}")
                column = column.flatten()
            if pa.types.is_struct(column.type):
                names = {field.name for field in column.type}
                data = pc.struct_field(column, "bytes") if "bytes" in names else pa.nulls(len(column))
                path = pc.struct_field(column, "path") if "path" in names else pa.nulls(len(column))
                column = pc.if_else(pc.is_null(data), path, pa.scalar(None, path.type))
            paths += column.to_pylist() if _is_text(column.type) else [None] * len(column)
        return paths

    def _chunks(self) -> Iterator[pa.Array]:
        """Yield the cells of the column, some at a time."""
        for batch in self._data.iter(batch_size=1000):
            yield from batch[self._column].chunks

    def content_names(self) -> Iterator[str]:
        """Yield a name for every cell: the path of one that has no bytes, else a digest of its bytes."""
        for index in range(len(self._data)):
            file = self._files.get(index)
            yield file.name if file else hashlib.sha256(self._bytes(index) or b"").hexdigest()[:24]

    def _bytes(self, index: int) -> bytes | None:
        cell = self._data[index : index + 1][self._column][0].as_py()
        cell = cell[0] if isinstance(cell, list) else cell
        return cell.get("bytes") if isinstance(cell, dict) else cell

    def ref(self, index: int, name: str) -> ImageRef:
        """Return the image of one row, which is decoded when it is needed.

        Args:
            index: row number from 0.
            name: what to call it.
        """
        file = self._files.get(index)
        return ImageRef(name, partial(self._decode, index, name) if file is None else file.source, index)

    def _decode(self, index: int, name: str) -> Image:
        data = self._bytes(index)
        if data is None:
            raise DataError(f"image {name!r} (row {index}) is missing from the data set")
        return read_image(data, f"image {name!r} (row {index})")


def _is_list(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return kind in (pa.string(), pa.large_string())


def _is_image_type(kind: pa.DataType) -> bool:
    """Tell whether cells of an Arrow type may be pictures: bytes, paths, a struct of these, or a list of one such."""
    import pyarrow as pa

    if _is_list(kind):
        kind = kind.value_type
    data_types = (pa.binary(), pa.large_binary())
    if pa.types.is_struct(kind):
        fields = {field.name: field.type for field in kind}
        data, path = fields.get("bytes", pa.null()), fields.get("path", pa.null())
        return (data in data_types and (path == pa.null() or _is_text(path))) or (data == pa.null() and _is_text(path))
    return _is_text(kind) or kind in data_types


def load_columns(source: HubSource, columns: Iterable[str]) -> tuple[ImageColumn, list[dict[str, Any]]]:
    """Load a data set: its images, which are read row by row, and its other columns as plain rows.

    Args:
        source: where it is.
        columns: columns that it must have, that of the images among them.

    Returns:
        The images, and one dict per row without the image; class labels are given by name.

    Raises:
        DataError: it cannot be found or loaded, is empty, or lacks a column; its images are of no form that is read.
    """
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    columns, name = tuple(columns), f"data set {source.dataset!r}, split {source.split!r},"
    split = re.split(r"[\[+]", source.split)[0]
    try:
        folder = _folder(source, split)
        files = [glob.escape(os.fspath(file)) for file in split_files(folder, split)]
        data = datasets.load_dataset("parquet", data_files={split: files}, split=source.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError, HfHubHTTPError, DataError) as error:
        raise DataError(f"{name} cannot be loaded: {first_line(error)}") from None
    for column in columns:
        if column not in data.column_names:
            there = ", ".join(map(clipped, data.column_names))
            raise DataError(f"data set {source.dataset!r} has no column {column!r}; there are: {there}")
    if not len(data):
        raise DataError(f"{name} has no row")
    others = data.select_columns([column for column in columns if column != source.image])
    labels = {key: kind.names for key, kind in others.features.items() if isinstance(kind, datasets.ClassLabel)}
    rows = others.to_list()
    for row in rows:
        row.update({key: names[row[key]] for key, names in labels.items() if row[key] in range(len(names))})
    return ImageColumn(data, source, folder), rows


def _folder(source: HubSource, split: str) -> Path:
    """Fetch the Parquet files of a split; return their folder, the data set's own or that of the hub cache."""
    root = Path(source.dataset).expanduser()
    if not root.is_dir():
        inside = f"{glob.escape(source.folder)}/*" if source.folder else "*"
        root = _download(source, f"{inside}{glob.escape(split)}*.parquet")
        if split == "train" and not any(root.rglob("*train*.parquet")):  # its files may have any name
            root = _download(source, f"{inside}.parquet")
    if not Bounds(root).holds(source.folder) or not (root / source.folder).is_dir():
        raise DataError(f"{source.folder!r} is no folder in it")
    return root / source.folder


def _download(source: HubSource, pattern: str) -> Path:
    """Fetch the files of a data set on the hub that match a pattern; return their folder in the hub cache."""
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            source.dataset,
            repo_type="dataset",
            revision=source.revision,
            local_files_only=source.local_files_only,
            allow_patterns=[pattern],
        )
    )


def split_files(folder: Path, split: str) -> list[Path]:
    """List the Parquet files of a split, in the order of their names.

    A file belongs to a split if its name starts with it (``test.parquet``, ``test-00000-of-00002.parquet``) or its
    folder has that name. Where no file name mentions any split, all files are ``train``.

    Raises:
        DataError: there are none, some are missing, or they lie in several folders.
    """
    bounds = Bounds(folder)
    names = {}
    for file in sorted(folder.rglob("*.parquet")):
        relative = file.relative_to(folder)
        if not any(part.startswith(".") for part in relative.parts) and bounds.holds(relative.as_posix()):
            shard = _SHARD.fullmatch(file.stem)
            names[file] = (shard["split"] if shard else file.stem), shard
    files = [file for file, (name, _) in names.items() if split in (name, *file.relative_to(folder).parts[-2:-1])]
    if not files and split == "train" and _OTHER_SPLITS.isdisjoint(name for name, _ in names.values()):
        files = list(names)
    if not files:
        there = clipped(", ".join(file.relative_to(folder).as_posix() for file in names)) or "none"
        raise DataError(f"no Parquet file inside {folder} is called after it; there are: {there}")
    parents = sorted({file.parent for file in files})
    if len(parents) > 1 and folder / "data" in parents:  # the default of the hub, beside other configurations
        parents = [folder / "data"]
    if len(parents) > 1:
        raise DataError(f"its files are in several folders, {clipped(', '.join(map(str, parents)))}; name one of them")
    files = [file for file in files if file.parent == parents[0]]
    shards = [shard for file in files if (shard := names[file][1])]
    counts = {int(shard["count"]) for shard in shards}
    if counts and sum(counts) != len(shards):
        raise DataError(f"{len(shards)} of {sum(counts)} files are in {parents[0]}: {clipped(files[0].name)} ...")
    return files
