"""Judge detectors on fresh pictures of other seeds: learned from one run, tested on whole other runs.

    stethoscope evaluate task=chair task.scenes=3000 name=learn logger=none
    for seed in 7 8; do
      stethoscope evaluate task=chair task.scenes=2000 task.scene_seed=$seed name=seed$seed logger=none
    done
    for name in learn seed7 seed8; do stethoscope extract run=runs/$name features=full_verified; done
    python scripts/check/held_out.py runs/learn runs/seed7 runs/seed8

The first run is split into images to learn from (70 %) and to calibrate on; every mention of the others is judged. The
rows are ours with the sets of features ``default`` (one pass) and ``default_relevancy`` (a backward pass), the
published detectors that need one pass, the model's own verification, and the baselines that read the text alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import pandas as pd

from stethoscope.core.token_table import feature_names
from stethoscope.detection.baselines import baselines
from stethoscope.detection.detector import Detector
from stethoscope.detection.published import SELF_VERIFICATION, available_methods, columns_of, score_published
from stethoscope.detection.score_metrics import evaluate_scores
from stethoscope.features import named_set
from stethoscope.features.registry import FORWARD
from stethoscope.metrics.bootstrap import group_weights, split_groups
from stethoscope.storage.run_dir import RunStore

SHOWN = ("auroc", "auroc_controlled", "auroc_within_word", "ece")
SELECTION = {"subtokens": "first", "repeats": "first"}


def main() -> None:
    """Print a table for every test run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run to learn from, with tokens.parquet")
    parser.add_argument("test", nargs="+", help="runs of other pictures with the same features")
    options = parser.parse_args()
    learn = rows_of(options.run)
    folds = {
        name: learn[mask] for name, mask in split_groups(groups(learn), {"train": 0.7, "calibration": 0.3}).items()
    }
    for path in options.test:
        test = rows_of(path)
        if set(test["group"]) & set(learn["group"]):
            parser.error(f"{path} shares pictures with {options.run}")
        print(
            f"{path}: {test['group'].nunique()} images, {len(test)} mentions, {test['label'].mean():.1%} hallucinated"
        )
        print_table(scores_of({**folds, "test": test}), test)


def rows_of(path: str) -> pd.DataFrame:
    """Read the first judged mentions of a run."""
    return Detector().select_mentions(RunStore(path).tokens("chair"))


def groups(table: pd.DataFrame) -> np.ndarray:
    """Return the image of every row."""
    return table["group"].to_numpy(dtype=str)


def scores_of(folds: dict[str, pd.DataFrame]) -> dict[str, tuple[np.ndarray, bool]]:
    """Fit everything and score the ``test`` fold: (rows,) by name, and whether they are probabilities."""
    train, calibration, test = (folds[name] for name in ("train", "calibration", "test"))
    columns: Sequence[str] = feature_names(train)
    scores = {}
    for name in ("default", "default_relevancy"):
        detector = Detector(features=columns_of(named_set(name), columns)).fit(train, calibration)
        scores[f"ours, {name}"] = detector.predict(test), True
    for method in available_methods(train):
        if method.cost == FORWARD or method.name == SELF_VERIFICATION:
            published = score_published(method, folds, SELECTION)
            scores[method.name] = published.values, published.probability
    for name, baseline in baselines("all", "all").items():
        scores[name] = baseline.fit(train, calibration).predict(test), True
    return scores


def print_table(scores: dict[str, tuple[np.ndarray, bool]], test: pd.DataFrame) -> None:
    """Print the metrics of all scores, the best first, with 95 % intervals over images."""
    drawn = group_weights(groups(test), 1000, 0)
    probabilities, others = ({k: v for k, (v, kind) in scores.items() if kind is wanted} for wanted in (True, False))
    figures = evaluate_scores(test, probabilities, drawn, others)
    for name in sorted(scores, key=lambda name: -figures[name, "auroc"][0]):
        cells = [f"{metric} {drawn.interval(figures[name, metric])}" for metric in SHOWN if (name, metric) in figures]
        print(f"  {name:28}{'; '.join(cells)}")


if __name__ == "__main__":
    main()
