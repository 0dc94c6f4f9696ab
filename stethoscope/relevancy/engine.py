"""Relevancy of answer tokens for any supported model: one forward pass, one backward pass per group of tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stethoscope.core.errors import CapabilityError, ConfigError, unknown
from stethoscope.relevancy.attention_backward import BUDGET, Blocks, Call
from stethoscope.relevancy.checkpointing import steps
from stethoscope.relevancy.grad_recorder import Maps, still
from stethoscope.relevancy.result import Layout, Relevancy, answer_logits, layout, shared_layout
from stethoscope.relevancy.rules import (
    RULES,
    Abar,
    BlockRows,
    LayerRows,
    QueryRows,
    Saliency,
    decoder_rows,
    through_queries,
    whole,
)
from stethoscope.relevancy.token_alignment import Merging, entering, merging, pixel_order, tiled
from stethoscope.tracing.hooks import record, selected, sites
from stethoscope.tracing.token_spans import tile_grids

if TYPE_CHECKING:
    from PIL.Image import Image

    from stethoscope.adapters.base import Adapter
    from stethoscope.core.types import Answer
    from stethoscope.tracing.trace import Encoded

SCOPES = ("row", "token")


LAYERS = ("all", "final")


_SEQUENCE = ("llm", "saliency")


"""Parts that lie along the sequence of prompt and answer."""


def relevancy_from_inputs(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    answer_ids: Sequence[int],
    *,
    scope: str = "row",
    rule: str = "eq10",
    layers: str = "all",
    tokens: Sequence[int] | None = None,
    budget: int = BUDGET,
    recompute: bool = True,
) -> Relevancy:
    """Relevancy of answer tokens from the exact inputs of a forward pass over prompt and answer.

    With A an attention map after softmax and G the gradient of a logit with respect to it, Abar = mean over heads of
    relu(G * A) and R_l = R_{l-1} + Abar_l R_{l-1}, R_0 = I; read is the row of R_l - I that predicts the token
    (Chefer et al. 2021, arXiv 2103.15679, equations 5-10).

    Args:
        model: a transformers model with an image and a text side; its weights may be frozen and are left as they are.
        inputs: keyword arguments of the forward pass, one sample, left padding allowed. For a decoder-only model
            ``input_ids`` ends with the answer; an encoder-decoder model has ``decoder_input_ids`` with its start
            token and the answer (without the last token of it, or with).
        answer_ids: the answer's token ids.
        scope: ``row``: the prompt's rows use the gradient of answer token 0, every later row that of the token it
            predicts; one backward pass. ``token``: all rows use the token's own gradient, as in the paper; one
            backward pass per token, each layer run again once for a group of tokens.
        rule: reading of equation 10, see ``rules.RULES``.
        layers: ``all`` for R after every layer of the language model, ``final`` for the last.
        tokens: which answer tokens, all by default.
        budget: bytes that attention maps and the gradients of tokens may take at once, about half for each. A larger
            one saves scope ``token`` some time on long sequences.
        recompute: keep only the inputs of layers and run them again in the backward pass. False takes less time and
            several times the memory in scope ``row``; scope ``token`` always runs them again.

    Raises:
        ConfigError: an option is wrong.
        DataError: the inputs do not fit the answer.
        CapabilityError: the model is of a kind that is not supported.
        CaptureError: a value is not finite; the layer is named.
    """
    for kind, value, known in (("scope", scope, SCOPES), ("rule", rule, RULES), ("layers", layers, LAYERS)):
        if value not in known:
            raise ConfigError(unknown(kind, str(value), known))
    with torch.inference_mode(False), torch.enable_grad(), still(model), selected(model):
        inputs = {name: value.clone() if value.is_inference() else value for name, value in inputs.items()}
        place, every = layout(model, inputs, answer_ids), layers == "all"
        return _relevancy(model, inputs, place, scope, rule, every, tokens, budget, recompute)[0]


def relevancies_from_inputs(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    answers: Sequence[Sequence[int]],
    budget: int = BUDGET,
    recompute: bool = True,
) -> list[Relevancy]:
    """``relevancy_from_inputs`` in scope ``row`` of several answers by one pass, the same as one by one.

    Nothing passes between samples, so that the gradient of the sum of all their logits is that of every sample's own.

    Args:
        model: a decoder-only model that reads causally, without a Q-Former, and whose vision tower takes pictures one
            by one.
        inputs: as for ``relevancy_from_inputs``, of B samples with one picture of one tile each. The prompts are of one
            length and have their image tokens at the same places; shorter answers are padded on the right.
        answers: B answers' token ids.
        budget, recompute: see ``relevancy_from_inputs``.

    Raises:
        DataError: the inputs do not fit the answers.
        CapabilityError, CaptureError: as ``relevancy_from_inputs``.
    """
    with torch.inference_mode(False), torch.enable_grad(), still(model), selected(model):
        inputs = {name: value.clone() if value.is_inference() else value for name, value in inputs.items()}
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])  # causal rows never see the padding
        place = shared_layout(model, inputs, answers)
        return _relevancy(model, inputs, place, "row", RULES[0], True, None, budget, recompute)


def _relevancy(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    place: Layout,
    scope: str,
    rule: str,
    every: bool,
    tokens: Sequence[int] | None,
    budget: int,
    recompute: bool,
) -> list[Relevancy]:
    """``relevancy_from_inputs`` of every sample with its options checked, where gradients may flow."""
    count = place.answer.shape[1]
    chosen = tuple(range(count)) if tokens is None else tuple(int(token) for token in tokens)
    if not all(0 <= token < count for token in chosen) or not chosen:
        raise ConfigError(f"tokens={list(chosen)} must be numbers of answer tokens, 0 to {count - 1}")
    maps = Maps(place.first + 1 if scope == "row" else None, budget, keep=scope == "row" and not recompute)
    with record(model, maps), entering(model, place.encoder_decoder) as heard, steps(model, maps.tape):
        logits = answer_logits(model, inputs, place)
    kind = _kind(model, maps, place)
    sample = inputs if len(place.counts) == 1 else {name: value[:1] for name, value in inputs.items()}
    merged = merging(model, sample, place.image) if kind == "merged" else None
    groups = [chosen] if scope == "row" else _groups(chosen, budget // 2 // maps.tape.width())
    passes = []
    with record(model, maps):  # for layers that run again
        for number, group in enumerate(groups, 1):
            # in scope row no token's gradient reaches the rows of another, so that all of them go in one pass
            of = [group] if scope == "row" else [(token,) for token in group]
            some = [_Pass(maps, place, kind, merged, tokens, rule, every) for tokens in of]
            end = max(group) + 1
            roots = [_sum(logits, place, end)] if scope == "row" else [logits[0, token] for token in group]
            maps.backward(roots, [one.receive for one in some], place.first + end, last=number == len(groups))
            passes += [one.result() for one in some]
    parts = {name: torch.cat([some[name] for some in passes], 2).transpose(1, 2).cpu() for name in passes[0]}
    seen = heard[0][:, place.image.to(heard[0].device)].to("cpu", torch.promote_types(heard[0].dtype, torch.float32))
    return [
        _result(
            model, sample, place, kind, chosen[:count], merged, _parts_of(parts, index, place) | {"image_embeds": one}
        )
        for index, (count, one) in enumerate(zip(place.counts, seen, strict=True))
    ]


def _sum(logits: Tensor, place: Layout, end: int) -> Tensor:
    """The sum of the first ``end`` logits of all answers."""
    there = torch.arange(end) < torch.tensor(place.counts)[:, None]
    return logits[:, :end][there.to(logits.device)].sum()


def _parts_of(parts: Mapping[str, Tensor], index: int, place: Layout) -> dict[str, Tensor]:
    """What belongs to one sample, without the padding behind its answer."""
    if len(place.counts) == 1:
        return {name: part[0] for name, part in parts.items()}
    count = place.counts[index]
    length = place.first + 1 + count
    return {name: part[index, :count, ..., : length if name in _SEQUENCE else None] for name, part in parts.items()}


def _groups(tokens: tuple[int, ...], size: int) -> list[tuple[int, ...]]:
    """Tokens whose gradients go through the layers together, in groups of about the same size.

    >>> _groups((0, 1, 2, 3, 4), 4)
    [(0, 1, 2), (3, 4)]
    """
    count = math.ceil(len(tokens) / max(size, 1))
    step = math.ceil(len(tokens) / count)
    return [tokens[start : start + step] for start in range(0, len(tokens), step)]


def _kind(model: PreTrainedModel, maps: Maps, place: Layout) -> str:
    """How image tokens come from vision tokens: ``queries`` of a Q-Former, ``joint`` (queries of an abstractor),
    ``merged``, or ``same`` (no attention).

    Raises:
        CapabilityError: some other way.
    """
    name, roles, places = type(model).__name__, maps.layers, sites(model)
    if "cross" in roles and not place.encoder_decoder:
        raise CapabilityError(f"{name}: relevancy of models that cross-attend to the image is not supported")
    if "connector" in roles:
        if all("visual_abstractor" in site for site in roles["connector"]) and _queries(maps, place):
            return "joint"
        if not all("qformer" in site for site in roles["connector"]):
            raise CapabilityError(f"{name}: relevancy through {roles['connector'][0]} is not supported")
        return "queries"
    if place.encoder_decoder:
        raise CapabilityError(f"{name}: an encoder-decoder model is supported behind a Q-Former only")
    if "vision" not in roles:
        tower = (module for module in model.modules() if places[id(module)].role == "vision")
        if any("Attention" in type(module).__name__ for module in tower):
            raise CapabilityError(f"{name}: the attention of its vision tower cannot be heard")
        return "same"
    if len({maps.sizes[site] for site in roles["vision"]}) != 1:
        raise CapabilityError(f"{name}: the layers of the vision tower have different numbers of tokens")
    return "merged"


def _queries(maps: Maps, place: Layout) -> int:
    """The number of queries of an abstractor, the first of the image tokens; 0 where its maps have other columns."""
    bridge, vision = ({maps.sizes[site] for site in maps.layers.get(role, ())} for role in ("connector", "vision"))
    count = (bridge.pop() - vision.pop()) // len(place.counts) if len(bridge) == len(vision) == 1 else 0
    return count if 0 < count <= len(place.image) else 0


@dataclass
class _Pass:
    """One backward pass: takes every Abar and turns it into rows on the spot, or keeps it where a rule needs it whole.

    Attributes:
        kept: Abar by part and layer: ``own`` and ``crossing`` of a Q-Former, ``language`` and ``cross`` of an
            encoder-decoder model.
        towers: R of what has no rows to be read yet: ``vision`` before a Q-Former, ``encoder``.
    """

    maps: Maps
    place: Layout
    kind: str
    merged: Merging | None
    tokens: tuple[int, ...]
    rule: str
    every: bool
    kept: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    towers: dict[str, BlockRows] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows = [self.place.first + token for token in self.tokens]
        count = len(self.maps.layers["language"])
        self._samples = len(self.place.counts)
        self._language = LayerRows(torch.tensor(rows), self.place.length, count, self.every, self._samples)
        self._saliency = Saliency(rows, self.place.length, count, self._samples)
        self._joint: QueryRows | None = None

    def receive(self, call: Call, layer: int, blocks: Blocks) -> None:
        """What ``Maps.backward`` hands over."""
        abar, role = self._abar(call, layer, blocks), call.site.role
        if role == "language" and not self.place.encoder_decoder:
            self._language.receive(layer, abar)
        elif role in ("vision", "encoder"):
            self._tower(role, call.site.name).receive(call.offset // self._samples, call.keys, abar)
        elif role == "connector" and self.kind == "joint":
            if self._joint is None:  # the language model's layers are through: they come first
                queries = self.place.image[: len(call.ends)]
                rows = self._language.mass()[..., queries]
                self._joint = QueryRows(rows, call.keys - len(queries), self._samples)
            self._joint.receive(abar)
        elif role == "connector":
            part = "crossing" if "crossattention" in call.site.name else "own"
            self._keep(part, call.site.layer, call, abar)
        else:
            self._keep(role, layer, call, abar)

    def _keep(self, part: str, layer: int, call: Call, abar: Abar) -> None:
        """Keep Abar whole, on the device of the first: layers may be on several, and the rules read them together."""
        matrix = whole(abar, len(call.ends), call.keys)
        first = next((other for layers in self.kept.values() for other in layers.values()), matrix)
        self.kept.setdefault(part, {})[layer] = matrix.to(first.device)

    def _abar(self, call: Call, layer: int, blocks: Blocks) -> Abar:
        """Equation 5."""
        for start, product in blocks:
            if call.site.role == "language":
                self._saliency.receive(layer, start, product)
            yield start, product.clamp(min=0).mean(1)

    def _tower(self, role: str, name: str) -> BlockRows:
        if role not in self.towers:
            if role == "vision" and self.kind == "merged":  # the language model's layers are through: they come first
                rows = self.merged.spread(self._language.mass()[..., self.place.image])
            elif role == "vision" and self.kind == "joint":
                rows = self._joint.vision
            else:
                rows = torch.eye(self.maps.sizes[name])
            self.towers[role] = BlockRows(rows, self._samples)
        return self.towers[role]

    def result(self) -> dict[str, Tensor]:
        """Rows by the names of ``Relevancy``, each (B, L or 1, T, positions)."""
        found = {"saliency": self._saliency.values[:, slice(None) if self.every else slice(-1, None)]}
        if self.place.encoder_decoder:
            rows = [self.place.first + token for token in self.tokens]
            own, crossing = self.kept["language"], self.kept["cross"]
            read = self.towers["encoder"].values
            both = decoder_rows(self.rule, read, own, crossing, rows, self.every)
            found["decoder"], found["encoder"] = (part[None] for part in both)
        else:
            found["llm"] = self._language.mass()
        image = next(found[name] for name in ("encoder", "llm") if name in found)[..., self.place.image]
        if self.kind == "queries":
            own, crossing = self.kept["own"], self.kept["crossing"]
            queries = next(iter(crossing.values())).shape[0]
            to_vision, to_own = through_queries(self.rule, own, crossing, self.towers["vision"].values, queries)
            found["vision"] = image @ to_vision.to(image.device)
            if to_own.shape[-1] > queries:
                found["query_text"] = image @ to_own[:, queries:].to(image.device)
        elif self.kind in ("merged", "joint"):
            found["vision"] = self.towers["vision"].values
        else:
            found["vision"] = image
        return found


def _result(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    place: Layout,
    kind: str,
    chosen: tuple[int, ...],
    merged: Merging | None,
    parts: dict[str, Tensor],
) -> Relevancy:
    if kind == "same":
        grids = tile_grids(model.config, inputs, len(place.image)) or _square(len(place.image))
        tiles = parts["vision"].unflatten(-1, (len(grids), *grids[0])) if len(set(grids)) == 1 else None
    else:
        order = None if merged is None else pixel_order(merged.image, inputs)
        if order is not None:
            parts["vision"] = parts["vision"][..., order]
        tiles = tiled(model.config, inputs, parts["vision"])
    return Relevancy(chosen, place.first, tuple(place.image.tolist()), tiles=tiles, **parts)


def _square(count: int) -> tuple[tuple[int, int], ...]:
    """The grid of a convolutional tower's tokens, which fill a square or are none."""
    side = round(count**0.5)
    return ((side, side),) if side * side == count else ()


