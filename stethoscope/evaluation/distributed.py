"""Several processes that do one run together, as ``torchrun`` and ``accelerate launch`` start them.

Every process answers the samples whose ids fall to it and keeps their records in files of its own in the run directory;
the first process opens the run, puts the files together at its end, and does all that is done once. Between these two
moments nobody waits for anybody, and nothing but short texts is exchanged, on the CPU, so that it does not matter what
devices the models are on.
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
from stethoscope.core.launch import HINT, env_int, rank, world_size

PATIENCE = timedelta(days=30)
"""How long a process that is done waits for the others. Shares of a run may end hours apart. A process that dies is
noticed at once by its closed connection, and a machine that vanishes by the launcher, so this is no watch on them."""


MEETING_MINUTES = 10.0
"""How long the first meeting may take by default. It comes before any model is loaded, so that it takes no longer than
a launcher needs for its last process; variables left over from another launch end here."""

_POLL, _SILENT = 0.1, 3.0  # seconds between two looks, and before it is said whom a process waits for
_STORE_TIMEOUT = timedelta(seconds=60)  # of one question to the table of keys
_WAITING = "stethoscope-waiting"


class Ended(SystemExit):
    """Another process has failed and tells why; this one ends without a word."""

    def __init__(self) -> None:
        super().__init__(2)


class Processes:
    """The processes of a run.

    Attributes:
        rank: number of this process, from 0.
        count: how many there are.
        stop: file by which a process that fails ends the others; None until a run directory has been accepted.
    """

    def __init__(self, rank: int, count: int) -> None:
        """Stores who this is; see ``joined`` for the processes of this launch."""
        self.rank, self.count = rank, count
        self.stop: Path | None = None

    @property
    def several(self) -> bool:
        """Whether there is any other process."""
        return self.count > 1

    @property
    def first(self) -> bool:
        """Whether this process does what is done once."""
        return self.rank == 0

    def meet(self, minutes: float = MEETING_MINUTES) -> None:
        """Connect to the other processes; does nothing where that is done, or there are none.

        Args:
            minutes: how long to wait for all to come.

        Raises:
            CapabilityError: not all have come in time.
            ConfigError: the launcher has not said where to meet.
        """
        if not self.several:
            return
        import torch.distributed

        if torch.distributed.is_initialized():
            return
        meeting = Meeting(self.rank, self.count, minutes)
        store = meeting.store()
        meeting.complete(store)
        options = {"store": store, "rank": self.rank, "world_size": self.count, "timeout": PATIENCE}
        try:
            patiently(lambda: torch.distributed.init_process_group("gloo", **options))
        except (RuntimeError, ValueError) as error:
            raise CapabilityError(f"process {self.rank} cannot reach the others: {_line(error)}") from None
        atexit.register(_leave)

    def takes(self, sample_id: str) -> bool:
        """Whether a sample falls to this process; goes by the id alone, not by order or number of samples."""
        if not self.several:
            return True
        number = int.from_bytes(hashlib.sha256(sample_id.encode(errors="surrogatepass")).digest()[:8], "big")
        return number % self.count == self.rank

    def share(self, value: Any) -> list[Any]:
        """What every process says at this point, in the order of their numbers; all must call it.

        Args:
            value: of plain JSON types.

        Raises:
            Ended: a process has failed.
            CapabilityError: a process has gone.
        """
        if not self.several:
            return [value]
        self.meet()
        try:
            return [json.loads(text) for text in patiently(lambda: self._gather(json.dumps(value).encode()))]
        except RuntimeError as error:
            self.check()
            raise CapabilityError(f"a process of the run has gone ({_line(error)})") from None

    def _gather(self, data: bytes) -> list[bytes]:
        """Exchange some bytes with all others; waits in C++."""
        import torch
        from torch.distributed import all_gather

        text = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
        all_gather(sizes, torch.tensor([len(text)]))
        longest = max(int(size) for size in sizes)
        texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.count)]
        all_gather(texts, torch.nn.functional.pad(text, (0, longest - len(text))))
        return [bytes(text[: int(size)].tolist()) for text, size in zip(texts, sizes, strict=True)]

    @contextmanager
    def step(self) -> Iterator[None]:
        """A block that fails for all processes if it fails for one, whose error is told; nothing is shared within.

        Raises:
            Ended: it has failed for another process, which tells why.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            if not self.several:
                raise
            error = raised
        failed = self.share(error is not None)
        if error is not None and failed.index(True) == self.rank:
            raise error
        if any(failed):
            raise Ended from error

    def same(self, value: Any, what: str) -> None:
        """Checks that all processes agree.

        Raises:
            ConfigError: they do not.
            Ended: the first process tells of it.
        """
        values = self.share(value)
        for number, other in enumerate(values):
            if other != values[0]:
                if not self.first:
                    raise Ended
                raise ConfigError(
                    f"process {number} has another {what} than the first: {json.dumps(other)[:200]} instead of "
                    f"{json.dumps(values[0])[:200]}; all machines need the same files"
                )

    def check(self) -> None:
        """Ends this process when another one has failed.

        Raises:
            Ended: it has.
        """
        if self.several and self.stop is not None and self.stop.exists():
            raise Ended

    def fail(self) -> bool:
        """Ends the other processes soon; whether this one was the first to fail."""
        if not self.several or self.stop is None:
            return True
        try:
            self.stop.parent.mkdir(exist_ok=True)
            self.stop.touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


