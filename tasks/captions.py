"""Judging captions by the objects that they name, as CHAIR does (Rohrbach et al., EMNLP 2018)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from stethoscope.core import types
from stethoscope.core.types import Score
from stethoscope.task import Totals
from stethoscope.tasks.objects import Mention
from stethoscope.tasks.totals import ratio

_COUNTS = ("mentions", "hallucinated", "captions", "hallucinated_captions", "truth", "found", "words")
_SENTENCE_END = re.compile(r"""[.?!]["'”’)]*(?=\s|$)""")


def complete_sentences(text: str) -> str:
    """A text without its last sentence if that one has no end; a text of one sentence stays as it is.

    >>> complete_sentences("A dog. A cat (black.) And a")
    'A dog. A cat (black.)'
    """
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return text[: ends[-1]] if ends else text


def score_caption(text: str, named: Sequence[str], truth: Collection[str]) -> Score:
    """Counts mentions, hallucinated mentions, true objects named and words; an empty caption is ``unparsed``.

    Args:
        text: the caption.
        named: canonical names of the objects that it names, once for every mention.
        truth: canonical names of the objects in the picture.
    """
    if not text.strip():
        return Score("unparsed", dict.fromkeys(_COUNTS, 0.0), {"objects": [], "hallucinated": []})
    truth = set(truth)
    invented = [name for name in named if name not in truth]
    values = (len(named), len(invented), 1, bool(invented), len(truth), len(truth & set(named)), len(text.split()))
    detail = {"objects": list(named), "hallucinated": invented}
    return Score("ok", dict(zip(_COUNTS, map(float, values), strict=True)), detail)


def labelled(found: Sequence[Mention], label: Callable[[str], int]) -> tuple[types.Mention, ...]:
    """Mentions with their labels and numbers.

    Args:
        found: mentions in reading order.
        label: canonical name -> 1 hallucinated, 0 grounded, -1 not to be judged.
    """
    before: Counter[str] = Counter()
    rows = []
    for number, (name, start, end) in enumerate(found):
        rows.append(types.Mention(start, end, name, label(name), number, before[name]))
        before[name] += 1
    return tuple(rows)


METRICS: Mapping[str, Callable[[Totals], np.ndarray]] = {
    "chair_i": lambda totals: ratio(totals["hallucinated"], totals["mentions"]),
    "chair_s": lambda totals: ratio(totals["hallucinated_captions"], totals["captions"]),
    "recall": lambda totals: ratio(totals["found"], totals["truth"]),
    "length": lambda totals: ratio(totals["words"], totals["captions"]),
}
"""CHAIR_i, CHAIR_s, object recall and length in words.

``chair_i``: hallucinated mentions among all mentions. ``chair_s``: captions with at least one, among all captions.
``recall``: true objects that are named, among all true objects. ``length``: words per caption.
"""
