"""Run sweeps: many jobs of one command, each with its own run directory, and one table at the end.

Hydra starts the jobs, one after the other or through a launcher in other processes and on other machines. Their
results are therefore read from files in the sweep's folder: ``jobs/`` (status of each) and the run directories.
"""

from __future__ import annotations

import hashlib
import importlib
import secrets
import sys
import time
import traceback
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from stethoscope.commands.command_line import quote, unquoted
from stethoscope.commands.overrides import check_config, settings_of
from stethoscope.core.component import TARGET, build, import_plugins
from stethoscope.core.errors import ConfigError, StethoscopeError, first_line
from stethoscope.core.redaction import redact, redact_override, redact_text
from stethoscope.core.text import console, logged_to_stderr, one_line, visible_output
from stethoscope.storage.sweep_jobs import FAILED, FINISHED, INTERRUPTED, Job, distinct_overrides, read_jobs, slug

LONGEST = 120  # characters of a folder's name


@dataclass(frozen=True)
class Sweep:
    """A launch of a command over several settings.

    Attributes:
        command: of every job.
        folder: of the sweep; the jobs' run directories are inside.
        fixed: overrides that all jobs share, in Hydra's grammar.
        key: id of the launch, since several may use one folder.
    """

    command: str
    folder: Path
    fixed: tuple[str, ...]
    key: str

    @classmethod
    def of(cls, command: str, words: Sequence[str]) -> Sweep:
        """Create the sweep of a command line.

        The same overrides give the same folder, so that it can be resumed.

        Its folder is ``runs/<name>`` where the name is given, else ``runs/sweep-<command>-<what is swept>``.

        Args:
            command: of every job.
            words: overrides as ``spell`` writes them.

        Raises:
            ConfigError: the name of the folder holds an interpolation that cannot be resolved.
        """
        read = {word: _read(word) for word in words if "=" in word}
        swept = [word for word, hydras in read.items() if hydras is None]
        fixed = {word: unquoted(hydras) for word, hydras in read.items() if hydras is not None}
        given = {key: value for key, _, value in (word.partition("=") for word in fixed.values())}
        named = [word for word in fixed.values() if not word.startswith(("runs=", "name=", "hydra"))]
        keys = [word.partition("=")[0] for word in swept]
        name = given.get("name") or _folder_name([f"sweep-{command}", *keys, *map(redact_override, named)])
        folder = Path(given.get("hydra.sweep.dir") or Path(given.get("runs") or "runs") / name)
        return cls(
            command, _resolved(folder), tuple(item for item in read.values() if item is not None), secrets.token_hex(4)
        )

    @property
    def name(self) -> str:
        """Last part of the folder's path, and the group of its runs for loggers."""
        return self.folder.resolve().name

    @property
    def overrides(self) -> list[str]:
        """Overrides for Hydra itself: the folder of its files, and no log lines about jobs."""
        return [f"hydra.sweep.dir={quote(str(self.folder))}", "hydra/hydra_logging=none"]

    def own_settings(self, words: Sequence[str]) -> list[str]:
        """Return the overrides without ``name=`` where that only names the sweep.

        Jobs of ``train`` have no name.
        """
        if "name" in settings_of(self.command):
            return list(words)
        return [word for word in words if not (word.startswith("name=") and _read(word) is not None)]

    @property
    def started(self) -> bool:
        """Whether one of its jobs has started; a command with nothing to sweep over has none."""
        return bool(read_jobs(self.folder, self.key))

    def run(self, config: DictConfig, number: int, words: Sequence[str]) -> None:
        """Run one job and store its status. Its errors are printed and stored, and do not stop the sweep."""
        with visible_output(), logged_to_stderr():  # perhaps in another process
            self._run(config, number, words)

    def _run(self, config: DictConfig, number: int, words: Sequence[str]) -> None:
        from stethoscope.commands.common import as_list

        own = tuple(redact_override(unquoted(word)) for word in distinct_overrides(words, self.fixed))
        folder = self._prepare(config, own or (f"job={number}",))
        plugins = tuple(map(str, as_list(config.get("plugins") or ())))
        job = Job(self.key, number, own, folder, logger=redact(_loggers_of(config)), plugins=plugins)
        job.write(self.folder)
        print(f"[job {number}] {job.title}", flush=True)
        start = time.monotonic()
        try:
            check_config(config, self.command, words)
            import_plugins(plugins)
            importlib.import_module(f"stethoscope.commands.{self.command}").run(config)
        except StethoscopeError as error:
            self._failed(job, start, str(error))
        except Exception as error:  # a bug of ours, which the next job may not meet: print the traceback
            traceback.print_exc()
            self._failed(job, start, f"{type(error).__name__}: {error}")
        except BaseException:
            job.ended(INTERRUPTED, time.monotonic() - start).write(self.folder)
            raise
        else:
            job.ended(FINISHED, time.monotonic() - start).write(self.folder)

    def _failed(self, job: Job, start: float, error: str) -> None:
        line = redact_text(one_line(error))
        job.ended(FAILED, time.monotonic() - start, line).write(self.folder)
        print(f"stethoscope: job {job.index} ({job.title}): {line}", file=sys.stderr, flush=True)

    def _prepare(self, config: DictConfig, own: Sequence[str]) -> str:
        """Give a job its run directory and put its loggers' runs into the sweep's group; return the directory."""
        with open_dict(config):
            if "run_dir" in config:
                config.run_dir = str(self.folder / _folder_name(own))
            if isinstance(config.get("answers"), DictConfig):
                config.answers.runs = config.answers.runs or str(self.folder)
            chosen = config.get("logger") or {}
            for node in (chosen, *chosen.values()):
                if isinstance(node, DictConfig) and "group" in node:
                    node.group = node.group or self.name
        return str(config.get("run_dir") or config.get("run") or "")

    def end(self) -> None:
        """Print and write the table of all jobs, and send it to the loggers of the jobs.

        Raises:
            ConfigError: a job did not finish.
        """
        from stethoscope.report.sweep import compare_jobs

        jobs = read_jobs(self.folder, self.key)
        results = compare_jobs(jobs, partial(_task_of, {name for job in jobs for name in job.plugins}))
        results.print(console())
        results.write(self.folder, self.name)
        print(f"sweep: {self.folder / 'sweep.md'}, sweep.html, sweep.csv, sweep.json")
        self._log(jobs, results)
        lost = [job for job in jobs if job.status != FINISHED]
        if lost:
            raise ConfigError(
                f"{len(lost)} of {len(jobs)} jobs of the sweep did not finish, the first is job {lost[0].index} "
                f"({lost[0].title}): {lost[0].error or lost[0].status}"
            )

    def _log(self, jobs: Sequence[Job], results: Any) -> None:
        """Log the comparison with the loggers of the jobs, to a run in their group."""
        nodes = next((job.logger for job in jobs if job.logger), None)
        if nodes is None:
            return
        from stethoscope.loggers.base import Logger
        from stethoscope.loggers.combined import Loggers

        own = {"job_type": "sweep", "name": self.name}
        plugins = sorted({name for job in jobs for name in job.plugins})
        loggers = Loggers(
            build({**node, **{name: value for name, value in own.items() if name in node}}, Logger, key, plugins)
            for key, node in nodes.items()
        )
        loggers.setup(self.folder)
        shared = [redact_override(unquoted(word)) for word in self.fixed]
        loggers.log_config({"sweep": {"command": self.command, "settings": shared, "jobs": len(jobs)}})
        loggers.log_table("sweep/comparison", *results.long_table())
        loggers.log_metrics({"sweep/jobs": len(jobs), "sweep/finished": sum(job.status == FINISHED for job in jobs)})
        loggers.finalize("finished" if all(job.status == FINISHED for job in jobs) else "failed")


