"""Callback hooks, in call order (``on_trace`` once per traced answer)::

    on_run_start
      on_task_start
        on_batch_start, on_trace ..., on_batch_end      for every batch
      on_task_end
    on_run_end                                          or on_exception, if anything before it failed

Exceptions raised by a callback abort the run; exceptions raised by a logger are only warned about.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from stethoscope.core.errors import CapabilityError, ConfigError, DataError
from stethoscope.core.files import jsonable
from stethoscope.core.text import console, wrap_streams
from stethoscope.loggers.base import TablePicture
from stethoscope.relevancy.heatmaps import heat, image_token_tiles, in_bytes, name_attention, raster, relevancy_tiles
from stethoscope.storage.saved_heatmaps import ATTENTION, MAX_SIDE, RELEVANCY, HeatmapFile
from stethoscope.tracing.token_spans import token_regions

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.console import Console

    from stethoscope.core.types import Sample
    from stethoscope.evaluation.results import TaskResults
    from stethoscope.evaluation.state import RunState
    from stethoscope.storage.records import Record
    from stethoscope.tracing.trace import Trace


class Callback:
    """Base of all callbacks: every hook is empty, override the ones you need.

    Attributes:
        first_only: call the hooks on the main process only. Otherwise every rank calls its own copy, with the samples
            that it owns; only the main process sees all samples in ``on_task_end``.
    """

    first_only: bool = False

    def on_run_start(self, run: RunState) -> None:
        """Act first, before task and model are set up."""

    def on_task_start(self, run: RunState) -> None:
        """Act when task and model are set up and the remaining samples are known."""

    def on_batch_start(self, run: RunState, samples: Sequence[Sample]) -> None:
        """Act before a batch is encoded."""

    def on_trace(self, run: RunState, sample: Sample, trace: Trace) -> None:
        """Act when an answer has been traced, before its features are computed."""

    def on_batch_end(self, run: RunState, records: Sequence[Record]) -> None:
        """Act when the records of a batch are on disk."""

    def on_task_end(self, run: RunState, results: TaskResults) -> None:
        """Act when the results are computed, stored and logged."""

    def on_run_end(self, run: RunState, results: TaskResults) -> None:
        """Act last, if nothing failed."""

    def on_exception(self, run: RunState, error: BaseException) -> None:
        """Act when an error or Ctrl-C ends the run, before it is raised again."""


class Progress(Callback):
    """Show a bar with count, rate, time left and failures; plain lines where the output is not a terminal."""

    first_only = True

    def __init__(self, every: float = 30.0) -> None:
        """Set the seconds between plain lines."""
        self.every = every
        self._bar: Any = None

    @cached_property
    def _console(self) -> Console:
        """The terminal as it is when the first line is written."""
        return console(stderr=True)

    def on_run_start(self, run: RunState) -> None:
        """Say what is done before the first sample."""
        self._say(f"{run.task.name}: reading the questions, loading {run.adapter.name} ...")

    def on_task_start(self, run: RunState) -> None:
        """Start the bar."""
        self._started = self._printed = time.monotonic()
        if self._console.is_terminal:
            self._start_bar(run)
        else:
            before = f", {run.resumed} of them need nothing more" if run.resumed else ""
            among = (
                f" for the first of {run.distributed.world_size} processes" if run.distributed.is_distributed else ""
            )
            self._say(f"{run.task.name}: {run.total} samples{among}{before}")

    def on_batch_end(self, run: RunState, records: Sequence[Record]) -> None:
        """Advance the bar."""
        if self._bar is not None:
            self._bar.update(self._line, completed=run.done, rate=self._rate(run), failed=_failed(run))
        elif time.monotonic() - self._printed >= self.every and run.done < run.total:
            self._printed = time.monotonic()
            left = _duration((run.total - run.done) / max(_speed(run, self._started), 1e-9))
            self._say(f"{run.task.name}: {run.done}/{run.total}, {self._rate(run)}, {left} left{_failed(run)}")

    def on_task_end(self, run: RunState, results: TaskResults) -> None:
        """End the bar."""
        if self._bar is None:
            seconds = _duration(time.monotonic() - self._started)
            rate = f", {self._rate(run)}" if run.done > run.resumed else ""
            self._say(f"{run.task.name}: {run.done}/{run.total} in {seconds}{rate}{_failed(run)}")
        self._stop()

    def on_exception(self, run: RunState, error: BaseException) -> None:
        """Restore the terminal."""
        self._stop()

    def _start_bar(self, run: RunState) -> None:
        from rich import progress

        self._bar = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[rate]}", markup=False),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[failed]}", style="red", markup=False),
            console=self._console,
        )
        self._line = self._bar.add_task(
            run.task.name, total=run.total, completed=run.done, rate="", failed=_failed(run)
        )
        self._bar.start()
        wrap_streams()  # the bar puts its own in the place of standard output, which would pass styles on

    def _stop(self) -> None:
        if self._bar is not None:
            bar, self._bar = self._bar, None
            bar.stop()

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _rate(self, run: RunState) -> str:
        return f"{_speed(run, self._started):.1f} samples/s"


class Timing(Callback):
    """Log how far a run is and its samples per second while it goes on, and the seconds of every stage at its end."""

    first_only = True

    def __init__(self, every: float = 1.0) -> None:
        """Set the seconds between points of the curve, so that logging stays cheap."""
        self.every = every

    def on_task_start(self, run: RunState) -> None:
        """Start the clock."""
        self._started = self._logged = time.monotonic()

    def on_batch_end(self, run: RunState, records: Sequence[Record]) -> None:
        """Log progress: share done (0 to 1), failed samples, samples per second of this session, minutes left."""
        now = time.monotonic()
        if now - self._logged >= self.every or run.done == run.total:
            self._logged = now
            speed = _speed(run, self._started)
            figures = {"share": run.done / run.total, "failed": float(run.failed), "samples_per_second": speed}
            if speed:
                figures["minutes_left"] = (run.total - run.done) / speed / 60
            run.log({f"progress/{name}": value for name, value in figures.items()}, step=run.done)

    def on_task_end(self, run: RunState, results: TaskResults) -> None:
        """Log seconds by stage and samples per second, over all sessions of the run."""
        total = sum(results.seconds.values())
        figures = {f"seconds/{stage}": seconds for stage, seconds in results.seconds.items()}
        if total:
            figures["seconds/samples_per_second"] = results.counts["samples"] / total
        run.log(figures)


class SampleTable(Callback):
    """Log the first answers of a task as a table, with their images where a logger shows them."""

    first_only = True

    COLUMNS = ("sample", "subset", "image", "question", "answer", "status", "detail")
    SIDE = 192  # pixels of an image's longer side

    def __init__(self, count: int = 32) -> None:
        """Set the number of answers to log."""
        self.count = count
        self._records: list[Record] = []

    def on_task_start(self, run: RunState) -> None:
        """Drop the records of the previous task."""
        self._records = []

    def on_batch_end(self, run: RunState, records: Sequence[Record]) -> None:
        """Collect the first records."""
        self._records.extend(records[: max(self.count - len(self._records), 0)])

    def on_task_end(self, run: RunState, results: TaskResults) -> None:
        """Log the table; a resumed run reads the records of its earlier sessions."""
        stored = run.store.records(run.task.name) if run.store is not None else self._records
        rows: list[list[Any]] = [
            [
                record.sample_id,
                record.subset,
                record.image,
                record.question,
                record.answer.text if record.answer else record.error,
                record.status,
                str(jsonable(record.score.detail)) if record.score else "",
            ]
            for record in islice(stored, self.count)
        ]
        columns, picture_count = list(self.COLUMNS), run.loggers.pictures
        if picture_count:
            columns.append("picture")
            samples = {sample.id: sample for sample in run.samples}
            for index, row in enumerate(rows):
                row.append(self._picture(samples.get(row[0])) if index < picture_count else None)
        run.loggers.log_table(f"{run.task.name}/samples", columns, rows)

    def _picture(self, sample: Sample | None) -> TablePicture | None:
        """Load a thumbnail of a sample's image; None where it cannot be read."""
        if sample is None:
            return None
        try:
            picture = sample.image.load()
        except DataError:  # a failed sample, which the table says
            return None
        return TablePicture(_thumbnail(picture, self.SIDE), sample.image.name)


