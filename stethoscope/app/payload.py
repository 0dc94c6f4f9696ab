"""Write what the page receives as JSON: messages, an answer that is being written, a diagnosed answer."""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stethoscope.core.errors import StethoscopeError
from stethoscope.core.html import json_text
from stethoscope.diagnosis.render import mention_payload, payload

if TYPE_CHECKING:
    from stethoscope.diagnosis import Diagnosis
    from stethoscope.diagnosis.run_diagnosis import MentionExtractor
    from stethoscope.streaming import StreamedToken

logger = logging.getLogger(__name__)

MAP_BYTES = 8 * 2**20  # of heat maps on a screen; in larger answers layers are thinned out

_ABSOLUTE = re.compile(r"(?<![\w./:\\-])(?:[A-Za-z]:\\|/)(?:[^\s/\\'\":;,]+(?: [^\s/\\'\":;,]+)*[/\\]+)*")
"""Drive or root and folders of an absolute path, blanks within their names included; no part of an address (``://``)."""


def encode(kind: str, **parts: Any) -> str:
    """Write what the page receives as JSON, in which no text can be taken for a tag.

    >>> encode("error", text="<script>")
    '{"kind":"error","text":"\\\\u003cscript\\\\u003e"}'
    """
    return json_text({"kind": kind, **parts})


def message(text: str, kind: str = "hint", clear: bool = False) -> str:
    """Write a line above the answer.

    Args:
        kind: ``hint``, ``busy`` (the model is at work) or ``error``.
        clear: takes the last answer off the screen.
    """
    return encode(kind, text=text, clear=clear)


def failure(error: Exception) -> str:
    """Write an error as a line above the answer, which ends whatever the page waits for.

    Errors that a user can mend say so, without the folders of this machine; of all others only the kind is shown, and
    the traceback goes to the server's log.
    """
    if isinstance(error, StethoscopeError):
        return message(without_folders(str(error)), "error")
    logger.error("a question failed", exc_info=error)
    return message(f"the server failed: {type(error).__name__}; its log says more", "error")


def without_folders(text: str) -> str:
    """Cut absolute paths in a message to the name of their file.

    >>> without_folders("/home/me/my runs/a/metrics.json: no JSON; see https://example.org/a/b and runs/a")
    'metrics.json: no JSON; see https://example.org/a/b and runs/a'
    """
    known = {str(path) + os.sep for path in (Path.cwd(), Path.home(), Path(tempfile.gettempdir()))} - {os.sep}
    for folder in sorted(known, key=len, reverse=True):
        text = text.replace(folder, "/")
    return _ABSOLUTE.sub("", text)


def writing(
    question: str, tokens: Sequence[StreamedToken], extractor: MentionExtractor, threshold: float | None
) -> str:
    """Write an answer so far. Only names of objects are coloured by their warning: for those it is calibrated.

    Args:
        tokens: so far.
        extractor: finds the objects.
        threshold: of the detector that scores while the answer is written; None without one.
    """
    text = "".join(token.text for token in tokens)
    rows: list[dict[str, Any]] = [
        {"span": [token.start, token.end], "probability": float(np.exp(token.logprob)), "mention": None}
        for token in tokens
    ]
    mentions: list[dict[str, Any]] = []
    for named in extractor(text) if threshold is not None else ():
        covered = [token.token for token in tokens if token.start < named.end and token.end > named.start]
        if not covered or tokens[covered[0]].probability is None:
            continue
        for token in covered:
            rows[token]["mention"] = len(mentions)
        probability = round(tokens[covered[0]].probability, 4)
        mentions.append({**mention_payload(named.name, covered, None), "probability": probability})
    return encode(
        "writing", asked=question, text=text, tokens=rows, mentions=mentions, threshold=threshold, status="writing …"
    )


def finished(diagnosis: Diagnosis, answer_id: str, notes: Sequence[str] = ()) -> str:
    """Write an answer with everything about its tokens.

    Args:
        diagnosis: of the answer.
        answer_id: tells answers apart; the same for both scopes of one.
        notes: lines below the answer, besides those of the diagnosis.
    """
    data = payload(diagnosis, _layers(diagnosis))
    return json_text({**data, "answer_id": answer_id, "notes": [*data["notes"], *notes]})


def _layers(diagnosis: Diagnosis) -> int:
    """Count how many layers fit into ``MAP_BYTES``."""
    if diagnosis.relevancy is None:
        return 1
    depth, cells = diagnosis.relevancy.image.shape[1:]
    if diagnosis.relevancy.tiles is not None:
        cells += diagnosis.relevancy.tiles[0, 0].numel()
    return int(min(depth, max(2, MAP_BYTES // max(1, len(diagnosis) * cells))))
