"""Call slow methods, such as those of a network service, in a thread of their own."""

from __future__ import annotations

import queue
import threading
from typing import Any

MAX_WAITING = 10_000
"""Maximum number of waiting calls; a service with a longer queue is taken to be dead."""


class Background:
    """Calls the methods of one object, one after the other, in a thread.

    The thread does not keep the process alive. Errors of a method are stored for ``error``, and later calls are still
    made.
    """

    def __init__(self, target: object) -> None:
        """Store the object; the thread starts with the first call."""
        self._target = target
        self._calls: queue.Queue[tuple[str, tuple[Any, ...]] | None] = queue.Queue(MAX_WAITING)
        self._errors: queue.SimpleQueue[tuple[str, Exception]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._given_up = False

    def send(self, method: str, *arguments: Any) -> None:
        """Queue the call of a method; it is dropped if the object has been given up.

        Args:
            method: name of the method.
            arguments: of the call.

        Raises:
            TimeoutError: too many calls are waiting; the object is given up.
        """
        if self._given_up:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=type(self._target).__name__, daemon=True)
            self._thread.start()
        try:
            self._calls.put_nowait((method, arguments))
        except queue.Full:
            self._given_up = True
            raise TimeoutError(f"{MAX_WAITING} calls are waiting") from None

    def wait(self, seconds: float) -> None:
        """Wait until all calls have been made; the next ``send`` starts a new thread.

        Raises:
            TimeoutError: it takes more than ``seconds``; the object is given up.
        """
        if self._thread is None or self._given_up:
            return
        self._calls.put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._given_up = True
            raise TimeoutError(f"not done within {seconds:g} s")
        self._thread = None

    def error(self) -> tuple[str, Exception] | None:
        """Return the name and error of the next method that failed; None without one."""
        try:
            return self._errors.get_nowait()
        except queue.Empty:
            return None

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            method, arguments = call
            try:
                getattr(self._target, method)(*arguments)
            except Exception as error:
                self._errors.put((method, error))