class SaveHeatmaps(Callback):
    """Save thumbnails and a map of every mention: relevancy if the features read it, or else raw attention.

    No map costs a pass; without attention, or where neither image tokens nor patches form a grid, there are none.
    """

    def __init__(self, pictures: bool = True, side: int = 192, cells: int = 24) -> None:
        """Check the settings.

        Args:
            pictures: save thumbnails too, which take most of the space (about 10 kB each).
            side: pixels of a thumbnail's longer side.
            cells: largest number of cells along a map's longer side; maps of one tile with fewer are saved unchanged.

        Raises:
            ConfigError: ``side`` or ``cells`` is no whole number from 1 to ``MAX_SIDE``.
        """
        for name, value in (("side", side), ("cells", cells)):
            if type(value) is not int or not 1 <= value <= MAX_SIDE:
                raise ConfigError(f"callbacks.maps.{name}={value!r} should be a whole number from 1 to {MAX_SIDE}")
        self.pictures, self.side, self.cells = pictures, side, cells

    def on_trace(self, run: RunState, sample: Sample, trace: Trace) -> None:
        """Save the maps of one answer before its record is on disk, because maps without a record do no harm."""
        answer = trace.answer
        named = [answer.covering(mention.start, mention.end) for mention in run.task.label_mentions(sample, answer)]
        last_tokens = {tokens[0]: tokens[-1] for tokens in named if tokens}
        if run.store is None or not last_tokens:
            return
        try:
            picture = sample.image.load()
        except DataError:  # removed since the question was asked; the run goes on without its map
            return
        shows = ATTENTION if trace.relevancy is None else RELEVANCY
        maps = self._maps(run, trace, picture.size, dict(sorted(last_tokens.items())))
        if maps or self.pictures:
            small = _thumbnail(picture, self.side) if self.pictures else None
            HeatmapFile(run.store.run_dir).append(run.task.name, sample.id, answer, small, maps, shows)

    def on_task_end(self, run: RunState, results: TaskResults) -> None:
        """Remove the earlier maps of samples that were traced again."""
        if run.store is not None and run.distributed.is_main_process:
            HeatmapFile(run.store.run_dir).compact()

    def _maps(
        self, run: RunState, trace: Trace, size: tuple[int, int], last_tokens: Mapping[int, int]
    ) -> dict[int, np.ndarray]:  # fmt: skip
        """Compute uint8 maps by the first token of a mention, whose last one is given; none if there is no grid."""
        relevancy, attention, tokens = trace.relevancy, trace.image_attention, list(last_tokens)
        if relevancy is None and attention is None:
            return {}
        tiles = 0 if relevancy is None or relevancy.tiles is None else relevancy.tiles.shape[2]
        regions = token_regions(run.adapter, size, trace.spans, tiles)
        try:
            if relevancy is not None:
                values, boxes = relevancy_tiles(relevancy, regions, bool(regions.grids), (tokens, -1))
            elif attention is not None and regions.grids:
                named = name_attention(attention.numpy(), list(last_tokens.values()))
                values, boxes = image_token_tiles(named, regions)
            else:
                return {}
        except CapabilityError:
            return {}
        shape = raster(size, self.cells)
        if len(values) == 1 and max(values[0].shape[-2:]) <= self.cells and _covers_image(boxes[0], size):
            shape = values[0].shape[-2:]
        scaled, _ = in_bytes(heat(values, boxes, size, shape))
        return dict(zip(tokens, scaled, strict=True))


def _speed(run: RunState, started: float) -> float:
    """Compute the samples per second of this session, which started at a time of ``time.monotonic``."""
    return (run.done - run.resumed) / max(time.monotonic() - started, 1e-9)


def _failed(run: RunState) -> str:
    return f", {run.failed} failed" if run.failed else ""


def _thumbnail(picture: Image, side: int) -> Image:
    """Copy a picture, scaled down so that its longer side has at most ``side`` pixels."""
    copy = picture.copy()
    copy.thumbnail((side, side))
    return copy


def _duration(seconds: float) -> str:
    """Format a duration.

    >>> _duration(42), _duration(200), _duration(9000)
    ('42 s', '3 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _covers_image(box: Sequence[float] | None, size: tuple[int, int]) -> bool:
    """Decide whether a tile shows the whole image, to 1 % of its longer side."""
    edges = (0.0, 0.0, *size)
    return box is not None and all(abs(a - b) <= max(size) / 100 for a, b in zip(box, edges, strict=True))
