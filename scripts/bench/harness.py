"""What the harness costs: `stethoscope evaluate` against a bare `generate` loop.

    python scripts/bench/harness.py                   # 400 questions about rendered scenes, batches of 1 and of 16
    python scripts/bench/harness.py --against PYTHON  # another checkout, by its interpreter, instead of the bare loop

Both read the same PNG files and ask the embedded model the same questions in the same order. The bare loop is what a
user would write: open the picture, processor, `model.generate`, decode, keep the text. The harness does all it does
by default: records with token ids and log-probabilities, scores, events, an offline W&B run, timings, pictures.

Loops alternate batch by batch in one process, so that other work on the machine falls on both. Overhead is judged by
CPU time, which is told beside the time of the clock; what larger batches gain, which use more cores, by the clock, on
an idle machine. Start and memory are those of whole processes, run in turn: from the start of the process to the first
answer (bare) or the first record on disk (harness), and the largest resident size.

Against another checkout, `stethoscope evaluate task=pope` of both runs in turn on the same scenes, 18 questions to
each; questions per CPU second leave out what a run about two scenes takes, which is the start.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the bare process loads nothing of the package
    from stethoscope.adapters.base import Adapter
    from stethoscope.evaluation.state import RunState
    from stethoscope.tasks.base import Task

PER_SCENE = 18
"""Questions about a scene: three about objects that are there and three about others, in each of three subsets."""
LONGEST = 8
LIMITS = {"overhead": 0.05, "faster": 3.0, "start": 2.0, "memory": 100.0, "questions": 2.5}
Clock = tuple[float, ...]
"""Seconds of the clock and of the processor."""


def main() -> None:
    """Measure and print one table; exit with 1 when a limit is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=2, help="times that the loops are repeated")
    parser.add_argument("--starts", type=int, default=3, help="processes of each kind")
    parser.add_argument("--threads", type=int, default=1, help="of torch; one is the default of the embedded model")
    parser.add_argument("--against", metavar="PYTHON", help="interpreter of another checkout")
    parser.add_argument("--batch", type=int, default=32, help="batch size of the runs against another checkout")
    parser.add_argument("--bare", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        _bare_process(Path(options.bare), options.questions)
        return
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # an installation has bytecode
    if options.against:
        _compare_checkouts(options)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export(folder / "data", options.questions)
        later = _processes(folder, options)  # first: a child's largest size counts what its parent had when it forked
        rows = [*_loops(folder, options), *later]
    print(f"{options.questions} POPE questions, {LONGEST} tokens at most, {options.threads} thread(s)\n")
    print("| what | bare | harness | | limit | kept |")
    print("|---|---|---|---|---|---|")
    for what, bare, harness, result, limit, kept in rows:
        print(
            f"| {what} | {bare} | {harness} | {result} | {limit} | {'' if kept is None else 'yes' if kept else 'NO'} |"
        )
    if any(kept is False for *_, kept in rows):
        raise SystemExit(1)


def export(folder: Path, questions: int) -> None:
    """Write POPE's files about rendered scenes, pictures as PNG."""
    from stethoscope import testbed

    testbed.export(folder, testbed.scenes(2 + questions // PER_SCENE))


def _task(folder: Path) -> Task:
    from stethoscope.tasks.pope import Pope

    return Pope(source="files", questions=str(folder), images=str(folder / "images"))


# --- the bare loop ----------------------------------------------------------------------------------------------------


def _model() -> tuple[Any, Any]:
    """Load model and processor as the documentation of transformers does."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from stethoscope.testbed import MODEL_DIR

    return AutoModelForImageTextToText.from_pretrained(MODEL_DIR).eval(), AutoProcessor.from_pretrained(MODEL_DIR)


def _ask(model: Any, processor: Any, questions: Sequence[tuple[Path, str]]) -> list[str]:
    """Answer one batch of the bare loop."""
    from PIL import Image

    images = [Image.open(path).convert("RGB") for path, _ in questions]
    texts = [f"USER: <image>\n{text} ASSISTANT:" for _, text in questions]
    inputs = processor(images=images, text=texts, return_tensors="pt", padding=True)
    output = model.generate(**inputs, max_new_tokens=LONGEST, do_sample=False)
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _bare_process(folder: Path, questions: int) -> None:
    """Run a bare script at batch 1, and print a line when the first question is answered."""
    rows = []
    for file in sorted(folder.glob("coco_pope_*.json")):
        rows += [json.loads(line) for line in file.read_text().splitlines()]
    model, processor = _model()
    processor.tokenizer.padding_side = "left"
    for index, row in enumerate(rows[:questions]):
        _ask(model, processor, [(folder / "images" / row["image"], row["text"])])
        if index == 0:
            print("first", flush=True)


# --- loops ------------------------------------------------------------------------------------------------------------


def _now() -> Clock:
    return time.perf_counter(), time.process_time()


def _loops(folder: Path, options: argparse.Namespace) -> list[tuple]:
    """Measure the rows of the table about batches of 1 and 16, and about 16 against 1."""
    import stethoscope

    adapter, model, processor = stethoscope.load("testbed", threads=options.threads), *_model()
    processor.tokenizer.padding_side = "left"
    task = _task(folder / "data")
    spent: dict[tuple[int, str], Clock] = {}
    rows: list[tuple] = []
    row: tuple[str, ...]
    for size in (1, 16):
        ask = lambda samples: _ask(model, processor, [(s.image.source, s.question) for s in samples])  # noqa: E731
        rounds = [
            _sitting(adapter, task, size, folder / f"run-{size}-{number}", ask, options.questions)
            for number in range(-1, options.rounds)  # the first one warms up
        ][1:]
        for way in ("bare", "harness"):
            spent[size, way] = tuple(sum(parts) for parts in zip(*(round_[way] for round_ in rounds), strict=True))
        for index, clock in enumerate(("wall", "CPU")):
            bare, harness = (spent[size, way][index] / options.rounds for way in ("bare", "harness"))
            more, limit = harness / bare - 1, LIMITS["overhead"]
            row = f"batch {size}, {clock}", f"{bare:.2f} s", f"{harness:.2f} s", f"{more:+.1%}", f"{limit:+.0%}"
            rows.append((*row, more <= limit if index else None))
    for index, clock in enumerate(("wall", "CPU")):
        faster = {way: spent[1, way][index] / spent[16, way][index] for way in ("bare", "harness")}
        row = f"batch 16 against 1, {clock}", f"{faster['bare']:.2f} x", f"{faster['harness']:.2f} x", ""
        rows.append((*row, f"{LIMITS['faster']:.0f} x", None if index else faster["harness"] >= LIMITS["faster"]))
    return rows


def _sitting(
    adapter: Adapter, task: Task, size: int, run_dir: Path, ask: Callable[[Sequence], list[str]], questions: int
) -> dict[str, Clock]:
    """Run the harness once; it asks the bare loop the same batch before each of its own."""
    from stethoscope import Evaluator
    from stethoscope.core.types import Generation
    from stethoscope.evaluation.callbacks import Callback, Progress, SampleTable, SaveHeatmaps, Timing
    from stethoscope.loggers.combined import Loggers
    from stethoscope.loggers.wandb import WandbLogger

    texts: list[str] = []
    answers: list[str] = []

    class Alternate(Callback):
        """Stands first: what follows ``on_task_start`` is the harness's, but for the bare batches."""

        def on_task_start(self, run: RunState) -> None:
            self.start: Clock = _now()
            self.bare: Clock = (0.0, 0.0)

        def on_batch_start(self, run: RunState, samples: Sequence) -> None:
            start = _now()
            texts.extend(ask(samples))
            self.bare = tuple(sum + (end - begin) for sum, begin, end in zip(self.bare, start, _now(), strict=True))

    class End(Callback):
        """The last of the callbacks: how far it is until the last record is on disk."""

        def on_batch_end(self, run: RunState, records: Sequence) -> None:
            answers.extend(record.answer.text for record in records)
            self.end = _now()

    alternate, end = Alternate(), End()
    loggers = Loggers([WandbLogger(project="bench")])
    callbacks = [alternate, Progress(), Timing(), SampleTable(), SaveHeatmaps(), end]
    generation = Generation(max_new_tokens=LONGEST)
    Evaluator(callbacks, loggers, questions, batch_size=size, generation=generation, run_dir=run_dir).run(adapter, task)
    loggers.finalize("finished")
    same = sum(text.strip() == answer for text, answer in zip(texts, answers, strict=True))
    if same < len(answers):
        print(f"batch {size}: {len(answers) - same} of {len(answers)} answers differ", file=sys.stderr)
    whole = tuple(stop - begin for begin, stop in zip(alternate.start, end.end, strict=True))
    return {"bare": alternate.bare, "harness": tuple(a - b for a, b in zip(whole, alternate.bare, strict=True))}


# --- processes --------------------------------------------------------------------------------------------------------


def _processes(folder: Path, options: argparse.Namespace) -> list[tuple]:
    """Measure the rows of the table about the start of a process and its memory."""
    data, count = folder / "data", options.questions
    measured: dict[str, list[tuple[float, float]]] = {"bare": [], "harness": []}
    for number in range(options.starts):
        words = [sys.executable, __file__, "--bare", str(data), "--questions", str(count)]
        measured["bare"].append(_watch(words, folder, None))
        run_dir = folder / f"process-{number}"
        words = [
            *(sys.executable, "-m", "stethoscope", "evaluate", "task=pope", "task.source=files", "batch_size=1"),
            *(f"task.questions={data}", f"task.images={data / 'images'}", f"limit={count}"),
            *(f"generation.max_new_tokens={LONGEST}", f"run_dir={run_dir}", f"model.threads={options.threads}"),
        ]
        measured["harness"].append(_watch(words, folder, run_dir / "samples.jsonl"))
    rows = []
    for index, (what, unit, limit) in enumerate(
        (("start to first answer", "s", LIMITS["start"]), ("peak memory", "MB", LIMITS["memory"]))
    ):
        bare, harness = (statistics.median(values[index] for values in measured[way]) for way in ("bare", "harness"))
        form = "{:.1f} {}" if unit == "s" else "{:.0f} {}"
        texts = [form.format(value, unit) for value in (bare, harness)]
        rows.append(
            (what, *texts, "+" + form.format(harness - bare, unit), f"+{limit:.0f} {unit}", harness - bare <= limit)
        )
    return rows


def _watch(arguments: Sequence[str], folder: Path, records: Path | None) -> tuple[float, float]:
    """Run a process; return the seconds until its first answer, and its largest resident size in MB.

    Args:
        arguments: of the process.
        folder: to run it in.
        records: file whose first line shows the first answer; None where the process prints a line then.
    """
    start = time.perf_counter()
    with subprocess.Popen(arguments, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        output = process.stdout
        assert output is not None
        if records is None:
            output.readline()
        else:
            while process.poll() is None and not (records.is_file() and records.stat().st_size):
                time.sleep(0.01)
        first = time.perf_counter() - start
        output.read()
        usage = _end(process, arguments)
    return first, largest_size(usage)


def _end(process: subprocess.Popen, words: Sequence[str]) -> resource.struct_rusage:
    """Wait until a process, of these words, has ended, and return what it has used.

    Raises:
        SystemExit: it failed.
    """
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {process.returncode}")
    return usage


def largest_size(usage: resource.struct_rusage) -> float:
    """Return the largest resident size of a process in MB (10^6 bytes).

    The system tells it in KiB, but on macOS in bytes.
    """
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


# --- another checkout -------------------------------------------------------------------------------------------------


def _compare_checkouts(options: argparse.Namespace) -> None:
    """Print questions per CPU second and peak memory of both checkouts; exit with 1 below the limit."""
    rates: dict[str, list[float]] = {}
    memory: dict[str, list[float]] = {}
    answers: dict[str, dict[str, Any]] = {}
    checkouts = {"other": options.against, "this": sys.executable}
    for number in range(options.rounds):
        for name, python in checkouts.items():
            with tempfile.TemporaryDirectory() as folder:
                runs = {}
                for scenes in (2, 2 + -(-options.questions // PER_SCENE)):
                    run_dir = Path(folder) / f"{name}-{scenes}"
                    seconds, peak = _evaluate(python, run_dir, scenes, options)
                    lines = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
                    runs[scenes] = seconds, len(lines)
                (start, few), (seconds, many) = runs.values()
                rates.setdefault(name, []).append((many - few) / (seconds - start))
                memory.setdefault(name, []).append(peak)
                answers[name] = {line["sample_id"]: line["answer"] for line in lines}
        print(f"round {number + 1}: " + ", ".join(f"{name} {rates[name][-1]:.0f}" for name in checkouts), flush=True)
    other, this = (statistics.median(rates[name]) for name in checkouts)
    same = sum(answers["this"][key]["token_ids"] == answer["token_ids"] for key, answer in answers["other"].items())
    print(f"\n{many - few} POPE questions in batches of {options.batch}, {options.threads} thread(s)\n")
    print("| what | other | this | | limit |")
    print("|---|---|---|---|---|")
    print(f"| questions per CPU second | {other:.0f} | {this:.0f} | {this / other:.2f} x | {LIMITS['questions']} x |")
    before, after = (statistics.median(memory[name]) for name in checkouts)
    print(f"| peak memory | {before:.0f} MB | {after:.0f} MB | {after - before:+.0f} MB | +0 MB |")
    print(f"| same token ids | {len(answers['other'])} | {same} | | all |")
    if this / other < LIMITS["questions"] or same < many:
        raise SystemExit(1)


def _evaluate(python: str, run_dir: Path, scenes: int, options: argparse.Namespace) -> tuple[float, float]:
    """Run `evaluate task=pope` with an interpreter; return CPU seconds and largest size in MB."""
    words = [
        *(python, "-m", "stethoscope", "evaluate", "task=pope", f"task.scenes={scenes}", "logger=none"),
        *(f"batch_size={options.batch}", f"run_dir={run_dir}", f"model.threads={options.threads}"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    with subprocess.Popen(
        words, cwd=run_dir.parent, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        usage = _end(process, words)
    return usage.ru_utime + usage.ru_stime, largest_size(usage)


if __name__ == "__main__":
    main()
