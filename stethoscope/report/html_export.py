"""Write the samples of a run as one HTML page that needs no server: the app's list, with pictures and heat maps."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stethoscope.core.files import atomic_write
from stethoscope.core.html import asset, data_uri, document, json_block, render
from stethoscope.relevancy.heatmaps import OPACITY, RAMP
from stethoscope.report.export import RunExport, clean
from stethoscope.report.metrics_tables import task_title
from stethoscope.report.sample_list import noted_rows

if TYPE_CHECKING:
    from PIL.Image import Image

    from stethoscope.storage.records import Record

SIDE = 320  # pixels along the longer side of a picture


def write_html(run: RunExport, folder: Path) -> list[Path]:
    """Write ``index.html``: all samples of a run with filters, order and search.

    Names of people who have noted something are left out. Questions about one picture share it.

    Args:
        run: the run.
        folder: to write into.

    Returns:
        The file.
    """
    rows: list[dict[str, Any]] = []
    pictures: dict[str, str] = {}
    for result in run.tasks:
        for record, row in _entries(run, result.task):
            own = _picture(run, record)
            key = record.image_sha256 or record.image
            if own is not None and key not in pictures:
                pictures[key] = data_uri(own, SIDE)
            rows.append({**row, "picture": key if key in pictures else "", "maps": _heatmaps(run, record)})
    keys = {key: index for index, key in enumerate(pictures)}  # digests would be most of a row
    for row in rows:
        row["picture"] = keys.get(row["picture"])
    data = {
        "run": clean(run.source.name),
        "other": "",
        "note": clean(run.source.off_policy()),
        "rows": rows,
        "pictures": list(pictures.values()),
        "ramp": RAMP.tolist(),
        "opacity": OPACITY,
    }
    tasks = ", ".join(task_title(result.task) for result in run.tasks)
    subtitle = clean(f"{run.source.model} on {tasks}")
    body = render(
        "report/samples_page.html",
        title=data["run"],
        subtitle=subtitle,
        samples=render("report/samples.html"),
        data=json_block("data", data),
    )
    code = render("diagnosis/page.js", viewer=asset("diagnosis/parts.js") + asset("report/samples.js"))
    style = asset("diagnosis/viewer.css") + asset("report/samples.css")
    file = folder / "index.html"
    atomic_write(file, document(f"{data['run']}: samples", body, style, code))
    return [file]


def _entries(run: RunExport, task: str) -> Iterator[tuple[Record, dict[str, Any]]]:
    """Yield the records of a task as they may leave the machine, with their rows."""
    for record, row in noted_rows(run.source, task, run.records(task), run.warnings(task), None):
        row["notes"] = [{**note, "author": ""} for note in row["notes"]]
        yield record, clean(row)


def _picture(run: RunExport, record: Record) -> Image | None:
    if not run.settings.pictures:
        return None
    media = run.media(record)
    return run.picture(record) or (None if media is None else media.picture)


def _heatmaps(run: RunExport, record: Record) -> dict[str, Any]:
    """Return the heat maps of a record by the first character of their mention, and their shape."""
    media = run.media(record) if run.settings.pictures else None
    if media is None or record.answer is None:
        return {}
    starts = {token: start for token, (start, _) in enumerate(record.answer.offsets)}
    maps = {
        starts[token]: base64.b64encode(values.tobytes()).decode("ascii")
        for token, values in media.maps.items()
        if token in starts
    }
    return {"shape": list(next(iter(media.maps.values())).shape), "values": maps} if maps else {}
