"""Measure another checkout and this one in turn, and print one Markdown table: time, memory, equality.

    python scripts/bench/against.py 2984e12           # that commit against this checkout, about ten minutes
    python scripts/bench/against.py 2984e12 --parts relevancy beside --rounds 3
    python scripts/bench/against.py 2984e12 --table   # the table of the figures so far

Both checkouts run in a process of their own, with the same libraries, and take turns part by part, so that other work
on the machine falls on both; of --rounds times the smallest counts. Every figure is one JSON line in --out, written as
soon as it is reached; a second call goes on with those that are missing. Times are of the processor; those of the clock
are printed beside them. A part that fails is left out: 2984e12 needs skops for `stream` and `train` (in a folder of its
own, on PYTHONPATH).

    relevancy     from nothing, in plain forward passes: 8 layers, 512 wide, 640 prompt and 64 answer tokens
    beside        the same model: generation and trace with relevancy less those without, in forward passes
    image         relevancy from nothing at 2,916 image tokens
    features      runs of the evaluator over descriptions by the embedded model with each checkout's fast, default and
                  full features, token tables and heat maps, less the run without features
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
from against_table import BATCHES, table
from shapes import Figures

ROOT = Path(__file__).resolve().parents[2]
WORKER = str(Path(__file__).with_name("against_worker.py"))
PARTS = ("relevancy", "beside", "image", "features", "stream", "pope", "train", "start", "memory", "same")
ONCE = ("image", "train", "memory", "same")
"""Parts that are not repeated."""

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
        self._environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "WANDB_MODE": "offline"}
        folder.mkdir(parents=True, exist_ok=True)

    def ask(self, way: str, fresh: bool = False, **options: Any) -> Any:
        """Return what a method of ``Worker`` returns; ``fresh`` in a process that does nothing else."""
        if fresh:
            self.close()
        if self._process is None:
            words = [sys.executable, WORKER, str(self.root), "serve", str(self.folder)]
            self._process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1,
                env=self._environment, cwd=self.folder,
            )  # fmt: skip
        self._process.stdin.write(json.dumps([way, options]) + "\n")
        reply = self._process.stdout.readline()
        if not reply:
            raise SystemExit(f"{self.root}: {way} failed: {self._process.stderr.read()[-2000:]}")
        if fresh:
            self.close()
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


def asked(part: str) -> list[tuple[str, dict[str, Any]]]:
    """List the methods that a part asks for, with their options."""
    if part == "features":
        return [("features", {"batch": batch}) for batch in BATCHES]
    if part == "memory":
        peaks = [("memory", {"fresh": True, "kind": kind}) for kind in ("recomputed", "kept", "beside")]
        return [*peaks, *[("rss", {"fresh": True, "features": name}) for name in ("default", "full")]]
    return [(part, {})]


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
        rounds = 1 if part in ONCE else options.rounds
        for number in range(rounds):
            for way, extra in asked(part):
                for name, checkout in checkouts.items():
                    label = "-".join(str(value) for value in (way, *extra.values()) if value is not True)
                    key = f"{options.threads} {name} {label} {number}"
                    if not figures.missing(key):
                        continue
                    try:
                        values = checkout.start() if way == "start" else checkout.ask(way, **extra)
                        if way == "start" and name == "after":
                            values |= checkout.bare()
                    except SystemExit as error:
                        print(error, file=sys.stderr)
                        checkout.close()
                        continue
                    figures.add(key, part=label, name=name, threads=options.threads, values=values)
    for checkout in checkouts.values():
        checkout.close()


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="the other checkout")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "against.jsonl")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=2, help="of parts that are repeated; the smallest time counts")
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
