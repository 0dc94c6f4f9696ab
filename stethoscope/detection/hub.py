"""Detectors on the Hugging Face hub: a folder with a model card, pushed and fetched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stethoscope.core.errors import ArtefactError, first_line
from stethoscope.detection.artefact import MANIFEST, OBJECTS

CARD = "README.md"
SHOWN = {
    "auroc": "AUROC",
    "auroc_controlled": "AUROC, position-controlled",
    "auprc_hallucinated": "AUPRC, hallucinated",
    "base_rate": "share hallucinated",
    "ece": "ECE",
    "brier": "Brier",
}


def card(manifest: Mapping[str, Any]) -> str:
    """The model card of a detector, Markdown with the hub's YAML header.

    Args:
        manifest: ``Detector.manifest``.
    """
    settings, threshold = manifest["settings"], manifest["threshold"]
    model = (manifest.get("model") or {}).get("model_id", "not known")
    task = (
        (manifest.get("task") or {}).get("name", "not known")
        if isinstance(manifest.get("task"), Mapping)
        else "not known"
    )
    kind = f"{settings['estimator']}{', evidence x prior' if settings['factored'] else ''}, {settings['calibration']}"
    lines = [
        "---",
        "library_name: lvlm-stethoscope",
        "tags: [hallucination-detection, vision-language, calibration]",
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
        f"- classifier: {kind}; {len(manifest['features'])} features, schema {manifest['feature_schema_hash']}",
        f"- warns from a probability of {threshold['value']:.3f}: {threshold['chosen']}",
    ]
    if threshold["certificate"]:
        lines.append(f"- the promise rests on {threshold['certificate']['images']} calibration images")
    if manifest.get("figures"):
        lines += ["", "| on test images | value | 95 % interval |", "|---|---|---|", *_figures(manifest["figures"])]
    return "\n".join(lines) + "\n"


def _name(note: Any, key: str) -> str:
    """A note of the manifest by its name; notes are whatever the caller of ``save`` wrote."""
    found = note.get(key, note.get("name")) if isinstance(note, Mapping) else note
    return "not known" if found is None else str(found)


def _figures(figures: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for name, title in SHOWN.items():
        found = figures.get(name)
        if found and found["value"] is not None:
            yield f"| {title} | {found['value']:.3f} | {found['low']:.3f} to {found['high']:.3f} |"


@contextmanager
def _spoken(what: str) -> Iterator[None]:
    """Whatever keeps the hub from answering, in one line of ours."""
    try:
        yield
    except Exception as error:  # the client lets errors of its HTTP library through, which changes with its versions
        raise ArtefactError(f"{what}: {type(error).__name__}: {first_line(error)}") from None


def push(
    folder: Path, repo_id: str, private: bool | None, token: str | None, revision: str | None, message: str
) -> str:
    """Uploads a detector's folder and returns the address of the commit.

    Raises:
        ArtefactError: the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    with _spoken(f"the detector cannot be pushed to {repo_id!r}"):
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        done = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message, revision=revision)
    return done.commit_url


def fetch(repo_id: str, revision: str | None, token: str | None) -> Path:
    """The folder of the hub cache where a detector's files are, after fetching them.

    Raises:
        ArtefactError: there is no such repository or revision, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    with _spoken(f"no detector at {repo_id!r}, which is no folder; on the hub"):
        files = [OBJECTS, MANIFEST, CARD]
        return Path(snapshot_download(repo_id, revision=revision, token=token, allow_patterns=files))
