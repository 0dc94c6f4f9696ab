"""Prepare the inputs of every step of decoding, as ``generate`` does it, and take steps back."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import Cache, GenerationMixin, LogitsProcessor

from stethoscope.core.errors import CapabilityError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class RewindableProcessor(LogitsProcessor):
    """A logits processor with a state that can be restored, so that a step can be repeated."""

    @abstractmethod
    def state(self) -> Any:
        """Return the state before the next step."""

    @abstractmethod
    def restore(self, state: Any) -> None:
        """Go back to a state."""


class StepInputs:
    """Inputs of the model's forward pass at every step.

    Two functions of the model prepare them, which inspect all inputs again at every step. Where these are the common
    ones of transformers, a step after the second differs from the previous one only in the token, its position and the
    mask, which grows by a one. Calling the functions anyway takes 5 % of the time of a small model; this fast path
    was not measured on a GPU. All other models use their own functions.

    Args:
        model: the model.
        inputs: keyword arguments prepared by ``generate``.
        rewinds: whether ``rewind`` will be called, for which the inputs of all steps are kept.
    """

    def __init__(self, model: PreTrainedModel, inputs: dict[str, Any], rewinds: bool = False) -> None:
        self._model, self._inputs, self._calls = model, inputs, 0
        self._kept: list[dict[str, Any]] | None = [] if rewinds else None  # inputs after each of the first steps
        self._next: dict[str, Any] | None = None  # of the previous step, where the next ones follow from it
        # the stubs of torch.nn.Module type both as Tensor or Module
        self._prepare = cast("Callable[..., dict[str, Any]]", model.prepare_inputs_for_generation)
        self._update = cast("Callable[..., dict[str, Any]]", model._update_model_kwargs_for_generation)
        common = (GenerationMixin.prepare_inputs_for_generation, GenerationMixin._update_model_kwargs_for_generation)
        inherited = [getattr(getattr(model, function.__name__), "__func__", None) is function for function in common]
        self._regular = all(inherited) and not model.config.is_encoder_decoder and not model.is_remote_code()

    def prepare(self, input_ids: Tensor) -> dict[str, Any]:
        """Return the keyword arguments of the pass over the last token of (B, n) ids, at first over all."""
        self._calls += 1
        if self._next is None:
            step = {"next_sequence_length": 1} if self._calls > 1 else {"is_first_iteration": True}
            prepared = self._prepare(input_ids, **step, **self._inputs)
            if self._regular and self._calls == 2 and _can_increment(prepared, input_ids):
                self._next = prepared
            return prepared
        self._next["input_ids"] = input_ids[:, -1:]
        if (position := self._next.get("position_ids")) is not None:
            self._next["position_ids"] = position + 1
        if (mask := self._next.get("attention_mask")) is not None:
            self._next["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), 1)], -1)
        return self._next

    def update(self, output: Any) -> None:
        """Store what the next pass needs of the output of this one.

        Raises:
            CapabilityError: with ``rewinds``, the cache cannot be cropped.
        """
        if self._next is None:
            inputs = self._inputs if self._kept is None else dict(self._inputs)
            self._inputs = self._update(output, inputs, is_encoder_decoder=self._model.config.is_encoder_decoder)
            if self._kept is not None:
                self._check_cache(self._inputs.get("past_key_values"))
                self._kept.append(dict(self._inputs))
        else:
            self._next["past_key_values"] = output.past_key_values

    def rewind(self, calls: int) -> None:
        """Go back to the state after so many steps, at least 1, so that the next pass is that of the step after them.

        The cache is cropped too. Needs ``rewinds``.
        """
        surplus, self._calls = self._calls - calls, calls
        (self._inputs if self._next is None else self._next)["past_key_values"].crop(-surplus)
        kept = self._kept or []
        if self._next is not None and calls > len(kept):  # the steps after the kept ones count up
            if (position := self._next.get("position_ids")) is not None:
                self._next["position_ids"] = position - surplus
            if surplus and (mask := self._next.get("attention_mask")) is not None:
                self._next["attention_mask"] = mask[:, :-surplus]
            return
        self._next = None
        self._inputs = dict(kept[calls - 1])
        del kept[calls:]

    def _check_cache(self, cache: Any) -> None:
        if not (isinstance(cache, Cache) and cache.is_croppable):
            kind = type(cache).__name__
            raise CapabilityError(f"{type(self._model).__name__} keeps a {kind}, from which no token can be taken back")


def _can_increment(prepared: dict[str, Any], input_ids: Tensor) -> bool:
    """Decide whether the inputs of one token become those of the next by growing the cache and the mask."""
    cache, mask = prepared.get("past_key_values"), prepared.get("attention_mask")
    return (
        isinstance(cache, Cache)
        and not cache.is_compileable
        and (mask is None or (isinstance(mask, Tensor) and mask.dim() == 2))
        and prepared["input_ids"].device == input_ids.device
    )
