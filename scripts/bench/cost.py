"""What features cost beside the generation of the answers, for the embedded model: one table from one run.

    python scripts/bench/cost.py                      # answers one at a time, in batches of 8 and of 16; one thread

CPU time of one thread, per answer: plain generation, then the same answers with features as runs make them: the pass
over the prompts where relevancy needs it, generation, traces (at most ``pipeline.TRACE_BATCH`` answers in a pass),
features and token tables. All ways alternate batch by batch, so that other work on the machine falls on all of them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import torch

import stethoscope
from stethoscope.adapters.base import Adapter
from stethoscope.core.types import Generation, Sample
from stethoscope.evaluation.pipeline import TRACE_BATCH
from stethoscope.features import FeatureSet, named_set
from stethoscope.features.registry import without_vectors
from stethoscope.storage.tokens import token_table
from stethoscope.tasks.base import Task
from stethoscope.tasks.chair import Chair
from stethoscope.tracing.trace import Encoded

LIMITS = {"fast": 0.10, "forward": None, "default": 0.60, "full": 1.40}
"""Most CPU time beside plain generation in batches of 8."""
PLAIN = "generation"


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--features", nargs="+", default=list(LIMITS), help="names of feature sets")
    options = parser.parse_args()
    torch.set_num_threads(1)
    adapter, task = stethoscope.load("testbed"), Chair(scenes=options.pictures)
    task.setup()
    samples = task.samples()
    encoded = [adapter.encode(sample.image.load(), sample.question) for sample in samples]
    sets = {name: named_set(name) for name in options.features}
    spent = {size: measure(adapter, task, samples, encoded, sets, size, options.rounds) for size in options.batches}
    print("| CPU ms per answer | " + " | ".join(_head(size) for size in options.batches) + " | limit | cost |")
    print("|---|" + "---|" * (len(options.batches) + 2))
    plain = {size: seconds.pop(PLAIN) for size, seconds in spent.items()}
    print(f"| {PLAIN} | " + " | ".join(f"{plain[size] * 1e3:.1f}" for size in options.batches) + " | | |")
    for name, features in sets.items():
        more = {size: spent[size][name] - plain[size] for size in options.batches}
        cells = [f"{cost * 1e3:.1f} ({cost / plain[size]:+.0%})" for size, cost in more.items()]
        limit = LIMITS.get(name)
        print(f"| `{name}` | {' | '.join(cells)} | {'' if limit is None else f'+{limit:.0%}'} | {features.cost} |")


def measure(
    adapter: Adapter,
    task: Task,
    samples: Sequence[Sample],
    encoded: Sequence[Encoded],
    sets: dict[str, FeatureSet],
    size: int,
    rounds: int,
) -> dict[str, float]:
    """Measure the CPU seconds per answer of generation in batches of ``size``, alone and with every feature set."""
    generation = Generation(max_new_tokens=128)

    def plain(batch: slice) -> None:
        adapter.generate(encoded[batch], generation)

    def with_features(features: FeatureSet) -> Callable[[slice], None]:
        def run(batch: slice) -> None:
            prompts = adapter.prefill(encoded[batch], features.requires)
            answers, prompts = adapter.generate_with_cache(prompts, generation)
            for start in range(0, len(prompts), TRACE_BATCH):
                part = slice(start, start + TRACE_BATCH)
                traces = adapter.trace_batch(prompts[part], answers[part], features.requires)
                for trace, sample in zip(traces, samples[batch][part], strict=True):
                    mentions = task.label_mentions(sample, trace.answer)
                    named = [mention is not None for mention in trace.answer.owners(mentions)]
                    columns = without_vectors(features.compute(trace), named)
                    token_table(task.name, sample, trace.answer, mentions, columns)

        return run

    ways = {PLAIN: plain} | {name: with_features(features) for name, features in sets.items()}
    spent = dict.fromkeys(ways, 0.0)
    for index in range(-1, rounds):  # the first round warms up
        for start in range(0, len(encoded) if index >= 0 else size, size):
            for name, way in ways.items():
                before = time.process_time()
                way(slice(start, start + size))
                spent[name] += (time.process_time() - before) * (index >= 0)
    return {name: seconds / len(encoded) / rounds for name, seconds in spent.items()}


def _head(size: int) -> str:
    return "one at a time" if size == 1 else f"batches of {size}"


if __name__ == "__main__":
    main()
