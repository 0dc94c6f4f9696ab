"""Run the pass of a diagnosis that reads every layer: its predictions by the logit lens, and its raw attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch

from stethoscope.core.errors import CapabilityError, CaptureError
from stethoscope.core.types import Answer, required
from stethoscope.diagnosis.diagnosis import LensTrajectory
from stethoscope.relevancy.result import read_layout
from stethoscope.tracing.attention_maps import HEAD_BYTES, AttentionMapRecorder, AttentionMaps
from stethoscope.tracing.attention_recorder import logits_to_keep
from stethoscope.tracing.hooks import record
from stethoscope.tracing.logit_lens import Lens, layer_count

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from stethoscope.adapters.base import Adapter
    from stethoscope.tracing.trace import Encoded

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
