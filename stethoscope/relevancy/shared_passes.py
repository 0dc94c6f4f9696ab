"""Compute scope ``row`` from two passes that generation and tracing need anyway.

Row r_k = P - 1 + k of the language model predicts answer token k. The gradient of token k's logit at the attention of
row r_k passes through the residual stream of that row and its own key and value alone, so it is exact when the row
stands behind detached keys and values of all rows before it. Only token 0, whose gradient the prompt's rows use, must
reach them:

1. ``PromptPass`` runs rows 0 .. P - 2 with a graph. Its keys and values are those that ``generate`` goes on from.
   In the last layer no other row reads more of them than keys and values, so it ends there.
2. ``AnswerPass`` runs the T rows behind detached keys and values, with a graph: the trace of the answer.
3. Backwards, the sum of the logits goes through the T rows. Row r_0 leaves the gradient of logit 0 at the keys and
   values of the prompt, from which one ordinary backward pass runs through the prompt's rows and the vision tower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, NoReturn
from weakref import ReferenceType, proxy, ref

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from transformers import DynamicCache, PreTrainedModel

from stethoscope.core.errors import CapabilityError, DataError
from stethoscope.relevancy.attention_backward import Receiver, default_budget
from stethoscope.relevancy.checkpointing import SparseGraphs
from stethoscope.relevancy.gradient_recorder import AttentionGradRecorder, KeysAndValues, LayerCall, Seeds
from stethoscope.relevancy.token_alignment import TokenAlignment, first_sample, image_token_kind, probe_alignment
from stethoscope.tracing.growing_cache import GrowingCache, GrowingLayer, keeps_all_tokens, with_room
from stethoscope.tracing.hooks import AttentionRecorder, record
from stethoscope.tracing.model_parts import Site, capture_inputs, route_model, sites
from stethoscope.tracing.trace import CAUSAL

_WHOLE = ("position_ids", "past_key_values", "inputs_embeds", "decoder_input_ids", "cache_position")


class _PromptRead(Exception):
    """Ends a prompt's pass after the last layer."""


