"""Read and write a run directory, the contract between commands.

Records are flushed at once and survive a kill.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from stethoscope.core.component import TARGET, build, import_class
from stethoscope.core.errors import ArtefactError, ConfigError, unknown
from stethoscope.core.files import (
    as_path,
    atomic_write,
    check_shape,
    damaged,
    jsonable,
    read_json,
    read_jsonl,
    read_yaml,
    remove_temporaries,
    unshare,
)
from stethoscope.core.json_rows import check_content
from stethoscope.core.redaction import redact, redact_override
from stethoscope.storage.records import Record, RecordEntry, RecordFiles
from stethoscope.storage.run_fingerprint import describe, differences, environment
from stethoscope.storage.tokens import Key, TokenFiles
from stethoscope.tasks.base import Task

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

MAPS = "maps.jsonl"
DETECTOR = "detector"
"""Section of ``metrics.json``; of ``status.json`` while detector, figures and warnings are not all written yet."""

SYNC_SECONDS = 1.0
"""Least time between two waits for the disk: a power cut loses the answers of this time and one batch more.

A wait takes 8 ms on a local disk and up to 0.1 s on a network, which a small model would notice after every batch.
"""

Overwrite = bool | Literal["features"]

REMEDIES = {
    "metrics.json": "delete it and run the commands that made the run again: answers are kept",
    "status.json": "delete it and run the command that made the run again: answers are kept",
    "fingerprint.json": "bring it back, or delete the run and make it again",
    "planned.json": "delete it: only how many samples are still to come is not known then",
    "warnings.jsonl": "delete it; `stethoscope train` makes it again",
    **dict.fromkeys(
        ("config.yaml", "overrides.yaml", "environment.json"),
        "delete it; the command that made the run writes it again",
    ),
}
"""Advice to the user about a damaged file, by its name."""


class RunStore:
    """Reads and writes one run directory, which several tasks of the same model may share.

    A session is ``open_task``, any number of ``append``, and ``finish``, which sorts the task's lines of
    ``samples.jsonl`` by its samples and merges the parts of the token table. Where several processes write, the first
    one opens and finishes the task and each calls ``use_shard`` in between. Record lines are in ``record_files``,
    token rows in ``token_files``.
    """

    def __init__(self, run_dir: str | os.PathLike) -> None:
        """Name the directory; nothing is read or created."""
        self.run_dir = as_path(run_dir, "run_dir")
        self.token_files = TokenFiles(self.run_dir)
        self.record_files = RecordFiles(self.run_dir, self.token_files)
        self.samples_file = self.record_files.main
        self._last_sync = 0.0

    # --- reading ----------------------------------------------------------------------------------------------------

    def records(self, task: str | None = None) -> Iterator[Record]:
        """Yield the records of one task or of all, in the order of the file.

        Raises:
            ArtefactError: there is no such run, it has no such task, or a line of it is damaged.
        """
        self._require_samples()
        tasks = sorted({name for name, _ in self.record_files.entries()})
        if task is not None and task not in tasks and task not in self.fingerprints():
            raise ArtefactError(f"{self.run_dir}: {unknown('task', task, tasks)}")
        entries = [entry for (name, _), entry in self.record_files.ordered() if task in (None, name)]
        for line in self.record_files.read(entries):
            yield Record.from_dict(json.loads(line))

    def count(self, task: str) -> int:
        """Count the samples of a task that have a record."""
        return len(self.sample_ids(task))

    def sample_ids(self, task: str) -> list[str]:
        """List the ids of the samples of a task that have a record."""
        return [sample_id for name, sample_id in self.record_files.entries() if name == task]

    def find(self, task: str, sample_id: str) -> Record | None:
        """Read the record of one sample; None without one."""
        entry = self.record_files.entries().get((task, sample_id))
        return None if entry is None else Record.from_dict(json.loads(next(self.record_files.read([entry]))))

    def has_tokens(self, record: Record) -> bool:
        """Return whether the token rows that a record counts are on disk."""
        entry = self.record_files.entries().get((record.task, record.sample_id))
        return entry is not None and entry.tokens > 0

    def tokens(self, task: str | None = None) -> pd.DataFrame:
        """Read the token table: key columns and features, one row per token, in the order of the records.

        Raises:
            ArtefactError: there is no such run.
        """
        self._require_samples()
        entries = [(key, entry) for key, entry in self.record_files.ordered() if task in (None, key[0])]
        return self.token_files.frame([(key, entry.part) for key, entry in entries if entry.tokens])

    def traced_tasks(self) -> list[str]:
        """List the tasks that have token rows, in the order of the records, without reading the rows.

        Raises:
            ArtefactError: there is no such run.
        """
        self._require_samples()
        return list(dict.fromkeys(task for (task, _), entry in self.record_files.ordered() if entry.tokens))

    def metrics(self) -> dict[str, Any]:
        """Read ``metrics.json``: a section per task, and ``detector``.

        It is empty before the first task is finished.
        """
        return self._read_json("metrics.json")

    def fingerprints(self) -> dict[str, Any]:
        """Read ``fingerprint.json``: a section per task.

        Raises:
            ArtefactError: the file is damaged.
        """
        sections = self._read_json("fingerprint.json")
        for task, section in sections.items():
            parts = {key: dict for key in ("adapter", "task") if section.get(key) is not None}
            check_shape(self.run_dir / "fingerprint.json", section, parts, REMEDIES["fingerprint.json"], task)
        return sections

    def model(self, task: str) -> dict[str, Any]:
        """Read the fingerprint of the model that answered a task; empty where it is not known."""
        return self.fingerprints().get(task, {}).get("adapter") or {}

    def status(self) -> dict[str, str]:
        """Read ``status.json``: by task ``running`` (or killed), ``finished``, ``interrupted`` or ``failed``."""
        return self._read_json("status.json")

    def planned(self) -> dict[str, int]:
        """Read ``planned.json``: by task the number of samples that are to be answered, where it is known."""
        return self._read_json("planned.json")

    # --- writing: one session, in the order of its calls ------------------------------------------------------------

    def write_config(self, config: Any, overrides: Sequence[str] = ()) -> None:
        """Write ``config.yaml`` and ``overrides.yaml``; ``config`` is a mapping or an OmegaConf node."""
        import yaml
        from omegaconf import OmegaConf

        plain = OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else dict(config)
        self._write("config.yaml", yaml.safe_dump(redact(jsonable(plain)), sort_keys=False, allow_unicode=True))
        self._write("overrides.yaml", yaml.safe_dump(list(map(redact_override, overrides)), allow_unicode=True))

    def open_task(
        self,
        task: str,
        fingerprint: Mapping[str, Any],
        features: Mapping[str, Any] | None = None,
        overwrite: Overwrite = False,
        moved: Collection[str] = (),
        planned: int | None = None,
    ) -> None:
        """Prepare the directory for a task: keep what matches its settings, repair what a kill has left.

        Args:
            task: name of the task.
            fingerprint: identifies the answers.
            features: identifies the token rows; None to leave the present ones alone.
            overwrite: True to delete this task's answers and those of any other model, ``features`` to delete only
                the token rows; answers and metrics then stay as they are.
            moved: dotted keys of the fingerprint that may differ: locations of model and data.
            planned: number of samples that are to be answered, for whoever looks on; None if it is not known.

        Raises:
            ConfigError: the directory holds answers or token rows that were made with other settings.
            ArtefactError: a line of ``samples.jsonl`` is damaged.
        """
        self.run_dir.mkdir(parents=True, exist_ok=True)
        for path in (self.samples_file, self.run_dir / MAPS):  # both are repaired and appended to
            unshare(path)
        fingerprint, features = jsonable(fingerprint), jsonable(features)
        sections = self.fingerprints()
        old = sections.pop(task, None)
        if overwrite == "features":  # nothing is generated, so the answers stay those of the code that wrote them
            fingerprint = _with_code_of(old or {}, fingerprint)
        model = fingerprint.get("adapter")
        others = {name: section for name, section in sections.items() if section.get("adapter") != model}
        if overwrite is True:
            known = {task, *sections}
            unidentified = {name for name, _ in self.record_files.entries()} - known
            self.remove_tasks(sorted({task, *others, *unidentified}))
            old = None
        else:
            for name, section in others.items():
                self._refuse_changes(name, differences(section.get("adapter"), model, "adapter"), moved)
        remove_temporaries(self.run_dir)
        self.record_files.repair()
        self._refuse_unidentified()
        old_features = old.pop("features", None) if old else None
        if old is not None:
            self._refuse_changes(task, differences(old, fingerprint), moved)
        if features is not None and old_features is not None and old_features != features:
            if overwrite != "features":
                self._refuse_changes(task, differences(old_features, features, "features"))
            self._remove_token_rows(task)
        self.samples_file.touch()
        features = features if features is not None else old_features
        answers = old if overwrite == "features" and old is not None else fingerprint
        section = {**answers, **({"features": features} if features is not None else {})}
        self._write_section("fingerprint.json", task, section)
        self._write_json("environment.json", environment())
        if overwrite != "features":
            self._write_section("metrics.json", task, None)
        self._write_section("planned.json", task, planned)
        self.set_status(task, "running")

    def use_shard(self, rank: int) -> None:
        """Write to files of this process only, as one of several that write at the same time.

        Args:
            rank: of the process; the first one has called ``open_task`` and calls ``finish``, while the others wait.
        """
        self.record_files.use_shard(rank)

    def append(self, records: Sequence[Record], tables: Mapping[str, pa.Table] | None = None) -> None:
        """Append the records of a batch and their token rows.

        Both survive the end of the process from here on.

        Every ``SYNC_SECONDS`` they are also synced to disk, against power cuts.

        Args:
            records: of the batch.
            tables: token rows by sample id.
        """
        tables = {sample_id: table for sample_id, table in (tables or {}).items() if len(table)}
        part = self.token_files.append(list(tables.values())) if tables else ""  # first: a record counts its rows
        durable = time.monotonic() - self._last_sync >= SYNC_SECONDS
        if durable and part:
            self.token_files.sync()
        counts = [len(tables.get(record.sample_id, ())) for record in records]
        counted = [
            replace(record, tokens=count, part=part if count else "")
            for record, count in zip(records, counts, strict=True)
        ]
        self.record_files.append(counted, durable)
        if durable:
            self._last_sync = time.monotonic()

    def finish(self, task: str, order: Sequence[str]) -> None:
        """Sort the task's records by its samples and merge the token parts into ``tokens.parquet``.

        Args:
            task: name of the task.
            order: its sample ids.
        """
        if self.record_files.shards.is_dir():
            self.record_files.repair()
        indices = {sample_id: index for index, sample_id in enumerate(order)}
        tasks = list(dict.fromkeys([*(name for name in self.fingerprints() if name != task), task]))

        def position(item: tuple[Key, RecordEntry]) -> tuple[int, int, int]:
            (name, sample_id), entry = item
            return tasks.index(name), indices.get(sample_id, len(indices)) if name == task else 0, entry.offset

        self.record_files.rewrite(dict(sorted(self.record_files.entries().items(), key=position)))

    def write_metrics(self, section: str, values: Mapping[str, Any]) -> None:
        """Write one section of ``metrics.json``: the name of a task, or ``detector``."""
        self._write_section("metrics.json", section, values)

    def set_status(self, task: str, status: str | None) -> None:
        """Write the status of a task, or of ``DETECTOR``; None removes it."""
        self._write_section("status.json", task, status)

    def remove_tasks(self, tasks: Sequence[str]) -> None:
        """Delete answers, token rows and metrics of some tasks."""
        self.record_files.repair()
        entries = self.record_files.entries()
        self.record_files.rewrite({key: entry for key, entry in entries.items() if key[0] not in tasks})
        for name in tasks:
            for file in ("fingerprint.json", "metrics.json", "status.json", "planned.json"):
                self._write_section(file, name, None)

    # --- inside -----------------------------------------------------------------------------------------------------

    def _remove_token_rows(self, task: str) -> None:
        """Delete the token rows of a task and keep its answers."""
        entries = self.record_files.entries()
        untraced = {key: entry.without_rows() for key, entry in entries.items() if key[0] == task}
        self.record_files.rewrite({**entries, **untraced})

    def _refuse_changes(self, task: str, changes: list[tuple[str, Any, Any]], moved: Collection[str] = ()) -> None:
        """Raise ``ConfigError`` for changed settings, but for those of ``moved``."""
        changes = [change for change in changes if change[0] not in moved]
        if changes:
            prompts = [old for key, old, _ in changes if key == "adapter.prompt"]
            hint = "; or set model.prompt to the earlier text to resume" if prompts and len(changes) == 1 else ""
            raise ConfigError(
                f"{self.run_dir} holds a run of {task} with other settings ({describe(changes)}); "
                f"set overwrite=true to replace it, or choose another name{hint}"
            )

    def _refuse_unidentified(self) -> None:
        """Raise ``ConfigError`` for answers without a fingerprint: any settings would seem to match them."""
        known = self.fingerprints()
        unidentified = sorted({task for task, _ in self.record_files.entries() if task not in known})
        if unidentified:
            raise ConfigError(
                f"{self.run_dir} holds answers to {', '.join(unidentified)}, but fingerprint.json does not say which "
                "settings wrote them; restore the file, set overwrite=true to replace the run, or choose another name"
            )

    def _require_samples(self) -> None:
        """Raise ``ArtefactError`` with similar names where the directory holds no run."""
        name, parent = self.samples_file.name, self.run_dir.parent
        if not self.samples_file.is_file():
            runs = [item.name for item in parent.glob("*") if (item / name).is_file()] if parent.is_dir() else []
            raise ArtefactError(f"no {name} in {self.run_dir}; {unknown('run', self.run_dir.name, runs)}")

    def _read_json(self, name: str) -> dict[str, Any]:
        path = self.run_dir / name
        sections = read_json(path, REMEDIES[name], default={})
        kind, words = {"status.json": (str, "a text"), "planned.json": (int, "a whole number")}.get(
            name, (dict, "an object")
        )
        if not all(isinstance(section, kind) for section in sections.values()):
            raise damaged(path, f"every section should be {words}", REMEDIES[name])
        return sections

    def _write_section(self, name: str, section: str, values: Any) -> None:
        """Write one section of a JSON file, or remove it where ``values`` is None."""
        sections = {**self._read_json(name), section: values}
        if values is None:
            del sections[section]
        if sections or (self.run_dir / name).exists():
            self._write_json(name, sections)

    def _write_json(self, name: str, values: Mapping[str, Any]) -> None:
        self._write(name, json.dumps(jsonable(values), indent=1, ensure_ascii=False) + "\n")

    def _write(self, name: str, text: str) -> None:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        atomic_write(self.run_dir / name, text)


def _with_code_of(old: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a fingerprint with the code digests of an earlier one, where that one has them."""
    codes = {name: section["code"] for name, section in old.items() if isinstance(section, dict) and "code" in section}
    return {
        name: {**section, "code": codes[name]} if name in codes else section for name, section in fingerprint.items()
    }


