"""Apply the rules of relevancy to the attention calls of one backward pass, as they run."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from stethoscope.relevancy.gradient_recorder import AttentionGradRecorder
from stethoscope.relevancy.result import Layout
from stethoscope.relevancy.rules import (
    AddBlock,
    BlockRelevancy,
    LayerRelevancy,
    QueryRelevancy,
    Saliency,
    StoredRelevancy,
    decoder_relevancy,
    query_relevancy,
)
from stethoscope.relevancy.token_alignment import TokenAlignment
from stethoscope.relevancy.traced_calls import Block, TracedCall


@dataclass
class BackwardPass:
    """One backward pass: applies every Abar at once, or stores it where a rule needs all layers.

    Attributes:
        recorder: of the forward pass.
        layout: positions in the sequence.
        kind: computation of the image tokens: ``queries``, ``joint``, ``merged`` or ``same``, see ``engine``.
        alignment: of vision and image tokens, for kind ``merged``.
        tokens: indices of the answer tokens of this pass.
        rule: reading of equation 10.
        every: whether to return rows after every layer.
        stored: Abar by part and layer: ``own`` and ``crossing`` of a Q-Former, ``language`` and ``cross`` of an
            encoder-decoder model.
        towers: R of parts of the model by role: ``vision`` and ``encoder``.
    """

    recorder: AttentionGradRecorder
    layout: Layout
    kind: str
    alignment: TokenAlignment | None
    tokens: tuple[int, ...]
    rule: str
    every: bool
    stored: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    towers: dict[str, BlockRelevancy] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows = [self.layout.first + token for token in self.tokens]
        count = len(self.recorder.layers["language"])
        self._samples = len(self.layout.counts)
        sizes = self.layout.length, count
        self._language: LayerRelevancy | StoredRelevancy
        if self.every and StoredRelevancy.pays(len(rows), *sizes, self._samples):
            self._language = StoredRelevancy(torch.tensor(rows), *sizes, self._samples)
        else:
            self._language = LayerRelevancy(torch.tensor(rows), *sizes, self.every, self._samples)
        self._saliency = Saliency(rows, self.layout.length, count, self._samples)
        self._joint: QueryRelevancy | None = None
        self._add: AddBlock  # for the blocks of the present call

    def receive(self, call: TracedCall, layer: int, is_first: bool, block: Block) -> None:
        """Process a block of Abar (equation 5), see ``traced_calls.Receiver``."""
        start, abar, saliency = block
        if saliency is not None:
            self._saliency.receive(layer, start + abar.shape[1] - saliency.shape[1], saliency)
        if is_first:
            self._add = self._begin(call, layer, abar)
        self._add(start, abar)

    def _begin(self, call: TracedCall, layer: int, like: Tensor) -> AddBlock:
        """Begin an attention call whose first block of Abar is ``like``; return what adds its blocks."""
        role = call.site.role
        if role == "language" and call.skipped:  # the rows of the answer come before all of the prompt
            return self._language.store(layer, call.skipped, like)
        if role == "language" and not self.layout.encoder_decoder:
            return self._language.begin(layer, like)
        if role in ("vision", "encoder"):
            return self._tower(role, call.site.name).begin(call.offset // self._samples, call.keys, like)
        if role == "connector" and self.kind == "joint":
            if self._joint is None:  # the layers of the language model come first
                queries = self.layout.image[: len(call.ends)]
                rows = self._language.mass()[..., queries]
                self._joint = QueryRelevancy(rows, call.keys - len(queries), self._samples)
            return self._joint.begin(like)
        if role == "connector":
            return self._store("crossing" if "crossattention" in call.site.name else "own", call.site.layer, call, like)
        return self._store(role, layer, call, like)

    def _store(self, part: str, layer: int, call: TracedCall, like: Tensor) -> AddBlock:
        """Store Abar of a layer, on the device of the first layer, because the rules use all layers together."""
        first = next((other for layers in self.stored.values() for other in layers.values()), like)
        matrix = torch.zeros(len(call.ends), call.keys, dtype=like.dtype, device=first.device)
        self.stored.setdefault(part, {})[layer] = matrix

        def add(start: int, block: Tensor) -> None:
            matrix[start : start + block.shape[1], : block.shape[2]] = block[0].to(matrix.device)

        return add

    def _tower(self, role: str, name: str) -> BlockRelevancy:
        """Return the relevancy of a part of the model, which starts with the rows that flow into it."""
        if role not in self.towers:
            if role == "vision" and self.alignment is not None:  # the layers of the language model come first
                rows = self.alignment.spread(self._language.mass()[..., self.layout.image])
            elif role == "vision" and self._joint is not None:
                rows = self._joint.vision
            else:
                rows = torch.eye(self.recorder.sizes[name])
            self.towers[role] = BlockRelevancy(rows, self._samples)
        return self.towers[role]

    def result(self) -> dict[str, Tensor]:
        """Return the rows by attribute of ``Relevancy``, each (B, L or 1, T, positions)."""
        parts = {"saliency": self._saliency.values[:, slice(None) if self.every else slice(-1, None)]}
        if self.layout.encoder_decoder:
            rows = [self.layout.first + token for token in self.tokens]
            own, crossing = self.stored["language"], self.stored["cross"]
            encoder = self.towers["encoder"].values
            decoder_part, encoder_part = decoder_relevancy(self.rule, encoder, own, crossing, rows, self.every)
            parts["decoder"], parts["encoder"] = decoder_part[None], encoder_part[None]
        else:
            parts["llm"] = self._language.mass()
        image = next(parts[name] for name in ("encoder", "llm") if name in parts)[..., self.layout.image]
        if self.kind == "queries":
            own, crossing = self.stored["own"], self.stored["crossing"]
            queries = next(iter(crossing.values())).shape[0]
            to_vision, to_own = query_relevancy(self.rule, own, crossing, self.towers["vision"].values, queries)
            parts["vision"] = image @ to_vision.to(image.device)
            if to_own.shape[-1] > queries:
                parts["query_text"] = image @ to_own[:, queries:].to(image.device)
        elif self.kind in ("merged", "joint"):
            parts["vision"] = self.towers["vision"].values
        else:
            parts["vision"] = image
        return parts
