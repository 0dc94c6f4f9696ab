"""Serve the page, by default to this machine only, with one folder of files that it may send."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from stethoscope.app.access import AccessMiddleware, add_to_no_proxy, read_hosts
from stethoscope.app.sessions import MAX_SESSIONS, MAX_UPLOAD, SessionMiddleware, Sessions
from stethoscope.core.errors import ConfigError

if TYPE_CHECKING:
    import gradio

MAX_WAITING = 128  # questions that may wait for the model
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; font-src 'self' data:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'self'; form-action 'self'; base-uri 'self'"
)
"""What the browser may load: only from this server, whatever Gradio's page or a model's text ask for."""


class Headers:
    """ASGI middleware that adds the page's content security policy to every response."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Hand the request on, and add the headers to the response."""

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                extra = {"content-security-policy": POLICY, "x-content-type-options": "nosniff"}
                pairs = [(name.encode(), value.encode()) for name, value in extra.items()]
                message = {**message, "headers": [*message.get("headers", []), *pairs]}
            await send(message)

        await self.app(scope, receive, with_headers)


@contextmanager
def own_folder() -> Iterator[Path]:
    """Make a temporary folder for uploads and pictures, the only one whose files Gradio sends."""
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
    """Check, before a model is loaded, that a server can listen on an address.

    Raises:
        ConfigError: the address is in use, or does not belong to this machine.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of an earlier server may linger
        try:
            listener.bind((host, port))
        except OSError as error:
            raise ConfigError(_refusal(host, port, error)) from None


def _refusal(host: str, port: int, error: OSError) -> str:
    return f"port={port} on host={host} cannot be used: {error.strerror or error}; choose another with port= or host="


def start(
    page: gradio.Blocks,
    host: str,
    port: int,
    sessions: Sessions,
    share: bool = False,
    hosts: Sequence[str] = (),
    accounts: Mapping[str, str] | None = None,
) -> str:
    """Serve the page in background threads, and return its address; ``page.close()`` stops the server.

    Args:
        page: to be served.
        host: address to listen on.
        port: to listen on.
        sessions: of this server; all of them may use the files that are in its folder now.
        share: whether to create a public address through Gradio's servers.
        hosts: host names, with or without a port, that the page answers to, in addition to loopback names and ``host``.
        accounts: passwords by user; None for no login.

    Raises:
        ConfigError: the address is in use or does not belong to this machine, an entry of ``hosts`` is no host name, or
            the server cannot start.
    """
    from starlette.middleware import Middleware

    from stethoscope.app.ui import style, theme

    sessions.share_files()
    names = read_hosts(hosts)
    add_to_no_proxy(host)  # Gradio's launch sends a request to its own address
    page.queue(default_concurrency_limit=8, max_size=MAX_WAITING, api_open=False)

    def count_pending(session_hash: str) -> int:
        return len(page._queue.pending_event_ids_session.get(session_hash, ()))

    try:
        _, address, shared = page.launch(
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
                    Middleware(
                        SessionMiddleware,
                        sessions=sessions,
                        release=partial(_release_session, page),
                        count_pending=count_pending,
                    ),
                ]
            },
        )
    except OSError as error:
        raise ConfigError(_refusal(host, port, error)) from None
    except Exception as error:  # behind a proxy or a firewall, Gradio and httpx raise errors of any type
        reason = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
        raise ConfigError(
            f"the page cannot be served on host={host} port={port}: {reason} (a proxy? add {host} to no_proxy)"
        ) from error
    if shared:
        names.append(urlsplit(shared).hostname or "")
    return shared or address


async def _release_session(page: gradio.Blocks, session_hash: str) -> None:
    """Delete Gradio's data of a session: waiting questions, unread answers, values of components.

    Gradio itself keeps it until there are 10,000 sessions.
    """
    queue, holder = page._queue, page.app.state_holder
    await queue.clean_events(session_hash=session_hash)
    queue.pending_messages_per_session.pop(session_hash, None)
    queue.pending_event_ids_session.pop(session_hash, None)
    holder.session_data.pop(session_hash, None)
    holder.time_last_used.pop(session_hash, None)
