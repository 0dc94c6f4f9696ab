"""Read and write a detector's folder: its arrays of numbers (safetensors, no code) and a manifest in JSON."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from stethoscope.core.errors import ArtefactError, first_line
from stethoscope.core.files import read_bytes, read_json, replace_folder

LARGEST_NUMBER = 1e50
"""Largest absolute value in a file; scales are at least its inverse, so that products stay finite."""


class Arrays:
    """The arrays of a detector's file by name, each checked when it is read.

    Args:
        values: arrays by name.
        prefix: prefix of the names in this view.
        requested: full names read so far, shared by all views of a file.
    """

    def __init__(self, values: Mapping[str, np.ndarray], prefix: str = "", requested: set[str] | None = None) -> None:
        self._values, self._prefix = values, prefix
        self._requested: set[str] = set() if requested is None else requested

    def under(self, name: str) -> Arrays:
        """Return a view of the arrays whose names begin with ``name.``."""
        return Arrays(self._values, f"{self._prefix}{name}.", self._requested)

    def __contains__(self, name: str) -> bool:
        return self._prefix + name in self._values

    def everything(self) -> dict[str, np.ndarray]:
        """Return all arrays of this view by name, of any shape and type; floats are checked to be finite.

        Raises:
            ArtefactError: a number is not finite.
        """
        own = {
            name[len(self._prefix) :]: array for name, array in self._values.items() if name.startswith(self._prefix)
        }
        self._requested.update(self._prefix + name for name in own)
        for name, array in own.items():
            self.require(
                array.dtype.kind in "iub" or np.isfinite(array).all(), name, "holds numbers that are not finite"
            )
        return own

    def _get(self, name: str, dtype: type, shape: tuple[int | None, ...]) -> np.ndarray:
        name = self._prefix + name
        self._requested.add(name)
        if name not in self._values:
            raise ArtefactError(f"array {name!r} is missing")
        array = self._values[name]
        if array.dtype != dtype:
            raise ArtefactError(f"array {name!r} is of type {array.dtype}; it should be {np.dtype(dtype)}")
        if array.ndim != len(shape) or any(n not in (None, size) for n, size in zip(shape, array.shape, strict=True)):
            expected = " x ".join("any" if n is None else str(n) for n in shape) or "a single number"
            actual = " x ".join(map(str, array.shape)) or "a single number"
            raise ArtefactError(f"array {name!r} is {actual}; by the manifest it should be {expected}")
        return array

    def require(self, condition: Any, name: str, rule: str) -> None:
        """Check a condition that an array must fulfil.

        Raises:
            ArtefactError: the condition is false; the message is the array's name and ``rule``.
        """
        if not condition:
            raise ArtefactError(f"array {self._prefix + name!r} {rule}")

    def numbers(
        self, name: str, *shape: int | None, largest: float = LARGEST_NUMBER, dtype: type = np.float64
    ) -> np.ndarray:
        """Return as float64 an array of the given shape, where None stands for any length.

        Raises:
            ArtefactError: it is missing, has another shape or type than ``dtype``, or a number is not finite or above
                ``largest``.
        """
        array = self._get(name, dtype, shape).astype(np.float64, copy=False)
        self.require(np.isfinite(array).all(), name, "holds numbers that are not finite")
        self.require((np.abs(array) <= largest).all(), name, f"holds numbers above {largest:g}")
        return array

    def weights(self, name: str, *shape: int | None) -> np.ndarray:
        """Return as float64 the float32 weights of a network, otherwise as ``numbers`` does."""
        return self.numbers(name, *shape, dtype=np.float32)

    def positive(self, name: str, *shape: int | None) -> np.ndarray:
        """Return an array as ``numbers`` does, with all values at least 1 / ``LARGEST_NUMBER``, to divide by."""
        array = self.numbers(name, *shape)
        self.require((array >= 1 / LARGEST_NUMBER).all(), name, "should be above 0 everywhere")
        return array

    def counts(self, name: str, *shape: int | None, below: int) -> np.ndarray:
        """Return an int64 array of the given shape (None: any length) with values in [0, ``below``).

        Raises:
            ArtefactError: it is missing, has another shape or type, or a number is outside.
        """
        array = self._get(name, np.int64, shape)
        self.require(((array >= 0) & (array < below)).all(), name, f"should lie from 0 to {below - 1}")
        return array

    def indices(self, name: str, length: int | None, below: int) -> np.ndarray:
        """Return a strictly increasing one-dimensional array as ``counts`` does."""
        array = self.counts(name, length, below=below)
        self.require((np.diff(array) > 0).all(), name, "should increase from each to the next")
        return array

    def bits(self, name: str, dtype: type, *shape: int | None) -> np.ndarray:
        """Return a bool or uint8 array of the given shape, where None stands for any length."""
        return self._get(name, dtype, shape)

    def finish(self) -> None:
        """Check that every array of the file was read.

        Raises:
            ArtefactError: the file has arrays that were not read.
        """
        foreign = sorted(set(self._values) - self._requested)
        if foreign:
            raise ArtefactError(f"array {foreign[0][:80]!r} belongs to no part of such a detector")


SCHEMA_VERSION = 3
OBJECTS, MANIFEST = "detector.safetensors", "manifest.json"
COLUMNS = ("features", "table_features", "objects")  # keys of a manifest that the arrays' header repeats
GENERATED_KEYS = ("schema_version", "created", "versions", "sha256")  # added to a manifest by ``write``
MAX_BYTES = 256 * 2**20  # size of the arrays' file; the probe of hidden states of a 13B model has 63 MB

LIBRARIES = ("lvlm-stethoscope", "scikit-learn", "numpy", "pandas")


def versions() -> dict[str, str]:
    """Return the versions of the libraries that a detector depends on."""
    return {name: version(name) for name in LIBRARIES}


def dump_arrays(arrays: Mapping[str, np.ndarray], columns: Mapping[str, Any]) -> bytes:
    """Serialise arrays to the bytes of a safetensors file whose header holds the columns they belong to."""
    contiguous = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in arrays.items()}
    return save(contiguous, metadata={"columns": json.dumps(columns)})


def load_arrays(data: bytes) -> tuple[Arrays, Any]:
    """Read the bytes that ``dump_arrays`` wrote; the contents of the arrays are not checked yet.

    Raises:
        ArtefactError: the bytes are not a safetensors file of ours.
    """
    try:
        values = load(data)  # checks the header: sizes, types, and that all of it lies inside
        length = int.from_bytes(data[:8], "little")
        return Arrays(values), json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["columns"])
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ArtefactError(f"not a file of arrays: {type(error).__name__}: {reason}") from None


def write(
    folder: Path,
    arrays: Mapping[str, np.ndarray],
    manifest: Mapping[str, Any],
    texts: Mapping[str, str],
    check: Callable[[Path], object],
) -> None:
    """Write the folder under a temporary name and move it into place, so that it is never seen half written.

    Args:
        folder: destination; an existing detector is replaced.
        arrays: learned arrays by name.
        manifest: JSON-able facts; ``GENERATED_KEYS`` are added.
        texts: contents of further text files, by file name.
        check: reads the new folder before it is moved; if it raises, the older detector stays.

    Raises:
        ArtefactError: the folder holds something else, or cannot be written, or the manifest is not JSON-able.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / MANIFEST).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArtefactError(f"{folder} exists and is not a detector; it should be a new or empty folder")
    data = dump_arrays(arrays, {key: manifest[key] for key in COLUMNS})
    plain = {
        **manifest,
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "sha256": {OBJECTS: hashlib.sha256(data).hexdigest()},
    }
    try:
        text = json.dumps(plain, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:  # notes of the user may hold anything
        raise ArtefactError(f"the detector's manifest cannot be written as JSON: {error}") from None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp") as temporary:
            new = Path(temporary) / "new"
            new.mkdir()
            (new / OBJECTS).write_bytes(data)
            (new / MANIFEST).write_text(text + "\n", encoding="utf-8")
            for name, content in texts.items():
                (new / name).write_text(content, encoding="utf-8")
            check(new)
            replace_folder(folder, new)
    except OSError as error:
        raise ArtefactError(f"the detector cannot be written to {folder}: {error}") from None


def read(folder: Path) -> tuple[Arrays, dict[str, Any]]:
    """Read the arrays, whose contents are not checked yet, and the manifest that ``write`` wrote.

    Raises:
        ArtefactError: a file is missing, damaged, changed since it was written or of another schema version.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ArtefactError(f"no detector in {folder}: there is no such folder")
    manifest, data = read_manifest(folder), read_bytes(folder / OBJECTS, largest=MAX_BYTES)
    schema_version = manifest.get("schema_version")
    if schema_version != SCHEMA_VERSION:
        raise ArtefactError(
            f"{folder / MANIFEST} has schema version {schema_version!r}; this version reads {SCHEMA_VERSION}"
        )
    digests = manifest.get("sha256")
    if not isinstance(digests, dict) or digests.get(OBJECTS) != hashlib.sha256(data).hexdigest():
        raise ArtefactError(f"{folder / OBJECTS} was changed since it was written (its SHA-256 does not match)")
    try:
        arrays, columns = load_arrays(data)
    except ArtefactError as error:
        raise ArtefactError(f"{folder / OBJECTS} cannot be read: {error}") from None
    if columns != {key: manifest.get(key) for key in COLUMNS}:
        raise ArtefactError(f"{folder}: {MANIFEST} and {OBJECTS} do not belong together")
    return arrays, manifest


def read_manifest(folder: Path, remedy: str = "") -> dict[str, Any]:
    """Read the manifest of a detector; its entries are not checked.

    Args:
        folder: of the detector.
        remedy: advice to the user, at the end of error messages.

    Raises:
        ArtefactError: it is missing or damaged.
    """
    if not (folder / MANIFEST).exists():
        raise ArtefactError(f"{folder} holds no detector: it has no {MANIFEST}")
    return read_json(folder / MANIFEST, remedy)


# --- the Hugging Face hub ---------------------------------------------------------------------------------------------

CARD = "README.md"
PATHS = ("/", ".", "~")  # how paths begin, and no name of a repository
CARD_METRICS = {
    "auroc": "AUROC",
    "auroc_controlled": "AUROC, position-controlled",
    "auprc_hallucinated": "AUPRC, hallucinated",
    "base_rate": "share hallucinated",
    "ece": "ECE",
    "brier": "Brier",
}


def model_card(manifest: Mapping[str, Any]) -> str:
    """Write the model card of a detector: Markdown with the hub's YAML header.

    Args:
        manifest: ``Detector.manifest``.
    """
    settings, threshold = manifest["settings"], manifest["threshold"]
    model = (manifest.get("model") or {}).get("model_id", "not known")
    task, _ = _task_of(manifest)
    estimator = settings["estimator"]
    name = estimator["_target_"] if isinstance(estimator, Mapping) else estimator
    kind = f"{name}{', evidence x prior' if settings['factored'] else ''}, {settings['calibration']}"
    lines = [
        "---",
        card_header(manifest),
        "---",
        "",
        "# Hallucination detector",
        "",
        "Gives every object that a vision-language model names the probability that it is not in the picture.",
        "",
        "```python",
        "from stethoscope import Detector",
        "",
        'detector = Detector.from_pretrained("owner/name")  # or a local folder',
        "```",
        "",
        f"- listens to: {model}",
        f"- learned from: {task}",
        f"- label: {manifest.get('label') or 'not known'}",
        f"- classifier: {kind}; {len(manifest['features'])} features, schema {manifest['feature_schema_hash']}",
        f"- warns from a probability of {threshold['value']:.3f}: {threshold['chosen']}",
    ]
    if threshold["certificate"]:
        lines.append(f"- the guarantee rests on {threshold['certificate']['images']} calibration images")
    if manifest.get("figures"):
        lines += ["", "| on test images | value | 95 % interval |", "|---|---|---|"]
        for name, title in CARD_METRICS.items():
            figure = manifest["figures"].get(name)
            if figure and figure["value"] is not None:
                bounds = "–" if figure["low"] is None else f"{figure['low']:.3f} to {figure['high']:.3f}"
                lines.append(f"| {title} | {figure['value']:.3f} | {bounds} |")
    return "\n".join(lines) + "\n"


def _task_of(manifest: Mapping[str, Any]) -> tuple[str, str]:
    """Return name and source of the task that a detector learned from, as far as the manifest tells."""
    task = manifest.get("task")
    facts = task if isinstance(task, Mapping) else {}
    settings = facts.get("settings")
    source = settings.get("source") if isinstance(settings, Mapping) else None
    return str(facts.get("name") or "not known"), str(source or "")


HUB_METRICS = {
    "auroc": ("roc_auc", "AUROC"),
    "auprc_hallucinated": ("average_precision", "AP, hallucinated"),
    "ece": ("expected_calibration_error", "ECE"),
}
"""Figures of the card's ``model-index``: the hub's type of a metric, and its name."""


def card_header(manifest: Mapping[str, Any]) -> str:
    """Write the hub's YAML header of a card: library, base model, and ``model-index`` with the figures on test images.

    Args:
        manifest: ``Detector.manifest``.
    """
    from huggingface_hub import EvalResult, ModelCardData

    model, (name, source) = str((manifest.get("model") or {}).get("model_id") or ""), _task_of(manifest)
    figures = manifest.get("figures") or {}
    results = [
        EvalResult(
            task_type="image-text-to-text",
            task_name="hallucination detection",
            dataset_type=name,
            dataset_name=f"{name} ({source})" if source else name,
            metric_type=kind,
            metric_name=title,
            metric_value=round(figures[key]["value"], 6),
            metric_args={end: figures[key].get(end) for end in ("low", "high", "items", "groups")},
        )
        for key, (kind, title) in HUB_METRICS.items()
        if figures.get(key) and figures[key]["value"] is not None
    ]
    data = ModelCardData(
        library_name="lvlm-stethoscope",
        base_model=model if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", model) else None,
        tags=["hallucination-detection", "vision-language", "calibration"],
        model_name="hallucination-detector" if results else None,
        eval_results=results or None,
    )
    return data.to_yaml(original_order=["library_name", "base_model", "tags", "model-index"])


@contextmanager
def _translate_hub_errors(message: str) -> Iterator[None]:
    """Raise every error of the hub client as an ``ArtefactError`` of one line."""
    try:
        yield
    except Exception as error:  # the client lets errors of its HTTP library through, which changes with its versions
        raise ArtefactError(f"{message}: {type(error).__name__}: {first_line(error)}") from None


def push(
    folder: Path, repo_id: str, private: bool | None, token: str | None, revision: str | None, message: str
) -> str:
    """Upload a detector's folder and return the URL of the commit.

    Raises:
        ArtefactError: ``repo_id`` is a path, or the hub refuses or cannot be reached.
    """
    if repo_id.startswith(PATHS):
        raise ArtefactError(f"{repo_id} is a path, not a repository (owner/name); `save` writes a detector to a path")
    from huggingface_hub import HfApi

    with _translate_hub_errors(f"the detector cannot be pushed to {repo_id!r}"):
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message, revision=revision)
    return commit.commit_url


def fetch(repo_id: str, revision: str | None, token: str | None) -> Path:
    """Download a detector's files and return their folder in the hub cache.

    Raises:
        ArtefactError: there is no such repository or revision, or it is a path, or the hub cannot be reached.
    """
    if repo_id.startswith(PATHS):
        raise ArtefactError(f"there is no folder {repo_id}")
    from huggingface_hub import snapshot_download

    with _translate_hub_errors(f"no detector at {repo_id!r}, which is no folder; on the hub"):
        files = [OBJECTS, MANIFEST, CARD]
        return Path(snapshot_download(repo_id, revision=revision, token=token, allow_patterns=files))
