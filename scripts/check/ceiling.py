"""Measure how much of the gap between the best published detector and the ceiling we close.

    stethoscope benchmark experiment=detectors
    python scripts/check/ceiling.py runs/detectors

The ceiling is that of any detector on the embedded model: a probe of its image tokens, trained on far more data.
Detectors learn from the mentions of some hundred captions. The probe learns from thousands of other pictures which of
all objects are in each, and reads what the projector hands to the language model: every image token gives a score for
every object, their log-sum-exp says whether it is there. What it cannot tell, the picture's way into the model does not
tell: objects too faint, or too much like others.

For every split seed all are fitted and judged on the same images: the probe, our detector with the sets of features
``default`` (one pass) and ``default_relevancy`` (and a backward pass), and the published detectors that need one pass.
The best of these is chosen on the test images, in its own favour. A last row judges ours on objects that it was never
shown.

    python scripts/check/ceiling.py runs/detectors --unlabelled runs/more runs/most   # default_verified, other pictures

adds ours as it is when it also learns from the model's replies about the pictures of these runs, whose labels it does
not read; and ``--labels-alone`` ours as it is when it learns from no reply, as the published detectors do.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import stethoscope
from stethoscope import testbed
from stethoscope.adapters.hf import HfAdapter
from stethoscope.core.token_table import MentionSelection, feature_names
from stethoscope.detection.detector import Detector
from stethoscope.detection.hidden_probe import TEACHER
from stethoscope.detection.published import available_methods, columns_of, score_published
from stethoscope.detection.score_metrics import evaluate_scores
from stethoscope.features import named_set
from stethoscope.features.registry import FORWARD
from stethoscope.metrics.bootstrap import Resamples, group_weights, split_folds
from stethoscope.storage.run_dir import RunStore

SEED = 777  # of the pictures; those that models are judged on have another
SETS = ("default", "default_relevancy")
UNLABELLED, LABELS_ALONE = "default with unlabelled pictures", "default from labels alone"
SHOWN = ("auroc", "auroc_controlled")
HELD_OUT = 4  # parts of the objects, each of which is left out once


def main() -> None:
    """Train the probe and print a table for every split seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run directory of the embedded model with tokens.parquet")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the split by image")
    parser.add_argument("--pictures", type=int, default=8000, help="that the probe learns from")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--unlabelled", nargs="+", default=(), help="runs of other pictures with the model's replies")
    parser.add_argument("--labels-alone", action="store_true", help="also judge ours without the model's replies")
    options = parser.parse_args()
    torch.manual_seed(0)
    adapter = stethoscope.load("testbed")
    assert isinstance(adapter, HfAdapter)
    table = mentions(RunStore(options.run).tokens("chair"))
    learned = testbed.scenes(options.pictures, seed=SEED)
    unlabelled = [mentions(RunStore(run).tokens("chair")) for run in options.unlabelled]
    further = pd.concat(unlabelled, ignore_index=True, join="inner") if unlabelled else None
    if further is not None and set(further["group"]) & set(table["group"]):
        parser.error(f"{' or '.join(options.unlabelled)} shares pictures with {options.run}")
    probe = train(tokens_of(adapter, learned), presence(learned), options.epochs)
    table["ceiling"] = -present(adapter, probe, table)
    for seed in options.seeds:
        masks = split_folds(table["group"], seed=seed)
        folds = {name: table[mask].reset_index(drop=True) for name, mask in masks.items()}
        print(f"split seed {seed}: {folds['test']['group'].nunique()} test images, {len(folds['test'])} mentions")
        compare(folds, seed, further, options.labels_alone)


def mentions(table: pd.DataFrame) -> pd.DataFrame:
    """Select the first mentions of a token table that were judged, the rows that detectors learn from."""
    return Detector().select_mentions(table)


def present(adapter: HfAdapter, probe: Probe, table: pd.DataFrame) -> np.ndarray:
    """Compute the probe's log-odds that the object of each row is in its picture, (rows,)."""
    wanted = set(table["group"])
    chosen = [scene for scene in testbed.scenes(1 + max(int(name.rsplit("-", 1)[1]) for name in wanted))]
    chosen = [scene for scene in chosen if scene.id in wanted]
    with torch.inference_mode():
        scores = probe(tokens_of(adapter, chosen)).numpy()
    rows = table["group"].map({scene.id: index for index, scene in enumerate(chosen)})
    return scores[rows, table["object"].map(testbed.CATEGORIES.index)]


