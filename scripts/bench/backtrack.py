"""What going back gains and costs on the embedded model, against greedy decoding.

    python scripts/bench/backtrack.py --scenes 200 --seed 7 --thresholds 0.65

Both ways alternate scene by scene, one answer at a time, so that other work on the machine falls on both. The detector
is a logistic regression on ``features=default``, which judges while the model writes, trained here on --train captions
of other scenes; --detector names another one instead. Differences are paired over scenes, with 95 % intervals of the
bootstrap.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import stethoscope
from stethoscope.adapters.base import Adapter
from stethoscope.adapters.hf import HfAdapter
from stethoscope.core.types import Generation, Sample
from stethoscope.features import FeatureSet
from stethoscope.metrics.bootstrap import group_weights
from stethoscope.storage.run_dir import RunStore
from stethoscope.streaming.backtrack import Backtrack
from stethoscope.tasks.chair import Chair, mentions

GENERATION = Generation(max_new_tokens=512)
COLUMNS = ("hallucinated", "mentions", "recalled", "objects", "words", "returns", "passes", "tokens", "seconds")


def main() -> None:
    """Train, measure, and print one line for each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.65])
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--train", type=int, default=1000, help="captions that the detector learns from")
    source.add_argument("--detector", help="folder of another detector, or of a run that has one")
    options = parser.parse_args()
    torch.set_num_threads(1)
    adapter, task = stethoscope.load("testbed"), Chair(scenes=options.scenes, scene_seed=options.seed)
    assert isinstance(adapter, HfAdapter)
    task.setup()
    with tempfile.TemporaryDirectory() as folder:
        detector = options.detector or train(adapter, options.train, Path(folder))
        ways: dict[str, Backtrack | None] = {"greedy": None}
        ways |= {f"from {value:g}": Backtrack(detector=detector, threshold=value) for value in options.thresholds}
        rows = _measure(adapter, ways, task.samples())
    heads = [f"{name:>{width}}" for name, width in (("CHAIR_i", 9), ("recall", 9), ("words", 7), ("returns", 9))]
    print(f"{'':12}{''.join(heads)}{'passes':>8}{'CPU':>7}  less greedy: CHAIR_i, recall")
    for name, values in rows.items():
        total, greedy = (dict(zip(COLUMNS, part.sum(0), strict=True)) for part in (values, rows["greedy"]))
        print(
            f"{name:12}{total['hallucinated'] / total['mentions']:9.3f}{total['recalled'] / total['objects']:9.3f}"
            f"{total['words'] / len(values):7.1f}{total['returns'] / len(values):9.2f}"
            f"{total['passes'] / total['tokens']:8.2f}{total['seconds'] / greedy['seconds']:7.2f}"
            f"  {_difference(values, rows['greedy'])}"
        )


def train(adapter: Adapter, scenes: int, folder: Path) -> str:
    """Fit a detector on other scenes and save it; return its folder."""
    features = FeatureSet(groups=("uncertainty", "position", "attention", "lens", "hidden"))
    stethoscope.Evaluator(features=features, run_dir=folder / "run", batch_size=24).run(adapter, Chair(scenes=scenes))
    detector = stethoscope.Detector().fit(RunStore(folder / "run").tokens("chair"))
    detector.save(folder / "detector")
    return str(folder / "detector")


def _measure(adapter: HfAdapter, ways: dict[str, Backtrack | None], samples: Sequence[Sample]) -> dict[str, np.ndarray]:
    """Answer every sample in every way; return (samples, ``COLUMNS``) by way."""
    rows: dict[str, list[tuple[float, ...]]] = {name: [] for name in ways}
    passes: list[int] = []
    edit: Mapping[str, Any]
    hook = adapter.model.get_decoder().register_forward_hook(lambda *_: passes.append(1))
    for index, sample in enumerate(samples):
        truth, prompt = set(sample.reference["objects"]), adapter.encode(sample.image.load(), sample.question)
        for name, method in ways.items():
            for _ in range(2 if index == 0 else 1):  # the first time warms up
                passes.clear()
                start = time.process_time()
                if method is None:
                    answer, edit = adapter.generate([prompt], GENERATION)[0], {}
                else:
                    answer, edit = method.write(adapter, [prompt], GENERATION)[0]
                seconds = time.process_time() - start
            named = [mention.name for mention in mentions(answer.text)]
            counts = len([item for item in named if item not in truth]), len(named), len(truth & set(named)), len(truth)
            tokens = len(answer.token_ids) + answer.finished
            returns = len(edit.get("taken_back", ()))
            rows[name].append((*counts, len(answer.text.split()), returns, len(passes), tokens, seconds))
    hook.remove()
    return {name: np.array(values, dtype=float) for name, values in rows.items()}


def _difference(values: np.ndarray, greedy: np.ndarray) -> str:
    """Format the differences of CHAIR_i and recall with their intervals."""
    resamples = group_weights(np.arange(len(values)))  # a scene is an image

    def shares(weights: np.ndarray) -> dict[str, np.ndarray]:
        (own, other) = (weights @ part for part in (values, greedy))
        return {
            name: own[:, part] / own[:, whole] - other[:, part] / other[:, whole]
            for name, part, whole in (("CHAIR_i", 0, 1), ("recall", 2, 3))
        }

    intervals = map(resamples.interval, resamples.apply(shares).values())
    return ", ".join(f"{part.value:+.3f} [{part.low:+.3f}, {part.high:+.3f}]" for part in intervals)


if __name__ == "__main__":
    main()
