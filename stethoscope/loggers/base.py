"""Define the contract of loggers, several loggers at once, and media for the cells of their tables."""

from __future__ import annotations

import importlib.util
import math
import queue
import secrets
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stethoscope.core.digests import jsonable
from stethoscope.core.errors import ConfigError
from stethoscope.core.text import redact, redact_text

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, eq=False)
class TablePicture:
    """A picture in a table.

    Attributes:
        image: RGB, at the size to show.
        caption: text under the image.
    """

    image: Image = field(repr=False)
    caption: str


@dataclass(frozen=True)
class Marked:
    """Text with highlights in a table.

    Attributes:
        html: HTML, with escaped texts.
        text: the same as plain text.
    """

    html: str
    text: str


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> tuple[list[str], list[list[Any]]]:
    """Convert marked text in a table to plain text, and drop columns of pictures.

    >>> plain_table(["object", "answer"], [[1, Marked("<b>dog</b>", "dog")]])
    (['object', 'answer'], [[1, 'dog']])
    """
    shown = [index for index in range(len(columns)) if not any(isinstance(row[index], TablePicture) for row in rows)]
    cells = [[row[index].text if isinstance(row[index], Marked) else row[index] for index in shown] for row in rows]
    return [columns[index] for index in shown], cells


def flat_settings(settings: Mapping[str, Any], parent: str = "") -> dict[str, str | int | float | bool]:
    """Flatten nested settings to one level of dotted names; lists, and None, become text.

    >>> flat_settings({"model": {"dtype": "float16", "pad": None}, "sets": ["fast", "full"], "limit": 8})
    {'model.dtype': 'float16', 'model.pad': 'None', 'sets': "['fast', 'full']", 'limit': 8}
    """
    flat: dict[str, str | int | float | bool] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flat_settings(value, f"{parent}{name}.")
        else:
            flat[f"{parent}{name}"] = value if isinstance(value, (str, int, float, bool)) else str(value)
    return flat


