"""Which detector judges a model: one that is named, one that a run trained on this very model, or the shipped one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stethoscope.core.errors import ArtefactError
from stethoscope.detection.artefact import MANIFEST, read_manifest
from stethoscope.features.columns import check_same_model, states_of
from stethoscope.testbed import DETECTOR_DIR

if TYPE_CHECKING:
    from stethoscope.adapters.base import Adapter
    from stethoscope.detector import Detector

AUTO = "auto"
"""What ``detector=`` is by default: look for one of this very model."""
SWITCHED_OFF = "The detector is switched off, so there are no warnings."


def wanted(setting: str | None) -> str | None:
    """The value of ``detector=``; None where it is switched off.

    >>> wanted("runs/mine"), wanted("auto"), wanted("none"), wanted(None)
    ('runs/mine', 'auto', None, None)
    """
    return None if setting is None or str(setting) == "none" else str(setting)


def detector_folder(folder: str) -> Path:
    """The folder of a detector, which may be given as that of the run that has it.

    Raises:
        ArtefactError: there is no such folder, or it is a run without a detector.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ArtefactError(f"detector={folder} is no directory; name a detector's folder, or a run that has one")
    if (path / "detector").is_dir():
        return path / "detector"
    if (path / "samples.jsonl").is_file():
        raise ArtefactError(f"the run in {folder} has no detector; `stethoscope train run={folder}` makes one")
    return path


def load_detector(detector: Detector | Path | str | None) -> Detector | None:
    """A detector as a user gives it: itself, its folder, or that of a run that has one.

    Raises:
        ArtefactError: there is no such folder, or no detector in it.
    """
    if not isinstance(detector, (str, Path)):
        return detector
    from stethoscope.detector import Detector

    return Detector.load(detector_folder(str(detector)))


def trained(runs: Path, fingerprint: Mapping[str, Any], run: Path | None = None) -> list[Path]:
    """Folders of the detectors that were trained on exactly this model: that of ``run``, then those of ``runs``.

    Those of ``runs`` are in the order of their age, newest first. A detector that cannot be read is passed over with a
    warning.
    """
    folders = sorted((path.parent for path in runs.glob(f"*/detector/{MANIFEST}")), key=_age)
    if run is not None and (run / "detector" / MANIFEST).is_file():
        folders.insert(0, run / "detector")
    return [folder for folder in folders if _usable(folder, fingerprint)]


def _age(folder: Path) -> float:
    try:
        return -(folder / MANIFEST).stat().st_mtime
    except OSError:  # gone since it was listed, or a link to nothing
        return 0.0


def _usable(folder: Path, fingerprint: Mapping[str, Any]) -> bool:
    """Whether a detector was trained on the model with this fingerprint and can be read; else warns of the latter."""
    from stethoscope.detector import Detector

    try:
        if not _of(_model(folder), fingerprint):
            return False
        Detector.load(folder)
    except ArtefactError as error:
        warnings.warn(f"passed over a detector: {error}", stacklevel=3)
        return False
    return True


def shipped(adapter: Adapter) -> list[Path]:
    """The folder of the detector that comes with the embedded model, if this is that model, unchanged; else nothing.

    Args:
        adapter: set up. Weights, which can be large, are digested only where its class is that of the embedded model.
    """
    model = _model(DETECTOR_DIR)
    own = f"{type(adapter).__module__}.{type(adapter).__qualname__}"
    return [DETECTOR_DIR] if model.get("adapter") == own and _of(model, adapter.fingerprint()) else []


def check_model(detector: Detector, adapter: Adapter) -> None:
    """Checks that a detector may judge a model's answers.

    Args:
        detector: fitted.
        adapter: of the model, set up. Its weights are digested only if the detector reads states.

    Raises:
        ConfigError: the detector reads states of another model, which mean nothing in this one.
    """
    if states_of(detector.features):
        check_same_model(detector.features, detector.notes.get("model") or {}, adapter.fingerprint(), adapter.name)


def called(folder: Path) -> str:
    """How a detector is called: by the run that has it."""
    if folder == DETECTOR_DIR:
        return "the one that comes with the embedded model, trained on captions of its own"
    return f"of the run {folder.resolve().parent.name}" if folder.name == "detector" else folder.name


def _model(folder: Path) -> dict[str, Any]:
    """The fingerprint of the model that a detector was trained on; empty where that is not known."""
    model = read_manifest(folder).get("model")
    return model if isinstance(model, dict) else {}


def _of(model: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> bool:
    """Whether a detector was trained on answers of the model with this fingerprint."""
    # runs note our code too; other versions of it and of transformers give the same answers but for rounding
    return bool(model) and all(model.get(key) == fingerprint[key] for key in fingerprint if key != "transformers")
