"""What changes the answers of a run, so that a run is resumed only by the same model on the same questions."""

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

from stethoscope.core.digests import code_of, jsonable
from stethoscope.core.text import redact

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


_SAMPLING_ONLY = ("temperature", "top_p", "seed")


def settings(component: Any) -> dict[str, Any]:
    """The constructor arguments that a component kept as attributes of the same name."""
    names = inspect.signature(type(component).__init__).parameters
    return {name: jsonable(getattr(component, name)) for name in names if hasattr(component, name)}


def answers_of(adapter: Adapter, task: Task, generation: Generation) -> dict[str, Any]:
    """What identifies the answers of one model to one task; the adapter must be set up.

    The adapter's own word (weights, processor, dtype, rendered prompt, ...), the source code of adapter and task, the
    task's settings, how answers are to be generated, and the settings that the model applies for that. The pictures
    are not here: every record has the digest of its own.

    Batch size, loggers, callbacks, the number of samples and the number of processes do not belong here: they leave an
    answer as it is. Neither do the settings of sampling while nothing is sampled.
    """
    decoding = jsonable(generation)
    if not generation.do_sample:
        decoding = {key: value for key, value in decoding.items() if key not in _SAMPLING_ONLY}
    applied = adapter.generation_settings(generation)
    identity = {
        "adapter": {**jsonable(adapter.fingerprint()), "code": code_of(type(adapter))},
        "task": {
            "class": f"{type(task).__module__}.{type(task).__qualname__}",
            "name": task.name,
            "version": task.version,
            "settings": settings(task),
            "code": code_of(type(task)),
        },
        "generation": {**decoding, **({"applied": jsonable(applied)} if applied else {})},
    }
    return redact(identity, environment=False)


def locations_of(task: Task, fingerprint: Mapping[str, Any]) -> list[str]:
    """List the dotted keys of a fingerprint that tell where model and data lie.

    A model is known by the digest of its weights, if it has one, and data by the samples that records hold.
    """
    model = _MODEL_LOCATIONS if fingerprint["adapter"].get("weights") else ()
    return [*(f"adapter.{name}" for name in model), *(f"task.settings.{name}" for name in task.locations)]


def features_of(features: Any, trace: str) -> dict[str, Any]:
    """What identifies the token rows that a feature set leaves: its columns, their settings, which answers it sees."""
    return {**settings(features), "names": jsonable(features.names), "trace": trace}


def digest(fingerprint: Mapping[str, Any]) -> str:
    """SHA-256 of a fingerprint, the same for any order of its keys.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    True
    """
    text = json.dumps(jsonable(fingerprint), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def differences(old: Any, new: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Dotted keys on which two fingerprints differ, each with the old and the new value (None where it is missing).

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
    """Differences as one line of text.

    >>> describe([("task.version", "1", "2"), ("seed", None, 0)])
    "task.version: '1' before, '2' now; seed: None before, 0 now"
    """
    shown = [f"{key}: {_short(old, new)} before, {_short(new, old)} now" for key, old, new in changes[:limit]]
    more = [f"and {len(changes) - limit} more"] if len(changes) > limit else []
    return "; ".join(shown + more)


def _short(value: Any, other: Any) -> str:
    """Write a value in 60 characters; of a long text the part in which it begins to differ from another."""
    if isinstance(value, str) and isinstance(other, str) and len(value) > 50:
        start = max(len(os.path.commonprefix([value, other])) - 15, 0)  # noqa: RUF071 - of texts, not paths
        return ("..." if start else "") + repr(value[start : start + 45]) + ("..." if start + 45 < len(value) else "")
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def environment() -> dict[str, Any]:
    """Versions and kind of machine; no host name, user name or path."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cpus": os.cpu_count(),
        "packages": {name: _version(name) for name in PACKAGES},
    }
    torch = sys.modules.get("torch")  # whoever ran a model has imported it; do not pay for it otherwise
    if torch is not None:
        found["threads"] = torch.get_num_threads()
        found["cuda"] = torch.version.cuda
        available = torch.cuda.is_available()
        found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if available else []
    return found


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
