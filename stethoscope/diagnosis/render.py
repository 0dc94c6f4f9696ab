"""Render a diagnosis: the viewer's payload, a page, the notebook display, and a figure of one token.

The app, the page and the notebook show the same payload; the app and the page use the same ``viewer.js``.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from stethoscope.core.errors import CapabilityError
from stethoscope.core.html import asset, data_uri, document, json_block, render
from stethoscope.core.text import counted, percent
from stethoscope.diagnosis.viewer_parts import (
    RASTER,
    attention_payload,
    edit_payload,
    in_base64,
    seen_payload,
    thinned_out,
)
from stethoscope.relevancy.heatmaps import OPACITY, RAMP, colours, in_bytes, one_grid, overlay
from stethoscope.tasks.yes_no import first_word

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure

    from stethoscope.detection.visual_consistency import NamedProbability
    from stethoscope.diagnosis.answer_verdicts import DiagnosedMention, TokenVerdict
    from stethoscope.diagnosis.diagnosis import Diagnosis

MOST_LAYERS = 16  # of the language model on a page; more are thinned out evenly
ATTENTION_BYTES = 16 * 2**20  # of the maps of raw attention on a page
WIDEST = 1024  # pixels along the longer side of the image
NOTEBOOK_FIGURES, NOTEBOOK_WIDTH = 6, 200  # heat maps in a notebook, and their pixels
NOTHING_KNOWN = "nothing known"
"""Label of the probability that the attended image evidence resembles none of the objects."""
MEANING = {
    "calibrated": "probability that the object is hallucinated, calibrated",
    "shifted": "score of the detector, not calibrated for this picture or question",
    "unknown": "score of the detector, which has no monitor to tell whether it is calibrated for this picture",
}
"""What a detector's percentages are, by ``Diagnosis.calibration``."""
VISUAL_EVIDENCE_NOTE = (
    "'Looks like' is what the detector has learned from right and invented mentions: how the place that a name was "
    "written from looks inside the model. It is no object detector: it knows only what was often named, and can err."
)
"""Explanation of the visual evidence, shown beside it."""


def describe_visual_evidence(objects: Sequence[NamedProbability]) -> str:
    """List the objects that the attended image evidence resembles, except those that round to 0 %.

    >>> describe_visual_evidence([("spoon", 0.61), ("fork", 0.217), (None, 0.09), ("cup", 0.002)]).replace("\xa0", " ")
    'spoon 61 %, fork 22 %, nothing known 9.0 %'
    """
    return ", ".join(
        f"{NOTHING_KNOWN if name is None else name} {percent(probability)}"
        for name, probability in objects
        if probability >= 0.005
    )


def script() -> Markup:
    """Read the viewer's script."""
    from markupsafe import Markup

    return Markup("").join(asset(f"diagnosis/{name}.js") for name in ("parts", "attention", "patches", "viewer"))


def viewer(**prefilled: Any) -> Markup:
    """Write the viewer's elements, which ``viewer.js`` fills in.

    Args:
        prefilled: parts of a payload that are shown even without JavaScript: ``asked``, ``text``, ``summary``,
            ``notes``, ``scope``.
    """
    empty = {"asked": "", "text": "", "summary": "", "notes": (), "scope": "row", "opacity": round(100 * OPACITY)}
    return render("diagnosis/viewer.html", data={**empty, **prefilled})


def payload(
    diagnosis: Diagnosis, most_layers: int = MOST_LAYERS, attention_bytes: int = ATTENTION_BYTES
) -> dict[str, Any]:
    """Convert a diagnosis to the JSON-able payload of the viewer.

    Args:
        diagnosis: of an answer of T tokens.
        most_layers: of the language model; with more, layers are dropped evenly, but never the last one.
        attention_bytes: of the maps of raw attention, see ``attention_payload``.

    Returns:
        Shares are in ten-thousandths and log-odds rounded, to keep the JSON short. ``maps`` has for ``raw`` and
        ``tower`` the T x layers heat maps of ``shape`` in base64, a byte per cell, each map scaled to its own maximum
        (``peaks``).
    """
    depth = 0 if diagnosis.relevancy is None else diagnosis.relevancy.image.shape[1]
    layers = thinned_out(depth, most_layers) if depth else []
    shown = text_payload(diagnosis)
    warned = [mention.tokens[0] for mention in diagnosis.mentions if mention.tokens and mention.warned]
    named = [mention.tokens[0] for mention in diagnosis.mentions if mention.tokens]
    tokens = [{**token, **_token_details(diagnosis, index, layers)} for index, token in enumerate(shown["tokens"])]
    return {
        **shown,
        "kind": "done",
        "size": list(diagnosis.image.size),
        "photo": data_uri(diagnosis.image, WIDEST),
        "start": (warned or named or [0])[0],
        "scope": diagnosis.scope,
        "layers": layers,
        "depth": depth,
        "ramp": RAMP.tolist(),
        "question": list(diagnosis.question_tokens),
        "maps": dict(_maps(diagnosis, layers)) if layers else {},
        "attention": attention_payload(diagnosis, attention_bytes),
        "seen": seen_payload(diagnosis),
        "tokens": tokens,
    }