class _KeysReached(Exception):
    """Ends the last layer of a prompt's pass at its keys and values."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys_and_values = keys, values


class _MovedTo(torch.autograd.Function):
    """Identity op whose output is a copy that exists already; the graph behind it then keeps no other."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, copies: list[Tensor]) -> Tensor:
        return copies[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return *gradients, None


class PromptGradRecorder(AttentionGradRecorder):
    """Records the pass over prompts, which ends at the keys and values of the last layer.

    Args:
        keep_graphs: see ``AttentionGradRecorder``.
        sparse: see ``AttentionGradRecorder``.

    Attributes:
        keys_and_values: by name of the attention module, detached; empty when no pass needs them any more.
        roomy: the same at the beginning of tensors with room for the answer, which generation writes there; empty with
            whole graphs, which small models have.
    """

    def __init__(self, keep_graphs: bool, sparse: SparseGraphs | None) -> None:
        super().__init__(None, keep_graphs, salient=None, sparse=sparse)
        self._makes_room = sparse is not None or not keep_graphs
        self.keys_and_values: dict[str, KeysAndValues] = {}
        self.roomy: dict[str, KeysAndValues] = {}
        self._ends_at_keys = False

    def on_keys(self, site: Site, key: Tensor, value: Tensor) -> KeysAndValues:
        """Store keys and values of a layer, which the graph shares, and end the pass with those of the last."""
        if site.name in self.keys_and_values:
            return key, value
        if self._makes_room:
            roomy = self.roomy[site.name] = with_room(key.detach()), with_room(value.detach())
            # by ``data``, as what is written behind them would else count as a change of what the graph keeps
            key, value = (
                _MovedTo.apply(part, [whole[:, :, : part.shape[2]].data])
                for part, whole in zip((key, value), roomy, strict=True)
            )
        self.keys_and_values[site.name] = key.detach(), value.detach()
        if self._ends_at_keys:
            self.layers.setdefault(site.role, []).append(site.name)
            raise _KeysReached(key, value)
        return key, value

    def run_to_keys(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> KeysAndValues:
        """Run the last layer up to its keys and values."""
        self._ends_at_keys = True
        try:
            function(*arguments, **options)
        except _KeysReached as reached:
            return reached.keys_and_values
        raise DataError("the last layer of the language model has no attention")


class PromptPass:
    """Pass over all tokens of prompts but the last, with a graph from the image to the keys and values of every layer.

    Args:
        model: a causal model of ``CAUSAL``.
        inputs: of B prompts, with one length P and their image tokens at the same positions; B is 1 unless the vision
            tower processes one tile per prompt.
        budget: see ``relevancy_from_inputs``.
        recompute: see ``relevancy_from_inputs``.
        states: whether to keep hidden states, for which the last layer runs to its end.
        sparse: make graphs that are kept sparse, and keep no maps with them: half the memory for a quarter of a
            forward pass.

    Attributes:
        model: the model.
        inputs: as given, but of pixels the shape alone.
        length: P.
        image: (N,) positions of the image tokens.
        layers: by layer keys and values of the P - 1 tokens, (B, key-value heads, P - 1, d), detached; none after a
            backward pass.
        embeds: (B, N, D) image tokens at the input of the language model.
        hidden: residual stream of the P - 1 tokens before each layer and after the last, (B, P - 1, D) each, if kept.
        recorder: of the pass.
        kind: computation of the image tokens, see ``image_token_kind``.
        alignment: of vision and image tokens, for kind ``merged``.
        sample: the same of the first prompt.
        sparse: graphs that are kept are sparse.
        keeps_whole: graphs are kept, and not sparse.
        spent: a backward pass has used the graph.

    Raises:
        DataError: the prompts have no image tokens, or these are at different positions.
        CapabilityError: the image tokens are computed in a way that is not supported.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        inputs: Mapping[str, Tensor],
        budget: int | None = None,
        recompute: bool = True,
        states: bool = False,
        sparse: bool = False,
    ) -> None:
        self.model, self.budget, self.recompute, self.spent = model, budget, recompute, False
        self.sparse = sparse and not recompute
        self.keeps_whole = not (sparse or recompute)
        graphs = SparseGraphs() if self.sparse else None
        with torch.inference_mode(False), torch.enable_grad():
            self.inputs = {name: value.clone() if value.is_inference() else value for name, value in inputs.items()}
            ids = self.inputs["input_ids"]
            self.length, self.image = ids.shape[1], _image_positions(model, ids)
            read = {name: value[:, :-1] if value.shape == ids.shape else value for name, value in self.inputs.items()}
            self.sample = first_sample(self.inputs, len(ids))
            self.alignment = None if self.keeps_whole else self._probe_early()
            self.recorder = PromptGradRecorder(not recompute, graphs)
            self._last: KeysAndValues
            with (
                record(model, self.recorder),
                capture_inputs(model, "language", every=states) as captured,
                route_model(model, self.recorder.checkpointer.run, self._run_last),
                nullcontext() if graphs is None else graphs.route(model),
                suppress(_PromptRead),
            ):
                self.hidden = captured if states else []
                model(**read, use_cache=False)
        _release_unused(self.recorder.checkpointer.calls, self._last)
        self.layers = tuple(self.recorder.keys_and_values.values())
        self._lent: ReferenceType[DynamicCache] | None = None
        self.embeds = captured[0][:, _slice_of(self.image)]
        self.kind = image_token_kind(model, self.recorder, len(ids), len(self.image), False)
        if self.kind != "merged":
            self.alignment = None
        elif self.alignment is None:
            with torch.inference_mode(False), torch.enable_grad():
                self.alignment = probe_alignment(model, self.sample, self.image)
        self.inputs, self.sample = (
            {name: value.to("meta") if value.is_floating_point() else value for name, value in part.items()}
            for part in (self.inputs, self.sample)
        )

    def _probe_early(self) -> TokenAlignment | None:
        """Return the alignment of an ordinary tower, whose probe takes as much memory as a layer, before the graph."""
        roles = {site.role for site in sites(self.model).values()}
        if "vision" not in roles or "connector" in roles:
            return None
        with suppress(CapabilityError):  # the pass finds out what the model has, and says so
            return probe_alignment(self.model, self.sample, self.image)
        return None

    def _run_last(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> NoReturn:
        """Run the last layer up to its keys and values, and end the pass."""
        run = partial(type(self.recorder).run_to_keys, proxy(self.recorder), function)  # the recorder stores it
        self._last = self.recorder.checkpointer.run_last(run, *arguments, **options)
        if self.hidden:
            with torch.no_grad():
                output = function(*arguments, **options)
            self.hidden.append(output[0] if isinstance(output, tuple) else output)
        raise _PromptRead

    def backward(self, seeds: Mapping[str, Seeds], receive: Receiver, budget: int) -> None:
        """Back-propagate gradients of the keys and values, handing every block of attention to ``receive``.

        Args:
            seeds: the gradients by name of the attention module.
            receive: see ``attention_backward.Receiver``.
            budget: bytes that maps may take at once.
        """
        self.recorder.seeds = seeds
        gradients = seeds[self.recorder.layers["language"][-1]]
        root = torch.stack([seed.product(part) for part, seed in zip(self._last, gradients, strict=True)]).sum()
        self.recorder.backward(self.model, [root], [receive], self.length - 1, budget, last=True)

    def growing_cache(self) -> GrowingCache | None:
        """Return a cache of the P - 1 tokens that writes further ones behind them; None while another one does.

        Its keys and values are those of the graph, not copies.
        """
        if not self._has_room():
            return None
        cache = GrowingCache(GrowingLayer(roomy, self.length - 1) for roomy in self.recorder.roomy.values())
        self._lent = ref(cache)
        return cache

    def prefix_cache(self) -> PrefixCache:
        """Return a cache of the P - 1 tokens that does not grow, for the pass behind them."""
        if not self._has_room():
            return PrefixCache(self.layers)
        cache = PrefixCache(self.layers, list(self.recorder.roomy.values()))
        self._lent = ref(cache)
        return cache

    def _has_room(self) -> bool:
        """Tell whether there is room behind the keys and values, and no cache writes there."""
        return not self.spent and bool(self.recorder.roomy) and (self._lent is None or self._lent() is None)

    def release_cache(self) -> None:
        """Drop keys and values, which only passes behind the prompt need."""
        self.layers = ()
        self.recorder.keys_and_values.clear()
        self.recorder.roomy.clear()

    def release(self) -> None:
        """Drop the graph."""
        del self.recorder, self._last


class AnswerPass:
    """Pass over the rows that predict answers, behind the keys and values of their prompts.

    Args:
        prompt: the pass over the prompts.
        observer: a recorder of the whole maps of the same pass.
    """

    def __init__(self, prompt: PromptPass, observer: AttentionRecorder | None = None) -> None:
        self.prompt, self._observer = prompt, observer
        prefixes = prompt.recorder.keys_and_values
        self._graphs = SparseGraphs() if prompt.sparse else None
        self._recorder = AttentionGradRecorder(1, not prompt.recompute, 0, prefixes, observer, self._graphs)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record the forward pass that runs in this block, whose logits have gradients."""
        model, recorder = self.prompt.model, self._recorder
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            record(model, recorder),
            route_model(model, recorder.checkpointer.run, recorder.checkpointer.run_last),
            nullcontext() if self._graphs is None else self._graphs.route(model),
        ):
            yield
        if self._observer is not None:
            self._observer.finish()

    def inputs(self, ids: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
        """Build the inputs of a pass over the prompts' last tokens and answers.

        Args:
            ids: (B, T) the last token of every prompt, then its answer without the last token.
            mask: (B, P - 1 + T) attention mask; all ones by default.
        """
        past = self.prompt.length - 1
        positions = torch.arange(past, past + ids.shape[1], device=ids.device)[None].expand(len(ids), -1)
        mask = torch.ones(len(ids), past + ids.shape[1], dtype=torch.long, device=ids.device) if mask is None else mask
        cache = self.prompt.prefix_cache()
        return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "past_key_values": cache}

    def backward(self, root: Tensor, rows: int, receive: Receiver) -> None:
        """Back-propagate a sum of logits through answer and prompt, handing every block of attention to ``receive``.

        Args:
            root: the sum, of one logit per row at most.
            rows: number of rows from the first that it depends on.
            receive: see ``attention_backward.Receiver``.
        """
        self.prompt.spent = True
        budget = default_budget(root.device) if self.prompt.budget is None else self.prompt.budget
        with torch.inference_mode(False), torch.enable_grad():
            self._recorder.backward(self.prompt.model, [root], [receive], rows, budget, last=True)
            seeds = self._recorder.prefix_gradients
            del self._recorder
            self.prompt.release_cache()
            self.prompt.backward(seeds, receive, budget)
        self.prompt.release()


class _Behind(torch.autograd.Function):
    """Write keys or values behind a prefix, and return both."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, roomy: list[Tensor], start: int) -> Tensor:
        ctx.start, end = start, start + states.shape[2]
        roomy[0][:, :, start:end] = states
        return roomy[0][:, :, :end].data  # what later passes write there is no change of what the graph keeps

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0][:, :, ctx.start :], None, None


class PrefixCache(DynamicCache):
    """KV cache of the tokens before a pass. It does not grow, so layers may run again.

    Args:
        layers: by layer, keys and values (B, key-value heads, prefix, d).
        roomy: by layer, tensors that begin with these, and may hold those of the pass behind them.
    """

    def __init__(self, layers: Iterable[tuple[Tensor, ...]], roomy: Sequence[tuple[Tensor, Tensor]] = ()) -> None:
        super().__init__()
        self._prefix, self._roomy = [(keys, values) for keys, values in layers], roomy
        for index, (keys, values) in enumerate(self._prefix):
            super().update(keys[:, :, :0], values[:, :, :0], index)
            self.layers[index].keys, self.layers[index].values = keys, values  # an update would copy them

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return keys and values of the prefix followed by those given, and store nothing."""
        keys, values = self._prefix[layer_idx]
        start, own = keys.shape[2], key_states.shape[2]
        if self._roomy and start + own <= self._roomy[layer_idx][0].shape[2]:
            roomy = self._roomy[layer_idx]
            return _Behind.apply(key_states, [roomy[0]], start), _Behind.apply(value_states, [roomy[1]], start)
        return torch.cat([keys, key_states], -2), torch.cat([values, value_states], -2)


def continues(model: PreTrainedModel) -> bool:
    """Tell from the configuration whether passes can go on from KV caches of prompts: ``CAUSAL``, and all keys stay."""
    return model.config.model_type in CAUSAL and keeps_all_tokens(model)


def shares_passes(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> bool:
    """Decide whether relevancy can be computed from a prompt's and an answer's pass.

    Args:
        model: the model.
        inputs: of a forward pass, which may hold what only a whole pass understands.
    """
    mask = inputs.get("attention_mask")
    return continues(model) and (mask is None or mask.dim() == 2) and not any(name in inputs for name in _WHOLE)


def _image_positions(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return the (N,) common positions of the image tokens of B prompts."""
    image = ids.cpu() == model.config.image_token_id
    if not image[0].any():
        raise DataError(f"the inputs hold no image token (id {model.config.image_token_id})")
    if not (image == image[0]).all():
        raise DataError("the image tokens of the prompts are not at the same positions")
    return image[0].nonzero()[:, 0]


def _slice_of(positions: Tensor) -> Tensor | slice:
    """Return positions as a slice, whose values share memory, where no other is between them."""
    first, last = int(positions[0]), int(positions[-1])
    return slice(first, last + 1) if last - first + 1 == len(positions) else positions


def _release_unused(calls: list[LayerCall], roots: Iterable[Tensor]) -> None:
    """Drop the layers that no root depends on, such as those of a tower behind the one whose output is read."""
    waiting, seen, used = [get_gradient_edge(root).node for root in roots], set[Any](), list[LayerCall]()
    for call in reversed(calls):
        while waiting:
            node = waiting.pop()
            if node not in seen:
                seen.add(node)
                waiting += [following for following, _ in node.next_functions if following is not None]
        if any(edge.node in seen for edge in call.edges):
            used.insert(0, call)
            waiting += [get_gradient_edge(call.values[index]).node for index in call.inputs]
    calls[:] = used
