"""``stethoscope train``: a detector from the token table of a run, judged beside the baselines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from stethoscope.build import build
from stethoscope.errors import ArtefactError, ConfigError

if TYPE_CHECKING:
    from stethoscope.detector import Detector
    from stethoscope.store import RunStore


def run(config: DictConfig) -> None:
    """Fits, calibrates, measures and saves the detector of a finished run; prints its table."""
    from stethoscope.commands.tables import print_detector
    from stethoscope.detector import Detector
    from stethoscope.store import RunStore

    folder = Path(config.run)
    if not folder.is_dir():
        raise ArtefactError(f"run={folder} is no directory; name a run of `stethoscope extract` or `benchmark`")
    detector = build(config.detector, Detector, "detector", config.plugins)
    results = fit(RunStore(folder), config.task, detector, fractions(config), config.seed)
    print_detector(results)
    print(f"detector: {folder / 'detector'}")


def fractions(config: DictConfig) -> tuple[float, float, float]:
    """Shares of train, calibration and test.

    Raises:
        ConfigError: they leave no images for one of the three.
    """
    train, calibration = float(config.split.train), float(config.split.calibration)
    test = round(1 - train - calibration, 9)
    if min(train, calibration, test) <= 0:
        raise ConfigError(
            f"split.train={train} and split.calibration={calibration} should be above 0 and leave images for the test"
        )
    return train, calibration, test


def fit(
    store: RunStore, task: str, detector: Detector, shares: tuple[float, float, float], seed: int
) -> dict[str, Any]:
    """Trains on one task's mentions; leaves ``detector/``, ``warnings.jsonl`` and the figures in the run directory.

    Raises:
        ArtefactError: the run has no token rows of that task.
    """
    from stethoscope.leaderboard import train_detector
    from stethoscope.stats import split_groups
    from stethoscope.warn import mention_warnings, write_warnings

    table = store.tokens(task)
    if table.empty:
        raise ArtefactError(
            f"{store.run_dir} has no token features of task {task!r}; `stethoscope extract run={store.run_dir}` "
            "computes them"
        )
    detector, results = train_detector(table, detector, shares, seed)
    fingerprint = store.fingerprints().get(task, {})
    detector.save(
        store.run_dir / "detector",
        {"model": fingerprint.get("adapter"), "task": fingerprint.get("task", task), "label": LABEL},
    )
    store.write_metrics("detector", results)
    groups = table["group"].to_numpy(dtype=str)
    folds = split_groups(groups, dict(zip(("train", "calibration", "test"), shares, strict=True)), seed)
    write_warnings(mention_warnings(table, detector, folds), store.run_dir / "warnings.jsonl")
    return results


LABEL = "first sub-token of an object mention: 1 if the object is not in the image (the task's ground truth), else 0"
