"""Route the attention of every model family through one function: SDPA, or the active recorder.

The function is registered with transformers under ``NAME`` together with SDPA's mask function, so masks always have
one form; ``additive_mask`` converts it to the mask that the eager attention of a model file adds to its scores,
including the causal mask that SDPA omits. ``record`` selects the function within one ``with`` block.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from stethoscope.core.errors import CaptureError
from stethoscope.tracing.model_parts import ROLES, Site, modules_of, sites

NAME = "stethoscope"
SMALL_MAP = 2**20
"""Entries of a map up to which eager attention takes no longer than SDPA."""


class AttentionCall(NamedTuple):
    """One call of an attention module.

    Attributes:
        site: the module's place in the model.
        module: the module.
        query: (B, heads, q, d).
        key: (B, key-value heads, k, d).
        value: (B, key-value heads, k, d).
        mask: in SDPA's form: boolean, additive or None.
        options: keyword arguments of the model file (scaling, softcap, position_bias, ...).
        causal: whether queries see no later keys although there is no mask, see ``is_causal``.
    """

    site: Site
    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    options: dict[str, Any]
    causal: bool

    def sdpa(self) -> tuple[Tensor, Tensor | None]:
        """Compute the output (B, q, heads, d) as a model without a recorder does; see ``plain_attention``."""
        return plain_attention(self.module, self.query, self.key, self.value, self.mask, **self.options)

    def eager(self) -> tuple[Tensor, Tensor]:
        """Compute the output and the whole map (B, heads, q, k); see ``eager_attention``."""
        return eager_attention(self.module, self.query, self.key, self.value, self.mask, **self.options)

    def eager_rows(self, rows: Tensor) -> Tensor:
        """Compute the rows (B, T) of the map, (B, heads, T, k); see the function ``eager_rows``."""
        return eager_rows(self.module, rows, self.query, self.key, self.value, self.mask, **self.options)


class AttentionRecorder:
    """Receives the attention calls of a ``record`` block; subclasses choose calls and reduce their maps at once.

    Attributes:
        roles: roles of the modules whose calls come to ``forward``; calls of the others go to SDPA.
        rows: (B, T) positions of the rows of the map that are computed beside SDPA's output; None for eager attention
            and its whole map.
        observes: calls come to ``observe`` instead, and SDPA computes them.
    """

    roles: Collection[str] = ROLES
    rows: Tensor | None = None
    observes: bool = False

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """Compute one call and pass its map, or the chosen rows of it, to ``on_weights``.

        Returns:
            The output (B, q, heads, d) and the map or None, as attention functions of transformers return them.
        """
        if self.rows is None or self.rows.shape[1] == call.query.shape[2]:
            output, weights = call.eager()
        else:
            (output, _), weights = call.sdpa(), call.eager_rows(self.rows)
        self.on_weights(call.site, weights)
        return output, weights if self.rows is None else None

    def observe(self, site: Site, module: nn.Module, query: Tensor, key: Tensor, options: dict[str, Any]) -> None:
        """Look at one call, see ``AttentionCall``: a quarter of the time of ``forward``, which decoding steps feel."""

    def on_weights(self, site: Site, weights: Tensor) -> None:
        """Reduce one map (B, heads, q or T, k), whose rows multiply the values. Keep no reference to it."""

    def finish(self) -> None:
        """Check the recording at the end of a block without errors.

        Raises:
            CaptureError: an expected call was not recorded.
        """


@dataclass(frozen=True)
class Recording:
    """A recorder and the modules of the model that it records."""

    recorder: AttentionRecorder
    sites: dict[int, Site]


_Settings: TypeAlias = list[tuple[PreTrainedConfig, str | None]]


@dataclass
class _Selection:
    """The attention settings of a model's configs before ``selected`` and within, and the number of open blocks."""

    before: _Settings
    within: _Settings
    users: int = 0


