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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stethoscope.core.errors import ArtefactError, CapabilityError, ConfigError, DataError
from stethoscope.core.files import open_regular, replacing
from stethoscope.core.images import read_image
from stethoscope.evaluation.callbacks import Callback
from stethoscope.relevancy.heatmaps import heat, overlay, raster, relevancy_tiles
from stethoscope.storage.records import lines
from stethoscope.storage.run_dir import MAPS
from stethoscope.tracing.token_spans import token_regions

if TYPE_CHECKING:
    from PIL.Image import Image

    from stethoscope.core.types import Answer, Sample
    from stethoscope.evaluation.results import TaskResults
    from stethoscope.evaluation.state import Run
    from stethoscope.storage.records import Record
    from stethoscope.tracing.types import Trace

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


class KeepMaps(Callback):
    """Keeps small pictures, and the relevancy maps of all mentions where the features need relevancy anyway."""

    def __init__(self, pictures: bool = True, side: int = 192, cells: int = 24) -> None:
        """Stores the settings.

        Args:
            pictures: keep the pictures too; they are most of what is kept (about 10 kB each).
            side: pixels of a kept picture's longer side.
            cells: of a kept map's longer side, at most; maps of one tile with fewer are kept as they are.

        Raises:
            ConfigError: a number is below 1 or above ``MAX_SIDE``.
        """
        for name, value in (("side", side), ("cells", cells)):
            if not 1 <= value <= MAX_SIDE:
                raise ConfigError(f"callbacks.maps.{name}={value} should be at least 1 and at most {MAX_SIDE}")
        self.pictures, self.side, self.cells = pictures, side, cells

    def on_trace(self, run: Run, sample: Sample, trace: Trace) -> None:
        """Keeps what belongs to one answer, before its record is on disk: maps without a record do no harm."""
        answer = trace.answer
        covering = [answer.covering(one.start, one.end)[:1] for one in run.task.mentions(sample, answer)]
        tokens = sorted({token for some in covering for token in some})
        if run.store is None or not tokens:
            return
        try:
            picture = sample.image.load()
        except DataError:  # gone since the question was asked: the run needs it no more, and nor do we
            return
        maps = self._maps(run, trace, picture.size, tokens)
        if maps or self.pictures:
            small = picture.copy() if self.pictures else None
            if small is not None:
                small.thumbnail((self.side, self.side))
            MapFile(run.store.run_dir).append(run.task.name, sample.id, answer, small, maps)

    def on_task_end(self, run: Run, results: TaskResults) -> None:
        """Removes what samples that were traced again have left behind."""
        if run.store is not None and run.processes.first:
            MapFile(run.store.run_dir).compact()

    def _maps(
        self, run: Run, trace: Trace, size: tuple[int, int], tokens: Sequence[int]
    ) -> dict[int, np.ndarray]:  # fmt: skip
        """uint8 maps of some tokens; none where there is no relevancy, or it has no place in the picture."""
        relevancy = trace.relevancy
        if relevancy is None:
            return {}
        tiles = 0 if relevancy.tiles is None else relevancy.tiles.shape[2]
        where = token_regions(run.adapter, size, trace.spans, tiles)
        try:
            values, boxes = relevancy_tiles(relevancy, where, bool(where.grids), (list(tokens), -1))
        except CapabilityError:
            return {}
        shape = raster(size, self.cells)
        if len(values) == 1 and max(values[0].shape[-2:]) <= self.cells and _whole(boxes[0], size):
            shape = values[0].shape[-2:]
        found = heat(values, boxes, size, shape)
        top = found.max((-2, -1), keepdims=True)
        scaled = np.rint(255 * found / np.where(top > 0, top, 1)).astype(np.uint8)
        return dict(zip(tokens, scaled, strict=True))


def _whole(box: Sequence[float] | None, size: tuple[int, int]) -> bool:
    """Whether a tile shows all of the picture, to a hundredth of it."""
    edges = (0.0, 0.0, *map(float, size))
    return box is not None and bool(np.allclose(box, edges, atol=max(size) / 100))
