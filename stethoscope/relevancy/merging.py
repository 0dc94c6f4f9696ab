"""Which vision tokens each image token of the language model is made from, found without knowing the family.

With all mixing between vision tokens switched off (attention gives zero), every vision token can reach one image token
at most: its own. The gradient of a sum of image tokens, weighted by their numbers, then tells the number. So class
tokens, feature layers, merged patches, tiles, dropped padding and permuted windows need no rule of their own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stethoscope.capture import Listener, Site, record
from stethoscope.errors import CapabilityError

_known: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = WeakKeyDictionary()
_MOST = 64  # shapes of inputs that are remembered of a model
_BASE, _BASE_HALF = 2048, 32  # image tokens are numbered in digits that the precision can tell apart


class _Reached(Exception):
    """The language model has been reached; the rest of the pass is not needed."""


class _Trails(Listener):
    def __init__(self, image: Tensor) -> None:
        self._image, self._first = image, ""
        self.tags: list[Tensor] = []
        self.numbers: Tensor | None = None

    def wants(self, site: Site) -> bool:
        return site.role in ("vision", "language")

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
        if site.role == "language":
            seen = query[0, :, self._image.to(query.device)].float()  # a query depends on its own embedding alone
            some = torch.rand(seen.shape[::2], generator=torch.Generator().manual_seed(0)) + 0.5
            self.numbers = torch.einsum("hnd,hd->n", seen, some.to(seen.device))
            raise _Reached
        batch, _, queries, _ = query.shape
        output = value.new_zeros(batch, queries, query.shape[1], value.shape[-1])
        self._first = self._first or site.name
        if site.name == self._first:
            self.tags.append(output.requires_grad_())
        return output, None


def merging(model: PreTrainedModel, inputs: Mapping[str, Tensor], image: Tensor) -> Tensor:
    """Which image token every token of the vision tower is merged into; found once for inputs of the same shape.

    Args:
        image: (N,) positions of the image tokens in the prompt.

    Returns:
        (M,) int64 on the CPU, numbers of image tokens, -1 for vision tokens that reach none (class token, padding).
        The tower's own order: crops, or windows, one after another.

    Raises:
        CapabilityError: a vision token reaches several image tokens, or an image token has no trail where all should.
    """
    known, key = _known.setdefault(model, {}), _key(model, inputs, len(image))
    if key not in known:
        if len(known) >= _MOST:
            known.clear()
        known[key] = _found(model, inputs, image)
    return known[key]


def _key(model: PreTrainedModel, inputs: Mapping[str, Tensor], images: int) -> str:
    """What merging depends on: the structure of the model, the shape of pictures, and grids, sizes and masks."""
    text = inputs["input_ids"].shape
    parts = [repr(images), model.config.to_json_string(), str(model.dtype)]
    for name, value in sorted(inputs.items()):
        if not isinstance(value, Tensor) or value.shape == text:
            continue  # the text, which no picture's tokens depend on
        parts.append(f"{name} {tuple(value.shape)} {value.dtype}")
        if not value.is_floating_point():
            parts.append(hashlib.sha256(value.cpu().contiguous().numpy().tobytes()).hexdigest())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _found(model: PreTrainedModel, inputs: Mapping[str, Tensor], image: Tensor) -> Tensor:
    """``merging`` by a pass of its own."""
    trails = _Trails(image)
    try:
        with record(model, trails):
            model(**inputs, use_cache=False)
    except _Reached:
        pass
    if trails.numbers is None or not trails.numbers.requires_grad:
        raise CapabilityError(f"{type(model).__name__}: vision tokens do not reach the language model as image tokens")
    reached = _sent(trails, torch.ones(len(image)))
    base = _BASE_HALF if trails.tags[0].dtype in (torch.bfloat16, torch.float16) else _BASE
    owner, place, rest = torch.zeros(len(reached)), 1, torch.arange(len(image))
    power = (reached * reached).sum(-1)
    found = power > 0
    while int(rest.max()) > 0 or place == 1:
        digit = (_sent(trails, (rest % base).float()) * reached).sum(-1)[found] / power[found]
        if (digit - digit.round()).abs().max() > 0.2:
            raise CapabilityError(f"{type(model).__name__}: a vision token is spread over several image tokens")
        owner[found] += digit.round() * place
        place, rest = place * base, rest // base
    return torch.where(found, owner, -1.0).long()


def _sent(trails: _Trails, weights: Tensor) -> Tensor:
    """Gradient (M, D) of the weighted sum of image tokens at every vision token."""
    weights = weights.to(trails.numbers.device)
    grads = torch.autograd.grad(trails.numbers, trails.tags, weights, retain_graph=True)
    return torch.cat([grad.flatten(2).flatten(0, 1).float().cpu() for grad in grads])


def spread(shares: Tensor, owner: Tensor) -> Tensor:
    """Relevancy of image tokens spread evenly over the vision tokens that each merges.

    >>> spread(torch.tensor([1.0, 4.0]), torch.tensor([-1, 0, 1, 1]))
    tensor([0., 1., 2., 2.])

    Args:
        shares: (..., N). ``owner``: (M,), see ``merging``.

    Returns:
        (..., M).
    """
    owner = owner.to(shares.device)
    merged = owner >= 0
    count = torch.bincount(owner[merged], minlength=shares.shape[-1]).clamp(min=1)
    return torch.where(merged, (shares / count)[..., owner.clamp(min=0)], 0.0)
