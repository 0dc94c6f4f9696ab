"""Align vision tokens with the image tokens of the language model by gradient probing, for any model family.

With all mixing between vision tokens switched off (attention returns zero), a vision token can reach at most one image
token. The gradient of a sum of image tokens, weighted by their indices, reveals the index. So class tokens, feature
layers, merged patches, tiles, dropped padding and permuted windows need no special rules. Only an image that is resized
after the tower (see ``scaled_alignment``) mixes tokens in another way.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedConfig, PreTrainedModel

from stethoscope.core.cache import LRUCache
from stethoscope.core.errors import CapabilityError
from stethoscope.tracing.hooks import AttentionCall, AttentionRecorder, record
from stethoscope.tracing.model_parts import frozen, outer_layers, route_layers, sites
from stethoscope.tracing.token_spans import image_layout

if TYPE_CHECKING:
    from stethoscope.relevancy.gradient_recorder import AttentionGradRecorder

_CACHE_SIZE = 64  # input shapes per model
_BASES, _BASES_HALF = (2048,), (32, 2)  # bases of the digits of image-token indices that the precision resolves


@dataclass(frozen=True)
class TokenAlignment:
    """Alignment of vision tokens with image tokens, as E weighted links.

    Attributes:
        size: number of vision tokens M, in the tower's order: crops, or windows, one after another.
        vision: (E,) int64 indices of vision tokens. Those that reach no image token (class token, padding) have none.
        image: (E,) int64 indices of image tokens.
        weight: (E,) float32 weights of the vision tokens in the image token.
    """

    size: int
    vision: Tensor
    image: Tensor
    weight: Tensor

    @classmethod
    def of(cls, owner: Tensor) -> TokenAlignment:
        """Build the alignment of vision tokens with one image token each, or none.

        Args:
            owner: (M,) index of the image token of each vision token, -1 for none. Vision tokens of an image token have
                equal weights.
        """
        vision = (owner >= 0).nonzero()[:, 0]
        image = owner[vision]
        return cls(len(owner), vision, image, 1 / torch.bincount(image)[image].float())

    def spread(self, shares: Tensor) -> Tensor:
        """Spread the relevancy (..., N) of image tokens over their vision tokens, (..., M).

        >>> TokenAlignment.of(torch.tensor([-1, 0, 1, 1])).spread(torch.tensor([1.0, 4.0]))
        tensor([0., 1., 2., 2.])
        """
        linked = shares[..., self.image.to(shares.device)] * self.weight.to(shares)
        return shares.new_zeros(*shares.shape[:-1], self.size).index_add(-1, self.vision.to(shares.device), linked)


_alignments: WeakKeyDictionary[nn.Module, LRUCache] = WeakKeyDictionary()


class _LanguageModelReached(Exception):
    """Ends the probing pass once it has reached the language model."""


class _AlignmentProbe(AttentionRecorder):
    """Replaces vision attention by zeros that require gradients, and projects the image tokens.

    Attributes:
        tags: outputs of the first vision layer, the leaves of the graph.
        projections: (N,) random projections of the image tokens.
    """

    roles = ("vision", "language")

    def __init__(self, image: Tensor) -> None:
        self._image, self._first = image, ""
        self.tags: list[Tensor] = []
        self.projections: Tensor | None = None

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        site, query, value = call.site, call.query, call.value
        if site.role == "language":
            queries = query[0, :, self._image.to(query.device)].float()  # a query depends only on its own embedding
            directions = torch.rand(queries.shape[::2], generator=torch.Generator().manual_seed(0)) + 0.5
            self.projections = torch.einsum("hnd,hd->n", queries, directions.to(queries.device))
            raise _LanguageModelReached
        output = value.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
        self._first = self._first or site.name
        if site.name == self._first:
            self.tags.append(output.requires_grad_() if torch.is_grad_enabled() else output)
        return output, None

    def pass_gradients(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call a vision layer behind the tags so that gradients pass it unchanged, without a graph of it.

        That loses nothing: the layer works on every token by itself, as attention does not mix them.
        """
        tags = len(self.tags)
        states = [part for part in tree_leaves((arguments, options)) if isinstance(part, Tensor) and part.requires_grad]
        if len(states) == 1:
            with torch.no_grad():
                result = function(*arguments, **options)
            floats = [part for part in tree_leaves(result) if isinstance(part, Tensor) and part.is_floating_point()]
            if len(self.tags) == tags and all(part.shape == states[0].shape for part in floats):
                passed = states[0] - states[0].detach()

                def with_gradient(part: Any) -> Any:
                    return part + passed.to(part) if any(part is value for value in floats) else part

                return tree_map(with_gradient, result)
            del self.tags[tags:]
        return function(*arguments, **options)


