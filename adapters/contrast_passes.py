"""Trace the same answers with another image, or with less of it: blank, noised, hidden, without its core tokens.

Passes go on from KV caches where they can, and what no pixel changes is stored for all images of one size
(``prompt_caches``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stethoscope.adapters.forward import ForwardRunner
from stethoscope.adapters.prompt_caches import PromptStore, key_without_pixels
from stethoscope.tracing.hooks import record
from stethoscope.tracing.interventions import Knockout, noised
from stethoscope.tracing.logit_lens import Lens
from stethoscope.tracing.trace import Encoded, PromptCache, probe_layers

CONTRASTS = frozenset({"no_image", "core", "noise", "blank"})
"""Requirements that ``ContrastPasses.logits`` meets."""
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


class ContrastPasses:
    """Run answers again with changed images.

    Args:
        forward: prepares and runs the passes of the model.
    """

    def __init__(self, forward: ForwardRunner) -> None:
        self._forward, self._model = forward, forward.model
        self._blank_value = _BLANK_VALUES.get(self._model.config.model_type, 0.0)
        self._blank_prefixes, self._hidden_image_states = PromptStore(), PromptStore()

    def logits(
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
            forward = self._forward.full_forward(encoded, ids)
            self._blank(forward.inputs)
            contrasts["blank_logits"] = self._forward.logits(forward).cpu()
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
        if not self._forward.causal or any(prompt.spans.ends_in_image for prompt in encoded):
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

    def no_image_states(self, encoded: Sequence[Encoded], ids: Sequence[Sequence[int]], lens: Lens) -> list[Tensor]:
        """Return by prompt (T, K, D) states while the image is hidden, which no pixel changes; by the model's lens."""
        self._hidden_image_states.check(self._model)
        keys = [(key_without_pixels(prompt), tuple(answer)) for prompt, answer in zip(encoded, ids, strict=True)]
        states = {key: stored for key in keys if (stored := self._hidden_image_states.get(key)) is not None}
        missing = {
            key: (replace(prompt, cache=None), answer)
            for key, prompt, answer in zip(keys, encoded, ids, strict=True)
            if key not in states
        }
        if missing:
            prompts, answers = zip(*missing.values(), strict=True)
            rows = self._forward.full_forward(prompts, answers).rows
            with lens.listen(rows) as hidden:
                self._without(prompts, answers, [prompt.spans.image for prompt in prompts])
            for key, part in zip(missing, layer_states(hidden), strict=True):
                states[key] = part
                self._hidden_image_states.put(key, part)
        return [states[key] for key in keys]

    def _blank(self, inputs: dict[str, Any]) -> None:
        """Replace the pixels in the inputs of a pass by those of blank images."""
        inputs["pixel_values"] = torch.full_like(inputs["pixel_values"], self._blank_value)

    def _blank_caches(self, encoded: Sequence[Encoded]) -> list[PromptCache] | None:
        """Return the KV cache of every prompt with a blank image; None where they cannot be used again."""
        self._blank_prefixes.check(self._model)
        keys = [key_without_pixels(prompt) for prompt in encoded]
        caches = {key: cache for key in keys if (cache := self._blank_prefixes.get(key)) is not None}
        missing = {key: prompt for key, prompt in zip(keys, encoded, strict=True) if key not in caches}
        if missing:
            prompts = list(missing.values())
            inputs = self._forward.collate(prompts, "right")
            self._blank(inputs)
            last = self._forward.positions_to_keep([inputs["input_ids"].shape[1] - 1])
            output = self._model(**inputs, **last, use_cache=True).past_key_values
            columns = [[slice(0, prompt.spans.length)] for prompt in prompts]
            computed = self._forward.prompt_caches(output, prompts, columns)
            usable = [cache for cache in computed if cache is not None]
            if len(usable) < len(computed):
                return None
            for key, cache in zip(missing, usable, strict=True):
                self._blank_prefixes.put(key, cache)
                caches[key] = cache
        return [caches[key] for key in keys]


def layer_states(hidden: Sequence[Tensor]) -> Tensor:
    """Return (B, T, K, D) states after the layers of ``probe_layers``, of those after all L layers."""
    return torch.stack([hidden[layer - 1].float().cpu() for layer in probe_layers(len(hidden))], 2)


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


def _has_whole_image(prompt: Encoded) -> bool:
    """Check that no other tokens stand between those of the image."""
    return prompt.spans.image[-1] - prompt.spans.image[0] + 1 == len(prompt.spans.image)
