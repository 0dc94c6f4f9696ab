"""Fingerprint all that can change a run's answers, so that only equal settings resume it."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stethoscope.core.digests import source_digest
from stethoscope.core.files import jsonable
from stethoscope.core.redaction import redact

if TYPE_CHECKING:
    from stethoscope.adapters.base import Adapter
    from stethoscope.core.types import Generation
    from stethoscope.tasks.base import Task

PACKAGES = (
    "lvlm-stethoscope", "torch", "transformers", "tokenizers", "accelerate", "datasets", "numpy", "pandas", "pyarrow",
    "pillow", "scikit-learn", "safetensors", "hydra-core", "wandb",
)  # fmt: skip

_MODEL_LOCATIONS = (
    "model_id",
    "revision",
    "tower",
    *(f"sources.{part}" for part in ("llm", "vision", "qformer", "projector")),
)
SAMPLING_ONLY = ("temperature", "top_p", "seed")
"""Settings of generation that greedy decoding does not read."""


def constructor_settings(component: Any) -> dict[str, Any]:
    """Return the constructor arguments that a component stores as attributes of the same name."""
    names = inspect.signature(type(component).__init__).parameters
    return {name: jsonable(getattr(component, name)) for name in names if hasattr(component, name)}


def task_settings(task: Task) -> dict[str, Any]:
    """Return the settings of a task that has been set up; a file counts by what it holds, see ``Task.identity``."""
    return {**constructor_settings(task), **jsonable(task.identity())}


def answer_fingerprint(
    adapter: Adapter, task: Task, generation: Generation, answers: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Identify the answers of one model to one task.

    Included are the adapter's own fingerprint (weights, processor, dtype, rendered prompt, ...), the source code of
    adapter and task, the task's settings, the generation settings, and those that the model applies for them. Images
    are not included: every record has the digest of its own.

    Batch size, loggers, callbacks, and the numbers of samples and processes are left out, as they change no answer. So
    are the settings of sampling in greedy decoding, but for the seed where a mitigation samples.

    Args:
        adapter: that has been set up.
        task: that has been set up.
        generation: settings of decoding.
        answers: what identifies the log of given answers; None where the model writes them.
    """
    decoding = {key: value for key, value in jsonable(generation).items() if key != "mitigation"}
    method = generation.mitigation
    if method is not None:
        settings = {**jsonable(method), **method.identity(adapter)}
        decoding["mitigation"] = {"name": method.name, "settings": settings, "code": source_digest(type(method))}
    if not generation.do_sample:
        seed = {"seed": generation.seed} if method is not None and method.samples else {}
        decoding = {key: value for key, value in decoding.items() if key not in SAMPLING_ONLY} | seed
    applied = adapter.generation_settings(generation)
    identity = {
        "adapter": {**jsonable(adapter.fingerprint()), "code": source_digest(type(adapter))},
        "task": {
            "class": f"{type(task).__module__}.{type(task).__qualname__}",
            "name": task.name,
            "version": task.version,
            "settings": task_settings(task),
            "code": source_digest(type(task)),
        },
        "generation": {**decoding, **({"applied": jsonable(applied)} if applied else {})},
        **({} if answers is None else {"answers": jsonable(answers)}),
    }
    return redact(identity, environment=False)


def location_keys(task: Task, fingerprint: Mapping[str, Any]) -> list[str]:
    """List the dotted keys of a fingerprint that hold locations, which may change.

    Locations are those of model, data and answers.

    The model is then identified by the digest of its weights, if it has one, and the data by the recorded samples.
    """
    model = _MODEL_LOCATIONS if fingerprint["adapter"].get("weights") else ()
    data = (f"task.settings.{name}" for name in task.locations)
    return [*(f"adapter.{name}" for name in model), *data, "answers.file"]


def feature_fingerprint(features: Any, trace: str) -> dict[str, Any]:
    """Identify the token rows of a feature set: its columns, their settings, and which answers are traced."""
    return {**constructor_settings(features), "names": jsonable(features.names), "trace": trace}


def digest(fingerprint: Mapping[str, Any]) -> str:
    """Compute the SHA-256 of a fingerprint, the same for any order of its keys.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    True
    """
    text = json.dumps(jsonable(fingerprint), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def differences(old: Any, new: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """List the dotted keys on which two fingerprints differ, with old and new value (None where missing).

    >>> differences({"task": {"version": "1", "parser": "strict"}}, {"task": {"version": "2", "parser": "strict"}})
    [('task.version', '1', '2')]
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = [*old, *(key for key in new if key not in old)]
        return [
            difference
            for key in keys
            for difference in differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else str(key))
        ]
    return [] if old == new else [(prefix, old, new)]


def describe(changes: list[tuple[str, Any, Any]], limit: int = 6) -> str:
    """Describe differences in one line.

    >>> describe([("task.version", "1", "2"), ("seed", None, 0)])
    "task.version: '1' before, '2' now; seed: None before, 0 now"
    """
    shown = [f"{key}: {_short(old, new)} before, {_short(new, old)} now" for key, old, new in changes[:limit]]
    more = [f"and {len(changes) - limit} more"] if len(changes) > limit else []
    return "; ".join(shown + more)


def _short(value: Any, other: Any) -> str:
    """Format a value in 60 characters; of a long text the part from which on it differs from another."""
    if isinstance(value, str) and isinstance(other, str) and len(value) > 50:
        start = max(len(os.path.commonprefix([value, other])) - 15, 0)  # noqa: RUF071 - of texts, not paths
        return ("..." if start else "") + repr(value[start : start + 45]) + ("..." if start + 45 < len(value) else "")
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def environment() -> dict[str, Any]:
    """Collect versions and kind of machine; no host name, user name or path."""
    values: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cpus": os.cpu_count(),
        "packages": {name: _version(name) for name in PACKAGES},
    }
    torch = sys.modules.get("torch")  # imported if a model has run; not worth importing otherwise
    if torch is not None:
        values["threads"] = torch.get_num_threads()
        values["cuda"] = torch.version.cuda
        available = torch.cuda.is_available()
        values["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if available else []
    return values


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
