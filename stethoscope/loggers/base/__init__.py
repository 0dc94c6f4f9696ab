"""Where the figures of a run go: a file of events always, Weights & Biases if wanted. A logger never stops a run."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stethoscope.core.digests import jsonable
from stethoscope.core.errors import ConfigError, unknown
from stethoscope.core.files import unshare
from stethoscope.core.text import redact
from stethoscope.loggers.background import Background
from stethoscope.loggers.media import Marked, Picture, plain

MODES = ("offline", "online", "disabled")


_STAGE = "WANDB_DATA_DIR"  # W&B's variable


_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_.-]+")  # of W&B artifacts


class Logger:
    """A place for figures. Constructors only store and check; every method may do nothing.

    Attributes:
        media: it can show pictures, curves and files; without, tables come to it in plain words.
        pictures: how many samples or mentions it wants to show with their pictures, at most.
        patience: None for one that is quick. One that talks to a service works in a thread of its own, so that no run
            waits for it; at the end it gets so many seconds to finish.
    """

    media = False
    pictures = 0
    patience: float | None = None

    def setup(self, run_dir: Path | None) -> None:
        """Called before anything is logged, with the run directory if there is one; does nothing the second time."""

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Called with nested settings; what is there already is added to."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Called with named figures; ``step`` counts samples where figures form a curve, None for final ones."""

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Called with a small table; with ``media``, cells may be a ``Picture`` or ``Marked`` text."""

    def log_curve(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Called with points of curves: the columns are x, y and the name of the curve. Only with ``media``."""

    def log_folder(self, name: str, kind: str, folder: Path, notes: Mapping[str, Any]) -> None:
        """Called with a folder to be kept as a version of ``name``, and JSON-able notes. Only with ``media``."""

    def finalize(self, status: str) -> None:
        """Called once nothing more will be logged; ``status`` is ``finished``, ``failed`` or ``interrupted``."""


class Loggers(Logger):
    """Several loggers as one. A logger that fails or hangs is warned of once and never stops the run.

    Whoever makes it finalizes it: the evaluator does so only when a run fails, because more runs may be logged to the
    same place.
    """

    def __init__(self, loggers: Iterable[Logger] = ()) -> None:
        """Combines loggers; ``events.jsonl`` is added as soon as there is a run directory."""
        self.loggers = list(loggers)
        self._warned: set[int] = set()
        self._behind: dict[int, Background] = {}

    def setup(self, run_dir: Path | None) -> None:
        """Sets up every logger, and the file of events if no logger writes it yet."""
        if run_dir is not None and not any(isinstance(logger, JsonLogger) for logger in self.loggers):
            self.loggers.insert(0, JsonLogger())
        self._each("setup", run_dir)

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Sends settings to every logger, secrets replaced."""
        self._each("log_config", redact(jsonable(config)))

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Sends figures to every logger, without those that are not defined (NaN)."""
        defined = {name: float(value) for name, value in metrics.items() if value is not None and math.isfinite(value)}
        self._each("log_metrics", defined, step)

    @property
    def media(self) -> bool:
        """Whether one of them can show pictures, curves and files."""
        return any(logger.media for logger in self.loggers)

    @property
    def pictures(self) -> int:
        """The largest number of pictures that one of them wants."""
        return max((logger.pictures for logger in self.loggers if logger.media), default=0)

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Sends a table to every logger, without pictures to those that cannot show them."""
        whole = [[cell if isinstance(cell, (Picture, Marked)) else jsonable(cell) for cell in row] for row in rows]
        for logger in self.loggers:
            self._one(logger, "log_table", name, *((list(columns), whole) if logger.media else plain(columns, whole)))

    def log_curve(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Sends curves to the loggers that can show them."""
        self._media("log_curve", name, list(columns), [[jsonable(cell) for cell in row] for row in rows])

    def log_folder(self, name: str, kind: str, folder: Path, notes: Mapping[str, Any]) -> None:
        """Sends a folder to the loggers that keep files, secrets in its notes replaced."""
        self._media("log_folder", name, kind, folder, redact(jsonable(notes)))

    def finalize(self, status: str) -> None:
        """Closes every logger; waits for the slow ones, all at a time, as long as each is allowed."""
        self._each("finalize", status)
        for logger in self.loggers:
            if logger.patience is not None and id(logger) in self._behind:
                try:
                    self._behind[id(logger)].wait(logger.patience)
                except TimeoutError as error:
                    self._warn(logger, "finalize", error)
                self._tell(logger)

    def _media(self, verb: str, *arguments: Any) -> None:
        for logger in self.loggers:
            if logger.media:
                self._one(logger, verb, *arguments)

    def _each(self, verb: str, *arguments: Any) -> None:
        for logger in self.loggers:
            self._one(logger, verb, *arguments)

    def _one(self, logger: Logger, verb: str, *arguments: Any) -> None:
        try:
            if logger.patience is None:
                getattr(logger, verb)(*arguments)
            else:
                self._behind.setdefault(id(logger), Background(logger)).send(verb, *arguments)
                self._tell(logger)
        except Exception as error:
            self._warn(logger, verb, error)

    def _tell(self, logger: Logger) -> None:
        """Warns of what has failed in a logger's own thread."""
        while (failure := self._behind[id(logger)].error()) is not None:
            self._warn(logger, *failure)

    def _warn(self, logger: Logger, verb: str, error: Exception) -> None:
        if id(logger) not in self._warned:
            self._warned.add(id(logger))
            name, reason = type(logger).__name__, str(error) or type(error).__name__
            warnings.warn(f"{name}.{verb} failed, the run goes on without it: {reason}", stacklevel=5)


