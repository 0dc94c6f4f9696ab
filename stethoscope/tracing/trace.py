"""Hold the trace of one teacher-forced pass over prompt and answer, reduced to the parts that features read."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import numpy as np

from stethoscope.core.errors import CapabilityError
from stethoscope.core.types import Answer

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

    from torch import Tensor

    from stethoscope.relevancy import Relevancy
    from stethoscope.relevancy.shared_passes import PromptPass
    from stethoscope.tracing.answer_recorder import RecordedAnswers

Rows = TypeVar("Rows", "Tensor", "np.ndarray[Any, Any]")
TensorPart = Literal[
    "logits", "mass", "image_attention", "lens_logprob", "lens_rank", "blank_logits", "trajectory", "image_lens",
    "noise_logits", "no_image_logits", "core_logits", "yes_odds", "masked_logprob", "lens_entropy", "lens_top",
    "evidence", "peaks", "own", "layer_states", "no_image_states", "verify_states", "verify_states_without",
    "imagining", "named_share", "hidden", "image_embeds",
]  # fmt: skip
"""Names of the parts of a trace that are tensors."""

SEGMENTS = ("image", "question", "previous", "first", "rest")
"""Parts of the sequence that a row's attention is split over: image tokens, question tokens, earlier answer tokens,
the first token of the sequence (the usual attention sink; unless it is an image or question token), everything else.
They are disjoint and cover the row, so the masses of one row add up to 1. In an encoder-decoder model ``first`` is the
decoder's start token, and the row is half cross-attention to the prompt, half self-attention to the answer
(``stethoscope.tracing.attention_recorder`` has the details)."""

CAUSAL = frozenset(
    {"llava", "llava_next", "llava_onevision", "internvl", "idefics3", "smolvlm", "convllava", "mplug_owl2"}
)
"""``model_type`` of models whose prompt is causal text around image tokens, with one position per token, so that a pass
can continue from the keys and values of the prompt. Excluded are PaliGemma and Gemma 3, which read prompts in both
directions, Qwen's models, whose positions have three axes, and models that return no cache (BLIP-2) or have an encoder.
The contract tests compare traces of all of them."""

FORWARD_REQUIREMENTS = ("attention", "lens", "hidden", "blank")
"""Parts of a trace beyond the logits that cost forward passes at most: attention rows, the logit lens and hidden states
of the answer's rows cost none beside the traced one, the blank image costs one."""
REQUIREMENTS = (*FORWARD_REQUIREMENTS, "relevancy")
"""Parts that every family supports; relevancy costs a forward and a backward pass."""
EXTRA_REQUIREMENTS = (
    "heads", "trajectory", "noise", "no_image", "core", "states", "image_lens", "layer_entropy", "evidence", "peaks",
    "own", "layer_states", "no_image_states", "continuation",
)  # fmt: skip
"""Further parts, which published detectors read: ``noise``, ``no_image``, ``core`` and ``no_image_states`` cost one
more forward pass each (the last one only once for all pictures of a size), ``continuation`` three over the answer, all
others come from the traced pass. Models that read the image in an encoder of the language model have no ``states`` and
no ``image_lens``."""

PROMPT_REQUIREMENTS = frozenset({"states", "image_lens"})
"""Parts that read rows of the prompt, in the same residual stream as those of the answer."""
DECODED_REQUIREMENTS = frozenset({"lens", "trajectory", "layer_entropy"})
"""Parts that decode the residual stream of the rows after every layer."""
IMAGE_REQUIREMENTS = frozenset({"hidden", "relevancy"})
"""Parts whose features weight image tokens, or are compared with them: their traces have ``image_embeds``."""
STREAM_REQUIREMENTS = DECODED_REQUIREMENTS | {"evidence", "layer_states", "hidden"}
"""Parts that read the residual stream of the rows."""
MENTION_REQUIREMENTS = ("questions", "question_states", "masked", "samples")
"""Parts that cost passes for every object that an answer names, made by ``mention_passes`` and not by the adapter:
``questions`` asks the model whether each object is there, ``question_states`` keeps its states while it is asked, and
``masked`` hides the regions that it attended to; and ``samples``, which answers the prompt ``SAMPLES`` times more."""
SAMPLES = 5
"""Number of answers that are sampled again at temperature 1, for the agreement about an object."""

