"""How often is the promise about the remaining text broken, and what does it cost?

    stethoscope benchmark experiment=detectors
    python scripts/check/remaining_text.py runs/detectors

The images that the run's detector was not fitted on are the pool. Two simulations for each promise and each number of
calibration images, which choose the threshold of removal (``stethoscope.evaluation.removal_guarantee``):

- splits: the share of hallucinated mentions in the remaining text is measured on the other images of the pool. That is
  what a user would see, but it has noise of its own, and splits of one pool are not independent: lucky calibration
  images leave unlucky others.
- draws: calibration images are drawn from the pool with replacement, so that the pool is the population that the
  promise is about, and its share is known. A promise at confidence 95 % may be broken in 5 of 100.

Exits with 1 if a promise is broken in more than --allowed of the draws.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from stethoscope.core.errors import DataError
from stethoscope.detection.detector import Detector
from stethoscope.evaluation.removal_guarantee import (
    RemovalCounts,
    certify_counts,
    counts_after_removal,
    read_judged_texts,
    removal_thresholds,
)


def main() -> None:
    """Print a line for every promise and number of calibration images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run with a detector")
    parser.add_argument("--splits", type=int, default=100)
    parser.add_argument("--calibration", type=int, nargs="+", default=[200, 400, 800], help="images")
    parser.add_argument("--most", type=float, nargs="+", default=[0.05, 0.1])
    parser.add_argument("--allowed", type=float, default=0.05, help="largest share of draws with a broken promise")
    options = parser.parse_args()
    folds = read_judged_texts(options.run, Detector.load(options.run))
    thresholds = removal_thresholds(folds["train"])
    training, pool = (
        counts_after_removal(texts, thresholds) for texts in (folds["train"], [*folds["calibration"], *folds["test"]])
    )
    failures = 0
    print("most  calibration  refused  broken, splits  broken, draws  share of the rest  right kept  images")
    for most in options.most:
        for size in options.calibration:
            results: dict[str, list[tuple[float, float]]] = {"splits": [], "draws": []}
            for seed in range(options.splits):
                random = np.random.default_rng(seed)
                order = random.permutation(len(pool.groups))
                drawn = random.integers(len(pool.groups), size=size)
                for name, images, others in (("splits", order[:size], order[size:]), ("draws", drawn, order)):
                    try:
                        certificate = certify_counts(pool.select(images), training, thresholds, most)
                    except DataError:
                        continue
                    column = int(np.flatnonzero(thresholds == certificate.threshold)[0])
                    results[name].append(remaining(pool.select(others), column))
            broken = {name: sum(share > most for share, _ in pairs) for name, pairs in results.items()}
            failures += broken["draws"] > options.allowed * options.splits
            share, kept = np.mean(results["splits"] or [(np.nan, np.nan)], axis=0)
            print(
                f"{most:4.2f}  {size:11}  {options.splits - len(results['splits']):7}  {broken['splits']:14}  "
                f"{broken['draws']:13}  {share:17.3f}  {kept:10.3f}  {len(pool.groups):6}",
                flush=True,
            )
    sys.exit(1 if failures else 0)


def remaining(counts: RemovalCounts, column: int) -> tuple[float, float]:
    """Return the share of remaining mentions that is hallucinated, and of right ones kept."""
    wrong, left = counts.wrong[:, column].sum(), counts.kept[:, column].sum()
    return wrong / max(left, 1), (left - wrong) / counts.right.sum()


if __name__ == "__main__":
    main()