def text_payload(diagnosis: Diagnosis) -> dict[str, Any]:
    """Convert the text of a diagnosis for the payload: tokens, mentions, notes."""
    text = diagnosis.answer.text
    mention_by_token: dict[int, int] = {}
    for index, mention in enumerate(diagnosis.mentions):
        mention_by_token |= {token: index for token in mention.tokens if token not in mention_by_token}
    tokens = []
    for index, (start, end) in enumerate(diagnosis.answer.offsets):
        start += len(text[start:end]) - len(text[start:end].lstrip())  # the viewer's box begins at the word
        tokens.append(
            {
                "span": [start, end],
                "text": diagnosis.answer.tokens[index],
                "probability": round(float(diagnosis.token_probability[index]), 4),
                "entropy": round(float(diagnosis.entropy[index]), 3),
                "mention": mention_by_token.get(index),
            }
        )
    mentions = [
        {**mention_payload(mention.object, mention.tokens, mention.verdict, mention.label), "start": start}
        for mention in diagnosis.mentions
        for start in [diagnosis.answer.offsets[mention.tokens[0]][0] if mention.tokens else None]
    ]
    cut = [] if diagnosis.answer.finished else [f"The answer was cut off at {counted(len(diagnosis), 'token')}."]
    return {
        "history": [list(turn) for turn in diagnosis.history],
        "asked": diagnosis.question,
        "text": text,
        "tokens": tokens,
        "mentions": mentions,
        "threshold": diagnosis.threshold,
        "shift": diagnosis.shift,
        "calibration": diagnosis.calibration,
        "meaning": MEANING[diagnosis.calibration],
        "truth": None if diagnosis.truth is None else list(diagnosis.truth),
        "edit": edit_payload(diagnosis.edit, text, diagnosis.truth),
        "reply": "" if mentions else describe_reply(diagnosis),
        "visual_evidence_note": VISUAL_EVIDENCE_NOTE if any(row["visual_evidence"] for row in mentions) else "",
        "summary": f"{diagnosis.model}, {counted(len(diagnosis), 'token')}",
        "notes": [*filter(None, [diagnosis.shift]), *cut, *(f"Not shown: {note}" for note in diagnosis.notes)],
    }


def describe_reply(diagnosis: Diagnosis) -> str:
    """Explain an answer that names no object: why nothing is warned of, and of a yes or no how sure the model is."""
    word = first_word(diagnosis.answer.text)
    if word is None:
        return "The answer names no object, so there is nothing to warn of."
    why = f"The answer is {word} and names no object itself, so the detector, which judges named objects, says nothing."
    index = next(index for index, token in enumerate(diagnosis.answer.tokens) if word in token.lower())
    shares = {word: float(diagnosis.token_probability[index])}
    if diagnosis.evolution is not None:
        top = zip(diagnosis.evolution.top_tokens[index][-1], diagnosis.evolution.probabilities[index, -1], strict=True)
        by_word = [(text.strip().lower(), float(probability)) for text, probability in top]
        shares |= {name: sum(value for text, value in by_word if text == name) for name in ("yes", "no")}
    sure = ", ".join(f"{name} {percent(share)}" for name, share in sorted(shares.items(), key=lambda pair: -pair[1]))
    return f"{why} How sure the model is: {sure}."


def mention_payload(name: str, tokens: Sequence[int], verdict: TokenVerdict | None, label: int = -1) -> dict[str, Any]:
    """Convert a mention for the payload.

    Args:
        name: of the object.
        tokens: indices of the tokens that name it.
        verdict: of the detector; None without one.
        label: the truth: 1 hallucinated, 0 grounded, -1 not known.
    """
    return {"object": name, "tokens": list(tokens), "label": label, **_verdict_payload(verdict)}


