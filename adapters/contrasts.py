"""The same answer with another picture, or with less of it: what contrasts compare a trace with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stethoscope.adapters.batching import collate, extend
from stethoscope.adapters.identity import hooks, tensors_of, versions
from stethoscope.adapters.passes import CAUSAL, Pass, answer_rows, pass_behind, prompt_caches
from stethoscope.core.cache import LRUCache
from stethoscope.trace import Encoded, PromptCache
from stethoscope.tracing.capture import record
from stethoscope.tracing.knockout import Knockout
from stethoscope.tracing.noise import noised
from stethoscope.tracing.rows import logits_to_keep

if TYPE_CHECKING:
    from collections.abc import Hashable

    from transformers import PreTrainedModel

_BLANK_BYTES = 64 * 2**20
"""Enough for the questions of a benchmark and a small model; of a large one hardly a prompt fits, and none is kept."""


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


def _key(encoded: Encoded) -> Hashable:
    """All that a prompt with a blank picture depends on."""
    return tuple(
        (name, tuple(value.shape), b"" if name == "pixel_values" else value.contiguous().cpu().numpy().tobytes())
        for name, value in sorted(encoded.inputs.items())
    )


def _bytes(cache: PromptCache) -> int:
    return sum(part.nbytes for layer in cache.layers for part in layer)
