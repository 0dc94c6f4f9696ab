"""What the browser draws, as JSON: an answer that is being written, or one with everything about its tokens."""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stethoscope.core.errors import StethoscopeError
from stethoscope.diagnosis.page import page_data
from stethoscope.diagnosis.parts import ABOUT_LOOKS, in_words
from stethoscope.markup import data_uri

if TYPE_CHECKING:
    from PIL.Image import Image

    from stethoscope.diagnosis import Diagnosis
    from stethoscope.diagnosis.readers import Reader
    from stethoscope.streaming import StreamedToken

logger = logging.getLogger(__name__)

MAP_BYTES = 8 * 2**20  # of heat maps on a screen; in larger answers layers are thinned out
WIDEST = 1024  # pixels of the picture on the screen

_ABSOLUTE = re.compile(r"(?<![\w./:\\-])(?:[A-Za-z]:\\|/)(?:[^\s/\\'\":;,]+(?: [^\s/\\'\":;,]+)*[/\\]+)*")
"""Drive or root and folders of an absolute path, blanks within their names included; no part of an address (``://``)."""


def encode(kind: str, **parts: Any) -> str:
    """JSON in which no text can be taken for a tag, wherever it is put.

    >>> encode("error", text="<script>")
    '{"kind":"error","text":"\\\\u003cscript\\\\u003e"}'
    """
    text = json.dumps({"kind": kind, **parts}, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def message(text: str, kind: str = "hint", clear: bool = False) -> str:
    """A line above the answer.

    Args:
        kind: ``hint``, ``busy`` (the model is at work) or ``error``.
        clear: takes the last answer off the screen.
    """
    return encode(kind, text=text, clear=clear)


def failure(error: Exception) -> str:
    """An error as a line above the answer, which ends whatever the page waits for.

    Errors that a user can mend say so, without the folders of this machine; of all others only the kind is shown, and
    the traceback goes to the server's log.
    """
    if isinstance(error, StethoscopeError):
        return message(without_folders(str(error)), "error")
    logger.error("a question failed", exc_info=error)
    return message(f"the server failed: {type(error).__name__}; its log says more", "error")


def without_folders(text: str) -> str:
    """A message whose absolute paths are cut to the name of their file.

    >>> without_folders("/home/me/my runs/a/metrics.json: no JSON; see https://example.org/a/b and runs/a")
    'metrics.json: no JSON; see https://example.org/a/b and runs/a'
    """
    known = {str(path) + os.sep for path in (Path.cwd(), Path.home(), Path(tempfile.gettempdir()))} - {os.sep}
    for folder in sorted(known, key=len, reverse=True):
        text = text.replace(folder, "/")
    return _ABSOLUTE.sub("", text)


def prepare_generate(question: str, tokens: Sequence[StreamedToken], reader: Reader, threshold: float | None) -> str:
    """An answer so far. Only names of objects are coloured by their warning: for those it is calibrated.

    Args:
        tokens: so far.
        reader: finds the objects.
        threshold: of the detector that judges while the answer is written; None without one.
    """
    text = "".join(token.text for token in tokens)
    rows: list[dict[str, Any]] = [
        {"span": [token.start, token.end], "probability": float(np.exp(token.logprob)), "mention": None}
        for token in tokens
    ]
    mentions: list[dict[str, Any]] = []
    for found in reader(text) if threshold is not None else ():
        covered = [token.token for token in tokens if token.start < found.end and token.end > found.start]
        if not covered or tokens[covered[0]].probability is None:
            continue
        for token in covered:
            rows[token]["mention"] = len(mentions)
        probability = round(tokens[covered[0]].probability, 4)
        mentions.append(_mention(found.name, covered, probability))
    return encode(
        "writing", asked=question, text=text, tokens=rows, mentions=mentions, threshold=threshold, status="writing …"
    )


def finished(diagnosis: Diagnosis, case: str, scope: str, notes: Sequence[str] = ()) -> str:
    """An answer with everything about its tokens.

    Args:
        case: tells answers apart; the same for both scopes of one.
        scope: of the gradient.
        notes: lines below the answer, besides those of the diagnosis.
    """
    found = page_data(diagnosis, _layers(diagnosis))
    text = diagnosis.answer.text
    for index, ((start, end), token) in enumerate(zip(diagnosis.answer.offsets, found["tokens"], strict=True)):
        start += len(text[start:end]) - len(text[start:end].lstrip())  # boxes begin with the word
        token["span"] = [start, end]
        owners = [number for number, one in enumerate(diagnosis.mentions) if index in one.tokens]
        token["mention"] = owners[0] if owners else None
    mentions = []
    for one in diagnosis.mentions:
        judgement = one.judgement
        if judgement is None:
            mentions.append(_mention(one.object, one.tokens, None))
            continue
        odds = [None if value is None else round(value, 3) for value in (judgement.evidence, judgement.prior)]
        top, looks = [[name, round(push, 3)] for name, push in judgement.top], in_words(judgement.looks)
        mentions.append(_mention(one.object, one.tokens, round(judgement.probability, 4), *odds, top, looks))
    shown = diagnosis.image.copy()
    shown.thumbnail((WIDEST, WIDEST))
    cut = [] if diagnosis.answer.finished else [f"The answer was cut off at {len(diagnosis)} tokens."]
    return encode(
        "done",
        **found,
        case=case,
        scope=scope,
        asked=diagnosis.question,
        text=text,
        mentions=mentions,
        threshold=diagnosis.threshold,
        about_looks=ABOUT_LOOKS if any(one["looks"] for one in mentions) else "",
        photo=_address(shown),
        summary=f"{diagnosis.model}, {len(diagnosis)} tokens",
        notes=[*cut, *(f"Not shown: {note}" for note in diagnosis.notes), *notes],
    )


def _mention(
    name: str,
    tokens: Sequence[int],
    probability: float | None,
    evidence: float | None = None,
    prior: float | None = None,
    top: Sequence[Sequence[Any]] = (),
    looks: str = "",
) -> dict[str, Any]:
    return {
        "object": name,
        "tokens": list(tokens),
        "probability": probability,
        "evidence": evidence,
        "prior": prior,
        "top": list(top),
        "looks": looks,
    }


def _layers(diagnosis: Diagnosis) -> int:
    """How many layers fit into ``MAP_BYTES``."""
    if diagnosis.relevancy is None:
        return 1
    depth, cells = diagnosis.relevancy.image.shape[1:]
    if diagnosis.relevancy.tiles is not None:
        cells += diagnosis.relevancy.tiles[0, 0].numel()
    return int(min(depth, max(2, MAP_BYTES // max(1, len(diagnosis) * cells))))


def _address(image: Image) -> str:
    """The picture for ``<img>``: PNG where it is small, else JPEG."""
    if max(image.size) <= 256:
        return data_uri(image)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")