def _verdict_payload(verdict: TokenVerdict | None) -> dict[str, Any]:
    if verdict is None:
        return {"probability": None, "evidence": None, "prior": None, "top": [], "visual_evidence": ""}
    return {
        "probability": float(verdict.probability),  # not rounded: it is compared with the threshold
        "evidence": None if verdict.evidence is None else round(verdict.evidence, 3),
        "prior": None if verdict.prior is None else round(verdict.prior, 3),
        "top": [[name, round(contribution, 3)] for name, contribution in verdict.top],
        "visual_evidence": describe_visual_evidence(verdict.visual_evidence),
    }


def summarise(diagnosis: Diagnosis) -> str:
    """Summarise in one line: the model, the length of its answer, the number of warnings."""
    parts = [diagnosis.model, counted(len(diagnosis), "token"), f"{sum(diagnosis.seconds.values()):.1f} s"]
    if diagnosis.threshold is not None:
        parts.append(f"warned of {len(diagnosis.warned)} of {counted(len(diagnosis.mentions), 'mention')}")
        parts.append(f"threshold {percent(diagnosis.threshold)}")
    parts += [f"{number} {outcome}" for outcome, number in diagnosis.outcomes.items() if outcome != "right"]
    return ", ".join(parts)


def page(diagnosis: Diagnosis) -> str:
    """Write the static page of ``Diagnosis.to_html``: the viewer and its payload."""
    data = {**payload(diagnosis), "answer_id": "page"}
    data["summary"] += f", {sum(diagnosis.seconds.values()):.1f} s"  # warnings and outcomes have a line of their own
    parts = {key: data[key] for key in ("asked", "text", "summary", "notes", "scope")}
    body = render("diagnosis/page.html", viewer=viewer(**parts), data=json_block(data))
    code = render("diagnosis/page.js", viewer=script())
    return document(f"stethoscope: {diagnosis.question}", body, asset("diagnosis/viewer.css"), code)


def notebook(diagnosis: Diagnosis) -> str:
    """Write the notebook display of ``Diagnosis._repr_html_``.

    It needs no JavaScript, which notebooks remove unless they are trusted.
    """
    data = text_payload(diagnosis)
    shown = [mention for mention in diagnosis.mentions if mention.tokens and mention.warned]
    shown = (shown or [mention for mention in diagnosis.mentions if mention.tokens])[:NOTEBOOK_FIGURES]
    figures = [(data_uri(diagnosis.image, 2 * NOTEBOOK_WIDTH), "the picture")]
    for mention in shown:
        with suppress(CapabilityError):  # the model gives no heat map
            image = overlay(diagnosis.image, diagnosis.heat_map(mention.tokens[0]), width=NOTEBOOK_WIDTH)
            figures.append((data_uri(image, 2 * NOTEBOOK_WIDTH), mention.object + _verdict_text(diagnosis, mention)))
    display = render(
        "diagnosis/notebook.html",
        data=data,
        summary=summarise(diagnosis),
        pieces=_notebook_pieces(data),
        figures=figures,
        width=NOTEBOOK_WIDTH,
        meaning=MEANING[diagnosis.calibration],
        percent=percent,
    )
    return str(display)