def _task_of(plugins: Collection[str], source: Any, name: str) -> Any:
    """Make a task of a run again; ``plugins`` are those that the jobs were started with."""
    from stethoscope.storage.run_dir import saved_task

    return saved_task(source.store, name, sorted(plugins))


def _loggers_of(config: DictConfig) -> dict[str, dict[str, Any]]:
    """Return the settings of the loggers, by their paths, that write more than ``events.jsonl``."""
    from stethoscope.commands.common import logger_settings

    return {
        key: node
        for key, node in logger_settings(config).items()
        if not str(node.get(TARGET, "")).endswith(".JsonLogger") and node.get("mode") != "disabled"
    }


def _folder_name(overrides: Sequence[str]) -> str:
    """Return the name of a folder; long ones end with a digest, as many jobs may begin alike."""
    name = slug(overrides)
    if len(name) <= LONGEST:
        return name
    return f"{name[: LONGEST - 9]}-{hashlib.sha256(' '.join(overrides).encode()).hexdigest()[:8]}"


def _read(word: str) -> str | None:
    """Write an override in Hydra's grammar; None where it sweeps over several values."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    override = OverridesParser.create().parse_overrides([word])[0]
    if override.is_sweep_override():
        return None
    return f"{override.get_key_element()}={override.get_value_element_as_str()}"


def _resolved(folder: Path) -> Path:
    """Resolve the interpolations in the path of a folder.

    Raises:
        ConfigError: one of them cannot be resolved.
    """
    try:
        return Path(OmegaConf.create({"folder": str(folder)}).folder)
    except OmegaConfBaseException as error:
        raise ConfigError(f"the folder of the sweep, {folder}: {one_line(first_line(error))}") from None


@contextmanager
def masked_multirun() -> Iterator[None]:
    """Mask secrets in the ``multirun.yaml`` that Hydra's sweeper writes, for which it has no hook."""
    from hydra._internal.core_plugins import basic_sweeper
    from hydra.core.plugins import Plugins

    Plugins.instance()  # runs the sweeper's module again, which would undo what follows

    class Masking:
        @staticmethod
        def save(config: DictConfig, path: Path) -> None:
            plain = redact(OmegaConf.to_container(config, resolve=False))
            task = OmegaConf.select(config, "hydra.overrides.task") or ()
            plain["hydra"]["overrides"]["task"] = [redact_override(unquoted(word)) for word in task]
            plain["hydra"]["job"].pop("override_dirname", None)  # the same overrides again
            OmegaConf.save(OmegaConf.create(plain), path)

    original = basic_sweeper.OmegaConf
    vars(basic_sweeper)["OmegaConf"] = Masking
    try:
        yield
    finally:
        vars(basic_sweeper)["OmegaConf"] = original
