"""The traced pass of ``HfAdapter``: one teacher-forced forward for all that it can leave behind, then contrasts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from stethoscope.adapters.batching import collate, extend
from stethoscope.errors import CapabilityError, CaptureError
from stethoscope.features import FEATURES
from stethoscope.records import Answer
from stethoscope.relevancy import Relevancy, answer_relevancy
from stethoscope.trace import Encoded, Trace
from stethoscope.tracing.capture import record, selected
from stethoscope.tracing.knockout import Knockout, core
from stethoscope.tracing.lens import Lens
from stethoscope.tracing.noise import noised
from stethoscope.tracing.rows import AttentionRows, HeadRows
from stethoscope.tracing.states import StateRows

_SMALL_MAPS = 2**24  # bytes that the attention maps of an answer may take, to be kept for the backward pass
_IN_ONE_STREAM = frozenset({"states", "image_lens"})


class Tracing:
    """What ``HfAdapter.trace_batch`` does with prompts whose inputs make one batch. A part of that class."""

    def _trace(self, encoded: list[Encoded], answers: list[Answer], needs: frozenset[str]) -> list[Trace]:
        self._check_needs(needs)
        ids, spans = [answer.token_ids for answer in answers], [one.spans for one in encoded]
        consuming = not needs.isdisjoint({"heads", "states"})
        inputs, every = self._teacher_forced(encoded, ids, consuming)
        rows = every[:, :-1].contiguous() if consuming and every.shape[1] > 1 else every
        listener = self._listener(inputs, every, encoded, ids, needs)
        states = self._states(every, ids, spans, needs)
        with ExitStack() as stack:
            if listener is not None:
                stack.enter_context(record(self._model, listener))
            if states is not None:
                stack.enter_context(states.listen())
            decodes = not needs.isdisjoint({"lens", "trajectory"})
            heard = stack.enter_context(self._find_lens().listen(rows)) if decodes else []
            logits = self._logits(inputs, rows)
        if logits.isnan().any():
            raise CaptureError(f"{self.name}: the logits hold values that are not numbers")
        parts: dict[str, Any] = {"logits": logits.cpu(), **self._decoded(heard, logits, ids, rows, needs)}
        if "attention" in needs:
            parts |= {"mass": listener.mass(), "image_attention": listener.image()}
        parts |= self._contrasts(encoded, answers, inputs, rows, needs, listener)
        whole: dict[str, Any] = {}  # parts that are not cut to the length of the answer
        if "heads" in needs:
            whole["heads"] = listener.heads()
        if states is not None:
            whole |= {"states": states.states()} if "states" in needs else {}
            whole |= {"image_lens": states.image_lens()} if "image_lens" in needs else {}
        return [
            Trace(
                answer,
                one.spans,
                **{name: part[index][: len(answer.token_ids)] for name, part in parts.items()},
                **{name: part[index] for name, part in whole.items()},
            )
            for index, (one, answer) in enumerate(zip(encoded, answers, strict=True))
        ]

    def _check_needs(self, needs: frozenset[str]) -> None:
        missing = needs & _IN_ONE_STREAM
        if self._start is None or not missing:
            return
        lacking = [item for item in FEATURES.values() if item.needs & missing]
        groups = ",".join(dict.fromkeys(item.group for item in lacking))
        raise CapabilityError(
            f"{self.name} reads the image in an encoder, so hidden states of image and answer tokens are not of one "
            f"kind; add features.without=[{groups}], which are {', '.join(item.name for item in lacking)}"
        )

    def _listener(
        self,
        inputs: dict[str, Tensor],
        rows: Tensor,
        encoded: Sequence[Encoded],
        ids: Sequence[Sequence[int]],
        needs: frozenset[str],
    ) -> AttentionRows | None:
        decoder = None if self._start is None else inputs["decoder_input_ids"].shape[1]
        spans, length = [one.spans for one in encoded], inputs["input_ids"].shape[1]
        if "heads" in needs:
            return HeadRows(rows, [len(one) for one in ids], spans, length, decoder)
        return None if needs.isdisjoint({"attention", "core"}) else AttentionRows(rows, spans, length, decoder)

    def _states(
        self, rows: Tensor, ids: Sequence[Sequence[int]], spans: Sequence[Any], needs: frozenset[str]
    ) -> StateRows | None:
        if needs.isdisjoint(_IN_ONE_STREAM):
            return None
        return StateRows(self._find_lens(), rows, ids, spans, "states" in needs, "image_lens" in needs)

    def _find_lens(self) -> Lens:
        if self._lens is None:
            self._lens = Lens(self._model)
        return self._lens

    def _decoded(
        self,
        heard: list[Tensor],
        logits: Tensor,
        ids: Sequence[Sequence[int]],
        rows: Tensor,
        needs: frozenset[str],
    ) -> dict[str, Tensor]:
        """What the logit lens says."""
        found = {}
        if not heard:
            return found
        tokens = torch.zeros(rows.shape, dtype=torch.long)
        for index, one in enumerate(ids):
            tokens[index, : len(one)] = torch.tensor(one)
        if "lens" in needs:
            found["lens_logprob"], found["lens_rank"] = self._lens.read(heard, logits, tokens)
        if "trajectory" in needs:
            found["trajectory"] = self._lens.divergence(heard, logits)
        return found

    def _contrasts(
        self,
        encoded: Sequence[Encoded],
        answers: Sequence[Answer],
        inputs: dict[str, Tensor],
        rows: Tensor,
        needs: frozenset[str],
        listener: AttentionRows | None,
    ) -> dict[str, Tensor]:
        """The same rows with another picture, or with less of it; one pass each."""
        found, spans = {}, [one.spans for one in encoded]
        if "noise" in needs:  # noise is drawn for one prompt at a time, so that it does not depend on the batch
            changed = [
                Encoded({**one.inputs, "pixel_values": noised(one.inputs["pixel_values"])}, one.spans, "", "")
                for one in encoded
            ]
            others, again = self._teacher_forced(changed, [answer.token_ids for answer in answers])
            found["noise_logits"] = self._logits(others, again).cpu()
        hidden = {"no_image": [span.image for span in spans]} if "no_image" in needs else {}
        if "core" in needs:
            pairs = zip(listener.image(), answers, spans, strict=True)
            hidden["core"] = [core(image[: len(answer.token_ids)], span) for image, answer, span in pairs]
        for name, positions in hidden.items():
            knockout = Knockout(positions, spans, inputs["input_ids"].shape[1], self._start is not None)
            with record(self._model, knockout):
                found[f"{name}_logits"] = self._logits(inputs, rows).cpu()
        if "blank" in needs:
            inputs["pixel_values"] = torch.full_like(inputs["pixel_values"], self._blank)
            found["blank_logits"] = self._logits(inputs, rows).cpu()
        return found

    def _relevancies(self, encoded: Sequence[Encoded], answers: Sequence[Answer]) -> Iterator[Relevancy]:
        """Relevancy of every answer, each by passes of its own; layers run again only where their maps are large."""
        text = self._model.config.get_text_config()
        with selected(self._model):
            for one, answer in zip(encoded, answers, strict=True):
                length = one.spans.length + len(answer.token_ids)
                size = text.num_hidden_layers * text.num_attention_heads * length**2 * self._model.dtype.itemsize
                yield answer_relevancy(self, one, answer, recompute=size > _SMALL_MAPS)

    def _teacher_forced(
        self, encoded: Sequence[Encoded], answers: Sequence[Sequence[int]], consuming: bool = False
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs of a pass over prompts and answers, and the rows (B, T) that predict the answer tokens.

        The last token of an answer predicts nothing of it and is left out, unless ``consuming`` wants its row too
        (B, T + 1): row k + 1 is the one that consumes token k. Shorter answers repeat their last row.
        """
        model_type = self._model.config.model_type
        kept = [ids if consuming else ids[:-1] for ids in answers]
        parts = [extend(one.inputs, ids, model_type, self._start) for one, ids in zip(encoded, kept, strict=True)]
        steps = torch.arange(max([0, *map(len, kept)]) + 1)
        last = torch.tensor([[len(ids)] for ids in kept])
        starts = torch.tensor([[one.spans.length - 1 if self._start is None else 0] for one in encoded])
        return self._to_device(collate(parts, self._pad, "right")), starts + steps.minimum(last)

    def _logits(self, inputs: dict[str, Tensor], rows: Tensor) -> Tensor:
        """Rows (B, T, V) of the logits in float32; the head runs on no more positions than it must."""
        positions = rows.unique()
        options = {"logits_to_keep": positions.to(self._input_device())} if self._keeps else {}
        logits = self._model(**inputs, **options, use_cache=False).logits
        at = torch.searchsorted(positions, rows) if self._keeps else rows
        return logits[torch.arange(len(rows))[:, None].to(logits.device), at.to(logits.device)].float()
