"""Append answers to a file of our own JSON lines as they come, and continue such a file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stethoscope.core.errors import ArtefactError, ConfigError
from stethoscope.core.files import append, jsonable, read_json, replacing, write_json, writing_out
from stethoscope.core.types import Sample
from stethoscope.storage.records import encode_line
from stethoscope.storage.run_fingerprint import describe, differences

if TYPE_CHECKING:
    from filelock import BaseFileLock


class Remaining(NamedTuple):
    """What a file of answers lacks.

    Attributes:
        samples: without an answer, in the order of the task; failed ones are among them.
        changed: number of those whose question or image has changed since they were asked.
    """

    samples: list[Sample]
    changed: int


class AnswerFile:
    """A file of answers, one JSON line each, that one process at a time writes to.

    What the answers depend on lies beside it, in ``<name>.settings.json``; a file with other settings is not continued.
    """

    def __init__(self, path: Path) -> None:
        """Name the file; nothing is read or created."""
        self.path = path
        self.settings_file = path.with_name(f"{path.name}.settings.json")
        self._lock: BaseFileLock | None = None

    def __enter__(self) -> AnswerFile:
        """Lock the file; its folder is created.

        Raises:
            ConfigError: another process writes to it, there is a folder of this name, or it cannot be written to.
        """
        from filelock import FileLock, Timeout

        if self.path.is_dir():
            raise ConfigError(f"out={self.path} is a folder; it should name the file of the answers")
        lock = FileLock(self.path.with_name(f".{self.path.name}.lock").resolve())
        with writing_out(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(blocking=False)
            except Timeout:
                raise ConfigError(
                    f"another process writes answers to {self.path}; wait until it has ended, or choose another out="
                ) from None
        self._lock = lock
        return self

    def __exit__(self, *error: object) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def resume(self, settings: Mapping[str, Any], samples: Sequence[Sample], overwrite: bool = False) -> Remaining:
        """Clean what an earlier session has left, and return what is still to be asked.

        Lines of failed and of changed samples are taken out, and so is a last line that a killed process left half
        written. Answers to samples that are not among ``samples`` stay.

        Args:
            settings: of which answers depend: model, revision, generation, task.
            samples: that are to be answered.
            overwrite: throw away what the file holds.

        Raises:
            ConfigError: the file holds answers with other settings, or is no file of this command's.
            ArtefactError: a line before the last is damaged.
        """
        if overwrite:
            self.path.unlink(missing_ok=True)
            self.settings_file.unlink(missing_ok=True)
        content = self.path.read_bytes() if self.path.exists() else b""
        if content:
            self._check_settings(settings)
        else:
            write_json(self.settings_file, jsonable(settings))
        asked = {sample.id: sample for sample in samples}
        kept, changed = dict[str, bytes](), 0
        for line, values in self._lines(content):
            sample = asked.get(values["id"])
            if values.get("error"):
                continue
            if sample is not None and _has_changed(values, sample):
                changed += 1
                continue
            kept[values["id"]] = line
        if b"".join(kept.values()) != content or not self.path.exists():
            with replacing(self.path) as file:
                file.writelines(kept.values())
        return Remaining([sample for sample in samples if sample.id not in kept], changed)

    def append(self, line: Mapping[str, Any]) -> None:
        """Append one line: an answer, or why there is none (``error``)."""
        append(self.path, encode_line(line))

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        remedy = f"choose another out=, or overwrite=true to throw away what {self.path} holds"
        saved = read_json(self.settings_file, remedy, default=None)
        if saved is None:
            raise ConfigError(
                f"{self.path} has no {self.settings_file.name} beside it, as `answer` writes it; {remedy}"
            )
        changes = differences(saved, jsonable(settings))
        if changes:
            raise ConfigError(f"{self.path} holds answers with other settings ({describe(changes)}); {remedy}")

    def _lines(self, content: bytes) -> list[tuple[bytes, dict[str, Any]]]:
        """Read the lines with their values; a broken last one is left out."""
        rows: list[tuple[bytes, dict[str, Any]]] = []
        lines = content.splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            try:
                values = json.loads(line)
                whole = line.endswith(b"\n") and isinstance(values, dict) and isinstance(values.get("id"), str)
            except (ValueError, RecursionError):
                whole = False
            if whole:
                rows.append((line, values))
            elif number < len(lines):
                raise ArtefactError(f"{self.path}:{number} is damaged; remove the line and run the same command again")
        return rows


def _has_changed(values: Mapping[str, Any], sample: Sample) -> bool:
    """Return whether a sample has another question or image than the one that was answered."""
    if (values.get("question"), values.get("image")) != (sample.question, sample.image.name):
        return True
    digest = values.get("image_sha256")
    return isinstance(digest, str) and sample.image.differs(digest)
