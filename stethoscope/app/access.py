"""Control access to the app: its host names, the pages that may call it, its accounts and its routes."""

from __future__ import annotations

import asyncio
import base64
import getpass
import hmac
import ipaddress
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stethoscope.core.errors import ConfigError

API = "/gradio_api"
STARTUP = f"{API}/startup-events"
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
LOGIN_DELAY = 1.0
"""Seconds that a wrong password is delayed, to slow down guessing."""

_ROUTES = re.compile(
    r"/|/(config|theme\.css|favicon\.ico|manifest\.json|robots\.txt|pwa_icon(/\d+)?)|/(assets|static|svelte)/.+"
    rf"|{API}/(queue/(join|data)|cancel|reset|upload|upload_progress|startup-events|app_id|theme\.css|heartbeat/[^/]+|file=.+)"
)
"""Routes that the page uses. All other routes of Gradio (``/run``, ``/call``, ``/proxy=``, ``/stream``, deep links,
monitoring, servers of components) are closed."""
_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\s:/@\[\]]+)(?::(\d{1,5}))?")
_DEFAULT_PORTS = {"http": "80", "https": "443"}


def loopback(host: str) -> bool:
    """Tell whether only this machine can reach a server that listens on ``host``.

    >>> loopback("127.0.0.1"), loopback("localhost"), loopback("::1"), loopback("0.0.0.0")
    (True, True, True, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_accounts(auth: str | None, public: bool) -> dict[str, str] | None:
    """Read passwords by user from the setting ``auth``; return None for an app without accounts.

    Args:
        auth: ``user:password``, the path of a file with such lines, ``none`` for no accounts; None if nothing is set.
        public: whether other machines can reach the app.

    Raises:
        ConfigError: ``auth`` is malformed, or missing for a public app. The message does not show the password.
    """
    if auth is None:
        if public:
            raise ConfigError(
                "other machines can reach the app, so auth=USER:PASSWORD (or auth=FILE with such lines) is needed; "
                "auth=none lets everybody in"
            )
        return None
    if auth == "none":
        return None
    lines, source = [auth], "auth"
    try:
        file = Path(auth).expanduser()
        is_file = file.is_file()
    except (OSError, ValueError, RuntimeError):  # a password that is no path: too long, or begins with ~
        is_file = False
    if is_file:
        try:
            lines, source = file.read_text("utf-8-sig").splitlines(), f"auth={auth}"
        except (OSError, UnicodeError) as error:
            raise ConfigError(f"auth={auth} cannot be read: {error}") from None
    pairs = [line.strip().partition(":") for line in lines if line.strip()]
    accounts = {user: password for user, _, password in pairs}
    if not accounts or not all(user and password for user, password in accounts.items()):
        raise ConfigError(f"{source} should be user:password, the path of a file with such lines, or none")
    return accounts


def read_hosts(hosts: str | Sequence[Any] | None) -> list[str]:
    """Read the setting ``hosts``: names that the page answers to, each at every port or at a given one.

    Returns:
        Names in lower case, IPv6 addresses in brackets.

    Raises:
        ConfigError: an entry is no host name.

    >>> read_hosts(["Lab", "lab.example:8080", "::1", "[::1]:8080"]), read_hosts("lab"), read_hosts(None)
    (['lab', 'lab.example:8080', '[::1]', '[::1]:8080'], ['lab'], [])
    """
    entries = [hosts] if isinstance(hosts, str) else [str(entry) for entry in hosts or ()]
    names = []
    for entry in entries:
        name = f"[{entry}]" if re.fullmatch("[0-9a-fA-F:.]*:[0-9a-fA-F:.]*:[0-9a-fA-F:.]*", entry) else entry
        if not _HOST.fullmatch(name):
            raise ConfigError(
                f"hosts={entry} should be a host name as in http://NAME:7860: hosts=[NAME] or hosts=[NAME:7860]"
            )
        names.append(name.lower())
    return names


def local_user() -> str:
    """Name the user of this machine, who writes notes where nobody else reaches the page."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # an id without a name
        return "anonymous"


def add_to_no_proxy(host: str) -> None:
    """Exclude this process's own address from proxies, in case ``http_proxy`` is set without ``no_proxy``."""
    for name in ("no_proxy", "NO_PROXY"):
        names = [part.strip() for part in os.environ.get(name, "").split(",") if part.strip()]
        if "*" not in names:
            os.environ[name] = ",".join(dict.fromkeys([*names, *LOOPBACK_NAMES, host]))