HIDDEN_LAYERS = (16, 32)
"""Layers, of 32, of the answer's own states that a hidden-state probe reads: the middle and the last one."""
KEPT_LAYERS = {"token": (31, 32), "image": (24, 32), "instruction": (22,), "prompt_end": (32,)}
"""Layers, of 32, whose states are stored whole: those that GLSim, InsLen and VisER were published for."""
PROBE_LAYERS = (8, 12, 16, 20, 24)
"""Layers, of 32, of the states that the verification probe reads (hub pbcong/llava-1.5-7b-hal-verify-probe, 2026)."""
CONTINUATION, CONTINUED_TOKENS = " There is also", 2
"""Text that HalTrapper adds to an answer (ICCV 2025), and the new token whose attention it reads: the first is an
article. The paper lets the model write four; the last two change nothing."""
_SHORT, _SHORTEST = 6, 1024  # rows that NumPy sorts: times the values that ``largest`` looks for, and in any case
TEMPERATURE = 10.0
"""Temperature of InsLen's lens on the instruction (arXiv 2605.12258)."""


def of_depth(layer: int, layers: int, published: int = 32) -> int:
    """Scale a layer index from a model of ``published`` layers to one of ``layers``; 0 is the embedding.

    Layers stay apart from the embedding and from the last layer where the published ones are: a method that compares
    layer 31 of 32 with layer 32 compares the last layer but one with the last in a model of any depth above one.

    >>> [of_depth(layer, 40) for layer in (0, 16, 31, 32)]
    [0, 20, 39, 40]
    >>> [of_depth(layer, 4) for layer in (0, 1, 31, 32)]
    [0, 1, 3, 4]
    """
    scaled = round(layer / published * layers)
    return max(min(scaled, layers - 1), 1) if 0 < layer < published else scaled


def hidden_layers(layers: int) -> list[int]:
    """Scale ``HIDDEN_LAYERS`` to a model of some depth."""
    return [of_depth(layer, layers) for layer in HIDDEN_LAYERS]


def probe_layers(layers: int) -> list[int]:
    """Scale ``PROBE_LAYERS`` to a model of some depth, each layer once.

    >>> probe_layers(40), probe_layers(4)
    ([10, 15, 20, 25, 30], [1, 2, 3])
    """
    return sorted({of_depth(layer, layers) for layer in PROBE_LAYERS})


def largest(values: Tensor, count: int) -> Tensor:
    """Return the largest ``count`` of (..., N) values, or all of them, in descending order.

    NumPy sorts short rows whole in a third of the time that ``topk`` takes.
    """
    import torch  # listing features needs none

    count = min(count, values.shape[-1])
    short = values.shape[-1] <= max(_SHORT * count, _SHORTEST)
    if not short or values.device.type != "cpu" or values.dtype != torch.float32:
        return values.topk(count, dim=-1).values
    return torch.from_numpy(np.ascontiguousarray(np.sort(values.numpy(), -1)[..., : -count - 1 : -1]))


@dataclass(frozen=True)
class Spans:
    """Positions of tokens in the sequence that the language model reads, measured from the processor's output.

    A prompt of P = 7 tokens, an answer of T = 3, and the rows of a trace. Row k stands at position P - 1 + k: it
    *predicts* answer token k and *consumes* token k - 1 (row T is traced only where features read consuming rows)::

        position   0     1     2     3     4     5     6     7     8     9
        token      <s>   img   img   img   What  ?     A:    a     cat   .
        span             |--- image ---|   |question|        |-- answer --|
        row                                            0     1     2     3
        predicts                                       a     cat   .     (end)
        consumes                                       A:    a     cat   .

    Attributes:
        length: number of prompt tokens P; answer token k is predicted at position P - 1 + k. The prompt of an
            encoder-decoder model is what its encoder reads; there answer token k is predicted at position k of the
            decoder's own sequence, which begins with a start token.
        image: sorted positions of the image tokens, N of them.
        question: sorted positions of the tokens of the user's question.
        grids: (rows, columns) of every tile of image tokens, in order; empty where there is no grid. The image tokens
            fill them one after another, row by row, those of ``separators`` left out.
        separators: positions of image tokens that stand for no part of the picture, such as the newline that
            LLaVA-NeXT puts behind each row; a subset of ``image``.
    """

    length: int
    image: tuple[int, ...]
    question: tuple[int, ...]
    grids: tuple[tuple[int, int], ...] = ()
    separators: tuple[int, ...] = ()

    @property
    def ends_in_image(self) -> bool:
        """Whether the last token is one of the image's, which cannot run again without the pixels."""
        return self.image[-1] == self.length - 1

    def shifted(self, offset: int) -> Spans:
        """Return the spans of the same prompt behind ``offset`` more tokens."""
        if not offset:
            return self
        names = ("image", "question", "separators")
        moved = {name: tuple(position + offset for position in getattr(self, name)) for name in names}
        return replace(self, length=self.length + offset, **moved)


