"""Measure where image and question tokens stand, and what tokens cover: regions of the image, characters of the answer.

Positions are read from the processor's output. Regions are read from an image whose red encodes x and whose green
encodes y, after it has passed through the processor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from stethoscope.adapters.base import Adapter
    from stethoscope.tracing.trace import Spans

Grids = tuple[tuple[int, int], ...]


def image_positions(ids: Sequence[int], image_token_id: int) -> tuple[int, ...]:
    """Return the positions of the image tokens.

    >>> image_positions([1, 9, 9, 4], 9)
    (1, 2)
    """
    return tuple(position for position, token in enumerate(ids) if token == image_token_id)


def question_positions(
    ids: Sequence[int],
    offsets: Sequence[Sequence[int]],
    replacements: Sequence[Mapping[str, Any]],
    span: tuple[int, int],
    image_token_id: int,
    decodes: Callable[[Sequence[int]], bool],
    inserted: Sequence[int] = (0,),
) -> tuple[int, ...]:
    """Return the positions of the question's tokens.

    Args:
        ids: the expanded prompt.
        offsets: the characters of every token in the expanded text.
        replacements: which characters of the prompt the processor replaced, each with ``span`` and ``replacement``.
        span: the question's characters in the prompt.
        image_token_id: placeholder; some processors give its tokens offsets that start again at 0.
        decodes: whether ids decode to the question.
        inserted: numbers of characters that the processor may have put before the question without reporting them
            (PaliGemma inserts a beginning-of-sequence token); the first that decodes is taken.
    """
    start, end = span
    grown = sum(
        len(part["replacement"]) - (part["span"][1] - part["span"][0])
        for part in replacements
        if part["span"][1] <= start
    )
    first_try: tuple[int, ...] | None = None
    for more in inserted:
        first, last = start + grown + more, end + grown + more
        positions = tuple(
            position
            for position, (left, right) in enumerate(offsets)
            if left < last and right > first and right > left and ids[position] != image_token_id
        )
        if decodes([ids[position] for position in positions]):
            return positions
        first_try = positions if first_try is None else first_try
    return first_try or ()


def image_layout(config: Any, inputs: Mapping[str, Tensor], count: int) -> tuple[Grids, tuple[int, ...]]:
    """Return ``tile_grids``, also for LLaVA-NeXT and LLaVA-OneVision, whose image tokens include separators.

    There the first grid is the whole picture in one tile, the second the picture put together from all other tiles,
    their padding cut off, with a newline token behind each row.

    Returns:
        The grids, and which of the N image tokens are separators, counted from 0.
    """
    shapes, vision = getattr(config, "image_grid_pinpoints", None), getattr(config, "vision_config", None)
    if not shapes or vision is None or "image_sizes" not in inputs:
        return tile_grids(config, inputs, count), ()
    import torch
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    side, size = vision.image_size // vision.patch_size, inputs["image_sizes"][0].tolist()
    tiles = get_anyres_image_grid_shape(size, shapes, vision.image_size)
    rows, columns = unpad_image(torch.empty(1, tiles[0] * side, tiles[1] * side), size).shape[1:]
    most = getattr(config, "vision_aspect_ratio", "")
    if most.startswith("anyres_max_"):  # OneVision scales down what is well above as many tiles
        ratio = math.sqrt(rows * columns / int(most.removeprefix("anyres_max_"))) / side
        rows, columns = (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)
    if side * side + rows * (columns + 1) != count:
        return (), ()
    newlines = tuple(side * side + row * (columns + 1) + columns for row in range(rows))
    return ((side, side), (rows, columns)), newlines


def tile_grids(config: Any, inputs: Mapping[str, Tensor], count: int) -> Grids:
    """Return rows and columns of every tile of image tokens; empty where the tokens form no known grid.

    Args:
        config: the model's config.
        inputs: the processor's output for one image.
        count: number of image tokens N; a grid that does not account for exactly N is not given.
    """
    vision = getattr(config, "vision_config", None)
    if "image_grid_thw" in inputs:
        merge = getattr(vision, "spatial_merge_size", 1)
        grids = [(h // merge, w // merge) for t, h, w in inputs["image_grid_thw"].tolist() for _ in range(t)]
        return tuple(grids) if sum(h * w for h, w in grids) == count else ()
    queries = getattr(config, "qformer_config", None) is not None
    padded = "image_sizes" in inputs  # LLaVA-NeXT and OneVision cut the padding off and add a token per row
    pixels, patch = inputs.get("pixel_values"), getattr(vision, "patch_size", None)
    if queries or padded or pixels is None or pixels.dim() < 4 or not patch or not count:
        return ()
    patch_rows, patch_columns = patch if isinstance(patch, (list, tuple)) else (patch, patch)
    tiles = math.prod(pixels.shape[:-3])
    rows, columns = pixels.shape[-2] // patch_rows, pixels.shape[-1] // patch_columns
    merge = math.isqrt(max(rows * columns * tiles // count, 1))  # patches merged into a token, along each side
    grid = (rows // merge, columns // merge)
    return (grid,) * tiles if grid[0] * grid[1] * tiles == count else ()


# --- where image tokens lie in the picture ----------------------------------------------------------------------------

Box = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels of the image; beyond its edges where the image was padded."""