_active: ContextVar[Recording | None] = ContextVar("stethoscope_recording", default=None)
_selections: WeakKeyDictionary[nn.Module, _Selection] = WeakKeyDictionary()


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Compute attention; transformers calls this function in every attention module of every family."""
    recording = _active.get()
    if recording is not None:
        site, recorder = recording.sites.get(id(module)), recording.recorder
        if site is not None and site.role in recorder.roles:
            if recorder.observes:
                recorder.observe(site, module, query, key, kwargs)
                return plain_attention(module, query, key, value, attention_mask, **kwargs)
            causal = attention_mask is None and is_causal(module, query.shape[2], kwargs.get("is_causal"))
            call = AttentionCall(site, module, query, key, value, attention_mask, kwargs, causal)
            return recorder.forward(call)
    return plain_attention(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def plain_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """SDPA, or the model file's eager attention where SDPA cannot express the call (soft-capping, sinks)."""
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:  # they change the scores
        return eager_attention(module, query, key, value, mask, **kwargs)
    one_row = query.shape[2] == 1 and query.shape[1] == key.shape[1] and not kwargs.get("dropout")
    if one_row and kwargs.get("position_bias") is None and kwargs.get("cache") is None:
        # all that transformers' function does in a decoding step, in two thirds of the time
        output = scaled_dot_product_attention(query, key, value, mask, scale=kwargs.get("scaling"))
        return output.transpose(1, 2).contiguous(), None
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


