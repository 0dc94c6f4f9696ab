"""Read answers from responses of servers: OpenAI-compatible ones and llama.cpp's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from stethoscope.core.errors import DataError
from stethoscope.core.json_rows import read_rows, shown
from stethoscope.storage.log_values import (
    Contents,
    LoggedAnswer,
    Names,
    as_object,
    error_line,
    int_list,
    is_finished,
    keys_of,
    last_user_message,
    logged_answer,
    logprob_list,
    objects,
    row_of_line,
    sample_id,
    text_or_none,
    with_reasoning,
)

_REQUEST_FILES, _HEAD = 50, 2**16  # files beside a batch's output that are looked at; their first bytes


def read_openai_batch(path: Path) -> Contents:
    """Read the output of an OpenAI batch, or one response of a server on each line.

    Lines of a batch have ``custom_id``, ``response`` and ``error``.

    Questions come from the batch's file of requests where that lies beside it. Lines with ``id`` or ``row`` and
    ``response`` are read alike.

    Raises:
        DataError: a line is broken or no response, or the file is the one of requests.
    """
    answers: list[LoggedAnswer] = []
    batch: set[str | None] = set()
    names, further = Names(), 0
    for index, (_, origin, row) in enumerate(read_rows(path, ())):
        if "custom_id" in row and "response" not in row and "error" not in row:
            raise DataError(f"{origin}: a request of a batch, no response; answers.file should be the batch's output")
        id_ = next((sample_id(row[key], origin) for key in ("custom_id", "sample_id") if key in row), None)
        response = row.get("response", row)
        if id_ is None and response is not row and "id" in row:
            id_ = sample_id(row["id"], origin)
        response = as_object(response)
        body = as_object(response.get("body", response))
        names.add(body, model=("model",))
        values, count = _response(body, origin)
        further += count - 1
        status = response.get("status_code")
        error = error_line(row.get("error") or body.get("error"))
        if not error and type(status) is int and status != 200:
            error = f"HTTP {status}"
        if not error and "text" not in values:
            raise DataError(
                f"{origin}: no response of a server; 'choices' or 'output' was looked for in {keys_of(body)}"
            )
        batch |= {id_} if "custom_id" in row else set()
        text = values.pop("text", "")
        row_index = row_of_line(row, index, id_, origin)
        answers.append(logged_answer(text, origin, error=error, id=id_, row=row_index, **values))
    questions, notes = _requests(path, batch) if batch else ({}, [])
    answers = [
        replace(answer, question=questions[answer.id]) if answer.id in questions else answer for answer in answers
    ]
    notes += [f"{further} further answers (choices) are left out"] if further else []
    return Contents(answers, model=names["model"], notes=(*notes, *names.notes()))


def _response(body: Mapping[str, Any], origin: str) -> tuple[dict[str, Any], int]:
    """Return the values of the answer in a body, and the number of its choices.

    The body is one of chat, completions or responses.
    """
    if isinstance(body.get("output"), list):
        return _responses_api(body, origin), 1
    choices = objects(body.get("choices"))
    if not choices:
        return {}, 1
    choice = min(choices, key=lambda choice: choice["index"] if isinstance(choice.get("index"), int) else 0)
    message = choice.get("message")
    if isinstance(message, dict):
        reasoning = next((message[key] for key in ("reasoning_content", "reasoning") if message.get(key)), "")
        content = message.get("content") or message.get("refusal") or ""
        text, spans = with_reasoning(reasoning if isinstance(reasoning, str) else "", _content(content, origin))
    else:
        text, spans = with_reasoning("", _content(choice.get("text") or "", origin))
    ids, logprobs = _logged_tokens(choice.get("logprobs"), origin)
    given = choice.get("token_ids")
    prompt_ids = body.get("prompt_token_ids") or choice.get("prompt_token_ids")
    values = {
        "text": text,
        "reasoning": spans,
        "token_ids": int_list(given, "token_ids", origin) if given is not None else ids,
        "logprobs": logprobs,
        "prompt_token_ids": int_list(prompt_ids, "prompt_token_ids", origin),
        "finished": is_finished(choice.get("finish_reason")),
    }
    return values, len(choices)


def _responses_api(body: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Return values of the answer in a body of the responses API: messages and reasoning in ``output``."""
    texts: list[str] = []
    thoughts: list[str] = []
    logprobs: list[Any] = []
    for item in objects(body["output"]):
        for part in objects(item.get("content") or item.get("summary")):
            text = part.get("text", part.get("refusal"))
            if isinstance(text, str):
                (thoughts if item.get("type") == "reasoning" else texts).append(text)
                logprobs += objects(part.get("logprobs"))
    text, spans = with_reasoning("\n".join(thoughts), "\n".join(texts))
    ids, values = _logged_tokens({"content": logprobs}, origin)
    finished = {"completed": True, "incomplete": False}.get(str(body.get("status")))
    return {"text": text, "reasoning": spans, "token_ids": ids, "logprobs": values, "finished": finished}


