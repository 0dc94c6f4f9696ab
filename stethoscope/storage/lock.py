"""One run at a time in a run directory."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from stethoscope.core.errors import ConfigError
from stethoscope.core.files import write_json

if TYPE_CHECKING:
    from filelock import BaseFileLock


class RunLock:
    """A lock on a run directory, which the system frees when the process ends, however it ends.

    Of several processes that do a run each takes one, the first one before the others: so a run is refused as long as
    any process of an earlier one is left. Within a process a lock may be taken again by the same thread; the last
    release frees it.
    """

    def __init__(self, run_dir: Path, rank: int = 0) -> None:
        """Names the lock; nothing is made.

        Args:
            run_dir: what is locked.
            rank: number of the process.
        """
        self.run_dir, self.rank = run_dir, rank
        self._lock: BaseFileLock | None = None

    def acquire(self) -> None:
        """Takes the lock; makes the directory.

        Raises:
            ConfigError: another process has it, or the directory cannot be written to.
        """
        own = self.run_dir / (f".lock-{self.rank}" if self.rank else ".lock")
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            lock = self._take(own)
            try:
                for other in self.run_dir.glob(".lock-*[0-9]") if self.rank == 0 else ():
                    self._take(other).release()
            except BaseException:
                lock.release()
                raise
            self._lock = lock
            holder = {"pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            write_json(_holder(own), holder)
        except OSError as error:
            raise ConfigError(f"run directory {self.run_dir} cannot be written to: {error}") from None

    def _take(self, path: Path) -> BaseFileLock:
        from filelock import FileLock, Timeout

        lock = FileLock(path.resolve(), is_singleton=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise ConfigError(
                f"{self.run_dir} is in use by {_who(path)}; wait until it has ended, or choose another name"
            ) from None
        return lock

    def release(self) -> None:
        """Gives the lock back; does nothing without one."""
        if self._lock is not None:
            lock, self._lock = self._lock, None
            lock.release()

    def __enter__(self) -> RunLock:
        """Takes the lock for a block."""
        self.acquire()
        return self

    def __exit__(self, *error: object) -> None:
        """Gives it back."""
        self.release()


def _holder(path: Path) -> Path:
    """Where it is written who has a lock."""
    return path.with_name(f"{path.name}.json")


def _who(path: Path) -> str:
    try:
        found = json.loads(_holder(path).read_text())
        return f"process {found['pid']} since {found['since']}"
    except (OSError, ValueError, KeyError):  # it has only just taken the lock
        return "another process"
