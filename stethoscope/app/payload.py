"""Encode what the server sends to the page as JSON: messages, a partial answer, a diagnosed answer."""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stethoscope.core.errors import StethoscopeError
from stethoscope.core.html import json_text
from stethoscope.diagnosis.render import mention_payload, payload

if TYPE_CHECKING:
    from stethoscope.app.answer import AnswerSession
    from stethoscope.diagnosis import Diagnosis
    from stethoscope.streaming import MentionCompleted, TakenBack, Token

logger = logging.getLogger(__name__)

MAP_BYTES = 8 * 2**20  # of heat maps in a payload; for longer answers, layers are dropped
ATTENTION_BYTES = 4 * 2**20  # of maps of raw attention; the page asks for those that do not fit

_NUMBERS = count()  # of messages
_ABSOLUTE = re.compile(r"(?<![\w./:\\-])(?:[A-Za-z]:\\|/)(?:[^\s/\\'\":;,]+(?: [^\s/\\'\":;,]+)*[/\\]+)*")
"""Root and folders of an absolute path, whose names may have blanks; not the path of a URL (``://``)."""


def encode(kind: str, **parts: Any) -> str:
    """Encode a message for the page as JSON in which no text can be read as a tag.

    Each has a number of its own, as Gradio calls the page's script for a new value only if it differs from the last.

    Args:
        kind: of message, as the page's script distinguishes them.
        parts: of the message, by key.

    >>> encode("error", text="<script>").partition(",")[0], "<" in encode("error", text="<script>")
    ('{"kind":"error"', False)
    """
    return json_text({"kind": kind, "number": next(_NUMBERS), **parts})


def message(
    text: str,
    kind: str = "hint",
    clear: bool = False,
    conversation: Mapping[str, Any] | None = None,
    aside: bool = False,
) -> str:
    """Encode a line of text that is shown above the answer.

    Args:
        text: of the line.
        kind: ``hint``, ``busy`` (the model is at work), ``stopped`` (a complete answer stays, whatever ``clear`` is) or
            ``error``.
        clear: whether to remove the last answer from the page.
        conversation: with ``clear``, what stays of the conversation, see ``conversation``; None for nothing.
        aside: whether it is about something else than the answer that is being written, which goes on.
    """
    return encode(kind, text=text, clear=clear, conversation=conversation, aside=aside)


def turn(diagnosis: Diagnosis, answer_id: str) -> dict[str, Any]:
    """Summarise an answer for the list of its conversation: question, text, warnings.

    Args:
        diagnosis: of the answer.
        answer_id: unique for every answer.
    """
    warned = [
        [mention.object, round(mention.verdict.probability, 4), mention.label]
        for mention in diagnosis.mentions
        if mention.warned and mention.verdict is not None
    ]
    known = len(diagnosis.mentions) if diagnosis.threshold is not None else None
    return {
        "answer_id": answer_id,
        "asked": diagnosis.question,
        "text": diagnosis.answer.text,
        "warned": warned,
        "mentions": known,
    }


def conversation(turns: Sequence[AnswerSession], shown: str = "") -> dict[str, Any] | None:
    """Encode a conversation for the page; None for an empty one.

    Args:
        turns: its answers, the oldest first.
        shown: the id of the one that is shown; empty for none.
    """
    if not turns:
        return None
    return {"turns": [session.turn for session in turns], "shown": shown}


def failure(
    error: Exception, clear: bool = False, conversation: Mapping[str, Any] | None = None, aside: bool = False
) -> str:
    """Encode an error as a line above the answer, or instead of it; see ``error_text``.

    Args:
        error: that a request has raised.
        clear: whether to remove the last answer from the page, which belongs to another question.
        conversation: what stays of it, see ``message``.
        aside: see ``message``.
    """
    return message(error_text(error), "error", clear, conversation, aside)


def error_text(error: Exception) -> str:
    """Describe an error to the user.

    Errors that a user can correct are shown without the folders of this machine. Of all others only the type is shown,
    and the traceback goes to the server's log.
    """
    if isinstance(error, StethoscopeError):
        return without_folders(str(error))
    logger.error("a question failed", exc_info=error)
    return f"the server failed: {type(error).__name__}; its log says more"


def without_folders(text: str) -> str:
    """Shorten absolute paths in a message to their file name.

    >>> without_folders("/home/me/my runs/a/metrics.json: no JSON; see https://example.org/a/b and runs/a")
    'metrics.json: no JSON; see https://example.org/a/b and runs/a'
    """
    folders = {str(path) + os.sep for path in (Path.cwd(), Path.home(), Path(tempfile.gettempdir()))} - {os.sep}
    for folder in sorted(folders, key=len, reverse=True):
        text = text.replace(folder, "/")
    return _ABSOLUTE.sub("", text)


def partial_answer(
    question: str,
    tokens: Sequence[Token],
    mentions: Sequence[MentionCompleted],
    threshold: float | None,
    taken: Sequence[TakenBack] = (),
) -> str:
    """Encode the part of an answer that has been generated so far.

    Only object names are coloured by their probability, which is calibrated for them.

    Args:
        question: the prompt's text.
        tokens: of the answer so far.
        mentions: objects that they name, so far.
        threshold: of the detector that scores while the answer is generated; None without one.
        taken: what was taken back, which is struck out where it stood.
    """
    text = "".join(token.text for token in tokens)
    rows: list[dict[str, Any]] = [
        {"span": [token.start, token.end], "probability": float(np.exp(token.logprob)), "mention": None}
        for token in tokens
    ]
    scored = [(mention, mention.probability) for mention in mentions if mention.probability is not None]
    for index, (mention, _) in enumerate(scored):
        for token in mention.tokens:
            rows[token]["mention"] = index
    shown = [
        {**mention_payload(mention.object, mention.tokens, None), "probability": float(probability)}
        for mention, probability in scored
    ]
    struck = [[event.start, event.text] for event in sorted(taken, key=lambda event: event.start)]
    parts = {"tokens": rows, "mentions": shown, "threshold": threshold, "struck": struck}
    return encode("writing", asked=question, text=text, status="writing …", **parts)


def diagnosed_answer(
    diagnosis: Diagnosis,
    answer_id: str,
    notes: Sequence[str] = (),
    case: Mapping[str, Any] | None = None,
    turns: Mapping[str, Any] | None = None,
) -> str:
    """Encode a complete answer with its diagnosis.

    Args:
        diagnosis: of the answer.
        answer_id: unique for every answer; the same for both scopes of one answer.
        notes: lines below the answer, in addition to those of the diagnosis.
        case: of a run, see ``answer.Question``; its ``mention`` is chosen at first.
        turns: the conversation that the answer is part of, see ``conversation``.
    """
    data = payload(diagnosis, _most_layers(diagnosis), ATTENTION_BYTES)
    wanted = None if case is None else case["mention"]
    chosen = [index for index, (start, _) in enumerate(diagnosis.answer.offsets) if start == wanted]
    own = {"answer_id": answer_id, "notes": [*data["notes"], *notes], "case": case, "conversation": turns}
    return json_text({**data, **own, "start": (chosen or [data["start"]])[0]})


def _most_layers(diagnosis: Diagnosis) -> int:
    """Count the layers whose heat maps fit into ``MAP_BYTES``."""
    if diagnosis.relevancy is None:
        return 1
    depth, cells = diagnosis.relevancy.image.shape[1:]
    if diagnosis.relevancy.tiles is not None:
        cells += diagnosis.relevancy.tiles[0, 0].numel()
    return int(min(depth, max(2, MAP_BYTES // max(1, len(diagnosis) * cells))))
