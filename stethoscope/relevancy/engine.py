"""Compute the relevancy of answer tokens by one forward pass and one backward pass per group of tokens.

Scope ``row`` of causal models runs prompt and answer one after another (``shared_passes``), all else in a whole pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stethoscope.core.errors import ConfigError, DataError, unknown, wrong_type
from stethoscope.core.types import Answer
from stethoscope.relevancy.attention_backward import default_budget
from stethoscope.relevancy.backward_pass import BackwardPass
from stethoscope.relevancy.gradient_recorder import AttentionGradRecorder
from stethoscope.relevancy.result import Layout, Relevancy, answer_logits, read_layout
from stethoscope.relevancy.rules import RULES
from stethoscope.relevancy.shared_passes import AnswerPass, PromptPass, shares_passes
from stethoscope.relevancy.token_alignment import (
    TokenAlignment,
    arrange_patches,
    first_sample,
    image_token_kind,
    probe_alignment,
)
from stethoscope.tracing.hooks import record, selected
from stethoscope.tracing.model_parts import frozen, route_model
from stethoscope.tracing.token_spans import tile_grids

if TYPE_CHECKING:
    from PIL.Image import Image

    from stethoscope.adapters.base import Adapter
    from stethoscope.tracing.trace import Encoded

SCOPES = ("row", "token")
LAYERS = ("all", "final")

_SEQUENCE = ("llm", "saliency")  # parts along the sequence of prompt and answer


def relevancy_from_inputs(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    answer_ids: Sequence[int],
    *,
    scope: str = "row",
    rule: str = "eq10",
    layers: str = "all",
    tokens: Sequence[int] | None = None,
    budget: int | None = None,
    recompute: bool = True,
) -> Relevancy:
    """Compute the relevancy of answer tokens from the inputs of a forward pass over prompt and answer.

    With A an attention map after softmax and G the gradient of a logit with respect to it, Abar = mean over heads of
    relu(G * A) and R_l = R_{l-1} + Abar_l R_{l-1}, R_0 = I; the result is the row of R_l - I that predicts the token
    (Chefer et al. 2021, arXiv 2103.15679, equations 5-10).

    Args:
        model: a transformers model with an image and a text side; its weights may be frozen and are left as they are.
        inputs: keyword arguments of the forward pass, one sample, left padding allowed. For a decoder-only model
            ``input_ids`` ends with the answer; an encoder-decoder model has ``decoder_input_ids`` with its start
            token and the answer (without the last token of it, or with).
        answer_ids: the answer's token ids.
        scope: ``row``, our own: the prompt's rows use the gradient of answer token 0, every later row that of the
            token it predicts; one backward pass. ``token``, the paper's definition: all rows use the token's own
            gradient; one backward pass per token, each layer run again once for a group of tokens.
        rule: reading of equation 10, see ``rules.RULES``.
        layers: ``all`` for R after every layer of the language model, ``final`` for the last only.
        tokens: indices of the answer tokens, from 0; all by default.
        budget: bytes that attention maps and the gradients of tokens may take at once, about half for each; by default
            64 MiB, on a GPU an eighth of its free memory from that to 2 GiB. A larger one saves scope ``token`` some
            time on long sequences.
        recompute: keep only the inputs of layers and run them again in the backward pass. False takes less time and
            several times the memory in scope ``row``; scope ``token`` always runs them again.

    Raises:
        ConfigError: an option has an unknown value.
        DataError: the inputs do not match the answer.
        CapabilityError: this kind of model is not supported.
        CaptureError: a value is not finite; the message names the layer.
    """
    for kind, value, known in (("scope", scope, SCOPES), ("rule", rule, RULES), ("layers", layers, LAYERS)):
        if value not in known:
            raise ConfigError(unknown(kind, str(value), known))
    with torch.inference_mode(False), torch.enable_grad(), frozen(model), selected(model):
        inputs = {name: value.clone() if value.is_inference() else value for name, value in inputs.items()}
        layout, every = read_layout(model, inputs, answer_ids), layers == "all"
        if scope == "row" and shares_passes(model, inputs) and layout.image[-1] < layout.first:
            return _relevancy_apart(model, inputs, layout, every, tokens, budget, recompute)
        return _relevancy(model, inputs, layout, scope, rule, every, tokens, budget, recompute)[0]


def relevancies_from_passes(
    answer_pass: AnswerPass, logits: Tensor, answers: Sequence[Sequence[int]]
) -> list[Relevancy]:
    """Compute the relevancy of B answers in scope ``row`` from the passes over their prompts and over them.

    Args:
        answer_pass: whose forward pass has run.
        logits: (B, T, V) that it computed, of the rows that predict the answers' tokens.
        answers: token ids of B answers, at least one each.

    Raises:
        DataError: an answer has no tokens.
        CapabilityError, CaptureError: as ``relevancy_from_inputs``.
    """
    counts, prompt = tuple(map(len, answers)), answer_pass.prompt
    if not min(counts):
        raise DataError("an answer has no tokens; relevancy needs at least one")
    with torch.inference_mode(False), torch.enable_grad():
        answer = torch.zeros(len(answers), max(counts), dtype=torch.long)
        for index, token_ids in enumerate(answers):
            answer[index, : len(token_ids)] = torch.as_tensor(token_ids)
        layout = Layout(answer, counts, prompt.length - 1, prompt.length + max(counts), prompt.image, False)
        chosen = logits.gather(-1, answer[..., None].to(logits.device))[..., 0]
        return _from_passes(answer_pass, chosen, layout, tuple(range(max(counts))), True)


def _relevancy_apart(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    layout: Layout,
    every: bool,
    tokens: Sequence[int] | None,
    budget: int | None,
    recompute: bool,
) -> Relevancy:
    """Compute the relevancy of one sample by a pass over the prompt and one over the answer."""
    chosen, end = _chosen(tokens, layout), layout.first + 1
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    prompt = {name: value[:, :end] if value.shape == ids.shape else value for name, value in inputs.items()}
    answer_pass = AnswerPass(PromptPass(model, prompt, budget, recompute))
    rows = answer_pass.inputs(ids[:, end - 1 : -1], None if mask is None else mask[:, :-1])
    with answer_pass.recorded():
        logits = model(**rows, use_cache=True).logits
        logits = logits.gather(-1, layout.answer[..., None].to(logits.device))[..., 0]
    del rows  # and the cache in them, which the prompt's backward pass does not need
    return _from_passes(answer_pass, logits, layout, chosen, every)[0]


def _from_passes(
    answer_pass: AnswerPass, logits: Tensor, layout: Layout, chosen: tuple[int, ...], every: bool
) -> list[Relevancy]:
    """Compute the relevancy of every sample from the (B, A) logits of the answers' tokens."""
    prompt, model = answer_pass.prompt, answer_pass.prompt.model
    kind, alignment = prompt.kind, prompt.alignment
    backward_pass = BackwardPass(prompt.recorder, layout, kind, alignment, chosen, RULES[0], every)
    end = max(chosen) + 1
    answer_pass.backward(_sum_logits(logits, layout, end), end, backward_pass.receive)
    return _results(model, prompt.sample, layout, kind, chosen, alignment, [backward_pass.result()])