_QUESTION = "Where?"  # any question, because pixels do not depend on it
_measured: WeakKeyDictionary[Adapter, dict[tuple[int, int], tuple[Box | None, ...] | None]] = WeakKeyDictionary()


@dataclass(frozen=True)
class TokenRegions:
    """Regions of an image that its tokens and patches cover.

    Attributes:
        size: width and height of the image.
        grids: (rows, columns) and box of every tile of image tokens, in order; empty where they are no grid.
        cells: index among the N image tokens of every cell of the grids, tile by tile, row by row.
        tiles: box of every tile of ``Relevancy.tiles``; None for a tile that shows nothing of the picture.
    """

    size: tuple[int, int]
    grids: tuple[tuple[tuple[int, int], Box | None], ...]
    cells: tuple[int, ...]
    tiles: tuple[Box | None, ...]


def token_regions(adapter: Adapter, size: tuple[int, int], spans: Spans, tiles: int = 0) -> TokenRegions:
    """Measure the regions of image tokens and patches in images of a size; encodes three prompts the first time.

    Args:
        adapter: the model.
        size: width and height of the picture.
        spans: of a prompt with such a picture.
        tiles: number of tiles of the vision tower's patches, as in ``Relevancy.tiles``; 0 where there are none.
    """
    whole = (0.0, 0.0, float(size[0]), float(size[1]))
    boxes_by_size = _measured.setdefault(adapter, {})
    if size not in boxes_by_size:
        boxes_by_size[size] = _tile_boxes(adapter, size)
    boxes = boxes_by_size[size]
    # with separators the padding is cut off, and what is left of the tiles is the whole picture again
    own = boxes if boxes is not None and not spans.separators and len(boxes) == len(spans.grids) else None
    grids = tuple(zip(spans.grids, own or [whole] * len(spans.grids), strict=True))
    separators = set(spans.separators)
    cells = tuple(index for index, position in enumerate(spans.image) if position not in separators)
    patches = boxes if boxes is not None and len(boxes) == tiles else (whole,) * tiles
    return TokenRegions(size, grids, cells, patches)


def _coordinates(width: int, height: int) -> Image:
    from PIL import Image

    pixels = np.full((height, width, 3), 200, dtype=np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)[None].round()
    pixels[..., 1] = np.linspace(0, 255, height)[:, None].round()
    return Image.fromarray(pixels)


def _tile_boxes(adapter: Adapter, size: tuple[int, int]) -> tuple[Box | None, ...] | None:
    """Read the box of every tile of ``pixel_values``; None where they are no tiles but rows of patches."""
    from PIL import Image

    pictures = [_coordinates(*size), *(Image.new("RGB", size, shade) for shade in ("black", "white"))]
    shown, black, white = (adapter.encode(picture, _QUESTION).inputs["pixel_values"].float() for picture in pictures)
    if shown.dim() < 4 or shown.shape != black.shape:
        return None
    levels, ranges = (shown - black).flatten(0, -4), (white - black).flatten(0, -4)
    return tuple(_box(level, range_, size) for level, range_ in zip(levels, ranges, strict=True))


def _box(levels: Tensor, ranges: Tensor, size: tuple[int, int]) -> Box | None:
    """Fit the box of a tile (3, height, width) to its levels as shares of their ranges, which are 0 on padding.

    Lines are summed before they are divided: a pixel that is padding for the most part has hardly any range.
    """
    lines = levels[0].sum(0) / ranges[0].sum(0), levels[1].sum(1) / ranges[1].sum(1)
    across, down = (_ends(values, side) for values, side in zip(lines, size, strict=True))
    return None if across is None or down is None else (across[0], down[0], across[1], down[1])


def _ends(values: Tensor, side: int) -> tuple[float, float] | None:
    """Fit start and end of a line of pixels to the positions of their centres.

    The outermost pixels are left out, because resizing repeats pixels at an edge.
    """
    known = values.isfinite().nonzero()[:, 0].numpy()
    if not len(known):
        return None
    if len(known) == 1 or side == 1:
        return 0.0, float(side)
    inset = (len(known) - 1) // 8
    known = known[inset : len(known) - inset]
    middles = values.numpy()[known] * (side - 1) + 0.5  # a level of 0 is the middle of the first pixel
    step, start = np.polyfit(known + 0.5, middles, 1)
    return float(start), float(start + step * len(values))


