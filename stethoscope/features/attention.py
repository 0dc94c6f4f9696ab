"""Attention of the predicting row, head means by layer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from stethoscope.core.errors import CapabilityError
from stethoscope.features.common import normalised_entropy, once
from stethoscope.features.registry import both_rows, feature
from stethoscope.tracing.trace import SEGMENTS, Spans, Trace

if TYPE_CHECKING:
    from torch import Tensor


def _mass(trace: Trace, segment: str) -> Tensor:
    """(T, L) head-mean attention mass on a segment, in [0, 1]."""
    return trace.mean_mass[..., SEGMENTS.index(segment)]


@feature("attention", high="grounded", needs=["attention"])
def attn_image(trace: Trace) -> Tensor:
    """Attention mass on the image tokens, mean over heads, by layer (VAR, Jiang et al. 2025)."""
    return _mass(trace, "image")


@feature("attention", high="depends", needs=["attention"])
def attn_question(trace: Trace) -> Tensor:
    """Attention mass on the question, mean over heads, by layer."""
    return _mass(trace, "question")


@feature("attention", high="hallucinated", needs=["attention"])
def attn_previous(trace: Trace) -> Tensor:
    """Attention mass on the earlier answer tokens, mean over heads, by layer (layer 0: PAS, Hoang-Xuan et al. 2026)."""
    return _mass(trace, "previous")


@feature("attention", high="depends", needs=["attention"])
def attn_first(trace: Trace) -> Tensor:
    """Attention mass on the first token of the sequence, mean over heads, by layer."""
    return _mass(trace, "first")


def middle(layers: int) -> slice:
    """The layers that SVAR sums over.

    >>> middle(32)
    slice(5, 19, None)
    """
    return slice(round(0.15 * layers), round(0.55 * layers) + 1)


@feature("attention", high="grounded", needs=["attention"])
def svar(trace: Trace) -> Tensor:
    """Summed visual attention ratio: ``attn_image`` summed over the middle layers (SVAR, Jiang et al. 2025).

    Layers at 15 % to 55 % of the depth, which are the published 5 to 18 for 32 layers.
    """
    return _mass(trace, "image")[:, middle(trace.mass.shape[1])].sum(-1)


@feature("attention", high="depends", needs=["attention"])
def attn_entropy(trace: Trace) -> Tensor:
    """Entropy of the head-mean attention over image tokens divided by log N, in [0, 1], by layer."""
    return normalised_entropy(trace.image_attention)


def rows_of(part: Tensor, trace: Trace, offset: int) -> Tensor:
    """(T, ...) of (T + 1, ...): the predicting rows (``offset`` 0) or the consuming ones (1)."""
    return part[offset : offset + len(trace.answer.token_ids)]


@both_rows("heads", high="grounded", needs=["heads"])
def head_image(trace: Trace, offset: int) -> Tensor:
    """Attention mass on the image tokens, by head (VAR, Jiang et al., arXiv 2411.16724: input of its classifier)."""
    return rows_of(trace.heads.mass, trace, offset)[..., SEGMENTS.index("image")]


@both_rows("heads", high="depends", needs=["heads"])
def top20_mean(trace: Trace, offset: int) -> Tensor:
    """Mean of the 20 largest attentions to image tokens, by head (HaloProbe, Zohrabi et al., arXiv 2604.06165)."""
    return rows_of(trace.heads.top, trace, offset)[..., 0]


@both_rows("heads", high="depends", needs=["heads"])
def top20_entropy(trace: Trace, offset: int) -> Tensor:
    """Entropy in nats of these 20, normalised to sum 1, by head (HaloProbe)."""
    return rows_of(trace.heads.top, trace, offset)[..., 1]


def _lookback(trace: Trace, offset: int, context: tuple[str, ...]) -> Tensor:
    """(T, L, H) mean attention to the context over itself plus the mean attention to the answer so far."""
    spans = {"image": trace.spans.image, "question": trace.spans.question}
    size = sum(len(spans[name]) for name in context)
    mass = rows_of(trace.heads.mass, trace, offset)
    there = sum(mass[..., SEGMENTS.index(name)] for name in context) / max(size, 1)
    before = mass.new_tensor([max(index + offset, 1) for index in range(len(mass))])
    here = mass[..., SEGMENTS.index("previous")] / before[:, None, None]
    if offset == 0:
        here[:1] = 0
    return there / (there + here).clamp(min=1e-12)


@both_rows("lookback", high="grounded", needs=["heads"])
def lookback_image(trace: Trace, offset: int) -> Tensor:
    """Lookback ratio to the image tokens, in [0, 1], by head (Lookback Lens, Chuang et al., EMNLP 2024).

    Mean attention to a context token over that plus the mean attention to an earlier answer token. Where there is none
    yet the ratio is 1. The paper's context is the whole prompt; here it is split into what a prompt with an image has.
    """
    return _lookback(trace, offset, ("image",))


@both_rows("lookback", high="grounded", needs=["heads"])
def lookback_question(trace: Trace, offset: int) -> Tensor:
    """Lookback ratio to the question tokens, in [0, 1], by head (Lookback Lens)."""
    return _lookback(trace, offset, ("question",))


@both_rows("lookback", high="grounded", needs=["heads"])
def lookback_context(trace: Trace, offset: int) -> Tensor:
    """Lookback ratio to image and question tokens together, in [0, 1], by head (Lookback Lens)."""
    return _lookback(trace, offset, ("image", "question"))


OVERTRUST_SCALE, OVERTRUST_FACTOR = 50.0, 1e-7


"""Of OPERA's released code: every attention times 50, every product times 1e-7."""


