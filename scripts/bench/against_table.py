"""Make the table of against.py from its figures: ratios beside their limits, and whether both checkouts agree."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

CHECKOUTS = ("before", "after")
SETS, BATCHES = ("fast", "default", "full"), (1, 8)
REDEFINED = "glsim"
"""Beginning of the names of features that have another definition since 2984e12 (CHANGELOG.md); not compared."""
Row = tuple[str, str, Callable[[Mapping[str, float]], float], str, Callable[[float, float], bool] | None]
"""Part, what it shows, how it follows from the seconds of the part's ways, the limit, and whether it is kept by the
values before and after."""


def _rows() -> list[Row]:
    beside = lambda t: (t["with"] - t["plain"]) / t["forward"]  # noqa: E731
    nothing = lambda t: t["relevancy"] / t["forward"]  # noqa: E731
    rows: list[Row] = [
        ("beside", "relevancy beside generation, forwards", beside, "1.5", lambda _, now: now <= 1.5),
        ("relevancy", "relevancy from nothing, forwards", nothing, "2.5", lambda _, now: now <= 2.5),
        ("image", "2,916 image tokens, forwards", nothing, "4", lambda _, now: now <= 4),
    ]
    limits = {1: (0.06, 0.32, 0.65), 8: (0.10, 0.60, 1.40)}
    for batch in BATCHES:
        many = "batches of 8" if batch == 8 else "one at a time"
        rows.append((f"features-{batch}", f"run without features, {many}, s", lambda t: t["none"], "", None))
        for name, limit in zip(SETS, limits[batch], strict=True):
            more = lambda t, name=name: t[name] / t["none"]  # noqa: E731
            kept = lambda _, now, limit=limit: now <= 1 + limit  # noqa: E731
            rows.append((f"features-{batch}", f"`{name}`, {many}, x plain", more, f"{1 + limit:.2f}", kept))
            rows.append((f"features-{batch}", f"`{name}`, {many}, s", lambda t, name=name: t[name], "", None))
    rows += [
        ("stream", "streaming, undelayed, x plain", lambda t: t["stream"] / t["generate"], "1.05",
         lambda _, now: now <= 1.05),
        ("pope", "POPE questions per second", lambda t: 1 / t["question"], "2.5 x", lambda was, now: now >= 2.5 * was),
        ("train", "`train` on 1,000 descriptions, s", lambda t: t["train"], "half", lambda was, now: now <= was / 2),
        ("start", "start to first answer, s", lambda t: t["start"], "bare + 1", None),
    ]  # fmt: skip
    peaks = {"memory-recomputed": "relevancy from nothing", "memory-kept": "the same, graphs kept",
             "memory-beside": "relevancy and generation", "rss-default": "run with `default`",
             "rss-full": "run with `full`"}  # fmt: skip
    fits = lambda was, now: now <= 1.02 * was  # noqa: E731
    return rows + [(part, f"peak memory, {what}, MiB", lambda t: t["mib"], "as before", fits)
                   for part, what in peaks.items()]  # fmt: skip


def rounds(lines: Sequence[dict[str, Any]], part: str, clock: int) -> list[dict[str, dict[str, float]]]:
    """Return the seconds of every way of a part by checkout, round by round; memory as it is."""
    pairs: dict[int, dict[str, dict[str, float]]] = {}
    for line in lines:
        if line["part"] == part:
            values = {way: value[clock] if isinstance(value, list) else value for way, value in line["values"].items()}
            pairs.setdefault(line["round"], {})[line["name"]] = values
    return [pair for pair in pairs.values() if len(pair) == len(CHECKOUTS)]


def spread(values: Sequence[float]) -> str:
    """Format the median of values, and the smallest and the largest where there are several.

    >>> spread([1.234]), spread([1.1, 1.3, 1.2])
    ('1.23', '1.20 (1.10-1.30)')
    """
    texts = [f"{value:.0f}" if value >= 100 else f"{value:.2f}" for value in
             (statistics.median(values), min(values), max(values))]  # fmt: skip
    return texts[0] if len(values) == 1 else f"{texts[0]} ({texts[1]}-{texts[2]})"


def table(lines: Sequence[dict[str, Any]], threads: int) -> str:
    """Format the figures as Markdown."""
    lines = [line for line in lines if line["threads"] == threads]
    text = [f"| {threads} thread(s) | before | after | after / before | limit | kept | clock, before | clock, after |",
            "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for part, what, figure, limit, kept in _rows():
        clocks = [rounds(lines, part, clock) for clock in (0, 1)]
        if not clocks[0]:
            continue
        before, after, *clock = [[figure(pair[name]) for pair in pairs] for pairs in clocks for name in CHECKOUTS]
        good = kept(statistics.median(before), statistics.median(after)) if kept else None
        if part == "start":
            bare = statistics.median(pair["after"]["bare"] for pair in clocks[0])
            limit, good = f"{bare + 1:.1f} (bare + 1)", statistics.median(after) <= bare + 1
        quotients = [now / was for was, now in zip(before, after, strict=True)]
        cells = [what, *map(spread, (before, after, quotients)), limit, {True: "yes", False: "NO", None: ""}[good],
                 *([""] * 2 if "memory" in what else map(spread, clock))]  # fmt: skip
        text.append(f"| {' | '.join(cells)} |")
    folders = {line["name"]: Path(line["values"]["folder"]) for line in lines if line["part"] == "same"}
    return "\n".join(text + (equality(*(folders[name] for name in CHECKOUTS)) if len(folders) == 2 else []))


def equality(before: Path, after: Path) -> list[str]:
    """Compare answers, features, maps and probabilities of two runs; return lines of text."""
    ids = []
    for folder in (before, after):
        records = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        ids.append({record["sample_id"]: record["answer"]["token_ids"] for record in records})
    same = sum(ids[0][key] == ids[1].get(key) for key in ids[0])
    text = ["", f"The same token ids in {same} of {len(ids[0])} answers."]
    tables = [pd.read_parquet(folder / "table.parquet") for folder in (before, after)]
    numbers = [set(table.select_dtypes("floating").columns) for table in tables]
    shared = sorted(name for name in numbers[0] & numbers[1] if not name.startswith(REDEFINED))
    keys = ["sample_id", "token"]
    if not tables[0][keys].reset_index(drop=True).equals(tables[1][keys].reset_index(drop=True)):
        return [*text, "The rows of the two tables differ."]
    parts = [table[shared].to_numpy(float) for table in tables]
    scale = np.maximum(np.nanstd(parts[0], 0), 1e-12)
    gap = np.nan_to_num(np.abs(parts[1] - parts[0]) / np.maximum(np.abs(parts[0]), scale))
    if (np.isnan(parts[0]) != np.isnan(parts[1])).any():
        text.append("Values are missing in one of the tables alone.")
    worst = sorted(zip(gap.max(0), shared, strict=True), reverse=True)
    above = [f"{name} {value:.1e}" for value, name in worst if value > 1e-5]
    text.append(f"{len(shared)} features in both; largest difference {worst[0][0]:.1e} of the value or its deviation "
                f"({worst[0][1]}); above 1e-5: {', '.join(above) or 'none'}.")  # fmt: skip
    apart = [sorted({name.rstrip("0123456789") for name in numbers[side] - numbers[1 - side]}) for side in (0, 1)]
    text.append(f"Defined anew: {REDEFINED}. Only before: {', '.join(apart[0]) or 'none'}; "
                f"only after: {', '.join(apart[1]) or 'none'}.")  # fmt: skip
    maps = [np.load(folder / "maps.npz") for folder in (before, after)]
    errors = [np.linalg.norm(maps[1][key] - maps[0][key]) / np.linalg.norm(maps[0][key]) for key in maps[0].files]
    text.append(f"Relevancy of {len(errors)} answers: relative difference {max(errors):.1e} at most, "
                f"{statistics.median(errors):.1e} in the median.")  # fmt: skip
    labelled = tables[0]["label"].isin((0, 1)).to_numpy()
    inputs = [np.nan_to_num(part[labelled]) for part in parts]
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=5000))
    model.fit(inputs[0], tables[0]["label"][labelled])
    probabilities = [model.predict_proba(part)[:, 1] for part in inputs]
    text.append(f"Probabilities of {labelled.sum()} tokens of mentions by one logistic regression, fitted on the "
                f"features before: {np.abs(probabilities[1] - probabilities[0]).max():.1e} apart at most.")  # fmt: skip
    return text
