"""Log to TensorBoard's event files in the run directory."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stethoscope.core.text import escape_markdown
from stethoscope.loggers.base import (
    Logger,
    TablePicture,
    check_installed,
    check_limits,
    curve_picture,
    flat_settings,
    plain_table,
)

logger = logging.getLogger(__name__)


class TensorBoardLogger(Logger):
    """Writes scalars, tables as text, pictures and plots as images, and settings as hyperparameters.

    Points of curves have the number of samples as their step, final figures 0. The settings are written at the end,
    together with the final figures, as TensorBoard's table of hyperparameters wants them.
    """

    media = True

    def __init__(self, folder: str = "tensorboard", pictures: int = 32) -> None:
        """Name the folder.

        Args:
            folder: of the event files, inside the run directory.
            pictures: maximum number of samples, and of mentions, to log with their pictures.

        Raises:
            ConfigError: ``pictures`` is below 0, or TensorBoard is not installed.
        """
        check_limits(pictures)
        check_installed("tensorboard")
        self.folder, self.pictures = folder, pictures
        self._path: Path | None = None
        self._writer: Any = None
        self._settings: dict[str, Any] = {}
        self._finals: dict[str, float] = {}

    def setup(self, run_dir: Path | None) -> None:
        """Open an event file, beside those of earlier sessions; nothing is written without a run directory."""
        if run_dir is None or self._writer is not None:
            return
        from torch.utils.tensorboard import SummaryWriter

        self._path = Path(run_dir) / self.folder
        self._writer = SummaryWriter(str(self._path))

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Collect settings for the end."""
        self._settings |= flat_settings(config)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write scalars."""
        if self._writer is None:
            return
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step or 0)
        if step is None:
            self._finals |= metrics
        self._writer.flush()

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Write a table as text, and its pictures as images; their step is the row's number."""
        if self._writer is None:
            return
        import numpy as np

        self._writer.add_text(name, _markdown(*plain_table(columns, rows)))
        for index, row in enumerate(rows):
            for column, cell in zip(columns, row, strict=True):
                if isinstance(cell, TablePicture):
                    pixels = np.asarray(cell.image.convert("RGB"))
                    self._writer.add_image(f"{name}/{column}", pixels, index, dataformats="HWC")
        self._writer.flush()

    def log_curve(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Write a line plot as an image."""
        if self._writer is None:
            return
        import numpy as np

        self._writer.add_image(name, np.asarray(curve_picture(name, columns, rows)), dataformats="HWC")
        self._writer.flush()

    def finalize(self, status: str) -> None:
        """Write the settings with the final figures, and close the file."""
        if self._writer is None:
            return
        from torch.utils.tensorboard.summary import hparams

        writer, self._writer = self._writer, None
        for summary in hparams({**self._settings, "status": status}, self._finals):
            writer.file_writer.add_summary(summary)
        writer.close()
        logger.info("TensorBoard: tensorboard --logdir %s", self._path)


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Write a table in Markdown, which TensorBoard renders; marks inside cells stay text.

    >>> print(_markdown(["a", "b"], [[1, "x|y"]]))
    | a | b |
    | --- | --- |
    | 1 | x\\|y |
    """

    def line(cells: Sequence[Any]) -> str:
        texts = ("" if cell is None else str(cell) for cell in cells)
        return f"| {' | '.join(map(escape_markdown, texts))} |"

    return "\n".join([line(columns), f"|{' --- |' * len(columns)}", *map(line, rows)])