def attention_and_map(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    needs_map: bool,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute the output (B, q, heads, d), and the map (B, heads, q, k) where it is needed or costs nothing."""
    eager = needs_map or query.shape[:3].numel() * key.shape[2] <= SMALL_MAP
    return (eager_attention if eager else plain_attention)(module, query, key, value, mask, **kwargs)


def eager_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Call the model file's own eager attention, with its scaling, bias, soft-capping and grouped heads.

    Args:
        module: the attention module.
        query: (B, heads, q, d).
        key: (B, key-value heads, k, d).
        value: (B, key-value heads, k, d).
        mask: in SDPA's form, for all queries.
        **kwargs: further arguments of the model file.

    Returns:
        The output (B, q, heads, d) and the map (B, heads, q, k).

    Raises:
        CaptureError: the file has no such function, or it returned no map.
    """
    output, weights = _eager_forward(module)(
        module, query, key, value, additive_mask(module, query, key, mask, kwargs.get("is_causal")), **kwargs
    )
    return output, _present(weights, module)


def eager_rows(
    module: nn.Module, rows: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> Tensor:
    """Compute chosen rows of the map of ``eager_attention`` without the other rows.

    Args:
        module: the attention module.
        rows: (B, T) query positions, on any device.
        query: (B, heads, q, d).
        key: (B, key-value heads, k, d).
        value: (B, key-value heads, k, d).
        mask: in SDPA's form, for all queries.
        **kwargs: further arguments of the model file.

    Returns:
        (B, heads, T, k) attention weights in the dtype of the model.
    """
    rows = rows.to(query.device)
    mask = additive_mask(module, query, key, mask, kwargs.get("is_causal"), rows)
    if kwargs.get("position_bias") is not None:
        kwargs["position_bias"] = take_rows(kwargs["position_bias"], rows)
    weights = _eager_forward(module)(module, take_rows(query, rows), key, value, mask, **kwargs)[1]
    return _present(weights, module)


def additive_mask(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    causal: bool | None = None,
    rows: Tensor | None = None,
) -> Tensor | None:
    """Convert a mask in SDPA's form to the mask that eager attention adds to its scores.

    Where SDPA gets no mask it masks by its ``is_causal`` flag. Eager attention without a mask would attend to later
    tokens.

    Args:
        module: the attention module.
        query: (B, heads, q, d).
        key: (B, key-value heads, k, d).
        mask: in SDPA's form, for all queries; None for SDPA's own rule.
        causal: argument ``is_causal`` of the call; None for the module's own flag.
        rows: (B, T) query positions to keep; all of them by default.

    Returns:
        (B or 1, heads or 1, q or T, k) of 0 and the lowest finite number, or None when nothing is masked.
    """
    queries, keys = query.shape[2], key.shape[2]
    if mask is None:
        if not is_causal(module, queries, causal):
            return None
        positions = torch.arange(queries, device=query.device)[None] if rows is None else rows
        mask = torch.arange(keys, device=query.device) <= positions[:, None, :, None]
    elif rows is not None:
        mask = take_rows(mask, rows)
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    return mask


def is_causal(module: nn.Module, queries: int, flag: bool | None) -> bool:
    """Decide whether a call without a mask is causal, by transformers' rule: several queries, and the flag says so.

    Args:
        module: the attention module, whose own flag counts where the call has none.
        queries: their number.
        flag: argument ``is_causal`` of the call.
    """
    return queries > 1 and bool(getattr(module, "is_causal", True) if flag is None else flag)


def take_rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """Select positions of the last but one dimension, per sample.

    Args:
        tensor: (B or 1, ..., q, d).
        rows: (B, T) positions.

    Returns:
        (B, ..., T, d).

    >>> take_rows(torch.arange(6).view(1, 3, 2), torch.tensor([[2, 0]]))
    tensor([[[4, 5],
             [0, 1]]])
    """
    batch, count = rows.shape
    tensor = tensor.expand(batch, *tensor.shape[1:])
    index = rows.view(batch, *[1] * (tensor.dim() - 3), count, 1)
    return tensor.gather(-2, index.expand(*tensor.shape[:-2], count, tensor.shape[-1]))


def last_row(states: Tensor) -> Tensor:
    """Return the last of (..., n, d) states, (..., 1, d), which keeps no others in memory."""
    return states if states.shape[-2] == 1 else states[..., -1:, :].clone()


def each_row(batch: Tensor) -> Sequence[Tensor]:
    """Split (B, ...) into B tensors (1, ...); a batch of one is left as it is, because splitting takes 10 us."""
    return batch.split(1) if batch.shape[0] > 1 else (batch,)


@contextmanager
def record(model: PreTrainedModel, recorder: AttentionRecorder) -> Iterator[AttentionRecorder]:
    """Pass the attention calls of one forward pass to a recorder; the model is restored afterwards, even on errors.

    Raises:
        CaptureError: another recording is active, or a call that the recorder expects is missing.
    """
    with selected(model), capturing(Recording(recorder, sites(model))):
        yield recorder
    recorder.finish()


@contextmanager
def selected(model: PreTrainedModel) -> Iterator[None]:
    """Make the model call ``attention``, which is SDPA unless a recorder is active. Blocks may be nested."""
    selection = _selections.get(model)
    if selection is None or not selection.users:
        selection = _select(model, selection)
    selection.users += 1
    try:
        yield
    finally:
        selection.users -= 1
        if not selection.users:
            _apply(selection.before)


def _select(model: PreTrainedModel, last: _Selection | None) -> _Selection:
    """Set the attention of a model; by hand, a tenth of the time, where the ``last`` block began with the same."""
    before = _settings(model)
    if last is not None and _identities(last.before) == _identities(before):
        _apply(last.within)
        return last
    model.set_attn_implementation(NAME)
    _selections[model] = _Selection(before, _settings(model))
    return _selections[model]


def _settings(model: PreTrainedModel) -> _Settings:
    # transformers looks up every other attribute of a config in Python
    return [(config, object.__getattribute__(config, "_attn_implementation_internal")) for config in _configs(model)]


def _identities(settings: _Settings) -> list[tuple[int, str | None]]:
    return [(id(config), implementation) for config, implementation in settings]


def _apply(settings: _Settings) -> None:
    for config, implementation in settings:
        config._attn_implementation_internal = implementation


def uses_sdpa(model: PreTrainedModel) -> bool:
    """Tell whether all parts of a model call SDPA, so that a recorder changes no result."""
    return all(implementation in ("sdpa", NAME) for _, implementation in _settings(model))


@contextmanager
def capturing(recording: Recording) -> Iterator[None]:
    """Pass the attention calls of a model that is ``selected`` to a recorder.

    Raises:
        CaptureError: another recording is active.
    """
    if _active.get() is not None:
        raise CaptureError("a recording is already active; finish it before the next")
    token = _active.set(recording)
    try:
        yield
    finally:
        _active.reset(token)


def _configs(model: nn.Module) -> list[PreTrainedConfig]:
    """List the configs that choose the attention: those of all submodels and their sub-configs, each once."""
    configs: dict[int, PreTrainedConfig] = {}
    waiting = [vars(m)["config"] for m in modules_of(model) if isinstance(vars(m).get("config"), PreTrainedConfig)]
    while waiting:
        config = waiting.pop()
        if id(config) not in configs:
            configs[id(config)] = config
            parts = (getattr(config, key, None) for key in type(config).sub_configs)
            waiting.extend(part for part in parts if isinstance(part, PreTrainedConfig))
    return list(configs.values())


def _eager_forward(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    for cls in type(module).__mro__:
        function = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    raise CaptureError(f"no eager attention in the file of {type(module).__name__}: its maps cannot be recorded")


def _present(weights: Tensor | None, module: nn.Module) -> Tensor:
    if weights is None:
        recording = _active.get()
        name = recording.sites[id(module)].name if recording else type(module).__name__
        raise CaptureError(f"{name} gave no attention map (None)")
    return weights
