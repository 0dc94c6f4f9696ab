"""A forward pass taken down layer by layer, and gradients of many logits sent back through it together.

Every layer of the model is a step. It keeps its inputs alone and runs again, with a graph, when the backward pass
reaches it: once for all logits of a group, whose gradients then go through it one after another. So a group costs one
more forward pass and what is kept is the inputs of all layers, the activations of one and a gradient per logit.
What lies between layers (embeddings, connectors, the head) is an ordinary graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from transformers.modeling_layers import GradientCheckpointingLayer

from stethoscope.tracing.hooks import modules_of

Key = tuple[Any, int]
"""A node of the graph and the number of its output."""


class _Start(torch.autograd.Function):
    """Gives values a place in the graph at which it begins. They may be changed in place, as any layer's output."""

    @staticmethod
    def forward(ctx: Any, start: Tensor, values: list[Tensor]) -> tuple[Tensor, ...]:
        return tuple(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError("a backward pass ends where a step's outputs begin")


@dataclass(eq=False)
class _Step:
    """A layer's call.

    Attributes:
        function, values, spec: what was called, and its arguments, flattened.
        inputs: which of the values gradients go on to.
        edges: where the outputs are in the graph between layers.
        mark: what ``Tape`` was told to remember when the call began.
        graph: inputs and outputs with the graph in between, where it has been kept.
    """

    function: Callable[..., Any]
    values: list[Any]
    spec: TreeSpec
    inputs: list[int]
    edges: list[GradientEdge]
    mark: Any
    graph: tuple[list[Tensor], list[Tensor]] | None

    def run(self, leaves: list[Tensor]) -> Any:
        """Runs with a graph, which ``graph`` holds then.

        Args:
            leaves: where a call within the layer adds inputs of its own.
        """
        values = list(self.values)
        for index in self.inputs:
            values[index] = values[index].detach().requires_grad_()
        arguments, options = tree_unflatten(values, self.spec)
        leaves.clear()
        with torch.enable_grad():
            returned = self.function(*arguments, **options)
        inputs = [values[index] for index in self.inputs] + leaves
        self.graph = inputs, [value for value in tree_flatten(returned)[0] if _real(value)]
        return returned


class Tape:
    """Steps in the order in which they ran.

    Args:
        keep: every step keeps its graph instead of running again: less time, more memory.
        mark: gives what a step has to be told when it runs again.

    Attributes:
        inside: a step is running.
        leaves: for tensors within a running step at which the graph begins, because weights are frozen.
    """

    def __init__(self, keep: bool, mark: Callable[[], Any]) -> None:
        self.inside = False
        self.leaves: list[Tensor] = []
        self._keep, self._mark = keep, mark
        self._steps: list[_Step] = []
        self._start = torch.zeros((), requires_grad=True)

    def run(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Calls the function as a step; within another step, or where no gradients are wanted, just calls it."""
        return self._run(self._keep, function, *arguments, **options)

    def run_last(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """The same for the last step: it keeps its graph for the first backward pass, which begins with it anyway."""
        return self._run(True, function, *arguments, **options)

    def _run(self, keep: bool, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        if self.inside or not torch.is_grad_enabled():
            return function(*arguments, **options)
        values, spec = tree_flatten((arguments, options))
        wired = [index for index, value in enumerate(values) if _real(value) and value.requires_grad]
        step = _Step(function, values, spec, wired, [], self._mark(), None)
        self.inside = True
        try:
            if keep:
                returned = step.run(self.leaves)
            else:
                with torch.no_grad():
                    returned = function(*arguments, **options)
        finally:
            self.inside = False
        given, shape = tree_flatten(returned)
        real = [index for index, value in enumerate(given) if _real(value)]
        for index, value in zip(
            real, _Start.apply(self._start, [given[index].detach() for index in real]), strict=True
        ):
            given[index] = value
            step.edges.append(get_gradient_edge(value))
        self._steps.append(step)
        return tree_unflatten(given, shape)

    def width(self) -> int:
        """Bytes of the largest gradient that passes between steps."""
        return max((value.nbytes for step in self._steps for value in step.values if _real(value)), default=1)

    def backward(
        self, roots: Sequence[Tensor], choose: Callable[[int], None], again: Callable[[Any], None], last: bool
    ) -> None:
        """Sends the gradient of every root back through all steps, from the last to the first.

        Args:
            roots: scalars.
            choose: told the number of the root before a gradient of it goes through a step.
            again: told a step's mark before it runs again.
            last: the graphs are not needed again.
        """
        waiting = _Waiting(self._steps)
        for number, root in enumerate(roots):
            waiting.send(root, None, number)
        for step in reversed(self._steps):
            arrived = [waiting.take(edge) for edge in step.edges]
            if not any(arrived):
                continue
            if step.graph is None:
                self._again(step, again)
            inputs, outputs = step.graph
            for number in range(len(roots)):
                there = [(out, one.pop(number)) for out, one in zip(outputs, arrived, strict=True) if number in one]
                there = [(out, gradient) for out, gradient in there if out.requires_grad]
                if not there:
                    continue
                choose(number)
                kept = number + 1 < len(roots) or (self._keep and not last)
                ends, gradients = zip(*there, strict=True)
                back = torch.autograd.grad(ends, inputs, gradients, retain_graph=kept, allow_unused=True)
                del there, gradients
                for index, gradient in zip(step.inputs, back, strict=False):
                    if gradient is not None:
                        waiting.send(step.values[index], gradient, number)
            del inputs, outputs
            if last or not self._keep:
                step.graph = None

    def _again(self, step: _Step, again: Callable[[Any], None]) -> None:
        again(step.mark)
        self.inside = True
        try:
            step.run(self.leaves)
        finally:
            self.inside = False


class _Waiting:
    """Gradients by root at the outputs of steps that the backward pass has yet to reach."""

    def __init__(self, steps: Sequence[_Step]) -> None:
        self._edges = {_key(edge): edge for step in steps for edge in step.edges}
        self._gradients: dict[Key, dict[int, Tensor]] = {key: {} for key in self._edges}

    def send(self, value: Tensor, gradient: Tensor | None, number: int) -> None:
        """Passes a gradient on from a value in the graph between steps to the outputs that it was made from."""
        key = _key(get_gradient_edge(value))
        if key in self._edges:
            self._add(key, gradient, number)
            return
        found = torch.autograd.grad(value, list(self._edges.values()), gradient, retain_graph=True, allow_unused=True)
        for other, passed in zip(self._edges, found, strict=True):
            if passed is not None:
                self._add(other, passed, number)

    def take(self, edge: GradientEdge) -> dict[int, Tensor]:
        """The gradients at an output by root; they are forgotten here."""
        taken, self._gradients[_key(edge)] = self._gradients[_key(edge)], {}
        return taken

    def _add(self, key: Key, gradient: Tensor, number: int) -> None:
        there = self._gradients[key]
        there[number] = there[number] + gradient if number in there else gradient


@contextmanager
def steps(model: nn.Module, tape: Tape) -> Iterator[None]:
    """For the length of a block every layer of the model runs as a step of the tape."""
    layers: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for layer in modules_of(model):
        if isinstance(layer, GradientCheckpointingLayer) and layer not in inside:
            inside.update(layer.modules())
            layers.append(layer)
    kept = [{"forward": vars(layer)["forward"]} if "forward" in vars(layer) else {} for layer in layers]
    for layer in layers:  # the language model comes last in all families; if it did not, only memory would be lost
        layer.forward = partial(tape.run_last if layer is layers[-1] else tape.run, layer.forward)
    try:
        yield
    finally:
        for layer, before in zip(layers, kept, strict=True):
            vars(layer).pop("forward")
            vars(layer).update(before)


def _key(edge: GradientEdge) -> Key:
    return edge.node, edge.output_nr


def _real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
