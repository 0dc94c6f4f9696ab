"""Show examples of a detector's warnings and misses, and log the detector."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from stethoscope.core.errors import StethoscopeError
from stethoscope.core.files import read_json
from stethoscope.core.html import data_uri, render
from stethoscope.core.text import percent
from stethoscope.loggers.base import Marked, TablePicture
from stethoscope.report import curves
from stethoscope.report.run_source import RunReader
from stethoscope.report.tables import Table
from stethoscope.storage.saved_heatmaps import CAPTIONS

if TYPE_CHECKING:
    from markupsafe import Markup
    from PIL.Image import Image

    from stethoscope.detection.detector_results import DetectorResults
    from stethoscope.loggers.combined import Loggers
    from stethoscope.storage.records import Record

CONTEXT = 240  # characters of the answer on either side of a mention
SIDE = 320  # pixels along the longer side of an image
KINDS = {
    "caught": "hallucinated and warned of, the highest probabilities first",
    "missed": "hallucinated without a warning, the lowest probabilities first",
    "false alarm": "warned of but in the picture, the highest probabilities first",
}
LOGGED_COLUMNS = (
    "kind", "sample", "object", "probability", "evidence", "prior", "picture", "heat map", "answer", "question",
)  # fmt: skip
ImageSource = Callable[["Record"], "Image | None"]
"""Loads the image of a record for which the run saved none; returns None if there is no such image."""


@dataclass(frozen=True)
class Example:
    """A mention with the answer around it.

    Attributes:
        kind: of ``KINDS``.
        sample_id, question: of the sample.
        object: that the mention names.
        pieces: the answer around it: text and ``this`` (the mention), ``warned`` (another warned mention) or empty.
        probability: calibrated probability that it is hallucinated, in [0, 1].
        evidence, prior: log-odds that add up to those of the probability; None if the detector cannot split them.
        image: RGB; None if it is not available.
        heatmap: the image under the heat map of the mention; None if the run saved no heat map.
        shows: what the heat map shows, of ``saved_heatmaps.CAPTIONS``; empty without one.
    """

    kind: str
    sample_id: str
    question: str
    object: str
    pieces: tuple[tuple[str, str], ...]
    probability: float
    evidence: float | None
    prior: float | None
    image: Image | None = field(default=None, repr=False, compare=False)
    heatmap: Image | None = field(default=None, repr=False, compare=False)
    shows: str = ""

    @property
    def text(self) -> str:
        """Write the answer around the mention, with the mention in guillemets."""
        return "".join(f"«{text}»" if mark == "this" else text for text, mark in self.pieces)

    @property
    def images(self) -> list[tuple[Image, str]]:
        """List the images with their captions."""
        pairs = [(self.image, self.sample_id), (self.heatmap, CAPTIONS.get(self.shows, "").format(self.object))]
        return [(image, caption) for image, caption in pairs if image is not None]


def select_mentions(rows: pd.DataFrame, count: int) -> dict[str, pd.DataFrame]:
    """Select the clearest mentions of every kind, preferring different objects and different answers.

    Args:
        rows: mentions with ``label``, ``warned``, ``probability``, ``object`` and ``sample_id``.
        count: of each kind, at most.
    """
    wrong, warned = rows["label"] == 1, rows["warned"].astype(bool)
    masks = {"caught": wrong & warned, "missed": wrong & ~warned, "false alarm": ~wrong & warned}
    selected = {}
    for kind, mask in masks.items():
        ordered = rows[mask].sort_values("probability", ascending=kind == "missed", kind="stable")
        repeated = ordered.duplicated("object") | ordered.duplicated("sample_id")
        chosen = pd.concat([ordered[~repeated], ordered[repeated]]).head(count)
        selected[kind] = chosen.sort_values("probability", ascending=kind == "missed", kind="stable")
    return selected


def read_examples(
    source: RunReader, count: int, image_source: ImageSource | None = lambda record: None
) -> list[Example]:
    """Read the examples of a run.

    Args:
        source: a run with warnings.
        count: mentions of every kind, at most.
        image_source: loads the images that the run has not saved; None for examples without images.

    Raises:
        ArtefactError: ``maps.jsonl`` is damaged.
    """
    return [
        _read_example(source, kind, row, image_source)
        for kind, rows in select_mentions(source.held_out, count).items()
        for row in rows.to_dict("records")
    ]


def _read_example(source: RunReader, kind: str, row: dict, image_source: ImageSource | None) -> Example:
    record = source.record(row["sample_id"])
    text = record.answer.text if record is not None and record.answer is not None else ""
    image, heatmap, shows = None, None, ""
    if record is not None and image_source is not None:
        image, heatmap, shows = _images(source, record, row, image_source)
    warned = source.warnings["warned"].astype(bool)
    same_answer = source.warnings[(source.warnings["sample_id"] == row["sample_id"]) & warned]
    others = [(int(start), int(end)) for start, end in zip(same_answer["start"], same_answer["end"], strict=True)]
    has_log_odds = row["evidence"] is not None and not pd.isna(row["evidence"])
    return Example(
        kind=kind,
        sample_id=row["sample_id"],
        question="" if record is None else record.question,
        object=row["object"],
        pieces=tuple(cut_answer(text, (int(row["start"]), int(row["end"])), others)),
        probability=float(row["probability"]),
        evidence=float(row["evidence"]) if has_log_odds else None,
        prior=float(row["prior"]) if has_log_odds else None,
        image=image,
        heatmap=heatmap,
        shows=shows,
    )


def _images(
    source: RunReader, record: Record, row: dict, image_source: ImageSource
) -> tuple[Image | None, Image | None, str]:
    """Read the image, draw it under the mention's heat map, and say what that shows."""
    media = source.saved_media(record)
    image = media.picture if media is not None and media.picture is not None else image_source(record)
    if media is None or image is None:
        return image, None, ""
    heatmap = replace(media, picture=image).overlay(int(row["token"]), SIDE)
    return image, heatmap, "" if heatmap is None else media.shows


