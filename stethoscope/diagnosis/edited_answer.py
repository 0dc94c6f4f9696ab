"""Show what a mitigation did to an answer: before and after, what was removed or chosen, and why."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

from stethoscope.core.text import percent

KINDS = {
    "item": "taken out of its list",
    "clause": "went with its clause",
    "sentence": "went with its sentence",
    "reference": "went with the sentence about a removed one",
}
"""What became of a removed mention, by the kind of ``mitigation.editing.Removal``."""
_WORDS = re.compile(r"\s*(?:\w+|[^\w\s])|\s+")
"""Words and signs with the white space before them, which would otherwise be every second piece to compare."""


def compare_texts(before: str, after: str) -> tuple[list[list[str]], list[list[str]]]:
    """Split two texts into pieces that both have and pieces that one has alone.

    Returns:
        For each text its pieces, as pairs of ``same``, ``removed`` or ``added`` and the piece.

    >>> compare_texts("A cat and a dog.", "A cat.")
    ([['same', 'A cat'], ['removed', ' and a dog'], ['same', '.']], [['same', 'A cat'], ['same', '.']])
    """
    old, new = _WORDS.findall(before), _WORDS.findall(after)
    shortest = min(len(old), len(new))
    head = next((index for index in range(shortest) if old[index] != new[index]), shortest)
    tail = next((index for index in range(shortest - head) if old[~index] != new[~index]), shortest - head)
    left, right = [["same", "".join(old[:head])]], [["same", "".join(new[:head])]]
    middles = old[head : len(old) - tail], new[head : len(new) - tail]  # which may take quadratic time
    for kind, start, stop, first, last in SequenceMatcher(None, *middles, autojunk=False).get_opcodes():
        left.append(["same" if kind == "equal" else "removed", "".join(middles[0][start:stop])])
        right.append(["same" if kind == "equal" else "added", "".join(middles[1][first:last])])
    end = ["same", "".join(old[len(old) - tail :])]
    return [part for part in [*left, end] if part[1]], [part for part in [*right, end] if part[1]]


def strike_out(text: str, taken_back: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Put what was taken back where it stood in a text.

    Args:
        text: of the answer.
        taken_back: in the order of time, ``text`` and ``start``, its first character in the answer of then.

    Returns:
        Pieces of the text, as pairs of ``same`` or ``removed`` and the piece.

    >>> strike_out("A cat sits.", [{"text": " dog", "start": 1}, {"text": " bird", "start": 1}])
    [['same', 'A'], ['removed', ' dog'], ['removed', ' bird'], ['same', ' cat sits.']]
    """
    pieces: list[list[str]] = []
    position = 0
    for part in sorted(taken_back, key=lambda part: min(part["start"], len(text))):
        start = min(part["start"], len(text))
        pieces += [["same", text[position:start]], ["removed", part["text"]]]
        position = start
    return [piece for piece in [*pieces, ["same", text[position:]]] if piece[1]]


def edit_payload(edit: Mapping[str, Any], after: str, truth: Collection[str] | None = None) -> dict[str, Any] | None:
    """Convert an edit for the viewer's payload; None where nothing was done.

    Args:
        edit: as a run's record has it (``Record.edit``).
        after: the text of the answer.
        truth: names of the objects that the picture shows; None where they are not known.

    Returns:
        ``before`` and ``after`` as pieces of ``compare_texts``, ``reasons`` for every mention that was removed, asked
        about or taken back, and ``candidates`` of a choice among several answers.
    """
    if not edit:
        return None
    if "taken_back" in edit:  # while the answer was written
        struck = strike_out(after, edit["taken_back"])
        return {"before": struck, "after": [["same", after]], "reasons": list(_reasons(edit, truth)), "candidates": []}
    candidates = [
        {"text": item["text"], "score": item["score"], "mentions": item["mentions"], "chosen": index == edit["chosen"]}
        for index, item in enumerate(edit.get("candidates", ()))
    ]
    pieces = ([["same", edit["text"]]], [["same", after]]) if candidates else compare_texts(edit["text"], after)
    reasons = [] if candidates else list(_reasons(edit, truth))
    return {"before": pieces[0], "after": pieces[1], "reasons": reasons, "candidates": candidates}


def _reasons(edit: Mapping[str, Any], truth: Collection[str] | None) -> Iterator[dict[str, Any]]:
    """Yield every mention that was removed, or that reached the threshold and stayed, with the reason for it."""
    for mention in edit.get("taken_back", ()):
        taken = {"threshold": edit.get("threshold"), "fate": "taken back while it was written"}
        yield {**_reason(mention, truth), **taken}
    if "taken_back" in edit:
        return
    kinds = {index: part["kind"] for part in edit.get("removed", ()) for index in part["mentions"]}
    threshold = edit.get("threshold")
    for index, mention in enumerate(edit["mentions"]):
        doubted = threshold is None or mention["probability"] >= threshold
        if index not in kinds and (threshold is None or not doubted):
            continue
        yield {**_reason(mention, truth), "threshold": threshold, "fate": _fate(kinds.get(index), doubted)}


def _reason(mention: Mapping[str, Any], truth: Collection[str] | None) -> dict[str, Any]:
    """Return what the detector, the model (if it was asked) and the truth say of a mention."""
    odds = mention.get("yes_odds")
    return {
        "object": mention["object"],
        "probability": mention["probability"],
        "yes": None if odds is None else 1 / (1 + math.exp(-odds)),
        "label": -1 if truth is None else int(mention["object"] not in truth),
    }


def _fate(kind: str | None, doubted: bool) -> str:
    """Say what became of a mention."""
    if kind is None:
        return "stays: the model says yes when it is asked"
    if doubted:
        return "removed" if kind != "reference" else KINDS[kind]
    return KINDS[kind]


def describe_edit(edit: Mapping[str, Any], after: str, truth: Collection[str] | None = None) -> Iterator[str]:
    """Write lines about an edit for the terminal: the answer before it, and why it was edited."""
    data = edit_payload(edit, after, truth)
    if data is None:
        return
    if "text" in edit:
        yield f"before: {edit['text']}"
    for item in data["candidates"]:
        mark = "*" if item["chosen"] else " "
        yield f"  {mark} score {item['score']:+.2f}, {item['mentions']} mentions: {item['text']}"
    for reason in data["reasons"]:
        line = f"  {reason['object']}: {reason['fate']}, {percent(reason['probability'])}"
        if reason["threshold"] is not None:
            line += f" (removed from {percent(reason['threshold'])})"
        if reason["yes"] is not None:
            line += f"; asked whether it is there, the model says yes with {percent(reason['yes'])}"
        yield line + {1: "; truth: hallucinated", 0: "; truth: grounded"}.get(reason["label"], "")
