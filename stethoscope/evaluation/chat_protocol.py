"""Read and write chat completions as OpenAI-compatible servers speak them."""

from __future__ import annotations

import base64
import email.utils
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stethoscope.core.errors import ConfigError, DataError
from stethoscope.core.text import one_line
from stethoscope.core.types import Generation

OPTIONAL: Mapping[str, Any] = {"logprobs": True, "return_token_ids": True}
"""Fields of a request that a server may refuse without harm to the answer."""


@dataclass(frozen=True)
class Reply:
    """What a server gave for one question.

    Attributes:
        text: the answer; empty where the server cut the model off while it was still reasoning.
        finish_reason: ``stop`` or ``length``; None where the server does not say.
        token_ids: of the answer; engines often count the end-of-sequence id in. None where the server gives none.
        logprobs: natural logarithms of the probabilities of these tokens, at most 0; likewise.
        prompt_token_ids: of the whole prompt, with the engine's own ids for the image; likewise.
        reasoning: what a reasoning model wrote before the answer, where the server separates it.
    """

    text: str
    finish_reason: str | None = None
    token_ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    reasoning: str | None = None

    @property
    def whole(self) -> str:
        """The reasoning, between the tags that readers of answers know, and the answer.

        >>> Reply("Yes").whole, Reply("Yes", reasoning="a dog").whole, Reply("", "length", reasoning="a d").whole
        ('Yes', '<think>a dog</think>Yes', '<think>a d')
        """
        if self.reasoning is None:
            return self.text
        return f"<think>{self.reasoning}</think>{self.text}" if self.text else f"<think>{self.reasoning}"


def request_settings(generation: Generation) -> dict[str, Any]:
    """Translate generation settings into the fields of a request; ``max_new_tokens`` must be given.

    >>> request_settings(Generation(max_new_tokens=8))
    {'max_tokens': 8, 'temperature': 0.0}

    Raises:
        ConfigError: beam search, which these servers do not have.
    """
    if generation.num_beams > 1:
        raise ConfigError(
            f"generation.num_beams={generation.num_beams}: OpenAI-compatible servers have no beam search; "
            "choose generation=greedy or generation=sample"
        )
    settings: dict[str, Any] = {"max_tokens": generation.max_new_tokens, "temperature": 0.0}
    if generation.do_sample:
        settings |= {"temperature": generation.temperature, "top_p": generation.top_p, "seed": generation.seed}
    return settings | ({"stop": list(generation.stop)} if generation.stop else {})


def messages(question: str, image: bytes, kind: str) -> list[dict[str, Any]]:
    """Write the messages of one question about one image, which goes along as a data URI.

    Args:
        question: of the user; the server puts it into the model's chat format.
        image: the bytes of a file.
        kind: its format, ``png`` or ``jpeg``.
    """
    uri = f"data:image/{kind};base64,{base64.b64encode(image).decode('ascii')}"
    content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def retry_after(value: str | None) -> float | None:
    """Read the header ``Retry-After``, seconds or a date; None where it is missing or neither.

    >>> retry_after("2"), retry_after("soon"), retry_after("Thu, 01 Jan 1970 00:00:00 GMT")
    (2.0, None, 0.0)

    Source: RFC 9110, section 10.2.3.
    """
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None


def parse_reply(content: bytes) -> Reply:
    """Read a chat completion.

    Token ids are taken from vLLM's and SGLang's ``token_ids``, or from the ``id`` of llama.cpp's log-probabilities.

    Raises:
        DataError: it is no chat completion, or its answer was withheld.

    >>> parse_reply(b'{"choices": [{"message": {"content": "Yes"}, "finish_reason": "stop"}]}').text
    'Yes'
    """
    try:
        data = json.loads(content)
    except (ValueError, RecursionError):
        raise DataError(f"the server's reply is no JSON: {content[:60]!r}") from None
    choices = data.get("choices") if isinstance(data, Mapping) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, Mapping) else None
    if not isinstance(choice, Mapping) or not isinstance(message, Mapping):
        raise DataError(f"the server's reply has no choices: {content[:60]!r}")
    reason = choice.get("finish_reason")
    if reason == "content_filter":
        raise DataError("the server withheld the answer (finish_reason content_filter)")
    text = message.get("content")
    if isinstance(text, list):  # parts, as of messages
        parts = [part.get("text") for part in text if isinstance(part, Mapping) and part.get("type") == "text"]
        text = "".join(part for part in parts if isinstance(part, str))
    thoughts = next((message[key] for key in ("reasoning_content", "reasoning") if message.get(key)), None)
    thoughts = thoughts if isinstance(thoughts, str) else None
    if text is None and thoughts is not None:
        text = ""
    if not isinstance(text, str):
        why = message.get("refusal") or f"finish_reason {reason}"
        raise DataError(f"the server's reply has no text: {one_line(why)[:200]}")
    text, thoughts = _whole_characters(text), thoughts and _whole_characters(thoughts)
    logged = choice.get("logprobs")
    entries = logged.get("content") if isinstance(logged, Mapping) else None
    entries = entries if isinstance(entries, list) else []
    ids = _ids(choice.get("token_ids")) or _ids([_entry(entry, "id") for entry in entries])
    logprobs = _logprobs([_entry(entry, "logprob") for entry in entries])
    if ids is not None and logprobs is not None and len(ids) != len(logprobs):
        logprobs = None  # whose they are is not known
    return Reply(
        text,
        reason if isinstance(reason, str) else None,
        ids,
        logprobs,
        _ids(data.get("prompt_token_ids")) or _ids(choice.get("prompt_token_ids")),
        thoughts,
    )


def _whole_characters(text: str) -> str:
    """Replace halves of surrogate pairs, which JSON can hold and a file of answers cannot.

    >>> _whole_characters("a \\ud83d.")
    'a \ufffd.'
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _entry(entry: Any, key: str) -> Any:
    return entry.get(key) if isinstance(entry, Mapping) else None


def _ids(values: Any) -> tuple[int, ...] | None:
    """Return token ids; None unless there are some and all are whole numbers from 0 to 2^31 - 1."""
    if not isinstance(values, list) or not values or any(type(item) is not int or item >> 31 for item in values):
        return None
    return tuple(values)


def _logprobs(values: Sequence[Any]) -> tuple[float, ...] | None:
    """Return log-probabilities, at most 0; None unless there are some and all are finite numbers."""
    if not values or any(type(item) not in (int, float) or not math.isfinite(item) for item in values):
        return None
    return tuple(min(float(item), 0.0) for item in values)
