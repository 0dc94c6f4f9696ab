"""``stethoscope train``: a detector from the token table of a run, judged beside the baselines."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from stethoscope.build import build, choices, compose
from stethoscope.errors import ArtefactError, ConfigError, unknown

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
    same = [f"detector.{key}={detector.settings[key]}" for key in ("repeats", "subtokens")]  # or no row is common
    beside = {name: _other(name, same, config.plugins) for name in config.beside}
    results = fit(
        RunStore(folder),
        config.mentions,
        detector,
        fractions(config),
        config.seed,
        beside=beside,
        ablation=config.ablation,
        progress=lambda line: print(f"{line} ...", file=sys.stderr),
    )
    print_detector(results)
    print(f"detector: {folder / 'detector'}")


def _other(name: str, same: Sequence[str], plugins: Sequence[str]) -> Detector:
    """A detector of ``conf/detector`` with some settings of the main one.

    Raises:
        ConfigError: there is none of that name.
    """
    from stethoscope.detector import Detector

    if name not in choices("detector"):
        raise ConfigError(unknown("detector of beside", str(name), choices("detector")))
    return build(compose([f"+detector={name}", *same]).detector, Detector, f"beside.{name}", plugins)


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
    store: RunStore, task: str, detector: Detector, shares: tuple[float, float, float], seed: int, **more: Any
) -> dict[str, Any]:
    """Trains on one task's mentions; leaves ``detector/``, ``warnings.jsonl`` and the figures in the run directory.

    Args:
        store: the run.
        task: whose mentions.
        detector: settings of the detector.
        shares: of the images for train, calibration and test.
        seed: of split and bootstrap.
        more: ``beside``, ``ablation`` and ``progress`` of ``stethoscope.training.train_detector``.

    Raises:
        ArtefactError: the run has no token rows of that task.
    """
    from stethoscope.training import train_detector
    from stethoscope.warn import mention_warnings, write_warnings

    table = store.tokens(task)
    if table.empty:
        raise ArtefactError(
            f"{store.run_dir} has no token features of task {task!r}; `stethoscope extract run={store.run_dir}` "
            "computes them"
        )
    detector, results, folds = train_detector(table, detector, shares, seed, **more)
    fingerprint = store.fingerprints().get(task, {})
    detector.save(
        store.run_dir / "detector",
        {"model": fingerprint.get("adapter"), "task": fingerprint.get("task", task), "label": label(detector)},
    )
    store.write_metrics("detector", results)
    write_warnings(mention_warnings(table, detector, folds), store.run_dir / "warnings.jsonl")
    return results


def label(detector: Detector) -> str:
    """What a detector has learned to predict, for its manifest."""
    what = {"first": "first sub-token of", "all": "every sub-token of"}
    rows = what.get(detector.settings["subtokens"], f"{detector.settings['subtokens']} over the sub-tokens of")
    which = "the first mention of an object" if detector.settings["repeats"] == "first" else "every object mention"
    return f"{rows} {which} in an answer: 1 if the object is not in the image (the task's ground truth), else 0"
