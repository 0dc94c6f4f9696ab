"""Run prompts before their answers are written, with a graph for the relevancy of these answers.

Generation goes on from the keys and values of this pass, and traces with relevancy go back through its graph
(``relevancy.shared_passes``). Small models take several prompts of one form together.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from stethoscope.adapters import memory
from stethoscope.adapters.forward import ForwardRunner
from stethoscope.relevancy.shared_passes import PromptPass
from stethoscope.tracing.answer_recorder import RECORDED_REQUIREMENTS
from stethoscope.tracing.model_parts import listed_modules
from stethoscope.tracing.trace import PROMPT_REQUIREMENTS, Encoded, PromptCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SMALL_MAPS = 2**24
"""Bytes of attention maps up to which prompts share a pass, and graphs are kept without an estimate."""
_TOGETHER = 8  # prompts in a pass at most, as many as the evaluator traces at once
_GRAPH_BYTES, _GRAPH_SHARE = 2**28, 0.25  # of the graphs of a batch: on a CPU, and of the free memory of a GPU
_WHOLE_SHARE = 0.25  # of these, up to which graphs are whole


class Prefill:
    """Run the passes over prompts whose answers need relevancy.

    Args:
        name: of the model, for messages.
        forward: prepares inputs.
    """

    def __init__(self, name: str, forward: ForwardRunner) -> None:
        self._name, self._forward, self._model = name, forward, forward.model
        self._has_warned = False  # that graphs do not fit

    @torch.inference_mode()
    def run(self, encoded: Sequence[Encoded], requires: Collection[str]) -> list[Encoded]:
        """Return the prompts with KV caches and graphs, where relevancy is required and model and memory allow it.

        Where graphs do not fit, only the inputs of layers are kept, which then run again in the backward pass. Where
        generation can record all that is required, nothing runs, and the prompts say so (``Encoded.planned``).
        """
        prompts, planned = list(encoded), frozenset(requires)
        if planned <= RECORDED_REQUIREMENTS and self._forward.causal:
            return [replace(prompt, planned=planned) for prompt in prompts]
        if "relevancy" not in requires or not self._forward.causal or not prompts:
            return prompts
        longest, room = max(prompt.spans.length for prompt in prompts), _room(self._model)
        sparse = len(prompts) * memory.graph_bytes(self._model, longest) > room * _WHOLE_SHARE
        if sparse and len(prompts) * memory.input_bytes(self._model, longest) > room:
            return prompts
        recompute = sparse and len(prompts) * memory.graph_bytes(self._model, longest, sparse=True) > room
        if recompute and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{self._name}: graphs of {len(prompts)} prompts of up to {longest:,} tokens do not fit into "
                f"{room / 2**20:,.0f} MiB; for relevancy, layers run again in the backward pass",
                stacklevel=2,
            )
        states = not PROMPT_REQUIREMENTS.isdisjoint(requires)
        with listed_modules(self._model):
            for group in self._similar_prompts(prompts):
                inputs = self._forward.collate([prompts[index] for index in group], "right")
                graph = PromptPass(self._model, inputs, recompute=recompute, states=states, sparse=sparse)
                for position, index in enumerate(group):
                    own = slice(position, position + 1)
                    layers = tuple((keys[own], values[own]) for keys, values in graph.layers)
                    cache = PromptCache(layers, graph, position, graph.embeds[position])
                    prompts[index] = replace(prompts[index], cache=cache)
        return prompts

    def complete(self, encoded: Sequence[Encoded], requires: Collection[str]) -> tuple[list[Encoded], list[list[int]]]:
        """Run the prompts that share a graph with none, or with prompts that are not among these.

        Returns:
            The prompts, and the indices of those that share a graph, in its order.
        """
        prompts = list(encoded)
        states = not PROMPT_REQUIREMENTS.isdisjoint(requires)
        usable = {index for group in sharing(prompts, states) for index in group}
        missing = [index for index in range(len(prompts)) if index not in usable]
        for index, prompt in zip(missing, self.run([prompts[index] for index in missing], requires), strict=True):
            prompts[index] = prompt
        return prompts, sharing(prompts, states)

    def _similar_prompts(self, encoded: Sequence[Encoded]) -> Iterator[list[int]]:
        """Yield the indices of prompts that share a pass; those that end in the image are left out."""
        similar: dict[Hashable, list[int]] = {}
        for index, prompt in enumerate(encoded):
            if prompt.spans.ends_in_image:
                continue
            pixels = prompt.inputs["pixel_values"].shape
            alone = len(pixels) != 4 or pixels[0] != 1
            key = index if alone else (prompt.spans.length, prompt.spans.image, pixels)
            similar.setdefault(key, []).append(index)
        for group in similar.values():
            size = len(group)
            if size > 1:
                needed = memory.attention_bytes(self._model, encoded[group[0]].spans.length)
                size = min(max(1, SMALL_MAPS // needed), _TOGETHER)
            yield from (group[start : start + size] for start in range(0, len(group), size))


def sharing(encoded: Sequence[Encoded], states: bool) -> list[list[int]]:
    """List the indices of prompts that are all those of a graph which is not spent, in the order of the graph.

    Args:
        encoded: the prompts.
        states: whether only graphs with hidden states count.
    """
    graphs: dict[int, tuple[PromptPass, dict[int, int]]] = {}
    for index, prompt in enumerate(encoded):
        if prompt.cache is not None and prompt.cache.graph is not None and not prompt.cache.graph.spent:
            graphs.setdefault(id(prompt.cache.graph), (prompt.cache.graph, {}))[1][prompt.cache.index] = index
    return [
        [indices[position] for position in sorted(indices)]
        for graph, indices in graphs.values()
        if len(indices) == len(graph.inputs["input_ids"]) and (graph.hidden or not states)
    ]


def _room(model: PreTrainedModel) -> int:
    """Count the bytes that the graphs of a batch of prompts may take."""
    if model.device.type == "cuda":
        return int(torch.cuda.mem_get_info(model.device)[0] * _GRAPH_SHARE)
    return _GRAPH_BYTES
