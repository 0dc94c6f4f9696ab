"""Reads an offline W&B run back with W&B's own record type, to see what ``wandb sync`` would send."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAGIC, HEADER, BLOCK = b":W&B", 7, 32768
FULL, LAST = 1, 4


@dataclass
class OfflineRun:
    """What an offline run holds: nested config, final summary, rows of history, tables, exit code.

    ``media`` are the files of pictures and pages in tables, by their path in a cell; ``artifacts`` W&B's own records of
    those that are no tables.
    """

    run_id: str = ""
    name: str = ""
    group: str = ""
    job_type: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    tables: dict[str, dict[str, Any]] = field(default_factory=dict)
    media: dict[str, Path] = field(default_factory=dict)
    artifacts: list[Any] = field(default_factory=list)
    exit_code: int | None = None


def records(path: Path) -> Iterator[Any]:
    """The records of a ``.wandb`` file, which is a LevelDB log: blocks of 32 KiB, records cut into chunks."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    if not data:  # the service has made the file and not flushed its first block yet
        return
    assert data[:4] == MAGIC, f"{path} is not a W&B run"
    position, pending = HEADER, b""
    while position + HEADER <= len(data):
        room = BLOCK - position % BLOCK
        if room < HEADER:  # too little for a chunk header: padding up to the next block
            position += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        start = position + HEADER
        pending += data[start : start + length]
        position = start + length
        if kind in (FULL, LAST):
            record = Record()
            record.ParseFromString(pending)
            pending = b""
            yield record


def _put(target: dict[str, Any], item: Any) -> None:
    keys = list(item.nested_key) or [item.key]
    for key in keys[:-1]:
        target = target.setdefault(key, {})
    target[keys[-1]] = json.loads(item.value_json)


def _put_table(run: OfflineRun, files: dict[str, Path]) -> None:
    for name, path in files.items():
        if name.endswith(".table.json"):
            run.tables[name.removesuffix(".table.json")] = json.loads(path.read_text())
        else:
            run.media[name] = path


def _finished(path: Path, seconds: float) -> list[Any]:
    """The records of a file, once the W&B service has flushed the last one: ``Run.finish`` does not wait for that."""
    end = time.monotonic() + seconds
    while True:
        lines = list(records(path))
        if any(record.WhichOneof("record_type") == "exit" for record in lines) or time.monotonic() > end:
            return lines
        time.sleep(0.02)


def read(folder: Path, seconds: float = 60.0) -> OfflineRun:
    """All offline runs below ``folder``, in order of time, as the one run that they add up to.

    Waits up to ``seconds`` for each to be ended.
    """
    run = OfflineRun()
    files = sorted(Path(folder).rglob("offline-run-*/run-*.wandb"))
    assert files, f"no offline W&B run below {folder}"
    for path in files:
        for record in _finished(path, seconds):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                run.run_id, run.name = record.run.run_id, record.run.display_name
                run.group, run.job_type = record.run.run_group, record.run.job_type
                run.tags = list(record.run.tags)
            if kind in ("run", "config"):
                for item in (record.run.config if kind == "run" else record.config).update:
                    _put(run.config, item)
            elif kind == "summary":
                for item in record.summary.update:
                    _put(run.summary, item)
            elif kind == "history":
                run.history.append({})
                for item in record.history.item:
                    _put(run.history[-1], item)
            elif kind == "artifact" and record.artifact.type == "run_table":
                _put_table(run, {entry.path: Path(entry.local_path) for entry in record.artifact.manifest.contents})
            elif kind == "artifact":
                run.artifacts.append(record.artifact)
            elif kind == "exit":
                run.exit_code = record.exit.exit_code
    return run