@dataclass(frozen=True, eq=False)
class PromptCache:
    """KV cache of a prompt, so that later tokens need no second pass over it.

    Attributes:
        layers: by layer of the language model keys and values of the P prompt tokens, or of all but the last, each
            (1, key-value heads, P or P - 1, d), in the model's dtype and on its devices. They are parts of larger
            tensors, which live as long as they do.
        graph: the pass that computed them, with its graph, for the relevancy of an answer; None where it kept none.
        index: of the prompt in this pass.
        embeds: (N, D) image tokens at the input of the language model, for ``Trace.image_embeds``; None where they were
            not kept.
    """

    layers: tuple[tuple[Tensor, ...], ...]
    graph: PromptPass | None = None
    index: int = 0
    embeds: Tensor | None = None

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.layers[0][0].shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(part.nbytes for pair in self.layers for part in pair)

    def clone(self) -> PromptCache:
        """Copy keys and values out of the larger tensors."""
        return PromptCache(tuple(tuple(part.clone() for part in pair) for pair in self.layers), embeds=self.embeds)


@dataclass(frozen=True)
class Encoded:
    """One prompt, ready for the model.

    Attributes:
        inputs: keyword arguments of the model's forward pass, batch dimension 1, no padding.
        spans: token positions.
        text: the prompt as text, before image placeholders are expanded.
        question: the user's question.
        cache: KV cache of this prompt, as ``Adapter.prefill`` or ``generate_with_cache`` returns it, from which
            generation and traces go on; None without one.
        asks: what the question asks for, see ``Sample.asks``.
        history: earlier questions about the picture and their answers, which the prompt holds before the question.
        planned: parts that the trace of the answer will need, where generation can record them; None where it cannot.
        recorded: the recorded answers of the prompts of a batch, and the index of this one's; None without a record.
    """

    inputs: Mapping[str, Tensor]
    spans: Spans
    text: str
    question: str
    cache: PromptCache | None = field(default=None, compare=False, repr=False)
    asks: str = "question"
    history: tuple[tuple[str, str], ...] = ()
    planned: frozenset[str] | None = field(default=None, compare=False, repr=False)
    recorded: tuple[RecordedAnswers, int] | None = field(default=None, compare=False, repr=False)

    def __repr__(self) -> str:
        turn = f"turn {len(self.history) + 1}, " if self.history else ""
        return f"Encoded({self.question!r}, {turn}{self.spans.length} tokens, {len(self.spans.image)} of them image)"

    @property
    def sha256(self) -> str:
        """Digest of the prompt's token ids, image placeholders expanded; empty for a model that reads none."""
        ids = self.inputs.get("input_ids")
        return "" if ids is None else hashlib.sha256(ids.cpu().numpy().astype("<i8").tobytes()).hexdigest()


@dataclass(frozen=True)
class HeadAttention:
    """Attention of T + 1 rows by head: row k predicts answer token k and consumes token k - 1. Float32 on the CPU.

    Attributes:
        mass: (T + 1, L, H, 5) attention mass on each of ``SEGMENTS``; rows sum to 1.
        image: (T + 1, L, N) attention to each image token, mean over heads.
        top: (T + 1, L, H, 2) mean, and entropy in nats after normalising to 1, of the 20 largest attentions to image
            tokens (all of them where there are fewer).
        peak: (T + 1, L, H) largest attention to an image token.
        response: (T + 1, T) attention of the last layer to the answer tokens: maximum over heads, divided by the sum of
            the maxima over the whole row.
    """

    mass: Tensor
    image: Tensor
    top: Tensor
    peak: Tensor
    response: Tensor


