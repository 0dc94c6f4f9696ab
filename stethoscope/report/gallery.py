"""Mentions worth looking at: caught hallucinations, missed ones and false alarms, with their words and pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import pandas as pd

from stethoscope.markup import escape, photo_uri
from stethoscope.report.tables import Table

if TYPE_CHECKING:
    from PIL.Image import Image

    from stethoscope.report.source import Source
    from stethoscope.storage.records import Record

CONTEXT = 240  # characters of the answer on either side of a mention
SIDE = 320  # pixels: the longer side of a picture
KINDS = {
    "caught": "hallucinated and warned of, the surest first",
    "missed": "hallucinated without a warning, the least suspected first",
    "false alarm": "warned of but in the picture, the surest first",
}
Picture = Callable[["Record"], "Image | None"]
"""Gives the picture of a record that the run itself has not kept, or None where there is none to be had."""


@dataclass(frozen=True)
class Case:
    """One mention.

    Attributes:
        kind: of ``KINDS``.
        sample_id, question, object: what it is about.
        pieces: the answer around it: text and ``this`` (the mention), ``warned`` (another warned mention) or empty.
        probability: calibrated probability that it is hallucinated.
        evidence, prior: log-odds that add up to it; None where the detector cannot split it.
        picture: the picture; None for none.
        heat: the picture under the heat map of the mention; None where no map is kept.
    """

    kind: str
    sample_id: str
    question: str
    object: str
    pieces: tuple[tuple[str, str], ...]
    probability: float
    evidence: float | None
    prior: float | None
    picture: Image | None = field(default=None, repr=False, compare=False)
    heat: Image | None = field(default=None, repr=False, compare=False)

    @property
    def words(self) -> str:
        """The answer around the mention, which stands between guillemets."""
        return "".join(f"«{text}»" if mark == "this" else text for text, mark in self.pieces)


def pick(rows: pd.DataFrame, count: int) -> dict[str, pd.DataFrame]:
    """At most ``count`` mentions of every kind: first of different objects in different answers, then what is left.

    Args:
        rows: mentions with ``label``, ``warned``, ``probability``, ``object`` and ``sample_id``.
        count: how many.
    """
    wrong, warned = rows["label"] == 1, rows["warned"].astype(bool)
    masks = {"caught": wrong & warned, "missed": wrong & ~warned, "false alarm": ~wrong & warned}
    found = {}
    for kind, mask in masks.items():
        some = rows[mask].sort_values("probability", ascending=kind == "missed", kind="stable")
        fresh = ~(some.duplicated("object") | some.duplicated("sample_id"))
        chosen = pd.concat([some[fresh], some[~fresh]]).head(count)
        found[kind] = chosen.sort_values("probability", ascending=kind == "missed", kind="stable")
    return found


def cases(source: Source, count: int, picture: Picture | None = lambda record: None) -> list[Case]:
    """The gallery of a run.

    Args:
        source: a run with warnings.
        count: how many mentions of every kind.
        picture: gives the pictures that the run has not kept; None for a gallery without pictures.

    Raises:
        ArtefactError: ``maps.jsonl`` is damaged.
    """
    return [
        _case(source, kind, row, picture)
        for kind, rows in pick(source.held_out, count).items()
        for row in rows.to_dict("records")
    ]


def _case(source: Source, kind: str, row: dict, picture: Picture | None) -> Case:
    record = source.record(row["sample_id"])
    text = record.answer.text if record is not None and record.answer is not None else ""
    image, heat = (None, None) if record is None or picture is None else _images(source, record, row, picture)
    mine = source.warnings[(source.warnings["sample_id"] == row["sample_id"]) & source.warnings["warned"].astype(bool)]
    others = [(int(start), int(end)) for start, end in zip(mine["start"], mine["end"], strict=True)]
    split = row["evidence"] is not None and not pd.isna(row["evidence"])
    return Case(
        kind=kind,
        sample_id=row["sample_id"],
        question="" if record is None else record.question,
        object=row["object"],
        pieces=tuple(_pieces(text, (int(row["start"]), int(row["end"])), others)),
        probability=float(row["probability"]),
        evidence=float(row["evidence"]) if split else None,
        prior=float(row["prior"]) if split else None,
        picture=image,
        heat=heat,
    )


def _images(source: Source, record: Record, row: dict, picture: Picture) -> tuple[Image | None, Image | None]:
    """The picture, and the picture under the mention's heat map."""
    view = source.view(record)
    image = view.picture if view is not None and view.picture is not None else picture(record)
    if view is None or image is None:
        return image, None
    return image, replace(view, picture=image).overlay(int(row["token"]), SIDE)


