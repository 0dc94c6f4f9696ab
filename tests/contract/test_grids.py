"""Grids decode to the right part of the picture: a patch of it is painted, and the tokens that change are looked up."""

import numpy as np
import pytest
import torch
from helpers.contract_helpers import language
from PIL import Image

from stethoscope.tracing.hooks import AttentionRecorder, record

QUESTION = "What is it?"
WIDE, SQUARE, LARGE = (100, 40), (72, 56), (330, 250)
EDGE = 4  # pixels of the picture that resizing may mix into a patch that is beside the painted one


class Still(AttentionRecorder):
    """Keeps patches apart: the attention of the vision tower adds nothing."""

    heard = False
    roles = ("vision",)

    def forward(self, call):
        self.heard = True
        query, value = call.query, call.value
        return value.new_zeros(*query.shape[:1], query.shape[2], query.shape[1], value.shape[-1]), None


def embeddings(adapter, encoded):
    """(N, D) what the language model reads at the image tokens, and whether patches were kept apart before."""
    read, still = [], Still()
    handle = (
        language(adapter)
        .layers[0]
        .register_forward_pre_hook(
            lambda module, inputs, named: read.append(inputs[0] if inputs else named["hidden_states"]), with_kwargs=True
        )
    )
    try:
        with torch.no_grad(), record(adapter.model, still):
            adapter.model(**encoded.inputs)
    finally:
        handle.remove()
    return read[0][0, list(encoded.spans.image)], still.heard


def coordinates(width, height):
    """A picture whose red says how far right a pixel is, and green how far down."""
    pixels = np.full((height, width, 3), 200, dtype=np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)[None].round()
    pixels[..., 1] = np.linspace(0, 255, height)[:, None].round()
    return Image.fromarray(pixels)


def boxes(adapter, width, height, grids):
    """Left, top, right and bottom of every tile in the picture, read off what the model gets of ``coordinates``."""
    whole = (0.0, 0.0, float(width), float(height))
    pictures = [coordinates(width, height), *(Image.new("RGB", (width, height), shade) for shade in ("black", "white"))]
    shown, *extremes = (adapter.encode(picture, QUESTION).inputs["pixel_values"] for picture in pictures)
    if shown.dim() < 4 or shown.shape[:-3].numel() != len(grids):
        return [whole] * len(grids)  # Qwen's rows of patches; LLaVA-NeXT and OneVision have the picture twice
    black, white = extremes
    tiles = ((shown - black) / (white - black)).flatten(0, -4)  # not a number where the picture is padded
    boxes_of_tiles = []
    for tile in tiles:
        sides = [_ends(tile[0].nanmean(0) * width), _ends(tile[1].nanmean(1) * height)]
        boxes_of_tiles.append(tuple(float(side[end]) for end in (0, 1) for side in sides))
    return boxes_of_tiles


def _ends(places):
    """Where a line of pixels begins and ends, from where the middles of some of them are."""
    known = places.isfinite().nonzero()[:, 0]
    first, last = int(known[0]), int(known[-1])
    step = (places[last] - places[first]) / (last - first)
    return places[first] - step * (first + 0.5), places[last] + step * (len(places) - last - 0.5)


def cells(spans, tiles):
    """Of every image token that is no separator, in order: its tile and the box that it stands for in the picture."""
    boxes_by_tile = []
    for tile, ((rows, columns), (left, top, right, bottom)) in enumerate(zip(spans.grids, tiles, strict=True)):
        wide, high = (right - left) / columns, (bottom - top) / rows
        for row in range(rows):
            for column in range(columns):
                x, y = left + column * wide, top + row * high
                boxes_by_tile.append((tile, (x, y, x + wide, y + high)))
    return boxes_by_tile


def meet(box, other, edge=0.0):
    """Whether two boxes overlap, or come as near as ``edge``."""
    return all(box[axis] < other[axis + 2] + edge and other[axis] < box[axis + 2] + edge for axis in (0, 1))


def paintings(plain, size):
    """The picture with a blue patch, in 4 x 4 places, and the box of each."""
    across, down = (np.linspace(1, side - size - 1, 4).round().astype(int).tolist() for side in plain.size)
    for x in across:
        for y in down:
            picture = plain.copy()
            picture.paste((0, 0, 255), (x, y, x + size, y + size))
            yield picture, (x, y, x + size, y + size)


@pytest.mark.parametrize(("width", "height"), [SQUARE, WIDE, LARGE])
def test_a_painted_patch_changes_the_tokens_of_its_place(adapter, width, height):
    plain = coordinates(width, height)
    encoded = adapter.encode(plain, QUESTION)
    spans = encoded.spans
    if not spans.grids:
        pytest.skip("image tokens are no grid")
    if (width, height) == LARGE and adapter.family != "llava_onevision":
        pytest.skip("for OneVision, which scales down what is above nine tiles")
    tiles = boxes(adapter, width, height, spans.grids)
    before, apart = embeddings(adapter, encoded)
    places = cells(spans, tiles)
    separates = torch.tensor([position in spans.separators for position in spans.image])
    assert len(places) == (~separates).sum()
    size = max(6, min(width, height) // 8)
    changes, painted = [], []
    for picture, box in paintings(plain, size):
        after = adapter.encode(picture, QUESTION)
        assert after.spans == spans
        change = (embeddings(adapter, after)[0] - before).norm(dim=-1)
        assert not change[separates].any()
        changes.append(change[~separates])
        painted.append(box)
    if not apart:  # convolutions mix patches: what is painted in a token's place changes it more than what is not
        for token, (_, area) in enumerate(places):
            inside = torch.tensor([meet(box, area, -size / 2) for box in painted])
            change = torch.stack(changes)[:, token]
            assert change[inside].mean() > 1.1 * change[~inside].mean()
        return
    shown, edge = 0, 24 if (width, height) == LARGE else EDGE  # a token is then made from its neighbours' patches too
    for change, box in zip(changes, painted, strict=True):
        far = [index for index, (_, cell) in enumerate(places) if not meet(box, cell, edge)]
        assert not change[far].any()
        for tile, whole in enumerate(tiles):
            if meet(box, whole, -size / 2):  # the tile shows at least half of the patch
                here = [index for index, (of, _) in enumerate(places) if of == tile]
                most = max(here, key=lambda index: change[index])
                assert meet(box, places[most][1])
                shown += 1
    assert shown >= 8
