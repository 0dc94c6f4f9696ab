"""How does every cost grow with answers, image tokens, batches, samples and runs?

    python scripts/bench/growth.py                    # all axes; figures are kept in build/growth.jsonl, see --out
    python scripts/bench/growth.py --axes compare     # one of them
    python scripts/bench/growth.py --table            # the table of the figures so far

One thread. Every time is the best of --rounds calls and is one JSON line in --out, written as soon as it is reached; a
second call goes on with those that are missing. The exponent is the slope of log time over log size with its 95 %
interval by least squares, and beside it the slope between the two largest sizes, where fixed costs weigh least. An axis
names what its costs are compared with: a plain forward pass or generation, whose own growth nothing can avoid. Rows
that grow by more than 0.1 above it (and above 1.1) are marked.

    answer        16 to 512 tokens, on a random LLaVA with 144 image tokens
    image         64 to 2,916 image tokens, 16 answer tokens
    batch         1 to 32 prompts of 64 image tokens, 32 answer tokens
    samples       100 to 5,000 descriptions by the embedded model (at most 32 tokens): evaluate, the same command on the
                  finished run, extract with features=fast, train, report
    compare       2 to 50 runs of 100 descriptions
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from shapes import QUESTION, Figures, Shape, ShapedAdapter, encode, made_up_detector, pictures

import stethoscope
from stethoscope.cli import main as stethoscope_command
from stethoscope.core.types import Generation
from stethoscope.evaluation.pipeline import TRACE_BATCH
from stethoscope.features import named_set
from stethoscope.relevancy import relevancy_from_inputs

SHAPE = Shape("llava", 144, layers=4, width=128, heads=4, groups=4, inner=344)
SIZES = {
    "answer": (16, 32, 64, 128, 256, 512),
    "image": (64, 144, 324, 576, 1296, 2916),
    "batch": (1, 2, 4, 8, 16, 32),
    "samples": (100, 300, 1000, 2500, 5000),
    "compare": (2, 5, 10, 20, 50),
}
BESIDE = {"answer": ("forward", "generation"), "image": ("forward",), "batch": ("forward", "generation")}
"""Ways whose own growth the others of an axis are compared with; elsewhere 1."""
MARGIN = 0.1

Ways = dict[str, Callable[[], Any]]


def model_ways(shape: Shape, batch: int, tokens: int) -> Ways:
    """Build the ways of using a model on a batch of prompts and answers of so many tokens."""
    adapter = ShapedAdapter(shape, "float32", "cpu")
    prompts, generation = encode(adapter, batch), Generation(max_new_tokens=tokens)
    answers = adapter.generate(prompts, generation)
    model, inputs = adapter.forward_inputs(prompts[0], answers[0].token_ids)
    inputs = {name: torch.cat([value] * batch) for name, value in inputs.items()}

    @torch.inference_mode()
    def forward() -> None:
        model(**inputs, use_cache=False, logits_to_keep=1)

    def features(name: str) -> Callable[[], None]:
        chosen = named_set(name)

        def run() -> None:
            for start in range(0, batch, TRACE_BATCH):  # as a run does
                few = slice(start, start + TRACE_BATCH)
                chosen.compute_batch(adapter.trace_batch(prompts[few], answers[few], chosen.requires))

        return run

    ways: Ways = {"forward": forward, "generation": lambda: adapter.generate(prompts, generation)}
    ways |= {f"features={name}": features(name) for name in ("fast", "default", "full")}
    if batch > 1:
        return ways
    picture, fast = pictures(shape, 1)[0], named_set("fast")
    detector = made_up_detector(fast.compute(adapter.trace(prompts[0], answers[0], fast.requires)))
    alone = {name: value[:1] for name, value in inputs.items()}
    ids = answers[0].token_ids
    return ways | {
        "relevancy": lambda: relevancy_from_inputs(model, alone, ids, recompute=False),
        "relevancy, last layer": lambda: relevancy_from_inputs(model, alone, ids, layers="final", recompute=False),
        "stream": lambda: list(
            stethoscope.stream(adapter, picture, QUESTION, detector=detector, generation=generation)
        ),
        "diagnose": lambda: stethoscope.diagnose(adapter, picture, QUESTION, answers[0]).to_html(),
    }


def command(*words: str) -> None:
    """Run a command of the package in this process, silently."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            stethoscope_command(list(words))
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"{' '.join(words)} ended with {end.code}") from end


def sample_ways(folder: Path, size: int) -> Ways:
    """Build the commands on a run of so many descriptions; every one needs those before it."""
    run = folder / f"run-{size}"
    evaluate = ["evaluate", "task=chair", f"task.scenes={size}", "generation.max_new_tokens=32", "batch_size=16"]
    evaluate += [f"runs={folder}", f"name={run.name}", "logger=none", "callbacks=none"]

    def anew() -> None:
        shutil.rmtree(run, ignore_errors=True)
        command(*evaluate)

    return {
        "evaluate": anew,
        "evaluate, finished": lambda: command(*evaluate),
        "extract": lambda: command("extract", f"run={run}", "features=fast", "callbacks=none"),
        "train": lambda: command(
            "train", f"run={run}", "logger=none", "published=false", "detector.visual_consistency=false"
        ),
        "report": lambda: command("report", str(run), "pictures=false"),
    }


