"""From a fitted detector to warnings: a calibrated probability for every object that an answer names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stethoscope.core.files import replacing

if TYPE_CHECKING:
    import pandas as pd

    from stethoscope.detector import Detector

COLUMNS = {
    "task": "name of the task",
    "sample_id": "sample whose answer it is",
    "group": "its image",
    "object": "canonical name of the object",
    "start": "first character of the mention's tokens in the answer's text",
    "end": "the character after them",
    "probability": "calibrated probability that the object is hallucinated",
    "evidence": "what the model's own computation says, in log-odds; above 0 it speaks for hallucination",
    "prior": "what place and name say (or, not factored, the base rate), in log-odds; the sum gives the probability",
    "looks": "what the place that it was written from looks like: [object, probability], null for nothing known; [] "
    "where the detector has no sight",
    "warned": "the probability is at or above the detector's threshold",
    "label": "the truth where the task knows it: 1 hallucinated, 0 grounded, -1 not judged",
    "fold": "train, calibration or test where the detector was fitted on this run, else empty",
}
"""The keys of a line of ``warnings.jsonl``."""


def mention_warnings(
    table: pd.DataFrame, detector: Detector, folds: Mapping[str, np.ndarray] | None = None
) -> pd.DataFrame:
    """One row of ``COLUMNS`` for every object mention of a token table; see ``Detector.deciding`` for repeated ones.

    Args:
        table: a token table with the features that the detector was fitted on.
        detector: fitted or loaded; it says what stands for a mention of several sub-tokens (of ``all``: the first).
        folds: (rows,) masks of the table by name, as the detector was fitted.

    Raises:
        ArtefactError: the table has other features than the detector was fitted on.
    """
    named = table[table["number"] >= 0]
    ends = named.groupby(["task", "sample_id", "number"], sort=False)["end"].max().rename("until")
    first = detector.rows(table, judged=False)
    first = first[first["first"]].reset_index(drop=True)
    rows = first[["task", "sample_id", "group", "object", "start", "label", "number"]].copy()
    deciding = detector.deciding(first)
    rows["probability"] = detector.predict(first)[deciding]
    rows["evidence"], rows["prior"] = None, None
    if detector.additive:
        why = detector.explain(first)
        rows["evidence"], rows["prior"] = why.evidence[deciding], why.prior[deciding]
    looks = detector.looks(first)
    rows["looks"] = [looks[row] for row in deciding]
    rows["warned"] = rows["probability"] >= detector.threshold
    rows["fold"] = ""
    for name, mask in (folds or {}).items():
        rows.loc[rows["group"].isin(set(table["group"][mask])), "fold"] = name
    rows = rows.join(ends, on=["task", "sample_id", "number"]).rename(columns={"until": "end"})
    return rows[list(COLUMNS)]


def write_warnings(rows: pd.DataFrame, path: Path) -> None:
    """Writes ``warnings.jsonl``, a JSON object per line; an older file is replaced at the very end."""
    with replacing(path) as file:
        for row in rows.to_dict("records"):
            exact = {name: row[name] for name in ("probability", "evidence", "prior")}
            short = {name: None if value is None else round(value, 6) for name, value in exact.items()}
            looks = [[name, round(chance, 6)] for name, chance in row["looks"]]
            line = json.dumps({**row, **short, "looks": looks}, ensure_ascii=False, allow_nan=False) + "\n"
            file.write(line.encode("utf-8", "backslashreplace"))
