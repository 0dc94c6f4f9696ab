"""Hidden states: how close the token's state is to those of image tokens, prompt and question. Cosines are in [-1, 1].

Layers and other settings are the papers' for LLaVA-1.5 (32 layers, 576 image tokens): layers go by share of depth
(``trace.of_depth``), numbers of image tokens by share of the image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stethoscope.features.attention import rows_of
from stethoscope.features.common import once
from stethoscope.features.registry import both_rows, feature
from stethoscope.tracing.trace import Trace, of_depth

if TYPE_CHECKING:
    from torch import Tensor

    from stethoscope.tracing.trace import Trace

GLSIM_TOP, GLSIM_FEWEST, GLSIM_WEIGHT = 32 / 576, 4, 0.6


"""Image tokens of GLSim's local score (32 of 576, 4 of 32) and the weight of the global one."""


INSLEN_TOP, INSLEN_STATES, INSLEN_WEIGHT, INSLEN_ALPHA = 32 / 576, 4, 0.4, 2.0


"""InsLen: image tokens K, question tokens m, omega, alpha."""


VISER_TOP, VISER_WEIGHT, VISER_TEMPERATURE, EPSILON = 10, 0.4, 1.0, 1e-8


"""VisER: prefix tokens K, alpha, tau of the gate, epsilon. Tau was not in the text at hand and is taken to be 1."""


def cosine(one: Tensor, other: Tensor) -> Tensor:
    """(T, N) cosines of (T, D) and (N, D) states."""
    one, other = (part / part.norm(dim=-1, keepdim=True).clamp(min=1e-12) for part in (one, other))
    return one @ other.transpose(0, 1)


def _token(trace: Trace, offset: int, layer: int) -> Tensor:
    """(T, D) state of the token's row at the share of depth of a layer of 32."""
    return rows_of(trace.states.token[of_depth(layer, _depth(trace))], trace, offset)


def _image(trace: Trace, layer: int) -> Tensor:
    """(N, D) states of the image tokens."""
    return trace.states.image[of_depth(layer, _depth(trace))]


def _depth(trace: Trace) -> int:
    return trace.states.sinks.shape[0]


def _count(share: float, image: int, fewest: int = 1) -> int:
    return min(max(round(share * image), fewest), image)


@both_rows("states", high="grounded", needs=["states"])
def patch_consistency(trace: Trace, offset: int) -> Tensor:
    """Mean of the 5 % largest cosines of the token's state to image tokens', by layer (CGC, arXiv 2604.04863)."""
    return rows_of(trace.states.patch_top, trace, offset)


@both_rows("states", high="grounded", needs=["states"])
def contextual_lens(trace: Trace, offset: int) -> Tensor:
    """Largest cosine of the token's state to an image token's, by layer (Contextual Lens, arXiv 2411.19187).

    The paper takes the mean state of an answer, of one token here, and picks the two layers on validation data; the
    columns are the pairs of equal layers, of which the middle ones are its choice.
    """
    return rows_of(trace.states.patch_peak, trace, offset)


@both_rows("states", high="grounded", needs=["states"])
@once
def glsim_global(trace: Trace, offset: int) -> Tensor:
    """Cosine of the token's state (layer 31 of 32) to the last prompt token's (layer 32) (GLSim, arXiv 2508.19972)."""
    end = trace.states.prompt_end[_depth(trace)]
    return cosine(_token(trace, offset, 31), end[None])[:, 0]


@both_rows("states", high="grounded", needs=["states"])
@once
def glsim_local(trace: Trace, offset: int) -> Tensor:
    """Mean cosine of the token's state to the image tokens where its lens probability is largest (GLSim).

    Layer 31 of 32 for the token, 32 for the image; the 32 most probable of 576 image tokens, but at least 4.
    """
    probability = trace.states.image_probability
    top = probability.topk(_count(GLSIM_TOP, probability.shape[-1], GLSIM_FEWEST), dim=-1).indices
    return cosine(_token(trace, offset, 31), _image(trace, 32)).gather(-1, top).mean(-1)


@both_rows("states", high="grounded", needs=["states"])
def glsim(trace: Trace, offset: int) -> Tensor:
    """0.6 times ``glsim_global`` plus 0.4 times ``glsim_local`` (GLSim, arXiv 2508.19972); GLSim reads row q."""
    return GLSIM_WEIGHT * glsim_global(trace, offset) + (1 - GLSIM_WEIGHT) * glsim_local(trace, offset)


# --- InsLen: what the question says of the object -------------------------------------------------------------------


@feature("states", high="grounded", needs=["states"])
@once
def cafe(trace: Trace) -> Tensor:
    """Largest probability of the token when question tokens at layer 22 of 32 are decoded, tau 10 (InsLen's Cafe).

    Source: "Instruction Lens Score", arXiv 2605.12258.
    """
    return trace.states.instruction_probability.amax(-1)


@both_rows("states", high="grounded", needs=["states"])
@once
def inslen_local(trace: Trace, offset: int) -> Tensor:
    """Cafe times the mean of the largest cosines to image tokens (InsLen's calibrated local score).

    Layer 32 of 32 for the token, 24 for the image; the 32 largest of 576.
    """
    cosines = cosine(_token(trace, offset, 32), _image(trace, 24))
    return cafe(trace) * cosines.topk(_count(INSLEN_TOP, cosines.shape[-1]), dim=-1).values.mean(-1)