class JsonLogger(Logger):
    """One JSON object per line: ``time`` (seconds since 1970), ``event`` and what belongs to it."""

    def __init__(self, path: str | os.PathLike | None = None) -> None:
        """Writes to ``path``; None for ``events.jsonl`` in the run directory."""
        self.path = None if path is None else Path(path)

    def setup(self, run_dir: Path | None) -> None:
        """Settles the path; without a path and a run directory nothing is written."""
        if self.path is None and run_dir is not None:
            self.path = Path(run_dir) / "events.jsonl"
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            unshare(self.path)

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Writes a ``config`` event."""
        self._write("config", config=config)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Writes a ``metrics`` event."""
        self._write("metrics", step=step, metrics=metrics)

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Writes a ``table`` event."""
        self._write("table", name=name, columns=columns, rows=rows)

    def finalize(self, status: str) -> None:
        """Writes a ``status`` event."""
        self._write("status", status=status)

    def _write(self, event: str, **fields: Any) -> None:
        if self.path is None:
            return
        line = json.dumps({"time": round(time.time(), 3), "event": event, **jsonable(fields)}, ensure_ascii=False)
        with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(line + "\n")


class WandbLogger(Logger):
    """A Weights & Biases run inside the run directory; offline unless told otherwise.

    Final figures go into the run's summary, curves into its history against ``samples``, tables become
    ``wandb.Table``, a detector becomes an artifact. A resumed run directory goes on under the same W&B run id.
    """

    def __init__(
        self,
        mode: str = "offline",
        project: str = "stethoscope",
        name: str | None = None,
        entity: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
        pictures: int = 32,
        job_type: str | None = None,
        patience: float = 300.0,
    ) -> None:
        """Stores the settings of ``wandb.init``; ``name`` None means the run directory's.

        ``pictures`` is how many samples, and how many mentions, are logged with their pictures, at most; ``patience``
        how many seconds a finished run waits for W&B.

        Raises:
            ConfigError: ``mode`` is not one of ``offline``, ``online``, ``disabled``, ``pictures`` is below 0, or
                ``patience`` is not above 0.
        """
        if mode not in MODES:
            raise ConfigError(unknown("logger.mode", str(mode), MODES))
        if pictures < 0:
            raise ConfigError(f"logger.pictures={pictures} should be at least 0")
        if patience <= 0:
            raise ConfigError(f"logger.patience={patience} should be above 0")
        self.media, self.pictures, self.patience = mode != "disabled", pictures, patience
        self.mode, self.project, self.name, self.entity = mode, project, name, entity
        self.group, self.job_type, self.tags = group, job_type, tuple(tags)
        self.run: Any = None
        self._folder: Path | None = None
        self._tried = False
        self._curves: set[str] = set()

    def setup(self, run_dir: Path | None) -> None:
        """Starts the W&B run; tried once, so that a service that is down delays a run only once."""
        if self._tried:
            return
        self._tried = True
        import wandb

        # it then tells data frames by their type's name and does not load pandas, 40 MB, to see that ours are none
        vars(wandb.util).update(pd_available=False)
        folder = None if run_dir is None or self.mode == "disabled" else Path(run_dir).resolve()
        if folder is not None:
            (folder / "wandb").mkdir(parents=True, exist_ok=True)
            self._folder = folder
        self.run = wandb.init(
            project=self.project,
            entity=self.entity,
            name=self.name or (folder.resolve().name if folder else None),
            group=self.group,
            job_type=self.job_type,
            tags=self.tags,
            id=_run_id(folder),
            resume="allow",
            mode=self.mode,
            dir=folder,
            settings=_quiet_settings(wandb),
        )
        self.run.define_metric("samples", hidden=True)

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Adds to the run's config."""
        if self.run is not None:
            self.run.config.update(jsonable(config), allow_val_change=True)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Final figures into the summary, curves into the history."""
        if self.run is None:
            return
        if step is None:
            self.run.summary.update(dict(metrics))
            return
        for name in metrics.keys() - self._curves:  # each over its own samples: the tasks of a run all start from 0
            self.run.define_metric(name, step_metric="samples")
            self._curves.add(name)
        self.run.log({**metrics, "samples": step})

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Logs a ``wandb.Table``, pictures as ``wandb.Image`` and marked text as ``wandb.Html``."""
        if self.run is None:
            return
        import wandb

        def cell(value: Any) -> Any:
            if isinstance(value, Picture):
                return wandb.Image(value.image, caption=value.words)
            return wandb.Html(value.html, inject=False) if isinstance(value, Marked) else value

        data = [[cell(value) for value in row] for row in rows]
        media = any(isinstance(value, (Picture, Marked)) for row in rows for value in row)
        table = wandb.Table(columns=list(columns), data=data, allow_mixed_types=not media)  # mixed, media become text
        with self._staged():
            self.run.log({name: table})

    def log_curve(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Logs a line plot."""
        if self.run is None:
            return
        import wandb

        table = wandb.Table(columns=list(columns), data=[list(row) for row in rows])
        title = name.rpartition("/")[2].replace("_", " ")
        with self._staged():
            self.run.log({name: wandb.plot.line(table, x=columns[0], y=columns[1], stroke=columns[2], title=title)})

    def log_folder(self, name: str, kind: str, folder: Path, notes: Mapping[str, Any]) -> None:
        """Logs an artifact of the type ``kind`` with the folder's files and the notes as its metadata."""
        if self.run is None:
            return
        import wandb

        with self._staged():
            artifact = wandb.Artifact(_NOT_IN_NAMES.sub("-", name), kind, metadata=dict(notes))
            for path in sorted(folder.rglob("*")):  # add_dir would talk on the terminal
                if path.is_file():
                    artifact.add_file(str(path), path.relative_to(folder).as_posix())
            self.run.log_artifact(artifact)

    @contextmanager
    def _staged(self) -> Iterator[None]:
        """Files that wait to be sent lie in the run directory, and not in the user's home, which may be small."""
        if self._folder is None or _STAGE in os.environ:
            yield
            return
        os.environ[_STAGE] = str((self._folder / "wandb" / "data").resolve())
        try:
            yield
        finally:
            del os.environ[_STAGE]

    def finalize(self, status: str) -> None:
        """Ends the W&B run, as failed unless ``status`` is ``finished``."""
        if self.run is not None:
            run, self.run = self.run, None
            run.summary.update({"status": status})
            run.finish(exit_code=0 if status == "finished" else 1)


def _run_id(folder: Path | None) -> str | None:
    """The W&B id of a run directory, made at first use; an agent of a W&B sweep gives it."""
    if folder is None:
        return None
    file = folder / "wandb" / "id"
    if not file.is_file():
        file.write_text(os.environ.get("WANDB_RUN_ID", secrets.token_hex(4)) + "\n")
    return file.read_text().strip()


def _quiet_settings(wandb: Any) -> Any:
    """W&B without console output, system statistics, source code, package list, host and user names."""
    wanted = {
        "silent": True,
        "init_timeout": 180,
        "x_service_wait": 180,  # on a busy machine its helper process needs longer to start than it allows by itself
        "console": "off",
        "host": "",
        "disable_git": True,
        "disable_code": True,
        "disable_job_creation": True,
        "x_disable_stats": True,
        "x_disable_meta": True,
        "x_disable_machine_info": True,
        "x_save_requirements": False,
    }
    known = getattr(wandb.Settings, "model_fields", wanted)  # names beginning with x_ come and go between versions
    return wandb.Settings(**{name: value for name, value in wanted.items() if name in known})
