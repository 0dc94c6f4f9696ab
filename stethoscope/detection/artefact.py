"""A detector on disk: a folder with the fitted objects in skops format (no pickle) and a manifest in JSON."""

from __future__ import annotations

import hashlib
import json
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

import skops.io

from stethoscope.core.files import replace_folder
from stethoscope.errors import ArtefactError

SCHEMA_VERSION = 2
OBJECTS, MANIFEST = "detector.skops", "manifest.json"
ADDED = ("schema_version", "created", "versions", "sha256")  # what ``write`` adds to a manifest
LARGEST = 64 * 2**20  # bytes that the objects may unpack to; a detector has a few hundred kilobytes

TRUSTED = frozenset(
    {
        "builtins.dict",
        "builtins.list",
        "builtins.str",
        "builtins.tuple",
        "numpy.dtype",
        "numpy.float64",
        "numpy.int64",
        "numpy.ndarray",
        "numpy.random._generator.Generator",
        "numpy.uint64",
        "sklearn._loss._loss.CyHalfBinomialLoss",
        "sklearn._loss.link.Interval",
        "sklearn._loss.link.LogitLink",
        "sklearn._loss.loss.HalfBinomialLoss",
        "sklearn.ensemble._hist_gradient_boosting.binning._BinMapper",
        "sklearn.ensemble._hist_gradient_boosting.gradient_boosting.HistGradientBoostingClassifier",
        "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor",
        "sklearn.impute._base.MissingIndicator",
        "sklearn.impute._base.SimpleImputer",
        "sklearn.isotonic.IsotonicRegression",
        "sklearn.linear_model._logistic.LogisticRegression",
        "sklearn.pipeline.Pipeline",
        "sklearn.preprocessing._data.StandardScaler",
        "sklearn.preprocessing._label.LabelBinarizer",
        "sklearn.preprocessing._label.LabelEncoder",
        "stethoscope.detection.estimators.Clip",
        "stethoscope.detection.estimators.Network",
        "stethoscope.detection.factor.ExternalInputs",
        "stethoscope.detection.factor.Factored",
        "stethoscope.detection.sight.Sight",
        "stethoscope.detection.sight.Sighted",
    }
)
"""Every type that may be made from a file. skops itself trusts some hundred more."""

LIBRARIES = ("lvlm-stethoscope", "scikit-learn", "numpy", "pandas", "skops")


def versions() -> dict[str, str]:
    """Versions of the libraries that a detector depends on."""
    return {name: version(name) for name in LIBRARIES}


def _types(node: Any) -> Iterator[str]:
    """Full names of the types that a skops schema would make."""
    if isinstance(node, dict):
        if "__class__" in node:
            yield f"{node.get('__module__')}.{node['__class__']}"
        for value in node.values():
            yield from _types(value)
    elif isinstance(node, list):
        for value in node:
            yield from _types(value)


def dump_objects(objects: Mapping[str, Any]) -> bytes:
    """Fitted objects as the bytes of a skops file."""
    return skops.io.dumps(dict(objects))


def load_objects(data: bytes, name: str = OBJECTS) -> dict[str, Any]:
    """Undoes ``dump_objects``.

    Raises:
        ArtefactError: the bytes are not a skops file, unpack to too much, or hold a type outside ``TRUSTED``.
    """
    try:
        with zipfile.ZipFile(BytesIO(data)) as archive:
            size = sum(member.file_size for member in archive.infolist())
            if size > LARGEST:
                raise ArtefactError(f"{name} unpacks to {size} bytes; a detector has less than {LARGEST}")
            schema = json.loads(archive.read("schema.json"))
        foreign = sorted(set(_types(schema)) - TRUSTED)
        if foreign:
            raise ArtefactError(f"{name} holds types that a detector has no use for, not loaded: {', '.join(foreign)}")
        return skops.io.loads(data, trusted=sorted(TRUSTED))
    except ArtefactError:
        raise
    except Exception as error:  # whatever skops meets in a damaged file: it is the file's fault, never ours
        told = " ".join(str(error).split())[:120]  # zip files' errors quote what they have found
        raise ArtefactError(f"{name} cannot be read: {type(error).__name__}: {told}") from error


def write(
    folder: Path, objects: Mapping[str, Any], manifest: Mapping[str, Any], texts: Mapping[str, str] | None = None
) -> None:
    """Writes the folder beside its place and then moves it there, so that it is never seen half written.

    Args:
        folder: where to; a detector that is there already is replaced.
        objects: fitted objects by name.
        manifest: JSON-able facts, to which ``ADDED`` is added.
        texts: more files for people, by name.

    Raises:
        ArtefactError: there is something else in the place, or it cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / MANIFEST).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArtefactError(f"{folder} is there and is not a detector; it should be a new or empty folder")
    data = dump_objects(objects)
    plain = {
        **manifest,
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "sha256": {OBJECTS: hashlib.sha256(data).hexdigest()},
    }
    text = json.dumps(plain, indent=2, allow_nan=False)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
            made = Path(temporary) / "new"
            made.mkdir()
            (made / OBJECTS).write_bytes(data)
            (made / MANIFEST).write_text(text + "\n", encoding="utf-8")
            for name, content in (texts or {}).items():
                (made / name).write_text(content, encoding="utf-8")
            replace_folder(folder, made)
    except OSError as error:
        raise ArtefactError(f"the detector cannot be written to {folder}: {error}") from None


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads what ``write`` wrote: objects and manifest.

    Raises:
        ArtefactError: a file is missing, damaged, changed since it was written or of another schema version.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        data = (folder / OBJECTS).read_bytes()
    except FileNotFoundError as error:
        why = f"{Path(error.filename).name} is missing" if folder.is_dir() else "there is no such folder"
        raise ArtefactError(f"no detector in {folder}: {why}") from None
    except (OSError, ValueError) as error:
        raise ArtefactError(f"the detector in {folder} cannot be read: {error}") from None
    found = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if found != SCHEMA_VERSION:
        raise ArtefactError(f"{folder / MANIFEST} has schema version {found!r}; this version reads {SCHEMA_VERSION}")
    digests = manifest.get("sha256")
    if not isinstance(digests, dict) or digests.get(OBJECTS) != hashlib.sha256(data).hexdigest():
        raise ArtefactError(f"{folder / OBJECTS} was changed since it was written (its SHA-256 does not match)")
    return load_objects(data, str(folder / OBJECTS)), manifest
