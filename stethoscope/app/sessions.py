"""Store the answer and the pictures of every session, and delete them when the session ends.

A session belongs to a ``session_hash`` that Gradio draws when a page is opened. It ends ``GRACE`` seconds after its
last connection is closed, or after ``IDLE`` seconds without a question.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from stethoscope.app.access import API, respond
from stethoscope.core.errors import DataError
from stethoscope.core.system import return_memory

if TYPE_CHECKING:
    from stethoscope.app.answer import AnswerSession

logger = logging.getLogger(__name__)

GRACE = 60.0
"""Seconds from the last connection to the end of a session, and from an upload without a session to its deletion."""
IDLE = 3600.0
"""Seconds without a question after which a session ends although its page is open."""
MAX_SESSIONS = 256
MAX_CONNECTIONS = 512
"""Open event streams; a page holds up to two."""
MAX_PENDING = 8
"""Questions of one session that wait for the model, or have an answer that the page has not read."""
MAX_UPLOAD = 32 * 2**20
"""Bytes of one uploaded picture."""
MAX_SESSION_FILES, MAX_SESSION_BYTES = 8, 64 * 2**20
"""Pictures of one session; with more, its oldest are deleted."""
MAX_UNCLAIMED_BYTES, MAX_TOTAL_BYTES, MAX_TOTAL_FILES = 256 * 2**20, 2**30, 2000
"""Uploads that belong to no session yet, and all uploads; with more, uploads are refused."""
NO_PICTURE = "this picture is not on the server, or not any more: upload it again, or choose an example"

_MAX_BODY = 256 * 2**10  # bytes of a question with its settings
_OVERHEAD = 64 * 2**10  # bytes of a multipart request around its file
_TRANSFER_SECONDS = 120.0  # in which an upload or a question must have arrived
_SESSION_HASH = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass
class Session:
    """The state of one open page.

    Attributes:
        last_used: time of its last question or connection, in seconds of the clock of the sessions.
        conversation: answers about the picture that is shown, the oldest first.
        files: its pictures, the oldest first.
        answered: set once nothing more of its last question is computed; None before the first.
    """

    last_used: float
    conversation: tuple[AnswerSession, ...] = ()
    files: list[Path] = field(default_factory=list)
    answered: threading.Event | None = None


class Sessions:
    """All sessions of one server, and the folder of their pictures.

    Args:
        folder: the app's own.
        grace: see ``GRACE``.
        idle: see ``IDLE``.
        clock: returns the seconds of a monotonic clock.
    """

    def __init__(
        self,
        folder: Path,
        grace: float = GRACE,
        idle: float = IDLE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder = folder.resolve()
        self.grace, self._idle, self._clock = grace, idle, clock
        self._sessions: dict[str, Session] = {}
        self._connections: Counter[str] = Counter()  # open event streams, also of pages whose session has ended
        self._lock = threading.RLock()
        self._shared: frozenset[Path] = frozenset()
        self._arriving = 0  # bytes of uploads that are on their way

    def __len__(self) -> int:
        return len(self._sessions)

    def share_files(self) -> None:
        """Share the files that are in the folder now (examples) with all sessions, and never delete them."""
        self._shared = frozenset(self._files())

    def own_file(self, path: object) -> Path:
        """Resolve a path that a request names.

        Raises:
            DataError: it is no file of the app's own folder; the message does not reveal what else it may be.
        """
        try:
            file = Path(str(path)).resolve()
            if isinstance(path, str) and file.is_relative_to(self.folder) and file.is_file():
                return file
        except (OSError, ValueError, RuntimeError):  # a name that is too long, a null byte, a loop of links
            pass
        raise DataError(NO_PICTURE)

    def use(self, session_hash: str, files: Sequence[Path] = ()) -> None:
        """Record a question of a session, and assign files to the session; its oldest files may be dropped."""
        new_files = [file for file in map(Path.resolve, files) if file not in self._shared]
        with self._lock:
            session = self._get(session_hash)
            session.files = [*(file for file in session.files if file not in new_files), *dict.fromkeys(new_files)]
            while len(session.files) > 1 and (
                len(session.files) > MAX_SESSION_FILES or sum(map(_size, session.files)) > MAX_SESSION_BYTES
            ):
                session.files.pop(0)

    def set_conversation(self, session_hash: str, conversation: Sequence[AnswerSession]) -> None:
        """Store the answers of a session, in place of earlier ones."""
        with self._lock:
            self._get(session_hash).conversation = tuple(conversation)

    def conversation(self, session_hash: str) -> tuple[AnswerSession, ...]:
        """Return the answers of a session, the oldest first; none if it has ended."""
        session = self._sessions.get(session_hash)
        return () if session is None else session.conversation

    @contextmanager
    def answering(self, session_hash: str) -> Iterator[None]:
        """Record that a question of a session is being answered inside the ``with`` block."""
        answered = threading.Event()
        with self._lock:
            self._get(session_hash).answered = answered
        try:
            yield
        finally:
            answered.set()

    def wait_until_answered(self, session_hash: str, seconds: float) -> bool:
        """Wait until no question of a session is being answered; return whether it is so.

        It waits at most ``seconds``.
        """
        session = self._sessions.get(session_hash)
        return session is None or session.answered is None or session.answered.wait(seconds)

    @contextmanager
    def connection(self, session_hash: str) -> Iterator[None]:
        """Count an open event stream of a session inside the ``with`` block."""
        with self._lock:
            self._get(session_hash)
            self._connections[session_hash] += 1
        try:
            yield
        finally:
            with self._lock:
                self._connections -= Counter([session_hash])
                if session_hash in self._sessions:
                    self._get(session_hash)

    @property
    def connections(self) -> int:
        """Count the open event streams of all sessions."""
        return self._connections.total()

    @contextmanager
    def upload(self, size: int) -> Iterator[str | None]:
        """Reserve space for an upload inside the ``with`` block.

        Args:
            size: of the upload, in bytes.

        Yields:
            None, or the reason why the upload is refused.
        """
        claimed = self._claimed()
        sizes = {file: _size(file) for file in self._files() if file not in self._shared}
        unclaimed = sum(size for file, size in sizes.items() if file not in claimed) + self._arriving + size
        full = len(sizes) >= MAX_TOTAL_FILES or sum(sizes.values()) + self._arriving + size > MAX_TOTAL_BYTES
        if full or unclaimed > MAX_UNCLAIMED_BYTES:
            yield "the server holds as many pictures as it can: try again in some minutes"
            return
        self._arriving += size
        try:
            yield None
        finally:
            self._arriving -= size

    def expire(self) -> list[str]:
        """Remove the sessions that have ended and the files of no session; return the hashes of the sessions."""
        now = self._clock()
        with self._lock:
            ended = [
                name
                for name, session in self._sessions.items()
                if now - session.last_used > (self._idle if self._connections[name] else self.grace)
            ]
            closed = [name for name in self._sessions if not self._connections[name] and name not in ended]
            closed.sort(key=lambda name: self._sessions[name].last_used)
            ended += closed[: max(0, len(self._sessions) - len(ended) - MAX_SESSIONS)]
            for name in ended:
                del self._sessions[name]
        used = self._claimed() | self._shared
        age = max(self.grace, _TRANSFER_SECONDS) if self._arriving else self.grace  # an upload may be half written
        for file in self._files():
            if file not in used and time.time() - _modified(file) > age:
                file.unlink(missing_ok=True)
                if file.parent != self.folder:
                    with suppress(OSError):  # the folder holds another file
                        file.parent.rmdir()
        return ended

    def _get(self, session_hash: str) -> Session:
        session = self._sessions.setdefault(session_hash, Session(self._clock()))
        session.last_used = self._clock()
        return session

    def _claimed(self) -> set[Path]:
        with self._lock:
            return {file for session in self._sessions.values() for file in session.files}

    def _files(self) -> list[Path]:
        return [file for file in self.folder.rglob("*") if file.is_file()]


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # deleted by now
        return 0


def _modified(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:  # deleted by now
        return time.time()


class SessionMiddleware:
    """ASGI middleware that limits questions, uploads and event streams, and ends sessions.

    Args:
        app: the next ASGI application.
        sessions: of the server.
        release: deletes Gradio's data of a session that has ended.
        count_pending: counts the questions of a session that wait, or have an answer that the page has not read.
    """

    def __init__(
        self,
        app: Any,
        sessions: Sessions,
        release: Callable[[str], Awaitable[None]],
        count_pending: Callable[[str], int],
    ) -> None:
        self.app, self._sessions, self._release, self._count_pending = app, sessions, release, count_pending
        self._expiry: asyncio.Task[None] | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request, or hand it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if self._expiry is None:
            self._expiry = asyncio.create_task(self._expire())
        path = scope["path"]
        try:
            if path == f"{API}/queue/join":
                async with asyncio.timeout(_TRANSFER_SECONDS):
                    receive = await self._check_question(receive)
                await self.app(scope, receive, send)
            elif path == f"{API}/upload":
                await self._upload(scope, receive, send)
            elif path == f"{API}/queue/data":
                name = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])[0]
                await self._stream(name, scope, receive, send)
            elif path.startswith(f"{API}/heartbeat/"):
                await self._stream(path.rpartition("/")[2], scope, receive, send)
            elif path.startswith(f"{API}/file="):  # Gradio would fetch URLs, and reveal which paths exist
                self._check_files([path.partition("=")[2]])
                await self.app(scope, receive, send)
            else:
                await self.app(scope, receive, send)
        except _Refused as refusal:
            await respond(send, refusal.status, str(refusal))
        except TimeoutError:
            await respond(send, 408, f"the request did not arrive within {_TRANSFER_SECONDS:g} seconds")

    async def _stream(self, session_hash: str, scope: Any, receive: Any, send: Any) -> None:
        _check_hash(session_hash)
        if self._sessions.connections >= MAX_CONNECTIONS:
            raise _Refused(503, "too many pages are open: try again later")
        with self._sessions.connection(session_hash):
            await self.app(scope, receive, send)

    async def _check_question(self, receive: Any) -> Any:
        """Check the body of a question before Gradio opens, copies or fetches the files that it names.

        Returns:
            A ``receive`` that replays the body for Gradio.

        Raises:
            _Refused: the body is too long or malformed, names a file outside the app's folder, or too many wait.
        """
        content, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _Refused(400, "the question did not arrive")
            content += message.get("body", b"")
            more = message.get("more_body", False)
            if len(content) > _MAX_BODY:
                raise _Refused(413, f"the question is too long: {_MAX_BODY // 1024} KiB are read")
        try:
            body = json.loads(content)
            paths = list(_paths(body))
        except (ValueError, RecursionError):
            raise _Refused(400, "the question is no JSON") from None
        if not isinstance(body, dict):
            raise _Refused(400, "the question is no JSON object")
        session_hash = _check_hash(body.get("session_hash"))
        if self._count_pending(session_hash) >= MAX_PENDING:
            raise _Refused(429, f"{MAX_PENDING} questions of this page wait already: let them be answered first")
        self._sessions.use(session_hash, self._check_files(paths))

        async def replay() -> Any:
            nonlocal content
            if content:
                message = {"type": "http.request", "body": content, "more_body": False}
                content = b""
                return message
            return await receive()

        return replay

    def _check_files(self, paths: Sequence[object]) -> list[Path]:
        try:
            return [self._sessions.own_file(path) for path in paths]
        except DataError as error:
            raise _Refused(403, str(error)) from None

    async def _upload(self, scope: Any, receive: Any, send: Any) -> None:
        length = dict(scope["headers"]).get(b"content-length", b"").decode("latin-1")
        if not length.isdecimal():
            raise _Refused(411, "an upload must say how long it is")
        if int(length) > MAX_UPLOAD + _OVERHEAD:
            raise _Refused(413, f"the picture is too large: {MAX_UPLOAD // 2**20} MiB are read")
        with self._sessions.upload(int(length)) as refusal:
            if refusal is not None:
                raise _Refused(507, refusal)
            async with asyncio.timeout(_TRANSFER_SECONDS):
                await self.app(scope, receive, send)

    async def _expire(self) -> None:
        """Remove ended sessions regularly, as long as the server runs."""
        while True:
            await asyncio.sleep(min(10.0, self._sessions.grace / 2))
            try:
                ended = self._sessions.expire()
                for session_hash in ended:
                    await self._release(session_hash)
                if ended:
                    return_memory()
            except Exception:  # a bug of ours, which must not keep later sessions from ending
                logger.exception("ending sessions failed")


class _Refused(Exception):
    """A request that is refused, with a status and one line."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def _check_hash(session_hash: object) -> str:
    if not isinstance(session_hash, str) or not _SESSION_HASH.fullmatch(session_hash):
        raise _Refused(400, "session_hash should be letters, digits, - and _")
    return session_hash


def _paths(value: Any) -> Iterator[Any]:
    """Yield every ``path`` of the dictionaries in a body, except None (a component without a file)."""
    if isinstance(value, dict):
        if value.get("path") is not None:
            yield value["path"]
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _paths(item)
