"""What loggers that show pictures get of a detector: its files, its curves, and mentions to look at."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stethoscope.core.errors import StethoscopeError
from stethoscope.core.files import read_json
from stethoscope.loggers.media import Marked, Picture
from stethoscope.markup import escape
from stethoscope.report import curves, gallery
from stethoscope.report.source import Source

if TYPE_CHECKING:
    from stethoscope.loggers.base import Loggers

COLUMNS = (
    "kind", "sample", "object", "probability", "evidence", "prior", "picture", "heat map", "answer", "question",
)  # fmt: skip
_MARKS = {"this": "background:#fbe3e0;color:#b3261e;font-weight:bold", "warned": "text-decoration:underline dotted"}


def send_detector(loggers: Loggers, folder: Path) -> None:
    """Logs the detector of a finished run as files with its manifest as notes, its curves on the test images, and a
    table of caught, missed and falsely warned mentions, as many as the loggers want to show.

    What cannot be read is warned of: the run itself has everything on disk by then.
    """
    if not loggers.media:
        return
    try:
        _send(loggers, Source.read(folder))
    except StethoscopeError as error:
        warnings.warn(f"the loggers get no pictures of the detector: {error}", stacklevel=2)


def _send(loggers: Loggers, source: Source) -> None:
    detector = source.folder / "detector"
    manifest = detector / "manifest.json"
    if manifest.is_file():
        notes = read_json(manifest)
        loggers.log_folder(f"{source.name}-detector", "detector", detector, notes)
    if source.no_detector() or source.held_out.empty:
        return
    for name, columns, rows in _curves(source):
        loggers.log_curve(f"detector/{name}", columns, rows)
    if loggers.pictures:
        loggers.log_table("detector/mentions", COLUMNS, mention_rows(source, loggers.pictures))


def mention_rows(source: Source, count: int) -> list[list[Any]]:
    """Rows of ``COLUMNS``: as many mentions of each kind of ``gallery.KINDS``, ``count`` at most."""
    found = gallery.cases(source, -(-count // len(gallery.KINDS)), lambda record: None)[:count]
    return [
        [
            case.kind,
            case.sample_id,
            case.object,
            case.probability,
            case.evidence,
            case.prior,
            None if case.picture is None else Picture(case.picture, case.sample_id),
            None if case.heat is None else Picture(case.heat, f"what {case.object} was written from"),
            Marked(_html(case.pieces), case.words),
            case.question,
        ]
        for case in found
    ]


def _html(pieces: Sequence[tuple[str, str]]) -> str:
    """The answer around a mention, escaped, in its own style: W&B shows it in a frame of its own."""
    marked = "".join(
        f'<span style="{_MARKS[mark]}">{escape(text)}</span>' if mark else escape(text) for text, mark in pieces
    )
    return f'<p style="font:14px/1.5 sans-serif;white-space:pre-wrap;overflow-wrap:anywhere">{marked}</p>'


def _curves(source: Source) -> Iterator[tuple[str, tuple[str, str, str], list[list[Any]]]]:
    """Name, columns and points of every curve."""
    rows = source.held_out
    if rows["label"].nunique() == 2:
        pairs = {
            "roc": (curves.roc, ("false alarms", "found", "curve")),
            "precision_recall": (curves.precision_recall, ("recall", "precision", "curve")),
        }
        for name, (points, columns) in pairs.items():
            x, y = points(rows["label"], rows["probability"])
            yield name, columns, [[*pair, "detector"] for pair in zip(x.tolist(), y.tolist(), strict=True)]
    bins = curves.reliability(rows)
    yield (
        "reliability",
        ("probability", "share hallucinated", "curve"),
        [[one.at, one.figure.value, "detector"] for one in bins] + [[end, end, "calibrated"] for end in (0.0, 1.0)],
    )
    places = [one for one in curves.by_position(rows) if one.figure is not None]
    columns = ("token position", "AUROC", "curve")
    yield "auroc_by_position", columns, [[_first(one.name), one.figure.value, "detector"] for one in places]


def _first(name: str) -> int:
    """The first position of a bin.

    >>> _first("10–19")
    10
    """
    return int(name.partition("–")[0])
