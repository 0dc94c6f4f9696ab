"""What can be hung into a run. Hooks are called in this order (``on_trace`` once per traced answer)::

    on_run_start
      on_task_start
        on_batch_start, on_trace ..., on_batch_end      for every batch
      on_task_end
    on_run_end                                          or on_exception, if anything before it failed

An error raised in a hook stops the run like any other: only loggers are forgiven.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from stethoscope.core.digests import jsonable
from stethoscope.core.errors import CapabilityError, ConfigError, DataError
from stethoscope.core.text import console, wrap_streams
from stethoscope.loggers.media import Picture
from stethoscope.relevancy.heatmaps import heat, raster, relevancy_tiles
from stethoscope.storage.saved_heatmaps import MAX_SIDE, HeatmapFile
from stethoscope.tracing.token_spans import token_regions

if TYPE_CHECKING:
    from stethoscope.core.types import Sample
    from stethoscope.evaluation.results import TaskResults
    from stethoscope.evaluation.state import RunState
    from stethoscope.storage.records import Record
    from stethoscope.tracing.trace import Trace


class Callback:
    """Base of all callbacks: every hook is empty, override the ones you need.

    Attributes:
        first_only: where several processes do a run, call it in the first one only. Otherwise each process calls its
            own copy, with the samples that fall to it; only the first one sees all of them in ``on_task_end``.
    """

    first_only: bool = False

    def on_run_start(self, run: RunState) -> None:
        """Called first, before task and model are set up."""

    def on_task_start(self, run: RunState) -> None:
        """Called when task and model are set up and it is known which samples are left to do."""

    def on_batch_start(self, run: RunState, samples: Sequence[Sample]) -> None:
        """Called before a batch is encoded."""

    def on_trace(self, run: RunState, sample: Sample, trace: Trace) -> None:
        """Called when an answer has been traced, before its features are computed."""

    def on_batch_end(self, run: RunState, records: Sequence[Record]) -> None:
        """Called when the records of a batch are on disk."""

    def on_task_end(self, run: RunState, results: TaskResults) -> None:
        """Called when the results are computed, stored and logged."""

    def on_run_end(self, run: RunState, results: TaskResults) -> None:
        """Called last, if nothing failed."""

    def on_exception(self, run: RunState, error: BaseException) -> None:
        """Called when an error or Ctrl-C ends the run, before it is raised again."""


class Progress(Callback):
    """A bar with count, rate, time left and failures; a plain line now and then where the output is not a terminal."""

    first_only = True

    def __init__(self, every: float = 30.0) -> None:
        """Stores how many seconds lie between plain lines."""
        self.every = every
        self._bar: Any = None

    def on_task_start(self, run: RunState) -> None:
        """Starts the bar."""
        self._console = console(stderr=True)
        self._started = self._said = time.monotonic()
        if self._console.is_terminal:
            self._start_bar(run)
        else:
            before = f", {run.resumed} of them need nothing more" if run.resumed else ""
            among = (
                f" for the first of {run.distributed.world_size} processes" if run.distributed.is_distributed else ""
            )
            self._say(f"{run.task.name}: {run.total} samples{among}{before}")

    def on_batch_end(self, run: RunState, records: Sequence[Record]) -> None:
        """Moves the bar on."""
        if self._bar is not None:
            self._bar.update(self._line, completed=run.done, rate=self._rate(run), failed=self._failed(run))
        elif time.monotonic() - self._said >= self.every and run.done < run.total:
            self._said = time.monotonic()
            left = (run.total - run.done) / max(self._speed(run), 1e-9)
            self._say(
                f"{run.task.name}: {run.done}/{run.total}, {self._rate(run)}, {_duration(left)} left{self._failed(run)}"
            )

    def on_task_end(self, run: RunState, results: TaskResults) -> None:
        """Ends the bar."""
        if self._bar is None:
            seconds = _duration(time.monotonic() - self._started)
            self._say(f"{run.task.name}: {run.done}/{run.total} in {seconds}, {self._rate(run)}{self._failed(run)}")
        self._stop()

    def on_exception(self, run: RunState, error: BaseException) -> None:
        """Leaves the terminal as it was."""
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
            run.task.name, total=run.total, completed=run.done, rate="", failed=self._failed(run)
        )
        self._bar.start()
        wrap_streams()  # the bar puts its own in the place of standard output, which would pass styles on

    def _stop(self) -> None:
        if self._bar is not None:
            bar, self._bar = self._bar, None
            bar.stop()

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _speed(self, run: RunState) -> float:
        return (run.done - run.resumed) / max(time.monotonic() - self._started, 1e-9)

    def _rate(self, run: RunState) -> str:
        return f"{self._speed(run):.1f} samples/s"

    def _failed(self, run: RunState) -> str:
        return f", {run.failed} failed" if run.failed else ""


class Timing(Callback):
    """Logs how fast samples are done while a run goes on, and at its end the seconds spent on every stage."""

    first_only = True

    def __init__(self, every: float = 1.0) -> None:
        """Stores how many seconds lie between points of the curve, which is thus never what costs the time."""
        self.every = every

    def on_task_start(self, run: RunState) -> None:
        """Starts the clock."""
        self._started = self._logged = time.monotonic()

    def on_batch_end(self, run: RunState, records: Sequence[Record]) -> None:
        """Logs the rate so far in this sitting."""
        now = time.monotonic()
        if now - self._logged >= self.every or run.done == run.total:
            self._logged = now
            seconds = max(now - self._started, 1e-9)
            run.log({"progress/samples_per_second": (run.done - run.resumed) / seconds}, step=run.done)

    def on_task_end(self, run: RunState, results: TaskResults) -> None:
        """Logs seconds by stage and the rate over all of them, including earlier sittings."""
        total = sum(results.seconds.values())
        figures = {f"seconds/{stage}": seconds for stage, seconds in results.seconds.items()}
        if total:
            figures["seconds/samples_per_second"] = results.counts["samples"] / total
        run.log(figures)


class SampleTable(Callback):
    """Logs the first answers of a task as a table, to look at; with their pictures where a logger shows them."""

    first_only = True

    COLUMNS = ("sample", "subset", "image", "question", "answer", "status", "detail")
    SIDE = 192  # pixels of a picture's longer side

    def __init__(self, count: int = 32) -> None:
        """Stores how many answers to log."""
        self.count = count
        self._records: list[Record] = []

    def on_task_start(self, run: RunState) -> None:
        """Forgets the task before."""
        self._records = []

    def on_batch_end(self, run: RunState, records: Sequence[Record]) -> None:
        """Keeps the first records."""
        self._records.extend(records[: max(self.count - len(self._records), 0)])

    def on_task_end(self, run: RunState, results: TaskResults) -> None:
        """Logs the table; a resumed run reads the records of its earlier sittings."""
        stored = run.store.records(run.task.name) if run.store is not None else self._records
        rows = [
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
        columns, wanted = list(self.COLUMNS), run.loggers.pictures
        if wanted:
            columns.append("picture")
            samples = {sample.id: sample for sample in run.samples}
            for number, row in enumerate(rows):
                row.append(self._picture(samples.get(row[0])) if number < wanted else None)
        run.loggers.log_table(f"{run.task.name}/samples", columns, rows)

    def _picture(self, sample: Sample | None) -> Picture | None:
        """The picture of a sample; None where there is none to be had."""
        try:
            image = None if sample is None else sample.image.load().copy()
        except DataError:  # a failed sample, which the table says
            return None
        if image is None:
            return None
        image.thumbnail((self.SIDE, self.SIDE))
        return Picture(image, sample.image.name)


class SaveHeatmaps(Callback):
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

    def on_trace(self, run: RunState, sample: Sample, trace: Trace) -> None:
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
            HeatmapFile(run.store.run_dir).append(run.task.name, sample.id, answer, small, maps)

    def on_task_end(self, run: RunState, results: TaskResults) -> None:
        """Removes what samples that were traced again have left behind."""
        if run.store is not None and run.distributed.is_main_process:
            HeatmapFile(run.store.run_dir).compact()

    def _maps(
        self, run: RunState, trace: Trace, size: tuple[int, int], tokens: Sequence[int]
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


def _duration(seconds: float) -> str:
    """A length of time for people.

    >>> _duration(42), _duration(200), _duration(9000)
    ('42 s', '3 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _whole(box: Sequence[float] | None, size: tuple[int, int]) -> bool:
    """Whether a tile shows all of the picture, to a hundredth of it."""
    edges = (0.0, 0.0, *map(float, size))
    return box is not None and bool(np.allclose(box, edges, atol=max(size) / 100))
