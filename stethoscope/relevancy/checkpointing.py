"""Checkpoint activations layer by layer, and back-propagate many logits per recomputation.

A forward pass keeps only the inputs of every layer. When the backward pass reaches a layer, the layer runs again with a
graph, once for all logits of a group, whose gradients then pass through it one after another. So a group costs
one more forward pass, and memory holds the inputs of all layers, the activations of one layer and a gradient per logit.
Operations between layers (embeddings, connectors, the head) form an ordinary graph.

``torch.utils.checkpoint`` recomputes a layer for every backward pass; here all logits of a group share it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from transformers import DynamicCache

EdgeKey = tuple[Any, int]
"""A node of the graph and the index of its output."""
Graph = tuple[list[Tensor], list[Tensor]]
"""Inputs and outputs of a layer, with the graph between them."""


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
class _LayerCall:
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
        """Run the layer with a graph.

        Args:
            leaves: filled by calls within the layer that add inputs of their own.

        Returns:
            The layer's result and its graph.
        """
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

    Attributes:
        inside: whether a layer is running.
        root_index: index of the root whose gradient passes through a layer, during ``backward``.
        leaves: tensors within a running layer at which the graph begins, because weights are frozen.
    """

    def __init__(self, keep_graphs: bool, sizes: dict[str, int]) -> None:
        self.inside = False
        self.root_index = 0
        self.leaves: list[Tensor] = []
        self._keep_graphs, self._sizes = keep_graphs, sizes
        self._calls: list[_LayerCall] = []
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
        call = _LayerCall(function, values, spec, inputs, [], dict(self._sizes))
        self.inside = True
        try:
            if keep_graph:
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
        self._calls.append(call)
        return tree_unflatten(outputs, result_spec)

    def gradient_bytes(self) -> int:
        """Return the size in bytes of the largest gradient that passes between layers."""
        return max((value.nbytes for call in self._calls for value in call.values if _is_float(value)), default=1)

    def backward(
        self,
        roots: Sequence[Tensor],
        restore_sizes: Callable[[dict[str, int]], None],
        last: bool,
    ) -> None:
        """Back-propagate the gradient of every root through all layers, from the last to the first.

        Args:
            roots: scalars.
            restore_sizes: called with the counters of a layer's call before the layer runs again.
            last: whether the graphs are no longer needed afterwards.
        """
        pending = _PendingGradients(self._calls)
        for root_index, root in enumerate(roots):
            pending.send(root, None, root_index)
        calls = self._calls if last else list(self._calls)  # inputs that no later layer needs are released
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

    def _recompute(self, call: _LayerCall, restore_sizes: Callable[[dict[str, int]], None]) -> Graph:
        restore_sizes(call.sizes)
        self.inside = True
        try:
            return call.run(self.leaves)[1]
        finally:
            self.inside = False


class _PendingGradients:
    """Gradients by root at the outputs of layers that the backward pass has yet to reach."""

    def __init__(self, calls: Sequence[_LayerCall]) -> None:
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


class PrefixCache(DynamicCache):
    """KV cache of the tokens before a pass. It does not grow, so layers may run again.

    Args:
        layers: by layer, keys and values (B, key-value heads, prefix, d).
    """

    def __init__(self, layers: Iterable[tuple[Tensor, ...]]) -> None:
        super().__init__()
        self._prefix = [(keys, values) for keys, values in layers]
        for index, (keys, values) in enumerate(self._prefix):
            super().update(keys[:, :, :0], values[:, :, :0], index)
            self.layers[index].keys, self.layers[index].values = keys, values  # an update would copy them

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return keys and values of the prefix followed by those given, and store nothing."""
        keys, values = self._prefix[layer_idx]
        return torch.cat([keys, key_states], -2), torch.cat([values, value_states], -2)


def _edge_key(edge: GradientEdge) -> EdgeKey:
    return edge.node, edge.output_nr


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
