"""Read rank and world size from the environment that a launcher (``torchrun``, ``accelerate launch``) sets."""

from __future__ import annotations

import os

from stethoscope.core.errors import ConfigError

HINT = "start the processes with torchrun, or unset WORLD_SIZE and RANK to run one"


def env_int(name: str, default: int) -> int:
    """Read an environment variable that holds a whole number of at least 0.

    Raises:
        ConfigError: the variable holds something else.
    """
    text = os.environ.get(name) or str(default)
    if not (text.isascii() and text.isdecimal()):
        raise ConfigError(f"the environment variable {name}={text!r:.60} should be a whole number; {HINT}")
    return int(text)


def world_size() -> int:
    """Return the number of processes that the launcher started; 1 without a launcher.

    Raises:
        ConfigError: ``WORLD_SIZE`` is not a whole number.
    """
    return max(env_int("WORLD_SIZE", 1), 1)


def rank() -> int:
    """Return the index of this process among them, from 0.

    Raises:
        ConfigError: ``RANK`` is missing or not below ``WORLD_SIZE``.
    """
    processes = world_size()
    if processes == 1:
        return 0
    index = env_int("RANK", processes)  # if missing, an index out of range
    if index >= processes:
        value = os.environ.get("RANK")
        raise ConfigError(f"RANK={value} should be 0 to {processes - 1}, as WORLD_SIZE={processes}; {HINT}")
    return index
