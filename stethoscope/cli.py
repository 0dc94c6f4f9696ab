"""The ``stethoscope`` command: dispatch on the first word, one line and exit code 2 for an error of the user's."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NoReturn

from stethoscope import __version__
from stethoscope.commands import HYDRA_COMMANDS, PLAIN_COMMANDS
from stethoscope.core.errors import ConfigError, StethoscopeError, unknown
from stethoscope.core.system import (
    Terminated,
    disk_faults,
    ended_by_signal,
    rank,
    rare_collections,
    tolerate_closed_output,
    world_size,
)
from stethoscope.core.text import logged_to_stderr, one_line, visible_output

HELP = ("-h", "--help", "help")
SILENT = ("list",)
"""Commands that answer at once."""
SHOWS_ONLY = ("-c", "--cfg", "-i", "--info", "-p", "--package", "--resolve", "-sc", "--shell-completion")
"""Hydra's options that only show something."""
INTERRUPTED, TERMINATED, USER_ERROR = 130, 143, 2
WITHOUT_MODEL = ("train",)
"""Commands that load no model; of `train` on 1,000 captions Python's usual collections are 4 %, these 2 %."""
TOGETHER = ("benchmark", "evaluate", "extract", "mitigate")
"""Commands that several processes do together, under ``torchrun`` or ``accelerate launch``; others the first does."""


def _help() -> str:
    commands = {**HYDRA_COMMANDS, **PLAIN_COMMANDS}
    lines = [f"  {name:<10} {text}" for name, text in commands.items()]
    return "\n".join(
        [
            "stethoscope: evaluation harness and calibrated hallucination warnings for vision-language models",
            "",
            "usage: stethoscope COMMAND [setting=value ...]",
            "",
            *lines,
            "",
            "`stethoscope COMMAND --help` explains a command, its groups and all its settings.",
            "`stethoscope COMMAND --cfg job` prints the composed configuration.",
            "`stethoscope --multirun COMMAND a=1,2 b=x,y` is a sweep: a run for each combination, then one table,",
            "several at a time with hydra/launcher=joblib, on Slurm with experiment=sweep_slurm.",
            "Begin with `stethoscope benchmark`: it needs no network and no GPU.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit: 0 done, 2 an error of the user's (one line), 130 interrupted, 143 by SIGTERM.

    A reader of the output that goes away (``| head -1``) ends nothing: the work is done and its status is the same.
    """
    warnings.showwarning = _warn
    with tolerate_closed_output(), visible_output(), logged_to_stderr():
        sys.exit(_run(list(sys.argv[1:] if argv is None else argv)))


def _run(arguments: list[str]) -> int:
    """Run one command; its exit status."""
    number = 0
    try:
        with ended_by_signal(), disk_faults():
            number = rank()
            if number:  # of several processes the first one speaks, and one that fails
                sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
            _dispatch(arguments)
            sys.stdout.flush()
    except StethoscopeError as error:
        print(f"stethoscope: {f'process {number}: ' if number else ''}{one_line(error)}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt as error:
        if not number:
            print("stethoscope: interrupted; the same command goes on from here", file=sys.stderr)
        return TERMINATED if isinstance(error, Terminated) else INTERRUPTED
    return 0


def _warn(message: Warning | str, *location: object, **details: object) -> None:
    """Print a warning as one line, without the place in our code that it comes from."""
    print(f"warning: {one_line(message)}", file=sys.stderr)


def _dispatch(arguments: list[str]) -> None:
    flags = [word for word in arguments[:1] if word in ("-m", "--multirun")]  # before the command or after it
    words = arguments[len(flags) :]
    command, rest = (words[0], [*words[1:], *flags]) if words else ("--help", [])
    if rank() and command not in TOGETHER:
        return
    known = command in HYDRA_COMMANDS or command in PLAIN_COMMANDS
    if known and command not in SILENT and not rank() and not {*HELP, *SHOWS_ONLY} & set(rest):
        # the libraries of most commands take seconds to load
        print(f"{command}: loading libraries ...", file=sys.stderr, flush=True)
    if command in HELP:
        print(_help())
    elif command in ("-V", "--version"):
        print(f"stethoscope {__version__}")
    elif command in PLAIN_COMMANDS:
        module = importlib.import_module(f"stethoscope.commands.{command}")
        if {"-h", "--help"} & set(rest):
            print(module.USAGE)
        else:
            module.main(rest)
    elif command in HYDRA_COMMANDS:
        with rare_collections() if command in WITHOUT_MODEL else nullcontext():
            run_hydra(command, rest)
    else:
        raise ConfigError(unknown("command", command, [*HYDRA_COMMANDS, *PLAIN_COMMANDS]))


def run_hydra(command: str, arguments: list[str]) -> None:
    """Compose a command's configuration from ``conf/<command>.yaml`` and the overrides, and run it.

    Raises:
        ConfigError: an unknown choice, key or value among the overrides.
    """
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf import DictConfig
    from omegaconf.errors import OmegaConfBaseException

    from stethoscope.commands.command_line import option, spell, split
    from stethoscope.commands.help import help_text
    from stethoscope.commands.overrides import (
        check_config,
        complete_choices,
        explain,
        name_estimator,
        name_loggers,
    )
    from stethoscope.commands.sweeps import Sweep, masked_multirun
    from stethoscope.core.component import import_plugins

    options, words = split(arguments)
    folder = option(options, "--config-dir", "-cd")
    sweeping = bool({"-m", "--multirun"} & set(options))
    if world_size() > 1 and sweeping:
        raise ConfigError(
            f"--multirun and {world_size()} processes exclude each other; start the processes for each job of the sweep"
        )
    if command == "mitigate" and sweeping:
        raise ConfigError("mitigate makes a run of every method itself; start it once for each of the other settings")
    if not {"-sc", "--shell-completion"} & set(options):
        words = complete_choices(words, folder)
        words = list(filter(None, (spell(word, command, sweeping) for word in words)))
        words = name_loggers(name_estimator(words), command, folder)
    if {"-h", "--help"} & set(options):
        try:
            print(help_text(command, words, folder))
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(explain(error, command, words, folder)) from error
        return
    sweep = Sweep.of(command, words)
    if sweeping:
        words = sweep.own_settings(words)
    failed: list[StethoscopeError] = []

    def job(config: DictConfig) -> None:
        job_config = HydraConfig.get()
        if job_config.mode == RunMode.MULTIRUN:  # perhaps in another process, which gives nothing back
            sweep.run(config, job_config.job.num, list(job_config.overrides.task))
            return
        try:
            check_config(config, command, list(job_config.overrides.task))
            import_plugins(config.get("plugins"))
            importlib.import_module(f"stethoscope.commands.{command}").run(config)
        except StethoscopeError as error:  # Hydra would print more than the one line
            failed.append(error)

    sys.argv = [f"stethoscope {command}", *options, *sweep.overrides, *words]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing and leaving with 1
    wrapped: Callable[[], None] = hydra.main(
        version_base="1.3", config_path="pkg://stethoscope.conf", config_name=command
    )(job)
    try:
        with masked_multirun():
            wrapped()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error, command, words, folder)) from error
    except Exception as error:
        if not (sweep.started or sweeping):
            raise
        # no job of a sweep raises: the launcher has lost a worker, or could not start any
        gave_up = f"the launcher gave up, {type(error).__name__}: {one_line(error)}"
        if not sweep.started:
            raise ConfigError(gave_up) from error
        print(f"stethoscope: {gave_up}", file=sys.stderr)
    if sweep.started:
        sweep.end()
    if failed:
        raise failed[0]
