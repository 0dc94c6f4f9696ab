"""Are promised thresholds kept? Trains on many splits of a run's images and counts on how many test folds they are.

    stethoscope evaluate task=chair task.scenes=2000 && stethoscope extract run=runs/evaluate-testbed-chair
    python scripts/check/promises.py runs/evaluate-testbed-chair

A test fold is a sample too, so that its share of errors may be above a promise that holds for all images; the count is
therefore a little lower than that of the promises which hold.
"""

from __future__ import annotations

import argparse

import numpy as np

from stethoscope.core.errors import DataError
from stethoscope.detection.detector import Detector
from stethoscope.metrics import classification
from stethoscope.metrics.bootstrap import split_groups
from stethoscope.storage.run_dir import RunStore

PROMISES = ({"max_false_alarms": 0.05}, {"max_false_alarms": 0.1}, {"max_missed": 0.1}, {"max_missed": 0.2})


def main() -> None:
    """Read the run and print a line for every guarantee."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="a run directory with tokens.parquet")
    parser.add_argument("--task", default="chair")
    parser.add_argument("--splits", type=int, default=100)
    parser.add_argument("--estimator", default="logistic")
    parser.add_argument("--factored", action="store_true")
    options = parser.parse_args()
    table = RunStore(options.run).tokens(options.task)
    groups = table["group"].to_numpy(dtype=str)
    shares = {"train": 0.5, "calibration": 0.2, "test": 0.3}
    errors: dict[int, list[float]] = {number: [] for number in range(len(PROMISES))}
    refused, calibration_errors = dict.fromkeys(errors, 0), []
    for seed in range(options.splits):
        folds = split_groups(groups, shares, seed)
        for number, promise in enumerate(PROMISES):
            detector = Detector(options.estimator, factored=options.factored, C=1.0, threshold=promise)
            try:
                detector.fit(table[folds["train"]], table[folds["calibration"]])
            except DataError:
                refused[number] += 1
                continue
            test = detector.select_mentions(table[folds["test"]])
            wrong, probability = test["label"].to_numpy() == 1, detector.predict(test)
            warned = probability >= detector.threshold
            errors[number].append(np.mean(warned[~wrong] if "max_false_alarms" in promise else ~warned[wrong]))
            if number == 0:
                calibration_errors.append(classification.ece(wrong.astype(int), probability))
    for number, promise in enumerate(PROMISES):
        [(risk, most)] = promise.items()
        rates = np.array(errors[number])
        kept = (
            f"kept on {int((rates <= most).sum())} of {len(rates)} test folds, mean {rates.mean():.3f}"
            if len(rates)
            else ""
        )
        print(f"{risk}={most}: {kept}; refused on {refused[number]}")
    if calibration_errors:
        print(f"ECE: mean {np.mean(calibration_errors):.3f}, largest {np.max(calibration_errors):.3f}")


if __name__ == "__main__":
    main()
