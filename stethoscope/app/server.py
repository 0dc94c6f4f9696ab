"""The server of the page: on this machine alone unless told otherwise, with one folder of files to hand out."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from stethoscope.app.access import AccessMiddleware, add_to_no_proxy
from stethoscope.app.sessions import MAX_SESSIONS, MAX_UPLOAD, SessionMiddleware, Sessions
from stethoscope.core.errors import ConfigError

if TYPE_CHECKING:
    import gradio

WAITING = 128  # questions that may wait for the model
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; font-src 'self' data:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'self'; form-action 'self'; base-uri 'self'"
)
"""What the browser may load: only from this server, whatever Gradio's page or a model's text ask for."""


class Headers:
    """ASGI middleware that sends the page's content security policy with every answer of the server."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                extra = {"content-security-policy": POLICY, "x-content-type-options": "nosniff"}
                pairs = [(name.encode(), value.encode()) for name, value in extra.items()]
                message = {**message, "headers": [*message.get("headers", []), *pairs]}
            await send(message)

        await self.app(scope, receive, with_headers)


@contextmanager
def own_folder() -> Iterator[Path]:
    """A folder for uploads and pictures that is gone afterwards; Gradio hands out files of this one alone."""
    with tempfile.TemporaryDirectory(prefix="stethoscope-app-") as folder:
        before = {name: os.environ.get(name) for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED")}
        os.environ.update(GRADIO_TEMP_DIR=folder, GRADIO_ANALYTICS_ENABLED="False")
        try:
            yield Path(folder)
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def check_address(host: str, port: int) -> None:
    """Checks, before a model is loaded, that a server can listen there.

    Raises:
        ConfigError: the address is taken, or is none of this machine.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # an ended server's connections may still linger
        try:
            one.bind((host, port))
        except OSError as error:
            raise ConfigError(_refusal(host, port, error)) from None


def _refusal(host: str, port: int, error: OSError) -> str:
    return f"port={port} on host={host} cannot be used: {error.strerror or error}; choose another with port= or host="


def start(
    screen: gradio.Blocks,
    host: str,
    port: int,
    sessions: Sessions,
    share: bool = False,
    hosts: Sequence[str] = (),
    accounts: Mapping[str, str] | None = None,
) -> str:
    """Serve the page from threads of its own and give its address; ``screen.close()`` ends it.

    Args:
        screen: the page. ``host``, ``port``: where to listen.
        sessions: of this server; the files that its folder holds now are for all of them.
        share: a public address through Gradio's servers.
        hosts: names that the page answers to, beside loopback names and ``host``.
        accounts: passwords by user; None lets everybody in.

    Raises:
        ConfigError: the address is taken or none of this machine, or the server cannot start.
    """
    from starlette.middleware import Middleware

    from stethoscope.app.ui import style, theme

    sessions.share_files()
    names = list(hosts)
    add_to_no_proxy(host)  # launch asks its own address
    screen.queue(default_concurrency_limit=8, max_size=WAITING, api_open=False)

    async def forget(session_hash: str) -> None:
        await _forget(screen, session_hash)

    def pending(session_hash: str) -> int:
        return len(screen._queue.pending_event_ids_session.get(session_hash, ()))

    try:
        _, address, shared = screen.launch(
            server_name=host,
            server_port=port,
            share=share,
            prevent_thread_lock=True,
            quiet=True,
            max_file_size=MAX_UPLOAD,
            state_session_capacity=MAX_SESSIONS,
            ssr_mode=False,
            run_history=False,
            footer_links=[],
            theme=theme(),
            css=style(),
            app_kwargs={
                "middleware": [
                    Middleware(Headers),
                    Middleware(AccessMiddleware, host=host, hosts=names, accounts=accounts),
                    Middleware(SessionMiddleware, sessions=sessions, forget=forget, pending=pending),
                ]
            },
        )
    except OSError as error:
        raise ConfigError(_refusal(host, port, error)) from None
    except Exception as error:  # Gradio and httpx raise nearly anything where a proxy or a firewall is in the way
        reason = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
        raise ConfigError(
            f"the page cannot be served on host={host} port={port}: {reason} (a proxy? add {host} to no_proxy)"
        ) from error
    if shared:
        names.append(urlsplit(shared).hostname or "")
    return shared or address


async def _forget(screen: gradio.Blocks, session_hash: str) -> None:
    """Drop what Gradio keeps for a session: waiting questions, answers that nobody has read, values of components.

    Gradio itself keeps all of it until 10,000 sessions have come.
    """
    queue, holder = screen._queue, screen.app.state_holder
    await queue.clean_events(session_hash=session_hash)
    queue.pending_messages_per_session.pop(session_hash, None)
    queue.pending_event_ids_session.pop(session_hash, None)
    holder.session_data.pop(session_hash, None)
    holder.time_last_used.pop(session_hash, None)
