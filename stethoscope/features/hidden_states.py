"""Hidden-state features: closeness of a token's state to image, prompt and question, and the logit lens.

Cosines are in [-1, 1]. Layers and other settings are those of the papers for LLaVA-1.5 (32 layers, 576 image tokens),
scaled to the model: layers by share of the depth, the last alone being the last (``trace.of_depth``); numbers of tokens
by share of the image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stethoscope.features.distributions import cached_on_trace
from stethoscope.features.registry import feature
from stethoscope.tracing.trace import Trace, of_depth

if TYPE_CHECKING:
    from torch import Tensor

GLSIM_TOP, GLSIM_FEWEST, GLSIM_WEIGHT = 32 / 576, 4, 0.6
"""GLSim: share and least number of image tokens of the local score, weight of the global score."""

INSLEN_TOP, INSLEN_STATES, INSLEN_WEIGHT, INSLEN_ALPHA = 32 / 576, 4, 0.4, 2.0
"""InsLen: share of image tokens K, number of question tokens m, omega, alpha."""

VISER_TOP, VISER_WEIGHT, VISER_TEMPERATURE, EPSILON = 10, 0.4, 1.0, 1e-8
"""VisER: prefix tokens K, alpha, tau of the gate, epsilon. The text at hand does not state tau; 1 is assumed."""


@cached_on_trace
def _directions(trace: Trace, part: str, layer: int) -> Tensor:
    """Return the states of tokens divided by their norms, (B, N, D) of B answers; of the rows (R, D).

    Args:
        trace: of R - B tokens, the rows of B answers.
        part: ``token`` (the rows), ``image``, ``prompt_end`` (one token of each answer) or ``prefix``.
        layer: of 32; of ``prefix`` always 0.
    """
    states = trace.require("states")
    values = states.prefix if part == "prefix" else getattr(states, part)[of_depth(layer, _depth(trace))]
    if part != "token":
        values = values.reshape(len(trace.counts) or 1, -1, values.shape[-1])
    return values / values.norm(dim=-1, keepdim=True).clamp(min=1e-12)


@cached_on_trace
def _cosines(trace: Trace, layer: int, part: str, other_layer: int) -> Tensor:
    """Compute the (R, N) cosines, in [-1, 1], of the rows' states to those of other tokens, at layers of 32."""
    import torch  # listing features needs none

    rows, others = _directions(trace, "token", layer), _directions(trace, part, other_layer)
    if not trace.counts:
        return rows @ others[0].T
    counts = [count + 1 for count in trace.counts]
    padded = torch.nn.utils.rnn.pad_sequence(rows.split(counts), batch_first=True) @ others.mT
    return torch.cat([part[:count] for part, count in zip(padded, counts, strict=True)])


def _token(trace: Trace, offset: int, layer: int) -> Tensor:
    """Return the (T, D) states of the tokens' rows, at the depth of a layer of 32."""
    return trace.select_rows(trace.require("states").token[of_depth(layer, _depth(trace))], offset)


def _depth(trace: Trace) -> int:
    return trace.require("states").sinks.shape[-2]


def _count(share: float, image: int, fewest: int = 1) -> int:
    return min(max(round(share * image), fewest), image)


@feature("states", higher_means="grounded", requires=["states"], rows="both", by_row=True)
def patch_consistency(trace: Trace, offset: int) -> Tensor:
    """Mean of the 5 % largest cosines of the token's state to image tokens, in [-1, 1], by layer (CGC).

    Source: arXiv 2604.04863.

    Lower means hallucinated.
    """
    return trace.select_rows(trace.require("states").patch_top, offset)


@feature("states", higher_means="grounded", requires=["states"], rows="both", by_row=True)
def contextual_lens(trace: Trace, offset: int) -> Tensor:
    """Largest cosine of the token's state to an image token, in [-1, 1], by layer (Contextual Lens).

    The paper takes the mean state of an answer and chooses the two layers on validation data. Here it is the state of
    one token, with a column for each pair of equal layers; the paper chooses middle ones. Source: arXiv 2411.19187.

    Lower means hallucinated.
    """
    return trace.select_rows(trace.require("states").patch_peak, offset)


@feature("states", higher_means="grounded", requires=["states"], rows="both", by_row=True)
@cached_on_trace
def glsim_global(trace: Trace, offset: int) -> Tensor:
    """Cosine of the token's state to that of the last prompt token, in [-1, 1] (GLSim, arXiv 2508.19972).

    The last layer but one for the token (31 of 32), the last for the prompt, as published for LLaVA-1.5-7B.

    Lower means hallucinated.
    """
    return trace.select_rows(_cosines(trace, 31, "prompt_end", 32), offset)[:, 0]


