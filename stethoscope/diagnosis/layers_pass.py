"""Run the pass of a diagnosis that reads every layer: its predictions by the logit lens, and its raw attention.

Raw attention is the map after softmax, as the model multiplies it with the values; no gradient weighs it. It is
recorded by layer and head to every image token, and to all tokens in the mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from stethoscope.core.errors import CapabilityError, CaptureError, ConfigError
from stethoscope.core.types import Answer, required
from stethoscope.diagnosis.answer_verdicts import rounded
from stethoscope.relevancy.result import read_layout
from stethoscope.tracing.attention_recorder import logits_to_keep
from stethoscope.tracing.hooks import AttentionRecorder, record
from stethoscope.tracing.logit_lens import Lens, layer_count
from stethoscope.tracing.model_parts import Site
from stethoscope.tracing.trace import Encoded, Spans

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stethoscope.adapters.base import Adapter

HEAD_BYTES = 2**28
"""Bytes of the maps of single heads that are held for one answer: those of 113 tokens of LLaVA-1.5-7B."""


@dataclass(frozen=True, eq=False)
class LensTrajectory:
    """Predictions of every layer, decoded by the model's own final norm and head (logit lens).

    Attributes:
        top_tokens: T x L x k texts of the most probable tokens, best first.
        probabilities: (T, L, k) float32, of ``top_tokens``, in [0, 1].
        rank: (T, L) int64, rank of the answer's token, 0 for the most probable.
        logprob: (T, L) float32, natural-log probability of the answer's token, at most 0.
        answer_tokens: T texts of the answer's tokens, decoded one by one like ``top_tokens``.
    """

    top_tokens: tuple[tuple[tuple[str, ...], ...], ...]
    probabilities: np.ndarray
    rank: np.ndarray
    logprob: np.ndarray
    answer_tokens: tuple[str, ...]

    def to_list(self, token: int) -> list[dict[str, Any]]:
        """Convert the layers of one token to JSON-able dictionaries."""
        return [
            {
                "rank": int(self.rank[token, layer]),
                "probability": rounded(float(np.exp(self.logprob[token, layer]))),
                "top": [
                    {"word": text, "probability": rounded(float(probability))}
                    for text, probability in zip(texts, self.probabilities[token, layer], strict=True)
                ],
            }
            for layer, texts in enumerate(self.top_tokens[token])
        ]


@dataclass(frozen=True, eq=False)
class AttentionMaps:
    """Raw attention of T answer tokens in L layers with H heads, to N image tokens. Float32 on the CPU, in [0, 1].

    The row of a token is the one that predicts it. A row sums to 1 over all tokens that it sees. In an encoder-decoder
    model image and question are those of the cross-attention, whose rows sum to 1 over the prompt; earlier answer
    tokens are those of the decoder's self-attention, whose rows sum to 1 over its own sequence.

    Attributes:
        tokens: indices of the K answer tokens whose single heads are held, ascending.
        heads: (K, L, H, N) attention of these tokens.
        mean: (T, L, N) mean over heads, of all tokens.
        largest: (T, L, N) largest of all heads.
        image_mass: (T, L, H) sum over the image tokens.
        matrix: (T, 1 + Q + T + 1) mean over all layers and heads: to the image tokens together, to every token of the
            question, to every answer token (zero for the token itself and later ones), to everything else together; of
            an encoder-decoder model this is everything else in the prompt, and one more column has the start token.
        crosses: whether the attention to image and question is cross-attention.
    """

    tokens: tuple[int, ...]
    heads: Tensor
    mean: Tensor
    largest: Tensor
    image_mass: Tensor
    matrix: Tensor
    crosses: bool = False

    def __repr__(self) -> str:
        count, layers, heads = self.image_mass.shape
        return f"AttentionMaps({count} tokens, {layers} layers, {heads} heads, {self.mean.shape[-1]} image tokens)"

    def to_image(self, token: int, layer: int | None = None, head: int | Literal["mean", "largest"] = "mean") -> Tensor:
        """Return the (N,) attention of one answer token to every image token.

        Args:
            token: index in the answer.
            layer: of the language model; None for the mean over layers.
            head: index; ``mean`` over the heads of a layer, or the ``largest`` of them for every image token.

        Raises:
            ConfigError: there is no such token, layer or head.
            CapabilityError: the single heads of this token are not held.
        """
        count, layers, heads = self.image_mass.shape
        limits = {"token": (token, count), "layer": (0 if layer is None else layer, layers)}
        if isinstance(head, int):
            limits["head"] = head, heads
        elif head not in ("mean", "largest"):
            raise ConfigError(f"head={head!r} should be a number from 0 to {heads - 1}, mean or largest")
        for name, (index, limit) in limits.items():
            if not -limit <= index < limit:
                raise ConfigError(f"{name}={index} should be from 0 to {limit - 1}")
        if not isinstance(head, int):
            values = (self.mean if head == "mean" else self.largest)[token]
        elif token % count in self.tokens:
            values = self.heads[self.tokens.index(token % count), :, head]
        else:
            raise CapabilityError(
                f"single heads of token {token} are not held, only those of {len(self.tokens)} of {count} tokens "
                f"({HEAD_BYTES // 2**20} MiB); use head='mean' or 'largest'"
            )
        return values.mean(0) if layer is None else values[layer]


class AttentionMapRecorder(AttentionRecorder):
    """Records ``AttentionMaps`` in one pass over prompt and whole answer, of one sample without padding.

    Args:
        first: position of the row that predicts the first answer token, in the sequence of the rows.
        count: number of answer tokens T.
        layers: number of layers L of the language model (of its decoder).
        spans: of the prompt.
        encodes: whether the language model is an encoder-decoder one.
        order: indices of answer tokens whose single heads are held, as many of the first as fit.
        limit: bytes that single heads may take.
    """

    def __init__(
        self,
        first: int,
        count: int,
        layers: int,
        spans: Spans,
        encodes: bool = False,
        order: Sequence[int] = (),
        limit: int = HEAD_BYTES,
    ) -> None:
        self.rows = torch.arange(first, first + count)[None]
        self.roles = ("language", "cross") if encodes else ("language",)
        self._spans, self._prompt_role = spans, self.roles[-1]
        self._limit, self._layers = limit, layers
        start = 1 if encodes else spans.length
        self._answer = slice(start, start + count)
        self._order = list(dict.fromkeys(order))
        self._tokens: list[int] = []
        self._by_layer: list[tuple[Tensor, ...]] = []
        self._sums: dict[str, Tensor] = {}  # by role, of the means over heads
        self._seen = dict.fromkeys(self.roles, 0)  # layers

    def on_weights(self, site: Site, weights: Tensor) -> None:
        """Reduce the rows (1, heads, T, S) of one layer."""
        rows = weights[0].detach().float()
        mean = rows.mean(0).cpu()
        self._sums[site.role] = self._sums[site.role] + mean if site.role in self._sums else mean
        self._seen[site.role] += 1
        if site.role != self._prompt_role:
            return
        image = rows[..., list(self._spans.image)]
        if not self._by_layer:
            bytes_per_token = self._layers * image[:, 0].numel() * image.element_size()
            self._tokens = sorted(self._order[: self._limit // bytes_per_token])
        parts = image[:, self._tokens], image.mean(0), image.amax(0), image.sum(-1)
        self._by_layer.append(tuple(part.cpu() for part in parts))

    def finish(self) -> None:
        if set(self._seen.values()) != {self._layers}:
            raise CaptureError(f"raw attention of {self._layers} layers was expected, and seen in {self._seen}")
        if not all(total.isfinite().all() for total in self._sums.values()):
            raise CaptureError("raw attention holds values that are not finite")

    def maps(self) -> AttentionMaps:
        """Return what was recorded."""
        heads, mean, largest, mass = (torch.stack(layers) for layers in zip(*self._by_layer, strict=True))
        return AttentionMaps(
            tuple(self._tokens),
            heads.permute(2, 0, 1, 3),
            mean.transpose(0, 1),
            largest.transpose(0, 1),
            mass.permute(2, 0, 1),
            self._matrix(),
            self._prompt_role == "cross",
        )

    def _matrix(self) -> Tensor:
        means = {role: total / self._layers for role, total in self._sums.items()}
        prompt, own = means[self._prompt_role], means["language"]
        image = prompt[:, list(self._spans.image)].sum(-1, keepdim=True)
        question = prompt[:, list(self._spans.question)]
        answer = torch.zeros(len(own), len(own))
        seen = own[:, self._answer]  # a decoder may not have read the last token
        answer[:, : seen.shape[1]] = seen
        rest = prompt.sum(-1, keepdim=True) - image - question.sum(-1, keepdim=True)
        if own is prompt:
            rest = rest - answer.sum(-1, keepdim=True)
        start = [] if own is prompt else [own[:, :1]]
        return torch.cat([image, question, answer, rest.clamp(min=0), *start], -1)


# --- the pass ---------------------------------------------------------------------------------------------------------

TOP_TOKENS = 5  # most probable tokens in every layer's prediction
Decoder = Callable[[Sequence[int]], str]


def token_decoder(adapter: Adapter) -> Decoder:
    """Return a function that decodes token ids.

    Raises:
        CapabilityError: the adapter has no tokenizer.
    """
    tokenizer = getattr(getattr(adapter, "processor", None), "tokenizer", None)
    if tokenizer is None:
        raise CapabilityError(f"{adapter.name} has no tokenizer that would decode tokens")
    return lambda ids: tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def read_layers(
    adapter: Adapter, encoded: Encoded, answer: Answer, named: Sequence[int], notes: list[str]
) -> tuple[LensTrajectory | None, AttentionMaps | None]:
    """Read predictions and raw attention of all layers in one forward pass.

    Args:
        adapter: the model.
        encoded: the prompt.
        answer: of at least one token.
        named: indices of answer tokens whose single heads are held first; the others follow in reading order.
        notes: receives the reason why the model cannot give one of the two, which is None then.
    """
    try:
        decode = token_decoder(adapter)
        model, inputs = adapter.forward_inputs(encoded, answer.token_ids)
        order = [*named, *range(len(answer.token_ids))]
        recorder = attention_recorder(model, inputs, encoded, answer, order)
    except CapabilityError as error:
        notes.append(str(error))
        return None, None
    lens: Lens | None = None
    try:
        lens = Lens(model)
    except CapabilityError as error:
        notes.append(str(error))
    rows = required(recorder.rows)
    attention: AttentionMaps | None = None
    with torch.inference_mode():
        try:
            logits, hidden = _forward(model, inputs, rows, lens, recorder)
            attention = recorder.maps()
        except CaptureError as error:
            notes.append(str(error))
            logits, hidden = _forward(model, inputs, rows, lens)
        if lens is None:
            return None, attention
        try:
            return _trajectory(lens, hidden, logits, answer, decode), attention
        except CapabilityError as error:
            notes.append(str(error))
            return None, attention


def read_attention(adapter: Adapter, encoded: Encoded, answer: Answer, order: Sequence[int]) -> AttentionMaps:
    """Read raw attention in one forward pass, without predictions.

    Args:
        adapter: the model.
        encoded: the prompt.
        answer: of at least one token.
        order: indices of answer tokens whose single heads are held, as many of the first as fit.

    Raises:
        CapabilityError: there is no transformers model behind the adapter.
        CaptureError: its attention cannot be recorded.
    """
    model, inputs = adapter.forward_inputs(encoded, answer.token_ids)
    recorder = attention_recorder(model, inputs, encoded, answer, order)
    with torch.inference_mode():
        _forward(model, inputs, required(recorder.rows), None, recorder)
    return recorder.maps()


def attention_recorder(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    encoded: Encoded,
    answer: Answer,
    order: Sequence[int],
    limit: int = HEAD_BYTES,
) -> AttentionMapRecorder:
    """Make the recorder of raw attention for a pass over prompt and whole answer.

    Raises:
        CapabilityError: the inputs are not those of one sample.
    """
    layout = read_layout(model, inputs, answer.token_ids)
    return AttentionMapRecorder(
        layout.first,
        len(answer.token_ids),
        layer_count(model),
        encoded.spans,
        layout.encoder_decoder,
        order,
        limit,
    )


def _forward(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    rows: Tensor,
    lens: Lens | None,
    recorder: AttentionMapRecorder | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Run one pass; return the (1, T, V) float32 logits of the rows, and their residual stream by layer."""
    options = logits_to_keep(model, rows[0].tolist())
    with ExitStack() as stack:
        hidden = [] if lens is None else stack.enter_context(lens.listen(rows))
        if recorder is not None:
            stack.enter_context(record(model, recorder))
        logits = model(**inputs, **options, use_cache=False).logits
    return (logits if options else logits[:, rows[0].to(logits.device)]).float(), hidden


def _trajectory(lens: Lens, hidden: list[Tensor], logits: Tensor, answer: Answer, decode: Decoder) -> LensTrajectory:
    """Decode one layer at a time.

    Raises:
        CapabilityError: the model's final norm and head are not those of its logits.
    """
    tokens = torch.tensor([answer.token_ids])
    top_tokens, parts = [], []
    lens.read(hidden[-1:], logits, tokens)  # raises unless the final norm and the head are the right ones
    for layer in [*hidden[:-1], None]:
        decoded = (logits if layer is None else lens.decode(layer))[0].log_softmax(-1)
        own = decoded.gather(-1, tokens[0][:, None].to(decoded.device))
        top = decoded.topk(TOP_TOKENS)
        parts.append([top.values.exp().cpu(), (decoded > own).sum(-1).cpu(), own[:, 0].cpu()])
        top_tokens.append([tuple(decode([token]) for token in row) for row in top.indices.tolist()])
    probabilities, rank, logprob = (torch.stack(part, 1).numpy() for part in zip(*parts, strict=True))
    answer_tokens = tuple(decode([token]) for token in answer.token_ids)
    return LensTrajectory(tuple(zip(*top_tokens, strict=True)), probabilities, rank, logprob, answer_tokens)
