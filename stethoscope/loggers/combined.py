"""Send everything to several loggers at once, to slow ones in a thread of their own."""

from __future__ import annotations

import math
import queue
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stethoscope.core.files import jsonable
from stethoscope.core.redaction import redact, redact_text
from stethoscope.loggers.base import Logger, Marked, TablePicture, plain_table
from stethoscope.loggers.file_loggers import JsonLogger


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
        if run_dir is not None and not any(isinstance(logger, JsonLogger) for logger in self.loggers):
            self.loggers.insert(0, JsonLogger())
        self._call_all("setup", run_dir)
        settings, self._run_settings = self._run_settings, None
        if settings is not None:
            self.log_config(settings)

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Send settings to every logger, with secrets masked.

        Sections that were logged before are completed, not replaced.
        """
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
        """Finish every logger; wait for slow ones as long as their patience lasts.

        Slow ones work at the same time.
        """
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
