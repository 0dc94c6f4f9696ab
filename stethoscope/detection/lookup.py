"""Look up the detector of a model: a named one, one that a run trained on this very model, or the bundled one."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from stethoscope.core.errors import ArtefactError, wrong_type
from stethoscope.core.files import replacing
from stethoscope.detection.artifact import MANIFEST, read_manifest
from stethoscope.features.columns import check_same_model, states_of
from stethoscope.testbed import DETECTOR_DIR

if TYPE_CHECKING:
    import pandas as pd

    from stethoscope.adapters.base import Adapter
    from stethoscope.detection.detector import Detector

AUTO = "auto"
"""Default of ``detector=``: look for a detector of this model."""
SWITCHED_OFF = "The detector is switched off, so there are no warnings."
TRAIN_ONE = (
    "No detector of this model was found, so there are no warnings. `stethoscope benchmark model={model}` trains one "
    "(of rendered scenes, unless chair.source=files or hub takes photographs)"
)
"""What is said of a model without a detector; how to use a new one follows."""


def parse_setting(setting: str | None) -> str | None:
    """Return the value of ``detector=``; None if it is switched off.

    >>> parse_setting("runs/mine"), parse_setting("auto"), parse_setting("none"), parse_setting(None)
    ('runs/mine', 'auto', None, None)
    """
    return None if setting is None or str(setting) == "none" else str(setting)


def detector_folder(folder: str) -> Path:
    """Return the folder of a detector, given as such or as the folder of a run with a detector.

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
    """Load a detector given as an object, as its folder, or as the folder of a run with a detector.

    Raises:
        ArtefactError: there is no such folder, or no detector in it.
        ConfigError: it is something else.
    """
    if detector is None:
        return None
    from stethoscope.detection.detector import Detector

    if isinstance(detector, Detector):
        return detector
    if not isinstance(detector, (str, Path)):
        raise wrong_type("a detector", "a Detector, or the path of one", detector)
    return Detector.load(detector_folder(str(detector)))


def detectors_for_model(runs: Path, fingerprint: Mapping[str, Any], run: Path | None = None) -> list[Path]:
    """List folders of detectors trained on exactly this model: that of ``run``, then those of ``runs``, newest first.

    A detector that cannot be read is skipped with a warning.

    Args:
        runs: folder of all runs.
        fingerprint: fingerprint of the model.
        run: folder of a run whose detector comes first.
    """
    folders = sorted((path.parent for path in runs.glob(f"*/detector/{MANIFEST}")), key=_negative_mtime)
    if run is not None and (run / "detector" / MANIFEST).is_file():
        folders.insert(0, run / "detector")
    return [folder for folder in folders if _usable(folder, fingerprint)]


def _negative_mtime(folder: Path) -> float:
    try:
        return -(folder / MANIFEST).stat().st_mtime
    except OSError:  # gone since it was listed, or a link to nothing
        return 0.0


def _usable(folder: Path, fingerprint: Mapping[str, Any]) -> bool:
    """Tell whether a detector was trained on this model and can be read; warn if it cannot be read."""
    from stethoscope.detection.detector import Detector

    try:
        if not matches_model(_model_fingerprint(folder), fingerprint):
            return False
        Detector.load(folder)
    except ArtefactError as error:
        warnings.warn(f"skipped a detector: {error}", stacklevel=3)
        return False
    return True


def bundled_detectors(adapter: Adapter) -> list[Path]:
    """List the bundled detector's folder if the adapter has the unchanged embedded model; else nothing.

    Args:
        adapter: adapter after ``setup``. Its weights are hashed only if its class is that of the embedded model.
    """
    model = _model_fingerprint(DETECTOR_DIR)
    own = f"{type(adapter).__module__}.{type(adapter).__qualname__}"
    return [DETECTOR_DIR] if model.get("adapter") == own and matches_model(model, adapter.fingerprint()) else []


def check_model(detector: Detector, adapter: Adapter) -> None:
    """Check that a detector can score a model's answers.

    Args:
        detector: fitted detector.
        adapter: adapter of the model after ``setup``. Its weights are hashed only if the detector reads states.

    Raises:
        ConfigError: the detector reads states of another model, which mean nothing in this one.
    """
    if states_of(detector.features):
        target = {"weights": adapter.weights_digest()}
        check_same_model(detector.features, detector.notes.get("model") or {}, target, adapter.name)


def describe_origin(folder: Path) -> str:
    """Describe a detector by the run that it belongs to."""
    if folder == DETECTOR_DIR:
        return "the one that comes with the embedded model, trained on captions of its own"
    return f"that of the run {folder.resolve().parent.name}" if folder.name == "detector" else folder.name


def _model_fingerprint(folder: Path) -> dict[str, Any]:
    """Read the fingerprint of the model that a detector was trained on; empty if unknown."""
    model = read_manifest(folder).get("model")
    return model if isinstance(model, dict) else {}