def cut_answer(text: str, mention: tuple[int, int], others: Sequence[tuple[int, int]]) -> Iterator[tuple[str, str]]:
    """Cut the text around a mention into marked pieces; text that is left out becomes an ellipsis.

    Args:
        text: of the answer.
        mention: its characters, as a half-open range.
        others: ranges of all warned mentions of the answer; the mention itself may be among them.
    """
    first, last = max(0, mention[0] - CONTEXT), min(len(text), mention[1] + CONTEXT)
    if first > 0:
        first = text.find(" ", first, mention[0]) + 1 or first
        yield "… ", ""
    position = first
    marks = [(*mention, "this"), *((*other, "warned") for other in others if other != mention)]
    for start, end, mark in sorted(marks):
        word = text[start:end]
        start, end = start + len(word) - len(word.lstrip()), end - len(word) + len(word.rstrip())
        if position <= start < end <= last:
            yield text[position:start], ""
            yield text[start:end], mark
            position = end
    yield text[position:last], ""
    if last < len(text):
        yield " …", ""


def example_table(examples: Sequence[Example]) -> Table:
    """List examples without their images."""
    rows = tuple(
        (
            example.kind,
            example.sample_id,
            example.object,
            f"{example.probability:.3f}",
            _log_odds(example.evidence),
            _log_odds(example.prior),
            example.text,
        )
        for example in examples
    )
    note = "Evidence and prior are log-odds; above 0 they speak for hallucination, and their sum gives the probability."
    return Table("mentions", ("", "sample", "object", "probability", "evidence", "prior", "answer"), rows, note)


def _log_odds(value: float | None) -> str:
    return "" if value is None else f"{value:+.2f}".replace("-", "−")


def example_cards(examples: Sequence[Example]) -> Markup:
    """Write examples as HTML cards in the style of the viewer, grouped by kind."""
    groups = [
        (kind, meaning, [_card(example) for example in examples if example.kind == kind])
        for kind, meaning in KINDS.items()
    ]
    return render("report/examples.html", groups=groups)


def _card(example: Example) -> dict[str, Any]:
    has_log_odds = example.evidence is not None and example.prior is not None
    return {
        "example": example,
        "images": [(data_uri(image, SIDE), caption) for image, caption in example.images],
        "probability": percent(example.probability),
        "log_odds": [("evidence", example.evidence), ("prior", example.prior)] if has_log_odds else [],
    }