def _logged_tokens(logprobs: Any, origin: str) -> tuple[tuple[int, ...] | None, tuple[float, ...] | None]:
    """Return token ids and log-probabilities; None for what is not logged.

    vLLM writes ``token_id:17`` in the place of a token's text.
    """
    logprobs = as_object(logprobs)
    content, values = logprobs.get("content"), logprobs.get("token_logprobs")
    tokens = logprobs.get("tokens")
    if isinstance(content, list) and content:
        rows = objects(content)
        tokens, values = [row.get("token") for row in rows], [row.get("logprob") for row in rows]
    digits = [str(token).removeprefix("token_id:") for token in tokens] if isinstance(tokens, list) else []
    ids = None
    if digits and all(str(token).startswith("token_id:") for token in tokens or ()):
        numbers = [int(text) if text.isdecimal() and len(text) < 19 else text for text in digits]
        ids = int_list(numbers, "token_id", origin)
    return ids, logprob_list(values, "logprobs", origin) if values else None


def _content(content: Any, origin: str) -> str:
    """Return the text of a message, which may come in parts."""
    if isinstance(content, list):
        texts = [part.get("text") for part in objects(content) if part.get("type") == "text"]
        content = "\n".join(text for text in texts if isinstance(text, str))
    if not isinstance(content, str):
        raise DataError(f"{origin}: content {shown(content)} is no text")
    return content


def _requests(path: Path, ids: set[str | None]) -> tuple[dict[str | None, str], list[str]]:
    """Find the questions of a batch in a file of requests beside its output: the last message of the user."""
    for file in sorted(path.parent.glob("*.jsonl"))[:_REQUEST_FILES]:
        if file == path or not file.is_file():
            continue
        try:
            with file.open("rb") as start:
                if b'"custom_id"' not in start.read(_HEAD):
                    continue
            requests: dict[str | None, Any] = {
                str(row["custom_id"]): row["body"] for *_, row in read_rows(file, ("custom_id", "body"))
            }
            if ids <= requests.keys():
                questions = {id_: _asked(requests[id_], str(file)) for id_ in ids}
                return {id_: text for id_, text in questions.items() if text}, [f"questions are taken from {file.name}"]
        except (DataError, OSError):
            continue  # another file
    return {}, []


def _asked(body: Any, origin: str) -> str | None:
    body = as_object(body)
    message = last_user_message(body.get("messages") or body.get("input"))
    return None if message is None else _content(message.get("content") or "", origin) or None


def read_llama_cpp(path: Path) -> Contents:
    """Read one response of llama.cpp's ``/completion`` on each line.

    It stands alone, or as ``response`` beside an ``id``.

    Raises:
        DataError: a line is broken or no such response.
    """
    answers, names, cut, unequal = [], Names(), 0, 0
    for index, (_, origin, line) in enumerate(read_rows(path, ())):
        row = line["response"] if isinstance(line.get("response"), dict) else line
        if "content" not in row and not row.get("error"):
            raise DataError(f"{origin}: no response of llama.cpp; 'content' was looked for in {keys_of(row)}")
        id_ = sample_id(line["id"], origin) if "id" in line else None
        names.add(row, model=("model",))
        cut += row.get("truncated") is True
        probabilities = objects(row.get("completion_probabilities") or row.get("probs"))
        tokens = [item for item in probabilities if "logprob" in item]
        reason = row.get("stop_type") or (
            "limit" if row.get("stopped_limit") else "eos" if row.get("stopped_eos") else ""
        )
        ids = int_list(row.get("tokens") or None, "tokens", origin)
        known = int_list([item.get("id") for item in tokens] or None, "completion_probabilities.id", origin)
        logged = logprob_list([item["logprob"] for item in tokens] or None, "logprob", origin)
        if ids is None or (known and ids[: len(known)] == known):  # tokens have the stop word, probabilities do not
            ids = known
        elif known or reason == "word":
            ids, logged, unequal = None, None, unequal + 1
        answers.append(
            logged_answer(
                "" if row.get("error") and not row.get("content") else row["content"],
                origin,
                error=error_line(row.get("error")),
                id=id_,
                row=row_of_line(line, index, id_, origin),
                question=text_or_none(line.get("question"), "question", origin),
                token_ids=ids,
                logprobs=logged,
                prompt=row["prompt"] if isinstance(row.get("prompt"), str) else None,
                finished=is_finished(reason),
            )
        )
    notes = [f"{cut} prompts were cut by the server (truncated)"] if cut else []
    notes += (
        [f"token ids of {unequal} answers may have a stop word, which their text has not: left out"] if unequal else []
    )
    return Contents(answers, "llama.cpp", names["model"], notes=(*notes, *names.notes()))