def matches_model(model: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> bool:
    """Tell whether a detector was trained on answers of the model with this fingerprint."""
    # other versions of transformers give the same answers up to rounding
    return bool(model) and all(model.get(key) == fingerprint[key] for key in fingerprint if key != "transformers")


# --- warnings ---------------------------------------------------------------------------------------------------------

WARNING_COLUMNS = {
    "task": "name of the task",
    "sample_id": "sample whose answer it is",
    "group": "its image",
    "object": "canonical name of the object",
    "start": "first character of the mention's tokens in the answer's text",
    "end": "the character after them",
    "probability": "probability that the object is hallucinated; calibrated where `unlike` is false",
    "evidence": "what the model's own computation says, in log-odds; above 0 it speaks for hallucination",
    "prior": "what place and name say (or, not factored, the base rate), in log-odds; the sum gives the probability",
    "visual_evidence": "what the image evidence looks like: [object, probability], null for nothing known; [] "
    "where the detector reads no visual evidence",
    "unlike": "the picture or the answer is unlike those that the detector was calibrated on, so that its probability "
    "is not calibrated; null where the detector has no monitor",
    "shift_p": "p-value of that: how many held-out pictures are at least as unlike",
    "warned": "the probability is at or above the detector's threshold",
    "label": "the truth if the task knows it: 1 hallucinated, 0 grounded, -1 not judged",
    "fold": "train, calibration or test where the detector was fitted on this run, else empty",
}
"""The keys of a line of ``warnings.jsonl``."""


class MentionProbabilities(NamedTuple):
    """Mentions of a token table with what a detector says of them.

    Attributes:
        rows: first sub-token of every mention, judged or not, indexed from 0.
        deciding: (rows,) index of the row whose probability a mention gets, see ``Detector.deciding_rows``.
        values: (rows,) probabilities of hallucination, in [0, 1].
    """

    rows: pd.DataFrame
    deciding: np.ndarray
    values: np.ndarray


def mention_probabilities(table: pd.DataFrame, detector: Detector) -> MentionProbabilities:
    """Compute a detector's probability for every mention of a token table.

    Raises:
        ArtefactError: the table has other features than the detector was fitted on.
    """
    rows = first_subtokens(table, detector)
    deciding = detector.deciding_rows(rows)
    return MentionProbabilities(rows, deciding, detector.predict(rows)[deciding])


def first_subtokens(table: pd.DataFrame, detector: Detector) -> pd.DataFrame:
    """Select the row of the first sub-token of every mention, judged or not, as a detector reads mentions."""
    rows = detector.select_mentions(table, judged=False)
    return rows[rows["is_first_subtoken"]].reset_index(drop=True)


def mention_warnings(
    table: pd.DataFrame, detector: Detector, folds: Mapping[str, np.ndarray] | None = None
) -> pd.DataFrame:
    """Make one row of ``WARNING_COLUMNS`` for every object mention; ``Detector.deciding_rows`` treats repeated ones.

    Args:
        table: a token table with the features that the detector was fitted on.
        detector: fitted or loaded; its ``subtokens`` reduces the sub-tokens of a mention (``all``: the first).
        folds: (rows,) masks of the table by name, those the detector was fitted with.

    Raises:
        ArtefactError: the table has other features than the detector was fitted on.
    """
    named = table[table["mention_index"] >= 0]
    ends = named.groupby(["task", "sample_id", "mention_index"], sort=False)["end"].max().rename("until")
    first = first_subtokens(table, detector)
    deciding = detector.deciding_rows(first)
    rows = first[["task", "sample_id", "group", "object", "start", "label", "mention_index"]].copy()
    if detector.additive:
        explanation = detector.explain(first)
        parts = explanation.probability, explanation.evidence, explanation.prior
        rows["probability"], rows["evidence"], rows["prior"] = (part[deciding] for part in parts)
    else:
        rows["probability"], rows["evidence"], rows["prior"] = detector.predict(first)[deciding], None, None
    candidates = detector.visual_evidence(first)
    rows["visual_evidence"] = [candidates[row] for row in deciding]
    rows["unlike"], rows["shift_p"] = _unlike(detector, table, first)
    rows["warned"] = rows["probability"] >= detector.threshold
    rows["fold"] = ""
    for name, mask in (folds or {}).items():
        rows.loc[rows["group"].isin(set(table["group"][mask])), "fold"] = name
    rows = rows.join(ends, on=["task", "sample_id", "mention_index"]).rename(columns={"until": "end"})
    return rows[list(WARNING_COLUMNS)]


def _unlike(
    detector: Detector, table: pd.DataFrame, mentions: pd.DataFrame
) -> tuple[list[bool | None], list[float | None]]:
    """Return for every mention whether its answer is unlike the calibration fold, and the p-value of that."""
    import pandas as pd  # not for those who only look detectors up

    if detector.monitor is None or not len(mentions):
        return [None] * len(mentions), [None] * len(mentions)
    answers = detector.monitor.pictures(detector.readings(table, contents=False))
    rows = answers.set_index(["task", "sample_id"]).loc[pd.MultiIndex.from_frame(mentions[["task", "sample_id"]])]
    return rows["unlike"].tolist(), rows["p"].tolist()


def write_warnings(rows: pd.DataFrame, path: Path) -> None:
    """Write ``warnings.jsonl``, a JSON object per line; an older file is replaced at the end."""
    with replacing(path) as file:
        for row in rows.to_dict("records"):
            exact = {name: row[name] for name in ("probability", "evidence", "prior", "shift_p") if name in row}
            rounded = {name: None if value is None else round(value, 6) for name, value in exact.items()}
            candidates = [[name, round(probability, 6)] for name, probability in row["visual_evidence"]]
            line = (
                json.dumps({**row, **rounded, "visual_evidence": candidates}, ensure_ascii=False, allow_nan=False)
                + "\n"
            )
            file.write(line.encode("utf-8", "backslashreplace"))
