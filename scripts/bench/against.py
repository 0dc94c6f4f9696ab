"""Measure another checkout and this one in turn, and print one Markdown table: time, memory, equality.

    python scripts/bench/against.py 2984e12           # that commit against this checkout, about twenty minutes
    python scripts/bench/against.py 2984e12 --parts features     # about seven minutes
    python scripts/bench/against.py 2984e12 --parts relevancy beside --rounds 5
    python scripts/bench/against.py 2984e12 --table   # the table of the figures so far

A round is a pair of fresh processes, one of each checkout, with the same libraries. The two take turns (in `features`
run by run), and the next pair begins with the other, so that neither a process that happens to be slow nor other work
on the machine falls on one checkout alone. Ratios are taken pair by pair; the table has their median and, in brackets,
the smallest and the largest. Every figure is one JSON line in --out, written as soon as both checkouts of a pair have
reached it; a second call goes on with those that are missing. Times are of the processor; those of the clock are
printed beside them. A part that fails is left out: 2984e12 needs skops for `stream` and `train` (in a folder of its
own, on PYTHONPATH).

    relevancy     from nothing, in plain forward passes: 8 layers, 512 wide, 640 prompt and 64 answer tokens
    beside        the same model: generation and trace with relevancy less those without, in forward passes
    image         relevancy from nothing at 2,916 image tokens
    features      runs of the evaluator over 24 descriptions by the embedded model with each checkout's fast, default
                  and full features, token tables and heat maps, beside the run without features
    stream        a stream with the detector's probabilities, undelayed, beside generation
    pope          questions per second, 18 to a picture, in batches of 32
    train         the command `train` on 1,000 descriptions with each checkout's default features
    start         a whole process that answers one question, beside a bare script of transformers (harness.py)
    memory        peak of relevancy and of whole runs
    same          200 descriptions: token ids, features and maps, and the probabilities of one logistic regression,
                  fitted on the other checkout's features and applied to both
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
from against_table import BATCHES, SETS, table
from shapes import Figures

ROOT = Path(__file__).resolve().parents[2]
WORKER = str(Path(__file__).with_name("against_worker.py"))
PARTS = ("relevancy", "beside", "image", "features", "stream", "pope", "train", "start", "memory", "same")
ROUNDS = {"features": 8, "image": 1, "train": 1, "memory": 1, "same": 1}
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
        self.root, self.folder, self._process = root, folder, None
        self._log = folder / "worker.log"
        self._environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "WANDB_MODE": "offline"}
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
        return [*peaks, *[(f"rss-{name}", [("rss", {"features": name})]) for name in ("default", "full")]]
    return [(part, [(part, {})])]


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
    parser.add_argument("--rounds", type=int, help="pairs of processes (default: 8 for `features`, 3 or 1 for others)")
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
