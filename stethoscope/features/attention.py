"""Attention features: masses by segment, single heads, over-trust, sinks and the spread over the image grid."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from stethoscope.core.errors import CapabilityError
from stethoscope.features.distributions import cached_on_trace, normalised_entropy
from stethoscope.features.registry import feature
from stethoscope.tracing.trace import SEGMENTS, Spans, Trace

if TYPE_CHECKING:
    from torch import Tensor


def _mass(trace: Trace, segment: str) -> Tensor:
    """Return the (T, L) head-mean attention mass on a segment, in [0, 1]."""
    return trace.mean_mass[..., SEGMENTS.index(segment)]


@feature("attention", higher_means="grounded", requires=["attention"], by_row=True)
def attn_image(trace: Trace) -> Tensor:
    """Attention mass on the image tokens in [0, 1], mean over heads, by layer (VAR, Jiang et al. 2025).

    Lower means hallucinated.
    """
    return _mass(trace, "image")


@feature("attention", higher_means="depends", requires=["attention"], by_row=True)
def attn_question(trace: Trace) -> Tensor:
    """Attention mass on the question in [0, 1], mean over heads, by layer.

    Either direction can mean hallucinated; it depends on the model.
    """
    return _mass(trace, "question")


@feature("attention", higher_means="hallucinated", requires=["attention"], by_row=True)
def attn_previous(trace: Trace) -> Tensor:
    """Attention mass on the earlier answer tokens in [0, 1], mean over heads, by layer.

    Layer 0 is PAS (Hoang-Xuan et al. 2026).

    Higher means hallucinated.
    """
    return _mass(trace, "previous")


@feature("attention", higher_means="depends", requires=["attention"], by_row=True)
def attn_first(trace: Trace) -> Tensor:
    """Attention mass on the first token of the sequence in [0, 1], mean over heads, by layer.

    Either direction can mean hallucinated; it depends on the model.
    """
    return _mass(trace, "first")


def middle(layers: int) -> slice:
    """Select the layers that SVAR sums over.

    >>> middle(32)
    slice(5, 19, None)
    """
    return slice(round(0.15 * layers), round(0.55 * layers) + 1)


@feature("attention", higher_means="grounded", requires=["attention"], by_row=True)
def svar(trace: Trace) -> Tensor:
    """Visual attention ratio ``attn_image`` summed over the middle layers (SVAR, Jiang et al. 2025).

    From 0 to the number of these layers: those at 15 % to 55 % of the depth, the published 5 to 18 for 32 layers.

    Lower means hallucinated.
    """
    image = _mass(trace, "image")
    return image[:, middle(image.shape[1])].sum(-1)


@feature("attention", higher_means="depends", requires=["attention"], by_row=True)
def attn_entropy(trace: Trace) -> Tensor:
    """Entropy of the head-mean attention over image tokens divided by log N, in [0, 1], by layer.

    Either direction can mean hallucinated; it depends on the model.
    """
    return normalised_entropy(trace.require("image_attention"))


@feature("heads", higher_means="grounded", requires=["heads"], rows="both", by_row=True)
def head_image(trace: Trace, offset: int) -> Tensor:
    """Attention mass on the image tokens in [0, 1], by head: input of VAR's classifier.

    Source: Jiang et al., arXiv 2411.16724.

    Lower means hallucinated.
    """
    return trace.select_rows(trace.require("heads").mass, offset)[..., SEGMENTS.index("image")]


@feature("heads", higher_means="depends", requires=["heads"], rows="both", by_row=True)
def top20_mean(trace: Trace, offset: int) -> Tensor:
    """Mean of the 20 largest attentions to image tokens, in [0, 1], by head (HaloProbe).

    Source: Zohrabi et al., arXiv 2604.06165.

    Either direction can mean hallucinated; it depends on the model.
    """
    return trace.select_rows(trace.require("heads").top, offset)[..., 0]


@feature("heads", higher_means="depends", requires=["heads"], rows="both", by_row=True)
def top20_entropy(trace: Trace, offset: int) -> Tensor:
    """Entropy in nats of the 20 largest attentions to image tokens, by head (HaloProbe).

    The attentions are normalised to sum 1. Source: Zohrabi et al., arXiv 2604.06165.

    Either direction can mean hallucinated; it depends on the model.
    """
    return trace.select_rows(trace.require("heads").top, offset)[..., 1]


def _lookback(trace: Trace, offset: int, context: tuple[str, ...]) -> Tensor:
    """Compute the lookback ratio of a context to context and earlier answer, (T, L, H) in [0, 1]."""
    spans = {"image": trace.spans.image, "question": trace.spans.question}
    size = sum(len(spans[name]) for name in context)
    mass = trace.select_rows(trace.require("heads").mass, offset)
    to_context = mass[..., [SEGMENTS.index(name) for name in context]].sum(-1) / max(size, 1)
    earlier = mass.new_tensor(trace.positions + offset)[:, None, None]
    to_answer = mass[..., SEGMENTS.index("previous")] / earlier.clamp(min=1) * (earlier > 0)
    return to_context / (to_context + to_answer).clamp(min=1e-12)


@feature("lookback", higher_means="grounded", requires=["heads"], rows="both", by_row=True)
def lookback_image(trace: Trace, offset: int) -> Tensor:
    """Lookback ratio to the image tokens, in [0, 1], by head (Lookback Lens, Chuang et al., EMNLP 2024).

    Mean attention to a context token over that plus the mean attention to an earlier answer token; 1 for the first
    token. The context of the paper is the whole prompt; here image and question are also told apart.

    Lower means hallucinated.
    """
    return _lookback(trace, offset, ("image",))


@feature("lookback", higher_means="grounded", requires=["heads"], rows="both", by_row=True)
def lookback_question(trace: Trace, offset: int) -> Tensor:
    """Lookback ratio to the question tokens, in [0, 1], by head (Lookback Lens).

    Lower means hallucinated.
    """
    return _lookback(trace, offset, ("question",))


@feature("lookback", higher_means="grounded", requires=["heads"], rows="both", by_row=True)
def lookback_context(trace: Trace, offset: int) -> Tensor:
    """Lookback ratio to image and question tokens together, in [0, 1], by head (Lookback Lens).

    Lower means hallucinated.
    """
    return _lookback(trace, offset, ("image", "question"))


OVERTRUST_SCALE, OVERTRUST_FACTOR = 50.0, 1e-7
"""Constants of OPERA's released code: every attention times 50, every product times 1e-7."""

