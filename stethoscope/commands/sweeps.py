"""Sweeps: many jobs of one command, each with a run directory of its own, and one table at the end.

Hydra starts the jobs, one after the other or through a launcher in other processes and on other machines. What they
come to is therefore read from files in the sweep's folder: ``jobs/`` (how each ended) and the run directories.
"""

from __future__ import annotations

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
from stethoscope.commands.overrides import check_values
from stethoscope.core.errors import ConfigError, StethoscopeError, first_line
from stethoscope.core.text import console, one_line, redact, redact_override, redact_text, visible_output
from stethoscope.storage.sweep_jobs import FAILED, FINISHED, INTERRUPTED, Job, distinct_overrides, read_jobs, slug

LONGEST = 120  # characters of a folder's name


@dataclass(frozen=True)
class Sweep:
    """A launch of a command over several settings.

    Attributes:
        command: what every job runs.
        folder: of the sweep; the jobs' run directories are inside.
        fixed: words of the command line that all jobs share, as Hydra spells them.
        key: which launch it is, since several may use one folder.
    """

    command: str
    folder: Path
    fixed: tuple[str, ...]
    key: str

    @classmethod
    def of(cls, command: str, words: Sequence[str]) -> Sweep:
        """The sweep that a command line asks for; the same words give the same folder, so that it can be resumed.

        Its folder is ``runs/<name>`` where the name is given, else ``runs/sweep-<command>-<what is swept>``.

        Args:
            command: what every job runs.
            words: settings as ``spell`` writes them.

        Raises:
            ConfigError: the name of the folder holds an interpolation that cannot be resolved.
        """
        read = {word: _read(word) for word in words if "=" in word}
        swept = [word for word, hydras in read.items() if hydras is None]
        fixed = {word: unquoted(hydras) for word, hydras in read.items() if hydras is not None}
        given = {key: value for key, _, value in (word.partition("=") for word in fixed.values())}
        named = [word for word in fixed.values() if not word.startswith(("runs=", "name=", "hydra"))]
        keys = [word.partition("=")[0] for word in swept]
        name = given.get("name") or slug([f"sweep-{command}", *keys, *map(redact_override, named)])[:LONGEST]
        folder = Path(given.get("hydra.sweep.dir") or Path(given.get("runs") or "runs") / name)
        return cls(command, _resolved(folder), tuple(read[word] for word in fixed), secrets.token_hex(4))

    @property
    def name(self) -> str:
        """Last part of the folder's path, and the group of its W&B runs."""
        return self.folder.resolve().name

    @property
    def overrides(self) -> list[str]:
        """Settings for Hydra: where to put its files, and not to tell of the jobs itself."""
        return [f"hydra.sweep.dir={quote(str(self.folder))}", "hydra/hydra_logging=none"]

    @property
    def started(self) -> bool:
        """Whether a job of it has begun; a command without anything to sweep over has none."""
        return bool(read_jobs(self.folder, self.key))

    def run(self, config: DictConfig, number: int, words: Sequence[str]) -> None:
        """Runs one job and writes down how it ended. Its errors are told and noted, and do not stop the sweep."""
        with visible_output():  # perhaps in another process
            self._run(config, number, words)

    def _run(self, config: DictConfig, number: int, words: Sequence[str]) -> None:
        from stethoscope.commands.common import listed

        own = tuple(redact_override(unquoted(word)) for word in distinct_overrides(words, self.fixed))
        folder = self._prepare(config, own or (f"job={number}",))
        plugins = tuple(map(str, listed(config.get("plugins") or ())))
        job = Job(self.key, number, own, folder, logger=redact(_logger_of(config)), plugins=plugins)
        job.write(self.folder)
        print(f"[job {number}] {job.title}", flush=True)
        start = time.monotonic()
        try:
            check_values(config)
            importlib.import_module(f"stethoscope.commands.{self.command}").run(config)
        except StethoscopeError as error:
            self._failed(job, start, str(error))
        except Exception as error:  # a bug of ours, which the next job may not have: shown whole
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
        """Gives a job a run directory of its own and puts its W&B run into the sweep's group; the run directory."""
        with open_dict(config):
            if "run_dir" in config:
                config.run_dir = str(self.folder / slug(own)[:LONGEST])
            if "answers" in config:
                config.answers = config.answers or str(self.folder)
            if "group" in config.get("logger", {}):
                config.logger.group = config.logger.group or self.name
                config.logger.job_type = self.command
        return str(config.get("run_dir") or config.get("run") or "")

    def end(self) -> None:
        """Prints and writes the table of all jobs, and sends it to W&B where the jobs log there.

        Raises:
            ConfigError: a job did not finish.
        """
        from stethoscope.report.sweep import comparison

        jobs = read_jobs(self.folder, self.key)
        found = comparison(jobs, partial(_task_of, {name for job in jobs for name in job.plugins}))
        found.print(console())
        found.write(self.folder, self.name)
        print(f"sweep: {self.folder / 'sweep.md'}, sweep.csv, sweep.json")
        self._log(jobs, found)
        lost = [job for job in jobs if job.status != FINISHED]
        if lost:
            raise ConfigError(
                f"{len(lost)} of {len(jobs)} jobs of the sweep did not finish, the first is job {lost[0].index} "
                f"({lost[0].title}): {lost[0].error or lost[0].status}"
            )

    def _log(self, jobs: Sequence[Job], found: Any) -> None:
        """A W&B run in the jobs' group that holds the comparison."""
        settings = next((job.logger for job in jobs if job.logger), None)
        if settings is None:
            return
        from stethoscope.loggers.base import Loggers
        from stethoscope.loggers.wandb import WandbLogger

        loggers = Loggers([WandbLogger(**{**settings, "job_type": "sweep", "name": self.name})])
        loggers.setup(self.folder)
        shared = [redact_override(unquoted(word)) for word in self.fixed]
        loggers.log_config({"sweep": {"command": self.command, "settings": shared, "jobs": len(jobs)}})
        loggers.log_table("sweep/comparison", *found.long())
        loggers.log_metrics({"sweep/jobs": len(jobs), "sweep/finished": sum(job.status == FINISHED for job in jobs)})
        loggers.finalize("finished" if all(job.status == FINISHED for job in jobs) else "failed")