def _pieces(text: str, this: tuple[int, int], others: Sequence[tuple[int, int]]) -> Iterator[tuple[str, str]]:
    """The text around a mention in marked pieces; what is cut off is an ellipsis."""
    first, last = max(0, this[0] - CONTEXT), min(len(text), this[1] + CONTEXT)
    if first > 0:
        first = text.find(" ", first, this[0]) + 1 or first
        yield "… ", ""
    at = first
    for start, end, mark in sorted([(*this, "this"), *((*other, "warned") for other in others if other != this)]):
        word = text[start:end]
        start, end = start + len(word) - len(word.lstrip()), end - len(word) + len(word.rstrip())
        if at <= start < end <= last:
            yield text[at:start], ""
            yield text[start:end], mark
            at = end
    yield text[at:last], ""
    if last < len(text):
        yield " …", ""


def gallery_table(found: Sequence[Case]) -> Table:
    """The gallery without pictures."""
    rows = tuple(
        (
            case.kind,
            case.sample_id,
            case.object,
            f"{case.probability:.3f}",
            _odds(case.evidence),
            _odds(case.prior),
            case.words,
        )
        for case in found
    )
    note = "Evidence and prior are log-odds; above 0 they speak for hallucination, and their sum gives the probability."
    return Table("mentions", ("", "sample", "object", "probability", "evidence", "prior", "answer"), rows, note)


def _odds(value: float | None) -> str:
    return "" if value is None else f"{value:+.2f}".replace("-", "−")


def html(found: Sequence[Case]) -> str:
    """The gallery as cards, a group for every kind."""
    parts = []
    for kind, meaning in KINDS.items():
        mine = [case for case in found if case.kind == kind]
        cards = "".join(map(_card, mine)) or '<p class="note">None.</p>'
        parts.append(
            f'<h3>{escape(kind.capitalize())} <span class="note">{escape(meaning)}</span></h3>'
            f'<div class="cards">{cards}</div>'
        )
    return "\n".join(parts)


def _card(case: Case) -> str:
    shown = [(case.picture, case.sample_id), (case.heat, f"what {case.object} was written from")]
    images = "".join(
        f'<img src="{photo_uri(one, SIDE)}" alt="{escape(name)}">' for one, name in shown if one is not None
    )
    image = f'<div class="pictures">{images}</div>' if images else ""
    words = "".join(
        f'<mark class="{mark}">{escape(text)}</mark>' if mark else escape(text) for text, mark in case.pieces
    )
    why = ""
    if case.evidence is not None and case.prior is not None:
        why = f"{_bar('evidence', case.evidence)}{_bar('prior', case.prior)}"
    return (
        f'<article class="card {case.kind.replace(" ", "-")}">{image}<div>'
        f'<p class="head"><b>{escape(case.object)}</b> <span class="chance">{case.probability:.1%}</span></p>{why}'
        f'<p class="answer">{words}</p>'
        f'<p class="note">{escape(case.sample_id)} · {escape(case.question)}</p></div></article>'
    )


def _bar(name: str, value: float) -> str:
    """A bar from the middle, to the right where it speaks for hallucination; it ends at 6 log-odds."""
    share = min(abs(value), 6) / 6 * 50
    left = 50 if value >= 0 else 50 - share
    return (
        f'<div class="odds"><span>{name}</span><span class="track"><i class="{"for" if value >= 0 else "against"}" '
        f'style="left:{left:.1f}%;width:{share:.1f}%"></i></span><span>{_odds(value)}</span></div>'
    )
