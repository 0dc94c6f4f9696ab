"""Benchmarks from the Hugging Face hub, or from a folder laid out like one, through ``datasets``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stethoscope.errors import DataError
from stethoscope.records import ImageRef

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image


@dataclass(frozen=True)
class HubSource:
    """Where a data set is.

    Attributes:
        dataset: ``owner/name`` on the hub, or a local folder with the same files.
        split: part of the data set, such as ``test``.
        revision: branch, tag or commit; None for the newest.
        local_files_only: use what the hub cache holds and never the network.
    """

    dataset: str
    split: str
    revision: str | None = None
    local_files_only: bool = False


def load(source: HubSource, columns: Iterable[str]) -> tuple[Dataset, list[dict[str, Any]]]:
    """A data set whose images are read row by row, and its other columns as plain rows.

    Args:
        source: where it is.
        columns: columns that it must have, ``image`` among them.

    Returns:
        The data set (for :func:`image`), and one dict per row without the image.

    Raises:
        DataError: it cannot be found or loaded, is empty, or lacks a column.
    """
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    try:
        data = datasets.load_dataset(_place(source), split=source.split, revision=source.revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError, HfHubHTTPError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"data set {source.dataset!r}, split {source.split!r}, cannot be loaded: {reason}") from None
    for column in columns:
        if column not in data.column_names:
            there = ", ".join(data.column_names)
            raise DataError(f"data set {source.dataset!r} has no column {column!r}; there are: {there}")
    if not len(data):
        raise DataError(f"data set {source.dataset!r}, split {source.split!r}, has no row")
    return data, data.remove_columns("image").to_list()


def _place(source: HubSource) -> str:
    """What ``load_dataset`` is given: the name, or the folder of the hub cache where the files already are.

    The folder is asked for because ``load_dataset`` forgets the revision when it finds the hub out of reach.
    """
    if not source.local_files_only or Path(source.dataset).is_dir():
        return source.dataset
    from huggingface_hub import snapshot_download

    return snapshot_download(source.dataset, repo_type="dataset", revision=source.revision, local_files_only=True)


def image(data: Dataset, index: int, name: str) -> ImageRef:
    """The image of one row, decoded when it is needed.

    Args:
        data: data set with a column ``image`` of PIL images.
        index: row number from 0.
        name: what to call it.
    """
    return ImageRef(name, partial(_decode, data, index, name))


def _decode(data: Dataset, index: int, name: str) -> Image:
    try:
        found = data[index]["image"]
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"image {name!r} (row {index}) cannot be read: {error}") from None
    if found is None:
        raise DataError(f"image {name!r} (row {index}) is missing from the data set")
    return found
