"""Simulate the promise about the text that remains after removal: how often is it broken, and what does it cost?

    stethoscope benchmark experiment=detectors
    python scripts/check/remaining_text.py runs/detectors

The images that the run's detector was not fitted on are split again and again into calibration images, which choose the
threshold of removal (``stethoscope.evaluation.removal_guarantee``), and others, on which the share of hallucinated
mentions in the remaining text is measured. A promise at confidence 95 % may be broken in 5 of 100 splits; splits of one
pool are not independent, and the share on the other images has noise of its own, so that the count is a rough one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from stethoscope.core.errors import DataError
from stethoscope.detection.detector import Detector
from stethoscope.evaluation.removal_guarantee import certify_removal, counts_after_removal, read_judged_texts


def main() -> None:
    """Print a line for every promise and number of calibration images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run with a detector")
    parser.add_argument("--splits", type=int, default=100)
    parser.add_argument("--calibration", type=int, nargs="+", default=[200, 400, 800], help="images")
    parser.add_argument("--most", type=float, nargs="+", default=[0.05, 0.1])
    options = parser.parse_args()
    folds = read_judged_texts(options.run, Detector.load(options.run))
    pool = [*folds["calibration"], *folds["test"]]
    groups = np.array(sorted({text.group for text in pool}))
    print("most  calibration  refused  broken  share of the rest  right kept  images")
    for most in options.most:
        for size in options.calibration:
            shares, kept, refused = [], [], 0
            for seed in range(options.splits):
                chosen = set(np.random.default_rng(seed).permutation(groups)[:size])
                try:
                    certificate = certify_removal([text for text in pool if text.group in chosen], folds["train"], most)
                except DataError:
                    refused += 1
                    continue
                others = [text for text in pool if text.group not in chosen]
                wrong, left = counts_after_removal(others, np.array([certificate.threshold]))
                shares.append(wrong.sum() / max(left.sum(), 1))
                right = sum(int((text.labels == 0).sum()) for text in others)
                kept.append((left - wrong).sum() / right)
            broken = sum(share > most for share in shares)
            means = [np.mean(values) if values else np.nan for values in (shares, kept)]
            print(
                f"{most:4.2f}  {size:11}  {refused:7}  {broken:6}  {means[0]:17.3f}  {means[1]:10.3f}  {len(groups)}",
                flush=True,
            )


if __name__ == "__main__":
    main()
