"""Calls to something slow, such as a service on the network, that a run must not wait for."""

from __future__ import annotations

import queue
import threading
from typing import Any

WAITING = 10_000
"""So many calls may wait; a service that is behind by more is not coming back."""


class Background:
    """Calls the methods of one object, one after the other, in a thread of its own.

    The thread does not keep a process alive. What a method raises is kept for whoever asks; the calls behind it are
    made all the same.
    """

    def __init__(self, target: object) -> None:
        """Stores the object; the thread starts with the first call."""
        self._target = target
        self._calls: queue.Queue[tuple[str, tuple[Any, ...]] | None] = queue.Queue(WAITING)
        self._errors: queue.SimpleQueue[tuple[str, Exception]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lost = False

    def send(self, method: str, *arguments: Any) -> None:
        """Has a method called later, or never if the object has been given up.

        Raises:
            TimeoutError: too many calls are waiting; the object is given up.
        """
        if self._lost:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=type(self._target).__name__, daemon=True)
            self._thread.start()
        try:
            self._calls.put_nowait((method, arguments))
        except queue.Full:
            self._lost = True
            raise TimeoutError(f"{WAITING} calls are waiting") from None

    def wait(self, seconds: float) -> None:
        """Waits until all calls have been made; the next ``send`` begins anew.

        Raises:
            TimeoutError: it takes longer; the object is given up.
        """
        if self._thread is None or self._lost:
            return
        self._calls.put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._lost = True
            raise TimeoutError(f"not done within {seconds:g} s")
        self._thread = None

    def error(self) -> tuple[str, Exception] | None:
        """The next method that failed, with what it raised; None if there is none."""
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
