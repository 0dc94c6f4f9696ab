"""Kills a run with SIGKILL at random moments, starts it again each time, and checks that nothing came of it.

    python scripts/kill_runs.py                       # 20 kills, 1 and 2 processes in turn, some minutes on 2 cores

A run here is ``stethoscope evaluate task=chair`` and then ``stethoscope extract features=fast``, with the embedded
model. Where there are two processes, both are killed. Moments are drawn from --seed: one in four falls anywhere into
the first seconds after the start, when models are loaded and the files of an earlier sitting are put together, the
others as soon as there are so many new records. At the end the run directory is compared with that of a run that nobody
disturbed: ``metrics.json``, all records but for their seconds, log-probabilities to 1e-5, all token rows to 1e-4. Exits
with 1 on any difference, and if fewer kills than asked for have hit a run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

START = 6.0
"""Seconds from the start of a sitting within which one kill in four falls."""


@dataclass(frozen=True)
class Step:
    """A command of a run.

    Attributes:
        name: for the table.
        words: the command, to be given to Python.
        done: whether the run directory shows that it need not be started any more.
    """

    name: str
    words: Sequence[str]
    done: Callable[[Path], bool]


def main() -> None:
    """Runs undisturbed, runs disturbed, compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scenes", type=int, default=400, help="captions of the run")
    parser.add_argument("--spread", type=int, default=70, help="a kill falls after so many new records at most")
    parser.add_argument("--keep", type=Path, help="folder for the two run directories, which are removed otherwise")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        runs = options.keep or Path(temporary)
        whole, cut = runs / "whole", runs / "cut"
        for folder in (whole, cut):
            shutil.rmtree(folder, ignore_errors=True)
        begun = time.monotonic()
        finish(steps_of(whole, options.scenes), whole, 1)
        print(f"undisturbed: {time.monotonic() - begun:.0f} s", flush=True)
        kills = disturb(steps_of(cut, options.scenes), cut, options.kills, options.seed, options.spread)
        finish(steps_of(cut, options.scenes), cut, 2)
        problems = differences(whole, cut)
    print(f"{kills} kills in {time.monotonic() - begun:.0f} s; " + ("; ".join(problems) or "no difference"))
    sys.exit(1 if problems or kills < options.kills else 0)


def steps_of(folder: Path, scenes: int) -> list[Step]:
    """The commands of the run that is killed."""
    chair = [f"task.scenes={scenes}", "batch_size=16", f"runs={folder.parent}", f"name={folder.name}"]
    evaluate = ["-m", "stethoscope", "evaluate", "task=chair", "logger.mode=disabled", *chair]
    extract = ["-m", "stethoscope", "extract", f"run={folder}", "features=fast"]
    return [
        Step("evaluate", evaluate, lambda run: _finished(run) or _has_features(run)),
        Step("extract", extract, _extracted),
    ]


def disturb(
    steps: Sequence[Step], run: Path, kills: int, seed: int, spread: int, start: float = START, quiet: bool = False
) -> int:
    """Kills the steps of a run, one after the other, 1 and 2 processes in turn.

    Args:
        steps: what the run consists of.
        run: its directory.
        kills: how often.
        seed: of the moments.
        spread: a kill falls after so many new records of a sitting at most, three times of four.
        start: within so many seconds after the start of a sitting it falls otherwise.
        quiet: prints no table.

    Returns:
        How many kills have hit a run that was going on.
    """
    draw, hit, number = random.Random(seed), 0, 0
    row = "{:>4}  {:>9}  {:>9}  {:>7}  {:>12}  {:>7}  {:>10}".format
    if not quiet:
        print(row("try", "processes", "step", "second", "moment", "records", "with rows"))
    while hit < kills and (step := next((step for step in steps if not step.done(run)), None)) is not None:
        number += 1
        early, share = draw.random() < 0.25, draw.random()
        processes = 1 + (number - 1) % 2
        before, begun = _count(run), time.monotonic()
        workers = launch(step.words, processes)
        if early:
            time.sleep(share * start)
        while not early and _count(run) <= before + share * spread and any(one.poll() is None for one in workers):
            time.sleep(0.01)
        codes = [worker.poll() for worker in workers]
        if any(codes):
            raise SystemExit(f"{step.name} ended by itself with {codes}")
        for worker in workers:
            worker.send_signal(signal.SIGKILL)
            worker.wait()
        killed = None in codes
        hit += killed
        lines = _records(run)
        rows = sum(line["tokens"] > 0 for line in lines)
        moment = ("start" if early else "work") if killed else "had finished"
        if not quiet:
            cells = row(number, processes, step.name, f"{time.monotonic() - begun:.1f}", moment, len(lines), rows)
            print(cells, flush=True)
    return hit