@dataclass(frozen=True)
class HiddenStates:
    """Hidden states h_0 (what enters the first layer), ..., h_L (after the final norm), reduced. Float32 on the CPU.

    D dimensions, M question tokens (the last prompt token if there is none). Rows as in ``HeadAttention``. The layers
    of the dictionaries are those of ``KEPT_LAYERS``, by share of depth (``of_depth``). In a trace of several answers
    the rows of all follow one another; ``sinks``, ``image``, ``instruction``, ``prompt_end`` and ``prefix`` are by
    answer, with one dimension more in front, and ``prefix`` is padded.

    Attributes:
        patch_top: (T + 1, L) mean of the largest 5 % of the cosines of the row's state to the image tokens' states of
            the same layer, h_1 to h_L.
        patch_peak: (T + 1, L) the largest of these cosines.
        sinks: (L, N) bool, the image token is an attention sink by the state that enters the layer.
        token: by layer (T + 1, D), states of the rows.
        image: by layer (N, D). ``instruction``: by layer (M, D), question tokens. ``prompt_end``: by layer (D,).
        prefix: (M + T, D) h_0 of the question tokens and of the answer tokens.
        image_probability: (T, N) probability of the answer token when h_L of an image token is decoded by the head.
        instruction_probability: (T, M) the same for question tokens at layer 22 of 32, logits divided by
            ``TEMPERATURE``.
    """

    patch_top: Tensor
    patch_peak: Tensor
    sinks: Tensor
    token: Mapping[int, Tensor]
    image: Mapping[int, Tensor]
    instruction: Mapping[int, Tensor]
    prompt_end: Mapping[int, Tensor]
    prefix: Tensor
    image_probability: Tensor
    instruction_probability: Tensor


