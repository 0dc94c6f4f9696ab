"""A diagnosis as a page of its own."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np

from stethoscope.core.errors import CapabilityError
from stethoscope.diagnosis.parts import ABOUT_LOOKS, SHARES, in_words
from stethoscope.markup import data_uri, document, escape, json_block
from stethoscope.relevancy.heatmaps import RAMP, heat, raster, relevancy_tiles

if TYPE_CHECKING:
    from stethoscope.diagnosis.result import Diagnosis

MOST_LAYERS = 16  # that the page holds; more are thinned out evenly, the last one always stays
RASTER = 32  # cells along the longer side of a map that is put together from several tiles
WIDEST = 1024  # pixels of the picture in the page


def page(diagnosis: Diagnosis) -> str:
    """See ``Diagnosis.to_html``."""
    data = page_data(diagnosis)
    resources = files("stethoscope.diagnosis")
    style, script = (resources.joinpath(name).read_text("utf-8") for name in ("page.css", "page.js"))
    body = "\n".join([*_body(diagnosis, data), json_block("data", data)])
    return document(f"stethoscope: {diagnosis.question}", body, style, script)


def _body(diagnosis: Diagnosis, data: dict[str, Any]) -> Iterator[str]:
    thumb = diagnosis.image.copy()
    thumb.thumbnail((WIDEST, WIDEST))
    scale = max(1, -(-640 // thumb.width))
    yield f'<main><h1>{escape(diagnosis.question)}</h1><p class="soft">{escape(summary(diagnosis))}</p>'
    for note in diagnosis.notes:
        yield f'<p class="soft">Not shown: {escape(note)}</p>'
    yield '<section class="card"><p class="answer">' + "".join(_tokens(diagnosis)) + "</p>"
    yield f'<div class="controls"><label for="colour">colour</label><select id="colour">{_colours(diagnosis)}</select>'
    yield "</div></section>"
    yield '<div class="columns"><div><section class="card"><h2>What the token was written from</h2>'
    yield f'<img id="photo" alt="" hidden src="{data_uri(thumb)}">'
    yield f'<canvas id="picture" width="{thumb.width * scale}" height="{thumb.height * scale}"></canvas>'
    yield from _controls(data)
    yield "</section>"
    yield from _mention_table(diagnosis)
    yield '</div><div><section class="card"><h2>Token</h2><dl class="facts" id="facts"></dl></section>'
    if diagnosis.judgements and diagnosis.judgements[0].top:
        yield _card("Features that push the warning (log-odds)", '<div id="top"></div>')
    if data["layers"]:
        yield _card(f"Relevancy by part (gradient of scope {diagnosis.scope})", '<div id="shares"></div>')
        choice = "".join(f"<option>{name}</option>" for name in data["tokens"][0]["contribution"])
        select = f'<label for="statistic">of</label><select id="statistic">{choice}</select>'
        inside = f'<div id="contribution"></div><div class="controls">{select}</div>'
        yield _card("Visual contribution: image / (image + text)", inside)
        yield _card("Relevancy of the question's tokens", '<div id="question"></div>')
        yield _card("Relevancy of earlier answer tokens", '<div id="before"></div>')
    yield "</div></div>"
    if diagnosis.evolution is not None:
        words = f'<th colspan="{diagnosis.evolution.probabilities.shape[-1]}">most probable words</th>'
        head = f"<tr><th>layer</th><th>rank</th><th>probability</th>{words}</tr>"
        table = f'<table class="evolution"><thead>{head}</thead><tbody id="evolution"></tbody></table>'
        yield _card("Prediction evolution: what every layer would have said", f'<div class="scroll">{table}</div>')
    yield "</main>"


def _card(title: str, inside: str) -> str:
    return f'<section class="card"><h2>{escape(title)}</h2>{inside}</section>'


def summary(diagnosis: Diagnosis) -> str:
    """One line: the model, how long its answer is, what the detector warns of."""
    count, seconds = len(diagnosis), sum(diagnosis.seconds.values())
    parts = [diagnosis.model, f"{count} tokens", f"{seconds:.1f} s"]
    if diagnosis.threshold is not None:
        parts.append(f"warned of {len(diagnosis.warned)} of {len(diagnosis.mentions)} mentions")
        parts.append(f"threshold {diagnosis.threshold:.2f}")
    return ", ".join(parts)


def _colours(diagnosis: Diagnosis) -> str:
    options = [("surprise", "how improbable the token is")]
    if diagnosis.judgements:
        options = [
            ("warning", "calibrated warning of every object"),
            ("every", "the detector on every token (calibrated on objects only)"),
            *options,
        ]
    return "".join(f'<option value="{value}">{escape(text)}</option>' for value, text in options)


def _tokens(diagnosis: Diagnosis) -> Iterator[str]:
    """The answer, every token in an element of its own, what lies between them as it is."""
    text, at = diagnosis.answer.text, 0
    for index, (start, end) in enumerate(diagnosis.answer.offsets):
        start = word_start(text, start, end)
        if start < end:
            owner = diagnosis.mention_of(index)
            kind = "t warned" if owner is not None and owner.warned else "t"
            yield escape(text[at:start]) + (
                f'<span class="{kind}" data-token="{index}" tabindex="0" role="button">{escape(text[start:end])}</span>'
            )
            at = end
    yield escape(text[at:])


def word_start(text: str, start: int, end: int) -> int:
    """Where the word of a token begins, so that boxes do not begin with the space before it.

    >>> word_start("a dog", 1, 5)
    2
    """
    return start + len(text[start:end]) - len(text[start:end].lstrip())


def _controls(data: dict[str, Any]) -> Iterator[str]:
    if not data["layers"]:
        yield '<p class="soft">This model gives no relevancy.</p>'
        return
    last = len(data["layers"]) - 1
    names = {"raw": "image tokens", "tower": "patches, through the vision tower"}
    options = "".join(f'<option value="{kind}">{names[kind]}</option>' for kind in data["maps"])
    yield (
        '<div class="controls"><label for="layer">layer</label>'
        f'<input id="layer" type="range" min="0" max="{last}" value="{last}"><span id="layer-text"></span>'
        '<label for="opacity">opacity</label><input id="opacity" type="range" min="0" max="100" value="75">'
        f'<span id="opacity-text"></span><label for="source">of</label><select id="source">{options}</select></div>'
    )


def _mention_table(diagnosis: Diagnosis) -> Iterator[str]:
    if not diagnosis.mentions:
        return
    judged = diagnosis.threshold is not None
    columns = ["object", "hallucinated", "evidence", "prior"] if judged else ["object", "probability of its token"]
    yield '<section class="card"><h2>Objects that the answer names</h2><div class="scroll"><table><thead><tr>'
    yield "".join(f"<th>{name}</th>" for name in columns) + "</tr></thead><tbody>"
    told = False
    for mention in diagnosis.mentions:
        cells = [mention.object]
        judgement = mention.judgement
        if judgement is not None:
            odds = (judgement.evidence, judgement.prior)
            cells += [f"{judgement.probability:.0%}", *("" if value is None else f"{value:+.2f}" for value in odds)]
        elif not judged and mention.tokens:
            cells.append(f"{diagnosis.probability[mention.tokens[0]]:.0%}")
        kind = "warned" if mention.warned else ""
        token = f' data-token="{mention.tokens[0]}"' if mention.tokens else ""
        yield f'<tr class="{kind}"{token}>' + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
        if judgement is not None and judgement.looks:
            told, text = True, f"looks like: {in_words(judgement.looks)}"
            yield f'<tr class="looks"{token}><td colspan="{len(columns)}">{escape(text)}</td></tr>'
    yield "</tbody></table></div>"
    yield f'<p class="soft">{escape(ABOUT_LOOKS)}</p></section>' if told else "</section>"


def _layers(diagnosis: Diagnosis, most: int) -> list[int]:
    if diagnosis.relevancy is None:
        return []
    depth = diagnosis.relevancy.image.shape[1]
    return sorted({round(value) for value in np.linspace(0, depth - 1, min(depth, most))})


def page_data(diagnosis: Diagnosis, most_layers: int = MOST_LAYERS) -> dict[str, Any]:
    """What a page's script reads, JSON-able: tokens, and heat maps as bytes in base64.

    Args:
        diagnosis: the answer.
        most_layers: of the language model; more are thinned out evenly, the last one always stays.
    """
    layers = _layers(diagnosis, most_layers)
    warned = [mention.tokens[0] for mention in diagnosis.mentions if mention.tokens and mention.warned]
    named = [mention.tokens[0] for mention in diagnosis.mentions if mention.tokens]
    return {
        "size": list(diagnosis.image.size),
        "start": (warned or named or [0])[0],
        "layers": layers,
        "depth": diagnosis.relevancy.image.shape[1] if layers else 0,
        "ramp": RAMP.tolist(),
        "question": list(diagnosis.question_tokens),
        "maps": dict(_maps(diagnosis, layers)) if layers else {},
        "tokens": [_token(diagnosis, index, layers) for index in range(len(diagnosis))],
    }


def _token(diagnosis: Diagnosis, index: int, layers: list[int]) -> dict[str, Any]:
    owner = diagnosis.mention_of(index)
    judgement = owner.judgement if owner is not None and owner.judgement else None
    other = diagnosis.judgements[index] if diagnosis.judgements else None
    shown = judgement or other
    found: dict[str, Any] = {
        "text": diagnosis.answer.tokens[index],
        "probability": round(float(diagnosis.probability[index]), 4),
        "entropy": round(float(diagnosis.entropy[index]), 3),
        "object": owner.object if owner else "",
        "warned": bool(owner and owner.warned),
        "warning": None if judgement is None else round(judgement.probability, 4),
        "every": None if other is None else round(other.probability, 4),
        "evidence": None if shown is None or shown.evidence is None else round(shown.evidence, 3),
        "prior": None if shown is None or shown.prior is None else round(shown.prior, 3),
        "top": [] if shown is None else [[name, round(push, 3)] for name, push in shown.top],
        "looks": "" if shown is None else in_words(shown.looks),
        "word": "",
        "evolution": [],
    }
    if diagnosis.evolution is not None:
        found["evolution"] = diagnosis.evolution.to_list(index)
        found["word"] = diagnosis.evolution.said[index]
    if layers:
        relevancy, total = diagnosis.relevancy, diagnosis.relevancy.total[index, layers].numpy().clip(min=1e-12)
        found["shares"] = np.stack([_parts(diagnosis.shares[name][index, layers]) for name in SHARES], 1).tolist()
        found["contribution"] = {
            name: [round(value, 3) for value in values[index, layers].tolist()]
            for name, values in diagnosis.contributions.items()
        }
        found["question"] = _parts(relevancy.question[index, layers].numpy() / total[:, None]).tolist()
        found["answer"] = _parts(relevancy.answer[index, layers, :index].numpy() / total[:, None]).tolist()
        found["total"] = [float(f"{value:.4g}") for value in total]
    return found


def _parts(shares: np.ndarray) -> np.ndarray:
    """Shares in ten-thousandths, which are short to write."""
    return np.rint(10_000 * shares).astype(int)


def _maps(diagnosis: Diagnosis, layers: list[int]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Heat maps of all tokens and some layers, each scaled to its own largest value, a byte per cell.

    One tile is kept as it is, with its box in the picture; several are put together on a raster of the picture.
    """
    for kind in ("raw", "tower"):
        try:
            tiles, boxes = relevancy_tiles(
                diagnosis.relevancy, diagnosis.places, kind == "raw", (slice(None), layers)
            )  # fmt: skip
        except CapabilityError:
            continue
        width, height = diagnosis.image.size
        if len(tiles) == 1 and boxes[0] is not None:
            values, box = tiles[0], boxes[0]
        else:
            shape = raster(diagnosis.image.size, RASTER)
            values, box = heat(tiles, boxes, (width, height), shape), (0.0, 0.0, float(width), float(height))
        top = values.max((-2, -1), keepdims=True)
        scaled = np.rint(255 * values / np.where(top > 0, top, 1)).astype(np.uint8)
        yield (
            kind,
            {
                "shape": list(scaled.shape[-2:]),
                "box": [round(edge, 2) for edge in box],
                "peaks": [[float(f"{value:.4g}") for value in row] for row in top[..., 0, 0]],
                "data": base64.b64encode(scaled.tobytes()).decode("ascii"),
            },
        )
