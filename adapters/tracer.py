"""Trace answers: one recorded teacher-forced pass, then the contrast passes and relevancy.

Where generation recorded all that a trace needs (``tracing.answer_recorder``), there is no pass; where it returned the
KV caches of the prompts, the pass begins with their last tokens. For relevancy the pass has a graph, and continues one
over the prompts that has a graph too (``relevancy.shared_passes``), which ``prefill.Prefill`` runs before generation.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stethoscope.adapters import memory
from stethoscope.adapters.contrast_passes import CONTRASTS, ContrastPasses, layer_states
from stethoscope.adapters.forward import ForwardPass, ForwardRunner, groups
from stethoscope.adapters.prefill import SMALL_MAPS, Prefill
from stethoscope.core.errors import CapabilityError, CaptureError
from stethoscope.core.types import Answer
from stethoscope.features import FEATURES
from stethoscope.relevancy import Relevancy, relevancies_from_passes, relevancy_from_inputs
from stethoscope.relevancy.shared_passes import AnswerPass, PromptPass
from stethoscope.tracing.attention_recorder import (
    HeadAttentionRecorder,
    ImageSimilarityRecorder,
    RowAttentionRecorder,
)
from stethoscope.tracing.hooks import record, selected
from stethoscope.tracing.interventions import core
from stethoscope.tracing.logit_lens import Lens
from stethoscope.tracing.model_parts import listed_modules
from stethoscope.tracing.state_recorder import HiddenStateRecorder
from stethoscope.tracing.trace import (
    CONTINUED_TOKENS,
    DECODED_REQUIREMENTS,
    IMAGE_REQUIREMENTS,
    PROMPT_REQUIREMENTS,
    STREAM_REQUIREMENTS,
    Encoded,
    Trace,
)


class _Rows(NamedTuple):
    """The rows of B answers, from a pass over them or from a record of their generation.

    Attributes:
        attention: recorder of their maps, if required.
        states: recorder of hidden states, if required.
        stream: residual stream (B, T or T + 1, D) after each layer, if required.
        logits: (B, T, V).
        relevancies: of the answers, if they share a pass with a graph.
        embeds: (N, D) image tokens of every prompt, if the pass was to read them; empty otherwise.
    """

    attention: RowAttentionRecorder | None
    states: HiddenStateRecorder | None
    stream: list[Tensor]
    logits: Tensor
    relevancies: list[Relevancy]
    embeds: list[Tensor | None]


class Tracer:
    """Trace answers of one loaded model.

    Args:
        name: of the model, for messages.
        forward: prepares and runs its passes.
        suffix: token ids of ``CONTINUATION``.
        never: ids that no continuation may hold, such as image placeholders.

    Attributes:
        prefill: runs the passes over prompts whose answers need relevancy.
    """

    def __init__(self, name: str, forward: ForwardRunner, suffix: Sequence[int], never: Sequence[int]) -> None:
        self._suffix, self._never = list(suffix), list(never)
        self._name, self._forward, self._model = name, forward, forward.model
        self._lens: Lens | None = None
        self._contrasts = ContrastPasses(forward)
        self.prefill = Prefill(name, forward)

    def trace(self, encoded: Sequence[Encoded], answers: Sequence[Answer], requires: frozenset[str]) -> list[Trace]:
        """Trace B answers in as few passes as their prompts allow; see ``Adapter.trace_batch``."""
        self._check_requirements(requires)
        with listed_modules(self._model):
            if "relevancy" not in requires:
                return self._trace(encoded, answers, requires)
            with selected(self._model):  # for all passes, most of which are recorded anyway
                return self._trace(encoded, answers, requires)

    def _trace(self, encoded: Sequence[Encoded], answers: Sequence[Answer], requires: frozenset[str]) -> list[Trace]:
        sharing: list[list[int]] = []  # prompts of one pass with a graph
        if "relevancy" in requires:
            encoded, sharing = self.prefill.complete(encoded, requires)
        traces: dict[int, Trace] = {}
        alone = [index for index in range(len(encoded)) if not any(index in group for group in sharing)]
        batches = groups([encoded[index].inputs for index in alone])
        whole = [[alone[position] for position in batch] for batch in batches]
        for group in [*whole, *sharing]:
            batch = [encoded[index] for index in group], [answers[index] for index in group]
            traces.update(zip(group, self._trace_group(*batch, requires, group in sharing), strict=True))
        for index, (prompt, answer) in enumerate(zip(encoded, answers, strict=True)):
            if "relevancy" in requires and traces[index].relevancy is None:
                traces[index] = replace(traces[index], relevancy=self._relevancy(prompt, answer))
        return [traces[index] for index in range(len(encoded))]

    def _check_requirements(self, requires: frozenset[str]) -> None:
        missing = requires & PROMPT_REQUIREMENTS
        if self._forward.decoder_start is None or not missing:
            return
        lacking = [item for item in FEATURES.values() if item.requires & missing]
        without = ",".join(dict.fromkeys(item.group for item in lacking))
        raise CapabilityError(
            f"{self._name} reads the image in an encoder, so hidden states of image and answer tokens are not of one "
            f"kind; add features.exclude=[{without}], which are {', '.join(item.name for item in lacking)}"
        )

    def _trace_group(
        self, encoded: list[Encoded], answers: list[Answer], requires: frozenset[str], shares: bool = False
    ) -> list[Trace]:
        """Trace answers whose prompts make one batch; ``shares`` where these are all those of a pass with a graph."""
        ids = [answer.token_ids for answer in answers]
        rows = None if shares else _recorded_rows(encoded, ids, requires)
        if rows is None:
            rows = self._run(encoded, ids, requires, shares)
        if rows.logits.amax(-1).isnan().any():  # a tenth of the time of looking at all of them
            raise CaptureError(f"{self._name}: the logits hold values that are not numbers")
        by_token = self._token_parts(encoded, ids, requires, rows)
        whole = self._whole_parts(encoded, ids, requires, rows)
        return [
            Trace(
                answer,
                prompt.spans,
                **{name: part[index][: len(answer.token_ids)] for name, part in by_token.items()},
                **{name: part[index] for name, part in whole.items()},
                width=rows.stream[-1].shape[-1] if "evidence" in requires else None,
            )
            for index, (prompt, answer) in enumerate(zip(encoded, answers, strict=True))
        ]

    def _token_parts(
        self, encoded: Sequence[Encoded], ids: Sequence[Sequence[int]], requires: frozenset[str], rows: _Rows
    ) -> dict[str, Any]:
        """Compute, by name and by answer, the parts of a trace with an item for every token, and maybe for padding."""
        attention, logits = rows.attention, rows.logits
        hidden = [layer[:, : logits.shape[1]] for layer in rows.stream]  # without the row that consumes the last token
        parts: dict[str, Any] = {"logits": logits.cpu(), **self._decoded(hidden, logits, ids, requires)}
        core_tokens = None
        if attention is not None:
            if "attention" in requires:
                parts |= {"mass": attention.mass(), "image_attention": attention.image()}
            if "peaks" in requires:
                parts["peaks"] = attention.peaks()
            if "own" in requires:
                parts["own"] = attention.own()
            if "core" in requires:
                triples = zip(attention.image(), ids, encoded, strict=True)
                core_tokens = [core(image[: len(answer)], prompt.spans) for image, answer, prompt in triples]
        if "layer_states" in requires:
            parts["layer_states"] = layer_states(hidden)
        if not requires.isdisjoint(CONTRASTS):
            parts |= self._contrasts.logits(encoded, ids, requires, core_tokens)
        if "no_image_states" in requires:
            parts["no_image_states"] = self._contrasts.no_image_states(encoded, ids, self._find_lens())
        if "continuation" in requires:
            parts["imagining"] = self._imagining(encoded, ids)
        return parts

    def _whole_parts(
        self, encoded: Sequence[Encoded], ids: Sequence[Sequence[int]], requires: frozenset[str], rows: _Rows
    ) -> dict[str, Any]:
        """Return, by name and by answer, the parts of a trace that are not cut to the length of the answer."""
        parts: dict[str, Any] = {}
        if "hidden" in requires:
            probed = self._find_lens().probed(rows.stream)
            parts["hidden"] = [states[: len(answer) + 1] for states, answer in zip(probed, ids, strict=True)]
        if not requires.isdisjoint(IMAGE_REQUIREMENTS):
            parts["image_embeds"] = self._image_embeds(encoded, rows.embeds)
        if isinstance(rows.attention, HeadAttentionRecorder):
            parts["heads"] = rows.attention.heads()
        if rows.states is not None and "states" in requires:
            parts["states"] = rows.states.states()
        if rows.states is not None and "image_lens" in requires:
            parts["image_lens"] = rows.states.image_lens()
        if rows.relevancies:
            pairs = zip(rows.relevancies, encoded, strict=True)
            parts["relevancy"] = [replace(part, question_positions=prompt.spans.question) for part, prompt in pairs]
        return parts

    def _run(
        self, encoded: Sequence[Encoded], ids: Sequence[Sequence[int]], requires: frozenset[str], shares: bool
    ) -> _Rows:
        """Run the pass over answers whose prompts make one batch, see ``_trace_group``."""
        consuming = not requires.isdisjoint({"heads", "states", "hidden"})
        cache = encoded[0].cache
        graph = cache.graph if shares and cache is not None else None
        reads_prompts = graph is None and not requires.isdisjoint(PROMPT_REQUIREMENTS)
        with torch.inference_mode(graph is None):  # gradients need ordinary tensors
            if reads_prompts:
                forward = self._forward.full_forward(encoded, ids, consuming)
            else:
                forward = self._answer_forward(encoded, ids, consuming, graph)
        rows = forward.rows[:, :-1].contiguous() if consuming and forward.rows.shape[1] > 1 else forward.rows
        attention = self._attention_recorder(forward, ids, requires)
        states = self._state_recorder(forward, ids, requires, graph)
        answer_pass: AnswerPass | None = None
        with ExitStack() as stack:
            if graph is not None:
                answer_pass = AnswerPass(graph, attention)
                stack.enter_context(answer_pass.recorded())
            elif attention is not None:
                stack.enter_context(record(self._model, attention))
            if states is not None:
                stack.enter_context(states.listen())
            embeds: list[Tensor | None] = []
            if not forward.skipped and not requires.isdisjoint(IMAGE_REQUIREMENTS):
                embeds = stack.enter_context(self._forward.captured_embeds(encoded))
            reads = not requires.isdisjoint(STREAM_REQUIREMENTS)
            stream = stack.enter_context(self._find_lens().listen(forward.rows)) if reads else []
            logits = self._forward.logits(forward, rows)
        relevancies = [] if answer_pass is None else relevancies_from_passes(answer_pass, logits, ids)
        return _Rows(attention, states, stream, logits.detach(), relevancies, embeds)

    def _image_embeds(self, encoded: Sequence[Encoded], embeds: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return the (N, D) image tokens of every prompt, float32 on the CPU.

        Args:
            encoded: the prompts.
            embeds: what the pass over them has read; empty where it stood behind their caches, which hold them. Another
                pass is made only where these do not.
        """
        parts = list(embeds) or [None if prompt.cache is None else prompt.cache.embeds for prompt in encoded]
        if any(part is None for part in parts) and self._forward.causal:
            parts = self._forward.read_embeds(encoded)
        return [None if part is None else part.float().cpu() for part in parts]

    # --- recorders --------------------------------------------------------------------------------------------------

    def _attention_recorder(
        self, forward: ForwardPass, ids: Sequence[Sequence[int]], requires: frozenset[str]
    ) -> RowAttentionRecorder | None:
        decodes = self._forward.decoder_start is not None
        decoder = forward.inputs["decoder_input_ids"].shape[1] if decodes else None
        layout = (forward.spans, forward.length, decoder, forward.pad_offsets, forward.skipped, requires)
        if "heads" in requires:
            return HeadAttentionRecorder(forward.rows, [len(answer) for answer in ids], *layout)
        if requires.isdisjoint({"attention", "core", "peaks", "own"}):
            return None
        return RowAttentionRecorder(forward.rows, *layout)

    def _state_recorder(
        self,
        forward: ForwardPass,
        ids: Sequence[Sequence[int]],
        requires: frozenset[str],
        graph: PromptPass | None,
    ) -> HiddenStateRecorder | None:
        if requires.isdisjoint(PROMPT_REQUIREMENTS):
            return None
        parts, lens = ("states" in requires, "image_lens" in requires), self._find_lens()
        if graph is None:
            return HiddenStateRecorder(lens, forward.rows, ids, forward.spans, *parts)
        prompt = [*graph.hidden[:-1], lens.norm(graph.hidden[-1])]
        rows = forward.rows + graph.length - 1
        return HiddenStateRecorder(lens, rows, ids, forward.spans, *parts, prompt)

    def _find_lens(self) -> Lens:
        if self._lens is None:
            self._lens = Lens(self._model)
        return self._lens

    def _decoded(
        self, hidden: list[Tensor], logits: Tensor, ids: Sequence[Sequence[int]], requires: frozenset[str]
    ) -> dict[str, Sequence[Tensor]]:
        """Decode the residual stream by the logit lens, by sample; rows of padding are left out."""
        if requires.isdisjoint(DECODED_REQUIREMENTS | {"evidence"}):
            return {}
        counts = [len(answer) for answer in ids]
        tokens = torch.tensor([token for answer in ids for token in answer], dtype=torch.long)
        valid = torch.arange(logits.shape[1]) < torch.tensor(counts)[:, None]
        flat = [part.flatten(0, 1) for part in (*hidden, logits)]
        if not valid.all():
            rows = valid.flatten().nonzero()[:, 0]  # a sixth of the time of selecting by a mask
            flat = [part[rows.to(part.device)] for part in flat]
        *hidden, logits = flat
        lens, decoded = self._find_lens(), dict[str, Tensor]()
        if not requires.isdisjoint(DECODED_REQUIREMENTS):
            decoded |= lens.read(hidden, logits, tokens, requires)
        if "evidence" in requires:
            decoded["evidence"] = lens.evidence(hidden[-1])
        return {name: part.split(counts) for name, part in decoded.items()}

    def _imagining(self, encoded: Sequence[Encoded], ids: Sequence[Sequence[int]]) -> Tensor:
        """Return the (B, T) likeness of every token's look at the image to that of a token which goes on inventing."""
        extended = [[*answer, *self._suffix] for answer in ids]
        for _ in range(CONTINUED_TOKENS):
            forward = self._answer_forward(encoded, extended, consuming=True)
            rows = forward.rows.gather(1, torch.tensor([[len(answer)] for answer in extended]))
            logits = self._forward.logits(forward, rows)[:, 0]
            logits[:, [token for token in self._never if token < logits.shape[-1]]] = -torch.inf
            extended = [[*answer, token] for answer, token in zip(extended, logits.argmax(-1).tolist(), strict=True)]
        forward = self._answer_forward(encoded, extended, consuming=True)
        reference = forward.rows.gather(1, torch.tensor([[len(answer)] for answer in extended]))
        rows = torch.cat([forward.rows[:, 1 : max(map(len, ids)) + 1], reference], 1)
        role = "language" if self._forward.decoder_start is None else "cross"
        recorder = ImageSimilarityRecorder(rows, forward.spans, role)
        with record(self._model, recorder):
            self._forward.logits(forward, reference)
        return recorder.similarities()

    def _answer_forward(
        self,
        encoded: Sequence[Encoded],
        ids: Sequence[Sequence[int]],
        consuming: bool = False,
        graph: PromptPass | None = None,
    ) -> ForwardPass:
        """Prepare a pass over answers, continued from the graph of the prompts or their KV caches, if they have any."""
        caches = [prompt.cache for prompt in encoded if prompt.cache is not None]
        if len(caches) == len(encoded):
            prefix = None if graph is None else graph.prefix_cache()
            return self._forward.continue_from_cache(encoded, ids, caches, consuming=consuming, prefix=prefix)
        return self._forward.full_forward(encoded, ids, consuming)

    # --- relevancy --------------------------------------------------------------------------------------------------

    def _relevancy(self, encoded: Encoded, answer: Answer) -> Relevancy:
        """Compute the relevancy of an answer by itself."""
        length = encoded.spans.length + len(answer.token_ids)
        recompute = memory.attention_bytes(self._model, length) > SMALL_MAPS
        inputs = self._forward.extended(encoded, answer.token_ids)
        relevancy = relevancy_from_inputs(self._model, inputs, answer.token_ids, recompute=recompute)
        return replace(relevancy, question_positions=encoded.spans.question)


def _recorded_rows(encoded: Sequence[Encoded], ids: Sequence[Sequence[int]], requires: frozenset[str]) -> _Rows | None:
    """Return the rows that were recorded while the answers were generated; None where a pass is needed."""
    parts = [prompt.recorded for prompt in encoded if prompt.recorded is not None]
    if len(parts) < len(encoded) or any(record is not parts[0][0] for record, _ in parts):
        return None
    record, indices = parts[0][0], [index for _, index in parts]
    if not record.covers(indices, ids, requires):
        return None
    attention, stream, logits = record.rows(indices, encoded, requires)
    return _Rows(attention, None, stream, logits, [], [])