FOREGROUND, SMALLEST = 0.10, 3


"""Of ADS: the share of the patches that are foreground, and the fewest patches of a component."""


@feature("maps", high="grounded", needs=["heads"])
def svar_c(trace: Trace) -> Tensor:
    """``svar`` of the consuming row: image attention summed over the middle layers (SVAR, arXiv 2411.16724)."""
    image = rows_of(trace.heads.mass, trace, 1)[..., SEGMENTS.index("image")].mean(-1)
    return image[:, middle(image.shape[1])].sum(-1)


@both_rows("maps", high="hallucinated", needs=["heads"])
def pas(trace: Trace, offset: int) -> Tensor:
    """Attention mass on the earlier answer tokens in the first layer, mean over heads (PAS, arXiv 2511.11502)."""
    return rows_of(trace.heads.mass, trace, offset)[:, 0, :, SEGMENTS.index("previous")].mean(-1)


@both_rows("maps", high="depends", needs=["heads"])
def attention_drift(trace: Trace, offset: int) -> Tensor:
    """KL divergence of a layer's attention over image tokens from that of the layer before, in nats (CADMP, 2026).

    K_l = KL(a_l || a_(l-1)) for every layer but the first, a_l the head-mean attention normalised over image tokens.
    """
    image = rows_of(trace.heads.image, trace, offset)
    share = (image / image.sum(-1, keepdim=True).clamp(min=1e-12)).clamp(min=1e-12)
    return (share[:, 1:] * (share[:, 1:] / share[:, :-1]).log()).sum(-1)


@both_rows("maps", high="depends", needs=["heads"])
def attention_peak(trace: Trace, offset: int) -> Tensor:
    """Largest attention to an image token, mean over heads, by layer."""
    return rows_of(trace.heads.peak, trace, offset).mean(-1)


@once
def _overtrust(trace: Trace) -> tuple[np.ndarray, np.ndarray]:
    """(T + 1,) log phi of the first 0, 1, ..., T answer tokens, and the (T + 1,) columns that have it."""
    response = trace.heads.response[1:].numpy()  # row i is the one of answer token i
    within = np.tri(*response.shape, dtype=bool)  # a column begins at the diagonal
    scaled = np.where(within, np.log(np.maximum(OVERTRUST_SCALE * response, 1e-30)), 0)
    products = np.where(within, scaled.cumsum(0), -np.inf)
    products = np.pad(products, ((0, 0), (0, 1)), constant_values=-np.inf)  # an empty answer has a column, too
    scores = np.concatenate([[0.0], products.max(1)])
    return scores + math.log(OVERTRUST_FACTOR), np.concatenate([[0.0], products.argmax(1)])


@both_rows("maps", high="hallucinated", needs=["heads"])
def overtrust(trace: Trace, offset: int) -> np.ndarray:
    """Log of OPERA's over-trust score phi, in nats (Huang et al., arXiv 2311.17911).

    Last layer, maximum over heads, rows renormalised; within the answer so far, every attention times 50; the score of
    column j is 1e-7 times the product down the column from the diagonal, phi the largest. In log space, because the
    products leave half precision. An empty answer has the empty product. OPERA's other rule for answers of up to ten
    tokens (minus the image attention, ``attn_image``) is on another scale and left out.
    """
    return rows_of(_overtrust(trace)[0], trace, offset)


@both_rows("maps", high="depends", needs=["heads"])
def overtrust_column(trace: Trace, offset: int) -> np.ndarray:
    """Index of the answer token that has OPERA's over-trust score, from 0."""
    return rows_of(_overtrust(trace)[1], trace, offset)


# --- attention sinks among the image tokens -------------------------------------------------------------------------


@both_rows("sinks", high="depends", needs=["heads", "states"])
def sink_share(trace: Trace, offset: int) -> Tensor:
    """Share of the attention to image tokens that goes to attention sinks, by layer (Kang et al., ICLR 2025)."""
    image = rows_of(trace.heads.image, trace, offset)
    return (image * trace.states.sinks).sum(-1) / image.sum(-1).clamp(min=1e-12)


@both_rows("sinks", high="grounded", needs=["heads", "states"])
def image_without_sinks(trace: Trace, offset: int) -> Tensor:
    """Attention mass on image tokens when the row is renormalised without its sinks, by layer (Kang et al., ICLR 2025).

    Sinks are the image tokens that ``tracing.state_recorder.sinks`` finds and the first token of the sequence.
    """
    image, sink = rows_of(trace.heads.image, trace, offset), trace.states.sinks
    first = rows_of(trace.heads.mass, trace, offset)[..., SEGMENTS.index("first")].mean(-1)
    left = 1 - first - (image * sink).sum(-1)
    return (image * ~sink).sum(-1) / left.clamp(min=1e-6)


