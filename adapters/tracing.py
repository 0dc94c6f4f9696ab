"""The traced pass of ``HfAdapter``: one teacher-forced forward for all that it can leave behind, then contrasts.

Where ``generate_and_keep`` has left the keys and values of the prompts, this pass begins with their last token.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stethoscope.adapters.contrasts import Contrasts
from stethoscope.adapters.passes import Pass
from stethoscope.core.errors import CapabilityError, CaptureError
from stethoscope.core.types import Answer
from stethoscope.features import FEATURES
from stethoscope.relevancy import Relevancy, answer_relevancy, relevancies_from_inputs
from stethoscope.trace import Encoded, Trace
from stethoscope.tracing.capture import record, selected
from stethoscope.tracing.knockout import core
from stethoscope.tracing.lens import Lens
from stethoscope.tracing.rows import AttentionRows, HeadRows
from stethoscope.tracing.states import StateRows

_SMALL_MAPS = 2**24  # bytes that the attention maps of an answer may take, to be kept for the backward pass
_OF_PROMPTS = frozenset({"states", "image_lens"})
"""What reads the rows of the prompt, in one stream with those of the answer."""


class Tracing(Contrasts):
    """What ``HfAdapter.trace_batch`` does with prompts whose inputs make one batch. A part of that class."""

    def _trace(self, encoded: list[Encoded], answers: list[Answer], needs: frozenset[str]) -> list[Trace]:
        self._check_needs(needs)
        ids, caches = [answer.token_ids for answer in answers], [one.cache for one in encoded]
        consuming = not needs.isdisjoint({"heads", "states"})
        if all(caches) and needs.isdisjoint(_OF_PROMPTS):
            run = self._behind(encoded, ids, caches, consuming=consuming)
        else:
            run = self._whole(encoded, ids, consuming)
        rows = run.rows[:, :-1].contiguous() if consuming and run.rows.shape[1] > 1 else run.rows
        listener, states = self._listener(run, ids, needs), self._states(run, ids, needs)
        with ExitStack() as stack:
            if listener is not None:
                stack.enter_context(record(self._model, listener))
            if states is not None:
                stack.enter_context(states.listen())
            decodes = not needs.isdisjoint({"lens", "trajectory"})
            heard = stack.enter_context(self._find_lens().listen(rows)) if decodes else []
            logits = self._logits(run, rows)
        if logits.isnan().any():
            raise CaptureError(f"{self.name}: the logits hold values that are not numbers")
        parts: dict[str, Any] = {"logits": logits.cpu(), **self._decoded(heard, logits, ids, needs)}
        if "attention" in needs:
            parts |= {"mass": listener.mass(), "image_attention": listener.image()}
        chosen = None
        if "core" in needs:
            pairs = zip(listener.image(), answers, encoded, strict=True)
            chosen = [core(image[: len(answer.token_ids)], one.spans) for image, answer, one in pairs]
        parts |= self._contrasts(encoded, ids, needs, chosen)
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
        missing = needs & _OF_PROMPTS
        if self._start is None or not missing:
            return
        lacking = [item for item in FEATURES.values() if item.needs & missing]
        groups = ",".join(dict.fromkeys(item.group for item in lacking))
        raise CapabilityError(
            f"{self.name} reads the image in an encoder, so hidden states of image and answer tokens are not of one "
            f"kind; add features.without=[{groups}], which are {', '.join(item.name for item in lacking)}"
        )

    def _listener(self, run: Pass, ids: Sequence[Sequence[int]], needs: frozenset[str]) -> AttentionRows | None:
        decoder = None if self._start is None else run.inputs["decoder_input_ids"].shape[1]
        where = (run.spans, run.length, decoder, run.firsts)
        if "heads" in needs:
            return HeadRows(run.rows, [len(one) for one in ids], *where)
        return None if needs.isdisjoint({"attention", "core"}) else AttentionRows(run.rows, *where)

    def _states(self, run: Pass, ids: Sequence[Sequence[int]], needs: frozenset[str]) -> StateRows | None:
        if needs.isdisjoint(_OF_PROMPTS):
            return None
        return StateRows(self._find_lens(), run.rows, ids, run.spans, "states" in needs, "image_lens" in needs)

    def _find_lens(self) -> Lens:
        if self._lens is None:
            self._lens = Lens(self._model)
        return self._lens

    def _decoded(
        self, heard: list[Tensor], logits: Tensor, ids: Sequence[Sequence[int]], needs: frozenset[str]
    ) -> dict[str, Sequence[Tensor]]:
        """What the logit lens says, by sample; rows of padding are not decoded."""
        found = {}
        if not heard:
            return found
        counts = [len(one) for one in ids]
        tokens = torch.tensor([token for one in ids for token in one], dtype=torch.long)
        there = (torch.arange(logits.shape[1]) < torch.tensor(counts)[:, None]).to(logits.device)
        heard, logits = [hidden[there.to(hidden.device)] for hidden in heard], logits[there]
        if "lens" in needs:
            found["lens_logprob"], found["lens_rank"] = self._find_lens().read(heard, logits, tokens)
        if "trajectory" in needs:
            found["trajectory"] = self._find_lens().divergence(heard, logits)
        return {name: part.split(counts) for name, part in found.items()}

    def _relevancies(self, encoded: Sequence[Encoded], answers: Sequence[Answer]) -> list[Relevancy]:
        """Relevancy of every answer; small models take several together, where their prompts are alike."""
        found: dict[int, Relevancy] = {}
        with selected(self._model):
            for some in self._alike(encoded, answers):
                if len(some) == 1:
                    one, answer = encoded[some[0]], answers[some[0]]
                    recompute = self._maps([one], [answer]) > _SMALL_MAPS
                    found[some[0]] = answer_relevancy(self, one, answer, recompute=recompute)
                    continue
                ids = [answers[index].token_ids for index in some]
                run = self._whole([encoded[index] for index in some], ids, consuming=True)
                together = relevancies_from_inputs(self._model, run.inputs, ids, recompute=False)
                for index, one in zip(some, together, strict=True):
                    found[index] = replace(one, question_at=encoded[index].spans.question)
        return [found[index] for index in range(len(encoded))]

    def _alike(self, encoded: Sequence[Encoded], answers: Sequence[Answer]) -> Iterator[list[int]]:
        """Indices of answers whose relevancy is computed together."""
        alike: dict[Hashable, list[int]] = {}
        for index, one in enumerate(encoded):
            pixels = one.inputs["pixel_values"].shape
            single = not self._causal or len(pixels) != 4 or pixels[0] != 1
            alike.setdefault(index if single else (one.spans.length, one.spans.image, pixels), []).append(index)
        for some in alike.values():
            largest = self._maps([encoded[index] for index in some], [answers[index] for index in some]) / len(some)
            size = max(1, int(_SMALL_MAPS // largest))
            yield from (some[start : start + size] for start in range(0, len(some), size))

    def _maps(self, encoded: Sequence[Encoded], answers: Sequence[Answer]) -> int:
        """Bytes of the language model's attention maps over prompts and answers, padded to the longest."""
        text = self._model.config.get_text_config()
        length = max(one.spans.length + len(answer.token_ids) for one, answer in zip(encoded, answers, strict=True))
        heads = text.num_hidden_layers * text.num_attention_heads
        return len(encoded) * heads * length**2 * self._model.dtype.itemsize