FOREGROUND, SMALLEST = 0.10, 3
"""Constants of ADS: share of the patches that are foreground, fewest patches of a component."""


@feature("maps", higher_means="grounded", requires=["heads"], by_row=True)
def svar_c(trace: Trace) -> Tensor:
    """Sum over the middle layers of the consuming row's image attention (SVAR, arXiv 2411.16724).

    Lower means hallucinated.
    """
    image = trace.select_rows(trace.require("heads").mass, 1)[..., SEGMENTS.index("image")].mean(-1)
    return image[:, middle(image.shape[1])].sum(-1)


@feature("maps", higher_means="hallucinated", requires=["heads"], rows="both", by_row=True)
def pas(trace: Trace, offset: int) -> Tensor:
    """Attention mass on earlier answer tokens in the first layer, in [0, 1], mean over heads (PAS).

    Source: arXiv 2511.11502.

    Higher means hallucinated.
    """
    return trace.select_rows(trace.require("heads").mass, offset)[:, 0, :, SEGMENTS.index("previous")].mean(-1)


@feature("maps", higher_means="depends", requires=["heads"], rows="both", by_row=True)
def attention_drift(trace: Trace, offset: int) -> Tensor:
    """KL divergence in nats of a layer's image attention from that of the layer before (CADMP, 2026).

    K_l = KL(a_l || a_(l-1)) for every layer but the first, a_l the head-mean attention normalised over image tokens.

    Either direction can mean hallucinated; it depends on the model.
    """
    image = trace.select_rows(trace.require("heads").image, offset)
    share = (image / image.sum(-1, keepdim=True).clamp(min=1e-12)).clamp(min=1e-12)
    return (share[:, 1:] * (share[:, 1:] / share[:, :-1]).log()).sum(-1)


@feature("maps", higher_means="depends", requires=["heads"], rows="both", by_row=True)
def attention_peak(trace: Trace, offset: int) -> Tensor:
    """Largest attention to an image token in [0, 1], mean over heads, by layer.

    Either direction can mean hallucinated; it depends on the model.
    """
    return trace.select_rows(trace.require("heads").peak, offset).mean(-1)


