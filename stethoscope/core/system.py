"""Handle errors of memory, disk and models, signals, closed pipes and the launcher's ranks."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO

from stethoscope.core.errors import CapabilityError, ConfigError, DataError, StethoscopeError

_MEMORY_PHRASES = (
    "out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory", "alloc_failed",
)  # fmt: skip
_DISK_ERRORS = {
    errno.ENOSPC: "no space left",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file exceeds the allowed size",
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EIO: "the disk failed",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.ENAMETOOLONG: "the name is too long",
}


class Terminated(KeyboardInterrupt):
    """The process received SIGTERM, as Slurm sends it before a job's time limit."""


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error means out of memory, on any device, raised by any library.

    >>> out_of_memory(MemoryError()), out_of_memory(RuntimeError("CUDA out of memory. Tried to ..."))
    (True, True)
    >>> out_of_memory(ValueError("out of memory"))
    False
    """
    torch = sys.modules.get("torch")
    if isinstance(error, (MemoryError, *([torch.OutOfMemoryError] if torch else []))):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error).lower() for phrase in _MEMORY_PHRASES)


def free_memory() -> None:
    """Release unreachable objects and torch's cached blocks."""
    gc.collect()
    if (on_gpu := _torch_on_gpu()) is not None:
        on_gpu.cuda.empty_cache()
    torch = sys.modules.get("torch")
    if torch is not None and torch.backends.mps.is_available():
        torch.mps.empty_cache()


@contextmanager
def rare_collections(objects: int = 20_000) -> Iterator[None]:
    """Look for unreachable objects less often within the block: after ``objects`` new ones, not 700.

    Only for steps in which no unreachable object holds a tensor.
    """
    thresholds = gc.get_threshold()
    gc.set_threshold(objects, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)


def _torch_on_gpu() -> Any | None:
    """Return torch if it is imported and has begun to use a GPU."""
    torch = sys.modules.get("torch")
    in_use = torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized()
    return torch if in_use else None


def reset_peak_memory() -> None:
    """Let ``peak_memory`` count from now on, without what was in use before and is free again."""
    free_memory()
    if (torch := _torch_on_gpu()) is not None:
        torch.cuda.reset_peak_memory_stats()
        return
    return_memory()
    with suppress(OSError):  # another system than Linux
        Path("/proc/self/clear_refs").write_text("5")


def return_memory() -> None:
    """Return freed memory to the system, which the C library would keep.

    Pillow alone holds blocks of 16 MiB.
    """
    with suppress(AttributeError, OSError, TypeError):  # only glibc has this function
        ctypes.CDLL(None).malloc_trim(0)


def peak_memory() -> int | None:
    """Return the largest memory since ``reset_peak_memory``, in bytes.

    It is torch's on a GPU, else that of the process.

    None where the system does not tell, or cannot count anew.
    """
    if (torch := _torch_on_gpu()) is not None:
        return int(torch.cuda.max_memory_allocated())
    with suppress(OSError):
        status = Path("/proc/self/status").read_text()
        if peak := re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE):
            return 1024 * int(peak[1])
    return None


def raised_here(error: BaseException) -> bool:
    """Return whether an error was raised in this package's own code, by its innermost frame."""
    names = [frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(names) and str(names[-1]).partition(".")[0] == "stethoscope"


@dataclass(frozen=True)
class ModelFaults(AbstractContextManager[None]):
    """Turns errors of a model, processor or template within the block into one line.

    Errors of this package's own code and lack of memory pass unchanged.

    Args:
        failing: what fails; the start of the message.
        kind: of the error to raise.
    """

    failing: str
    kind: type[StethoscopeError] = DataError

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        """Raise an error of ``kind`` for one that comes from foreign code, which may raise anything."""
        if not isinstance(error, Exception) or isinstance(error, StethoscopeError):
            return
        if not raised_here(error) and not out_of_memory(error):
            raise self.kind(f"{self.failing}: {describe_error(error)}") from error


def describe_error(error: BaseException) -> str:
    """Describe an error in one line: its type and message, at most 300 characters.

    >>> describe_error(KeyError("image")), describe_error(NotImplementedError())
    ("KeyError: 'image'", 'NotImplementedError')
    """
    text = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")
    return text if len(text) <= 300 else text[:297] + "..."


@contextmanager
def _signal_handlers(handlers: Mapping[int, Any]) -> Iterator[None]:
    """Set the handlers of signals, by their numbers, within the block.

    In threads but the main one nothing is set.
    """
    if threading.current_thread() is not threading.main_thread():  # signals can only be handled there
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def default_signals() -> AbstractContextManager[None]:
    """Let Ctrl-C and SIGTERM end the process at once within the block.

    They do so even while a C function never returns.

    Only for steps before anything has begun that should be ended properly.
    """
    return _signal_handlers(dict.fromkeys((signal.SIGINT, signal.SIGTERM), signal.SIG_DFL))


def ended_by_signal() -> AbstractContextManager[None]:
    """Let SIGTERM end a run within the block as Ctrl-C does: flushed and marked as interrupted.

    SIGINT is handled even where it was ignored, as shells do for background jobs of a script. The block ends with
    ``Terminated`` when SIGTERM arrives.
    """

    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise Terminated

    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    return _signal_handlers({signal.SIGTERM: end, **({signal.SIGINT: signal.default_int_handler} if ignored else {})})


@contextmanager
def disk_faults(folder: Path | None = None) -> Iterator[None]:
    """Turn errors of the disk into a ``CapabilityError`` of one line.

    Args:
        folder: named in the message where the error names no file.

    Raises:
        CapabilityError: the disk is full, cannot be written to, or fails.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        path = error.filename if isinstance(error.filename, str) else folder or os.curdir
        raise CapabilityError(
            f"{path} cannot be written or read: {_DISK_ERRORS[error.errno]}; the results so far are kept; "
            "fix this and run the same command again to resume"
        ) from error


class _Output:
    """A text stream that discards what is written to it once its reader has gone."""

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
        """Redirect the stream, and what is in its buffer, to the null device."""
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)


@contextmanager
def tolerate_closed_output() -> Iterator[None]:
    """Let a command finish its work when the reader of its output has gone, as after ``| head -1``.

    After an error of ours the streams stay wrapped, as its traceback is still to be printed.
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
        except OSError:  # reported before; the interpreter would fail again at exit
            stream.discard()
    sys.stdout, sys.stderr = streams


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
