"""The image tokens as they enter the language model: what relevancy to them is relevancy to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from stethoscope.errors import CapabilityError
from stethoscope.tracing.capture import modules_of, sites


@contextmanager
def entering(model: PreTrainedModel, encoder: bool) -> Iterator[list[Tensor]]:
    """Hears what enters the first layer of the language model.

    Args:
        model: the model.
        encoder: the language model has an encoder, whose first layer it is then.

    Yields:
        A list, to hold the (B, S, D) states of one forward pass.

    Raises:
        CapabilityError: the layer was not found.
    """
    role, places = "encoder" if encoder else "language", sites(model)
    layers = (module for module in modules_of(model) if isinstance(module, GradientCheckpointingLayer))
    first = next((layer for layer in layers if places[id(layer)].role == role), None)
    if first is None:
        raise CapabilityError(f"{type(model).__name__}: the first layer of its language model was not found")
    heard: list[Tensor] = []

    def enters(module: nn.Module, arguments: tuple, options: dict[str, Any]) -> None:
        heard.append((arguments[0] if arguments else options["hidden_states"]).detach())

    handle = first.register_forward_pre_hook(enters, with_kwargs=True)
    try:
        yield heard
    finally:
        handle.remove()