def probe_alignment(model: PreTrainedModel, inputs: Mapping[str, Tensor], image: Tensor) -> TokenAlignment:
    """Find the image token that each vision token is merged into, once for inputs of the same shape.

    Args:
        model: the model.
        inputs: keyword arguments of its forward pass, of one sample.
        image: (N,) positions of the image tokens in the prompt.

    Raises:
        CapabilityError: a vision token reaches several image tokens in an unknown way, or none reaches any.
    """
    cache, key = _alignments.setdefault(model, LRUCache(_CACHE_SIZE)), _cache_key(model, inputs, len(image))
    links = cache.get(key)
    return cache.put(key, _probe(model, inputs, image)) if links is None else links


def _cache_key(model: PreTrainedModel, inputs: Mapping[str, Tensor], images: int) -> str:
    """Digest what an alignment depends on: config, dtype, image shapes, grids, sizes and masks."""
    text = inputs["input_ids"].shape
    parts = [repr(images), *_config_items(model.config), str(model.dtype)]
    for name, value in sorted(inputs.items()):
        if not isinstance(value, Tensor) or value.shape == text:
            continue  # vision tokens do not depend on the text
        parts.append(f"{name} {tuple(value.shape)} {value.dtype}")
        if not value.is_floating_point():
            parts.append(hashlib.sha256(value.cpu().contiguous().numpy().tobytes()).hexdigest())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _config_items(config: PreTrainedConfig) -> Iterator[str]:
    """Yield the settings of a config and its sub-configs; ``to_json_string`` is slower than a small model."""
    for name, value in sorted(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            yield from _config_items(value)
        elif not name.startswith("_"):
            yield f"{name}={value!r}"


def _probe(model: PreTrainedModel, inputs: Mapping[str, Tensor], image: Tensor) -> TokenAlignment:
    """Find the alignment by a forward pass, without the cache."""
    probe, roles = _AlignmentProbe(image), sites(model)
    vision = [layer for layer in outer_layers(model) if roles[id(layer)].role == "vision"]
    try:
        with frozen(model), record(model, probe), route_layers(vision, probe.pass_gradients):
            model(**inputs, use_cache=False)
    except _LanguageModelReached:
        pass
    if probe.projections is None or not probe.projections.requires_grad:
        raise CapabilityError(f"{type(model).__name__}: vision tokens do not reach the language model as image tokens")
    half = probe.tags[0].dtype in (torch.bfloat16, torch.float16)
    for base in _BASES_HALF if half else _BASES:
        owner = _image_tokens_reached(probe, len(image), base)
        if owner is not None:
            return TokenAlignment.of(owner)
    links = scaled_alignment(model.config, inputs, len(image))
    if links is None:
        raise CapabilityError(f"{type(model).__name__}: a vision token is spread over several image tokens")
    return TokenAlignment(sum(tag.shape[0] * tag.shape[1] for tag in probe.tags), *links)


def _image_tokens_reached(probe: _AlignmentProbe, images: int, base: int) -> Tensor | None:
    """Read off the image token that each vision token reaches, digit by digit.

    Args:
        probe: after its pass.
        images: number of image tokens.
        base: of the digits.

    Returns:
        (M,) int64 index of the image token, -1 for none; None where a vision token reaches several.
    """
    reached = _probe_gradients(probe, torch.ones(images))
    owner, unit, rest = torch.zeros(len(reached)), 1, torch.arange(images)
    power = (reached * reached).sum(-1)
    linked = power > 0
    while int(rest.max()) > 0 or unit == 1:
        digit = (_probe_gradients(probe, (rest % base).float()) * reached).sum(-1)[linked] / power[linked]
        if (digit - digit.round()).abs().max() > 0.2:
            return None
        owner[linked] += digit.round() * unit
        unit, rest = unit * base, rest // base
    return torch.where(linked, owner, -1.0).long()


def _probe_gradients(probe: _AlignmentProbe, weights: Tensor) -> Tensor:
    """Compute the gradient (M, D) of the weighted sum of image tokens at every vision token."""
    if probe.projections is None:
        raise CapabilityError("the probing pass did not reach the language model")
    weights = weights.to(probe.projections.device)
    grads = torch.autograd.grad(probe.projections, probe.tags, weights, retain_graph=True)
    return torch.cat([grad.flatten(2).flatten(0, 1).float().cpu() for grad in grads])


def image_token_kind(
    model: PreTrainedModel, recorder: AttentionGradRecorder, samples: int, images: int, encoder_decoder: bool
) -> str:
    """Classify how the image tokens are computed from vision tokens.

    Args:
        model: the model.
        recorder: of a forward pass.
        samples: number of samples in that pass.
        images: number of image tokens of each.
        encoder_decoder: whether the language model has an encoder.

    Returns:
        ``queries`` (of a Q-Former), ``joint`` (queries of an abstractor, which attend to themselves and the vision
        tokens), ``merged`` (each vision token into one image token) or ``same`` (a tower without attention).

    Raises:
        CapabilityError: they are computed in a way that is not supported.
    """
    name, roles = type(model).__name__, recorder.layers
    if "cross" in roles and not encoder_decoder:
        raise CapabilityError(f"{name}: relevancy of models that cross-attend to the image is not supported")
    if "connector" in roles:
        if all("visual_abstractor" in site for site in roles["connector"]) and _query_count(recorder, samples, images):
            return "joint"
        if not all("qformer" in site for site in roles["connector"]):
            raise CapabilityError(f"{name}: relevancy through {roles['connector'][0]} is not supported")
        return "queries"
    if encoder_decoder:
        raise CapabilityError(f"{name}: an encoder-decoder model is supported only with a Q-Former")
    if "vision" not in roles:
        sites_by_id = sites(model)
        tower = (module for module in model.modules() if sites_by_id[id(module)].role == "vision")
        if any("Attention" in type(module).__name__ for module in tower):
            raise CapabilityError(f"{name}: the attention of its vision tower cannot be recorded")
        return "same"
    if len({recorder.sizes[site] for site in roles["vision"]}) != 1:
        raise CapabilityError(f"{name}: the layers of the vision tower have different numbers of tokens")
    return "merged"


def _query_count(recorder: AttentionGradRecorder, samples: int, images: int) -> int:
    """Count the queries of an abstractor, the first image tokens; 0 where its maps have other columns."""
    connector, vision = (
        {recorder.sizes[site] for site in recorder.layers.get(role, ())} for role in ("connector", "vision")
    )
    count = (connector.pop() - vision.pop()) // samples if len(connector) == len(vision) == 1 else 0
    return count if 0 < count <= images else 0


def first_sample(inputs: Mapping[str, Tensor], samples: int) -> Mapping[str, Tensor]:
    """Select the inputs of the first of so many samples."""
    return inputs if samples == 1 else {name: value[:1] for name, value in inputs.items()}


def scaled_alignment(config: Any, inputs: Mapping[str, Tensor], count: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Compute the links of an image that is resized after the vision tower (LLaVA-NeXT, LLaVA-OneVision).

    Args:
        config: the model's config.
        inputs: the processor's output for one image.
        count: number of image tokens.

    Returns:
        Indices of vision tokens, of image tokens, and weights, (E,) each; None for any other kind of model.
    """
    grids, separators = image_layout(config, inputs, count)
    if len(grids) != 2 or not separators:
        return None
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    (side, _), (rows, columns) = grids
    size = inputs["image_sizes"][0].tolist()
    tiles = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
    whole = torch.arange(side * side)  # the first crop is the whole image, not resized
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
    """Compute the (after, before) weights of interpolation along one side; rows sum to 1."""
    return torch.nn.functional.interpolate(torch.eye(before)[None], size=after, mode="linear")[0].T


def arrange_patches(
    config: Any, inputs: Mapping[str, Tensor], vision: Tensor, alignment: TokenAlignment | None
) -> tuple[Tensor, Tensor | None]:
    """Order vision tokens as in ``pixel_values``, and shape their patches as tiles.

    Qwen's towers sort patches by window. Their rows of ``pixel_values`` are patches, as many per image token as it
    merges and in the order of the image tokens; a window keeps the patches of one image token together and in order.

    Args:
        config: the model's config.
        inputs: the processor's output for one image.
        vision: (T, L, M) values of the vision tokens, in the tower's order.
        alignment: of vision and image tokens; None where the tower keeps the order of ``pixel_values``.

    Returns:
        (T, L, M) ordered values, and (T, L, tiles, rows, columns) or None where they form no grid.
    """
    if alignment is not None and "image_grid_thw" in inputs:
        vision = vision[..., alignment.image.argsort(stable=True)]
    return vision, _patch_tiles(config, inputs, vision)


def _patch_tiles(config: Any, inputs: Mapping[str, Tensor], vision: Tensor) -> Tensor | None:
    """Reshape vision tokens (T, L, M) to (T, L, tiles, rows, columns); None where they form no grid."""
    if "image_grid_thw" in inputs:
        return _unmerge_patches(config, inputs["image_grid_thw"].tolist(), vision)
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


def _unmerge_patches(config: Any, grids: list[list[int]], vision: Tensor) -> Tensor | None:
    """Restore the grid of Qwen's patches, which come in blocks that are merged into one token."""
    frames, rows, columns = grids[0]
    merge = getattr(getattr(config, "vision_config", None), "spatial_merge_size", 1)
    if len(grids) != 1 or vision.shape[-1] != frames * rows * columns:
        return None
    blocks = vision.unflatten(-1, (frames, rows // merge, columns // merge, merge, merge))
    return blocks.transpose(-3, -2).flatten(-4, -3).flatten(-2)


def _patch_size(config: Any) -> tuple[int, int] | None:
    """Return rows and columns of a patch in pixels; None where the config does not state them."""
    size = getattr(getattr(config, "vision_config", None), "patch_size", None)
    if size is None:
        return None
    return tuple(size) if isinstance(size, (list, tuple)) else (size, size)