@feature("states", higher_means="grounded", requires=["states"], rows="both", by_row=True)
@cached_on_trace
def glsim_local(trace: Trace, offset: int) -> Tensor:
    """Mean cosine, in [-1, 1], to the image tokens where the token's lens probability is largest (GLSim).

    The last layer but one for the token (31 of 32), the last for the image; the 32 most probable of 576 image tokens,
    but at least 4.

    Lower means hallucinated.
    """
    probability = trace.require("states").image_probability
    top = probability.topk(_count(GLSIM_TOP, probability.shape[-1], GLSIM_FEWEST), dim=-1).indices
    return trace.select_rows(_cosines(trace, 31, "image", 32), offset).gather(-1, top).mean(-1)


@feature("states", higher_means="grounded", requires=["states"], rows="both", by_row=True)
def glsim(trace: Trace, offset: int) -> Tensor:
    """Weighted mean 0.6 ``glsim_global`` + 0.4 ``glsim_local``, in [-1, 1] (GLSim, arXiv 2508.19972).

    The paper reads row q.

    Lower means hallucinated.
    """
    return GLSIM_WEIGHT * glsim_global(trace, offset) + (1 - GLSIM_WEIGHT) * glsim_local(trace, offset)


# --- InsLen: evidence in the question tokens -------------------------------------------------------------------


@feature("states", higher_means="grounded", requires=["states"], by_row=True)
@cached_on_trace
def cafe(trace: Trace) -> Tensor:
    """Largest lens probability of the token over question tokens, in [0, 1] (Cafe of InsLen).

    Question tokens are decoded at layer 22 of 32 with temperature 10.
    Source: "Instruction Lens Score", arXiv 2605.12258.

    Lower means hallucinated.
    """
    return trace.require("states").instruction_probability.amax(-1)


@feature("states", higher_means="grounded", requires=["states"], rows="both", by_row=True)
@cached_on_trace
def inslen_local(trace: Trace, offset: int) -> Tensor:
    """``cafe`` times the mean of the largest cosines to image tokens, in [-1, 1] (InsLen's local score).

    Layer 32 of 32 for the token, 24 for the image; the 32 largest of 576.

    Lower means hallucinated.
    """
    cosines = trace.select_rows(_cosines(trace, 32, "image", 24), offset)
    return cafe(trace) * cosines.topk(_count(INSLEN_TOP, cosines.shape[-1]), dim=-1).values.mean(-1)


@feature("states", higher_means="grounded", requires=["states"], rows="both", by_row=True)
@cached_on_trace
def inslen_context(trace: Trace, offset: int) -> Tensor:
    """Context consistency of InsLen: closeness to the question tokens that predict the token, <= 2.

    (2 - |h - z| / |h|) p, where z and p are the mean state and mean lens probability of the 4 question tokens with the
    largest lens probabilities.

    Lower means hallucinated.
    """
    mean, probability = _predicting_question(trace)
    token = _token(trace, offset, 32)
    near = INSLEN_ALPHA - (token - mean).norm(dim=-1) / token.norm(dim=-1).clamp(min=1e-12)
    return near * probability


@cached_on_trace
def _predicting_question(trace: Trace) -> tuple[Tensor, Tensor]:
    """Return mean state (T, D) and mean lens probability (T,) of the question tokens with the largest ones."""
    import torch  # listing features needs none

    probability = trace.require("states").instruction_probability
    top, count = probability.topk(min(INSLEN_STATES, probability.shape[-1]), dim=-1), probability.shape[-1]
    states = (
        trace.require("states").instruction[of_depth(22, _depth(trace))].flatten(0, -2)
    )  # of one answer after another
    owners = torch.from_numpy(trace.owners)[:, None]
    return states[top.indices + owners * count].mean(1), top.values.mean(-1)


@feature("states", higher_means="grounded", requires=["states"], rows="both", by_row=True)
def inslen(trace: Trace, offset: int) -> Tensor:
    """Weighted mean 0.4 ``inslen_local`` + 0.6 ``inslen_context``, unit-free (InsLen, arXiv 2605.12258).

    Lower means hallucinated.
    """
    return INSLEN_WEIGHT * inslen_local(trace, offset) + (1 - INSLEN_WEIGHT) * inslen_context(trace, offset)


# --- VisER: evidence in the image against evidence in the text ------------------------------------------------------


@feature("states", higher_means="grounded", requires=["states"], rows="both", by_row=True)
@cached_on_trace
def visual_evidence(trace: Trace, offset: int) -> Tensor:
    """Cosine to the last prompt token, gated by image lens probability, in [-1, 1] (VE of VisER, 2026).

    cos(h_context, h) * sigmoid(M / tau), where M is the token's lens probability summed over image tokens; last layer.

    Lower means hallucinated.
    """
    gate = (trace.require("states").image_probability.sum(-1) / (VISER_TEMPERATURE + EPSILON)).sigmoid()
    return trace.select_rows(_cosines(trace, 32, "prompt_end", 32), offset)[:, 0] * gate


