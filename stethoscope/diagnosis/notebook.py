"""A diagnosis as a notebook shows it: no script, which notebooks that are not trusted take out, and nothing fetched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from stethoscope.core.errors import CapabilityError
from stethoscope.diagnosis.page import summary, word_start
from stethoscope.markup import escape, photo_uri
from stethoscope.relevancy.heatmaps import overlay

if TYPE_CHECKING:
    from stethoscope.diagnosis.parts import Named
    from stethoscope.diagnosis.result import Diagnosis

SHOWN = 6  # mentions with a heat map
WIDTH = 200  # pixels of a picture on the page
BOX = "border:2px solid #c92a2a;border-radius:4px"


def notebook(diagnosis: Diagnosis) -> str:
    """See ``Diagnosis._repr_html_``."""
    shown = [mention for mention in diagnosis.mentions if mention.tokens and mention.warned]
    shown = (shown or [mention for mention in diagnosis.mentions if mention.tokens])[:SHOWN]
    figures = "".join(_figure(diagnosis, mention) for mention in shown)
    colour = "red: probability that the object is hallucinated; boxed: warned of"
    if diagnosis.threshold is None:
        colour = "blue: how improbable the token was; no detector, so no warnings"
    return (
        f'<div><p style="margin:4px 0"><strong>{escape(diagnosis.question)}</strong><br>'
        f"<small>{escape(summary(diagnosis))} ({colour})</small></p>"
        f'<p style="white-space:pre-wrap;line-height:1.9;margin:4px 0">{"".join(_tokens(diagnosis))}</p>'
        f'<div style="display:flex;flex-wrap:wrap;gap:12px">{_picture(diagnosis)}{figures}</div></div>'
    )


def _tokens(diagnosis: Diagnosis) -> Iterator[str]:
    """The answer, coloured, every token with what is known of it in its title."""
    text, at, warning = diagnosis.answer.text, 0, diagnosis.warning
    for index, (start, end) in enumerate(diagnosis.answer.offsets):
        start = word_start(text, start, end)
        if start >= end:
            continue
        owner, probability = diagnosis.mention_of(index), float(diagnosis.probability[index])
        title = f"probability {probability:.0%}"
        style = f"background:rgba(9,105,218,{0.5 * (1 - probability):.2f})"
        if warning is not None:
            value = 0.0 if owner is None or owner.judgement is None else owner.judgement.probability
            style = f"background:rgba(201,42,42,{0.75 * value:.2f})"
        if owner is not None:
            title += f", {_said(owner)}"
            style += f";{BOX}" if owner.warned else ""
        yield escape(text[at:start])
        yield f'<span style="{escape(style)}" title="{escape(title)}">{escape(text[start:end])}</span>'
        at = end
    yield escape(text[at:])


def _said(mention: Named) -> str:
    judgement = mention.judgement
    return mention.object + ("" if judgement is None else f", hallucinated {judgement.probability:.0%}")


def _picture(diagnosis: Diagnosis) -> str:
    return _captioned(photo_uri(diagnosis.image, 2 * WIDTH), "the picture")


def _figure(diagnosis: Diagnosis, mention: Named) -> str:
    """The heat map of a mention; nothing where the model gives none."""
    try:
        picture = overlay(diagnosis.image, diagnosis.heat_map(mention.tokens[0]), width=WIDTH)
    except CapabilityError:
        return ""
    return _captioned(photo_uri(picture, 2 * WIDTH), _said(mention))


def _captioned(address: str, caption: str) -> str:
    return (
        f'<figure style="margin:0"><img width="{WIDTH}" src="{address}" alt="{escape(caption)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )
