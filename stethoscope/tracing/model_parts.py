"""Name the parts of a model by the role of every module, and route, hook or freeze its layers within a block."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from torch.utils.hooks import RemovableHandle
from transformers.modeling_layers import GradientCheckpointingLayer

from stethoscope.core.errors import CapabilityError

ROLES = ("vision", "connector", "encoder", "cross", "language")

_VISION = re.compile(r"(^|\.)(vision_tower|vision_model|visual|vision_encoder|image_encoder)(\.|$)")
_CONNECTOR = re.compile(r"qformer|visual_abstractor|resampler|perceiver")
_CROSS = re.compile(r"EncDecAttention|cross_?attn|encoder_attn")
_ENCODER = re.compile(r"(^|\.)encoder\.")
_NUMBER = re.compile(r"\.(\d+)(\.|$)")


@dataclass(frozen=True)
class Site:
    """An attention module of a model.

    Attributes:
        name: path of the module, as in ``model.named_modules()``.
        role: one of ``ROLES``: the vision tower, the connector to the language model (Q-Former, abstractor), the
            encoder of an encoder-decoder language model, its cross-attention, or causal self-attention.
        layer: number of the layer within its part of the model, -1 when the path has none.
    """

    name: str
    role: str
    layer: int


_listed: ContextVar[tuple[nn.Module, list[nn.Module]] | None] = ContextVar("stethoscope_modules", default=None)
_sites_by_model: WeakKeyDictionary[nn.Module, dict[int, Site]] = WeakKeyDictionary()


def sites(model: nn.Module) -> dict[int, Site]:
    """Map every module of the model by ``id`` to the site that it would be as an attention module.

    Sites are cached per model until its modules change.
    """
    cached_sites = _sites_by_model.get(model)
    if cached_sites is None or cached_sites.keys() != {id(module) for module in modules_of(model)}:
        cached_sites = _sites_by_model[model] = _find_sites(model)
    return cached_sites


def modules_of(model: nn.Module) -> list[nn.Module]:
    """List ``model.modules()`` in the same order, five times as fast because no names are built."""
    listed = _listed.get()
    known = listed[1] if listed is not None and listed[0] is model else None  # empty until they are first asked for
    if known:
        return known
    modules: dict[int, nn.Module] = {}
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if module is not None and id(module) not in modules:
            modules[id(module)] = module
            waiting += reversed(module._modules.values())
    if known is not None:
        known.extend(modules.values())
    return list(modules.values())


@contextmanager
def listed_modules(model: nn.Module) -> Iterator[None]:
    """List the modules of a model at most once for the whole block, in which none is added or replaced.

    A pass with its backward pass asks for them about ten times: 5 % of its time in a small model.
    """
    token = _listed.set((model, []))
    try:
        yield
    finally:
        _listed.reset(token)


def _find_sites(model: nn.Module) -> dict[int, Site]:
    tower = _vision_tower(model)
    sites_by_id = {}
    for name, module in model.named_modules():
        number = _NUMBER.search(name)
        role = "vision" if id(module) in tower else _role(name)
        sites_by_id[id(module)] = Site(name, role, int(number.group(1)) if number else -1)
    return sites_by_id


def _vision_tower(model: nn.Module) -> set[int]:
    get_encoder = getattr(model, "get_encoder", None)
    try:
        tower = get_encoder(modality="image") if get_encoder else None
    except (AttributeError, TypeError, ValueError):
        tower = None
    return {id(module) for module in tower.modules()} if isinstance(tower, nn.Module) and tower is not model else set()


def _role(name: str) -> str:
    for role, pattern in (("connector", _CONNECTOR), ("vision", _VISION), ("cross", _CROSS), ("encoder", _ENCODER)):
        if pattern.search(name):
            return role
    return "language"


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode with frozen parameters within the block, then restore it."""
    modules = modules_of(model)
    training = [module for module in modules if module.training]
    trainable = [p for module in modules for p in module._parameters.values() if p is not None and p.requires_grad]
    try:
        for module in training:
            module.training = False
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in trainable:
            parameter.requires_grad_(True)