def curve_picture(name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Image:
    """Draw curves as a line plot, for loggers without one of their own.

    Args:
        name: of the plot; what follows the last ``/`` is its title.
        columns: titles of x, of y, and of the column of the curves' names.
        rows: (points, 3) x, y and the name of a curve; points without x or y are left out.

    Returns:
        RGB, 640 x 480 pixels.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(6.4, 4.8), dpi=100)
    canvas, axes = FigureCanvasAgg(figure), figure.add_subplot()
    for curve in dict.fromkeys(row[2] for row in rows):
        points = [row[:2] for row in rows if row[2] == curve and None not in row[:2]]
        axes.plot([x for x, _ in points], [y for _, y in points], label=str(curve))
    axes.set(xlabel=columns[0], ylabel=columns[1], title=name.rpartition("/")[2].replace("_", " "))
    if rows:
        axes.legend()
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def check_limits(pictures: int, patience: float | None = None) -> None:
    """Check the settings that loggers with pictures and with a thread of their own share.

    Args:
        pictures: maximum number of samples, and of mentions, to log with their pictures.
        patience: seconds that a finished run waits for the logger; None for one that works at once.

    Raises:
        ConfigError: ``pictures`` is below 0, or ``patience`` not above 0.
    """
    if pictures < 0:
        raise ConfigError(f"logger.pictures={pictures} should be at least 0")
    if patience is not None and patience <= 0:
        raise ConfigError(f"logger.patience={patience} should be above 0")


def check_installed(module: str, extra: str) -> None:
    """Check, without importing it, that the package of a logger is installed.

    Args:
        module: top-level name of the package.
        extra: of this distribution that installs it, and name of the logger.

    Raises:
        ConfigError: it is not.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:  # a folder of that name without code, as of a logger's own files
        raise ConfigError(f'logger={extra} needs the package {module}: pip install "lvlm-stethoscope[{extra}]"')


def as_labels(tags: Sequence[str] | str | None) -> tuple[str, ...]:
    """Convert the setting ``tags`` to labels: none, a single one, or several.

    >>> as_labels(None), as_labels("pope"), as_labels(["pope", 7])
    ((), ('pope',), ('pope', '7'))
    """
    return () if tags is None else (tags,) if isinstance(tags, str) else tuple(map(str, tags))


def stored_id(file: Path, new: str = "") -> tuple[str, bool]:
    """Read the id under which a run directory is known to a logger; create it at first use.

    Args:
        file: that holds it.
        new: the id to store if there is none yet; empty for a random one of 8 hexadecimal digits.

    Returns:
        The id, and whether it was there already.
    """
    if file.is_file():
        return file.read_text(encoding="utf-8").strip(), True
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{new or secrets.token_hex(4)}\n", encoding="utf-8")
    return file.read_text(encoding="utf-8").strip(), False


class Logger:
    """Destination of a run's metrics. Constructors only store and check; every method may do nothing.

    Attributes:
        media: whether it can show pictures, curves and files; if not, its tables are converted to plain text.
        pictures: maximum number of samples, and of mentions, to log with their pictures.
        patience: None for a quick logger. One that talks to a service sets the seconds that it gets to finish at the
            end of a run, and works in a thread of its own, so that no run waits for it.
    """

    media: bool = False
    pictures: int = 0
    patience: float | None = None

    def setup(self, run_dir: Path | None) -> None:
        """Start logging, with the run directory if there is one; does nothing the second time."""

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Log nested settings, added to earlier ones."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log named metrics; ``step`` is the number of samples for a point of a curve, None for a final metric."""

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a small table; with ``media``, cells may be a ``TablePicture`` or ``Marked`` text."""

    def log_curve(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log points of curves: the columns are x, y and the curve's name. Only called with ``media``."""

    def log_folder(self, name: str, kind: str, folder: Path, notes: Mapping[str, Any]) -> None:
        """Log a folder as a version of ``name``, with JSON-able notes. Only called with ``media``."""

    def finalize(self, status: str) -> None:
        """Finish logging; ``status`` is ``finished``, ``failed`` or ``interrupted``."""


class Loggers(Logger):
    """Several loggers as one. A logger that fails or hangs causes one warning and never stops the run.

    The creator calls ``finalize``; the evaluator does so only when a run fails, as more runs may be logged to the same
    loggers.
    """

    def __init__(self, loggers: Iterable[Logger] = (), settings: Mapping[str, Any] | None = None) -> None:
        """Combine loggers; ``setup`` adds ``events.jsonl`` where there is a run directory.

        Args:
            loggers: to combine.
            settings: of the whole run, logged when the loggers are first set up.
        """
        self.loggers = list(loggers)
        self._run_settings = settings
        self._settings: dict[str, Any] = {}
        self._warned: set[int] = set()
        self._threads: dict[int, Background] = {}

    def setup(self, run_dir: Path | None) -> None:
        """Set up every logger, and ``events.jsonl`` if no logger writes it yet."""
        # here, as that module imports the contract from this one
        from stethoscope.loggers.file_loggers import JsonLogger

        if run_dir is not None and not any(isinstance(logger, JsonLogger) for logger in self.loggers):
            self.loggers.insert(0, JsonLogger())
        self._call_all("setup", run_dir)
        settings, self._run_settings = self._run_settings, None
        if settings is not None:
            self.log_config(settings)

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Send settings to every logger, with secrets masked; sections logged before are completed, not replaced."""
        new = redact(jsonable(config))
        self._settings = _merged(self._settings, new)
        self._call_all("log_config", {name: self._settings[name] for name in new})

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Send metrics to every logger, without undefined ones (NaN)."""
        defined = {name: float(value) for name, value in metrics.items() if value is not None and math.isfinite(value)}
        self._call_all("log_metrics", defined, step)

    @property
    def media(self) -> bool:  # type: ignore[override]  # computed here, stored by a single logger
        """Whether any logger can show pictures, curves and files."""
        return any(logger.media for logger in self.loggers)

    @property
    def pictures(self) -> int:  # type: ignore[override]  # as ``media``
        """Largest number of pictures of any logger."""
        return max((logger.pictures for logger in self.loggers if logger.media), default=0)

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Send a table to every logger, as plain text to those that cannot show media."""
        cells = [[cell if isinstance(cell, (TablePicture, Marked)) else jsonable(cell) for cell in row] for row in rows]
        for logger in self.loggers:
            table = (list(columns), cells) if logger.media else plain_table(columns, cells)
            self._call(logger, "log_table", name, *table)

    def log_curve(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Send curves to the loggers that can show them."""
        self._call_with_media("log_curve", name, list(columns), [[jsonable(cell) for cell in row] for row in rows])

    def log_folder(self, name: str, kind: str, folder: Path, notes: Mapping[str, Any]) -> None:
        """Send a folder to the loggers that store files, with secrets in its notes masked."""
        self._call_with_media("log_folder", name, kind, folder, redact(jsonable(notes)))

    def finalize(self, status: str) -> None:
        """Finish every logger; wait for slow ones, which work at the same time, as long as their patience lasts."""
        self._call_all("finalize", status)
        for logger in self.loggers:
            if logger.patience is not None and id(logger) in self._threads:
                try:
                    self._threads[id(logger)].wait(logger.patience)
                except TimeoutError as error:
                    self._warn(logger, "finalize", error)
                self._report_errors(logger)

    def _call_with_media(self, method: str, *arguments: Any) -> None:
        for logger in self.loggers:
            if logger.media:
                self._call(logger, method, *arguments)

    def _call_all(self, method: str, *arguments: Any) -> None:
        for logger in self.loggers:
            self._call(logger, method, *arguments)

    def _call(self, logger: Logger, method: str, *arguments: Any) -> None:
        try:
            if logger.patience is None:
                getattr(logger, method)(*arguments)
            else:
                self._threads.setdefault(id(logger), Background(logger)).send(method, *arguments)
                self._report_errors(logger)
        except Exception as error:
            self._warn(logger, method, error)

    def _report_errors(self, logger: Logger) -> None:
        """Warn of errors in a logger's own thread."""
        while (failure := self._threads[id(logger)].error()) is not None:
            self._warn(logger, *failure)

    def _warn(self, logger: Logger, method: str, error: Exception) -> None:
        if id(logger) not in self._warned:
            self._warned.add(id(logger))
            name, reason = type(logger).__name__, redact_text(str(error)) or type(error).__name__
            warnings.warn(f"{name}.{method} failed, the run goes on without it: {reason}", stacklevel=5)


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested settings; of two plain values the new one counts."""
    both = {
        name: _merged(old[name], value) if isinstance(value, Mapping) and isinstance(old.get(name), Mapping) else value
        for name, value in new.items()
    }
    return {**old, **both}


MAX_WAITING = 10_000
"""Maximum number of waiting calls; a service with a longer queue is taken to be dead."""


class Background:
    """Calls the methods of one object, one after the other, in a thread.

    The thread does not keep the process alive. Errors of a method are stored for ``error``, and later calls are still
    made.
    """

    def __init__(self, target: object) -> None:
        """Store the object; the thread starts with the first call."""
        self._target = target
        self._calls: queue.Queue[tuple[str, tuple[Any, ...]] | None] = queue.Queue(MAX_WAITING)
        self._errors: queue.SimpleQueue[tuple[str, Exception]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._given_up = False

    def send(self, method: str, *arguments: Any) -> None:
        """Queue the call of a method; it is dropped if the object has been given up.

        Args:
            method: name of the method.
            arguments: of the call.

        Raises:
            TimeoutError: too many calls are waiting; the object is given up.
        """
        if self._given_up:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=type(self._target).__name__, daemon=True)
            self._thread.start()
        try:
            self._calls.put_nowait((method, arguments))
        except queue.Full:
            self._given_up = True
            raise TimeoutError(f"{MAX_WAITING} calls are waiting") from None

    def wait(self, seconds: float) -> None:
        """Wait until all calls have been made; the next ``send`` starts a new thread.

        Raises:
            TimeoutError: it takes more than ``seconds``; the object is given up.
        """
        if self._thread is None or self._given_up:
            return
        self._calls.put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._given_up = True
            raise TimeoutError(f"not done within {seconds:g} s")
        self._thread = None

    def error(self) -> tuple[str, Exception] | None:
        """Return the name and error of the next method that failed; None without one."""
        try:
            return self._errors.get_nowait()
        except queue.Empty:
            return None

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            method, arguments = call
            try:
                getattr(self._target, method)(*arguments)
            except Exception as error:
                self._errors.put((method, error))
