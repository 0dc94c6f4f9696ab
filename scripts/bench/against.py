"""Measure another checkout and this one in turn, and print one Markdown table: time, memory, equality.

    python scripts/bench/against.py 2984e12           # that commit against this checkout, about twenty minutes
    python scripts/bench/against.py 2984e12 --parts features     # about seven minutes
    python scripts/bench/against.py 2984e12 --parts relevancy beside --rounds 5
    python scripts/bench/against.py 2984e12 --table   # the table of the figures so far

A round is a pair of fresh processes, one of each checkout, with the same libraries. The two take turns (in `features`
run by run), and the next pair begins with the other, so that neither a process that happens to be slow nor other work
on the machine falls on one checkout alone. Ratios are taken pair by pair; the table has their median and, in brackets,
the smallest and the largest. Processes keep the bytecode of what they import, as an installation does, even where
PYTHONDONTWRITEBYTECODE is set: without it each compiles the package anew (.4 s). Every figure is one JSON line
in --out, written as soon as both checkouts of a pair have reached it; a second call goes on with those that are
missing. Times are of the processor; those of the clock are printed beside them. A part that fails is left out: 2984e12
needs skops for `stream` and `train` (in a folder of its own, on PYTHONPATH).

    relevancy     from nothing, in plain forward passes: 8 layers, 512 wide, 640 prompt and 64 answer tokens
    beside        the same model: generation and trace with relevancy less those without, in forward passes
    image         relevancy from nothing at 2,916 image tokens
    features      runs of the evaluator over 24 descriptions by the embedded model with each checkout's fast, default
                  and full features, token tables and heat maps, beside the run without features; default_relevancy is
                  compared with the default of before, which had relevancy
    stream        a stream with the detector's probabilities, undelayed, beside generation
    pope          questions per second, 18 to a picture, in batches of 32
    train         the command `train` on 1,000 descriptions of at most 32 tokens with each checkout's default features
    start         a whole process that answers one question, after one that wrote bytecode, beside a bare script of
                  transformers (harness.py)
    memory        peak of relevancy and of whole runs
    same          200 descriptions: token ids, features and maps, and the probabilities of one logistic regression,
                  fitted on the other checkout's features and applied to both
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pandas as pd
from shapes import Figures
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

# --- the table: ratios beside their limits, and whether both checkouts agree ------------------------------------------

CHECKOUTS = ("before", "after")
SETS, BATCHES = ("fast", "default", "default_relevancy", "full"), (1, 8)
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
        ("beside", "generation and trace of 64 tokens, s", itemgetter("plain"), "", None),
        ("beside", "the same with relevancy, s", itemgetter("with"), "", None),
        ("relevancy", "relevancy from nothing, forwards", nothing, "2.5", lambda _, now: now <= 2.5),
        ("image", "2,916 image tokens, forwards", nothing, "4", lambda _, now: now <= 4),
    ]
    limits = {1: (0.06, 0.32, 0.32, 0.65), 8: (0.10, 0.60, 0.60, 1.40)}
    for batch in BATCHES:
        many = "batches of 8" if batch == 8 else "one at a time"
        rows.append((f"features-{batch}", f"run without features, {many}, s", lambda t: t["none"], "", None))
        for name, limit in zip(SETS, limits[batch], strict=True):
            more = lambda t, name=name: t[name] / t["none"]  # noqa: E731
            kept = lambda _, now, limit=limit: now <= 1 + limit  # noqa: E731
            rows.append((f"features-{batch}", f"`{name}`, {many}, x plain", more, f"{1 + limit:.2f}", kept))
            rows.append((f"features-{batch}", f"`{name}`, {many}, s", itemgetter(name), "", None))
    rows += [
        ("stream", "streaming, undelayed, x plain", lambda t: t["stream"] / t["generate"], "1.05",
         lambda _, now: now <= 1.05),
        ("pope", "POPE questions per second", lambda t: 1 / t["question"], "2.5 x", lambda was, now: now >= 2.5 * was),
        ("train", "`train` on 1,000 descriptions of at most 32 tokens, s", lambda t: t["train"], "half",
         lambda was, now: now <= was / 2),
        ("start", "start to first answer, s", lambda t: t["start"], "bare + 1", None),
    ]  # fmt: skip
    peaks = {"memory-recomputed": "relevancy from nothing", "memory-kept": "the same, graphs kept",
             "memory-beside": "relevancy and generation", "rss-default_relevancy": "run with `default_relevancy`",
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
    numbers = [set(table.select_dtypes(np.floating).columns) for table in tables]
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
                f"{np.median(errors):.1e} in the median.")  # fmt: skip
    labelled = tables[0]["label"].isin((0, 1)).to_numpy()
    inputs = [np.nan_to_num(part[labelled]) for part in parts]
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=5000))
    model.fit(inputs[0], tables[0]["label"][labelled])
    probabilities = [model.predict_proba(part)[:, 1] for part in inputs]
    text.append(f"Probabilities of {labelled.sum()} tokens of mentions by one logistic regression, fitted on the "
                f"features before: {np.abs(probabilities[1] - probabilities[0]).max():.1e} apart at most.")  # fmt: skip
    return text


# --- the measurement --------------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[2]
WORKER = str(Path(__file__).with_name("against_worker.py"))
PARTS = ("relevancy", "beside", "image", "features", "stream", "pope", "train", "start", "memory", "same")
ROUNDS = {"features": 8, "start": 5, "image": 1, "train": 1, "memory": 1, "same": 1}
"""Pairs of processes, where they are not 3."""

Times = dict[str, list[float]]
"""By way, seconds of the processor and of the clock."""


class Checkout:
    """A checkout, in a process that starts when it is first asked.

    Args:
        root: of the checkout.
        folder: for its runs.
        threads: of torch.
    """

    def __init__(self, root: Path, folder: Path, threads: int) -> None:
        self.root, self.folder = root, folder
        self._process: subprocess.Popen[str] | None = None
        self._log = folder / "worker.log"
        self._environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "WANDB_MODE": "offline"}
        self._environment.pop("PYTHONDONTWRITEBYTECODE", None)
        folder.mkdir(parents=True, exist_ok=True)

    def ask(self, way: str, /, **options: Any) -> Any:
        """Return what a method of ``Worker`` returns."""
        if self._process is None:
            words = [sys.executable, WORKER, str(self.root), "serve", str(self.folder)]
            with self._log.open("wb") as log:  # a pipe that nobody reads would stop the worker when it is full
                self._process = subprocess.Popen(
                    words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, bufsize=1,
                    env=self._environment, cwd=self.folder,
                )  # fmt: skip
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps([way, options]) + "\n")
        reply = self._process.stdout.readline()
        if not reply:
            raise SystemExit(f"{self.root}: {way} failed: {self._log.read_text(errors='replace')[-2000:]}")
        return json.loads(reply)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.communicate()
            self._process = None

    def start(self) -> Times:
        """Time a process that answers one question of POPE."""
        with tempfile.TemporaryDirectory() as folder:
            words = ["evaluate", "task=pope", "task.scenes=2", "limit=1", "logger=none", f"run_dir={folder}/run"]
            return {"start": self.process([sys.executable, WORKER, str(self.root), "command", *words])}

    def bare(self) -> Times:
        """Time a bare script of transformers that answers one question."""
        with tempfile.TemporaryDirectory() as folder:
            harness.export(Path(folder), 1)
            words = [sys.executable, harness.__file__, "--bare", folder, "--questions", "1"]
            return {"bare": self.process(words)}

    def process(self, words: Sequence[str]) -> list[float]:
        """Return the seconds of the processor and of the clock that a process takes."""
        start = time.perf_counter()
        with subprocess.Popen(
            words, env=self._environment, cwd=self.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{' '.join(words)} ended with {process.returncode}")
        return [usage.ru_utime + usage.ru_stime, time.perf_counter() - start]


Step = tuple[str, dict[str, Any]]
"""A method of ``Worker``, and its options."""


def asked(part: str, number: int) -> list[tuple[str, list[Step]]]:
    """List the figures of a round, each with the steps in which the checkouts take turns."""
    if part == "features":
        ways = ["none", *SETS][:: -1 if number % 2 else 1]
        return [
            (f"features-{batch}", [("warm_up", {}), *(("features", {"batch": batch, "way": way}) for way in ways)])
            for batch in BATCHES
        ]
    if part == "memory":
        peaks = [(f"memory-{kind}", [("memory", {"kind": kind})]) for kind in ("recomputed", "kept", "beside")]
        return [*peaks, *[(f"rss-{name}", [("rss", {"features": name})]) for name in ("default_relevancy", "full")]]
    return [(part, [(part, {})] * (2 if part == "start" else 1))]  # the later of two starts counts


def take_turns(checkouts: Mapping[str, Checkout], steps: Sequence[Step]) -> dict[str, Any]:
    """Return the values of the checkouts that can do all steps, each of which they do one after the other."""
    values: dict[str, Any] = {name: {} for name in checkouts}
    for way, extra in steps:
        for name in list(values):
            try:
                values[name] |= checkouts[name].start() if way == "start" else checkouts[name].ask(way, **extra)
            except SystemExit as error:
                print(error, file=sys.stderr)
                checkouts[name].close()
                del values[name]
    if steps[0][0] == "start" and "after" in values:
        values["after"] |= checkouts["after"].bare()
    return values


def measure(options: argparse.Namespace, figures: Figures) -> None:
    """Measure what is missing, checkouts in turn."""
    folder = options.out.resolve().parent / f"against-{options.commit}"
    other = folder / "checkout"
    if not other.exists():
        other.mkdir(parents=True)
        archive = subprocess.run(["git", "archive", options.commit], cwd=ROOT, capture_output=True, check=True).stdout
        subprocess.run(["tar", "x"], cwd=other, input=archive, check=True)
    roots = {"before": other, "after": ROOT}
    checkouts = {name: Checkout(root, (folder / name).resolve(), options.threads) for name, root in roots.items()}
    for part in options.parts:
        for number in range(ROUNDS.get(part, 3) if options.rounds is None else options.rounds):
            order = dict(list(checkouts.items())[:: -1 if number % 2 else 1])
            for label, steps in asked(part, number):
                keys = {name: f"{options.threads} {name} {label} {number}" for name in order}
                if any(figures.missing(key) for key in keys.values()):
                    for name, values in take_turns(order, steps).items():
                        about = {"part": label, "name": name, "threads": options.threads, "round": number}
                        figures.add(keys[name], **about, values=values)
                if part == "memory":  # every peak is that of a process which does nothing else
                    close(checkouts)
            close(checkouts)


def close(checkouts: Mapping[str, Checkout]) -> None:
    """End the processes."""
    for checkout in checkouts.values():
        checkout.close()


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="the other checkout")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "against.jsonl")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--rounds", type=int, help="pairs of processes (default: 8 for `features`, 5 for `start`, 3 or 1 for others)"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no further figure after so long")
    parser.add_argument("--table", action="store_true", help="print the table of the figures so far")
    options = parser.parse_args()
    figures = Figures(options.out, options.seconds)
    if not options.table:
        measure(options, figures)
    print(table(figures.lines, options.threads))


if __name__ == "__main__":
    main()
