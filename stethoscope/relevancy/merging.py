"""Which vision tokens each image token of the language model is made from, found without knowing the family.

With all mixing between vision tokens switched off (attention gives zero), every vision token can reach one image token
at most: its own. The gradient of a sum of image tokens, weighted by their numbers, then tells the number. So class
tokens, feature layers, merged patches, tiles, dropped padding and permuted windows need no rule of their own. Only a
picture that is scaled down behind the tower (see ``scaling``) mixes tokens by itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from stethoscope.core.cache import LRUCache
from stethoscope.errors import CapabilityError
from stethoscope.relevancy.scaling import scaled
from stethoscope.tracing.capture import Listener, Site, record

_MOST = 64  # shapes of inputs that are remembered of a model
_BASES, _BASES_HALF = (2048,), (32, 2)  # image tokens are numbered in digits that the precision can tell apart


@dataclass(frozen=True)
class Merging:
    """E links between vision tokens and the image tokens that they are merged into.

    Attributes:
        size: number of vision tokens M, in the tower's own order: crops, or windows, one after another.
        vision: (E,) int64 numbers of vision tokens. Those that reach no image token (class token, padding) have none.
        image: (E,) int64 numbers of image tokens.
        weight: (E,) float32 share of the image token that the vision token makes up.
    """

    size: int
    vision: Tensor
    image: Tensor
    weight: Tensor

    @classmethod
    def of(cls, owner: Tensor) -> Merging:
        """Every vision token has one image token, ``owner`` (M,), or none, -1; those of one have equal shares."""
        vision = (owner >= 0).nonzero()[:, 0]
        image = owner[vision]
        return cls(len(owner), vision, image, 1 / torch.bincount(image)[image].float())

    def spread(self, shares: Tensor) -> Tensor:
        """Relevancy (..., N) of image tokens over the vision tokens that each merges, (..., M).

        >>> Merging.of(torch.tensor([-1, 0, 1, 1])).spread(torch.tensor([1.0, 4.0]))
        tensor([0., 1., 2., 2.])
        """
        sent = shares[..., self.image.to(shares.device)] * self.weight.to(shares)
        return shares.new_zeros(*shares.shape[:-1], self.size).index_add(-1, self.vision.to(shares.device), sent)


_known: WeakKeyDictionary[nn.Module, LRUCache] = WeakKeyDictionary()


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


def merging(model: PreTrainedModel, inputs: Mapping[str, Tensor], image: Tensor) -> Merging:
    """Which image tokens the tokens of the vision tower are merged into; found once for inputs of the same shape.

    Args:
        image: (N,) positions of the image tokens in the prompt.

    Raises:
        CapabilityError: a vision token reaches several image tokens in a way that is not known, or none has a trail.
    """
    cache, key = _known.setdefault(model, LRUCache(_MOST)), _key(model, inputs, len(image))
    links = cache.get(key)
    return cache.put(key, _found(model, inputs, image)) if links is None else links


def _key(model: PreTrainedModel, inputs: Mapping[str, Tensor], images: int) -> str:
    """What merging depends on: the structure of the model, the shape of pictures, and grids, sizes and masks."""
    text = inputs["input_ids"].shape
    parts = [repr(images), *_facts(model.config), str(model.dtype)]
    for name, value in sorted(inputs.items()):
        if not isinstance(value, Tensor) or value.shape == text:
            continue  # the text, which no picture's tokens depend on
        parts.append(f"{name} {tuple(value.shape)} {value.dtype}")
        if not value.is_floating_point():
            parts.append(hashlib.sha256(value.cpu().contiguous().numpy().tobytes()).hexdigest())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _facts(config: PreTrainedConfig) -> Iterator[str]:
    """What a config and its sub-configs say; as JSON they take longer than a pass of a small model."""
    for name, value in sorted(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            yield from _facts(value)
        elif not name.startswith("_"):
            yield f"{name}={value!r}"


def _found(model: PreTrainedModel, inputs: Mapping[str, Tensor], image: Tensor) -> Merging:
    """``merging`` by a pass of its own."""
    trails = _Trails(image)
    try:
        with record(model, trails):
            model(**inputs, use_cache=False)
    except _Reached:
        pass
    if trails.numbers is None or not trails.numbers.requires_grad:
        raise CapabilityError(f"{type(model).__name__}: vision tokens do not reach the language model as image tokens")
    half = trails.tags[0].dtype in (torch.bfloat16, torch.float16)
    for base in _BASES_HALF if half else _BASES:
        owner = _owner(trails, len(image), base)
        if owner is not None:
            return Merging.of(owner)
    links = scaled(model.config, inputs, len(image))
    if links is None:
        raise CapabilityError(f"{type(model).__name__}: a vision token is spread over several image tokens")
    return Merging(sum(tag.shape[0] * tag.shape[1] for tag in trails.tags), *links)


def _owner(trails: _Trails, images: int, base: int) -> Tensor | None:
    """(M,) int64 the image token that each vision token reaches, -1 for none; None where one reaches several."""
    reached = _sent(trails, torch.ones(images))
    owner, place, rest = torch.zeros(len(reached)), 1, torch.arange(images)
    power = (reached * reached).sum(-1)
    found = power > 0
    while int(rest.max()) > 0 or place == 1:
        digit = (_sent(trails, (rest % base).float()) * reached).sum(-1)[found] / power[found]
        if (digit - digit.round()).abs().max() > 0.2:
            return None
        owner[found] += digit.round() * place
        place, rest = place * base, rest // base
    return torch.where(found, owner, -1.0).long()


def _sent(trails: _Trails, weights: Tensor) -> Tensor:
    """Gradient (M, D) of the weighted sum of image tokens at every vision token."""
    weights = weights.to(trails.numbers.device)
    grads = torch.autograd.grad(trails.numbers, trails.tags, weights, retain_graph=True)
    return torch.cat([grad.flatten(2).flatten(0, 1).float().cpu() for grad in grads])
