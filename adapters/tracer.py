"""The traced pass of ``HfAdapter``: one teacher-forced forward for all that it can leave behind, then contrasts.

Where ``generate_and_keep`` has left the keys and values of the prompts, this pass begins with their last token.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stethoscope.adapters.fingerprint import hooks, tensors_of, versions
from stethoscope.adapters.forward import CAUSAL, Pass, answer_rows, collate, extend, pass_behind, prompt_caches
from stethoscope.core.cache import LRUCache
from stethoscope.core.errors import CapabilityError, CaptureError
from stethoscope.core.types import Answer
from stethoscope.features import FEATURES
from stethoscope.relevancy import Relevancy, answer_relevancy, relevancies_from_inputs
from stethoscope.tracing.attention_recorder import AttentionRows, HeadRows, logits_to_keep
from stethoscope.tracing.hooks import record, selected
from stethoscope.tracing.interventions import Knockout, core, noised
from stethoscope.tracing.logit_lens import Lens
from stethoscope.tracing.state_recorder import StateRows
from stethoscope.tracing.trace import Encoded, PromptCache, Trace

if TYPE_CHECKING:
    from collections.abc import Hashable

    from transformers import PreTrainedModel

_SMALL_MAPS = 2**24  # bytes that the attention maps of an answer may take, to be kept for the backward pass
_OF_PROMPTS = frozenset({"states", "image_lens"})
"""What reads the rows of the prompt, in one stream with those of the answer."""


class Blanks:
    """Keys and values of prompts with a blank picture, which all pictures of one size share that are asked the same.

    They are forgotten when the model's weights or hooks are others, or weights have been changed in place (but not
    through ``.data``, of which a tensor keeps no count).
    """

    def __init__(self) -> None:
        self._kept = LRUCache(_BLANK_BYTES, _bytes)
        self._model: tuple[Any, ...] | None = None

    def check(self, model: PreTrainedModel) -> None:
        """Forgets what other weights or hooks have computed, and all where changes of weights cannot be told."""
        changes = versions(model)
        now = changes and (changes, [tensor.data_ptr() for tensor in tensors_of(model)], hooks(model))
        if now is None or now != self._model:
            self._kept, self._model = LRUCache(_BLANK_BYTES, _bytes), now

    def get(self, encoded: Encoded) -> PromptCache | None:
        """Of a prompt, if it is known."""
        return self._kept.get(_key(encoded))

    def put(self, encoded: Encoded, cache: PromptCache) -> None:
        """Keeps a prompt, by itself without the batch that it was computed in."""
        if _bytes(cache) <= _BLANK_BYTES:
            own = tuple((keys.clone(), values.clone()) for keys, values in cache.layers)
            self._kept.put(_key(encoded), PromptCache(own))


class Contrasts:
    """Passes over answers and what is compared with a trace. A part of ``HfAdapter``."""

    @property
    def _causal(self) -> bool:
        """Whether answers can be read behind the keys and values of their prompts."""
        return self._model.config.model_type in CAUSAL

    def _contrasts(
        self,
        encoded: Sequence[Encoded],
        ids: Sequence[Sequence[int]],
        needs: frozenset[str],
        core: Sequence[Sequence[int]] | None,
    ) -> dict[str, Tensor]:
        """Logits (B, T, V) by name; one pass each. ``core`` are the image tokens that answers attend to most."""
        found = {}
        if "noise" in needs:  # noise is drawn for one prompt at a time, so that it does not depend on the batch
            changed = [
                Encoded({**one.inputs, "pixel_values": noised(one.inputs["pixel_values"])}, one.spans, "", "")
                for one in encoded
            ]
            found["noise_logits"] = self._logits(self._whole(changed, ids)).cpu()
        if "no_image" in needs:
            found["no_image_logits"] = self._without(encoded, ids, [one.spans.image for one in encoded]).cpu()
        if core is not None:
            found["core_logits"] = self._without(encoded, ids, core).cpu()
        if "blank" in needs:
            found["blank_logits"] = self._logits(self._blank(encoded, ids)).cpu()
        return found

    def _without(
        self, encoded: Sequence[Encoded], ids: Sequence[Sequence[int]], hidden: Sequence[Sequence[int]]
    ) -> Tensor:
        """Logits (B, T, V) when nothing behind the image may attend to some positions of it."""
        run = self._behind_images(encoded, ids) or self._whole(encoded, ids)
        hidden = [[at + first for at in some] for some, first in zip(hidden, run.firsts, strict=True)]
        knockout = Knockout(hidden, run.spans, run.length, self._start is not None, run.queries)
        with record(self._model, knockout):
            return self._logits(run)

    def _behind_images(self, encoded: Sequence[Encoded], ids: Sequence[Sequence[int]]) -> Pass | None:
        """A pass that begins behind the images, whose own rows no contrast of attention changes.

        None where the prompts are not known, or have other tokens between those of the image.
        """
        spans = [one.spans for one in encoded]
        whole = all(span.image[-1] - span.image[0] + 1 == len(span.image) for span in spans)
        if not whole or not all(one.cache for one in encoded):
            return None
        tails = [span.length - 1 - span.image[-1] for span in spans]
        return self._behind(encoded, ids, [one.cache for one in encoded], tails)

    def _blank(self, encoded: Sequence[Encoded], ids: Sequence[Sequence[int]]) -> Pass:
        """A pass over answers to blank pictures."""
        caches = self._blank_caches(encoded) if self._causal else None
        if caches is not None:
            return self._behind(encoded, ids, caches)
        run = self._whole(encoded, ids)
        run.inputs["pixel_values"] = torch.full_like(run.inputs["pixel_values"], self._blank_value)
        return run

    def _blank_caches(self, encoded: Sequence[Encoded]) -> list[PromptCache] | None:
        """Of every prompt with a blank picture; None where its keys and values cannot be used again."""
        self._blanks.check(self._model)
        known = {_key(one): (one, self._blanks.get(one)) for one in encoded}
        missing = [one for one, cache in known.values() if cache is None]
        if missing:
            inputs = self._to_device(collate([one.inputs for one in missing], self._pad, "right"))
            inputs["pixel_values"] = torch.full_like(inputs["pixel_values"], self._blank_value)
            last = inputs["input_ids"].shape[1] - 1
            cache = self._model(**inputs, **logits_to_keep(self._model, [last]), use_cache=True).past_key_values
            found = self._prompt_caches(cache, missing, [one.spans.length for one in missing])
            if None in found:
                return None
            for one, cache in zip(missing, found, strict=True):
                self._blanks.put(one, cache)
                known[_key(one)] = one, cache
        return [known[_key(one)][1] for one in encoded]

    # --- passes -----------------------------------------------------------------------------------------------------

    def _whole(self, encoded: Sequence[Encoded], answers: Sequence[Sequence[int]], consuming: bool = False) -> Pass:
        """A pass over prompts and answers; its rows predict the answer tokens.

        The last token of an answer predicts nothing of it and is left out, unless ``consuming`` wants its row too:
        row k + 1 is the one that consumes token k.
        """
        model_type = self._model.config.model_type
        read = [ids if consuming else ids[:-1] for ids in answers]
        parts = [extend(one.inputs, ids, model_type, self._start) for one, ids in zip(encoded, read, strict=True)]
        inputs = self._to_device(collate(parts, self._pad, "right"))
        spans = [one.spans for one in encoded]
        starts = [span.length - 1 if self._start is None else 0 for span in spans]
        rows = answer_rows(starts, [len(ids) for ids in read])
        return Pass(inputs, rows, spans, [0] * len(spans), inputs["input_ids"].shape[1])

    def _behind(
        self,
        encoded: Sequence[Encoded],
        answers: Sequence[Sequence[int]],
        caches: Sequence[PromptCache],
        tails: Sequence[int] | None = None,
        consuming: bool = False,
    ) -> Pass:
        """The same behind prompts that are known but for their last tokens, by default the very last."""
        read = [ids if consuming else ids[:-1] for ids in answers]
        run = pass_behind(encoded, caches, read, tails or [1] * len(encoded), self._pad)
        tensors = {name: value for name, value in run.inputs.items() if isinstance(value, Tensor)}
        run.inputs.update(self._to_device(tensors))
        return run

    def _prompt_caches(self, cache: Any, encoded: Sequence[Encoded], ends: Sequence[int]) -> list[PromptCache | None]:
        """Of every prompt what can be used again of a cache, in which their last tokens stand before ``ends``."""
        if not self._causal:
            return [None] * len(encoded)
        found = prompt_caches(cache, [one.spans.length for one in encoded], ends)
        # a prompt's last token runs again, and without the picture that of an image would be read as a word
        last = [one.spans.image[-1] == one.spans.length - 1 for one in encoded]
        return [None if image else one for one, image in zip(found, last, strict=True)]

    def _logits(self, run: Pass, rows: Tensor | None = None) -> Tensor:
        """(B, T, V) float32 logits of the rows, by default all of the pass; the head runs on no more than it must."""
        rows = run.rows if rows is None else rows
        positions = rows.unique()
        options = logits_to_keep(self._model, positions.tolist())
        logits = self._model(**run.inputs, **options, use_cache="past_key_values" in run.inputs).logits
        at = torch.searchsorted(positions, rows) if options else rows
        return logits[torch.arange(len(rows))[:, None].to(logits.device), at.to(logits.device)].float()


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


_BLANK_BYTES = 64 * 2**20
"""Enough for the questions of a benchmark and a small model; of a large one hardly a prompt fits, and none is kept."""


def _key(encoded: Encoded) -> Hashable:
    """All that a prompt with a blank picture depends on."""
    return tuple(
        (name, tuple(value.shape), b"" if name == "pixel_values" else value.contiguous().cpu().numpy().tobytes())
        for name, value in sorted(encoded.inputs.items())
    )


def _bytes(cache: PromptCache) -> int:
    return sum(part.nbytes for layer in cache.layers for part in layer)