@both_rows("states", high="grounded", needs=["states"])
@once
def inslen_context(trace: Trace, offset: int) -> Tensor:
    """Closeness of the token's state to the question tokens that say it most, weighted (InsLen's context consistency).

    (2 - |h - z| / |h|) p: z and p are the means of the 4 question tokens' states and probabilities of which the latter
    are largest.
    """
    probability = trace.states.instruction_probability
    top = probability.topk(min(INSLEN_STATES, probability.shape[-1]), dim=-1)
    mean = trace.states.instruction[of_depth(22, _depth(trace))][top.indices].mean(1)
    token = _token(trace, offset, 32)
    near = INSLEN_ALPHA - (token - mean).norm(dim=-1) / token.norm(dim=-1).clamp(min=1e-12)
    return near * top.values.mean(-1)


@both_rows("states", high="grounded", needs=["states"])
def inslen(trace: Trace, offset: int) -> Tensor:
    """0.4 times ``inslen_local`` plus 0.6 times ``inslen_context`` (InsLen, arXiv 2605.12258)."""
    return INSLEN_WEIGHT * inslen_local(trace, offset) + (1 - INSLEN_WEIGHT) * inslen_context(trace, offset)


# --- VisER: evidence in the image against evidence in the text ------------------------------------------------------


@both_rows("states", high="grounded", needs=["states"])
@once
def visual_evidence(trace: Trace, offset: int) -> Tensor:
    """Cosine of the token's state to the last prompt token's, gated by what the image says of it (VisER's VE, 2026).

    cos(h_context, h) * sigmoid(M / tau): M is the sum over image tokens of the token's lens probability; last layer.
    """
    gate = (trace.states.image_probability.sum(-1) / (VISER_TEMPERATURE + EPSILON)).sigmoid()
    end = trace.states.prompt_end[_depth(trace)]
    return cosine(_token(trace, offset, 32), end[None])[:, 0] * gate


@both_rows("states", high="grounded", needs=["states"])
@once
def visual_ratio(trace: Trace, offset: int) -> Tensor:
    """Similarity to the image over that plus the similarity to the text before the token, in [0, 1] (VisER's VR).

    To the image: cosines, not below 0, weighted by lens probability. To the text: mean of the 10 largest cosines to the
    input embeddings of the question and of the earlier answer tokens.
    """
    states, token = trace.states, _token(trace, offset, 32)
    weights = states.image_probability / states.image_probability.sum(-1, keepdim=True).clamp(min=1e-30)
    image = (weights * cosine(token, _image(trace, 32)).clamp(min=0)).sum(-1)
    near = cosine(token, states.prefix).clamp(min=0)
    question = states.prefix.shape[0] - len(token)
    near = near.tril(question - 1)  # what stands before the token; the rest is nothing to a sum
    top = near.topk(min(VISER_TOP, near.shape[-1]), dim=-1).values.sum(-1)
    text = top / top.new_tensor([min(VISER_TOP, question + index) for index in range(len(token))])
    return image / (image + text + EPSILON)


@both_rows("states", high="grounded", needs=["states"])
def viser(trace: Trace, offset: int) -> Tensor:
    """0.4 times ``visual_evidence`` plus 0.6 times ``visual_ratio`` (VisER, 2026)."""
    return VISER_WEIGHT * visual_evidence(trace, offset) + (1 - VISER_WEIGHT) * visual_ratio(trace, offset)


# --- Internal Confidence: does any image token say the object, in any layer? ----------------------------------------


@feature("image_lens", high="grounded", needs=["image_lens"])
def internal_confidence(trace: Trace) -> Tensor:
    """Largest probability of the token when image tokens are decoded, over tokens and layers (IC, arXiv 2410.02762).

    Layers 0 to L, decoded by the head without the final norm but for the last, as in the released code.
    """
    return trace.image_lens[..., 0].amax(-1)


@feature("image_lens", high="depends", needs=["image_lens"])
def internal_confidence_layer(trace: Trace) -> Tensor:
    """The layer that has it, as a share of the depth, in [0, 1]."""
    return trace.image_lens[..., 0].argmax(-1) / (trace.image_lens.shape[1] - 1)


@feature("image_lens", high="grounded", needs=["image_lens"])
def internal_confidence_sum(trace: Trace) -> Tensor:
    """Probability of the token when image tokens of the last layer are decoded, summed over them (M of VisER, 2026)."""
    return trace.image_lens[:, -1, 1]


def _state(trace: Trace, offset: int, layer: int) -> Tensor:
    """(T, D) state of the token's row at the share of depth of a layer of 32."""
    return rows_of(trace.states.token[of_depth(layer, trace.states.sinks.shape[0])], trace, offset)


@both_rows("hidden", high="depends", needs=["states"], vector=True)
def hidden_middle(trace: Trace, offset: int) -> Tensor:
    """Hidden state after the middle layer (16 of 32), a column per dimension: input of the linear probe."""
    return _state(trace, offset, 16)


@both_rows("hidden", high="depends", needs=["states"], vector=True)
def hidden_last(trace: Trace, offset: int) -> Tensor:
    """Hidden state after the last layer and the final norm, a column per dimension: input of the linear probe."""
    return _state(trace, offset, 32)


@feature("lens", high="depends", needs=["lens"])
def lens_rank(trace: Trace) -> Tensor:
    """log(1 + rank) of the token when the residual stream after a layer is decoded, for all layers but the last."""
    return trace.lens_rank[:, :-1].float().log1p()


@feature("lens", high="depends", needs=["lens"])
def lens_logprob(trace: Trace) -> Tensor:
    """Log-probability of the token when the residual stream after a layer is decoded, for all layers but the last."""
    return trace.lens_logprob[:, :-1]


@feature("trajectory", high="depends", needs=["trajectory"])
def lens_divergence(trace: Trace) -> Tensor:
    """Jensen-Shannon divergence of a layer's decoded distribution from the model's own, in nats, but for the last."""
    return trace.trajectory
