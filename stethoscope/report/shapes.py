"""What the files of a run must hold where reports read them, see ``stethoscope.core.files.check_shape``."""

from __future__ import annotations

from typing import Any

NUMBER = (int, float, type(None))
INTERVAL = {"value": NUMBER, "low": NUMBER, "high": NUMBER, "items": int, "groups": int}
TASK: dict[str, Any] = {
    "primary": str,
    "counts": {"*": int},
    "metrics": [{"metric": str, "subset": str, **INTERVAL}],
}
"""A task's section of ``metrics.json``."""

DETECTOR: dict[str, Any] = {
    "split": {"mentions": {"repeats": str, "subtokens": str}, "folds": {"*": {"*": int}}},
    "leaderboard": {
        "rows": [{"name": str, "kind": str, "metrics": {"*": INTERVAL}}],
        "differences": [{"detector": str, "other": str, "metric": str, "p": NUMBER, **INTERVAL}],
        "best_features": {"*": str},
        "controls": {"*": {"*": (int, float, type(None))}},
        "columns": {"*": str},
    },
    "reliability": [{"*": NUMBER}],
    "threshold": {"chosen": str},
}
"""The detector's section."""

FINGERPRINT: dict[str, Any] = {"adapter": dict, "task": dict}
"""A section of ``fingerprint.json``."""

SHOWN_TASK: dict[str, Any] = {"class": str, "version": str, "settings": dict}
"""What a report shows of its task."""

WARNING: dict[str, Any] = {
    **dict.fromkeys(("task", "sample_id", "group", "object", "fold"), str),
    **dict.fromkeys(("start", "end", "label"), int),
    "probability": (int, float),
    **dict.fromkeys(("evidence", "prior"), NUMBER),
    "looks": list,
    "warned": bool,
}
"""A line of ``warnings.jsonl``."""
