"""What features cost beside the generation of answers, for the embedded model.

    python scripts/bench/cost.py                      # answers one at a time, in batches of 8 and of 16; one thread

CPU time of one thread, per answer: plain generation, which keeps nothing, then all that a run does with features, less
plain generation: a prefill with a graph where relevancy is read, generation that keeps what a trace can use again, the
trace (at most ``pipeline.TRACE_BATCH`` answers in a pass), the features, and on disk token rows, heat maps and
thumbnails of all answers with mentions. All ways alternate batch by batch, so that other work on the machine falls on
all of them.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import torch

import stethoscope
from stethoscope.adapters.base import Adapter
from stethoscope.core.types import Generation, Sample, required
from stethoscope.evaluation.callbacks import SaveHeatmaps
from stethoscope.evaluation.pipeline import TRACE_BATCH
from stethoscope.evaluation.state import RunState
from stethoscope.features import FeatureSet, named_set
from stethoscope.loggers.combined import Loggers
from stethoscope.storage.run_dir import RunStore
from stethoscope.storage.tokens import TokenFiles, TokenRows, token_tables
from stethoscope.tasks.chair import Chair
from stethoscope.tracing.trace import Encoded

PLAIN = "generation"
LIMITS = {"fast": 0.10, "default": 0.60, "default_relevancy": None, "full": 1.40}


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
    generation = Generation(max_new_tokens=128)
    task.setup()
    samples = list(task.samples())
    encoded = [adapter.encode(sample.image.load(), sample.question) for sample in samples]
    sets = {name: named_set(name) for name in options.features}
    with tempfile.TemporaryDirectory() as folder:
        run = RunState(adapter, task, Loggers(), RunStore(Path(folder)))
        costs = Costs(adapter, samples, encoded, generation, sets, run)
        busy = {size: costs.measure(size, options.rounds) for size in options.batches}
    print("| CPU ms per answer | " + " | ".join(_head(size) for size in options.batches) + " | limit | cost |")
    print("|---|" + "---|" * (len(options.batches) + 2))
    plain = {size: spent.pop(PLAIN) for size, spent in busy.items()}
    print("| generation | " + " | ".join(f"{plain[size] * 1e3:.1f}" for size in options.batches) + " | | |")
    for name, features in sets.items():
        beyond = {size: busy[size][name] - plain[size] for size in options.batches}
        cells = [f"{cost * 1e3:.1f} (+{cost / plain[size]:.0%})" for size, cost in beyond.items()]
        limit = LIMITS.get(name)
        print(f"| `{name}` | {' | '.join(cells)} | {'' if limit is None else f'+{limit:.0%}'} | {features.cost} |")


@dataclass(frozen=True)
class Costs:
    """Measures generation, and all that a run does beside it, on one model and its questions.

    Attributes:
        adapter: the model.
        samples: that are asked.
        encoded: their prompts.
        generation: settings of decoding.
        sets: feature sets by name.
        run: with a store, into which token rows and heat maps are written.
    """

    adapter: Adapter
    samples: Sequence[Sample]
    encoded: Sequence[Encoded]
    generation: Generation
    sets: dict[str, FeatureSet]
    run: RunState

    def measure(self, size: int, rounds: int) -> dict[str, float]:
        """Return CPU seconds per answer of generation alone, and of a run with every feature set.

        Answers are generated in batches of ``size``.
        """
        maps, tables = SaveHeatmaps(), TokenFiles(required(self.run.store).run_dir)

        def generate(prompts: Sequence[Encoded], _: Sequence[Sample]) -> object:
            return self.adapter.generate(prompts, self.generation)

        def with_features(features: FeatureSet) -> Callable[[Sequence[Encoded], Sequence[Sample]], object]:
            return lambda prompts, asked: tables.append(self._answer(features, prompts, asked, maps))

        ways = {PLAIN: generate} | {name: with_features(features) for name, features in self.sets.items()}
        spent = dict.fromkeys(ways, 0.0)
        for number in range(-1, rounds):  # the first round warms up
            for start in range(0, len(self.encoded) if number >= 0 else size, size):
                batch = slice(start, start + size)
                for name, way in ways.items():
                    before = time.process_time()
                    way(self.encoded[batch], self.samples[batch])
                    if number >= 0:
                        spent[name] += time.process_time() - before
        tables.close()
        return {name: seconds / len(self.encoded) / rounds for name, seconds in spent.items()}

    def _answer(
        self, features: FeatureSet, prompts: Sequence[Encoded], asked: Sequence[Sample], maps: SaveHeatmaps
    ) -> list[pa.Table]:
        """Answer a batch of prompts as a run does; return its token rows."""
        prompts = self.adapter.prefill(prompts, features.requires)
        answers, kept = self.adapter.generate_with_cache(prompts, self.generation)
        rows: list[TokenRows] = []
        for start in range(0, len(kept), TRACE_BATCH):
            few = slice(start, start + TRACE_BATCH)
            traces = self.adapter.trace_batch(kept[few], answers[few], features.requires)
            computed = features.compute_batch(traces)
            for sample, trace, columns in zip(asked[few], traces, computed, strict=True):
                mentions = self.run.task.label_mentions(sample, trace.answer)
                rows.append(TokenRows.of_trace(sample, trace, mentions, columns))
                maps.on_trace(self.run, sample, trace)
        return token_tables(self.run.task.name, rows)


def _head(size: int) -> str:
    return "one at a time" if size == 1 else f"batches of {size}"


if __name__ == "__main__":
    main()