def saved_config(folder: Path) -> dict[str, Any]:
    """Read the configuration that a run directory was made with, as plain data: nothing in it is resolved.

    Raises:
        ArtefactError: there is no such run, or the file is damaged.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        reason = "is not a run directory: it has no config.yaml" if folder.is_dir() else "is no directory"
        raise ArtefactError(f"{folder} {reason}; name a run that `stethoscope evaluate` or `benchmark` made")
    return read_yaml(file, REMEDIES[file.name])


def read_warnings(folder: Path) -> list[dict[str, Any]]:
    """Read the lines of a run's ``warnings.jsonl``; none if no detector was applied to the run.

    Raises:
        ArtefactError: the file is damaged.
    """
    path = folder / "warnings.jsonl"
    rows = read_jsonl(path, REMEDIES[path.name], default=[])
    for number, row in enumerate(rows, 1):
        check_content("warnings", row, f"{path}:{number}", REMEDIES[path.name])
    return rows


def saved_task(store: RunStore, name: str, plugins: Sequence[str] = ()) -> Task:
    """Make the task that a run was asked with again, from its configuration or else from its fingerprint.

    A task that could fetch its data uses only what is on this machine.

    Args:
        store: the run.
        name: name of the task.
        plugins: packages besides our own that it may come from; the run's file does not decide that.

    Raises:
        ArtefactError: the run does not say how its task is made.
        ConfigError: the task cannot be made.
    """
    described = store.fingerprints().get(name, {}).get("task", {})
    path, settings = described.get("class"), described.get("settings", {})
    if path is None or not isinstance(settings, dict):
        raise ArtefactError(f"{store.run_dir / 'fingerprint.json'} does not say what {name} is")
    nodes = saved_config(store.run_dir).values() if (store.run_dir / "config.yaml").is_file() else ()
    configured = (node for node in nodes if isinstance(node, dict) and node.get(TARGET) == path)
    node = next(configured, {TARGET: path, **settings})
    if "local_files_only" in signature(import_class(path, Task, f"{name}.{TARGET}", plugins)).parameters:
        node = {**node, "local_files_only": True}  # also where the file does not have the key
    return build(node, Task, name, plugins)
