"""Sessions of the page: the answer that each looks at, its pictures in the app's own folder, and when they go.

A session is Gradio's: a ``session_hash`` that a page draws when it is opened. It lives as long as one of its
connections is open, and ``GRACE`` seconds longer; one that asks nothing for ``IDLE`` seconds is forgotten too.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import re
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from stethoscope.app.access import API, respond
from stethoscope.core.errors import DataError

if TYPE_CHECKING:
    from stethoscope.app.answer import AnswerSession

logger = logging.getLogger(__name__)

GRACE = 60.0
"""Seconds that a session outlives its last connection, and that an upload nobody has named yet is kept."""
IDLE = 3600.0
"""Seconds without a question after which a session is forgotten even though its page is open."""
MAX_SESSIONS = 256
MAX_CONNECTIONS = 512
"""Open event streams; a page holds up to two."""
MAX_PENDING = 8
"""Questions of one session that may wait, or whose answers it has not read."""
MAX_UPLOAD = 32 * 2**20
"""Bytes of one uploaded picture."""
MAX_SESSION_FILES, MAX_SESSION_BYTES = 8, 64 * 2**20
"""Pictures that one session keeps: with more, its oldest go."""
MAX_UNCLAIMED_BYTES, MAX_TOTAL_BYTES, MAX_TOTAL_FILES = 256 * 2**20, 2**30, 2000
"""Uploads that no session has named yet, and all together: with more, uploads are refused."""
NO_PICTURE = "this picture is not on the server, or not any more: upload it again, or choose an example"

_MAX_BODY = 256 * 2**10  # bytes of a question with its settings
_OVERHEAD = 64 * 2**10  # bytes of a multipart request around its file
_TRANSFER_SECONDS = 120.0  # in which an upload or a question must have arrived
_SESSION_HASH = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass
class Session:
    """What is kept for one open page.

    Attributes:
        last_used: when it last asked something or was connected, by the clock of the sessions.
        connections: event streams that are open.
        answer: that it looks at.
        files: its pictures, the oldest first.
    """

    last_used: float
    connections: int = 0
    answer: AnswerSession | None = None
    files: list[Path] = field(default_factory=list)


class Sessions:
    """All sessions of one server, and the folder of their pictures.

    Args:
        folder: the app's own, whose files (examples) at the time of ``serve`` are for everybody.
        grace: see ``GRACE``. ``idle``: see ``IDLE``.
        clock: seconds of a monotonic clock.
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
        self._lock = threading.RLock()
        self._shared: frozenset[Path] = frozenset()
        self._arriving = 0  # bytes of uploads that are on their way

    def __len__(self) -> int:
        return len(self._sessions)

    def share_files(self) -> None:
        """Take what lies in the folder now for examples, which every session may name and which stay."""
        self._shared = frozenset(self._files())

    def own_file(self, path: object) -> Path:
        """Resolve a path that a request names.

        Raises:
            DataError: it is no file of the app's own folder; the message is the same whatever else it may be.
        """
        try:
            file = Path(str(path)).resolve()
            if isinstance(path, str) and file.is_relative_to(self.folder) and file.is_file():
                return file
        except (OSError, ValueError, RuntimeError):  # too long a name, a null byte, a loop of links
            pass
        raise DataError(NO_PICTURE)

    def use(self, session_hash: str, files: Sequence[Path] = ()) -> None:
        """Note that a session asks something, and keep files for as long as it lives or until it has newer ones."""
        named = [file for file in map(Path.resolve, files) if file not in self._shared]
        with self._lock:
            session = self._get(session_hash)
            session.files = [*(file for file in session.files if file not in named), *dict.fromkeys(named)]
            while len(session.files) > 1 and (
                len(session.files) > MAX_SESSION_FILES or sum(map(_size, session.files)) > MAX_SESSION_BYTES
            ):
                session.files.pop(0)

    def keep_answer(self, session_hash: str, answer: AnswerSession) -> None:
        """Remember the answer that a session looks at, in place of an earlier one."""
        with self._lock:
            self._get(session_hash).answer = answer

    def answer(self, session_hash: str) -> AnswerSession | None:
        """Return the answer that a session looks at; None if there is none, or not any more."""
        session = self._sessions.get(session_hash)
        return None if session is None else session.answer

    @contextmanager
    def connection(self, session_hash: str) -> Iterator[None]:
        """Count an open event stream of a session for the length of a block."""
        with self._lock:
            session = self._get(session_hash)
            session.connections += 1
        try:
            yield
        finally:
            session.connections -= 1
            session.last_used = self._clock()

    @property
    def connections(self) -> int:
        """Event streams that are open."""
        with self._lock:
            return sum(session.connections for session in self._sessions.values())

    @contextmanager
    def upload(self, size: int) -> Iterator[str | None]:
        """Reserve room for an upload of ``size`` bytes for the length of a block; gives why there is none, or None."""
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
        """Forget sessions that have ended, delete files that are no session's, and give the hashes of the former."""
        now = self._clock()
        with self._lock:
            ended = [name for name, session in self._sessions.items() if self._has_ended(session, now)]
            closed = [name for name, session in self._sessions.items() if not session.connections and name not in ended]
            closed.sort(key=lambda name: self._sessions[name].last_used)
            ended += closed[: max(0, len(self._sessions) - len(ended) - MAX_SESSIONS)]
            for name in ended:
                del self._sessions[name]
        kept = self._claimed() | self._shared
        spared = max(self.grace, _TRANSFER_SECONDS) if self._arriving else self.grace  # an upload may be half written
        for file in self._files():
            if file not in kept and time.time() - _modified(file) > spared:
                file.unlink(missing_ok=True)
                if file.parent != self.folder:
                    with suppress(OSError):  # it holds another file
                        file.parent.rmdir()
        return ended

    def _has_ended(self, session: Session, now: float) -> bool:
        unused = now - session.last_used
        return unused > (self._idle if session.connections else self.grace)

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
    """ASGI middleware that keeps questions, uploads and event streams within their limits, and ends sessions.

    Args:
        app: the next ASGI application.
        sessions: of the server.
        forget: drops what Gradio keeps for a session that has ended.
        pending: how many questions of a session wait, or have answers that it has not read.
    """

    def __init__(
        self,
        app: Any,
        sessions: Sessions,
        forget: Callable[[str], Awaitable[None]],
        pending: Callable[[str], int],
    ) -> None:
        self.app, self._sessions, self._forget, self._pending = app, sessions, forget, pending
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
                    receive = await self._question(receive)
                await self.app(scope, receive, send)
            elif path == f"{API}/upload":
                await self._upload(scope, receive, send)
            elif path == f"{API}/queue/data":
                name = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])[0]
                await self._stream(name, scope, receive, send)
            elif path.startswith(f"{API}/heartbeat/"):
                await self._stream(path.rpartition("/")[2], scope, receive, send)
            elif path.startswith(f"{API}/file="):  # Gradio would fetch addresses, and tell files from folders
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

    async def _question(self, receive: Any) -> Any:
        """Check the body of a question before Gradio opens, copies or fetches what it names; gives it once more.

        Raises:
            _Refused: it is too long or no such body, names a file that is not the app's own, or too many wait.
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
        if self._pending(session_hash) >= MAX_PENDING:
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
        """End sessions for as long as the server runs."""
        while True:
            await asyncio.sleep(min(10.0, self._sessions.grace / 2))
            try:
                ended = self._sessions.expire()
                for session_hash in ended:
                    await self._forget(session_hash)
                if ended:
                    _return_memory()
            except Exception:  # a fault of ours; later sessions must end all the same
                logger.exception("ending sessions failed")


def _return_memory() -> None:
    """Give freed memory back to the system: Pillow's blocks of 16 MiB otherwise stay in the C library's arenas."""
    with suppress(AttributeError, OSError, TypeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)


class _Refused(Exception):
    """A request that is answered here, with a status and one line."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def _check_hash(session_hash: object) -> str:
    if not isinstance(session_hash, str) or not _SESSION_HASH.fullmatch(session_hash):
        raise _Refused(400, "session_hash should be letters, digits, - and _")
    return session_hash


def _paths(value: Any) -> Iterator[Any]:
    """Every ``path`` of every dictionary in a body, however deep; None is a component without a file."""
    if isinstance(value, dict):
        if value.get("path") is not None:
            yield value["path"]
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _paths(item)
