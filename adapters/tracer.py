"""Trace answers: one recorded teacher-forced pass, then the contrast passes and relevancy.

Where generation recorded all that a trace needs (``tracing.answer_recorder``), there is no pass; where it returned the
KV caches of the prompts, the traced pass begins with their last token. With relevancy it
has a graph, and stands behind a pass over the prompts that has one too (``relevancy.shared_passes``); before generation
``prefill.Prefill`` runs this, so that answers go on from its caches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stethoscope.adapters.forward import ForwardPass, ForwardRunner, groups
from stethoscope.adapters.prefill import SMALL_MAPS, Prefill, attention_bytes
from stethoscope.adapters.prompt_caches import BlankPrefixCache, HiddenImageStates, blank_key
from stethoscope.core.errors import CapabilityError, CaptureError
from stethoscope.core.types import Answer
from stethoscope.features import FEATURES
from stethoscope.relevancy import Relevancy, relevancies_from_passes, relevancy_from_inputs
from stethoscope.relevancy.shared_passes import AnswerPass, PrefixCache, PromptPass
from stethoscope.tracing.answer_recorder import RecordedRows
from stethoscope.tracing.attention_recorder import (
    HeadAttentionRecorder,
    ImageSimilarityRecorder,
    RowAttentionRecorder,
)
from stethoscope.tracing.hooks import record, selected
from stethoscope.tracing.interventions import Knockout, core, noised
from stethoscope.tracing.logit_lens import Lens
from stethoscope.tracing.model_parts import listed_modules
from stethoscope.tracing.state_recorder import HiddenStateRecorder
from stethoscope.tracing.trace import (
    CONTINUED_TOKENS,
    DECODED_REQUIREMENTS,
    PROMPT_REQUIREMENTS,
    STREAM_REQUIREMENTS,
    Encoded,
    PromptCache,
    Trace,
    probe_layers,
)

_TOGETHER_BYTES, _TOGETHER_ROWS = 2**25, 64  # of KV caches of one pass, and of rows that are only padding
# Idefics3 and SmolVLM treat tiles of exact zeros as padding and drop them
_BLANK_VALUES = dict.fromkeys(("idefics2", "idefics3", "smolvlm"), 1e-6)


class _Continuation(NamedTuple):
    """A contrast of one answer whose pass goes on from a KV cache.

    Attributes:
        name: of its logits.
        prompt: index of the prompt, and of its answer.
        cache: of the prompt.
        tail: number of prompt tokens that run again.
        hidden: positions that nothing in the pass attends to.
        length: number of tokens that run.
    """

    name: str
    prompt: int
    cache: PromptCache
    tail: int
    hidden: Sequence[int]
    length: int


class _Rows(NamedTuple):
    """The rows of B answers, from a pass over them.

    Attributes:
        attention: recorder of their maps, if required.
        states: recorder of hidden states, if required.
        stream: residual stream (B, T or T + 1, D) after each layer, if required.
        logits: (B, T, V).
        relevancies: of the answers, if they share a pass with a graph.
    """

    attention: RowAttentionRecorder | None
    states: HiddenStateRecorder | None
    stream: list[Tensor]
    logits: Tensor
    relevancies: list[Relevancy]


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

    def __init__(
        self, name: str, forward: ForwardRunner, suffix: Sequence[int] = (), never: Sequence[int] = ()
    ) -> None:
        self._suffix, self._never = list(suffix), list(never)
        self._name, self._forward, self._model = name, forward, forward.model
        self._blank_value = _BLANK_VALUES.get(self._model.config.model_type, 0.0)
        self._lens: Lens | None = None
        self._blanks, self._hidden_images = BlankPrefixCache(), HiddenImageStates()
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
        recorded = None if shares else _recorded_rows(encoded, ids, requires)
        if recorded is None:
            attention, states, stream, logits, relevancies = self._run(encoded, ids, requires, shares)
        else:
            (attention, stream, logits), states, relevancies = recorded, None, []
        hidden = [layer[:, : logits.shape[1]] for layer in stream]  # without the row that consumes the last token
        if logits.isnan().any():
            raise CaptureError(f"{self._name}: the logits hold values that are not numbers")
        by_token: dict[str, Any] = {"logits": logits.cpu(), **self._decoded(hidden, logits, ids, requires)}
        if attention is not None and "attention" in requires:
            by_token |= {"mass": attention.mass(), "image_attention": attention.image()}
        if attention is not None:
            by_token |= {"peaks": attention.peaks()} if "peaks" in requires else {}
            by_token |= {"own": attention.own()} if "own" in requires else {}
        core_tokens = None
        if attention is not None and "core" in requires:
            triples = zip(attention.image(), answers, encoded, strict=True)
            core_tokens = [core(image[: len(answer.token_ids)], prompt.spans) for image, answer, prompt in triples]
        if "layer_states" in requires:
            by_token["layer_states"] = self._layer_states(hidden)
        by_token |= self._contrasts(encoded, ids, requires, core_tokens)
        if "no_image_states" in requires:
            by_token["no_image_states"] = self._no_image_states(encoded, ids)
        if "continuation" in requires:
            by_token["imagining"] = self._imagining(encoded, ids)
        width = hidden[-1].shape[-1] if "evidence" in requires else None
        whole: dict[str, Any] = {}  # parts that are not cut to the length of the answer
        if "hidden" in requires:
            probed = self._find_lens().probed(stream)
            whole["hidden"] = [states[: len(answer) + 1] for states, answer in zip(probed, ids, strict=True)]
        if isinstance(attention, HeadAttentionRecorder):
            whole["heads"] = attention.heads()
        if states is not None:
            whole |= {"states": states.states()} if "states" in requires else {}
            whole |= {"image_lens": states.image_lens()} if "image_lens" in requires else {}
        if relevancies:
            pairs = zip(relevancies, encoded, strict=True)
            whole["relevancy"] = [replace(part, question_positions=prompt.spans.question) for part, prompt in pairs]
        return [
            Trace(
                answer,
                prompt.spans,
                **{name: part[index][: len(answer.token_ids)] for name, part in by_token.items()},
                **{name: part[index] for name, part in whole.items()},
                width=width,
            )
            for index, (prompt, answer) in enumerate(zip(encoded, answers, strict=True))
        ]

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
        attention, states = (
            self._attention_recorder(forward, ids, requires),
            self._state_recorder(forward, ids, requires, graph),
        )
        answer_pass: AnswerPass | None = None
        with ExitStack() as stack:
            if graph is not None:
                answer_pass = AnswerPass(graph, attention)
                stack.enter_context(answer_pass.recorded())
            elif attention is not None:
                stack.enter_context(record(self._model, attention))
            if states is not None:
                stack.enter_context(states.listen())
            reads = not requires.isdisjoint(STREAM_REQUIREMENTS)
            stream = stack.enter_context(self._find_lens().listen(forward.rows)) if reads else []
            logits = self._forward.logits(forward, rows)
        relevancies = [] if answer_pass is None else relevancies_from_passes(answer_pass, logits, ids)
        return _Rows(attention, states, stream, logits.detach(), relevancies)

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
        valid = (torch.arange(logits.shape[1]) < torch.tensor(counts)[:, None]).to(logits.device)
        hidden, logits = [layer[valid.to(layer.device)] for layer in hidden], logits[valid]
        lens, decoded = self._find_lens(), dict[str, Tensor]()
        if not requires.isdisjoint(DECODED_REQUIREMENTS):
            decoded |= lens.read(hidden, logits, tokens, requires)
        if "evidence" in requires:
            decoded["evidence"] = lens.evidence(hidden[-1])
        return {name: part.split(counts) for name, part in decoded.items()}

    # --- the same answers with another image, or with less of it ----------------------------------------------------

    def _contrasts(
        self,
        encoded: Sequence[Encoded],
        ids: Sequence[Sequence[int]],
        requires: frozenset[str],
        core_tokens: Sequence[Sequence[int]] | None,
    ) -> dict[str, Sequence[Tensor]]:
        """Return B (T, V) logits by name, maybe with padding; ``core_tokens`` are those that answers attend to most."""
        hidden: dict[str, Sequence[Sequence[int]]] = {}
        if "no_image" in requires:
            hidden["no_image_logits"] = [prompt.spans.image for prompt in encoded]
        if core_tokens is not None:
            hidden["core_logits"] = core_tokens
        # noise is drawn for one prompt at a time, so that it does not depend on the batch
        changed = [
            Encoded({**prompt.inputs, "pixel_values": noised(prompt.inputs["pixel_values"])}, prompt.spans, "", "")
            for prompt in (encoded if "noise" in requires else ())
        ]
        continued = self._continuations(encoded, ids, changed, hidden, "blank" in requires)
        contrasts: dict[str, Any] = {item.name: [None] * len(encoded) for item in continued}
        for group in _together(continued):
            names, indices, caches, tails, positions, _ = zip(*group, strict=True)
            prompts, answers = [encoded[index] for index in indices], [ids[index] for index in indices]
            forward = self._forward.continue_from_cache(prompts, answers, caches, tails, hidden=positions)
            for name, index, logits in zip(names, indices, self._forward.logits(forward).cpu(), strict=True):
                contrasts[name][index] = logits
        if changed and "noise_logits" not in contrasts:
            contrasts["noise_logits"] = self._forward.logits(self._forward.full_forward(changed, ids)).cpu()
        for name in hidden.keys() - contrasts.keys():
            contrasts[name] = self._without(encoded, ids, hidden[name]).cpu()
        if "blank" in requires and "blank_logits" not in contrasts:
            contrasts["blank_logits"] = self._forward.logits(self._blank_forward(encoded, ids)).cpu()
        return contrasts

    def _continuations(
        self,
        encoded: Sequence[Encoded],
        ids: Sequence[Sequence[int]],
        noise: Sequence[Encoded],
        hidden: Mapping[str, Sequence[Sequence[int]]],
        blank: bool,
    ) -> list[_Continuation]:
        """List the contrasts that go on from KV caches of all prompts.

        Args:
            encoded: the prompts.
            ids: of the answers.
            noise: the same prompts with noised images, if these are asked for.
            hidden: by name of the logits and by prompt, image tokens that nothing behind the image attends to.
            blank: whether a blank image is asked for.
        """
        if not self._forward.causal or not all(map(_has_text_last, encoded)):
            return []
        contrasts: list[tuple[str, Sequence[PromptCache], Sequence[int], Sequence[Sequence[int]]]] = []
        last, nothing = [1] * len(encoded), [()] * len(encoded)
        if noise:
            contrasts.append(("noise_logits", self._forward.read_prompts(noise), last, nothing))
        caches = self._blank_caches(encoded) if blank else None
        if caches is not None:
            contrasts.append(("blank_logits", caches, last, nothing))
        own = [prompt.cache for prompt in encoded if prompt.cache is not None]
        if len(own) == len(encoded) and all(map(_has_whole_image, encoded)):
            tails = [prompt.spans.length - 1 - prompt.spans.image[-1] for prompt in encoded]
            contrasts += [(name, own, tails, positions) for name, positions in hidden.items()]
        return [
            _Continuation(name, index, cache, tail, positions, tail + len(ids[index]))
            for name, *parts in contrasts
            for index, (cache, tail, positions) in enumerate(zip(*parts, strict=True))
        ]

    def _without(
        self, encoded: Sequence[Encoded], ids: Sequence[Sequence[int]], hidden: Sequence[Sequence[int]]
    ) -> Tensor:
        """Return (B, T, V) logits when nothing behind the image may attend to the ``hidden`` positions."""
        forward = self._forward.full_forward(encoded, ids)
        encodes = self._forward.decoder_start is not None
        with record(self._model, Knockout(hidden, forward.spans, forward.length, encodes)):
            return self._forward.logits(forward)

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
            prefix = None if graph is None else PrefixCache(graph.layers)
            return self._forward.continue_from_cache(encoded, ids, caches, consuming=consuming, prefix=prefix)
        return self._forward.full_forward(encoded, ids, consuming)

    def _layer_states(self, hidden: Sequence[Tensor]) -> Tensor:
        """Return (B, T, K, D) states after the layers of ``probe_layers``, of those after all L layers."""
        return torch.stack([hidden[layer - 1].float().cpu() for layer in probe_layers(len(hidden))], 2)

    def _no_image_states(self, encoded: Sequence[Encoded], ids: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return by prompt (T, K, D) states while the image is hidden, which no pixel changes."""
        self._hidden_images.check(self._model)
        keys = [(blank_key(prompt), tuple(answer)) for prompt, answer in zip(encoded, ids, strict=True)]
        states = {key: stored for key in keys if (stored := self._hidden_images.get(key)) is not None}
        missing = {
            key: (replace(prompt, cache=None), answer)
            for key, prompt, answer in zip(keys, encoded, ids, strict=True)
            if key not in states
        }
        if missing:
            prompts, answers = zip(*missing.values(), strict=True)
            rows = self._forward.full_forward(prompts, answers).rows
            with self._find_lens().listen(rows) as hidden:
                self._without(prompts, answers, [prompt.spans.image for prompt in prompts])
            for key, part in zip(missing, self._layer_states(hidden), strict=True):
                states[key] = part
                self._hidden_images.put(key, part)
        return [states[key] for key in keys]

    def _blank_forward(self, encoded: Sequence[Encoded], ids: Sequence[Sequence[int]]) -> ForwardPass:
        """Prepare a pass over whole prompts with blank images, and answers."""
        forward = self._forward.full_forward(encoded, ids)
        forward.inputs["pixel_values"] = torch.full_like(forward.inputs["pixel_values"], self._blank_value)
        return forward

    def _blank_caches(self, encoded: Sequence[Encoded]) -> list[PromptCache] | None:
        """Return the KV cache of every prompt with a blank image; None where they cannot be used again."""
        self._blanks.check(self._model)
        keys = [blank_key(prompt) for prompt in encoded]
        caches = {key: cache for key in keys if (cache := self._blanks.get(key)) is not None}
        missing = {key: prompt for key, prompt in zip(keys, encoded, strict=True) if key not in caches}
        if missing:
            prompts = list(missing.values())
            inputs = self._forward.collate(prompts, "right")
            inputs["pixel_values"] = torch.full_like(inputs["pixel_values"], self._blank_value)
            last = self._forward.positions_to_keep([inputs["input_ids"].shape[1] - 1])
            output = self._model(**inputs, **last, use_cache=True).past_key_values
            columns = [[slice(0, prompt.spans.length)] for prompt in prompts]
            computed = self._forward.prompt_caches(output, prompts, columns)
            usable = [cache for cache in computed if cache is not None]
            if len(usable) < len(computed):
                return None
            for key, cache in zip(missing, usable, strict=True):
                self._blanks.put(key, cache)
                caches[key] = cache
        return [caches[key] for key in keys]

    # --- relevancy --------------------------------------------------------------------------------------------------

    def _relevancy(self, encoded: Encoded, answer: Answer) -> Relevancy:
        """Compute the relevancy of an answer by itself."""
        recompute = attention_bytes(self._model, encoded.spans.length + len(answer.token_ids)) > SMALL_MAPS
        inputs = self._forward.extended(encoded, answer.token_ids)
        relevancy = relevancy_from_inputs(self._model, inputs, answer.token_ids, recompute=recompute)
        return replace(relevancy, question_positions=encoded.spans.question)


