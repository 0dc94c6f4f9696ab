"""Store small pictures and heat maps in a run, so that reports need no model and no data.

``maps.jsonl`` has a line for every traced answer that names an object: the picture, small, one map for every mention,
and what these maps show. Lines are only appended during a run, and the last line of a sample counts. Reading imports no
torch.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stethoscope.core.errors import ArtefactError, DataError
from stethoscope.core.files import open_regular, replacing
from stethoscope.core.images import read_image
from stethoscope.relevancy.heatmaps import overlay
from stethoscope.storage.records import read_lines
from stethoscope.storage.run_dir import MAPS

if TYPE_CHECKING:
    from PIL.Image import Image

    from stethoscope.core.types import Answer
    from stethoscope.storage.records import Record

MAX_SIDE = 2048  # pixels of a stored picture; a larger one was not written by us
RELEVANCY, ATTENTION = "relevancy", "attention"
CAPTIONS = {RELEVANCY: "what {} was written from", ATTENTION: "where {} attends"}
"""Captions of a mention's map, by what it shows."""
DESCRIPTIONS = {
    RELEVANCY: "what the name was written from: relevancy after the last layer",
    ATTENTION: "where the name attends: raw attention of its own position, of the layer in which that most exceeds the "
    "attention of the answer's other positions",
}
"""Explanations of the maps, by what they show."""


@dataclass(frozen=True, eq=False)
class SavedMedia:
    """The picture and heat maps stored for one sample.

    Attributes:
        picture: RGB, small; None where the run stores no pictures.
        maps: by answer token (the first of a mention) its map over the picture, uint8 (rows, columns), where 255 is the
            map's own maximum.
        shows: what the maps show, of ``CAPTIONS``.
    """

    picture: Image | None
    maps: Mapping[int, np.ndarray] = field(default_factory=dict)
    shows: str = RELEVANCY

    def overlay(self, token: int, width: int = 320) -> Image | None:
        """Draw a token's heat map over the picture; None where either is missing.

        It is at least ``width`` pixels wide.
        """
        if self.picture is None or token not in self.maps:
            return None
        return overlay(self.picture, self.maps[token].astype(float), width=width)


class HeatmapFile:
    """Reads and writes ``maps.jsonl`` of one run directory."""

    def __init__(self, run_dir: str | os.PathLike) -> None:
        """Name the file; nothing is read or created."""
        self.path = Path(run_dir) / MAPS
        self._lines: dict[tuple[str, str], tuple[int, int]] = {}
        self._state: tuple[int, int] | None = None

    def append(
        self,
        task: str,
        sample_id: str,
        answer: Answer,
        picture: Image | None,
        maps: Mapping[int, np.ndarray],
        shows: str = RELEVANCY,
    ) -> None:
        """Append a line.

        Args:
            task: name of the task.
            sample_id: of the sample.
            answer: that the maps belong to.
            picture: small, or None.
            maps: uint8 (rows, columns), all of one shape, by answer token.
            shows: what they show, of ``CAPTIONS``.
        """
        line = {
            "task": task,
            "sample_id": sample_id,
            "answer": _digest(answer),
            "picture": "" if picture is None else _base64(_jpeg(picture)),
            "shows": shows,
            "shape": list(next(iter(maps.values())).shape) if maps else [],
            "maps": {str(token): _base64(values.tobytes()) for token, values in maps.items()},
        }
        text = json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        with self.path.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                text = text if file.read(1) == b"\n" else b"\n" + text  # a kill has cut off the last line
            file.write(text)  # in one write, as several processes may append

    def find(self, record: Record) -> SavedMedia | None:
        """Read the media of a record's sample; None without a line, or where it belongs to another answer.

        Raises:
            ArtefactError: the line is damaged.
        """
        offset, length = self._index().get((record.task, record.sample_id), (0, 0))
        if not length or record.answer is None:
            return None
        with open_regular(self.path) as file:
            file.seek(offset)
            line = file.readline()
        try:
            values = json.loads(line)
            return _decode(values) if values.get("answer") == _digest(record.answer) else None
        except (KeyError, TypeError, ValueError, AttributeError, DataError) as error:
            raise ArtefactError(
                f"{self.path}: the line of {record.sample_id} is damaged ({error}); delete the file to report without "
                "pictures and heat maps"
            ) from None

    def compact(self) -> None:
        """Delete the lines that later ones have replaced."""
        if not self.path.is_file():
            return
        lines = sorted(self._index().values())
        if sum(length for _, length in lines) == self.path.stat().st_size:  # nothing has been replaced
            return
        with self.path.open("rb") as source, replacing(self.path) as target:
            for offset, _ in lines:
                source.seek(offset)
                target.write(source.readline())

    def _index(self) -> dict[tuple[str, str], tuple[int, int]]:
        """Return offset and length of every sample's last line, in bytes, read again if the file has changed."""
        stat = self.path.stat() if self.path.is_file() else None
        state = None if stat is None else (stat.st_size, stat.st_mtime_ns)
        if state != self._state:
            lines = read_lines(self.path, strict=False) if state else ()  # a kill may have cut off one in the middle
            self._lines = {(line["task"], line["sample_id"]): (offset, length) for offset, length, line in lines}
            self._state = state
        return self._lines


def _digest(answer: Answer) -> str:
    return hashlib.sha256(repr((answer.text, answer.token_ids)).encode("utf-8", "backslashreplace")).hexdigest()[:16]


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _jpeg(picture: Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    return file.getvalue()


def _decode(values: Mapping[str, Any]) -> SavedMedia:
    picture = None
    if values["picture"]:
        data = base64.b64decode(values["picture"], validate=True)
        picture = read_image(data, "its picture", formats=("JPEG",), max_pixels=MAX_SIDE**2)
    shape = tuple(values["shape"])
    if values["maps"] and not (len(shape) == 2 and all(type(side) is int and side > 0 for side in shape)):
        raise ValueError(f"a map of the shape {shape!r:.40}")
    maps = {
        int(token): np.frombuffer(base64.b64decode(text, validate=True), np.uint8).reshape(shape)
        for token, text in values["maps"].items()
    }
    shows = values.get("shows", RELEVANCY)  # which older files do not say
    if not isinstance(shows, str) or shows not in CAPTIONS:
        raise ValueError(f"maps that show {shows!r:.40}")
    return SavedMedia(picture, maps, shows)