def _notebook_pieces(data: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Split the answer into tokens with probability, mention and warning, and the text between them."""
    text, position, threshold = data["text"], 0, data["threshold"]
    for token in data["tokens"]:
        start, end = token["span"]
        if start >= end:
            continue
        mention = None if token["mention"] is None else data["mentions"][token["mention"]]
        probability = mention["probability"] if mention else None
        yield text[position:start], None
        warned = threshold is not None and probability is not None and probability >= threshold
        yield text[start:end], {"probability": token["probability"], "mention": mention, "warned": warned}
        position = end
    yield text[position:], None


def _verdict_text(diagnosis: Diagnosis, mention: DiagnosedMention) -> str:
    """Write a mention's probability for a caption, with what it is worth here; empty without a detector."""
    if mention.verdict is None:
        return ""
    name = "hallucinated" if diagnosis.calibration == "calibrated" else "score"
    void = " (not calibrated here)" if diagnosis.shift else ""
    return f", {name} {percent(mention.verdict.probability)}{void}"


def _token_details(diagnosis: Diagnosis, index: int, layers: list[int]) -> dict[str, Any]:
    """Convert a token's verdict, layer predictions and relevancy for the payload."""
    verdict = diagnosis.verdicts[index] if diagnosis.verdicts else None
    details: dict[str, Any] = {"word": "", "evolution": [], "verdict": _verdict_payload(verdict)}
    if diagnosis.evolution is not None:
        details["evolution"] = diagnosis.evolution.to_list(index)
        details["word"] = diagnosis.evolution.answer_tokens[index]
    relevancy = diagnosis.relevancy
    if relevancy is not None:
        total = relevancy.total[index, layers].numpy().clip(min=1e-12)
        parts = [_ten_thousandths(values[index, layers]) for values in diagnosis.shares.values()]
        details["shares"] = np.stack(parts, 1).tolist()
        details["contribution"] = {
            name: [round(value, 3) for value in values[index, layers].tolist()]
            for name, values in diagnosis.contributions.items()
        }
        question, answer = relevancy.question[index, layers].numpy(), relevancy.answer[index, layers, :index].numpy()
        details["question"] = _ten_thousandths(question / total[:, None]).tolist()
        details["answer"] = _ten_thousandths(answer / total[:, None]).tolist()
        details["total"] = [float(f"{value:.4g}") for value in total]
    return details


def _ten_thousandths(shares: np.ndarray) -> np.ndarray:
    return np.rint(10_000 * shares).astype(int)


def _maps(diagnosis: Diagnosis, layers: list[int]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Convert the heat maps of all tokens after the given layers for the payload.

    A single tile is written as it is, with its box in the image; several are resampled to a raster of the image.
    """
    for kind in ("raw", "tower"):
        try:
            tiles, boxes = diagnosis.relevancy_tiles((slice(None), layers), raw=kind == "raw")
        except CapabilityError:
            continue
        values, box = one_grid(tiles, boxes, diagnosis.image.size, RASTER)
        scaled, peaks = in_bytes(values)
        yield (
            kind,
            {
                "shape": list(scaled.shape[-2:]),
                "box": [round(edge, 2) for edge in box],
                "peaks": [[float(f"{value:.4g}") for value in row] for row in peaks],
                "data": in_base64(scaled),
            },
        )


@cache
def _notebook_figure_class() -> type[Figure]:
    """Define a figure that notebooks display without ``%matplotlib inline``."""
    from matplotlib.figure import Figure

    class NotebookFigure(Figure):
        def _repr_png_(self) -> bytes:
            file = io.BytesIO()
            self.savefig(file, format="png", dpi=80)
            return file.getvalue()

    return NotebookFigure


def figure(diagnosis: Diagnosis, token: int, layer: int = -1, raw: bool | None = None) -> Figure:
    """Plot one token, for ``Diagnosis.plot``; the figure has no window, and notebooks display it.

    Args:
        diagnosis: of the answer.
        token: index in the answer.
        layer: of the heat map, the last by default.
        raw: as in ``Diagnosis.heat_map``.
    """
    heat_map = diagnosis.heat_map(token, layer, raw)
    result = _notebook_figure_class()(figsize=(12, 4), layout="constrained")
    image, parts, rank = result.subplots(1, 3, width_ratios=(1.2, 1, 1))
    image.imshow(diagnosis.image)
    top = heat_map.max()
    strength = heat_map / top if top > 0 else heat_map
    image.imshow(colours(strength), alpha=OPACITY * strength)
    image.set_axis_off()
    word = diagnosis.answer.tokens[token].strip()
    title = f"{word!r}, probability {percent(diagnosis.token_probability[token])}"
    mention = diagnosis.mention_of(token)
    if mention is not None:
        title += _verdict_text(diagnosis, mention)
    image.set_title(title, parse_math=False)
    names = list(diagnosis.shares)
    layers = np.arange(1, len(diagnosis.shares["image"][token]) + 1)
    parts.stackplot(layers, [diagnosis.shares[name][token] for name in names], labels=names)
    parts.set(xlabel="layer", ylabel="share of relevancy", ylim=(0, 1))
    parts.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(names), fontsize="small", frameon=False)
    for axis in (parts.xaxis, rank.xaxis, rank.yaxis):
        axis.get_major_locator().set_params(integer=True)
    if diagnosis.evolution is not None:
        values = diagnosis.evolution.rank[token] + 1
        rank.plot(np.arange(1, len(values) + 1), values, marker="o")
        rank.set(xlabel="layer", ylabel="rank of the token, 1 is best", ylim=(values.max() + 0.5, 0.5))
        if values.max() > 20:
            rank.set(yscale="log", ylim=(2 * values.max(), 0.8))
    else:
        rank.set_axis_off()
    return result
