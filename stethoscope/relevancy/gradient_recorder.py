"""Record the layers and attention calls of one forward pass, and hand Abar to receivers on the way back.

The forward pass is SDPA, or eager attention where maps are so small that it costs nothing: the two differ by rounding,
which badly conditioned small models amplify.

A layer of which only the inputs are kept runs again when the backward pass reaches it, with a graph and once for all
logits of a group (``torch.utils.checkpoint`` would run it for each), whose gradients pass through it one after another.
So a group costs one more forward pass, and memory holds the inputs of all layers, the activations of one and a gradient
per logit. Operations between layers (embeddings, connectors, the head) form an ordinary graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from transformers import PreTrainedModel

from stethoscope.core.errors import CaptureError
from stethoscope.relevancy.attention_backward import Blocks, PrefixGradient, Receiver, TracedCall, attention_blocks
from stethoscope.relevancy.checkpointing import SparseGraphs
from stethoscope.tracing.hooks import SMALL_MAP, AttentionCall, AttentionRecorder, attention_and_map, record
from stethoscope.tracing.model_parts import Site, frozen

KeysAndValues = tuple[Tensor, Tensor]
Seeds = tuple[PrefixGradient, PrefixGradient]
"""Gradients of keys and values from the passes behind them."""
EdgeKey = tuple[Any, int]
"""A node of the graph and the index of its output."""
Graph = tuple[list[Tensor], list[Tensor]]
"""Inputs and outputs of a layer, with the graph between them."""


class AttentionGradRecorder(AttentionRecorder):
    """Records the attention of one forward pass for any number of backward passes.

    Args:
        live: number of leading rows of the language model whose keys and values receive gradients; None for all.
        keep_graphs: whether to keep the graph of every layer instead of running layers again.
        salient: first row of the language model whose saliency is needed, the first that predicts a token; None for
            none.
        prefixes: keys and values of the language model before those of the pass, by name of the attention module.
        observer: another recorder, whose ``on_weights`` gets the whole maps of its roles in the same pass.
        sparse: makes the graphs of layers sparse; no small maps are kept with them.

    Attributes:
        layers: by role, the names of its attention modules in the order of their first calls.
        sizes: by name, the number of columns of all calls of a module (crops and windows one after another).
        checkpointer: the layer calls of the forward pass.
        seeds: by name, gradients of keys and values that ``backward`` adds to their own.
        prefix_gradients: by name, those that ``backward`` leaves at ``prefixes``.
    """

    def __init__(
        self,
        live: int | None,
        keep_graphs: bool,
        salient: int | None,
        prefixes: Mapping[str, KeysAndValues] | None = None,
        observer: AttentionRecorder | None = None,
        sparse: SparseGraphs | None = None,
    ) -> None:
        self.layers: dict[str, list[str]] = {}
        self.sizes: dict[str, int] = {}
        self.checkpointer = LayerCheckpointer(keep_graphs, self.sizes, sparse)
        self.seeds: Mapping[str, Seeds] = {}
        self.prefix_gradients: dict[str, Seeds] = {}
        self._live, self._keep_graphs, self._salient = live, keep_graphs, salient
        self._prefixes, self._observer, self._keep_maps = prefixes or {}, observer, keep_graphs and sparse is None
        self._finite: list[tuple[str, Tensor]] = []
        self._ends: dict[tuple[Any, ...], tuple[Tensor | None, list[int]]] = {}
        self._receivers: Sequence[Receiver] = ()
        self._stop = self._budget = self._free_bytes = 0
        self._offsets: dict[str, int] | None = None  # sizes so far in a layer that runs again
        self._receive_weakly = _weakly(self._receive)

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        if self.checkpointer.inside:
            return self._attend(call), None
        return self.checkpointer.run(self._attend, call), None  # an attention module outside all layers is a layer

    def _attend(self, attention_call: AttentionCall) -> Tensor:
        site, module, query, key, value, mask, options, causal = attention_call
        recomputing = self._offsets is not None
        sizes = self.sizes if self._offsets is None else self._offsets
        offset = sizes.get(site.name, 0)
        sizes[site.name] = offset + key.shape[0] * key.shape[2]
        if site.role == "language" and not recomputing:
            key, value = self.on_keys(site, key, value)
        observer = self._observer
        if observer is not None and (recomputing or site.role not in observer.roles):
            observer = None
        if torch.is_grad_enabled():
            queries, keys = query.shape[2], key.shape[2]
            shared = causal if mask is None else id(mask), queries, keys  # most layers have the same mask
            if shared not in self._ends:
                self._ends[shared] = mask, visible_ends(queries, keys, mask, causal)
            ends, live = self._ends[shared][1], self._live if site.role in ("language", "cross") else None
            call = TracedCall(
                site, module, mask, options, self._receive_weakly, ends, live, causal=causal, offset=offset
            )
            if site.role == "language":
                call.salient, call.prefix = self._salient, self._prefixes.get(site.name)
                call.skipped = 0 if call.prefix is None else call.prefix[0].shape[2]
            call.size, call.keys = query.shape[:2].numel() * sum(ends) * 4, keys
            call.keep_map, call.needs_map = self._keep_maps, observer is not None
            if not (query.requires_grad or key.requires_grad or value.requires_grad):
                query = query.detach().requires_grad_()
                self.checkpointer.leaves.append(query)
            output = TracedAttention.apply(query, key, value, call)
            weights, call.weights = call.weights, None
        else:
            output, weights = attention_and_map(module, query, key, value, mask, observer is not None, **options)
        if observer is not None and weights is not None:
            observer.on_weights(site, weights)
        if not recomputing:
            names = self.layers.setdefault(site.role, [])
            if site.name not in names:
                names.append(site.name)
            dtype = torch.promote_types(output.dtype, torch.float32)
            self._finite.append((site.name, torch.isfinite(output.detach().sum(dtype=dtype))))
        return output

    def on_keys(self, site: Site, key: Tensor, value: Tensor) -> KeysAndValues:
        """Return the keys and values of a layer of the language model that its attention is to read."""
        return key, value

    def finish(self) -> None:
        if not self.layers.get("language"):
            raise CaptureError(
                "no attention call of the language model was recorded: the model does not use transformers' "
                "attention interface"
            )
        self._check_finite("attention of {} gives values that are not finite")

    def backward(
        self,
        model: PreTrainedModel,
        logits: Sequence[Tensor],
        receivers: Sequence[Receiver],
        stop: int,
        budget: int,
        last: bool,
    ) -> None:
        """Back-propagate logits through the graph, handing every block of attention to the logit's receiver.

        Args:
            model: the model.
            logits: scalars.
            receivers: one for each logit.
            stop: first row of the language model that no logit depends on.
            budget: bytes that maps may take at once.
            last: whether the graph is no longer needed afterwards.

        Raises:
            CaptureError: a gradient is not finite.
        """
        self._receivers, self._stop, self._budget = receivers, stop, budget
        self._finite.clear()
        with ExitStack() as stack:
            if not self._keep_graphs:  # layers run again
                stack.enter_context(frozen(model))
                stack.enter_context(record(model, self))
            try:
                self.checkpointer.backward(logits, self._restore_sizes, last)
            finally:
                self._receivers, self._offsets = (), None
            self._check_finite("the gradient of the attention of {} holds values that are not finite")

    def _check_finite(self, message: str) -> None:
        for name, finite in self._finite:
            if not finite:
                raise CaptureError(message.format(name))
        self._finite.clear()

    def _restore_sizes(self, sizes: dict[str, int]) -> None:
        self._offsets, self._free_bytes = dict(sizes), self._budget // 2

    def _receive(self, call: TracedCall, blocks: Blocks) -> None:
        """Pass the blocks of a call to the receiver of the current root."""
        name, names = call.site.name, self.layers[call.site.role]
        if call.site.role in ("language", "cross"):
            call.rows, call.narrow = (0, self._stop), name == names[-1] and not call.skipped
        shared = len(self._receivers) > 1 and not (self._keep_graphs or call.narrow)
        if shared and call.kept_blocks is None and call.size <= self._free_bytes:
            call.kept_blocks, self._free_bytes = {}, self._free_bytes - call.size
        call.budget, call.finite, call.seeds = self._budget, None, self.seeds.get(name, ())
        call.deliver(blocks, names.index(name), self._receivers[self.checkpointer.root_index])
        if call.finite is not None:
            self._finite.append((name, call.finite))
        if call.prefix_gradients is not None:
            self.prefix_gradients[name] = call.prefix_gradients


def _weakly(method: Callable[[TracedCall, Blocks], None]) -> Callable[[TracedCall, Blocks], None]:
    """Return a function that calls a recorder's method without holding the recorder.

    The graph refers to that function. If it held the recorder, which holds the graph, no collector would see the
    circle, and graphs without a backward pass would stay in memory.
    """
    reference = WeakMethod(method)

    def call_method(call: TracedCall, blocks: Blocks) -> None:
        bound = reference()
        if bound is None:
            raise RuntimeError("a backward pass needs the recorder of the forward pass")
        bound(call, blocks)

    return call_method


class TracedAttention(torch.autograd.Function):
    """Attention whose backward passes hand Abar to ``call.receive``.

    ``apply`` takes query (B, heads, q, d), key and value (B, key-value heads, k, d) and the ``TracedCall``.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, call: TracedCall) -> Tensor:
        kept = key, value  # the prefix is stored once, not with every pass behind it
        if call.prefix is not None and key.data_ptr() != call.prefix[0].data_ptr():
            kept = key[:, :, call.skipped :].clone(), value[:, :, call.skipped :].clone()
        ctx.save_for_backward(query, *kept)
        ctx.call = call
        output, weights = attention_and_map(call.module, query, key, value, call.mask, call.needs_map, **call.options)
        if call.keep_map and weights is not None and weights.numel() <= SMALL_MAP:
            exact = weights.dtype == torch.promote_types(query.dtype, torch.float32)
            call.map = weights if exact else None
        call.weights = weights if call.needs_map else None
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        call, (query, key, value) = ctx.call, ctx.saved_tensors
        dtype = torch.promote_types(query.dtype, torch.float32)
        if call.prefix is not None:
            call.prefix_gradients = _empty_factors(query, call), _empty_factors(query, call)
            if key.shape[2] < call.keys:
                key, value = (torch.cat(parts, 2) for parts in zip(call.prefix, (key, value), strict=True))
        own = query, key[:, :, call.skipped :], value[:, :, call.skipped :]
        grads = tuple(
            torch.zeros(tensor.shape, dtype=dtype, device=tensor.device) if needed else None
            for tensor, needed in zip(own, ctx.needs_input_grad, strict=False)
        )
        blocks = attention_blocks(call, query, key, value, gradient.transpose(1, 2), grads)
        call.receive(call, blocks)
        call.prefix_gradients = None
        returned = [None if grad is None else grad.to(query.dtype) for grad in grads]
        for index in (1, 2) if call.skipped else ():
            gradient_of_own = returned[index]
            returned[index] = None if gradient_of_own is None else _behind_prefix(gradient_of_own, call.keys)
        return *returned, None