def finish(steps: Sequence[Step], run: Path, processes: int) -> None:
    """Does what is left of a run."""
    for step in steps:
        if not step.done(run):
            codes = [worker.wait() for worker in launch(step.words, processes)]
            if any(codes):
                raise SystemExit(f"{step.name} ended with {codes}")


def launch(words: Sequence[str], processes: int, listen: bool = False) -> list[subprocess.Popen]:
    """Starts a command in several processes, as ``torchrun`` does; by hand, so that each can be killed.

    Args:
        words: the command, to be given to Python.
        processes: how many.
        listen: keeps what they write to stderr, for ``communicate``.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if processes > 1:
        environment |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        environment |= {"LOCAL_WORLD_SIZE": str(processes)}
    workers = []
    for rank in range(processes):
        mine = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        command = [sys.executable, *words]
        errors = subprocess.PIPE if listen else subprocess.DEVNULL
        workers.append(subprocess.Popen(command, env={**environment, **mine}, stdout=subprocess.DEVNULL, stderr=errors))
    return workers


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def differences(one: Path, other: Path) -> list[str]:
    """In what two run directories differ that should not."""
    found = []
    if _json(one / "metrics.json") != _json(other / "metrics.json"):
        found.append("metrics.json differs")
    for run in (one, other):
        ids = [(line["task"], line["sample_id"]) for line in _records(run)]
        if len(set(ids)) < len(ids):
            found.append(f"{len(ids) - len(set(ids))} records of {run.name} are double")
        if left := [path.name for name in ("shards", "tokens") for path in [run / name] if path.exists()]:
            found.append(f"{run.name} still has {', '.join(left)}")
    mine, theirs = ({(line["task"], line["sample_id"]): line for line in _records(run)} for run in (one, other))
    if lost := mine.keys() - theirs.keys():
        found.append(f"{len(lost)} samples are lost, such as {min(lost)}")
    if more := theirs.keys() - mine.keys():
        found.append(f"{len(more)} samples are new, such as {min(more)}")
    unequal = [key for key in mine.keys() & theirs.keys() if not _same_record(mine[key], theirs[key])]
    if unequal:
        found.append(f"{len(unequal)} records differ, such as {min(unequal)}")
    return [*found, *_row_differences(one / "tokens.parquet", other / "tokens.parquet")]


def _same_record(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    one, other = ({key: value for key, value in line.items() if key != "seconds"} for line in (one, other))
    probabilities = []
    for line in (one, other):
        if line["answer"]:
            line["answer"] = dict(line["answer"])
            probabilities.append(line["answer"].pop("logprobs"))
    if one != other:
        return False
    return not probabilities or np.allclose(*probabilities, rtol=0, atol=1e-5)


def _row_differences(one: Path, other: Path) -> Iterator[str]:
    """In what two token tables differ, whatever the order of their samples."""
    if not (one.exists() and other.exists()):
        if one.exists() != other.exists():
            yield f"only one run has {one.name}"
        return
    keys = ["task", "sample_id", "token"]
    mine, theirs = (pd.read_parquet(path).sort_values(keys, ignore_index=True) for path in (one, other))
    if list(mine.columns) != list(theirs.columns) or len(mine) != len(theirs):
        yield f"token tables of {mine.shape} and {theirs.shape}"
        return
    for name in mine.columns:
        if mine[name].dtype == np.float32:
            same = np.allclose(mine[name], theirs[name], rtol=1e-4, atol=1e-4, equal_nan=True)
        else:
            same = mine[name].equals(theirs[name])
        if not same:
            yield f"column {name} of the token tables differs"


def _files(run: Path) -> list[Path]:
    return [run / "samples.jsonl", *sorted(run.glob("shards/samples-*.jsonl"))]


def _count(run: Path) -> int:
    """Lines in all files of records."""
    total = 0
    for path in _files(run):
        try:
            total += path.read_bytes().count(b"\n")
        except OSError:  # not there yet, or just taken in by the first process
            continue
    return total


def _records(run: Path) -> list[dict[str, Any]]:
    """The lines of all files of records, without what a kill has left of one."""
    lines = []
    for path in _files(run):
        for line in path.read_bytes().splitlines() if path.exists() else ():
            try:
                lines.append(json.loads(line))
            except ValueError:
                continue
    return lines


def _finished(run: Path) -> bool:
    return _json(run / "status.json").get("chair") == "finished"


def _has_features(run: Path) -> bool:
    return "features" in _json(run / "fingerprint.json").get("chair", {})


def _extracted(run: Path) -> bool:
    return _finished(run) and _has_features(run) and (run / "tokens.parquet").exists()


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


if __name__ == "__main__":
    main()
