"""Read what a launcher (``torchrun``, ``accelerate launch``) says about the processes that it has started."""

from __future__ import annotations

import os

from stethoscope.core.errors import ConfigError

HINT = "start the processes with torchrun, or unset WORLD_SIZE and RANK to run one"


def env_int(name: str, default: int) -> int:
    """Read a whole number of at least 0 that a launcher has set in the environment.

    Raises:
        ConfigError: the variable holds something else.
    """
    text = os.environ.get(name) or str(default)
    if not (text.isascii() and text.isdecimal()):
        raise ConfigError(f"the environment variable {name}={text!r:.60} should be a whole number; {HINT}")
    return int(text)


def world_size() -> int:
    """Count the processes that were started together, by their launcher's word; 1 without one.

    Raises:
        ConfigError: ``WORLD_SIZE`` is no number of processes.
    """
    return max(env_int("WORLD_SIZE", 1), 1)


def rank() -> int:
    """Return the number of this process among those, from 0.

    Raises:
        ConfigError: ``RANK`` is missing or not below ``WORLD_SIZE``.
    """
    processes = world_size()
    if processes == 1:
        return 0
    number = env_int("RANK", processes)  # without the variable, one that no process has
    if number >= processes:
        given = os.environ.get("RANK")
        raise ConfigError(f"RANK={given} should be 0 to {processes - 1}, as WORLD_SIZE={processes}; {HINT}")
    return number
