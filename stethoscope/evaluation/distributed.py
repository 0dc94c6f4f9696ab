"""Share one run among the processes that ``torchrun`` or ``accelerate launch`` starts.

Every rank answers the samples that it owns and writes their records to files of its own in the run directory. The main
process opens the run, merges the files at its end, and does everything that is done once. Between these two moments no
rank waits for another, and only short JSON texts are exchanged, over gloo on the CPU, so the models' devices do not
matter.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from stethoscope.core.errors import CapabilityError, ConfigError
from stethoscope.core.system import HINT, env_int, rank, world_size
from stethoscope.core.text import listed, one_line

COLLECTIVE_TIMEOUT = timedelta(days=30)
"""How long a finished rank waits for the others, because ranks may end hours apart. A process that dies is noticed at
once by its closed connection, and a machine that vanishes by the launcher, so this limit is no watchdog."""


MEETING_MINUTES = 10.0
"""Default limit on connecting the ranks. It happens before any model is loaded, so it takes no longer than a launcher
needs for its last process; a process started with variables left over from another launch stops here."""

_POLL, _SILENT = 0.1, 3.0  # seconds between two checks, and before the missing ranks are reported
_STORE_TIMEOUT = timedelta(seconds=60)  # of one request to the key-value store
_THREAD_NAME = "stethoscope-waiting"


class PeerFailed(SystemExit):
    """Raised on all other ranks after one rank has reported an error; exits with status 2 silently."""

    def __init__(self) -> None:
        super().__init__(2)


class DistributedState:
    """Rank of this process among those that share a run.

    Args:
        rank: index of this process, from 0.
        world_size: number of processes.

    Attributes:
        rank: as given.
        world_size: as given.
        stop_file: file by which a rank that fails stops the others; None until a run directory has been accepted.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.stop_file: Path | None = None

    @property
    def is_distributed(self) -> bool:
        """Whether there is more than one process."""
        return self.world_size > 1

    @property
    def is_main_process(self) -> bool:
        """Whether this process does what is done once per run."""
        return self.rank == 0

    def connect(self, minutes: float = MEETING_MINUTES) -> None:
        """Connect to the other ranks; do nothing where this is done, or there are none.

        Args:
            minutes: how long to wait for all ranks.

        Raises:
            CapabilityError: not all ranks have arrived in time.
            ConfigError: the launcher has not set an address.
        """
        if not self.is_distributed:
            return
        import torch.distributed

        if torch.distributed.is_initialized():
            return
        rendezvous = Rendezvous(self.rank, self.world_size, minutes)
        store = rendezvous.open_store()
        rendezvous.wait_for_all(store)
        options = {"store": store, "rank": self.rank, "world_size": self.world_size, "timeout": COLLECTIVE_TIMEOUT}
        try:
            call_interruptibly(lambda: torch.distributed.init_process_group("gloo", **options))
        except (RuntimeError, ValueError) as error:
            raise CapabilityError(f"process {self.rank} cannot reach the others: {_line(error)}") from None
        atexit.register(_leave)

    def owns(self, group: str) -> bool:
        """Decide whether this rank answers the samples of a group (``Sample.group``), whatever other samples there are.

        Questions about one picture stay together, as models read it once for all of them.
        """
        if not self.is_distributed:
            return True
        hashed = int.from_bytes(hashlib.sha256(group.encode(errors="surrogatepass")).digest()[:8], "big")
        return hashed % self.world_size == self.rank

    def all_gather(self, value: Any) -> list[Any]:
        """Collect a value from every rank, in the order of ranks; all ranks must call this.

        Args:
            value: of plain JSON types.

        Raises:
            PeerFailed: another rank has failed.
            CapabilityError: a process has died.
        """
        if not self.is_distributed:
            return [value]
        self.connect()
        try:
            return [
                json.loads(text) for text in call_interruptibly(lambda: self._gather_bytes(json.dumps(value).encode()))
            ]
        except RuntimeError as error:
            self.stop_if_failed()
            raise CapabilityError(f"a process of the run has gone ({_line(error)})") from None

    def _gather_bytes(self, data: bytes) -> list[bytes]:
        """Collect some bytes from every rank; waits in C++."""
        import torch
        from torch.distributed import all_gather

        text = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        all_gather(sizes, torch.tensor([len(text)]))
        longest = max(int(size) for size in sizes)
        texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.world_size)]
        all_gather(texts, torch.nn.functional.pad(text, (0, longest - len(text))))
        return [bytes(text[: int(size)].tolist()) for text, size in zip(texts, sizes, strict=True)]

    @contextmanager
    def sync_errors(self) -> Iterator[None]:
        """Run a block on every rank, as a barrier: if it fails on one rank, it fails on all; no collectives inside.

        Raises:
            PeerFailed: it has failed on another rank, which reports the error.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            if not self.is_distributed:
                raise
            error = raised
        failed = self.all_gather(error is not None)
        if error is not None and failed.index(True) == self.rank:
            raise error
        if any(failed):
            raise PeerFailed from error

    def check_equal(self, value: Any, what: str) -> None:
        """Check that all ranks have the same value.

        Args:
            value: of plain JSON types.
            what: its name, for the message.

        Raises:
            ConfigError: they differ, on the main process.
            PeerFailed: they differ, on the other ranks.
        """
        values = self.all_gather(value)
        for other_rank, other in enumerate(values):
            if other != values[0]:
                if not self.is_main_process:
                    raise PeerFailed
                raise ConfigError(
                    f"process {other_rank} has another {what} than the first: {json.dumps(other)[:200]} instead of "
                    f"{json.dumps(values[0])[:200]}; all machines need the same files"
                )

    def stop_if_failed(self) -> None:
        """Stop this process if another rank has failed.

        Raises:
            PeerFailed: it has.
        """
        if self.is_distributed and self.stop_file is not None and self.stop_file.exists():
            raise PeerFailed

    def report_failure(self) -> bool:
        """Tell the other ranks to stop; return whether this rank was the first to fail."""
        if not self.is_distributed or self.stop_file is None:
            return True
        try:
            self.stop_file.parent.mkdir(exist_ok=True)
            self.stop_file.touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


class Rendezvous:
    """Connects the ranks of a launch at the address that the launcher has set.

    Args:
        rank: index of this process, from 0.
        world_size: number of processes.
        minutes: how long to wait for all ranks.

    Raises:
        ConfigError: the launcher has not set an address.
    """

    def __init__(self, rank: int, world_size: int, minutes: float) -> None:
        host = os.environ.get("MASTER_ADDR")
        port = env_int("MASTER_PORT", 0)
        if not host or not 0 < port < 65536:
            what = "MASTER_PORT from 1 to 65535" if host else "MASTER_ADDR"
            raise ConfigError(f"WORLD_SIZE={world_size} without {what}, the address where processes meet; {HINT}")
        self.rank, self.world_size, self.minutes, self.host, self.port = rank, world_size, minutes, host, port
        self._started, self._announced = time.monotonic(), False

    def open_store(self) -> Any:
        """Open the key-value store that the main process, or else torchrun, hosts at the address."""
        from torch.distributed import PrefixStore, TCPStore

        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        is_host = self.rank == 0 and not agent
        while not is_host and not self._reachable():
            self._wait([0], "has not been started" if not agent else "cannot be reached")
        options: dict[str, Any] = {"is_master": is_host, "wait_for_workers": False, "multi_tenant": True}
        options["timeout"] = _STORE_TIMEOUT
        try:
            store = call_interruptibly(lambda: TCPStore(self.host, self.port, self.world_size, **options))
        except RuntimeError as error:
            raise CapabilityError(
                f"process {self.rank} cannot use {self.host}:{self.port}, where processes meet: {_line(error)}"
            ) from None
        return PrefixStore(f"stethoscope/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)

    def wait_for_all(self, store: Any) -> None:
        """Wait until all ranks have arrived.

        Args:
            store: of ``open_store``.

        Raises:
            CapabilityError: not all have arrived in time.
        """
        missing = list(range(self.world_size))
        try:
            call_interruptibly(lambda: store.set(f"here/{self.rank}", "1"))
            while missing:
                arrived = call_interruptibly(lambda: [store.check([f"here/{other}"]) for other in missing])  # noqa: B023
                missing = [other for other, present in zip(missing, arrived, strict=True) if not present]
                if missing:
                    self._wait(missing, "has not come")
        except RuntimeError as error:
            raise CapabilityError(f"process 0 has gone before all processes had come ({_line(error)})") from None

    def _reachable(self) -> bool:
        """Try to connect to the address; in Python, because C++ would block signals meanwhile."""
        try:
            socket.create_connection((self.host, self.port), timeout=2).close()
        except OSError:
            return False
        return True

    def _wait(self, missing: Sequence[int], what: str) -> None:
        """Sleep a moment; report the missing ranks once.

        Raises:
            CapabilityError: the time is up.
        """
        ranks = listed([str(other) for other in missing], 8)
        whom = f"process{'es' if len(missing) > 1 else ''} {ranks} of {self.world_size} (numbered from 0)"
        waited = time.monotonic() - self._started
        if waited > 60 * self.minutes:
            raise CapabilityError(
                f"{whom} {what} at {self.host}:{self.port} within {self.minutes:g} minutes; {HINT}, or wait longer "
                "with meeting_minutes="
            )
        if waited > _SILENT and not self._announced:
            self._announced = True
            print(
                f"process {self.rank} waits for {whom} at {self.host}:{self.port}, up to {self.minutes:g} minutes ...",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(_POLL)


def call_interruptibly(call: Callable[[], Any]) -> Any:
    """Call a function that may wait in C++ in a thread, so that this one still handles signals.

    A signal leaves the thread behind; it ends with the process.
    """
    results: list[Any] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(call())
        except BaseException as error:  # raised again by the thread that waits for it
            errors.append(error)

    thread = threading.Thread(target=work, name=_THREAD_NAME, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_POLL)
    if errors:
        raise errors[0]
    return results[0]


def _line(error: BaseException) -> str:
    return one_line(error)[:100]


def _leave() -> None:
    """Close the connection before the interpreter exits: C++ aborts a process in which one of its threads is left."""
    import torch.distributed

    waiting = any(thread.name == _THREAD_NAME for thread in threading.enumerate())
    if torch.distributed.is_initialized() and not waiting:  # closing would wait for the others once more
        torch.distributed.destroy_process_group()


_current: DistributedState | None = None


def current_state() -> DistributedState:
    """Return the state of this process in its launch, always the same object."""
    global _current
    if _current is None or (_current.rank, _current.world_size) != (rank(), world_size()):
        _current = DistributedState(rank(), world_size())
    return _current
