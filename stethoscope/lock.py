"""One run at a time in a run directory."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from stethoscope.errors import ConfigError

if TYPE_CHECKING:
    from filelock import BaseFileLock


class RunLock:
    """A lock on a run directory, which the system frees when the process ends, however it ends.

    Within a process it may be taken again by the same thread; the last release frees it.
    """

    def __init__(self, run_dir: Path) -> None:
        """Names the lock; nothing is made."""
        self.run_dir = run_dir
        self._holder = run_dir / ".lock.json"
        self._lock: BaseFileLock | None = None

    def acquire(self) -> None:
        """Takes the lock; makes the directory.

        Raises:
            ConfigError: another process has it, or the directory cannot be written to.
        """
        from filelock import FileLock, Timeout

        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.run_dir.resolve() / ".lock", is_singleton=True)
            lock.acquire(blocking=False)
            self._lock = lock
            self._holder.write_text(json.dumps({"pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}))
        except Timeout:
            raise ConfigError(
                f"{self.run_dir} is in use by {self._who()}; wait until it has ended, or choose another name"
            ) from None
        except OSError as error:
            raise ConfigError(f"run directory {self.run_dir} cannot be written to: {error}") from None

    def release(self) -> None:
        """Gives the lock back; does nothing without one."""
        if self._lock is not None:
            lock, self._lock = self._lock, None
            lock.release()

    def _who(self) -> str:
        try:
            found = json.loads(self._holder.read_text())
            return f"process {found['pid']} since {found['since']}"
        except (OSError, ValueError, KeyError):  # it has only just taken the lock
            return "another process"
