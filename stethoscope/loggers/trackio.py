"""Log to Trackio: its database on this machine, or a Hugging Face space."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stethoscope.loggers.base import (
    Logger,
    Marked,
    TablePicture,
    artifact_name,
    check_installed,
    check_limits,
    curve_picture,
    name_of_run,
    stored_id,
)

logger = logging.getLogger(__name__)


class TrackioLogger(Logger):
    """Logs figures, tables with their pictures, plots, and folders as artifacts to a Trackio run.

    A resumed run directory continues the Trackio run of its name. Trackio measures nothing of the machine for us.
    """

    media = True

    def __init__(
        self,
        project: str = "stethoscope",
        name: str | None = None,
        space: str | None = None,
        group: str | None = None,
        pictures: int = 32,
        patience: float = 300.0,
    ) -> None:
        """Store the settings of ``trackio.init``.

        Args:
            project: of the Trackio run.
            name: of the Trackio run; None for the run directory's.
            space: Hugging Face space, ``user/name``; None for the variable ``TRACKIO_SPACE_ID``, or else this machine.
            group: of Trackio runs.
            pictures: maximum number of samples, and of mentions, to log with their pictures.
            patience: seconds that a finished run waits for Trackio.

        Raises:
            ConfigError: ``pictures`` is below 0, ``patience`` not above 0, or Trackio is not installed.
        """
        check_limits(pictures, patience)
        check_installed("trackio")
        self.project, self.name, self.space, self.group = project, name, space, group
        self.pictures, self.patience = pictures, patience
        self._run: Any = None
        self._started = False

    def setup(self, run_dir: Path | None) -> None:
        """Start the Trackio run, or continue that of the run directory; tried once."""
        if self._started:
            return
        self._started = True
        import trackio
        import trackio.run
        import trackio.utils

        for module in (trackio, trackio.run, trackio.utils):  # it prints to standard output, where our tables go
            vars(module).setdefault("print", lambda *words, **options: None)
        name, resumed = name_of_run(self.name, run_dir), False
        if run_dir is not None:
            name, resumed = stored_id(Path(run_dir) / "trackio" / "name", name or "")
        self._run = trackio.init(
            self.project,
            name=name,
            group=self.group,
            space_id=self.space,
            resume="allow" if resumed else "never",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        logger.info("Trackio run %s: %s", self._run.name, self._run.url or f'trackio show --project "{self.project}"')

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Add to the run's config, which Trackio stores with the next figures."""
        if self._run is not None:
            self._run.config.update(config)
            self._store_config()

    def _store_config(self) -> None:
        """Have the config stored again; Trackio does so once, and takes the first of every half second."""
        vars(self._run)["_config_logged"] = False

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log figures; final ones have the step after the last."""
        if self._run is not None:
            self._run.log(dict(metrics), step=step)

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a ``trackio.Table`` with ``trackio.Image`` in its cells; marked text is plain."""
        if self._run is None:
            return
        import trackio

        def cell(value: Any) -> Any:
            if isinstance(value, TablePicture):
                return trackio.Image(value.image, caption=value.caption)
            return value.text if isinstance(value, Marked) else value

        data = [[cell(value) for value in row] for row in rows]
        self._run.log({name: trackio.Table(columns=list(columns), data=data)})

    def log_curve(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a line plot as a picture."""
        if self._run is None:
            return
        import trackio

        self._run.log({name: trackio.Image(curve_picture(name, columns, rows), caption=name)})

    def log_folder(self, name: str, kind: str, folder: Path, notes: Mapping[str, Any]) -> None:
        """Log an artifact of type ``kind`` with the folder's files, and the notes as its metadata."""
        if self._run is None:
            return
        import trackio

        artifact = trackio.Artifact(artifact_name(name), kind, metadata=dict(notes))
        artifact.add_dir(folder)
        self._run.log_artifact(artifact)

    def finalize(self, status: str) -> None:
        """Finish the Trackio run."""
        if self._run is not None:
            self._store_config()
            run, self._run = self._run, None
            run.log({"status": status})
            run.finish()