@cached_on_trace
def _overtrust(trace: Trace) -> tuple[np.ndarray, np.ndarray]:
    """Compute log phi of the first 0, ..., T answer tokens, and the columns that reach it, (T + 1,) each."""
    response = trace.require("heads").response[1:].numpy()  # row i is the one of answer token i
    within = np.tri(*response.shape).astype(bool)  # a column begins at the diagonal
    scaled = np.where(within, np.log(np.maximum(OVERTRUST_SCALE * response, 1e-30)), 0)
    products = np.where(within, scaled.cumsum(0), -np.inf)
    products = np.pad(products, ((0, 0), (0, 1)), constant_values=-np.inf)  # an empty answer has a column, too
    scores = np.concatenate([[0.0], products.max(1)])
    return scores + math.log(OVERTRUST_FACTOR), np.concatenate([[0.0], products.argmax(1)])


@feature("maps", higher_means="hallucinated", requires=["heads"], rows="both")
def overtrust(trace: Trace, offset: int) -> np.ndarray:
    """Log of OPERA's over-trust score phi, in nats (Huang et al., arXiv 2311.17911).

    Last layer, maximum over heads, rows renormalised; within the answer so far, every attention times 50; the score of
    column j is 1e-7 times the product down the column from the diagonal, phi the largest. In log space, because the
    products exceed half precision. An empty answer has the empty product. OPERA's other rule, for answers of up to ten
    tokens (minus the image attention, ``attn_image``), is on another scale and left out.

    Higher means hallucinated.
    """
    return trace.select_rows(_overtrust(trace)[0], offset)


@feature("maps", higher_means="depends", requires=["heads"], rows="both")
def overtrust_column(trace: Trace, offset: int) -> np.ndarray:
    """Index, from 0, of the answer token whose column has OPERA's over-trust score.

    Either direction can mean hallucinated; it depends on the model.
    """
    return trace.select_rows(_overtrust(trace)[1], offset)


# --- attention sinks among the image tokens -------------------------------------------------------------------------


@cached_on_trace
def _sinks(trace: Trace) -> Tensor:
    """Mark the image tokens of every token's answer that are attention sinks, (T, L, N), or (1, L, N) of one answer."""
    sinks = trace.require("states").sinks
    return sinks[trace.owners] if trace.counts else sinks[None]


@feature("sinks", higher_means="depends", requires=["heads", "states"], rows="both", by_row=True)
def sink_share(trace: Trace, offset: int) -> Tensor:
    """Share, in [0, 1], of the image attention on attention sinks, by layer (Kang et al., ICLR 2025).

    Either direction can mean hallucinated; it depends on the model.
    """
    image = trace.select_rows(trace.require("heads").image, offset)
    return (image * _sinks(trace)).sum(-1) / image.sum(-1).clamp(min=1e-12)


@feature("sinks", higher_means="grounded", requires=["heads", "states"], rows="both", by_row=True)
def image_without_sinks(trace: Trace, offset: int) -> Tensor:
    """Attention mass on image tokens after removing sinks from the row, in [0, 1], by layer.

    The row is renormalised. Sinks are the first token of the sequence and the image tokens that
    ``tracing.state_recorder.sinks`` selects. Source: Kang et al., ICLR 2025.

    Lower means hallucinated.
    """
    image, sink = trace.select_rows(trace.require("heads").image, offset), _sinks(trace)
    first = trace.select_rows(trace.require("heads").mass, offset)[..., SEGMENTS.index("first")].mean(-1)
    remaining = 1 - first - (image * sink).sum(-1)
    return (image * ~sink).sum(-1) / remaining.clamp(min=1e-6)


# --- the grid: how attention is spread over the image --------------------------------------------------------------


def split_tiles(image: np.ndarray, spans: Spans) -> list[np.ndarray]:
    """Split values (..., N) of image tokens into a (..., rows, columns) map per tile, less separators.

    >>> spans = Spans(8, (1, 2, 3, 4, 5, 6), (), grids=((2, 2),), separators=(3, 6))
    >>> split_tiles(np.arange(6), spans)[0].tolist()
    [[0, 1], [3, 4]]
    """
    separators = set(spans.separators)
    patches = image[..., [index for index, position in enumerate(spans.image) if position not in separators]]
    tiles, start = [], 0
    for rows, columns in spans.grids:
        part = patches[..., start : start + rows * columns]
        tiles.append(part.reshape(*part.shape[:-1], rows, columns))
        start += rows * columns
    return tiles