def token_relevancy(
    adapter: Adapter, image: Image, question: str, answer: Answer | str, *, scope: str = "row", **options: Any
) -> Relevancy:
    """Relevancy of an answer's tokens to image, question, earlier answer tokens and everything else.

    Args:
        adapter: the model.
        image: the picture. ``question``: what was asked.
        answer: what the model answered, with its ids; or a text, which the adapter tokenises.
        scope: ``row`` or ``token``; this and ``options`` (rule, layers, tokens, budget, recompute) as for
            ``relevancy_from_inputs``.

    Returns:
        With ``question_positions``, so that ``image``, ``question``, ``answer`` and ``rest`` add up to the whole row.

    Raises:
        CapabilityError: the adapter has no transformers model, or its kind is not supported.
        ConfigError, DataError, CaptureError: as ``relevancy_from_inputs``.
    """
    encoded = adapter.encode(image, question)
    written = adapter.answer(encoded, answer) if isinstance(answer, str) else answer
    return answer_relevancy(adapter, encoded, written, scope=scope, **options)


def answer_relevancy(adapter: Adapter, encoded: Encoded, answer: Answer, **options: Any) -> Relevancy:
    """``token_relevancy`` of a prompt that is encoded already."""
    model, inputs = adapter.forward_inputs(encoded, answer.token_ids)
    found = relevancy_from_inputs(model, inputs, answer.token_ids, **options)
    return replace(found, question_positions=encoded.spans.question)