def compare(
    folds: Mapping[str, pd.DataFrame], seed: int, further: pd.DataFrame | None = None, labels_alone: bool = False
) -> None:
    """Print the metrics of all detectors on the test fold, and the share of the gap that ours close."""
    sets = (*SETS, *([UNLABELLED] if further is not None else []), *([LABELS_ALONE] if labels_alone else []))
    test, own = folds["test"], tuple(name for name in feature_names(folds["test"]) if name != "ceiling")
    parts = {name: fold.drop(columns="ceiling") for name, fold in folds.items()}
    selection: MentionSelection = {"subtokens": "first", "repeats": "first"}
    values = {"ceiling": test["ceiling"].to_numpy()}
    for name in sets:
        learned = parts
        if name == UNLABELLED and further is not None:
            shared = [column for column in parts["train"] if column in further]  # the other run may have fewer features
            learned = {key: fold[shared] for key, fold in parts.items()}
            learned["train"] = pd.concat([learned["train"], further[shared].assign(label=-1)], ignore_index=True)
        elif name == LABELS_ALONE:
            learned = {key: fold.drop(columns=TEACHER) for key, fold in parts.items()}
        detector = Detector(features=columns_of(named_set(name.split()[0]), own), seed=seed)
        detector.fit(learned["train"], learned["calibration"])
        values[f"ours, {name}"] = detector.predict(learned["test"])
    rivals = [method for method in available_methods(parts["train"]) if method.cost == FORWARD]
    values |= {method.name: score_published(method, parts, selection, seed).values for method in rivals}
    values["ours, default, unseen objects"] = unseen_objects(parts, columns_of(named_set("default"), own), seed)
    probabilities = {name: scores for name, scores in values.items() if name.startswith("ours, ")}
    drawn = group_weights(test["group"].to_numpy(dtype=str), 1000, seed)
    figures = evaluate_scores(test, probabilities, drawn, {n: v for n, v in values.items() if n not in probabilities})
    best = {metric: max((m.name for m in rivals), key=lambda name: figures[name, metric][0]) for metric in SHOWN}
    for name in (*[key for key in values if key not in best.values()], *dict.fromkeys(best.values())):
        if name in ("ceiling", *probabilities, *best.values()):
            ece = f", ece {figures[name, 'ece'][0]:.3f}" if name in probabilities else ""
            print(f"  {name:40}{', '.join(f'{m} {drawn.interval(figures[name, m])}' for m in SHOWN)}{ece}")
    for name in sets:
        for metric in SHOWN:
            print(f"  {name} over {best[metric]}: {gap(figures, f'ours, {name}', best[metric], metric, drawn)}")


def gap(figures: Mapping[tuple[str, str], np.ndarray], own: str, rival: str, metric: str, drawn: Resamples) -> str:
    """Describe the gain over a rival and its share of the gap to the ceiling, with intervals over images."""
    gain = figures[own, metric] - figures[rival, metric]
    share = gain / (figures["ceiling", metric] - figures[rival, metric])
    return f"gain in {metric} {drawn.interval(gain)}, share of the gap to the ceiling {drawn.interval(share)}"


def unseen_objects(folds: Mapping[str, pd.DataFrame], columns: tuple[str, ...], seed: int) -> np.ndarray:
    """Score mentions by detectors that were shown none of their objects, (rows,).

    The mentions are those of the test fold.
    """
    objects = np.random.default_rng(seed).permutation(sorted(set(folds["test"]["object"])))
    scores = np.zeros(len(folds["test"]))
    for part in np.array_split(objects, HELD_OUT):
        rest = {name: folds[name][~folds[name]["object"].isin(part)] for name in ("train", "calibration")}
        rows = folds["test"]["object"].isin(part).to_numpy()
        detector = Detector(features=columns, seed=seed).fit(rest["train"], rest["calibration"])
        scores[rows] = detector.predict(folds["test"][rows])
    return scores


class Probe(nn.Module):
    """(B, N, D) image tokens to (B, objects) log-odds that each object is in the picture."""

    def __init__(self, mean: Tensor, spread: Tensor, width: int = 128) -> None:
        super().__init__()
        self.mean, self.spread = mean, spread
        parts = (nn.Dropout(0.1), nn.Linear(len(mean), width), nn.GELU(), nn.Dropout(0.1))
        self.score = nn.Sequential(*parts, nn.Linear(width, len(testbed.CATEGORIES)))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.score((tokens - self.mean) / self.spread).logsumexp(1) - np.log(tokens.shape[1])


def train(tokens: Tensor, labels: Tensor, epochs: int, batch: int = 64, rate: float = 3e-3) -> Probe:
    """Train a probe on pictures."""
    probe = Probe(tokens.mean((0, 1)), tokens.std((0, 1)))
    optimiser = torch.optim.AdamW(probe.parameters(), lr=rate, weight_decay=0.01)
    steps = epochs * len(range(0, len(tokens), batch))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
    for _ in range(epochs):
        for chosen in torch.randperm(len(tokens)).split(batch):
            loss = nn.functional.binary_cross_entropy_with_logits(probe(tokens[chosen]), labels[chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return probe.eval()


@torch.inference_mode()
def tokens_of(adapter: HfAdapter, scenes: list[testbed.Scene], batch: int = 50) -> Tensor:
    """Compute the projector's output for scenes, (pictures, N, D)."""
    features = []
    for start in range(0, len(scenes), batch):
        pictures = [scene.image() for scene in scenes[start : start + batch]]
        pixels = adapter.processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        features.append(torch.stack(tuple(adapter.model.get_image_features(pixel_values=pixels).pooler_output)))
    return torch.cat(features).clone()


def presence(scenes: list[testbed.Scene]) -> Tensor:
    """Build labels, (pictures, objects): 1 where the picture shows the object."""
    return torch.tensor([[float(name in scene.visible) for name in testbed.CATEGORIES] for scene in scenes])


if __name__ == "__main__":
    main()