# --- the grid: where on the picture the attention lies --------------------------------------------------------------


def patch_maps(image: np.ndarray, spans: Spans) -> list[np.ndarray]:
    """Values of image tokens as one (..., rows, columns) map per tile; separators belong to none.

    >>> spans = Spans(8, (1, 2, 3, 4, 5, 6), (), grids=((2, 2),), separators=(3, 6))
    >>> patch_maps(np.arange(6), spans)[0].tolist()
    [[0, 1], [3, 4]]
    """
    apart = set(spans.separators)
    patches = image[..., [index for index, at in enumerate(spans.image) if at not in apart]]
    found, start = [], 0
    for rows, columns in spans.grids:
        part = patches[..., start : start + rows * columns]
        found.append(part.reshape(*part.shape[:-1], rows, columns))
        start += rows * columns
    return found


def dispersion(tiles: list[np.ndarray]) -> np.ndarray:
    """How scattered attention maps are (ADS, arXiv 2604.04863).

    The smallest value of a map is taken off and the rest normalised to sum 1. The tenth of the patches with the largest
    values is foreground, of which 8-connected components of at least 3 patches are kept; m is their mass. What is not
    kept is background; it is renormalised, and its entropy divided by the log of the number of all patches. Tiles share
    one normalisation; components do not cross their borders.

    >>> spot = np.full((1, 8, 8), 0.1)
    >>> spot[:, :2, :3] = 1.0
    >>> dispersion([spot]).tolist()
    [[0.0, 1.0, 1.0]]

    Args:
        tiles: for every tile (K, rows, columns), K maps.

    Returns:
        (K, 3): (1 - m) * entropy, the number of kept components, and m.
    """
    from scipy.ndimage import label

    flat = np.concatenate([tile.reshape(len(tile), -1) for tile in tiles], 1).astype(np.float64)
    count, size = flat.shape
    flat = flat - flat.min(1, keepdims=True)
    flat = np.where(flat.sum(1, keepdims=True) > 0, flat, 1.0)
    flat = flat / flat.sum(1, keepdims=True)
    top, kept, spots = np.zeros((count, size), bool), np.zeros((count, size), bool), np.zeros(count)
    order = np.argsort(-flat, axis=1, kind="stable")[:, : max(1, int(FOREGROUND * size))]
    np.put_along_axis(top, order, True, axis=1)
    within = np.zeros((3, 3, 3))
    within[1] = 1  # neighbours are of the same map
    start = 0
    for tile in tiles:
        part = slice(start, start + tile[0].size)
        named, found = label(top[:, part].reshape(tile.shape), structure=within)
        large = np.bincount(named.ravel(), minlength=found + 1) >= SMALLEST
        large[0] = False
        kept[:, part] = large[named].reshape(count, -1)
        _, first = np.unique(named, return_index=True)  # every component is counted in the map of its first patch
        owners = first[large[np.unique(named)]] // tile[0].size
        spots += np.bincount(owners, minlength=count)
        start = part.stop
    mass = (flat * kept).sum(1)
    rest = np.where(kept, 0.0, flat)
    share = rest / np.maximum(rest.sum(1, keepdims=True), 1e-30)
    entropy = -(share * np.log(np.maximum(share, 1e-300))).sum(1) / math.log(max(size, 2))
    return np.stack([np.abs((1 - mass) * entropy), spots, mass], 1)


@once
def _dispersion(trace: Trace) -> np.ndarray:
    """(T + 1, L, 3) of ``dispersion``."""
    image = trace.heads.image
    if not trace.spans.grids:
        raise CapabilityError(
            "features 'dispersion_score', 'components' and 'component_mass' need image tokens that lie on a grid, "
            "which those of this model (queries of a Q-Former or the like) do not; add features.without=[grid]"
        )
    tiles = patch_maps(image.flatten(0, 1).numpy(), trace.spans)
    return dispersion(tiles).reshape(*image.shape[:2], 3)


@both_rows("grid", high="hallucinated", needs=["heads"])
def dispersion_score(trace: Trace, offset: int) -> np.ndarray:
    """Attention dispersion score, in [0, 1], by layer (ADS, arXiv 2604.04863)."""
    return rows_of(_dispersion(trace), trace, offset)[..., 0]


@both_rows("grid", high="depends", needs=["heads"])
def components(trace: Trace, offset: int) -> np.ndarray:
    """Number of connected spots of high attention on the picture, by layer (arXiv 2604.04863)."""
    return rows_of(_dispersion(trace), trace, offset)[..., 1]


@both_rows("grid", high="grounded", needs=["heads"])
def component_mass(trace: Trace, offset: int) -> np.ndarray:
    """Share of the image attention, less its floor, that lies in these spots, by layer (arXiv 2604.04863)."""
    return rows_of(_dispersion(trace), trace, offset)[..., 2]
