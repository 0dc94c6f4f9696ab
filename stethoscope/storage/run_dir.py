"""The run directory: what commands leave for each other. Records are flushed as they come and survive a kill."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from stethoscope.core.digests import jsonable
from stethoscope.core.errors import ArtefactError, ConfigError, unknown
from stethoscope.core.files import (
    append,
    atomic_write,
    check_shape,
    damaged,
    read_json,
    remove_temporaries,
    replacing,
    unshare,
)
from stethoscope.core.text import redact, redact_word
from stethoscope.storage.records import Record, dump, lines
from stethoscope.storage.run_fingerprint import describe, differences, environment
from stethoscope.storage.tokens import Key, TokenFiles

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

MAPS = "maps.jsonl"
DETECTOR = "detector"  # section of metrics.json, and of status.json while detector, figures and warnings do not fit
SYNC_SECONDS = 1.0
"""A power cut takes what was answered within so many seconds before it, and the batch before. To wait for the disk
takes 8 ms here, up to 0.1 s on a network: as often as every batch that would be felt with a small model."""
Overwrite = bool | Literal["features"]


REMEDIES = {
    "metrics.json": "delete it and run the commands that made the run again: answers are kept",
    "status.json": "delete it and run the command that made the run again: answers are kept",
    "fingerprint.json": "bring it back, or delete the run and make it again",
}
"""What the user can do about a damaged file, by its name."""


class _Entry(NamedTuple):
    """Where the last line of a sample starts and what the store must know of it."""

    file: Path
    offset: int
    tokens: int
    part: str


class RunStore:
    """Reads and writes one run directory, which several tasks of the same model may share.

    Lines are only ever appended to ``samples.jsonl``; the last one of a sample counts. When a task is finished its
    lines are put into the order of its samples and the parts of the token table are merged. Where several processes
    write, each has a file of its own in ``shards/``, which is appended to ``samples.jsonl`` when none of them writes
    any more: when the task is finished, or else at the begin of the next sitting.
    """

    def __init__(self, run_dir: str | os.PathLike) -> None:
        """Names the directory; nothing is read or made."""
        self.run_dir = Path(run_dir)
        self.samples_file = self._own = self.run_dir / "samples.jsonl"
        self.shards = self.run_dir / "shards"
        self.token_files = TokenFiles(self.run_dir)
        self._entries: dict[Key, _Entry] = {}
        self._seen: tuple[int, ...] | None = None
        self._synced = 0.0

    @property
    def stop(self) -> Path:
        """A file whose presence tells the processes of a run that one of them has failed."""
        return self.shards / "stop"

    # --- reading ----------------------------------------------------------------------------------------------------

    def records(self, task: str | None = None) -> Iterator[Record]:
        """Records of one task or of all, in the order of the file.

        Raises:
            ArtefactError: there is no such run, it has no such task, or a line of it is damaged.
        """
        self._require(self.samples_file)
        tasks = sorted({name for name, _ in self._index()})
        if task is not None and task not in tasks and task not in self.fingerprints():
            raise ArtefactError(f"{self.run_dir}: {unknown('task', task, tasks)}")
        entries = [entry for (name, _), entry in self._index().items() if task in (None, name)]
        for line in _read(sorted(entries, key=self._place)):
            yield Record.from_dict(json.loads(line))

    def count(self, task: str) -> int:
        """How many samples of a task have a record."""
        return sum(name == task for name, _ in self._index())

    def sample_ids(self, task: str) -> list[str]:
        """Ids of the samples of a task that have a record."""
        return [sample_id for name, sample_id in self._index() if name == task]

    def find(self, task: str, sample_id: str) -> Record | None:
        """The record of one sample, if there is one."""
        entry = self._index().get((task, sample_id))
        return None if entry is None else Record.from_dict(json.loads(next(_read([entry]))))

    def tokens(self, task: str | None = None) -> pd.DataFrame:
        """The token table: key columns and features, a row per token, in the order of the records.

        Raises:
            ArtefactError: there is no such run.
        """
        self._require(self.samples_file)
        return self.token_files.frame([(key, part) for key, part in self._token_order() if task in (None, key[0])])

    def traced(self) -> list[str]:
        """Tasks that have token rows, in the order of the records; the rows themselves are not read.

        Raises:
            ArtefactError: there is no such run.
        """
        self._require(self.samples_file)
        return list(dict.fromkeys(task for (task, _), _ in self._token_order()))

    def metrics(self) -> dict[str, Any]:
        """``metrics.json``: a section per task, and ``detector``; empty before the first task is finished."""
        return self._read_json("metrics.json")

    def fingerprints(self) -> dict[str, Any]:
        """``fingerprint.json``: a section per task.

        Raises:
            ArtefactError: the file is damaged.
        """
        sections = self._read_json("fingerprint.json")
        for task, section in sections.items():
            parts = {key: dict for key in ("adapter", "task") if section.get(key) is not None}
            check_shape(self.run_dir / "fingerprint.json", section, parts, REMEDIES["fingerprint.json"], task)
        return sections

    def model(self, task: str) -> dict[str, Any]:
        """The fingerprint of the model that answered a task; empty where it is not known."""
        return self.fingerprints().get(task, {}).get("adapter") or {}

    def status(self) -> dict[str, str]:
        """``status.json``: by task ``running`` (or killed), ``finished``, ``interrupted`` or ``failed``."""
        return self._read_json("status.json")

    def has_tokens(self, record: Record) -> bool:
        """Whether the token rows that a record speaks of are there."""
        entry = self._index().get((record.task, record.sample_id))
        return entry is not None and entry.tokens > 0

    # --- writing ----------------------------------------------------------------------------------------------------

    def write_config(self, config: Any, overrides: Sequence[str] = ()) -> None:
        """Writes ``config.yaml`` and ``overrides.yaml``; ``config`` is a mapping or an OmegaConf node."""
        import yaml
        from omegaconf import OmegaConf

        plain = OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else dict(config)
        self._write("config.yaml", yaml.safe_dump(redact(jsonable(plain)), sort_keys=False, allow_unicode=True))
        self._write("overrides.yaml", yaml.safe_dump(list(map(redact_word, overrides)), allow_unicode=True))

    def write_metrics(self, section: str, values: Mapping[str, Any]) -> None:
        """Puts one section into ``metrics.json``: the name of a task, or ``detector``."""
        self._put("metrics.json", section, values)

    def set_status(self, task: str, status: str | None) -> None:
        """Notes how far a task, or ``DETECTOR``, has come; None for nothing to say."""
        self._put("status.json", task, status)

    def begin(
        self,
        task: str,
        fingerprint: Mapping[str, Any],
        features: Mapping[str, Any] | None = None,
        overwrite: Overwrite = False,
        moved: Collection[str] = (),
    ) -> None:
        """Makes the directory ready for a task: what is there and fits is kept, a half-written line is dropped.

        Args:
            task: name of the task.
            fingerprint: what identifies the answers.
            features: what identifies the token rows; None to leave those that are there alone.
            overwrite: True to throw away what is there of this task and of any other model, ``features`` to throw
                away only the token rows; answers and metrics then stay as they are.
            moved: dotted keys of the fingerprint that may differ: they tell where model and data lie.

        Raises:
            ConfigError: the directory holds answers or token rows that were made with other settings.
            ArtefactError: a line of ``samples.jsonl`` is damaged.
        """
        self.run_dir.mkdir(parents=True, exist_ok=True)
        for path in (self.samples_file, self.run_dir / MAPS):  # both are repaired and appended to
            unshare(path)
        fingerprint, features = jsonable(fingerprint), jsonable(features)
        old = self.fingerprints().get(task)
        if overwrite == "features":  # nothing is generated, so that answers stay those of the code that wrote them
            fingerprint = _with_code_of(old or {}, fingerprint)
        model = fingerprint.get("adapter")
        others = {name: found for name, found in self.fingerprints().items() if name != task}
        others = {name: found for name, found in others.items() if found.get("adapter") != model}
        if overwrite is True:
            self.clear(sorted({task, *others, *({name for name, _ in self._index()} - set(self.fingerprints()))}))
            old = None
        for name in others if overwrite is not True else ():
            self._refuse(name, differences(others[name].get("adapter"), model, "adapter"), moved)
        remove_temporaries(self.run_dir)
        self._repair()
        self._refuse_unknown()
        old_features = old.pop("features", None) if old else None
        if old is not None:
            self._refuse(task, differences(old, fingerprint), moved)
        if features is not None and old_features is not None and old_features != features:
            if overwrite != "features":
                self._refuse(task, differences(old_features, features, "features"))
            self._drop_tokens(task)
        self.samples_file.touch()
        kept = features if features is not None else old_features
        answers = old if overwrite == "features" and old is not None else fingerprint
        self._put("fingerprint.json", task, {**answers, **({"features": kept} if kept is not None else {})})
        self._write_json("environment.json", environment())
        if overwrite != "features":
            self._put("metrics.json", task, None)
        self.set_status(task, "running")

    def join(self, rank: int) -> None:
        """Makes this store one of several that write at the same time, each in its own process.

        Only between ``begin`` and ``finish``, which one process calls while the others wait.

        Args:
            rank: number of the process.
        """
        self.shards.mkdir(exist_ok=True)
        self._own = self.shards / f"samples-{rank}.jsonl"
        self.token_files.writer = f"r{rank}-"

    def append(self, records: Sequence[Record], tables: Mapping[str, pa.Table] | None = None) -> None:
        """Adds the records of a batch and, by sample id, their token rows; they outlive the process when it returns.

        Against a power cut they are put on disk when ``SYNC_SECONDS`` have gone by since the last time.
        """
        tables = {sample_id: table for sample_id, table in (tables or {}).items() if len(table)}
        part = self.token_files.write(list(tables.values())) if tables else ""  # rows first: a record vouches for them
        self._index()
        written, entries = [], {}
        offset = self._own.stat().st_size if self._own.exists() else 0
        for record in records:
            count = len(tables.get(record.sample_id, ()))
            entry = _Entry(self._own, offset, count, part if count else "")
            line = dump(replace(record, tokens=entry.tokens, part=entry.part).to_dict())
            entries[record.task, record.sample_id] = entry
            written.append(line)
            offset += len(line)
        durable = time.monotonic() - self._synced >= SYNC_SECONDS
        if durable and part:
            self.token_files.sync()
        append(self._own, b"".join(written), durable)
        if durable:
            self._synced = time.monotonic()
        self._entries.update(entries)
        self._seen = self._state()

    def finish(self, task: str, order: Sequence[str]) -> None:
        """Puts the task's records into the order of its samples and merges the token parts into ``tokens.parquet``."""
        if self.shards.is_dir():
            self._repair()
        rank = {sample_id: index for index, sample_id in enumerate(order)}
        tasks = list(dict.fromkeys([*(name for name in self.fingerprints() if name != task), task]))

        def place(item: tuple[Key, _Entry]) -> tuple[int, int, int]:
            (name, sample_id), entry = item
            return tasks.index(name), rank.get(sample_id, len(rank)) if name == task else 0, entry.offset

        self._rewrite(dict(sorted(self._index().items(), key=place)))

    def clear(self, tasks: Sequence[str]) -> None:
        """Removes answers, token rows and figures of some tasks."""
        self._repair()
        self._rewrite({key: entry for key, entry in self._index().items() if key[0] not in tasks})
        for name in tasks:
            for file in ("fingerprint.json", "metrics.json", "status.json"):
                self._put(file, name, None)

    # --- inside -----------------------------------------------------------------------------------------------------

    def _index(self) -> dict[Key, _Entry]:
        """Where the last line of every sample is, read again if someone else has changed the file."""
        state = self._state()
        if state != self._seen:
            self._entries, self._seen = {}, state
            for file, *_ in state:
                for offset, _, found in lines(file):
                    key = found["task"], found["sample_id"]
                    self._entries[key] = _Entry(file, offset, found.get("tokens", 0), found.get("part", ""))
            self._forget_missing_rows()
        return self._entries

    def _state(self) -> list[tuple[Path, int, int, int]]:
        """The files of records, those of single processes last, each with what changes when it does.

        While this store is one of several that write, only what was there at the beginning and its own.
        """
        alone = self._own == self.samples_file
        files = [self.samples_file, *(self._shards() if alone else [self._own])]
        stats = [(file, os.stat(file)) for file in files if file.exists()]
        return [(file, stat.st_ino, stat.st_size, stat.st_mtime_ns) for file, stat in stats]

    def _shards(self) -> list[Path]:
        return sorted(self.shards.glob("samples-*.jsonl"))

    def _place(self, entry: _Entry) -> tuple[bool, str, int]:
        """Sorts entries by file and offset."""
        return entry.file != self.samples_file, entry.file.name, entry.offset

    def _forget_missing_rows(self) -> None:
        """Rows that a record speaks of may be gone with their file; the record then has none."""
        entries = self._entries
        for part in {entry.part for entry in entries.values() if entry.tokens}:
            there = self.token_files.keys(part)
            for key, entry in entries.items():
                if entry.tokens and entry.part == part and key not in there:
                    entries[key] = entry._replace(tokens=0, part="")

    def _token_order(self) -> list[tuple[Key, str]]:
        entries = sorted(self._index().items(), key=lambda item: self._place(item[1]))
        return [(key, entry.part) for key, entry in entries if entry.tokens]

    def _repair(self) -> None:
        """Cuts off a half-written last line, takes in what single processes have written, and deletes parts of the
        token table that no record speaks for. A kill, or the end of a run of several processes, leaves these behind.
        """
        self._own, self._seen = self.samples_file, None
        if self.samples_file.exists():
            _cut(self.samples_file)
        for shard in self._shards():  # parts keep their names, and a kill in between leaves lines twice at worst
            _cut(shard)
            with shard.open("rb") as source, self.samples_file.open("ab") as target:
                shutil.copyfileobj(source, target)
            shard.unlink()
        self.stop.unlink(missing_ok=True)
        if self.shards.is_dir():
            self.shards.rmdir()
        self.token_files.keep(entry.part for entry in self._index().values() if entry.part)

    def _rewrite(self, entries: Mapping[Key, _Entry]) -> None:
        """Writes these records, in this order, as the whole of the run, with all token rows in ``tokens.parquet``."""
        if not self.samples_file.exists():
            return
        stale = self.token_files.keys("") - {key for key, entry in entries.items() if entry.tokens}
        if stale or any(entry.part for entry in entries.values()):
            self.token_files.merge([(key, entry.part) for key, entry in entries.items() if entry.tokens])
        with replacing(self.samples_file) as target:
            for entry, line in zip(entries.values(), _read(entries.values()), strict=True):
                if entry.part or not entry.tokens:
                    found = {**json.loads(line), "tokens": entry.tokens}
                    found.pop("part", None)
                    line = dump(found)
                target.write(line)
        self._repair()

    def _drop_tokens(self, task: str) -> None:
        """Removes the token rows of a task and keeps its answers."""
        drop = {key: entry._replace(tokens=0, part="") for key, entry in self._index().items() if key[0] == task}
        self._rewrite({**self._index(), **drop})

    def _refuse(self, task: str, changes: list[tuple[str, Any, Any]], moved: Collection[str] = ()) -> None:
        changes = [change for change in changes if change[0] not in moved]
        if changes:
            asked = [old for key, old, _ in changes if key == "adapter.prompt"]
            dated = "; model.prompt with the text of before goes on" if asked and len(changes) == 1 else ""
            raise ConfigError(
                f"{self.run_dir} holds a run of {task} with other settings ({describe(changes)}); "
                f"set overwrite=true to replace it, or choose another name{dated}"
            )

    def _refuse_unknown(self) -> None:
        """Refuses answers of which nothing tells what wrote them: any settings would seem to fit."""
        known = self.fingerprints()
        unknown_tasks = sorted({task for task, _ in self._index() if task not in known})
        if unknown_tasks:
            raise ConfigError(
                f"{self.run_dir} holds answers to {', '.join(unknown_tasks)}, and fingerprint.json does not say what "
                "wrote them; bring the file back, set overwrite=true to replace the run, or choose another name"
            )

    def _require(self, path: Path) -> None:
        if not path.is_file():
            parent = self.run_dir.parent
            runs = [item.name for item in parent.glob("*") if (item / path.name).is_file()] if parent.is_dir() else []
            raise ArtefactError(f"no {path.name} in {self.run_dir}; {unknown('run', self.run_dir.name, runs)}")

    def _read_json(self, name: str) -> dict[str, Any]:
        path = self.run_dir / name
        sections = read_json(path, REMEDIES[name], default={})
        kind = str if name == "status.json" else dict
        if not all(isinstance(section, kind) for section in sections.values()):
            raise damaged(path, f"every section should be {'a text' if kind is str else 'an object'}", REMEDIES[name])
        return sections

    def _put(self, name: str, section: str, values: Any) -> None:
        """Sets one section of a JSON file, or removes it where ``values`` is None."""
        found = {**self._read_json(name), section: values}
        if values is None:
            del found[section]
        if found or (self.run_dir / name).exists():
            self._write_json(name, found)

    def _write_json(self, name: str, values: Mapping[str, Any]) -> None:
        self._write(name, json.dumps(jsonable(values), indent=1, ensure_ascii=False) + "\n")

    def _write(self, name: str, text: str) -> None:
        """Writes a file that appears whole or not at all."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        atomic_write(self.run_dir / name, text)


def _with_code_of(old: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """A fingerprint with the source code of an earlier one, where that one has noted it."""
    return {
        name: {**found, "code": old[name]["code"]} if "code" in (old.get(name) or ()) else found
        for name, found in fingerprint.items()
    }


def _read(entries: Iterable[_Entry]) -> Iterator[bytes]:
    """The lines of entries; a file stays open while they are of the same."""
    with ExitStack() as stack:
        open_file, name = None, None
        for entry in entries:
            if open_file is None or entry.file != name:
                stack.close()
                open_file, name = stack.enter_context(entry.file.open("rb")), entry.file
            open_file.seek(entry.offset)
            yield open_file.readline()


def _cut(file: Path) -> None:
    """Takes what a kill has left of a half-written line off the end of a file of records."""
    end = max((offset + length for offset, length, _ in lines(file)), default=0)
    if end < file.stat().st_size:
        os.truncate(file, end)
