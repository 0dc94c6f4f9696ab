"""Ask an OpenAI-compatible server (vLLM, SGLang, llama.cpp, a hosted API) about images, with retries.

What concerns one sample is a ``DataError``; what would befall every further request ends the work: ``ConfigError`` for
a wrong address, key or model, ``CapabilityError`` for a server that has gone. The key comes from the environment, and
is in no message and in no reply.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import httpx2

from stethoscope import __version__
from stethoscope.core.errors import CapabilityError, ConfigError, DataError, StethoscopeError, first_line, unknown
from stethoscope.core.redaction import MASK, redact_text
from stethoscope.core.text import one_line
from stethoscope.core.types import Generation
from stethoscope.evaluation.chat_protocol import OPTIONAL, Reply, messages, parse_reply, request_settings, retry_after

FIRST_PAUSE, LONGEST_PAUSE, LONGEST_WAIT = 0.5, 60.0, 600.0
"""Seconds: the first pause between tries, which doubles; the longest one; the longest that a server may ask for."""
LARGEST_REPLY = 2**26
"""Most bytes of one reply; prompts of 100,000 token ids have less than one million."""

_AGAIN = (408, 409, 425, 429)  # and all from 500 on
_SAME_FOR_ALL = (401, 402, 403, 404, 405)  # no other sample would fare better
_OWNERS = {"vllm": "vllm", "sglang": "sglang", "llamacpp": "llama.cpp"}  # what engines call themselves in /models
_LOOPBACK = ("localhost", "127.0.0.1", "::1", "[::1]")


@dataclass(frozen=True)
class Engine:
    """A server and how it is asked.

    Attributes:
        base_url: of the API, which ``/chat/completions`` is appended to.
        model: name that the server knows it by; None for the only one that it serves.
        revision: of the model, written into every line; servers do not tell it.
        concurrency: requests at a time, 1 to 1,024.
        retries: tries after the first one, 0 to 100.
        timeout: seconds until a request is given up.
        api_key_env: environment variable that holds the key; None to send none.
        check_model: refuse a model that the server does not list.

    Raises:
        ConfigError: a value is out of range.
    """

    base_url: str
    model: str | None = None
    revision: str | None = None
    concurrency: int = 16
    retries: int = 8
    timeout: float = 120.0
    api_key_env: str | None = "OPENAI_API_KEY"
    check_model: bool = True

    def __post_init__(self) -> None:
        for name, least, most in (("concurrency", 1, 1024), ("retries", 0, 100)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise ConfigError(f"engine.{name}={value!r} should be a whole number from {least} to {most}")
        if isinstance(self.timeout, bool) or not isinstance(self.timeout, (int, float)) or not 0 < self.timeout < 1e6:
            raise ConfigError(f"engine.timeout={self.timeout!r} should be a number of seconds above 0")
        for name in ("model", "revision", "api_key_env"):
            if not isinstance(getattr(self, name), str | None):
                raise ConfigError(f"engine.{name}={getattr(self, name)!r} should be text")
        if not isinstance(self.check_model, bool):
            raise ConfigError(f"engine.check_model={self.check_model!r} should be true or false")
        try:
            url = httpx2.URL(self.base_url)
            usable = url.scheme in ("http", "https") and bool(url.host)
        except (httpx2.InvalidURL, TypeError):
            usable = False
        if not usable:
            shown = redact_text(str(self.base_url))
            raise ConfigError(f"engine.base_url={shown} should be an address such as http://127.0.0.1:8000/v1")

    @property
    def key(self) -> str:
        """The key in the environment, without white space around it; empty without one.

        Raises:
            ConfigError: it holds a character that no header can carry.
        """
        key = os.environ.get(self.api_key_env or "", "").strip()
        if not (key.isascii() and key.isprintable()):
            raise ConfigError(f"the environment variable {self.api_key_env} holds characters that no key has")
        return key


class ServedModel(NamedTuple):
    """The model that is asked, and the engine that serves it (``openai`` where it is not known)."""

    model: str
    engine: str


class _Refused(Exception):
    """A reply of 3xx or 4xx that no further try would change."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class _Unanswered(Exception):
    """A try without a reply; ``gone`` where there was not even a connection."""

    def __init__(self, reason: str, gone: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.gone = reason, gone


class _Response(NamedTuple):
    status: int
    headers: Mapping[str, str]
    content: bytes


class ChatClient:
    """Send chat completions with one image each, at most ``engine.concurrency`` at a time.

    Args:
        engine: the server.
        generation: settings of decoding; ``max_new_tokens`` must be given.

    Raises:
        ConfigError: the settings ask for what these servers cannot do, or the key cannot be sent.
    """

    def __init__(self, engine: Engine, generation: Generation) -> None:
        self.engine, self.generation = engine, generation
        self._settings = request_settings(generation)
        self._key = engine.key
        self._url = httpx2.URL(engine.base_url)
        self._model = engine.model or ""
        self._refused: set[str] = set()  # optional fields that this server does not take
        self._http: httpx2.AsyncClient | None = None

    async def __aenter__(self) -> ChatClient:
        """Open connections as they are needed; a proxy is not used for this machine."""
        headers = {"User-Agent": f"lvlm-stethoscope/{__version__}"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        self._http = httpx2.AsyncClient(
            headers=headers,
            timeout=httpx2.Timeout(self.engine.timeout, connect=min(10.0, self.engine.timeout)),
            limits=httpx2.Limits(max_connections=self.engine.concurrency),
            trust_env=self._url.host not in _LOOPBACK,
            verify=self._url.scheme == "https",  # certificates take a fifth of a second to read
        )
        return self

    async def __aexit__(self, *error: object) -> None:
        """Close all connections."""
        if self._http is not None:
            await self._http.aclose()

    async def find_model(self) -> ServedModel:
        """Check that the server is there, and that it serves the wanted model or has only one.

        Raises:
            ConfigError: the address is not that of such a server, the key is refused, or the model is not served.
            CapabilityError: nobody answers there.
        """
        try:
            response = await self._request("GET", "models", patient=False)
        except _Refused as refused:
            if refused.status != 404:
                raise self._final(refused) from None
            if not self.engine.model or "/v" not in self._url.path:
                raise ConfigError(
                    f"{self._shown_url} has no /models; engine.base_url should be an OpenAI-compatible API, for most "
                    "servers an address that ends with /v1"
                ) from None
            warnings.warn(f"{self._shown_url} does not list its models, so their names are not checked", stacklevel=2)
            return ServedModel(self.engine.model, "openai")
        except DataError as error:
            raise CapabilityError(f"{self._shown_url} does not answer: {error}") from None
        owners = self._listed(response.content)
        wanted = self.engine.model
        if wanted is None:
            if len(owners) != 1:
                names = ", ".join(sorted(owners)) or "none"
                raise ConfigError(
                    f"engine.model must be given: {self._shown_url} serves {len(owners)} models ({names})"
                )
            wanted = next(iter(owners))
        elif wanted not in owners and self.engine.check_model:
            hint = "; engine.check_model=false asks for it all the same"
            raise ConfigError(f"{unknown('engine.model', wanted, owners)}{hint}")
        self._model = wanted
        return ServedModel(wanted, _OWNERS.get(owners.get(wanted, ""), "openai"))

    async def ask(self, question: str, image: bytes, kind: str) -> Reply:
        """Ask one question about one image.

        Args:
            question: of the user; the server puts it into the model's chat format.
            image: the file, which is sent as a data URI.
            kind: its format, ``png`` or ``jpeg``.

        Raises:
            DataError: this question has no answer; the message says why.
            ConfigError: no question would have one: the key, the address or the model is wrong.
            CapabilityError: the server has gone, and did not come back during all tries.
        """
        body = {"model": self._model, "messages": messages(question, image, kind)}
        optional = {name: value for name, value in OPTIONAL.items() if name not in self._refused}
        while True:
            settings = self._settings
            try:
                response = await self._request("POST", "chat/completions", {**body, **settings, **optional})
                break
            except _Refused as refused:
                if "max_completion_tokens" in refused.reason and "max_tokens" in settings:
                    others = {name: value for name, value in settings.items() if name != "max_tokens"}
                    self._settings = {**others, "max_completion_tokens": settings["max_tokens"]}
                    continue
                unwanted = _unwanted(refused, optional)
                if not unwanted:
                    raise self._final(refused) from None
                optional = {name: value for name, value in optional.items() if name not in unwanted}
        dropped = OPTIONAL.keys() - optional.keys() - self._refused
        if dropped:
            self._refused |= dropped
            names = " and ".join(sorted(dropped))
            warnings.warn(f"{self._shown_url} refuses {names}; answers come without", stacklevel=2)
        return parse_reply(response.content)

    async def _request(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, patient: bool = True
    ) -> _Response:
        """Send a request until there is a final reply; without ``patient`` a missing server is told at once."""
        reason, gone, tries = "", False, 0
        for attempt in range(self.engine.retries + 1):
            wait: float | None = None
            tries += 1
            try:
                response = await self._send(method, path, body)
            except _Unanswered as error:
                reason, gone = error.reason, error.gone
            else:
                if 200 <= response.status < 300:
                    return response
                reason, gone = self._reason(response), False
                if (response.status < 500 and response.status not in _AGAIN) or "insufficient_quota" in reason:
                    raise _Refused(response.status, reason)
                wait = retry_after(response.headers.get("retry-after"))
                if wait is not None and wait > LONGEST_WAIT:
                    raise CapabilityError(
                        f"{reason}: the server asks to wait {wait:.0f} s; the same command then goes on"
                    )
            if gone and not patient:
                break
            if attempt < self.engine.retries:
                await asyncio.sleep(pause(attempt, wait))
        times = f", {tries} times" if tries > 1 else ""
        if gone:
            raise CapabilityError(
                f"engine.base_url={self._shown_url} cannot be reached ({reason}{times}); "
                "once its server runs, the same command goes on"
            )
        raise DataError(f"{reason}{times}")

    async def _send(self, method: str, path: str, body: Mapping[str, Any] | None) -> _Response:
        """Send a request once and read the reply, without the key where it is quoted."""
        assert self._http is not None, "a client is used in its block"
        url = self._url.copy_with(path=f"{self._url.path.rstrip('/')}/{path}")
        content = bytearray()
        try:
            async with asyncio.timeout(self.engine.timeout), self._http.stream(method, url, json=body) as response:
                async for chunk in response.aiter_bytes():
                    content += chunk
                    if len(content) > LARGEST_REPLY:
                        raise DataError(f"the server's reply has more than {LARGEST_REPLY} bytes")
        except httpx2.ConnectTimeout:
            raise _Unanswered("no connection in time", gone=True) from None
        except (TimeoutError, httpx2.TimeoutException):
            raise _Unanswered(f"no answer within {self.engine.timeout:g} s (engine.timeout)") from None
        except httpx2.TransportError as error:  # refused, or broken off
            raise _Unanswered(self._clean(first_line(error)) or type(error).__name__, gone=True) from None
        except httpx2.DecodingError as error:
            raise DataError(f"the server's reply cannot be unpacked: {self._clean(first_line(error))}") from None
        data = bytes(content)
        if len(self._key) >= 8:  # shorter ones are no secrets (EMPTY), and might be words of an answer
            data = data.replace(self._key.encode(), MASK.encode())
        return _Response(response.status_code, response.headers, data)

    @property
    def _shown_url(self) -> str:
        return self._clean(self.engine.base_url)

    def _clean(self, text: str) -> str:
        """Make a text of the server or a library fit for a message: one line, no secrets, at most 300 characters."""
        line = one_line(redact_text(text.replace(self._key, MASK) if len(self._key) >= 4 else text))
        return line if len(line) <= 300 else f"{line[:297]}..."

    def _reason(self, response: _Response) -> str:
        """Describe a reply that is no answer: its status and what the server says about it."""
        if 300 <= response.status < 400:
            return f"{response.status}, a redirection to {self._clean(response.headers.get('location', 'nowhere'))}"
        text = response.content.decode("utf-8", errors="replace")
        try:
            error = json.loads(text)
        except (ValueError, RecursionError):
            return self._clean(f"{response.status} {first_line(ValueError(text)) if text.strip() else ''}".strip())
        code = None
        for name in ("error", "message", "detail"):  # OpenAI's, vLLM's older and FastAPI's
            if isinstance(error, Mapping) and error.get(name):
                code = error.get("code") or code
                error = error[name]
        shown = error if isinstance(error, str) else json.dumps(error, ensure_ascii=False)
        return self._clean(f"{response.status} {shown}{f' ({code})' if isinstance(code, str) else ''}")

    def _final(self, refused: _Refused) -> StethoscopeError:
        """Return the error for a refusal: of the sample, or of all."""
        answers = f"{self._shown_url} answers {refused.reason}"
        if refused.status == 401:
            name = self.engine.api_key_env
            owner = f"the key in {name} is not accepted" if self._key else f"it wants a key in {name or 'api_key_env'}"
            return ConfigError(f"{answers}: {owner}")
        if refused.status < 400 or refused.status in _SAME_FOR_ALL or "insufficient_quota" in refused.reason:
            return ConfigError(f"{answers}; check engine.base_url, engine.model ({self._model or 'any'}) and the key")
        return DataError(f"the server refuses the request: {refused.reason}")

    def _listed(self, content: bytes) -> dict[str, str]:
        """Read the models that a server lists, with their owners."""
        try:
            models = json.loads(content)["data"]
            return {str(entry["id"]): str(entry.get("owned_by")) for entry in models}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise ConfigError(
                f"{self._shown_url}/models gives no list of models, so engine.base_url is no OpenAI-compatible API; "
                "for most servers it ends with /v1"
            ) from None


def _unwanted(refused: _Refused, optional: Mapping[str, Any]) -> set[str]:
    """Return the optional fields that a refusal is about: those it names, or all where it may be about any."""
    named = {name for name in optional if name in refused.reason}
    if refused.status in (400, 403, 422) and named:
        return named
    return set(optional) if refused.status in (400, 422) else set()


def pause(attempt: int, wait: float | None = None) -> float:
    """Draw the seconds before the next try: twice as long each time, give or take a half; what a server asks for, more.

    Args:
        attempt: number of tries before this one that failed, from 0.
        wait: seconds that the server asks for, if it does.
    """
    if wait is not None:
        return wait + random.uniform(0, FIRST_PAUSE)
    return min(LONGEST_PAUSE, FIRST_PAUSE * 2.0**attempt) * random.uniform(0.5, 1.5)