@feature("states", higher_means="grounded", requires=["states"], rows="both", by_row=True)
@cached_on_trace
def visual_ratio(trace: Trace, offset: int) -> Tensor:
    """Similarity to the image over that to image and earlier text, in [0, 1] (VR of VisER, 2026).

    To the image: cosines clipped at 0, weighted by lens probability. To the text: mean of the 10 largest cosines to the
    input embeddings of the question and of the earlier answer tokens.

    Lower means hallucinated.
    """
    import torch  # listing features needs none

    image = (_image_weights(trace) * trace.select_rows(_cosines(trace, 32, "image", 32), offset).clamp(min=0)).sum(-1)
    near = trace.select_rows(_cosines(trace, 32, "prefix", 0), offset).clamp(min=0)
    before = torch.from_numpy(trace.positions) + near.shape[-1] - int(trace.positions.max(initial=-1)) - 1
    later = torch.arange(near.shape[-1]) >= before[:, None]
    near = near.masked_fill(later, 0.0)  # only text before the token; the zeros add nothing to the sum
    text = near.topk(min(VISER_TOP, near.shape[-1]), dim=-1).values.sum(-1) / before.clamp(max=VISER_TOP)
    return image / (image + text + EPSILON)


@cached_on_trace
def _image_weights(trace: Trace) -> Tensor:
    """Return the (T, N) lens probabilities of the token at image tokens, normalised to sum 1."""
    probability = trace.require("states").image_probability
    return probability / probability.sum(-1, keepdim=True).clamp(min=1e-30)


@feature("states", higher_means="grounded", requires=["states"], rows="both", by_row=True)
def viser(trace: Trace, offset: int) -> Tensor:
    """Weighted mean 0.4 ``visual_evidence`` + 0.6 ``visual_ratio``, in [-1, 1] (VisER, 2026).

    Lower means hallucinated.
    """
    return VISER_WEIGHT * visual_evidence(trace, offset) + (1 - VISER_WEIGHT) * visual_ratio(trace, offset)


# --- Internal Confidence: lens probability at the image tokens, in any layer ----------------------------------------


@feature("image_lens", higher_means="grounded", requires=["image_lens"], by_row=True)
def internal_confidence(trace: Trace) -> Tensor:
    """Largest lens probability of the token over image tokens and layers, in [0, 1] (Internal Confidence).

    Layers 0 to L, decoded by the head without the final norm except for the last, as in the released code.
    Source: arXiv 2410.02762.

    Lower means hallucinated.
    """
    return trace.require("image_lens")[..., 0].amax(-1)


@feature("image_lens", higher_means="depends", requires=["image_lens"], by_row=True)
def internal_confidence_layer(trace: Trace) -> Tensor:
    """Depth of the layer that reaches ``internal_confidence``, as a share in [0, 1].

    Either direction can mean hallucinated; it depends on the model.
    """
    image_lens = trace.require("image_lens")
    return image_lens[..., 0].argmax(-1) / (image_lens.shape[1] - 1)


@feature("image_lens", higher_means="grounded", requires=["image_lens"], by_row=True)
def internal_confidence_sum(trace: Trace) -> Tensor:
    """Lens probability of the token in the last layer, summed over image tokens, >= 0 (M of VisER, 2026).

    Lower means hallucinated.
    """
    return trace.require("image_lens")[:, -1, 1]


@feature("hidden", higher_means="depends", requires=["hidden"], vector=True, rows="both", by_row=True)
def hidden_middle(trace: Trace, offset: int) -> Tensor:
    """Hidden state after the middle layer (16 of 32), without unit, a column per dimension, for a probe.

    Either direction can mean hallucinated; it depends on the model.
    """
    return trace.require_rows("hidden", offset)[:, 0]


@feature("hidden", higher_means="depends", requires=["hidden"], vector=True, rows="both", by_row=True)
def hidden_last(trace: Trace, offset: int) -> Tensor:
    """Hidden state after the final norm, without unit, a column per dimension, for a probe.

    Either direction can mean hallucinated; it depends on the model.
    """
    return trace.require_rows("hidden", offset)[:, 1]


@feature("lens", higher_means="depends", requires=["lens"], by_row=True)
def lens_rank(trace: Trace) -> Tensor:
    """Natural log of 1 + rank of the token in the logit lens, >= 0, for all layers but the last.

    Either direction can mean hallucinated; it depends on the model.
    """
    return trace.require("lens_rank")[:, :-1].float().log1p()


@feature("lens", higher_means="depends", requires=["lens"], by_row=True)
def lens_logprob(trace: Trace) -> Tensor:
    """Log-probability in nats of the token in the logit lens, for all layers but the last.

    Either direction can mean hallucinated; it depends on the model.
    """
    return trace.require("lens_logprob")[:, :-1]


@feature("trajectory", higher_means="depends", requires=["trajectory"], by_row=True)
def lens_divergence(trace: Trace) -> Tensor:
    """Jensen-Shannon divergence in nats of the logit lens from the output, for all layers but the last.

    Either direction can mean hallucinated; it depends on the model.
    """
    return trace.require("trajectory")
