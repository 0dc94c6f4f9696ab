"""The server of the page: on this machine alone unless told otherwise, with one folder of files to hand out."""

from __future__ import annotations

import ipaddress
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stethoscope.errors import ConfigError

if TYPE_CHECKING:
    import gradio

LARGEST = "32mb"  # of an uploaded picture
WAITING = 64  # questions that may wait for the model
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


def loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens there.

    >>> loopback("127.0.0.1"), loopback("localhost"), loopback("::1"), loopback("0.0.0.0")
    (True, True, True, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


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


def start(screen: gradio.Blocks, host: str, port: int, share: bool = False) -> str:
    """Serves the page from threads of its own and gives its address; ``screen.close()`` ends it.

    Raises:
        ConfigError: the address is taken, or is none of this machine.
    """
    from starlette.middleware import Middleware

    from stethoscope.app.screen import style, theme

    screen.queue(default_concurrency_limit=8, max_size=WAITING, api_open=False)
    try:
        _, address, shared = screen.launch(
            server_name=host,
            server_port=port,
            share=share,
            prevent_thread_lock=True,
            quiet=True,
            max_file_size=LARGEST,
            ssr_mode=False,
            run_history=False,
            footer_links=[],
            theme=theme(),
            css=style(),
            app_kwargs={"middleware": [Middleware(Headers)]},
        )
    except OSError as error:
        raise ConfigError(_refusal(host, port, error)) from None
    return shared or address
