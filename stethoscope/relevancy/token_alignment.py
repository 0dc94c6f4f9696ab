"""Which vision tokens each image token of the language model is made from, found without knowing the family.

With all mixing between vision tokens switched off (attention gives zero), every vision token can reach one image token
at most: its own. The gradient of a sum of image tokens, weighted by their numbers, then tells the number. So class
tokens, feature layers, merged patches, tiles, dropped padding and permuted windows need no rule of their own. Only a
picture that is scaled down behind the tower (see ``scaling``) mixes tokens by itself.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from stethoscope.core.cache import LRUCache
from stethoscope.core.errors import CapabilityError
from stethoscope.tracing.hooks import AttentionCall, AttentionRecorder, Site, modules_of, record, sites
from stethoscope.tracing.token_spans import image_layout

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


class _Trails(AttentionRecorder):
    def __init__(self, image: Tensor) -> None:
        self._image, self._first = image, ""
        self.tags: list[Tensor] = []
        self.numbers: Tensor | None = None

    def matches(self, site: Site) -> bool:
        return site.role in ("vision", "language")

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        site, query, value = call.site, call.query, call.value
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


def scaled(config: Any, inputs: Mapping[str, Tensor], count: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Links between vision tokens and image tokens of such a picture.

    Args:
        config: the model's config.
        inputs: the processor's output for one picture.
        count: number of image tokens.

    Returns:
        Vision tokens, image tokens and the weights of their means, (E,) each; None for any other kind of model.
    """
    grids, separators = image_layout(config, inputs, count)
    if len(grids) != 2 or not separators:
        return None
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    (side, _), (rows, columns) = grids
    size = inputs["image_sizes"][0].tolist()
    tiles = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
    whole = torch.arange(side * side)  # the first crop is the whole picture, as it is
    cut = side * side + torch.arange(tiles[0] * tiles[1] * side * side).view(*tiles, side, side)
    together = unpad_image(cut.transpose(1, 2).reshape(1, tiles[0] * side, tiles[1] * side), size)[0]
    down, across = _bilinear(together.shape[0], rows), _bilinear(together.shape[1], columns)
    row, y = down.nonzero().T[:, :, None]
    column, x = across.nonzero().T[:, None]
    vision = together[y, x]
    image = side * side + row * (columns + 1) + column  # a newline token ends each row
    weight = down[row, y] * across[column, x]
    return (
        torch.cat([whole, vision.flatten()]),
        torch.cat([whole, image.flatten()]),
        torch.cat([torch.ones(len(whole)), weight.flatten()]),
    )


def _bilinear(before: int, after: int) -> Tensor:
    """(after, before) weights of interpolation along one side; rows sum to 1."""
    return torch.nn.functional.interpolate(torch.eye(before)[None], size=after, mode="linear")[0].T


def pixel_order(owner: Tensor, inputs: Mapping[str, Tensor]) -> Tensor | None:
    """Where the tower's tokens go in the order of ``pixel_values``; None where they are in it already.

    Qwen's towers sort patches by window. Their rows of ``pixel_values`` are patches, as many per image token as it
    merges and in the order of the image tokens; a window keeps the patches of one image token together and in order.

    Args:
        owner: (M,) the image token of each vision token; with windows every one has one.

    Returns:
        (M,) the tower's token for every patch.
    """
    return owner.argsort(stable=True) if "image_grid_thw" in inputs else None


def tiled(config: Any, inputs: Mapping[str, Tensor], vision: Tensor) -> Tensor | None:
    """The patches of vision tokens (T, L, M) as (T, L, tiles, rows, columns); None where they are no grid."""
    if "image_grid_thw" in inputs:
        return _of_blocks(config, inputs["image_grid_thw"].tolist(), vision)
    pixels, patch = inputs.get("pixel_values"), _patch_size(config)
    if pixels is None or pixels.dim() < 4 or patch is None:
        return None
    rows, columns = pixels.shape[-2] // patch[0], pixels.shape[-1] // patch[1]
    tiles = math.prod(pixels.shape[:-3])
    if vision.shape[-1] % tiles:
        return None
    classes = vision.shape[-1] // tiles - rows * columns
    if not 0 <= classes <= 1:
        return None
    return vision.unflatten(-1, (tiles, -1))[..., classes:].unflatten(-1, (rows, columns))


def _of_blocks(config: Any, grids: list[list[int]], vision: Tensor) -> Tensor | None:
    """Qwen's patches come in blocks of those that are merged into one token."""
    frames, rows, columns = grids[0]
    merge = getattr(getattr(config, "vision_config", None), "spatial_merge_size", 1)
    if len(grids) != 1 or vision.shape[-1] != frames * rows * columns:
        return None
    blocks = vision.unflatten(-1, (frames, rows // merge, columns // merge, merge, merge))
    return blocks.transpose(-3, -2).flatten(-4, -3).flatten(-2)


def _patch_size(config: Any) -> tuple[int, int] | None:
    size = getattr(getattr(config, "vision_config", None), "patch_size", None)
    if size is None:
        return None
    return tuple(size) if isinstance(size, (list, tuple)) else (size, size)


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