def _behind_prefix(own: Tensor, keys: int) -> Tensor:
    """Return the gradient (B, heads, k, d) of all keys, of which only that of the last, ``own``, will be read."""
    gradient = own.new_empty(*own.shape[:2], keys, own.shape[3])
    gradient[:, :, keys - own.shape[2] :] = own
    return gradient


def _empty_factors(query: Tensor, call: TracedCall) -> PrefixGradient:
    """Return zeros for the gradient that the live queries of a call leave at its prefix."""
    live = query.shape[2] if call.live is None else call.live
    dtype = torch.promote_types(query.dtype, torch.float32)
    sizes = call.skipped, query.shape[3]
    return PrefixGradient(*(torch.zeros(*query.shape[:2], live, n, dtype=dtype, device=query.device) for n in sizes))


def visible_ends(queries: int, keys: int, mask: Tensor | None, causal: bool) -> list[int]:
    """Return, for every query, index + 1 of the last key that it sees in any sample and head.

    A query that sees no key attends to all keys equally in eager attention, so all are counted.
    """
    if mask is None:
        return [min(row + 1, keys) if causal else keys for row in range(queries)]
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    seen = seen[..., :keys].flip(-1)
    ends = torch.where(seen.any(-1), keys - seen.to(torch.uint8).argmax(-1), keys)
    return ends.amax((0, 1)).expand(queries).tolist()