def dispersion(tiles: list[np.ndarray]) -> np.ndarray:
    """Measure how scattered attention maps are (ADS, arXiv 2604.04863).

    The smallest value of a map is subtracted and the rest normalised to sum 1. The tenth of the patches with the
    largest values is foreground, of which 8-connected components of at least 3 patches are kept; m is their mass. All
    other patches are background: its entropy after renormalising is divided by the log of the number of all patches.
    Tiles share one normalisation; components do not cross their borders.

    >>> spot = np.full((1, 8, 8), 0.1)
    >>> spot[:, :2, :3] = 1.0
    >>> dispersion([spot]).tolist()
    [[0.0, 1.0, 1.0]]

    Args:
        tiles: K maps (K, rows, columns) of every tile.

    Returns:
        (K, 3): (1 - m) * entropy, the number of kept components, and m.
    """
    from scipy.ndimage import label

    flat = np.concatenate([tile.reshape(len(tile), -1) for tile in tiles], 1).astype(np.float64)
    count, size = flat.shape
    flat = flat - flat.min(1, keepdims=True)
    flat = np.where(flat.sum(1, keepdims=True) > 0, flat, 1.0)
    flat = flat / flat.sum(1, keepdims=True)
    kept, spots = np.zeros((count, size), bool), np.zeros(count)
    top = _foreground(flat, max(1, int(FOREGROUND * size)))
    within = np.zeros((3, 3, 3))
    within[1] = 1  # neighbours are of the same map
    start = 0
    for tile in tiles:
        part = slice(start, start + tile[0].size)
        labels, count_labels = label(top[:, part].reshape(tile.shape), structure=within)
        large = np.bincount(labels.ravel(), minlength=count_labels + 1) >= SMALLEST
        large[0] = False
        kept[:, part] = large[labels].reshape(count, -1)
        owners = np.zeros(count_labels + 1, int)  # of every component, the map that it lies in
        owners[labels] = np.arange(count)[:, None, None]
        spots += np.bincount(owners[large], minlength=count)
        start = part.stop
    mass = (flat * kept).sum(1)
    rest = np.where(kept, 0.0, flat)
    share = rest / np.maximum(rest.sum(1, keepdims=True), 1e-30)
    entropy = -(share * np.log(np.maximum(share, 1e-300))).sum(1) / math.log(max(size, 2))
    return np.stack([np.abs((1 - mass) * entropy), spots, mass], 1)


def _foreground(maps: np.ndarray, count: int) -> np.ndarray:
    """Mark the largest ``count`` values of every row (K, N); of equal ones the first.

    >>> _foreground(np.array([[1.0, 3.0, 2.0, 2.0]]), 2).tolist()
    [[False, True, True, False]]
    """
    least = np.partition(maps, maps.shape[1] - count, axis=1)[:, maps.shape[1] - count, None]
    above, equal = maps > least, maps == least
    return above | (equal & (equal.cumsum(1) <= count - above.sum(1, keepdims=True)))


@cached_on_trace
def _dispersion(trace: Trace) -> np.ndarray:
    """Apply ``dispersion`` to every row and layer of the image attention, (T + 1, L, 3)."""
    image = trace.require("heads").image
    if not trace.spans.grids:
        raise CapabilityError(
            "features 'dispersion_score', 'components' and 'component_mass' need image tokens on a grid; those of this "
            "model (queries of a Q-Former, for example) are not. Add features.exclude=[grid]"
        )
    tiles = split_tiles(image.flatten(0, 1).numpy(), trace.spans)
    return dispersion(tiles).reshape(*image.shape[:2], 3)


@feature("grid", higher_means="hallucinated", requires=["heads"], rows="both", by_row=True)
def dispersion_score(trace: Trace, offset: int) -> np.ndarray:
    """Attention dispersion score, in [0, 1], by layer (ADS, arXiv 2604.04863).

    Higher means hallucinated.
    """
    return trace.select_rows(_dispersion(trace), offset)[..., 0]


@feature("grid", higher_means="depends", requires=["heads"], rows="both", by_row=True)
def components(trace: Trace, offset: int) -> np.ndarray:
    """Count of connected components of high attention on the image, by layer (arXiv 2604.04863).

    Either direction can mean hallucinated; it depends on the model.
    """
    return trace.select_rows(_dispersion(trace), offset)[..., 1]


@feature("grid", higher_means="grounded", requires=["heads"], rows="both", by_row=True)
def component_mass(trace: Trace, offset: int) -> np.ndarray:
    """Share, in [0, 1], of the image attention less its minimum that lies in ``components``, by layer.

    Source: arXiv 2604.04863.

    Lower means hallucinated.
    """
    return trace.select_rows(_dispersion(trace), offset)[..., 2]
