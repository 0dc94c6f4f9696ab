"""Hears every attention call of one forward pass, so that backward passes through it give their Abar away."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from stethoscope.capture import Listener, Site
from stethoscope.errors import CaptureError
from stethoscope.relevancy.attention import Call, traced_attention

Receiver = Callable[[Call, int, Tensor], None]


class Maps(Listener):
    """One forward pass whose attention can be asked for its Abar, any number of times.

    Args:
        live: number of leading rows of the language model whose keys and values pass gradients on; None for all.
        budget: bytes that maps may take at once in a backward pass.

    Attributes:
        layers: by role, the names of its attention modules in the order of their first calls.
        leaves: where the graph begins; gradients with respect to them run through every call.
        sizes: by name, how many columns all calls of a module have together (crops and windows one after another).
    """

    def __init__(self, live: int | None, budget: int) -> None:
        self.layers: dict[str, list[str]] = {}
        self.leaves: list[Tensor] = []
        self.sizes: dict[str, int] = {}
        self._calls: list[Call] = []
        self._live, self._budget = live, budget
        self._receiver: Receiver | None = None
        self._heard: list[tuple[str, Tensor]] = []

    def attend(
        self,
        site: Site,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if not (query.requires_grad or key.requires_grad or value.requires_grad):
            query = query.detach().requires_grad_()  # weights are frozen, so somewhere the graph has to begin
            if self._receiver is None:
                self.leaves.append(query)
        if self._receiver is not None:  # a layer runs again in a backward pass, for its activations alone
            return traced_attention(query, key, value, Call(site, module, mask, kwargs, _nothing)), None
        names = self.layers.setdefault(site.role, [])
        if site.name not in names:
            names.append(site.name)
        live = self._live if site.role in ("language", "cross") else None
        offset = self.sizes.get(site.name, 0)
        self.sizes[site.name] = offset + key.shape[0] * key.shape[2]
        call = Call(site, module, mask, kwargs, self._receive, live, self._budget, offset)
        self._calls.append(call)
        return traced_attention(query, key, value, call), None

    def finish(self) -> None:
        if not self.layers.get("language"):
            raise CaptureError("no attention of a language-model layer was seen; the model does not call the interface")
        for call in self._calls:
            if not call.finite:
                raise CaptureError(f"attention of {call.site.name} gives values that are not finite")

    def backward(self, logit: Tensor, receiver: Receiver, last: bool) -> None:
        """Sends the gradient of ``logit`` through the graph; ``receiver`` gets every call, its layer and its Abar.

        Args:
            last: the graph is not needed again.

        Raises:
            CaptureError: an Abar holds values that are not finite.
        """
        self._receiver = receiver
        self._heard.clear()
        try:
            torch.autograd.grad(logit, self.leaves, retain_graph=not last, allow_unused=True)
        finally:
            self._receiver = None
        for name, finite in self._heard:
            if not finite:
                raise CaptureError(f"the gradient of the attention of {name} holds values that are not finite")

    def _receive(self, call: Call, abar: Tensor) -> None:
        self._heard.append((call.site.name, torch.isfinite(abar).all()))
        self._receiver(call, self.layers[call.site.role].index(call.site.name), abar)


def _nothing(call: Call, abar: Tensor) -> None:
    """A receiver for calls that no gradient comes through."""


@contextmanager
def recomputed(model: nn.Module) -> Iterator[None]:
    """For the length of a block the model's layers keep nothing but their inputs and run again in backward passes."""
    kept: list[tuple[nn.Module, dict[str, Any]]] = []
    inside: set[nn.Module] = set()
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer) and layer not in inside:
            inside.update(layer.modules())
            kept.append((layer, {"forward": vars(layer)["forward"]} if "forward" in vars(layer) else {}))
            layer.forward = partial(_checkpointed, layer.forward)
    try:
        yield
    finally:
        for layer, before in kept:
            vars(layer).pop("forward")
            vars(layer).update(before)


def _checkpointed(forward: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    context = copy_context()  # a GPU's backward pass is in another thread, which would not know of the recording
    again = partial(context.run, forward)
    return checkpoint(again, *arguments, use_reentrant=False, preserve_rng_state=False, **options)


@contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and frozen parameters for the length of a block; then everything is as it was."""
    training = [module for module in model.modules() if module.training]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
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
