"""What features cost beside the generation of the answers, for the embedded model: one table from one run.

    python scripts/bench/cost.py                      # answers one at a time, in batches of 8 and of 16; one thread

CPU time of one thread, per answer: plain generation, which keeps nothing, then tracing and computing the features of
the finished answers as runs do it (at most ``pipeline.TRACE_BATCH`` in a pass). Runs with features let generation keep
what a trace can use again; what that takes more than plain generation is part of every cost. All ways alternate batch
by batch, so that other work on the machine falls on all of them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import torch

import stethoscope
from stethoscope import testbed
from stethoscope.adapters.base import Adapter
from stethoscope.core.types import Answer, Generation
from stethoscope.evaluation.pipeline import TRACE_BATCH
from stethoscope.features import FeatureSet, named_set
from stethoscope.tracing.trace import Encoded

QUESTION = "Please describe this image in detail."
PLAIN, KEEPING = "generation", "generation that keeps"
LIMITS = {"fast": 0.15, "forward": None, "default": 0.60, "full": 2.0}


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--features", nargs="+", default=list(LIMITS), help="names of feature sets")
    options = parser.parse_args()
    torch.set_num_threads(1)
    adapter, generation = stethoscope.load("testbed"), Generation(max_new_tokens=128)
    pictures = [scene.image() for scene in testbed.scenes(options.pictures)]
    encoded = [adapter.encode(picture, QUESTION) for picture in pictures]
    sets = {name: named_set(name) for name in options.features}
    busy = {size: measure(adapter, encoded, generation, sets, size, options.rounds) for size in options.batches}
    print("| CPU ms per answer | " + " | ".join(_head(size) for size in options.batches) + " | limit | cost |")
    print("|---|" + "---|" * (len(options.batches) + 2))
    plain = {size: spent.pop(PLAIN) for size, spent in busy.items()}
    more = {size: max(spent.pop(KEEPING) - plain[size], 0.0) for size, spent in busy.items()}
    print("| generation | " + " | ".join(f"{plain[size] * 1e3:.1f}" for size in options.batches) + " | | |")
    print("| what it keeps | " + " | ".join(f"{more[size] * 1e3:.1f}" for size in options.batches) + " | | |")
    for name, features in sets.items():
        costs = {size: busy[size][name] + more[size] for size in options.batches}
        cells = [f"{cost * 1e3:.1f} (+{cost / plain[size]:.0%})" for size, cost in costs.items()]
        limit = LIMITS.get(name)
        print(f"| `{name}` | {' | '.join(cells)} | {'' if limit is None else f'+{limit:.0%}'} | {features.cost} |")


def measure(
    adapter: Adapter,
    encoded: Sequence[Encoded],
    generation: Generation,
    sets: dict[str, FeatureSet],
    size: int,
    rounds: int,
) -> dict[str, float]:
    """CPU seconds per answer of generation in batches of ``size``, and of every feature set on top of it."""
    answers: list[Answer] = []
    kept: list[Encoded] = []

    def generate(encoded: Sequence[Encoded]) -> None:
        adapter.generate(encoded, generation)

    def keep(encoded: Sequence[Encoded]) -> None:
        answers[:], kept[:] = adapter.generate_with_cache(encoded, generation)

    def trace(features: FeatureSet) -> Callable[[Sequence[Encoded]], None]:
        def run(encoded: Sequence[Encoded]) -> None:
            for start in range(0, len(encoded), TRACE_BATCH):
                few = slice(start, start + TRACE_BATCH)
                for traced in adapter.trace_batch(kept[few], answers[few], features.requires):
                    features.compute(traced)

        return run

    ways = {PLAIN: generate, KEEPING: keep} | {name: trace(features) for name, features in sets.items()}
    spent = dict.fromkeys(ways, 0.0)
    for number in range(-1, rounds):  # the first round warms up
        for start in range(0, len(encoded) if number >= 0 else size, size):
            for name, way in ways.items():
                before = time.process_time()
                way(encoded[start : start + size])
                spent[name] += (time.process_time() - before) * (number >= 0)
    return {name: seconds / len(encoded) / rounds for name, seconds in spent.items()}


def _head(size: int) -> str:
    return "one at a time" if size == 1 else f"batches of {size}"


if __name__ == "__main__":
    main()
