"""Draw the learning curve of detectors against the number of labelled pictures.

    stethoscope evaluate task=chair task.scenes=5000 name=many logger=none
    stethoscope extract run=runs/many features=[default_verified,paper/haloprobe]
    python scripts/check/few_labels.py runs/many
    python scripts/check/few_labels.py runs/detectors --split 0 --counts 0 200 --draws 2   # the leader board's pictures
    python scripts/check/few_labels.py runs/detectors --test runs/seed7 --few-alone        # fresh ones, of held_out.py

2,000 pictures are held out, or the test images of a split seed, or those of another run. The others have no label but
for the number at the head of a line; ours learns from the rest by the model's own verification (``labels=few``, and
``none`` at 0; ``all`` with it and without), the published ones from the labelled alone. The figures are means over
draws of the labelled pictures. Self-verification asks the model about every mention.
"""

from __future__ import annotations

import argparse
from typing import Literal

import numpy as np
import pandas as pd

from stethoscope.core.errors import DataError
from stethoscope.core.token_table import MentionSelection, feature_names
from stethoscope.detection.detector import Detector
from stethoscope.detection.published import SELF_VERIFICATION, available_methods, columns_of, score_published
from stethoscope.detection.score_metrics import control_bins
from stethoscope.features import named_set
from stethoscope.metrics import classification
from stethoscope.metrics.bootstrap import split_folds, split_groups
from stethoscope.storage.run_dir import RunStore

HELD_OUT = 2000  # pictures
COUNTS = (0, 25, 50, 100, 200, 500, 1000)
RIVALS = ("paper/hidden", "paper/haloprobe")
SELECTION: MentionSelection = {"subtokens": "first", "repeats": "first"}


def main() -> None:
    """Print a line for every number of labelled pictures and every detector."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="of features=default_verified or more, with more than 2,000 pictures")
    parser.add_argument("--draws", type=int, default=3, help="of the labelled pictures")
    judged = parser.add_mutually_exclusive_group()
    judged.add_argument("--split", type=int, help="judge on the test images of this split seed, as `train` does")
    judged.add_argument("--test", help="judge on all pictures of this run, with the same features")
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, help="of labelled pictures")
    parser.add_argument("--few-alone", action="store_true", help="fit nothing but ours with labels=few and none")
    options = parser.parse_args()
    runs = options.runs if options.test is None else [*options.runs, options.test]
    tables = [Detector().select_mentions(RunStore(run).tokens("chair")) for run in runs]
    table = pd.concat(tables, ignore_index=True, join="inner")
    if options.test is not None:
        test_rows = np.arange(len(table)) >= len(table) - len(tables[-1])
        if set(table["group"][test_rows]) & set(table["group"][~test_rows]):
            parser.error(f"{options.test} shares pictures with {', '.join(options.runs)}")
        pictures = np.random.default_rng(0).permutation(sorted(set(table["group"][~test_rows])))
    elif options.split is None:
        pictures = np.random.default_rng(0).permutation(sorted(set(table["group"])))
        test_rows, pictures = table["group"].isin(pictures[:HELD_OUT]).to_numpy(), pictures[HELD_OUT:]
    else:
        test_rows = split_folds(table["group"], seed=options.split)["test"]
        pictures = np.array(sorted(set(table["group"][~test_rows])))
    test, learn = (table[rows].reset_index(drop=True) for rows in (test_rows, ~test_rows))
    methods = {method.name: method for method in available_methods(learn)}
    folds = {"train": learn, "calibration": learn, "test": test}
    verification = score_published(methods[SELF_VERIFICATION], folds, SELECTION)
    print(describe("self-verification", [figures(test, verification.values)]))
    for count in options.counts:
        measured: dict[str, list[tuple[float, ...]]] = {}
        for draw in range(options.draws if count else 1):
            known = np.random.default_rng(draw).permutation(pictures)[:count]
            labelled = learn["group"].isin(known).to_numpy()
            for name, scores in fitted(learn, labelled, test, {} if options.few_alone else methods).items():
                measured.setdefault(name, []).append(figures(test, scores))
        for name, values in measured.items():
            print(describe(f"{count:5} {name}", values), flush=True)


def fitted(learn: pd.DataFrame, labelled: np.ndarray, test: pd.DataFrame, methods: dict) -> dict[str, np.ndarray]:
    """Fit ours, and published methods where labels are enough; return scores (rows,) by name."""
    columns = columns_of(named_set("default_verified"), feature_names(learn))
    kind: Literal["few", "none"] = "few" if labelled.any() else "none"
    rows = learn.assign(label=np.where(labelled, learn["label"], -1))
    mine = Detector(features=columns, exclude=["verify_*"], labels=kind)
    scores = {f"ours, labels={kind}": mine.fit(rows).predict(test)}
    if methods and labelled.any():
        own = learn[labelled].reset_index(drop=True)
        split = split_groups(own["group"].to_numpy(dtype=str), {"train": 0.7, "calibration": 0.3})
        folds = {**{name: own[mask] for name, mask in split.items()}, "test": test}
        try:
            rivals = [name for name in RIVALS if name in methods]
            scores |= {name: score_published(methods[name], folds, SELECTION).values for name in rivals}
            others = pd.concat([folds["train"], rows[~labelled]], ignore_index=True)
            for name, train in {"labelled alone": folds["train"], "and the rest": others}.items():
                detector = Detector(features=columns, exclude=["verify_*"]).fit(train, folds["calibration"])
                scores[f"ours, labels=all, {name}"] = detector.predict(test)
        except DataError as error:
            print(f"      of these alone nothing can be learned: {error}")
    return scores


def figures(test: pd.DataFrame, scores: np.ndarray) -> tuple[float, ...]:
    """Return AUROC, position-controlled AUROC and, for probabilities, ECE of (rows,) scores."""
    labels = test["label"].to_numpy(dtype=int)
    controlled = classification.auroc_within(labels, scores, control_bins(test)["auroc_controlled"])
    probabilities = scores.min() >= 0 and scores.max() <= 1
    ece = float(classification.ece(labels, scores)) if probabilities else float("nan")
    return float(classification.auroc(labels, scores)), float(controlled), ece


def describe(name: str, values: list[tuple[float, ...]]) -> str:
    """Write the means over draws in a line."""
    auroc, controlled, ece = np.mean(values, axis=0)
    return f"{name:36} auroc {auroc:.4f}, position-controlled {controlled:.4f}, ece {ece:.4f}"


if __name__ == "__main__":
    main()
