"""Log to Weights & Biases, offline by default."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

from stethoscope.core.errors import ConfigError, unknown
from stethoscope.core.files import jsonable
from stethoscope.loggers.base import (
    Logger,
    Marked,
    TablePicture,
    artifact_name,
    as_labels,
    check_limits,
    name_of_run,
    stored_id,
)

Mode = Literal["offline", "online", "disabled"]
MODES: tuple[Mode, ...] = get_args(Mode)
logger = logging.getLogger(__name__)

_STAGE = "WANDB_DATA_DIR"  # W&B's variable


class WandbLogger(Logger):
    """Logs to a Weights & Biases run inside the run directory.

    Final metrics go into the run's summary, curves into its history over ``samples``, tables become ``wandb.Table``,
    folders become artifacts. A resumed run directory continues the same W&B run id.
    """

    def __init__(
        self,
        mode: Mode = "offline",
        project: str = "stethoscope",
        name: str | None = None,
        entity: str | None = None,
        group: str | None = None,
        tags: Sequence[str] | str | None = (),
        pictures: int = 32,
        job_type: str | None = None,
        patience: float = 300.0,
    ) -> None:
        """Store the settings of ``wandb.init``.

        Args:
            mode: ``offline``, ``online`` or ``disabled``.
            project: of the W&B run.
            name: of the W&B run; None for the run directory's.
            entity: user or team; None for the user's default.
            group: of W&B runs.
            tags: labels of the W&B run.
            pictures: maximum number of samples, and of mentions, to log with their pictures.
            job_type: kind of W&B run within its group.
            patience: seconds that a finished run waits for W&B.

        Raises:
            ConfigError: ``mode`` is unknown, ``pictures`` below 0, or ``patience`` not above 0.
        """
        if mode not in MODES:
            raise ConfigError(unknown("logger.mode", str(mode), MODES))
        check_limits(pictures, patience)
        self.media, self.pictures, self.patience = mode != "disabled", pictures, patience
        self.mode: Mode = mode
        self.project, self.name, self.entity = project, name, entity
        self.group, self.job_type, self.tags = group, job_type, as_labels(tags)
        self.run: Any = None
        self._folder: Path | None = None
        self._started = False
        self._curves: set[str] = set()

    def setup(self, run_dir: Path | None) -> None:
        """Start the W&B run; tried once, so that a service that is down delays a run only once."""
        if self._started:
            return
        self._started = True
        import wandb.util

        # W&B then does not load pandas (40 MB) to check whether values are data frames
        vars(wandb.util).update(pd_available=False)
        folder = None if run_dir is None or self.mode == "disabled" else Path(run_dir).resolve()
        if folder is not None:
            (folder / "wandb").mkdir(parents=True, exist_ok=True)
            self._folder = folder
        self.run = wandb.init(
            project=self.project,
            entity=self.entity,
            name=name_of_run(self.name, folder),
            group=self.group,
            job_type=self.job_type,
            tags=self.tags,
            # created at first use, or given by an agent of a W&B sweep
            id=None if folder is None else stored_id(folder / "wandb" / "id", os.environ.get("WANDB_RUN_ID", ""))[0],
            resume="allow" if self.mode == "online" else None,  # W&B warns that it ignores it offline
            mode=self.mode,
            dir=folder,
            settings=_quiet_settings(wandb),
        )
        self.run.define_metric("samples", hidden=True)
        if self.mode == "online":
            logger.info("W&B run: %s", self.run.url)

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Add to the run's config."""
        if self.run is not None:
            self.run.config.update(jsonable(config), allow_val_change=True)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Put final metrics into the summary, curves into the history."""
        if self.run is None:
            return
        if step is None:
            self.run.summary.update(dict(metrics))
            return
        for name in metrics.keys() - self._curves:  # a run's tasks each count samples from 0
            self.run.define_metric(name, step_metric="samples")
            self._curves.add(name)
        self.run.log({**metrics, "samples": step})

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a ``wandb.Table``, pictures as ``wandb.Image`` and marked text as ``wandb.Html``."""
        if self.run is None:
            return
        import wandb

        def cell(value: Any) -> Any:
            if isinstance(value, TablePicture):
                return wandb.Image(value.image, caption=value.caption)
            return wandb.Html(value.html, inject=False) if isinstance(value, Marked) else value

        data: list[Any] = [[cell(value) for value in row] for row in rows]
        media = any(isinstance(value, (TablePicture, Marked)) for row in rows for value in row)
        table = wandb.Table(
            columns=list(columns), data=data, allow_mixed_types=not media
        )  # with mixed types, W&B turns media into text
        with self._staged():
            self.run.log({name: table})

    def log_curve(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a line plot."""
        if self.run is None:
            return
        import wandb

        table = wandb.Table(columns=list(columns), data=[list(row) for row in rows])
        title = name.rpartition("/")[2].replace("_", " ")
        with self._staged():
            self.run.log({name: wandb.plot.line(table, x=columns[0], y=columns[1], stroke=columns[2], title=title)})

    def log_folder(self, name: str, kind: str, folder: Path, notes: Mapping[str, Any]) -> None:
        """Log an artifact of type ``kind`` with the folder's files, and the notes as its metadata."""
        if self.run is None:
            return
        import wandb

        with self._staged():
            artifact = wandb.Artifact(artifact_name(name), kind, metadata=dict(notes))
            for path in sorted(folder.rglob("*")):  # add_dir prints to the terminal
                if path.is_file():
                    artifact.add_file(str(path), path.relative_to(folder).as_posix())
            self.run.log_artifact(artifact)

    @contextmanager
    def _staged(self) -> Iterator[None]:
        """Store files to upload in the run directory, instead of the user's home, which may be small."""
        if self._folder is None or _STAGE in os.environ:
            yield
            return
        os.environ[_STAGE] = str((self._folder / "wandb" / "data").resolve())
        try:
            yield
        finally:
            del os.environ[_STAGE]

    def finalize(self, status: str) -> None:
        """Finish the W&B run, as failed unless ``status`` is ``finished``."""
        if self.run is not None:
            run, self.run = self.run, None
            run.summary.update({"status": status})
            run.finish(exit_code=0 if status == "finished" else 1)
            if self.mode == "offline" and self._folder is not None:
                logger.info("W&B run, offline: wandb sync %s", Path(run.dir).parent)


def _quiet_settings(wandb: Any) -> Any:
    """Turn off W&B's console output and all that it would upload about the machine.

    That is statistics, source code, packages, host and user names.
    """
    settings = {
        "silent": True,
        "init_timeout": 180,
        "x_service_wait": 180,  # on a busy machine W&B's helper process starts more slowly than its default allows
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
    known = getattr(wandb.Settings, "model_fields", settings)  # names beginning with x_ change between versions
    return wandb.Settings(**{name: value for name, value in settings.items() if name in known})