def outer_layers(model: nn.Module) -> list[nn.Module]:
    """List the layers of all parts of the model, without layers within layers."""
    layers: list[nn.Module] = []
    seen: set[int] = set()
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if module is None or id(module) in seen:
            continue
        seen.add(id(module))
        if isinstance(module, GradientCheckpointingLayer):
            layers.append(module)
        else:
            waiting += reversed(module._modules.values())
    return layers


@contextmanager
def route_layers(layers: Sequence[nn.Module], run: Callable[..., Any]) -> Iterator[None]:
    """Let ``run`` call the layers within the block: it gets a layer's forward function, then its arguments."""
    previous = [{"forward": vars(layer)["forward"]} if "forward" in vars(layer) else {} for layer in layers]
    for layer in layers:
        vars(layer)["forward"] = partial(run, layer.forward)
    try:
        yield
    finally:
        for layer, attributes in zip(layers, previous, strict=True):
            vars(layer).pop("forward")
            vars(layer).update(attributes)


@contextmanager
def route_model(model: nn.Module, run: Callable[..., Any], run_last: Callable[..., Any]) -> Iterator[None]:
    """Freeze the model within the block and let ``run`` call its layers, ``run_last`` the language model's last one."""
    layers, sites_by_id = outer_layers(model), sites(model)
    last = next((layer for layer in reversed(layers) if sites_by_id[id(layer)].role == "language"), None)
    others, own = [layer for layer in layers if layer is not last], [] if last is None else [last]
    with frozen(model), route_layers(others, run), route_layers(own, run_last):
        yield


def layers_of(model: nn.Module, role: str) -> list[nn.Module]:
    """List the layers of a part of the model, such as ``language``, in order."""
    sites_by_id = sites(model)
    layers = [module for module in modules_of(model) if isinstance(module, GradientCheckpointingLayer)]
    return [layer for layer in layers if sites_by_id[id(layer)].role == role]


@contextmanager
def capture_inputs(model: nn.Module, role: str, every: bool = False) -> Iterator[list[Tensor]]:
    """Capture what enters the first layer of a part of the model, or every layer of it, by hooks within the block.

    Args:
        model: the model.
        role: of the part, such as ``language``.
        every: whether to hook every layer.

    Yields:
        A list that receives the (B, S, D) states of the first forward pass, detached.

    Raises:
        CapabilityError: the model has no such layer.
    """
    layers = layers_of(model, role)
    if not layers:
        raise CapabilityError(f"{type(model).__name__}: no first layer of its language model was found")
    captured: list[Tensor] = []
    handles: dict[nn.Module, RemovableHandle] = {}

    def capture(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        captured.append((arguments[0] if arguments else options["hidden_states"]).detach())
        handles.pop(module).remove()  # later passes, such as those that write an answer, call no hook

    for layer in layers[: None if every else 1]:
        handles[layer] = layer.register_forward_pre_hook(capture, with_kwargs=True)
    try:
        yield captured
    finally:
        for handle in handles.values():
            handle.remove()


def rms_epsilon(norm: nn.Module, forward: Callable[[Tensor], Tensor], states: Tensor, tolerance: float) -> float | None:
    """Return the epsilon of a norm that gives what torch's own RMS norm gives; None for any other.

    Args:
        norm: the module.
        forward: its forward function.
        states: (..., D), on which the two are compared.
        tolerance: absolute and relative difference that is allowed.
    """
    weight = getattr(norm, "weight", None)
    epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if not (isinstance(weight, Tensor) and isinstance(epsilon, float) and len(norm._parameters) == 1):
        return None
    if weight.device != states.device:
        return None
    usual = rms_norm(states, weight.shape, weight, epsilon)
    return epsilon if torch.allclose(usual, forward(states), rtol=tolerance, atol=tolerance) else None
