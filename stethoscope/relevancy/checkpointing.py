"""Keep what a backward pass through the layers of a model needs: their inputs, sparse graphs or whole graphs.

A layer of which only the inputs are kept runs again when the backward pass reaches it, with a graph and once for all
logits of a group (``torch.utils.checkpoint`` would run it for each), whose gradients pass through it one after another.
So a group costs one more forward pass, and memory holds the inputs of all layers, the activations of one and a gradient
per logit. Operations between layers (embeddings, connectors, the head) form an ordinary graph. ``SparseGraphs`` leave
out what is large and cheap to compute again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from stethoscope.core.errors import CaptureError
from stethoscope.tracing.model_parts import modules_of, outer_layers, route_layers, sites

Module = Callable[[Tensor], Tensor]
"""Forward function of a module."""
EdgeKey = tuple[Any, int]
"""A node of the graph and the index of its output."""
Graph = tuple[list[Tensor], list[Tensor]]
"""Inputs and outputs of a layer, with the graph between them."""


class SparseGraphs:
    """Graphs of layers that keep the arguments of modules, from which their outputs are computed again when needed.

    Norms and activations cost next to nothing. The matrix products whose outputs a graph keeps are those of
    feed-forward modules, most of it; in all layers they would cost a quarter of a forward pass, so those of the last
    layers, with which the backward pass begins, are kept.
    """

    def __init__(self) -> None:
        self._recipes: dict[int, _Recipe] = {}  # by the id of an output, of the layer that runs

    @contextmanager
    def route(self, model: nn.Module) -> Iterator[None]:
        """Note within the block how the modules in the layers of a model compute their outputs."""
        layers, sites_by_id = outer_layers(model), sites(model)
        smallest = [module for layer in layers for module in modules_of(layer) if not module._modules]
        elementwise = [module for module in smallest if not (module._parameters or isinstance(module, _UNCHANGING))]
        norms = [module for module in smallest if module._parameters and _is_norm(module)]
        products = [module for module in smallest if module._parameters and not _is_norm(module)]
        language = [module for module in products if sites_by_id[id(module)].role == "language"]
        kept = set(map(id, language[round((1 - _KEPT_PRODUCTS) * len(language)) :]))
        others = [*norms, *(module for module in products if id(module) not in kept)]
        with route_layers(others, self._run), route_layers(elementwise, self._run_elementwise):
            yield

    @contextmanager
    def layer(self) -> Iterator[None]:
        """Make the graph of the layer that runs within the block sparse."""
        with saved_tensors_hooks(self._pack, self._unpack):
            try:
                yield
            finally:
                self._recipes.clear()

    def _run(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        return self._noted(function, function, arguments, options)

    def _run_elementwise(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        return self._noted(function, partial(_Elementwise.apply, function), arguments, options)

    def _noted(self, function: Callable[..., Any], run: Module, arguments: tuple[Any, ...], options: Any) -> Any:
        """Call a module; of one tensor with a gradient, by ``run`` and with a recipe of the output."""
        argument = arguments[0] if len(arguments) == 1 and not options else None
        if not (isinstance(argument, Tensor) and argument.requires_grad and torch.is_grad_enabled()):
            return function(*arguments, **options)
        result = run(argument)
        if isinstance(result, Tensor) and result is not argument and argument.nbytes <= result.nbytes:
            versions, before = (argument._version, result._version), self._recipe(argument)
            self._recipes[id(result)] = _Recipe(function, before or argument.detach(), ref(result), versions)
        return result

    def _recipe(self, tensor: Tensor) -> _Recipe | None:
        """Return the recipe of a tensor that has not been changed since."""
        recipe = self._recipes.get(id(tensor))
        if recipe is None or recipe.output() is not tensor or recipe.versions[1] != tensor._version:
            return None
        return recipe

    def _pack(self, tensor: Tensor) -> Tensor | _Recipe:
        recipe = self._recipe(tensor)
        if recipe is None:
            return tensor.detach()  # a node that stored its own output would be a circle
        recipe.use()
        return recipe

    @staticmethod
    def _unpack(kept: Tensor | _Recipe) -> Tensor:
        return kept.value() if isinstance(kept, _Recipe) else kept


_KEPT_PRODUCTS = 0.6  # of the language model: sparse graphs keep the outputs of its last matrix products
_UNCHANGING = (nn.Identity, nn.modules.dropout._DropoutNd)


def _is_norm(module: nn.Module) -> bool:
    return all(part is None or part.dim() == 1 for part in module._parameters.values())


@dataclass(eq=False)
class _Recipe:
    """How to compute the output of a module again.

    Attributes:
        function: of the module.
        argument: its argument, or the recipe of it.
        output: what it returned.
        versions: of argument and output, which grow when a tensor is changed in place.
        uses: number of times that a backward pass asks for the value, which it computes once.
    """

    function: Module
    argument: Tensor | _Recipe
    output: ReferenceType[Tensor]
    versions: tuple[int, int]
    uses: int = 0

    def __post_init__(self) -> None:
        self._left = 0
        self._value: Tensor | None = None

    def use(self) -> None:
        """Count a use."""
        if not self.uses and isinstance(self.argument, _Recipe):
            self.argument.use()
        self.uses += 1

    def value(self) -> Tensor:
        """Return the output, which is kept until its last use.

        Raises:
            CaptureError: the argument has been changed in place.
        """
        value = self._value
        if value is None:
            if isinstance(self.argument, Tensor) and self.argument._version != self.versions[0]:
                raise CaptureError("a layer changes in place what its modules read; relevancy needs that unchanged")
            with torch.no_grad():
                value = self.function(self.argument if isinstance(self.argument, Tensor) else self.argument.value())
            self._left = self.uses
        self._left -= 1
        self._value = value if self._left else None
        return value


class _Elementwise(torch.autograd.Function):
    """Call a module without parameters, whose graph then keeps its argument alone."""

    @staticmethod
    def forward(ctx: Any, function: Module, argument: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(argument)
        return function(argument)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        argument = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            result = ctx.function(argument)
        return None, *torch.autograd.grad(result, argument, gradients)


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
        inside: whether a layer is running.
        root_index: index of the root whose gradient passes through a layer, during ``backward``.
        leaves: tensors within a running layer at which the graph begins, because weights are frozen.
    """

    def __init__(self, keep_graphs: bool, sizes: dict[str, int], sparse: SparseGraphs | None = None) -> None:
        self.inside = False
        self.root_index = 0
        self.leaves: list[Tensor] = []
        self._keep_graphs, self._sizes, self._sparse = keep_graphs, sizes, sparse
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
        self._calls.append(call)
        return tree_unflatten(outputs, result_spec)

    def release_unused(self, roots: Sequence[Tensor]) -> None:
        """Drop the layers that no root depends on, such as those of a tower behind the one whose output is read."""
        waiting, seen, used = [get_gradient_edge(root).node for root in roots], set[Any](), list[_LayerCall]()
        for call in reversed(self._calls):
            while waiting:
                node = waiting.pop()
                if node not in seen:
                    seen.add(node)
                    waiting += [following for following, _ in node.next_functions if following is not None]
            if any(edge.node in seen for edge in call.edges):
                used.insert(0, call)
                waiting += [get_gradient_edge(call.values[index]).node for index in call.inputs]
        self._calls[:] = used

    def gradient_bytes(self) -> int:
        """Return the size in bytes of the largest gradient that passes between layers."""
        return max((value.nbytes for call in self._calls for value in call.values if _is_float(value)), default=1)

    def backward(self, roots: Sequence[Tensor], restore_sizes: Callable[[dict[str, int]], None], last: bool) -> None:
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


def _edge_key(edge: GradientEdge) -> EdgeKey:
    return edge.node, edge.output_nr


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