def compare_ways(folder: Path, size: int) -> Ways:
    """Build the comparison of so many runs, copies of one of 100 descriptions."""
    first = folder / "run-100"
    if not (first / "detector").exists():
        for way in ("evaluate", "extract", "train"):
            sample_ways(folder, 100)[way]()
    copies = [folder / f"copy-{index}" for index in range(size)]
    for copy in copies:
        if not copy.exists():
            shutil.copytree(first, copy)
    return {"compare": lambda: command("compare", *map(str, copies))}


def points(axes: Sequence[str], folder: Path) -> Iterator[tuple[str, int, Callable[[], Ways]]]:
    """Yield axis, size and the function that builds its ways, small sizes first."""
    builders: dict[str, Callable[[int], Ways]] = {
        "answer": lambda size: model_ways(SHAPE, 1, size),
        "image": lambda size: model_ways(replace(SHAPE, image=size), 1, 16),
        "batch": lambda size: model_ways(replace(SHAPE, image=64), size, 32),
        "samples": lambda size: sample_ways(folder, size),
        "compare": lambda size: compare_ways(folder, size),
    }
    for axis in axes:
        for size in SIZES[axis]:
            yield axis, size, partial(builders[axis], size)


def measure(options: argparse.Namespace, figures: Figures) -> None:
    """Measure what is missing."""
    largest = options.largest or math.inf
    for axis, size, build in points(options.axes, options.folder):
        done = {line["way"] for line in figures.lines if (line["axis"], line["size"]) == (axis, size)}
        if size > largest or figures.left <= 0 or "all" in done:
            continue
        ways = build()
        rounds = 1 if axis == "samples" else options.rounds
        for way, call in ways.items():
            if way in done:
                continue
            seconds = []
            for _ in range(rounds):
                start = time.process_time()
                call()
                seconds.append(time.process_time() - start)
            figures.add(f"{axis} {size} {way}", axis=axis, size=size, way=way, seconds=round(min(seconds), 4))
        figures.add(f"{axis} {size} all", axis=axis, size=size, way="all")


# --- the table --------------------------------------------------------------------------------------------------------


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float, float]:
    """Fit seconds = a * size^b; return b, half its 95 % interval, and b of the two largest sizes.

    >>> exponent([1, 2, 4], [3, 12, 48])
    (2.0, 0.0, 2.0)
    """
    x, y = np.log(sizes), np.log(seconds)
    last = (y[-1] - y[-2]) / (x[-1] - x[-2])
    if len(x) < 3:
        return float(last), math.inf, float(last)
    fit = stats.linregress(x, y)
    half = stats.t.ppf(0.975, len(x) - 2) * fit.stderr
    return round(float(fit.slope), 6), round(float(half), 6), round(float(last), 6)


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Format the exponents as Markdown."""
    series: dict[tuple[str, str], dict[int, float]] = {}
    for line in lines:
        if line["way"] != "all":
            series.setdefault((line["axis"], line["way"]), {})[line["size"]] = line["seconds"]
    fits = {
        key: exponent(*zip(*sorted(points.items()), strict=True)) for key, points in series.items() if len(points) > 1
    }
    rows = [
        "| axis | cost | sizes | CPU s | exponent [95 %] | last two | beside | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (axis, way), (slope, half, last) in fits.items():
        sizes = sorted(series[axis, way])
        seconds = [series[axis, way][size] for size in (sizes[0], sizes[-1])]
        own = [other for other in BESIDE.get(axis, ()) if (axis, other) in fits]
        limit = max([1.0, *(fits[axis, other][2] for other in own)]) + MARGIN
        beside = ", ".join(f"{other} {fits[axis, other][2]:.2f}" for other in own) or "1"
        interval = f" [{slope - half:.2f}, {slope + half:.2f}]" if math.isfinite(half) else ""
        mark = "above" if last > limit and way not in own else ""
        rows.append(
            f"| {axis} | {way} | {sizes[0]}-{sizes[-1]} | {seconds[0]:.3g}-{seconds[1]:.3g} | {slope:.2f}{interval} "
            f"| {last:.2f} | {beside} | {mark} |"
        )
    return "\n".join(rows)


def main() -> None:
    """Measure, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/growth.jsonl"))
    parser.add_argument("--folder", type=Path, default=Path("build/growth"), help="where the runs are kept")
    parser.add_argument("--axes", nargs="+", choices=sorted(SIZES), default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=2, help="calls of which the best counts (samples: 1)")
    parser.add_argument("--largest", type=int, help="largest size of every axis")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no further size after so long")
    parser.add_argument("--table", action="store_true", help="print the table of the figures so far")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures = Figures(options.out, options.seconds)
    if not options.table:
        measure(options, figures)
    print(table(figures.lines))


if __name__ == "__main__":
    main()
