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
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

from stethoscope.errors import CapabilityError, ConfigError

PATIENCE = timedelta(days=30)
"""How long a process that is done waits for the others. Shares of a run may end hours apart. A process that dies is
noticed at once by its closed connection, and a machine that vanishes by the launcher, so this is no watch on them."""


def count() -> int:
    """How many processes were started together, by their launcher's word; 1 without one."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def rank() -> int:
    """Number of this process among those, from 0."""
    return int(os.environ.get("RANK") or 0) if count() > 1 else 0


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

    @cached_property
    def _group(self) -> Any:
        """The connection to the others.

        Raises:
            CapabilityError: there is none.
        """
        from accelerate import PartialState

        try:
            PartialState(cpu=True, backend="gloo", timeout=PATIENCE)
        except (RuntimeError, ValueError) as error:
            raise CapabilityError(f"process {self.rank} of {self.count} cannot reach the others: {error}") from None
        import torch.distributed

        atexit.register(_leave)
        return torch.distributed

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
        import torch

        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        try:
            sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
            self._group.all_gather(sizes, torch.tensor([len(text)]))
            longest = max(int(size) for size in sizes)
            texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.count)]
            self._group.all_gather(texts, torch.nn.functional.pad(text, (0, longest - len(text))))
        except RuntimeError as error:
            self.check()
            raise CapabilityError(f"a process of the run has gone ({str(error).splitlines()[0][:80]})") from None
        return [json.loads(bytes(one[: int(size)].tolist())) for one, size in zip(texts, sizes, strict=True)]

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


def _leave() -> None:
    """Ends the connection's threads before the interpreter goes: C++ aborts a process in which one is left."""
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


_joined: Processes | None = None


def joined() -> Processes:
    """The processes of this launch."""
    global _joined
    if _joined is None or (_joined.rank, _joined.count) != (rank(), count()):
        _joined = Processes(rank(), count())
    return _joined