def _recorded_rows(
    encoded: Sequence[Encoded], ids: Sequence[Sequence[int]], requires: frozenset[str]
) -> RecordedRows | None:
    """Return the rows that were recorded while the answers were generated; None where a pass is needed."""
    parts = [prompt.recorded for prompt in encoded if prompt.recorded is not None]
    if len(parts) < len(encoded) or any(record is not parts[0][0] for record, _ in parts):
        return None
    record, indices = parts[0][0], [index for _, index in parts]
    return record.rows(indices, encoded, requires) if record.covers(indices, ids, requires) else None


def _together(continued: Sequence[_Continuation]) -> Iterator[list[_Continuation]]:
    """Yield what shares a pass: sequences of about the same length, with small caches or as many as the prompts."""
    group: list[_Continuation] = []
    total = 0  # bytes of the group's caches
    prompts = len({item.prompt for item in continued})
    for item in sorted(continued, key=lambda item: item.length):
        nbytes = item.cache.nbytes
        padding = sum(item.length - other.length for other in group)
        if group and (padding > _TOGETHER_ROWS or (total + nbytes > _TOGETHER_BYTES and len(group) >= prompts)):
            yield group
            group, total = [], 0
        group.append(item)
        total += nbytes
    if group:
        yield group


def _has_text_last(prompt: Encoded) -> bool:
    """Whether the last token is none of the image's, so that it can run again without pixels."""
    return prompt.spans.image[-1] < prompt.spans.length - 1


def _has_whole_image(prompt: Encoded) -> bool:
    """Whether no other tokens are between those of the image."""
    return prompt.spans.image[-1] - prompt.spans.image[0] + 1 == len(prompt.spans.image)
