"""Estimate the ceiling of any detector with a probe of the embedded model's image tokens, trained on far more data.

    stethoscope benchmark experiment=detectors
    python scripts/check/ceiling.py runs/detectors

Detectors learn from the mentions of some hundred captions. The probe learns from thousands of other pictures which of
all objects are in each, and reads what the projector hands to the language model: every image token gives a score for
every object, their log-sum-exp says whether it is there. It is judged on the same held-out mentions as the run's
detector. What it cannot tell, the picture's way into the model does not tell: objects too faint, or too much like
others.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import Tensor, nn

import stethoscope
from stethoscope import testbed
from stethoscope.detection.detector import Detector
from stethoscope.detection.score_metrics import AREAS, evaluate_scores
from stethoscope.metrics.bootstrap import group_weights, split_groups
from stethoscope.storage.run_dir import RunStore

SEED = 777  # of the pictures; those that models are judged on have another
FOLDS = {"train": 0.5, "calibration": 0.2, "test": 0.3}


def main() -> None:
    """Trains the probe and prints a line for it and for the run's detector."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run directory of the embedded model with tokens.parquet and detector/")
    parser.add_argument("--pictures", type=int, default=8000, help="that the probe learns from")
    parser.add_argument("--epochs", type=int, default=15)
    options = parser.parse_args()
    torch.manual_seed(0)
    adapter, detector = stethoscope.load("testbed"), Detector.load(f"{options.run}/detector")
    table = RunStore(options.run).tokens("chair")
    folds = split_groups(table["group"].to_numpy(dtype=str), FOLDS, 0)
    test = detector.select_mentions(table[folds["test"]])
    scenes = {scene.id: scene for scene in testbed.scenes(len(table["group"].unique()))}
    names = list(dict.fromkeys(test["group"]))
    learned = testbed.scenes(options.pictures, seed=SEED)
    probe = train(tokens_of(adapter, learned), presence(learned), options.epochs)
    with torch.inference_mode():
        scores = probe(tokens_of(adapter, [scenes[name] for name in names])).numpy()
    rows, columns = test["group"].map(names.index), test["object"].map(testbed.CATEGORIES.index)
    values = {"probe": -scores[rows, columns], "detector": detector.predict(test)}
    drawn = group_weights(test["group"], 1000, 0)
    figures = evaluate_scores(test, {}, drawn, values)
    for name in values:
        shown = [f"{metric} {drawn.interval(figures[name, metric])}" for metric in AREAS]
        print(f"{name:9} {'; '.join(shown)}")


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
def tokens_of(adapter: stethoscope.adapters.base.Adapter, scenes: list[testbed.Scene], batch: int = 50) -> Tensor:
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