class _LayerOutputs(torch.autograd.Function):
    """Identity op that detaches layer outputs and makes them leaves of the graph between layers.

    The outputs may be changed in place, like those of any layer.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, values: list[Tensor]) -> tuple[Tensor, ...]:
        return tuple(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError("a backward pass must end at the outputs of a layer")


@dataclass(eq=False)
class LayerCall:
    """A call of a layer.

    Attributes:
        function: the layer's forward function.
        values: its arguments, flattened.
        spec: structure of the arguments.
        inputs: indices of the values that receive gradients.
        edges: edges of the outputs in the graph between layers.
        sizes: counters of the recorder when the call began, see ``LayerCheckpointer``.
        graph: graph of the call, where it has been kept.
    """

    function: Callable[..., Any]
    values: list[Any]
    spec: TreeSpec
    inputs: list[int]
    edges: list[GradientEdge]
    sizes: dict[str, int]
    graph: Graph | None = None

    def run(self, leaves: list[Tensor]) -> tuple[Any, Graph]:
        """Return the layer's result and its graph, of which calls within it may add inputs to ``leaves``."""
        values = list(self.values)
        for index in self.inputs:
            values[index] = values[index].detach().requires_grad_()
        arguments, options = tree_unflatten(values, self.spec)
        leaves.clear()
        with torch.enable_grad():
            result = self.function(*arguments, **options)
        inputs = [values[index] for index in self.inputs] + leaves
        return result, (inputs, [value for value in tree_flatten(result)[0] if _is_float(value)])


