"""Lock a run directory, so that one run at a time writes to it."""

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

    In a distributed run each process takes a lock, rank 0 first, so a run is refused while any process of an earlier
    one is alive. The same thread may take a lock several times; the last release frees it.
    """

    def __init__(self, run_dir: Path, rank: int = 0) -> None:
        """Name the lock; nothing is created.

        Args:
            run_dir: to lock.
            rank: of the process.
        """
        self.run_dir, self.rank = run_dir, rank
        self._lock: BaseFileLock | None = None

    def acquire(self) -> None:
        """Take the lock; create the directory.

        Raises:
            ConfigError: another process holds the lock, or the directory cannot be written to.
        """
        own = self.run_dir / (f".lock-{self.rank}" if self.rank else ".lock")
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            lock = self._take(own)
            try:
                for other in self.run_dir.glob(".lock-*[0-9]") if self.rank == 0 else ():
                    self._take(other).release()
                holder = {"pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
                write_json(_holder_file(own), holder)
            except BaseException:
                lock.release()
                raise
            self._lock = lock
        except OSError as error:
            raise ConfigError(f"run directory {self.run_dir} cannot be written to: {error.strerror or error}") from None

    def _take(self, path: Path) -> BaseFileLock:
        from filelock import FileLock, Timeout

        lock = FileLock(path.resolve(), is_singleton=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise ConfigError(
                f"{self.run_dir} is in use by {_describe_holder(path)}; wait until it has ended, or choose another name"
            ) from None
        return lock

    def release(self) -> None:
        """Release the lock if it is held."""
        if self._lock is not None:
            lock, self._lock = self._lock, None
            lock.release()

    def __enter__(self) -> RunLock:
        """Take the lock for a block."""
        self.acquire()
        return self

    def __exit__(self, *error: object) -> None:
        """Release the lock."""
        self.release()


def _holder_file(path: Path) -> Path:
    """Return the path of the note on who holds a lock."""
    return path.with_name(f"{path.name}.json")


def _describe_holder(path: Path) -> str:
    try:
        holder = json.loads(_holder_file(path).read_text(encoding="utf-8"))
        return f"process {holder['pid']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # the note is written just after the lock is taken
        return "another process"