def _task_of(plugins: Collection[str], source: Any, name: str) -> Any:
    """Make a task of a run again, without the network; ``plugins`` are those that the jobs were started with."""
    from stethoscope.commands.common import saved_task

    return saved_task(source, name, sorted(plugins), offline=True)


def _logger_of(config: DictConfig) -> dict[str, Any]:
    """Settings of the W&B logger; empty without one, or where it is disabled."""
    node = config.get("logger") or {}
    if not str(node.get("_target_", "")).endswith("WandbLogger") or node.get("mode") == "disabled":
        return {}
    return {key: value for key, value in OmegaConf.to_container(node, resolve=True).items() if key != "_target_"}


def _read(word: str) -> str | None:
    """A setting as Hydra spells it; None where it gives several values to go through."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    override = OverridesParser.create().parse_overrides([word])[0]
    if override.is_sweep_override():
        return None
    return f"{override.get_key_element()}={override.get_value_element_as_str()}"


def _resolved(folder: Path) -> Path:
    """A folder with the values of the interpolations that were typed in it.

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

    class Masking:
        @staticmethod
        def save(config: DictConfig, path: Path) -> None:
            plain = redact(OmegaConf.to_container(config, resolve=False))
            task = OmegaConf.select(config, "hydra.overrides.task") or ()
            plain["hydra"]["overrides"]["task"] = [redact_override(unquoted(word)) for word in task]
            plain["hydra"]["job"].pop("override_dirname", None)  # the same words once more
            OmegaConf.save(OmegaConf.create(plain), path)

    before, basic_sweeper.OmegaConf = basic_sweeper.OmegaConf, Masking
    try:
        yield
    finally:
        basic_sweeper.OmegaConf = before