def _relevancy(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    layout: Layout,
    scope: str,
    rule: str,
    every: bool,
    tokens: Sequence[int] | None,
    budget: int | None,
    recompute: bool,
) -> list[Relevancy]:
    """Compute the relevancy of every sample by a whole pass; options have been checked and gradients are enabled."""
    chosen = _chosen(tokens, layout)
    keep_graphs = scope == "row" and not recompute
    live = layout.first + 1 if scope == "row" else None
    recorder = AttentionGradRecorder(live, keep_graphs, layout.first)
    with (
        record(model, recorder),
        route_model(model, recorder.checkpointer.run, recorder.checkpointer.run_last),
    ):
        logits = answer_logits(model, inputs, layout)
    kind = image_token_kind(model, recorder, len(layout.counts), len(layout.image), layout.encoder_decoder)
    sample = first_sample(inputs, len(layout.counts))
    alignment = probe_alignment(model, sample, layout.image) if kind == "merged" else None
    budget = default_budget(logits.device) if budget is None else budget
    groups = [chosen]
    if scope == "token":
        groups = _token_groups(chosen, budget // 2 // recorder.checkpointer.gradient_bytes())
    results: list[dict[str, Tensor]] = []
    for index, group in enumerate(groups):
        # in scope row no token's gradient reaches the rows of another, so all tokens share one pass
        split = [group] if scope == "row" else [(token,) for token in group]
        passes = [BackwardPass(recorder, layout, kind, alignment, part, rule, every) for part in split]
        end = max(group) + 1
        roots = [_sum_logits(logits, layout, end)] if scope == "row" else [logits[0, token] for token in group]
        receivers = [backward_pass.receive for backward_pass in passes]
        recorder.backward(model, roots, receivers, layout.first + end, budget, last=index + 1 == len(groups))
        results += [backward_pass.result() for backward_pass in passes]
    return _results(model, sample, layout, kind, chosen, alignment, results)


def _chosen(tokens: Sequence[int] | None, layout: Layout) -> tuple[int, ...]:
    """Return the indices of the answer tokens to compute, all by default."""
    count = layout.answer.shape[1]
    chosen = tuple(range(count)) if tokens is None else tuple(int(token) for token in tokens)
    if not all(0 <= token < count for token in chosen) or not chosen:
        raise ConfigError(f"tokens={list(chosen)} should be indices of answer tokens, 0 to {count - 1}")
    return chosen


def _results(
    model: PreTrainedModel,
    sample: Mapping[str, Tensor],
    layout: Layout,
    kind: str,
    chosen: tuple[int, ...],
    alignment: TokenAlignment | None,
    results: Sequence[Mapping[str, Tensor]],
) -> list[Relevancy]:
    """Build the results of all samples from those of backward passes, which have (B, L or 1, T, positions) each."""
    parts = {name: torch.cat([rows[name] for rows in results], 2).transpose(1, 2).cpu() for name in results[0]}
    return [
        _result(model, sample, layout, kind, chosen[:count], alignment, _sample_parts(parts, index, layout))
        for index, count in enumerate(layout.counts)
    ]


def _sum_logits(logits: Tensor, layout: Layout, end: int) -> Tensor:
    """Sum the first ``end`` logits of all answers."""
    valid = torch.arange(end) < torch.tensor(layout.counts)[:, None]
    return logits[:, :end][valid.to(logits.device)].sum()


def _sample_parts(parts: Mapping[str, Tensor], index: int, layout: Layout) -> dict[str, Tensor]:
    """Select the parts of one sample, without the padding after its answer."""
    if len(layout.counts) == 1:
        return {name: part[0] for name, part in parts.items()}
    count = layout.counts[index]
    length = layout.first + 1 + count
    return {name: part[index, :count, ..., : length if name in _SEQUENCE else None] for name, part in parts.items()}


def _token_groups(tokens: tuple[int, ...], size: int) -> list[tuple[int, ...]]:
    """Split tokens into groups of similar size whose gradients pass through the layers together.

    >>> _token_groups((0, 1, 2, 3, 4), 4)
    [(0, 1, 2), (3, 4)]
    """
    count = math.ceil(len(tokens) / max(size, 1))
    step = math.ceil(len(tokens) / count)
    return [tokens[start : start + step] for start in range(0, len(tokens), step)]


def _result(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    layout: Layout,
    kind: str,
    chosen: tuple[int, ...],
    alignment: TokenAlignment | None,
    parts: dict[str, Tensor],
) -> Relevancy:
    """Build the result of one sample, with the patches in the order of ``pixel_values``."""
    if kind == "same":
        grids = tile_grids(model.config, inputs, len(layout.image)) or _square(len(layout.image))
        tiles = parts["vision"].unflatten(-1, (len(grids), *grids[0])) if len(set(grids)) == 1 else None
    else:
        parts["vision"], tiles = arrange_patches(model.config, inputs, parts["vision"], alignment)
    return Relevancy(
        chosen,
        layout.first,
        tuple(layout.image.tolist()),
        llm=parts.get("llm"),
        decoder=parts.get("decoder"),
        encoder=parts.get("encoder"),
        vision=parts["vision"],
        tiles=tiles,
        query_text=parts.get("query_text"),
        saliency=parts["saliency"],
    )


def _square(count: int) -> tuple[tuple[int, int], ...]:
    """Return the square grid of a convolutional tower's tokens; empty if they fill none."""
    side = round(count**0.5)
    return ((side, side),) if side * side == count else ()


def token_relevancy(
    adapter: Adapter,
    image: Image,
    question: str,
    answer: Answer | str,
    *,
    scope: str = "row",
    history: Sequence[tuple[str, str]] = (),
    **options: Any,
) -> Relevancy:
    """Compute the relevancy of an answer's tokens to image, question, earlier answer and all other tokens.

    Args:
        adapter: the model.
        image: the image.
        question: the question about it.
        answer: the model's answer with its token ids, or a text, which the adapter tokenises.
        scope: ``row`` or ``token``, as for ``relevancy_from_inputs``.
        history: earlier questions about the image with their answers, the oldest first, see ``Adapter.encode``.
        **options: ``rule``, ``layers``, ``tokens``, ``budget``, ``recompute`` of ``relevancy_from_inputs``.

    Returns:
        The relevancy, with ``question_positions``, so that ``image``, ``question``, ``answer`` and ``rest`` add up to
        the whole row.

    Raises:
        CapabilityError: the adapter has no transformers model, or its kind is not supported, or there is a history and
            the model is asked one question at a time.
        ConfigError: the answer is neither a text nor an ``Answer``.
        ConfigError, DataError, CaptureError: as ``relevancy_from_inputs``.
    """
    encoded = adapter.encode_as("question", image, question, history)
    if isinstance(answer, str):
        answer = adapter.answer(encoded, answer)
    elif not isinstance(answer, Answer):
        raise wrong_type("answer", "a text or an Answer of the model", answer)
    return answer_relevancy(adapter, encoded, answer, scope=scope, **options)


def answer_relevancy(adapter: Adapter, encoded: Encoded, answer: Answer, **options: Any) -> Relevancy:
    """Compute the relevancy of an answer to a prompt that is already encoded, see ``token_relevancy``."""
    model, inputs = adapter.forward_inputs(encoded, answer.token_ids)
    relevancy = relevancy_from_inputs(model, inputs, answer.token_ids, **options)
    return replace(relevancy, question_positions=encoded.spans.question)
