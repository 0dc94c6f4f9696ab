"""Define the contract of loggers, and media for the cells of their tables."""

from __future__ import annotations

import importlib.util
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stethoscope.core.errors import ConfigError

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


def check_installed(package: str) -> None:
    """Check, without importing it, that the package of a logger is installed.

    Logger and extra have the package's name.

    Raises:
        ConfigError: it is not.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:  # a folder of that name without code, as of a logger's own files
        raise ConfigError(f'logger={package} needs the package {package}: pip install "lvlm-stethoscope[{package}]"')


def as_labels(tags: Sequence[str] | str | None) -> tuple[str, ...]:
    """Convert the setting ``tags`` to labels: none, a single one, or several.

    >>> as_labels(None), as_labels("pope"), as_labels(["pope", 7])
    ((), ('pope',), ('pope', '7'))
    """
    return () if tags is None else (tags,) if isinstance(tags, str) else tuple(map(str, tags))


def name_of_run(name: str | None, run_dir: Path | None) -> str | None:
    """Return the name that a run is logged under: its own, or else its directory's."""
    return name or (None if run_dir is None else Path(run_dir).resolve().name)


def artifact_name(name: str) -> str:
    """Replace the letters that names of artifacts must not have in W&B and Trackio.

    >>> artifact_name("my run/detector")
    'my-run-detector'
    """
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name)


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
        """Log named metrics.

        ``step`` is the number of samples for a point of a curve, None for a final metric.
        """

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a small table; with ``media``, cells may be a ``TablePicture`` or ``Marked`` text."""

    def log_curve(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log points of curves: the columns are x, y and the curve's name. Only called with ``media``."""

    def log_folder(self, name: str, kind: str, folder: Path, notes: Mapping[str, Any]) -> None:
        """Log a folder as a version of ``name``, with JSON-able notes. Only called with ``media``."""

    def finalize(self, status: str) -> None:
        """Finish logging; ``status`` is ``finished``, ``failed`` or ``interrupted``."""