@dataclass(frozen=True)
class Trace:
    """T answer tokens, L language layers, H heads, N image tokens, V words. All tensors float32 on the CPU.

    Attributes:
        answer: the answer that was traced.
        spans: token positions of its prompt.
        logits: (T, V), the row that predicts each token.
        mass: (T, L, H, 5) attention mass of the predicting row on each of ``SEGMENTS``; rows sum to 1.
        image_attention: (T, L, N) attention of the predicting row to each image token, mean over heads.
        lens_logprob: (T, L) log-probability of the token when the residual stream after each layer is decoded by the
            final norm and the head; the last layer is the model's own output.
        lens_rank: (T, L) rank of the token in that distribution, 0 for the most probable.
        blank_logits: (T, V), the same rows when the image is replaced by a blank one (the processor's mean colour).
        relevancy: of every token after every layer, in scope ``row``.
        heads: attention by head, of the predicting and the consuming rows.
        states: hidden states of image, question and answer tokens.
        hidden: (T + 1, 2, D) hidden states of the rows at ``HIDDEN_LAYERS``, the last one after the final norm; row k
            predicts answer token k and consumes token k - 1.
        image_embeds: (N, D) image tokens at the input of the language model (of its encoder). Of ``hidden`` and of
            ``relevancy``; None where the model does not show them, and in the trace of decoding steps.
        trajectory: (T, L - 1) Jensen-Shannon divergence in nats, of the distribution decoded after each layer but the
            last from the model's own.
        image_lens: (T, L + 1, 2) probability of the token when h_l of the image tokens is decoded by the head, without
            the final norm but for h_L: the largest over image tokens, and the sum over them.
        lens_entropy: (T, L) entropy in nats of the distributions of ``lens_logprob``. Of ``layer_entropy``, as is
            ``lens_top``: (T, L) int64, the most probable token of each.
        evidence: (T, 2) means over the vocabulary of the positive and of the negative parts of the logits that the head
            gives to the state less its mean over dimensions; ``width`` is D, the number of these.
        peaks: (T, L, 2) means over the image tokens, and over all other positions that the row sees, of the largest
            attention of any head to the position.
        layer_states: (T, K, D) residual stream of the row after the K distinct layers of ``probe_layers``.
        no_image_states: (T, K, D) the same when nothing after the image tokens may attend to them.
        imagining: (T,) cosine of the attention to the image, by all layers and heads, of the row that consumes the
            token and of the row that consumes the second word that the model adds to the answer and ``CONTINUATION``.
            Of ``continuation``.
        own: (T, L, H) attention of the row to its own position, that of the token before the one that it predicts.
        noise_logits: (T, V), the same rows when the image is noised as VCD does it.
        no_image_logits: (T, V), the same rows when nothing after the image tokens may attend to them.
        core_logits: (T, V), the same rows when nothing may attend to the image tokens that the answer attends to most.
        yes_odds: (T,) log-odds of "yes" when the model is asked whether the object that the token names is there; NaN
            for tokens that name nothing. Of ``questions``.
        verify_states: (T, K, D) ``layer_states`` of the row that predicts the reply to the question about the object
            that the token names, NaN for tokens that name nothing; ``verify_states_without`` when the image is hidden.
            Of ``question_states``.
        named_share: (T,) share of the sampled answers that name the object that the token names, in [0, 1]; NaN for
            tokens that name nothing. Of ``samples``.
        masked_logprob: (T,) log-probability of the token when what its row attended to in the picture is grey; NaN for
            tokens that name nothing. Of ``masked``.
        counts: numbers of tokens of several answers that follow one another, in all parts (``features.joining.join``);
            empty for one answer.
        cache: intermediate results that features share (``stethoscope.features.distributions.cached_on_trace``).
    """

    answer: Answer
    spans: Spans
    logits: Tensor
    mass: Tensor | None = None
    image_attention: Tensor | None = None
    lens_logprob: Tensor | None = None
    lens_rank: Tensor | None = None
    blank_logits: Tensor | None = None
    relevancy: Relevancy | None = None
    heads: HeadAttention | None = None
    states: HiddenStates | None = None
    hidden: Tensor | None = None
    image_embeds: Tensor | None = None
    trajectory: Tensor | None = None
    image_lens: Tensor | None = None
    lens_entropy: Tensor | None = None
    lens_top: Tensor | None = None
    evidence: Tensor | None = None
    width: int | None = None
    peaks: Tensor | None = None
    imagining: Tensor | None = None
    own: Tensor | None = None
    named_share: Tensor | None = None
    layer_states: Tensor | None = None
    no_image_states: Tensor | None = None
    verify_states: Tensor | None = None
    verify_states_without: Tensor | None = None
    noise_logits: Tensor | None = None
    no_image_logits: Tensor | None = None
    core_logits: Tensor | None = None
    yes_odds: Tensor | None = None
    masked_logprob: Tensor | None = None
    counts: tuple[int, ...] = ()
    cache: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __repr__(self) -> str:
        parts = [item.name for item in fields(self) if item.name not in ("answer", "spans", "counts", "cache")]
        return f"Trace({self.answer.text!r}, {', '.join(name for name in parts if getattr(self, name) is not None)})"

    @overload
    def require(self, name: Literal["relevancy"]) -> Relevancy: ...

    @overload
    def require(self, name: Literal["heads"]) -> HeadAttention: ...

    @overload
    def require(self, name: Literal["states"]) -> HiddenStates: ...

    @overload
    def require(self, name: TensorPart) -> Tensor: ...

    def require(self, name: str) -> Any:
        """Return a part of the trace, or raise ``CapabilityError`` where the trace was made without it.

        Args:
            name: one of the attributes above.

        Raises:
            CapabilityError: the trace was made without this part.
        """
        value = getattr(self, name)
        if value is None:
            raise CapabilityError(
                f"the trace has no {name!r}; trace the answer with the parts that its features require"
            )
        return value

    def select_rows(self, part: Rows, offset: int) -> Rows:
        """Select the predicting (``offset`` 0) or the consuming rows (1) of (T + 1, ...) rows: (T, ...)."""
        if not self.counts:
            return part[offset : offset + len(self.answer.token_ids)]
        rows = self.positions + self.starts + offset
        if isinstance(part, np.ndarray):
            return part[rows]
        import torch  # reading spans needs none

        return part.index_select(0, torch.from_numpy(rows))  # half the time of part[rows]

    def require_rows(self, name: TensorPart, offset: int) -> Tensor:
        """Return the predicting or the consuming rows of a part, see ``require`` and ``select_rows``."""
        return self.select_rows(self.require(name), offset)

    @cached_property
    def positions(self) -> np.ndarray:
        """(T,) int64 index of every token in its answer."""
        counts = self.counts or (len(self.answer.token_ids),)
        return np.concatenate([np.arange(count) for count in counts])

    @cached_property
    def owners(self) -> np.ndarray:
        """(T,) int64 index of every token's answer."""
        return np.repeat(np.arange(len(self.counts) or 1), self.counts or (len(self.answer.token_ids),))

    @cached_property
    def starts(self) -> np.ndarray:
        """(T,) int64 index of the first row of the token's answer, in parts with a row more than tokens."""
        counts = np.array(self.counts or (len(self.answer.token_ids),))
        return np.repeat(np.cumsum(counts + 1) - counts - 1, counts)

    @cached_property
    def mean_mass(self) -> Tensor:
        """(T, L, 5) ``mass``, mean over heads."""
        return self.require("mass").mean(2)
