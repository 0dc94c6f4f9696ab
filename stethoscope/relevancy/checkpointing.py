"""Leave out of the graphs of layers what is large and cheap to compute again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.linalg import vecdot, vector_norm

from stethoscope.core.errors import CaptureError
from stethoscope.tracing.model_parts import modules_of, outer_layers, rms_epsilon, route_layers, sites

Module = Callable[[Tensor], Tensor]
"""Forward function of a module."""


class SparseGraphs:
    """Graphs of layers that keep the arguments of modules, from which their outputs are computed again when needed.

    Norms and activations cost next to nothing. The matrix products whose outputs a graph keeps are those of
    feed-forward modules, most of it; in all layers they would cost a quarter of a forward pass, so those of the last
    layers, with which the backward pass begins, are kept. RMS norms and activations have one node each.
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
        others = [module for module in products if id(module) not in kept]
        read = [layer for layer in layers if sites_by_id[id(layer)].role == "language"][-2:-1]
        split = [module for layer in read for module in modules_of(layer) if _is_feed_forward(module)]
        with (
            route_layers(others, self._run),
            route_layers(norms, self._run_norm),
            route_layers(elementwise, self._run_elementwise),
            route_layers(split, self._run_halves),
        ):
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

    def _run_norm(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        norm, states = getattr(function, "__self__", None), arguments[0] if arguments else None
        if norm is None or not isinstance(states, Tensor) or (epsilon := _epsilon(norm, function, states)) is None:
            return self._noted(function, function, arguments, options)
        run = partial(_RmsNorm.apply, function, norm.weight, epsilon)
        return self._noted(function, run, arguments, options)

    def _run_elementwise(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        recipes: list[_Recipe] = []
        result = self._noted(function, partial(_Elementwise.apply, function, recipes), arguments, options)
        recipe = self._recipe(result) if isinstance(result, Tensor) else None
        if recipe is not None:
            recipe.keeps_graph = True
            recipes.append(recipe)
        return result

    def _run_halves(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call a feed-forward module for half of many positions after the other.

        It is that of the last layer that prompts read to the end, with which their backward pass begins: the most
        memory that is in use at once then is 7 % less. Products of few positions take longer, so no others are split.
        """
        argument = arguments[0] if len(arguments) == 1 and not options else None
        if not (isinstance(argument, Tensor) and argument.dim() == 3 and argument.shape[1] >= _MANY):
            return function(*arguments, **options)
        before = self._recipe(argument) or argument.detach()
        halves, start = argument.split(-(-argument.shape[1] // 2), 1), 0
        for half in halves:
            select = partial(torch.narrow, dim=1, start=start, length=half.shape[1])
            self._recipes[id(half)] = _Recipe(select, before, ref(half), (argument._version, half._version))
            start += half.shape[1]
        return torch.cat([function(half) for half in halves], 1)

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


_KEPT_PRODUCTS = 0.41  # of the language model: sparse graphs keep the outputs of its last matrix products
_MANY = 256  # positions, see ``SparseGraphs._run_halves``
_CHECKED = 8  # states, to see whether a norm is an RMS norm
_UNCHANGING = (nn.Identity, nn.modules.dropout._DropoutNd)


def _is_feed_forward(module: nn.Module) -> bool:
    """Tell whether a module has products and activations alone, which treat every position by itself."""
    parts = list(module._modules.values())
    products = [part for part in parts if isinstance(part, nn.Linear)]
    others = [part for part in parts if part is not None and not isinstance(part, nn.Linear)]
    plain = len(products) + len(others) == len(parts) and not any(part._modules or part._parameters for part in others)
    activates = any(not isinstance(part, _UNCHANGING) for part in others)
    return len(products) > 1 and plain and activates and "attention" not in type(module).__name__.lower()


def _is_norm(module: nn.Module) -> bool:
    return all(part is None or part.dim() == 1 for part in module._parameters.values())


_epsilons: WeakKeyDictionary[nn.Module, float | None] = WeakKeyDictionary()


def _epsilon(norm: nn.Module, forward: Module, states: Tensor) -> float | None:
    """Return the epsilon of an RMS norm, see ``rms_epsilon``, by the first of some states (B, n, D); once for each."""
    if norm not in _epsilons:
        few = states.detach()[:1, :_CHECKED]
        _epsilons[norm] = rms_epsilon(norm, forward, few, 8 * torch.finfo(few.dtype).eps)
    return _epsilons[norm]


class _RmsNorm(torch.autograd.Function):
    """Call an RMS norm, whose gradient then takes a third of the time of that of its six operations.

    With n = x / r and r the root of mean(x^2) + epsilon, the gradient of n w is (w g - n mean(n w g)) / r.
    """

    @staticmethod
    def forward(ctx: Any, function: Module, weight: Tensor, epsilon: float, states: Tensor) -> Tensor:
        ctx.weight, ctx.epsilon = weight, epsilon
        ctx.save_for_backward(states)
        return function(states)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dtype = gradients[0].dtype
        states = ctx.saved_tensors[0].to(torch.promote_types(dtype, torch.float32))
        size = states.shape[-1]
        inverse = (vector_norm(states, dim=-1, keepdim=True).square_() / size + ctx.epsilon).rsqrt_()
        gradient = (gradients[0] * ctx.weight).to(states.dtype)
        along = vecdot(gradient, states)[..., None] * inverse.square() / size
        return None, None, None, gradient.addcmul_(states, along, value=-1).mul_(inverse).to(dtype)


@dataclass(eq=False)
class _Recipe:
    """How to compute the output of a module again.

    Attributes:
        function: of the module.
        argument: its argument, or the recipe of it.
        output: what it returned.
        versions: of argument and output, which grow when a tensor is changed in place.
        uses: number of times that a backward pass asks for the value, which it computes once.
        keeps_graph: whether it leaves the graph of this computation in ``graph``.
        graph: argument and output.
    """

    function: Module
    argument: Tensor | _Recipe
    output: ReferenceType[Tensor]
    versions: tuple[int, int]
    uses: int = 0
    keeps_graph: bool = False
    graph: tuple[Tensor, Tensor] | None = None

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
            argument = self.argument if isinstance(self.argument, Tensor) else self.argument.value()
            with torch.set_grad_enabled(self.keeps_graph):
                argument = argument.detach().requires_grad_(self.keeps_graph)
                value = self.function(argument)
            if self.keeps_graph:
                self.graph, value = (argument, value), value.detach()
            self._left = self.uses
        self._left -= 1
        self._value = value if self._left else None
        return value


class _Elementwise(torch.autograd.Function):
    """Call a module without parameters, whose graph then keeps its argument alone.

    Args:
        function: of the module.
        recipes: afterwards the recipe of the output, if there is one.
        argument: of the module.
    """

    @staticmethod
    def forward(ctx: Any, function: Module, recipes: list[_Recipe], argument: Tensor) -> Tensor:
        ctx.function, ctx.recipes = function, recipes
        ctx.save_for_backward(argument)
        return function(argument)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        graph = ctx.recipes[0].graph if ctx.recipes else None
        if graph is None:
            argument = ctx.saved_tensors[0].detach().requires_grad_()
            with torch.enable_grad():
                graph = argument, ctx.function(argument)
        else:  # left by the node that has asked for the output
            ctx.recipes[0].graph = None
        ctx.recipes.clear()  # the node lives as long as the graph, which would keep the argument
        argument, result = graph
        return None, None, *torch.autograd.grad(result, argument, gradients)
