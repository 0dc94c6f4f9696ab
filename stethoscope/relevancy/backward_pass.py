"""Turn the attention blocks of one backward pass into rows of relevancy."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from stethoscope.relevancy.attention_backward import Blocks, TracedCall
from stethoscope.relevancy.grad_recorder import AttentionGradRecorder
from stethoscope.relevancy.result import Layout
from stethoscope.relevancy.rules import (
    Abar,
    BlockRelevancy,
    LayerRelevancy,
    QueryRelevancy,
    Saliency,
    assemble,
    decoder_relevancy,
    query_relevancy,
)
from stethoscope.relevancy.token_alignment import TokenAlignment


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
        self._language = LayerRelevancy(torch.tensor(rows), self.layout.length, count, self.every, self._samples)
        self._saliency = Saliency(rows, self.layout.length, count, self._samples)
        self._joint: QueryRelevancy | None = None

    def receive(self, call: TracedCall, layer: int, blocks: Blocks) -> None:
        """Process the blocks of one attention call, see ``AttentionGradRecorder.backward``."""
        abar, role = self._abar(call, layer, blocks), call.site.role
        if role == "language" and not self.layout.encoder_decoder:
            self._language.receive(layer, abar)
        elif role in ("vision", "encoder"):
            self._tower(role, call.site.name).receive(call.offset // self._samples, call.keys, abar)
        elif role == "connector" and self.kind == "joint":
            if self._joint is None:  # the layers of the language model come first
                queries = self.layout.image[: len(call.ends)]
                rows = self._language.mass()[..., queries]
                self._joint = QueryRelevancy(rows, call.keys - len(queries), self._samples)
            self._joint.receive(abar)
        elif role == "connector":
            part = "crossing" if "crossattention" in call.site.name else "own"
            self._store(part, call.site.layer, call, abar)
        else:
            self._store(role, layer, call, abar)

    def _store(self, part: str, layer: int, call: TracedCall, abar: Abar) -> None:
        """Store Abar of a layer, on the device of the first layer, because the rules use all layers together."""
        matrix = assemble(abar, len(call.ends), call.keys)
        first = next((other for layers in self.stored.values() for other in layers.values()), matrix)
        self.stored.setdefault(part, {})[layer] = matrix.to(first.device)

    def _abar(self, call: TracedCall, layer: int, blocks: Blocks) -> Abar:
        """Compute Abar of a call in blocks (equation 5), and store its saliency."""
        for start, product in blocks:
            if call.site.role == "language":
                self._saliency.receive(layer, start, product)
            yield start, product.clamp(min=0).mean(1)

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