CONTEXT = 6
"""Number of preceding tokens that can change how a token is decoded."""


def decode_with_offsets(
    ids: Sequence[int], decode: Callable[[Sequence[int]], str]
) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Decode token ids to text without leading white space, and a character span for every token.

    A token ends where the decoded prefix up to it agrees with the whole text. So the bytes of a character that is not
    complete yet (U+FFFD in the prefix) count for the token that completes it, and SentencePiece's spaces are where the
    whole text has them. The spans are adjacent and cover the text.

    Args:
        ids: of the answer's tokens.
        decode: decodes a list of ids as a whole.

    Returns:
        The text, and a (start, end) pair for every id.

    >>> words = {1: b"a", 2: b" caf", 3: bytes([0xC3]), 4: bytes([0xA9])}
    >>> decode_with_offsets([1, 2, 3, 4], lambda ids: b"".join(words[i] for i in ids).decode(errors="replace"))
    ('a café', ((0, 1), (1, 5), (5, 5), (5, 6)))
    """
    ids = list(ids)
    text = decode(ids)
    if len(ids) > 2 * CONTEXT and "\ufffd" not in text:  # in linear time, unless characters are incomplete
        growing = GrowingText(decode)
        tokens = [growing.add(token) for token in ids]
        if "".join(part for part, _, _ in tokens) == text.lstrip():
            return text.lstrip(), tuple((start, end) for _, start, end in tokens)
    ends, end = [], 0
    for count in range(1, len(ids)):
        prefix = decode(ids[:count])
        while not text.startswith(prefix[end:], end):  # the prefix ends in an incomplete character, rarely in several
            prefix = prefix[:-1]
        end = max(end, len(prefix))
        ends.append(end)
    ends.append(len(text))
    lead = len(text) - len(text.lstrip())
    ends = [max(end - lead, 0) for end in ends[: len(ids)]]
    return text[lead:], tuple(zip([0, *ends[:-1]], ends, strict=True)) if ids else ()


def decoder_of(tokenizer: PreTrainedTokenizerBase) -> Callable[..., str]:
    """Return ``decode`` of the tokenizer without cleaning up spaces; fast tokenizers skip their wrapper.

    The wrapper doubles the time of a call. What the two do with special tokens by default differs, so say it.
    """
    from transformers import PreTrainedTokenizerFast  # reading spans needs none

    own = [getattr(type(tokenizer), name, None) for name in ("decode", "_decode")]
    if own == [PreTrainedTokenizerFast.decode, PreTrainedTokenizerFast._decode]:
        return tokenizer.backend_tokenizer.decode
    decode_ids = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    return cast("Callable[..., str]", decode_ids)  # one sequence gives a string; only batches give lists


class GrowingText:
    """Decodes tokens one by one, with the spans of ``decode_with_offsets``.

    Only the newest tokens, which can change how the next one is decoded, are decoded each time: decoding all of them
    would take time that grows with the answer.

    Args:
        decode: decodes a list of ids as a whole.

    >>> words = {1: b" a", 2: b" caf", 3: bytes([0xC3]), 4: bytes([0xA9])}
    >>> text = GrowingText(lambda ids: b"".join(words[i] for i in ids).decode(errors="replace"))
    >>> [text.add(token) for token in (1, 2, 3, 4)]
    [('a', 0, 1), (' caf', 1, 5), ('', 5, 5), ('é', 5, 6)]
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []  # the newest tokens
        self._returned = 0  # characters of their text that have been returned
        self._end = 0  # length of the answer so far
        self._before: list[tuple[list[int], int, int]] = []  # all three before every token

    def add(self, token: int) -> tuple[str, int, int]:
        """Decode one more token; return the characters that it completes, and their start and end in the answer."""
        self._before.append((self._ids, self._returned, self._end))
        self._ids = [*self._ids, token]
        text = self._decode(self._ids)
        whole = text.rstrip("\ufffd")  # U+FFFD stands for an incomplete character
        if not self._end:
            self._returned = len(whole) - len(whole.lstrip())
        start, more = self._end, whole[self._returned :]
        self._end, self._returned = start + len(more), max(self._returned, len(whole))
        if len(self._ids) >= 2 * CONTEXT and whole == text:
            recent = self._decode(self._ids[-CONTEXT:])
            if "\ufffd" not in recent and text.endswith(recent.lstrip()):  # it does not begin within a character
                self._ids, self._returned = self._ids[-CONTEXT:], len(recent)
        return more, start, self._end

    def rewind(self, count: int) -> None:
        """Go back to the first ``count`` tokens."""
        if count < len(self._before):
            self._ids, self._returned, self._end = self._before[count]
            del self._before[count:]
