"""Disturbs a run by signals at random moments, starts it again each time, and checks that nothing came of it.

    python tests/slow/kill_runs.py    # 20 signals, 1 and 2 processes in turn, some minutes on 2 cores
    python tests/slow/kill_runs.py --kills 100 --commands evaluate,extract,train,benchmark

A run here is ``stethoscope evaluate task=chair``, then ``extract features=fast``, then ``train``; or ``benchmark``, in
a run directory of its own; with the embedded model. Signals come in turn: SIGKILL, SIGTERM, and SIGSTOP, which is
followed by SIGCONT half a second later and, with the same process going on, by SIGKILL. Of two processes both are hit,
or in every other try only one of them, which must end the other. Moments are drawn from --seed: one in four falls into
the first seconds after the start, when models are loaded and the files of an earlier sitting are put together, the
others as soon as there are so many new records; while a detector is fitted, anywhere into the time that this takes. At
the end the run directories are compared with those of runs that nobody disturbed: ``metrics.json`` with the detector's
figures, ``warnings.jsonl``, all records but for their seconds, log-probabilities to 1e-5, all token rows to 1e-4. Exits
with 1 on any difference, and if fewer signals than asked for have hit a run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

START = 6.0
"""Seconds from the start of a sitting within which one signal in four falls."""

DIGITS, NOISE_DIGITS = 2e-4, 5e-3
"""Differences of figures that other batches make by rounding, and what becomes of them in a control fitted to noise."""

SIGNALS = {"KILL": signal.SIGKILL, "TERM": signal.SIGTERM, "STOP": signal.SIGSTOP}
IMPORTED = [
    *(f"stethoscope.commands.{name}" for name in ("evaluate", "extract", "train", "benchmark")),
    *(
        f"stethoscope.{name}"
        for name in ("adapters.testbed", "evaluation.evaluator", "tasks.chair", "tasks.pope", "features")
    ),
    *(
        "stethoscope.detection.detector",
        "stethoscope.detection.training",
        "stethoscope.report.examples",
        "stethoscope.storage.run_dir",
    ),
    *("torch.distributed", "transformers.models.llava.modeling_llava", "transformers.models.auto.modeling_auto"),
    *("sklearn.linear_model", "sklearn.isotonic", "pandas", "pyarrow.parquet", "filelock", "yaml"),
]
"""What is imported before processes are forked."""

PATIENCE = 120.0
"""Seconds within which a process must end after SIGTERM, or after the other one has been killed."""


@dataclass(frozen=True)
class Step:
    """A command of a run.

    Attributes:
        name: for the table.
        words: the command, to be given to Python.
        done: whether the run directory shows that it need not be started any more.
        seconds: where it leaves no records, how long it takes: signals fall anywhere into that.
        together: whether two processes can do it.
    """

    name: str
    words: Sequence[str]
    done: Callable[[Path], bool]
    seconds: float | None = None
    together: bool = True


def main() -> None:
    """Runs undisturbed, runs disturbed, compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="signals in all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scenes", type=int, default=400, help="captions of the run")
    parser.add_argument("--spread", type=int, default=70, help="a signal falls after so many new records at most")
    parser.add_argument("--commands", default="evaluate,extract", help="of evaluate, extract, train, benchmark")
    parser.add_argument("--signals", default="KILL", help="of KILL, TERM, STOP, in turn")
    parser.add_argument("--fork", action="store_true", help="import all once: processes start in a tenth of the time")
    parser.add_argument("--keep", type=Path, help="folder for the run directories, which are removed otherwise")
    options = parser.parse_args()
    start = Forked.launch if options.fork else launch
    with tempfile.TemporaryDirectory() as temporary:
        runs, begun = options.keep or Path(temporary), time.monotonic()
        shutil.rmtree(runs, ignore_errors=True)
        chains = chains_of(options.commands.split(","))
        for name, commands in chains.items():
            for step in steps_of(runs / f"whole-{name}", options.scenes, commands):
                finish([step], runs / f"whole-{name}", 1, start)
        print(f"undisturbed: {time.monotonic() - begun:.0f} s", flush=True)
        hits: Counter[tuple[str, str, str]] = Counter()
        problems: list[str] = []
        turn = 0
        while hits.total() < options.kills and not problems:
            turn += 1
            for name, commands in chains.items():
                cut = runs / f"cut-{name}-{turn}"
                for step in steps_of(cut, options.scenes, commands):
                    share = min(max(options.kills // (2 * len(options.commands.split(","))), 1), 10)
                    share = max(min(share, options.kills - hits.total()), 0)
                    signals, seed = options.signals.split(","), options.seed + 1000 * turn
                    hits += disturb([step], cut, share, seed, options.spread, signals=signals, start_with=start)
                    finish([step], cut, 2 if step.together else 1, start)
                problems += [f"{cut.name}: {line}" for line in differences(runs / f"whole-{name}", cut)]
    for (step, number, whom), count in sorted(hits.items()):
        print(f"{step:>9}  {number}  {whom:<10}  {count:>3}")
    seconds = time.monotonic() - begun
    print(f"{hits.total()} signals in {seconds:.0f} s; " + ("; ".join(problems) or "no difference"))
    sys.exit(1 if problems or hits.total() < options.kills else 0)


def chains_of(commands: Sequence[str]) -> dict[str, list[str]]:
    """Commands by run directory: what follows ``evaluate`` is about its run."""
    chain = [name for name in ("evaluate", "extract", "train") if name in commands]
    if chain and chain != ["evaluate", "extract", "train"][: len(chain)]:
        raise SystemExit("extract needs evaluate, and train needs extract")
    chains = {"chair": chain} if chain else {}
    return chains | ({"benchmark": ["benchmark"]} if "benchmark" in commands else {})


def steps_of(folder: Path, scenes: int, commands: Sequence[str] = ("evaluate", "extract")) -> list[Step]:
    """The commands of the run that is disturbed."""
    settings = ["batch_size=16", f"runs={folder.parent}", f"name={folder.name}", "logger=none", "callbacks=none"]
    fit = ["published=false", "detector.visual_consistency=false"]
    words = {
        "evaluate": ["task=chair", f"task.scenes={scenes}", *settings],
        "extract": [f"run={folder}", "features=fast", "callbacks=none"],
        "train": [f"run={folder}", "logger=none", *fit],
        "benchmark": [f"pope.scenes={scenes // 4}", f"chair.scenes={scenes}", "features=fast", *settings, *fit],
    }
    done = {
        "evaluate": lambda run: _finished(run) or _has_features(run),
        "extract": _extracted,
        "train": _trained,
        "benchmark": lambda run: _extracted(run) and _trained(run),
    }
    lasts = {"train": 8.0}
    return [
        Step(name, ["-m", "stethoscope", name, *words[name]], done[name], lasts.get(name), name != "train")
        for name in commands
    ]


def disturb(
    steps: Sequence[Step],
    run: Path,
    kills: int,
    seed: int,
    spread: int,
    start: float = START,
    quiet: bool = False,
    signals: Sequence[str] = ("KILL",),
    start_with: Callable[..., list[Any]] | None = None,
) -> Counter[tuple[str, str, str]]:
    """Disturbs the steps of a run, one after the other, 1 and 2 processes in turn.

    Args:
        steps: what the run consists of.
        run: its directory.
        kills: how often.
        seed: of the moments.
        spread: a signal falls after so many new records of a sitting at most, three times of four.
        start: within so many seconds after the start of a sitting it falls otherwise.
        quiet: prints no table.
        signals: which, in turn.
        start_with: starts the processes; ``launch`` by default.

    Returns:
        How many signals have hit a run that was going on, by step, signal and "1 of 1", "1 of 2" or "2 of 2" processes.
    """
    draw, number = random.Random(seed), 0
    hits: Counter[tuple[str, str, str]] = Counter()
    row = "{:>4}  {:>9}  {:>4}  {:>7}  {:>7}  {:>12}  {:>7}  {:>10}  {}".format
    if not quiet:
        print(row("try", "step", "sig", "whom", "second", "moment", "records", "with rows", "codes"))
    while hits.total() < kills and (step := next((step for step in steps if not step.done(run)), None)) is not None:
        number += 1
        early, share, half = draw.random() < 0.25, draw.random(), draw.random() < 0.5
        name, processes = signals[(number - 1) % len(signals)], 1 + (number - 1) % 2 if step.together else 1
        before, begun = _count(run), time.monotonic()
        workers = (start_with or launch)(step.words, processes)
        if early or step.seconds:
            time.sleep(share * (step.seconds or start))
        while not (early or step.seconds) and _count(run) <= before + share * spread:
            if all(worker.poll() is not None for worker in workers):
                break
            time.sleep(0.01)
        codes = [worker.poll() for worker in workers]
        if any(codes):
            raise SystemExit(f"{step.name} ended by itself with {codes}")
        victims = [workers[draw.randrange(2)]] if processes == 2 and half and len(signals) > 1 else workers
        codes = strike(workers, victims, name)
        hit = codes is not None
        whom = f"{len(victims)} of {processes}"
        hits[step.name, name, whom] += hit
        if not quiet:
            lines = _records(run)
            rows = sum(line["tokens"] > 0 for line in lines)
            moment = ("start" if early else "work") if hit else "had finished"
            second = f"{time.monotonic() - begun:.1f}"
            print(row(number, step.name, name, whom, second, moment, len(lines), rows, codes or ""), flush=True)
    return +hits


def strike(workers: Sequence[Any], victims: Sequence[Any], name: str) -> list[int] | None:
    """Sends a signal and waits until all processes are gone.

    Returns:
        Their exit codes; None where they had ended already.

    Raises:
        SystemExit: a process does not go on after SIGCONT, or does not end.
    """
    if all(worker.poll() is not None for worker in workers):
        return None
    for victim in victims:
        victim.send_signal(SIGNALS[name])
    if name == "STOP":
        time.sleep(0.5)
        for victim in victims:
            victim.send_signal(signal.SIGCONT)
        time.sleep(1.0)
        if any(worker.poll() for worker in workers):
            raise SystemExit(f"ended after SIGCONT with {[worker.poll() for worker in workers]}")
        for worker in workers:
            worker.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE
    while any(worker.poll() is None for worker in workers):
        if time.monotonic() > deadline:
            for worker in workers:
                worker.send_signal(signal.SIGKILL)
            raise SystemExit(f"a process did not end within {PATIENCE:.0f} s after SIG{name}")
        time.sleep(0.01)
    return [worker.wait() for worker in workers]


def finish(
    steps: Sequence[Step], run: Path, processes: int, start_with: Callable[..., list[Any]] | None = None
) -> None:
    """Does what is left of a run."""
    for step in steps:
        if not step.done(run):
            codes = [worker.wait() for worker in (start_with or launch)(step.words, processes)]
            if any(codes):
                raise SystemExit(f"{step.name} ended with {codes}")


def launch(words: Sequence[str], processes: int, listen: bool = False) -> list[subprocess.Popen]:
    """Starts a command in several processes, as ``torchrun`` does; by hand, so that each can be killed.

    Args:
        words: the command, to be given to Python.
        processes: how many.
        listen: keeps what they write to stderr, for ``communicate``.
    """
    command, errors = [sys.executable, *words], subprocess.PIPE if listen else subprocess.DEVNULL
    return [
        subprocess.Popen(command, env={**os.environ, **variables}, stdout=subprocess.DEVNULL, stderr=errors)
        for variables in environments(processes)
    ]


def environments(processes: int) -> list[dict[str, str]]:
    """What a launcher sets in the environment of each process."""
    common = {"OMP_NUM_THREADS": "1"}
    if processes == 1:
        return [common]
    common |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= {"LOCAL_WORLD_SIZE": str(processes)}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


class Forked(multiprocessing.get_context("fork").Process):  # type: ignore[name-defined, misc]
    """A process like those of ``launch`` that need not import anything again."""

    @classmethod
    def launch(cls, words: Sequence[str], processes: int) -> list[Forked]:
        """Starts ``python -m stethoscope COMMAND ...`` in several processes."""
        import torch

        from stethoscope.cli import main

        for name in IMPORTED:
            importlib.import_module(name)
        torch.set_num_threads(1)
        workers = [
            cls(target=_forked, args=(main, list(words[2:]), variables)) for variables in environments(processes)
        ]
        for worker in workers:
            worker.start()
        return workers

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        return self.exitcode

    def wait(self) -> int | None:
        """Waits for its end and returns the exit code."""
        self.join()
        return self.exitcode

    def send_signal(self, number: int) -> None:
        """Sends a signal, if it has not ended."""
        if self.exitcode is None:
            os.kill(self.pid, number)


def _forked(main: Callable[[Sequence[str]], None], words: list[str], variables: Mapping[str, str]) -> None:
    os.environ.update(variables)
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    if not os.environ.get("KILL_RUNS_STDERR"):
        os.dup2(silent, 2)
    main(words)


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def differences(disturbed: Path, other: Path) -> list[str]:
    """In what two run directories differ that should not."""
    differing = []
    differing += [
        f"{name} differs"
        for name in ("metrics.json", "warnings.jsonl")
        if (disturbed / name).exists() != (other / name).exists()
    ]
    if not differing:
        mine, theirs = _text_and_noise(disturbed / "metrics.json"), _text_and_noise(other / "metrics.json")
        if not _same_text(mine[0], theirs[0], DIGITS):
            differing.append("metrics.json differs")
        if not _same_text(mine[1], theirs[1], NOISE_DIGITS):
            differing.append("metrics.json differs in the control with shuffled labels")
        if (other / "warnings.jsonl").exists():
            texts = [(run / "warnings.jsonl").read_text() for run in (disturbed, other)]
            differing += ["warnings.jsonl differs"] * (not _same_text(*texts, DIGITS))
    differing += [
        f"{run.name} is not finished"
        for run in (disturbed, other)
        if set(_json(run / "status.json").values()) - {"finished"}
    ]
    for run in (disturbed, other):
        ids = [(line["task"], line["sample_id"]) for line in _records(run)]
        if len(set(ids)) < len(ids):
            differing.append(f"{len(ids) - len(set(ids))} records of {run.name} are double")
        if left := [path.name for name in ("shards", "tokens") for path in [run / name] if path.exists()]:
            differing.append(f"{run.name} still has {', '.join(left)}")
    mine, theirs = ({(line["task"], line["sample_id"]): line for line in _records(run)} for run in (disturbed, other))
    if lost := mine.keys() - theirs.keys():
        differing.append(f"{len(lost)} samples are lost, such as {min(lost)}")
    if more := theirs.keys() - mine.keys():
        differing.append(f"{len(more)} samples are new, such as {min(more)}")
    unequal = [key for key in mine.keys() & theirs.keys() if not _same_record(mine[key], theirs[key])]
    if unequal:
        differing.append(f"{len(unequal)} records differ, such as {min(unequal)}")
    return [*differing, *_row_differences(disturbed / "tokens.parquet", other / "tokens.parquet")]


def _text_and_noise(file: Path) -> tuple[str, str]:
    """The text of a ``metrics.json`` without the control that learns shuffled labels, and that of the control."""
    metrics = _json(file)
    rows = metrics.get("detector", {}).get("leaderboard", {}).get("rows", [])
    noise = [row for row in rows if row["name"] == "shuffled labels"]
    rows[:] = [row for row in rows if row not in noise]
    return json.dumps(metrics), json.dumps(noise)


def _same_text(text: str, other: str, digits: float) -> bool:
    """Whether two texts are the same but for the last digits of numbers, up to a difference."""
    numbers = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")
    if numbers.sub("#", text) != numbers.sub("#", other):
        return False
    values = [np.array(numbers.findall(part), dtype=float) for part in (text, other)]
    return np.allclose(*values, rtol=0, atol=digits)


def _same_record(record: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    record, other = ({key: value for key, value in line.items() if key != "seconds"} for line in (record, other))
    probabilities = []
    for line in (record, other):
        if line["answer"]:
            line["answer"] = dict(line["answer"])
            probabilities.append(line["answer"].pop("logprobs"))
    if record != other:
        return False
    return not probabilities or np.allclose(*probabilities, rtol=0, atol=1e-5)


def _row_differences(run: Path, other: Path) -> Iterator[str]:
    """In what two token tables differ, whatever the order of their samples."""
    if not (run.exists() and other.exists()):
        if run.exists() != other.exists():
            yield f"only one run has {run.name}"
        return
    keys = ["task", "sample_id", "token"]
    mine, theirs = (pd.read_parquet(path).sort_values(keys, ignore_index=True) for path in (run, other))
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


def _trained(run: Path) -> bool:
    return "detector" in _json(run / "metrics.json") and "detector" not in _json(run / "status.json")


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


if __name__ == "__main__":
    main()