def log_detector(loggers: Loggers, results: DetectorResults) -> None:
    """Log the figures of the leader board, as metrics and as a table.

    Single features are in the table only.

    The main detector's are ``detector/<metric>``, others' ``<kind>/<name>/<metric>``: ``baseline/position/auroc``. An
    undefined value is left out, and empty in the table.
    """
    rows = [
        (row, {metric: interval.to_dict() for metric, interval in row.metrics.items()})  # None where not defined
        for row in results.leaderboard.rows
    ]
    figures: dict[str, float | None] = {}
    for row, metrics in rows:
        name = row.name.removesuffix(" only").replace(" ", "_")
        path = row.kind if row.name == row.kind else f"{row.kind}/{name}"
        if row.kind != "feature":
            figures |= {f"{path}/{metric}": interval["value"] for metric, interval in metrics.items()}
    loggers.log_metrics({name: value for name, value in figures.items() if value is not None})
    names = list(dict.fromkeys(metric for _, metrics in rows for metric in metrics))
    ends = [(metric, end) for metric in names for end in ("value", "low", "high")]
    columns = ["name", "kind", "cost", *(metric if end == "value" else f"{metric} {end}" for metric, end in ends)]
    cells = [
        [row.name, row.kind, row.cost, *(metrics.get(metric, {}).get(end) for metric, end in ends)]
        for row, metrics in rows
    ]
    loggers.log_table("detector/leaderboard", columns, cells)


def log_detector_files(loggers: Loggers, folder: Path) -> None:
    """Log a detector's files, curves and example mentions, if a logger takes media.

    Errors become warnings, because the run is complete on disk by then.

    Args:
        loggers: of the run; they set the number of examples.
        folder: of a finished run.
    """
    if not loggers.media:
        return
    try:
        _log_files(loggers, RunReader.read(folder))
    except StethoscopeError as error:
        warnings.warn(f"the loggers get no pictures of the detector: {error}", stacklevel=2)


def _log_files(loggers: Loggers, source: RunReader) -> None:
    detector = source.folder / "detector"
    manifest = detector / "manifest.json"
    if manifest.is_file():
        loggers.log_folder(f"{source.name}-detector", "detector", detector, read_json(manifest))
    if source.no_detector() or source.held_out.empty:
        return
    for name, columns, rows in _curves(source):
        loggers.log_curve(f"detector/{name}", columns, rows)
    if loggers.pictures:
        loggers.log_table("detector/mentions", LOGGED_COLUMNS, _logged_rows(source, loggers.pictures))


def _logged_rows(source: RunReader, count: int) -> list[list[Any]]:
    """Make at most ``count`` rows of ``LOGGED_COLUMNS``, with equally many examples of each kind."""
    return [
        [
            example.kind,
            example.sample_id,
            example.object,
            example.probability,
            example.evidence,
            example.prior,
            None if example.image is None else TablePicture(example.image, example.images[0][1]),
            None if example.heatmap is None else TablePicture(example.heatmap, example.images[-1][1]),
            Marked(str(render("report/logged_answer.html", pieces=example.pieces)).strip(), example.text),
            example.question,
        ]
        for example in read_examples(source, -(-count // len(KINDS)))[:count]
    ]


def _curves(source: RunReader) -> Iterator[tuple[str, tuple[str, str, str], list[list[Any]]]]:
    """Compute every curve: its name, its columns and its points."""
    rows = source.held_out
    if rows["label"].nunique() == 2:
        pairs = {
            "roc": (curves.roc, ("false alarms", "found", "curve")),
            "precision_recall": (curves.precision_recall, ("recall", "precision", "curve")),
        }
        for name, (points, columns) in pairs.items():
            x, y = points(rows["label"].to_numpy(), rows["probability"].to_numpy())
            yield name, columns, [[*pair, "detector"] for pair in zip(x.tolist(), y.tolist(), strict=True)]
    calibrated = [[end, end, "calibrated"] for end in (0.0, 1.0)]
    shares = [
        [part.x, part.interval.value, "detector"] for part in curves.reliability(rows) if part.interval is not None
    ]
    yield "reliability", ("probability", "share hallucinated", "curve"), shares + calibrated
    areas = [
        [int(part.name.partition("–")[0]), part.interval.value, "detector"]
        for part in curves.by_position(rows)
        if part.interval is not None
    ]
    yield "auroc_by_position", ("token position", "AUROC", "curve"), areas
