"""Pictures and heat maps that a run directory keeps, so that they can be shown without the model and the data.

``maps.jsonl`` has a line for every traced answer that names an object: the picture, small, and one relevancy map for
every mention. Lines are only appended while a run goes on, the last one of a sample counts. Reading imports no torch.
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
from stethoscope.storage.records import lines
from stethoscope.storage.run_dir import MAPS

if TYPE_CHECKING:
    from PIL.Image import Image

    from stethoscope.core.types import Answer
    from stethoscope.storage.records import Record

MAX_SIDE = 2048  # pixels of a kept picture: a larger one is none of ours


@dataclass(frozen=True, eq=False)
class View:
    """What is kept of one sample.

    Attributes:
        picture: the picture, RGB, small; None where pictures are not kept.
        maps: by answer token (the first of a mention) its relevancy over the picture after the last layer, uint8
            (rows, columns), scaled to its own largest value.
    """

    picture: Image | None
    maps: Mapping[int, np.ndarray] = field(default_factory=dict)

    def overlay(self, token: int, width: int = 320) -> Image | None:
        """The picture under a token's heat map, at least ``width`` pixels wide; None where one of them is not kept."""
        if self.picture is None or token not in self.maps:
            return None
        return overlay(self.picture, self.maps[token].astype(float), width=width)


class MapFile:
    """Reads and writes ``maps.jsonl`` of one run directory."""

    def __init__(self, run_dir: str | os.PathLike) -> None:
        """Names the file; nothing is read or made."""
        self.path = Path(run_dir) / MAPS
        self._places: dict[tuple[str, str], int] = {}
        self._seen: tuple[int, int] | None = None

    def append(
        self, task: str, sample_id: str, answer: Answer, picture: Image | None, maps: Mapping[int, np.ndarray]
    ) -> None:
        """Adds a line.

        Args:
            task, sample_id: whose it is.
            answer: that the maps belong to.
            picture: small, or None.
            maps: uint8 (rows, columns), all of one shape, by answer token.
        """
        line = {
            "task": task,
            "sample_id": sample_id,
            "answer": _digest(answer),
            "picture": "" if picture is None else _text(_jpeg(picture)),
            "shape": list(next(iter(maps.values())).shape) if maps else [],
            "maps": {str(token): _text(values.tobytes()) for token, values in maps.items()},
        }
        text = json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        with self.path.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                text = text if file.read(1) == b"\n" else b"\n" + text  # a kill has cut the last line short
            file.write(text)  # at once, as several processes may write

    def find(self, record: Record) -> View | None:
        """What is kept of a record's sample; None where there is nothing, or it belongs to another answer.

        Raises:
            ArtefactError: the line is damaged.
        """
        at = self._index().get((record.task, record.sample_id))
        if at is None or record.answer is None:
            return None
        with open_regular(self.path) as file:
            file.seek(at)
            line = file.readline()
        try:
            found = json.loads(line)
            return _view(found) if found.get("answer") == _digest(record.answer) else None
        except (KeyError, TypeError, ValueError, AttributeError, DataError) as error:
            raise ArtefactError(
                f"{self.path}: what it holds of {record.sample_id} is damaged ({error}); the report does without the "
                "file if it is deleted"
            ) from None

    def compact(self) -> None:
        """Leaves out the lines that later ones have replaced."""
        if not self.path.is_file():
            return
        offsets = sorted(self._index().values())
        with self.path.open("rb") as source, replacing(self.path) as target:
            for offset in offsets:
                source.seek(offset)
                target.write(source.readline())

    def _index(self) -> dict[tuple[str, str], int]:
        """Where the last line of every sample begins, read again if the file has changed."""
        stat = self.path.stat() if self.path.is_file() else None
        state = None if stat is None else (stat.st_size, stat.st_mtime_ns)
        if state != self._seen:
            found = lines(self.path, strict=False) if state else ()  # a kill may have cut one off amid a run
            self._places = {(line["task"], line["sample_id"]): at for at, _, line in found}
            self._seen = state
        return self._places


def _digest(answer: Answer) -> str:
    return hashlib.sha256(repr((answer.text, answer.token_ids)).encode("utf-8", "backslashreplace")).hexdigest()[:16]


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _jpeg(picture: Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    return file.getvalue()


def _view(found: Mapping[str, Any]) -> View:
    picture = None
    if found["picture"]:
        data = base64.b64decode(found["picture"], validate=True)
        picture = read_image(data, "its picture", formats=("JPEG",), max_pixels=MAX_SIDE**2)
    shape = tuple(found["shape"])
    maps = {
        int(token): np.frombuffer(base64.b64decode(text, validate=True), np.uint8).reshape(shape)
        for token, text in found["maps"].items()
    }
    return View(picture, maps)
