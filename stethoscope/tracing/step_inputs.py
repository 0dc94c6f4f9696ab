"""Prepare the inputs of every step of decoding, as ``generate`` does it, and take steps of a prompt back."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationMixin, LogitsProcessor

from stethoscope.core.errors import CapabilityError
from stethoscope.tracing.growing_cache import cache_for, keeps_all_tokens

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

    @abstractmethod
    def row(self, index: int) -> RewindableProcessor:
        """Return the processor of one prompt of the batch, with its part of the state."""


def takes_rows_back(model: PreTrainedModel) -> bool:
    """Whether ``StepInputs`` can take back steps of one prompt of a batch, while the others go on.

    The prompt's KV cache then moves to the right, as if it had been padded on the left by more. So the model must keep
    a state for every token of the prompt and the answer, and prepare its inputs as transformers does.
    """
    return _is_regular(model) and keeps_all_tokens(model)


class StepInputs:
    """Inputs of the model's forward pass at every step.

    Two functions of the model prepare them, which inspect all inputs again at every step. Where these are the common
    ones of transformers, a step after the second differs from the previous one only in the token, its position and the
    mask, which grows by a one. Calling the functions anyway takes 5 % of the time of a small model; this fast path
    was not measured on a GPU. All other models use their own functions.

    Args:
        model: the model.
        inputs: keyword arguments prepared by ``generate``.
        rewinds: whether ``rewind`` will be called, for which the inputs of the first steps are kept.
    """

    def __init__(self, model: PreTrainedModel, inputs: dict[str, Any], rewinds: bool = False) -> None:
        self._model, self._inputs, self._calls = model, inputs, 0
        self._rewinds = rewinds
        self._kept: list[dict[str, Any]] = []  # with ``rewinds``, inputs after each of the first steps
        self._next: dict[str, Any] | None = None  # of the previous step, where the next ones follow from it
        # the stubs of torch.nn.Module type both as Tensor or Module
        self._prepare = cast("Callable[..., dict[str, Any]]", model.prepare_inputs_for_generation)
        self._update = cast("Callable[..., dict[str, Any]]", model._update_model_kwargs_for_generation)
        self._regular = _is_regular(model)

    def prepare(self, input_ids: Tensor) -> dict[str, Any]:
        """Return the keyword arguments of the pass over the last token of (B, n) ids, at first over all."""
        self._calls += 1
        if self._calls == 1 and _is_fresh(self._inputs.get("past_key_values")):
            cache = cache_for(self._model, input_ids)
            self._inputs = self._inputs if cache is None else {**self._inputs, "past_key_values": cache}
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
            inputs = dict(self._inputs) if self._rewinds else self._inputs
            self._inputs = self._update(output, inputs, is_encoder_decoder=self._model.config.is_encoder_decoder)
            if self._rewinds:
                self._check_cache(self._inputs.get("past_key_values"))
                self._kept.append(dict(self._inputs))
        else:
            self._next["past_key_values"] = output.past_key_values

    def rewind(self, row: int, surplus: int) -> None:
        """Take the last steps of one prompt back, so that its next pass is the one that was next before them.

        A single prompt's cache is cropped. In a batch, see ``takes_rows_back``, the others keep all their steps.
        Needs ``rewinds``.

        Args:
            row: index of the prompt in the batch.
            surplus: number of steps to take back, 0 or more; in a batch only steps after the first one.
        """
        if surplus and self._next is not None and len(self._next["input_ids"]) > 1:
            self._move_right(self._next, row, surplus)
            return
        self._calls -= surplus
        (self._inputs if self._next is None else self._next)["past_key_values"].crop(-surplus)
        if self._next is not None and self._calls > len(self._kept):  # the steps after the kept ones count up
            if (position := self._next.get("position_ids")) is not None:
                self._next["position_ids"] = position - surplus
            if surplus and (mask := self._next.get("attention_mask")) is not None:
                self._next["attention_mask"] = mask[:, :-surplus]
            return
        self._next = None
        self._inputs = dict(self._kept[self._calls - 1])
        del self._kept[self._calls :]

    def _move_right(self, inputs: dict[str, Any], row: int, surplus: int) -> None:
        """Move what a prompt has read to the right, over its last ``surplus`` tokens; mask what is left of it."""
        cache = inputs["past_key_values"]
        for layer in cache.layers:
            layer.keys, layer.values = (_moved(states, row, surplus, 2) for states in (layer.keys, layer.values))
        mask = inputs.get("attention_mask")
        if mask is None:
            mask = torch.ones(len(inputs["input_ids"]), cache.get_seq_length(), dtype=torch.long)
            mask = mask.to(inputs["input_ids"].device)
        mask = _moved(mask, row, surplus, 1)
        mask[row, :surplus] = 0
        position = inputs["position_ids"].clone()
        position[..., row, :] -= surplus
        inputs |= {"attention_mask": mask, "position_ids": position}

    @property
    def selects(self) -> bool:
        """Whether ``select`` is possible, as it is after the second step of a model that ``takes_rows_back``."""
        return self._next is not None

    def select(self, rows: Sequence[int]) -> None:
        """Keep some prompts of the batch only, in this order; see ``selects``."""
        inputs, self._kept = cast("dict[str, Any]", self._next), []
        indices = torch.tensor(rows, device=inputs["input_ids"].device)
        inputs["past_key_values"].batch_select_indices(indices)
        inputs["input_ids"] = inputs["input_ids"][indices]
        inputs["position_ids"] = inputs["position_ids"][..., indices, :]
        if (mask := inputs.get("attention_mask")) is not None:
            inputs["attention_mask"] = mask[indices]

    def _check_cache(self, cache: Any) -> None:
        if not (isinstance(cache, Cache) and cache.is_croppable):
            kind = type(cache).__name__
            raise CapabilityError(f"{type(self._model).__name__} keeps a {kind}, from which no token can be taken back")


def _is_fresh(cache: Any) -> bool:
    """Whether a cache is one of transformers' that nothing has been written to."""
    return type(cache) is DynamicCache and not cache.get_seq_length()


def _can_increment(prepared: dict[str, Any], input_ids: Tensor) -> bool:
    """Decide whether the inputs of one token become those of the next by growing the cache and the mask."""
    cache, mask = prepared.get("past_key_values"), prepared.get("attention_mask")
    return (
        isinstance(cache, Cache)
        and not cache.is_compileable
        and (mask is None or (isinstance(mask, Tensor) and mask.dim() == 2))
        and prepared["input_ids"].device == input_ids.device
    )


def _is_regular(model: PreTrainedModel) -> bool:
    """Decide whether a model without an encoder prepares its inputs by the common functions of transformers."""
    common = (GenerationMixin.prepare_inputs_for_generation, GenerationMixin._update_model_kwargs_for_generation)
    inherited = [getattr(getattr(model, function.__name__), "__func__", None) is function for function in common]
    return all(inherited) and not model.config.is_encoder_decoder and not model.is_remote_code()


def _moved(values: Tensor, row: int, count: int, dim: int) -> Tensor:
    """Copy (B, ...) values and move those of a row to the right along a dimension; what is left of them stays."""
    moved = values.clone()
    size = values.shape[dim] - count
    moved[row].narrow(dim - 1, count, size).copy_(values[row].narrow(dim - 1, 0, size))
    return moved
