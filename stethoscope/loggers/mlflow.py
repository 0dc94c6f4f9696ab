"""Log to MLflow: a server, or a folder that all runs share."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stethoscope.core.redaction import redact_text
from stethoscope.loggers.base import (
    Logger,
    TablePicture,
    as_labels,
    check_installed,
    check_limits,
    curve_picture,
    flat_settings,
    name_of_run,
    plain_table,
    stored_id,
)

logger = logging.getLogger(__name__)

_NOT_IN_NAMES = re.compile(r"[^\w\-. /]+", re.ASCII)  # of MLflow's parameters and metrics
_LONGEST = 6000  # characters of a parameter's value
_AT_ONCE = 100  # parameters of one call
_STATUS = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}


class MlflowLogger(Logger):
    """Logs settings as parameters, figures as metrics, everything else as artifacts of an MLflow run.

    Tables are JSON files that ``mlflow.load_table`` and ``pandas.read_json(..., orient="split")`` read, under
    ``tables/``, their pictures beside them; plots are under ``curves/``. A resumed run directory continues the same
    MLflow run.
    """

    media = True

    def __init__(
        self,
        uri: str | None = None,
        folder: str = "runs/mlruns",
        project: str = "stethoscope",
        name: str | None = None,
        group: str | None = None,
        job_type: str | None = None,
        tags: Sequence[str] | str | None = (),
        pictures: int = 32,
        patience: float = 300.0,
    ) -> None:
        """Store the settings of the MLflow run.

        Args:
            uri: address of a server; None for the variable ``MLFLOW_TRACKING_URI``, or else the folder.
            folder: of MLflow's files where there is no server.
            project: MLflow experiment that the run belongs to.
            name: of the MLflow run; None for the run directory's.
            group: tag of runs that belong together.
            job_type: tag of the kind of run.
            tags: further labels, in the tag ``tags``.
            pictures: maximum number of samples, and of mentions, to log with their pictures.
            patience: seconds that a finished run waits for MLflow.

        Raises:
            ConfigError: ``pictures`` is below 0, ``patience`` not above 0, or MLflow is not installed.
        """
        check_limits(pictures, patience)
        check_installed("mlflow")
        self.uri, self.folder, self.project, self.name = uri, folder, project, name
        self.group, self.job_type, self.tags = group, job_type, as_labels(tags)
        self.pictures, self.patience = pictures, patience
        self._client: Any = None
        self._run_id = ""
        self._started = False

    def setup(self, run_dir: Path | None) -> None:
        """Start the MLflow run, or continue that of the run directory; tried once."""
        if self._started:
            return
        self._started = True
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        uri = shown = self.uri or os.environ.get("MLFLOW_TRACKING_URI", "")
        if not uri:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # else it wants a database, and SQLAlchemy
            uri = Path(self.folder).resolve().as_uri()
            shown = f"MLFLOW_ALLOW_FILE_STORE=true mlflow ui --backend-store-uri {uri}"
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=uri)
        labels = {"group": self.group, "job_type": self.job_type, "tags": ", ".join(self.tags)}
        file = None if run_dir is None else Path(run_dir) / "mlflow" / "id"
        if file is not None and file.is_file():
            self._run_id, _ = stored_id(file)
            client.update_run(self._run_id, status="RUNNING")
        else:
            name, tags = name_of_run(self.name, run_dir), {key: value for key, value in labels.items() if value}
            self._run_id = client.create_run(self._experiment_id(client), run_name=name, tags=tags).info.run_id
            if file is not None:
                stored_id(file, self._run_id)
        self._client = client
        logger.info("MLflow run %s: %s", self._run_id, redact_text(shown))

    def _experiment_id(self, client: Any) -> str:
        """Return the id of the experiment, which another job of a sweep may be creating at this moment."""
        from mlflow.exceptions import MlflowException

        experiment = client.get_experiment_by_name(self.project)
        if experiment is not None:
            return experiment.experiment_id
        try:
            return client.create_experiment(self.project)
        except MlflowException:
            experiment = client.get_experiment_by_name(self.project)
            if experiment is None:
                raise
            return experiment.experiment_id

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Log parameters by their dotted names.

        Those of an earlier session stay, as MLflow lets none be changed.
        """
        if self._client is None:
            return
        from mlflow.entities import Param

        known = self._client.get_run(self._run_id).data.params
        params = {_name(name): str(value)[:_LONGEST] for name, value in flat_settings(config).items()}
        new = [Param(name, value) for name, value in params.items() if name not in known]
        for start in range(0, len(new), _AT_ONCE):
            self._client.log_batch(self._run_id, params=new[start : start + _AT_ONCE])
        for section, settings in config.items():
            self._client.log_dict(self._run_id, {section: settings}, f"settings/{_name(section)}.json")

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics; final ones have the step 0."""
        if self._client is None:
            return
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        values = [Metric(_name(name), value, now, step or 0) for name, value in metrics.items()]
        self._client.log_batch(self._run_id, metrics=values)

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a table as a JSON file, and the pictures of its cells as files of their own."""
        if self._client is None:
            return
        names, cells = plain_table(columns, rows)
        path = f"tables/{_name(name)}"
        self._client.log_dict(self._run_id, {"columns": names, "data": cells}, f"{path}.json")
        for index, row in enumerate(rows):
            for column, cell in zip(columns, row, strict=True):
                if isinstance(cell, TablePicture):
                    self._client.log_image(self._run_id, cell.image, f"{path}/{index:04d}-{_name(column)}.png")

    def log_curve(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a line plot as a picture, and its points as a table."""
        if self._client is None:
            return
        self._client.log_image(self._run_id, curve_picture(name, columns, rows), f"curves/{_name(name)}.png")
        self.log_table(name, columns, rows)

    def log_folder(self, name: str, kind: str, folder: Path, notes: Mapping[str, Any]) -> None:
        """Log the folder's files under its kind, and the notes beside them."""
        if self._client is None:
            return
        self._client.log_artifacts(self._run_id, str(folder), kind)
        self._client.log_dict(self._run_id, dict(notes), f"{kind}-notes.json")

    def finalize(self, status: str) -> None:
        """End the MLflow run with its status."""
        if self._client is not None:
            client, self._client = self._client, None
            client.set_terminated(self._run_id, _STATUS.get(status, "FAILED"))


def _name(text: str) -> str:
    """Replace the letters that MLflow's names must not have.

    >>> _name("baseline/position + word/auroc")
    'baseline/position _ word/auroc'
    """
    return _NOT_IN_NAMES.sub("_", text)
