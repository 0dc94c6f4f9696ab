"""Handle out-of-memory errors, disk errors, signals, closed pipes, and errors of models and processors."""

from __future__ import annotations

import errno
import gc
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO

from stethoscope.core.errors import CapabilityError, DataError, StethoscopeError

_MEMORY_WORDS = (
    "out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory", "alloc_failed",
)  # fmt: skip
_DISK = {
    errno.ENOSPC: "no space left",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file grew larger than is allowed",
    errno.EROFS: "the disk can only be read",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EIO: "the disk failed",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.ENAMETOOLONG: "the name is too long",
}


class Terminated(KeyboardInterrupt):
    """The process was asked to end, as Slurm does before the time of a job is up."""


def out_of_memory(error: BaseException) -> bool:
    """Whether memory did not suffice, of whichever device, by whatever library's words.

    >>> out_of_memory(MemoryError()), out_of_memory(RuntimeError("CUDA out of memory. Tried to ..."))
    (True, True)
    >>> out_of_memory(ValueError("out of memory"))
    False
    """
    torch = sys.modules.get("torch")
    if isinstance(error, (MemoryError, *([torch.OutOfMemoryError] if torch else []))):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _MEMORY_WORDS)


def free_memory() -> None:
    """Gives back what is held without need: unreachable objects, and blocks that torch keeps for later."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is None:
        return
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def own_fault(error: BaseException) -> bool:
    """Tell whether an error was raised in this package's own code: by its innermost frame."""
    names = [frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(names) and str(names[-1]).partition(".")[0] == "stethoscope"


@contextmanager
def model_faults(failing: str, kind: type[StethoscopeError] = DataError) -> Iterator[None]:
    """Turn what a model, processor, tokenizer or template raises into an error of one line.

    What this package's own code raises stays as it is, and so does a lack of memory.

    Args:
        failing: begins the line: what fails.
        kind: of the error.

    Raises:
        StethoscopeError: of that kind.
    """
    try:
        yield
    except StethoscopeError:
        raise
    except Exception as error:  # their code may raise anything
        if own_fault(error) or out_of_memory(error):
            raise
        raise kind(f"{failing}: {reason(error)}") from error


def reason(error: BaseException, most: int = 300) -> str:
    """Describe an error in one line: its type and its own words.

    >>> reason(KeyError("image")), reason(NotImplementedError())
    ("KeyError: 'image'", 'NotImplementedError')
    """
    text = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")
    return text if len(text) <= most else text[: most - 3] + "..."


@contextmanager
def deadly_signals() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the process at once, also where a C function of others never returns.

    Only for steps before which nothing is begun that should be ended properly.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def disk_faults(folder: Path | None = None) -> Iterator[None]:
    """Makes one line of what a disk refuses.

    Args:
        folder: what to name where the error names no file.

    Raises:
        CapabilityError: the disk is full, cannot be written to, or fails.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK:
            raise
        where = error.filename if isinstance(error.filename, str) else folder or os.curdir
        raise CapabilityError(
            f"{where} cannot be written or read: {_DISK[error.errno]}; what was done so far is kept, "
            "once this is mended the same command goes on from there"
        ) from error


@contextmanager
def ended_by_signal() -> Iterator[None]:
    """Let SIGTERM end a run like Ctrl-C does: flushed and marked as interrupted.

    SIGINT is heard too where it was ignored: a shell does that to what a script starts in the background.

    Raises:
        Terminated: the signal came.
    """

    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():  # only there can signals be caught
        yield
        return
    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, end)}
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Output:
    """A stream of text that takes what is written to it, whether or not somebody still reads at its other end."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self.discard()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self.discard()

    def discard(self) -> None:
        """Send what comes, and what waits in the buffer, nowhere."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


@contextmanager
def unread_output() -> Iterator[None]:
    """Let a command go on with its work when the reader of its output has gone, as after ``| head -1``.

    After an error of ours the streams stay as they are: its traceback is still to be printed.
    """
    streams = sys.stdout, sys.stderr
    wrapped = tuple(stream if stream is None else _Output(stream) for stream in streams)
    sys.stdout, sys.stderr = wrapped
    try:
        yield
    except Exception:
        raise
    except BaseException:
        _restore(streams, wrapped)
        raise
    _restore(streams, wrapped)


def _restore(streams: tuple[Any, Any], wrapped: tuple[Any, ...]) -> None:
    for stream in filter(None, wrapped):
        try:
            stream.flush()
        except OSError:  # said before; the interpreter would fail again while it ends
            stream.discard()
    sys.stdout, sys.stderr = streams