class Meeting:
    """The first meeting of all processes of a launch, at the address that the launcher has given them."""

    def __init__(self, rank: int, count: int, minutes: float) -> None:
        """Read the address.

        Raises:
            ConfigError: the launcher has set none.
        """
        host = os.environ.get("MASTER_ADDR")
        port = env_int("MASTER_PORT", 0)
        if not host or not 0 < port < 65536:
            what = "MASTER_PORT from 1 to 65535" if host else "MASTER_ADDR"
            raise ConfigError(f"WORLD_SIZE={count} without {what}, the place where processes meet; {HINT}")
        self.rank, self.count, self.minutes, self.host, self.port = rank, count, minutes, host, port
        self._begun, self._announced = time.monotonic(), False

    def store(self) -> Any:
        """Open the table of keys that the first process, or else torchrun, keeps at the address."""
        from torch.distributed import PrefixStore, TCPStore

        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        keeps = self.rank == 0 and not agent
        while not keeps and not self._reachable():
            self._wait([0], "has not been started" if not agent else "cannot be reached")
        options = {"is_master": keeps, "wait_for_workers": False, "multi_tenant": True, "timeout": _STORE_TIMEOUT}
        try:
            table = patiently(lambda: TCPStore(self.host, self.port, self.count, **options))
        except RuntimeError as error:
            raise CapabilityError(
                f"process {self.rank} cannot use {self.host}:{self.port}, the place of the meeting: {_line(error)}"
            ) from None
        return PrefixStore(f"stethoscope/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", table)

    def complete(self, store: Any) -> None:
        """Wait until all processes have come.

        Raises:
            CapabilityError: not all have come in time.
        """
        missing = list(range(self.count))
        try:
            patiently(lambda: store.set(f"here/{self.rank}", "1"))
            while missing:
                here = patiently(lambda: [store.check([f"here/{other}"]) for other in missing])  # noqa: B023
                missing = [other for other, present in zip(missing, here, strict=True) if not present]
                if missing:
                    self._wait(missing, "has not come")
        except RuntimeError as error:
            raise CapabilityError(f"process 0 has gone before all processes had come ({_line(error)})") from None

    def _reachable(self) -> bool:
        """Whether somebody listens at the address; asked by Python, as C++ would be deaf to signals meanwhile."""
        try:
            socket.create_connection((self.host, self.port), timeout=2).close()
        except OSError:
            return False
        return True

    def _wait(self, missing: Sequence[int], what: str) -> None:
        """Wait a moment; say once whom for.

        Raises:
            CapabilityError: the time is up.
        """
        shown = ", ".join(map(str, missing[:8])) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        whom = f"process{'es' if len(missing) > 1 else ''} {shown} of {self.count} (numbered from 0)"
        waited = time.monotonic() - self._begun
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


def patiently(call: Callable[[], Any]) -> Any:
    """Call something that may wait in C++, in a thread, so that this one hears signals meanwhile.

    A signal leaves the thread behind; it ends with the process.
    """
    outcome: list[Any] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            outcome.append(call())
        except BaseException as error:  # raised again by the thread that waits for it
            errors.append(error)

    thread = threading.Thread(target=work, name=_WAITING, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_POLL)
    if errors:
        raise errors[0]
    return outcome[0]


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:100]


def _leave() -> None:
    """Ends the connection's threads before the interpreter goes: C++ aborts a process in which one is left."""
    import torch.distributed

    waiting = any(thread.name == _WAITING for thread in threading.enumerate())
    if torch.distributed.is_initialized() and not waiting:  # which would wait for the others once more
        torch.distributed.destroy_process_group()


_joined: Processes | None = None


def joined() -> Processes:
    """The processes of this launch."""
    global _joined
    if _joined is None or (_joined.rank, _joined.count) != (rank(), world_size()):
        _joined = Processes(rank(), world_size())
    return _joined
