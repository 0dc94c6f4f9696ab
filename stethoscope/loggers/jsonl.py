"""Log to ``events.jsonl``, which every run directory has."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stethoscope.core.digests import jsonable
from stethoscope.core.files import unshare
from stethoscope.loggers.base import Logger


class JsonLogger(Logger):
    """Writes one JSON object per line: ``time`` (seconds since 1970), ``event`` and its fields."""

    def __init__(self, path: str | os.PathLike | None = None) -> None:
        """Write to ``path``; None for ``events.jsonl`` in the run directory."""
        self.path = None if path is None else Path(path)

    def setup(self, run_dir: Path | None) -> None:
        """Choose the path; nothing is written without a path and a run directory."""
        if self.path is None and run_dir is not None:
            self.path = Path(run_dir) / "events.jsonl"
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            unshare(self.path)

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Write a ``config`` event."""
        self._write("config", config=config)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write a ``metrics`` event."""
        self._write("metrics", step=step, metrics=metrics)

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Write a ``table`` event."""
        self._write("table", name=name, columns=columns, rows=rows)

    def finalize(self, status: str) -> None:
        """Write a ``status`` event."""
        self._write("status", status=status)

    def _write(self, event: str, **fields: Any) -> None:
        if self.path is None:
            return
        line = json.dumps({"time": round(time.time(), 3), "event": event, **jsonable(fields)}, ensure_ascii=False)
        with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(line + "\n")