class AccessMiddleware:
    """ASGI middleware that accepts requests to the app's own host only, from its own page, by its users.

    ``Host`` must be a loopback name, the address that the app listens on, the address of the connection, or one of
    ``hosts``: otherwise any web page could point its own name here (DNS rebinding). ``Origin``, if the browser sends
    it, must be the same host or one of ``hosts``. Accounts use HTTP Basic authentication, because Gradio's own login
    leaves some of its routes open. The ``Authorization`` header that is handed on is always a verified one: without
    accounts there is none.

    Args:
        app: the next ASGI application.
        host: the address that the app listens on.
        hosts: further host names as of ``read_hosts``; read at every request, so that names can be added later.
        accounts: passwords by user; None for no accounts.
    """

    def __init__(
        self, app: Any, host: str, hosts: Sequence[str] = (), accounts: Mapping[str, str] | None = None
    ) -> None:
        self.app, self._host, self._hosts, self._accounts = app, host.strip("[]").lower(), hosts, accounts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request, or hand it on."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # the page uses no WebSocket
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        refusal = self._refusal(scope, dict(headers), sum(name == "host" for name, _ in headers))
        credential = dict(headers).get("authorization")
        verified = self._accounts is not None and self._is_authorized(credential)
        if refusal is not None:
            await respond(send, 403, refusal)
        elif not _ROUTES.fullmatch(scope["path"]):
            await respond(send, 404, "there is no such page")
        elif self._accounts is None or scope["path"] == STARTUP or verified:
            kept = [pair for pair in scope["headers"] if pair[0] != b"authorization"]
            if verified and credential is not None:
                kept.append((b"authorization", credential.encode("latin-1")))
            await self.app({**scope, "headers": kept}, receive, send)
        else:
            if credential is not None:
                await asyncio.sleep(LOGIN_DELAY)
            challenge = {"www-authenticate": 'Basic realm="LVLM-Stethoscope", charset="UTF-8"'}
            await respond(send, 401, "user and password are needed", challenge)

    def _refusal(self, scope: Any, headers: Mapping[str, str], count: int) -> str | None:
        """Explain why the request's host or origin is refused; None if it is not."""
        host = headers.get("host", "").lower()
        match = _HOST.fullmatch(host)
        listening = str((scope.get("server") or ("",))[0]).removeprefix("::ffff:")
        names = {*LOOPBACK_NAMES, self._host, listening}
        if count != 1 or match is None or not (match[1].strip("[]") in names or self._is_further(match)):
            return "this app does not answer to that host name; hosts=[NAME] adds one"
        origin = headers.get("origin")
        if origin is not None and not self._is_own_origin(origin.lower(), host):
            return "this app is called from its own page alone; hosts=[NAME] adds another"
        if headers.get("sec-fetch-site") in ("cross-site", "same-site") and headers.get("sec-fetch-mode") != "navigate":
            return "this app is called from its own page alone"
        return None

    def _is_further(self, match: re.Match[str], ports: Sequence[str] = tuple(_DEFAULT_PORTS.values())) -> bool:
        """Tell whether ``hosts`` has a name, alone or with its port.

        ``ports`` are those of a name without one.
        """
        at_ports = [f"{match[1]}:{port}" for port in ([match[2]] if match[2] else ports)]
        return not {match[1], *at_ports}.isdisjoint(self._hosts)

    def _is_own_origin(self, origin: str, host: str) -> bool:
        scheme, _, netloc = origin.partition("://")
        match = _HOST.fullmatch(netloc)
        if scheme not in _DEFAULT_PORTS or match is None:
            return False
        return netloc == host or self._is_further(match, [_DEFAULT_PORTS[scheme]])

    def _is_authorized(self, header: str | None) -> bool:
        """Tell whether an ``Authorization`` header holds the name and password of an account."""
        user, password = credentials(header)
        accounts = self._accounts or {}
        equal = hmac.compare_digest(password.encode(), accounts.get(user, "").encode())
        return user in accounts and equal


def credentials(header: str | None) -> tuple[str, str]:
    """Read user and password from an ``Authorization`` header of HTTP Basic authentication.

    Both are empty without such a header.

    >>> credentials("Basic bWU6c2VjcmV0"), credentials("Digest bWU6c2VjcmV0"), credentials(None)
    (('me', 'secret'), ('', ''), ('', ''))
    """
    kind, _, encoded = (header or "").partition(" ")
    try:
        user, _, password = base64.b64decode(encoded, validate=True).decode("utf-8").partition(":")
    except ValueError:
        return "", ""
    return (user, password) if kind.lower() == "basic" else ("", "")


async def respond(send: Any, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
    """Answer an HTTP request with JSON that Gradio's page shows as an error."""
    content = json.dumps({"detail": message}).encode()
    pairs = {"content-type": "application/json", "content-length": str(len(content)), **(headers or {})}
    start = [(name.encode(), value.encode()) for name, value in pairs.items()]
    await send({"type": "http.response.start", "status": status, "headers": start})
    await send({"type": "http.response.body", "body": content})