class LayerCheckpointer:
    """Records the layer calls of a forward pass and back-propagates through them.

    Args:
        keep_graphs: every layer keeps its graph instead of running again: less time, more memory.
        sizes: counters of the recorder, copied when a layer is called; ``backward`` restores them before it runs again.
        sparse: makes these graphs sparse.

    Attributes:
        calls: of layers, in the order of the forward pass, as far as a backward pass will need them.
        inside: whether a layer is running.
        root_index: index of the root whose gradient passes through a layer, during ``backward``.
        leaves: tensors within a running layer at which the graph begins, because weights are frozen.
    """

    def __init__(self, keep_graphs: bool, sizes: dict[str, int], sparse: SparseGraphs | None = None) -> None:
        self.inside = False
        self.root_index = 0
        self.leaves: list[Tensor] = []
        self._keep_graphs, self._sizes, self._sparse = keep_graphs, sizes, sparse
        self.calls: list[LayerCall] = []
        self._anchor = torch.zeros((), requires_grad=True)

    def run(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call a layer and record it; within another layer, or without gradients, only call it."""
        return self._run(self._keep_graphs, function, *arguments, **options)

    def run_last(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call the last layer and keep its graph, because the first backward pass begins with it."""
        return self._run(True, function, *arguments, **options)

    def _run(self, keep_graph: bool, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        if self.inside or not torch.is_grad_enabled():
            return function(*arguments, **options)
        values, spec = tree_flatten((arguments, options))
        inputs = [index for index, value in enumerate(values) if _is_float(value) and value.requires_grad]
        call = LayerCall(function, values, spec, inputs, [], dict(self._sizes))
        self.inside = True
        try:
            if keep_graph:
                with nullcontext() if self._sparse is None else self._sparse.layer():
                    result, call.graph = call.run(self.leaves)
            else:
                with torch.no_grad():
                    result = function(*arguments, **options)
        finally:
            self.inside = False
        outputs, result_spec = tree_flatten(result)
        indices = [index for index, value in enumerate(outputs) if _is_float(value)]
        detached = _LayerOutputs.apply(self._anchor, [outputs[index].detach() for index in indices])
        for index, value in zip(indices, detached, strict=True):
            outputs[index] = value
            call.edges.append(get_gradient_edge(value))
        self.calls.append(call)
        return tree_unflatten(outputs, result_spec)

    def gradient_bytes(self) -> int:
        """Return the size in bytes of the largest gradient that passes between layers."""
        return max((value.nbytes for call in self.calls for value in call.values if _is_float(value)), default=1)

    def backward(self, roots: Sequence[Tensor], restore_sizes: Callable[[dict[str, int]], None], last: bool) -> None:
        """Back-propagate the gradient of every root through all layers, from the last to the first.

        Args:
            roots: scalars.
            restore_sizes: called with the counters of a layer's call before the layer runs again.
            last: whether the graphs are no longer needed afterwards.
        """
        pending = _PendingGradients(self.calls)
        for root_index, root in enumerate(roots):
            pending.send(root, None, root_index)
        calls = self.calls if last else list(self.calls)  # inputs that no later layer needs are released
        while calls:
            call = calls.pop()
            arrived = [pending.take(edge) for edge in call.edges]
            if not any(arrived):
                continue
            inputs, outputs = call.graph or self._recompute(call, restore_sizes)
            for root_index in range(len(roots)):
                received = [
                    (output, by_root.pop(root_index))
                    for output, by_root in zip(outputs, arrived, strict=True)
                    if root_index in by_root
                ]
                received = [(output, gradient) for output, gradient in received if output.requires_grad]
                if not received:
                    continue
                self.root_index = root_index
                retain = root_index + 1 < len(roots) or (self._keep_graphs and not last)
                ends, gradients = zip(*received, strict=True)
                passed = torch.autograd.grad(ends, inputs, gradients, retain_graph=retain, allow_unused=True)
                del received, gradients
                for index, gradient in zip(call.inputs, passed, strict=False):
                    if gradient is not None:
                        pending.send(call.values[index], gradient, root_index)
            del inputs, outputs
            if last or not self._keep_graphs:
                call.graph = None

    def _recompute(self, call: LayerCall, restore_sizes: Callable[[dict[str, int]], None]) -> Graph:
        restore_sizes(call.sizes)
        self.inside = True
        try:
            return call.run(self.leaves)[1]
        finally:
            self.inside = False


class _PendingGradients:
    """Gradients by root at the outputs of layers that the backward pass has yet to reach."""

    def __init__(self, calls: Sequence[LayerCall]) -> None:
        self._edges = {_edge_key(edge): edge for call in calls for edge in call.edges}
        self._gradients: dict[EdgeKey, dict[int, Tensor]] = {key: {} for key in self._edges}

    def send(self, value: Tensor, gradient: Tensor | None, root_index: int) -> None:
        """Back-propagate a gradient from a value between layers to the layer outputs that it depends on.

        Args:
            value: in the graph between layers.
            gradient: of the value; None for 1, at a root.
            root_index: index of the root.
        """
        key = _edge_key(get_gradient_edge(value))
        if key in self._edges:
            self._add(key, torch.ones_like(value) if gradient is None else gradient, root_index)
            return
        edges = list(self._edges.values())
        gradients = torch.autograd.grad(value, edges, gradient, retain_graph=True, allow_unused=True)
        for output, passed in zip(self._edges, gradients, strict=True):
            if passed is not None:
                self._add(output, passed, root_index)

    def take(self, edge: GradientEdge) -> dict[int, Tensor]:
        """Return the gradients at an output by root, and release them."""
        gradients, self._gradients[_edge_key(edge)] = self._gradients[_edge_key(edge)], {}
        return gradients

    def _add(self, key: EdgeKey, gradient: Tensor, root_index: int) -> None:
        by_root = self._gradients[key]
        by_root[root_index] = by_root[root_index] + gradient if root_index in by_root else gradient


def _edge_key(edge: GradientEdge) -> EdgeKey:
    return edge.node, edge.output_nr


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
