"""Make parts of what the viewer shows: what a mitigation did to an answer, and the model's raw attention.

An edit is shown before and after, with what was removed or chosen, and why; attention as maps by layer and head, their
sums, and the mean as a matrix.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any

import numpy as np

from stethoscope.core.text import percent
from stethoscope.relevancy.heatmaps import image_token_tiles, in_bytes, one_grid

if TYPE_CHECKING:
    from stethoscope.diagnosis.diagnosis import Diagnosis
    from stethoscope.diagnosis.layers_pass import AttentionMaps
    from stethoscope.tracing.token_spans import Box, TokenRegions

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


# --- raw attention ----------------------------------------------------------------------------------------------------

RASTER = 32  # cells along the longer side of a map that is assembled from several tiles


def attention_payload(diagnosis: Diagnosis, limit: int) -> dict[str, Any] | None:
    """Convert raw attention for the payload of the viewer; None where there is none.

    Half of the bytes are for the means over heads and the largest heads of all tokens, of which layers are dropped
    evenly where they do not fit; what is left is for the single heads of tokens, first of those that name objects.

    Args:
        diagnosis: of an answer of T tokens; K of them get the maps of their single heads.
        limit: bytes of all maps, before base64.

    Returns:
        ``data`` are a byte per cell in base64, each map scaled to its own maximum (``peaks``, float32 in base64):
        ``maps`` has for ``mean`` and ``largest`` (T, layers + 1) maps, the last the mean over all layers;
        ``single`` are the (K, L, H) maps of the tokens ``kept``. ``mass`` (T, L, H) and ``matrix`` (T, columns) are
        uint16 in base64, in 32767ths. A model whose image tokens are no grid has ``box`` None.
    """
    attention = diagnosis.attention
    if attention is None:
        return None
    count, layers, heads = attention.image_mass.shape
    means = np.stack([part.numpy() for part in (attention.mean, attention.largest)])  # (2, T, L, N)
    regions, size = diagnosis.token_regions, diagnosis.image.size
    cells = gridded(means[0, 0, 0], regions, size)[0].size
    fit = max(limit // 2 // (2 * count * cells) - 1, 1)
    chosen = thinned_out(layers, fit)
    means = np.concatenate([means[:, :, chosen], means.mean(2, keepdims=True)], 2)
    named = [token for mention in diagnosis.mentions for token in mention.tokens]
    order = [token for token in dict.fromkeys([*named, *range(count)]) if token in attention.tokens]
    left = limit - 2 * count * (len(chosen) + 1) * cells
    maps: dict[str, Any] = {}
    for name, values in zip(("mean", "largest"), means, strict=True):
        grid, box = gridded(values, regions, size)
        maps[name] = _encoded_maps(grid)
    return {
        "shape": list(grid.shape[-2:]),
        "box": None if box is None else [round(edge, 2) for edge in box],
        "layers": layers,
        "heads": heads,
        "crosses": attention.crosses,
        "tiles": 0 if regions is None else len(regions.grids),
        "chosen": chosen,
        "maps": maps,
        **heads_payload(attention, regions, size, order[: max(left, 0) // (layers * heads * cells)]),
        "mass": _shares(attention.image_mass.numpy()),
        "matrix": _shares(attention.matrix.numpy()),
    }


def seen_payload(diagnosis: Diagnosis) -> dict[str, Any] | None:
    """Convert where the detector sees the objects for the payload; None where it looks for none, or there is no grid.

    Returns:
        ``objects`` has for every name the largest probability of an image token alone, and the map of ``shape`` in
        base64, a byte per cell, scaled to its own maximum.
    """
    regions = diagnosis.token_regions
    if not diagnosis.seen or regions is None or not regions.grids:
        return None
    grid, box = gridded(np.stack(list(diagnosis.seen.values())), regions, diagnosis.image.size)
    scaled = in_bytes(grid)[0]
    return {
        "shape": list(grid.shape[-2:]),
        "box": [round(edge, 2) for edge in box or ()],
        "objects": {
            name: [round(float(values.max()), 4), in_base64(cells)]
            for (name, values), cells in zip(diagnosis.seen.items(), scaled, strict=True)
        },
    }


def heads_payload(
    attention: AttentionMaps, regions: TokenRegions | None, size: tuple[int, int], tokens: Sequence[int]
) -> dict[str, Any]:
    """Convert the single heads of some tokens for the payload.

    Args:
        attention: of the answer.
        regions: of the image tokens; None where they are not known.
        size: width and height of the picture.
        tokens: indices in the answer, of those whose single heads are held.

    Returns:
        ``kept``, the tokens in ascending order, and their maps ``single``.
    """
    kept = sorted(tokens)
    values = attention.heads[[attention.tokens.index(token) for token in kept]].numpy()
    return {"kept": kept, "single": _encoded_maps(gridded(values, regions, size)[0])}


def gridded(values: np.ndarray, regions: TokenRegions | None, size: tuple[int, int]) -> tuple[np.ndarray, Box | None]:
    """Arrange (..., N) values of image tokens as (..., rows, columns) with a box, or as a row without where no grid."""
    if regions is None or not regions.grids:
        return values[..., None, :], None
    return one_grid(*image_token_tiles(values, regions), size, RASTER)


def thinned_out(layers: int, most: int) -> list[int]:
    """Choose at most so many layers, evenly and with the last one.

    >>> thinned_out(32, 4), thinned_out(3, 16)
    ([0, 10, 21, 31], [0, 1, 2])
    """
    return sorted({round(value) for value in np.linspace(0, layers - 1, min(layers, most))})


def _encoded_maps(values: np.ndarray) -> dict[str, str]:
    scaled, peaks = in_bytes(values)
    return {"data": in_base64(scaled), "peaks": in_base64(peaks.astype("<f4"))}


def _shares(values: np.ndarray) -> str:
    return in_base64(np.rint(32767 * values.clip(0, 1)).astype("<u2"))


def in_base64(values: np.ndarray) -> str:
    """Write the bytes of an array in base64."""
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode("ascii")
