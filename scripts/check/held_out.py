"""Judge detectors on fresh pictures of other seeds: learned from one run, tested on whole other runs.

    stethoscope evaluate task=chair task.scenes=3000 name=learn logger=none
    for seed in 7 8; do
      stethoscope evaluate task=chair task.scenes=2000 task.scene_seed=$seed name=seed$seed logger=none
    done
    for name in learn seed7 seed8; do
      stethoscope extract run=runs/$name features=[default_verified,paper/haloprobe,paper/pas]
    done
    python scripts/check/held_out.py runs/learn runs/seed7 runs/seed8

The first run is split into images to learn from (70 %) and to calibrate on; every mention of the others is judged. The
rows are ours (``features=default``, one pass), the published detectors of one pass that every run has the features of,
the model's own verification, and the baselines that read the text alone. A run of more features, such as the leader
board's, serves as the first too.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import pandas as pd

from stethoscope.core.token_table import MentionSelection, feature_names
from stethoscope.detection.baselines import baselines
from stethoscope.detection.detector import Detector
from stethoscope.detection.published import SELF_VERIFICATION, available_methods, columns_of, score_published
from stethoscope.detection.score_metrics import evaluate_scores
from stethoscope.features import named_set
from stethoscope.features.registry import FORWARD
from stethoscope.metrics.bootstrap import group_weights, split_groups
from stethoscope.storage.run_dir import RunStore

SHOWN = ("auroc", "auroc_controlled", "auroc_within_word", "ece")
SELECTION: MentionSelection = {"subtokens": "first", "repeats": "first"}


def main() -> None:
    """Print a table for every test run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run to learn from, with tokens.parquet")
    parser.add_argument("test", nargs="+", help="runs of other pictures with the same features")
    options = parser.parse_args()
    learn, *runs = (rows_of(path) for path in (options.run, *options.test))
    shared = [column for column in learn if all(column in run for run in runs)]  # some may have more features
    for path, run in zip(options.test, runs, strict=True):
        if set(run["group"]) & set(learn["group"]):
            parser.error(f"{path} shares pictures with {options.run}")
    parts = split_groups(groups(learn), {"train": 0.7, "calibration": 0.3})
    folds = {name: learn[mask][shared].reset_index(drop=True) for name, mask in parts.items()}
    scores = scores_of({**folds, "test": pd.concat([run[shared] for run in runs], ignore_index=True)})
    start = 0
    for path, run in zip(options.test, runs, strict=True):
        print(f"{path}: {run['group'].nunique()} images, {len(run)} mentions, {run['label'].mean():.1%} hallucinated")
        print_table({name: (v[start : start + len(run)], kind) for name, (v, kind) in scores.items()}, run)
        start += len(run)


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
    detector = Detector(features=columns_of(named_set("default"), columns)).fit(train, calibration)
    scores = {"ours, default": (detector.predict(test), True)}
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
