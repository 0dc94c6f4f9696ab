"""Apply the rules of relevancy to the attention calls of one backward pass, as they run.

``BackwardPass`` gives every block of Abar to the running relevancy of its part of the model: the classes below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stethoscope.relevancy.attention_backward import Block, TracedCall
from stethoscope.relevancy.gradient_recorder import AttentionGradRecorder
from stethoscope.relevancy.result import Layout
from stethoscope.relevancy.rules import decoder_relevancy, identity_like, query_relevancy
from stethoscope.relevancy.token_alignment import TokenAlignment

_STORED_BYTES = 2**27  # of the Abar of all layers, where they are stored

AddBlock = Callable[[int, Tensor], None]
"""Adds a block of rows of a layer's Abar, given its first row and (B, rows, columns). Entries in no block are zero."""


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
        """Process a block of Abar (equation 5), see ``attention_backward.Receiver``."""
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


class QueryRelevancy:
    """Relevancy of the queries of an abstractor, propagated through its layers from the last to the first.

    >>> relevancy = QueryRelevancy(torch.tensor([[1.0, 0.0]]), vision=2)
    >>> abar = torch.tensor([[[0.0, 0.5, 0.25, 0.0], [0.0, 0.0, 0.0, 1.0]]])
    >>> relevancy.begin(abar)(0, abar)
    >>> relevancy.queries, relevancy.vision
    (tensor([[1.0000, 0.5000]]), tensor([[0.2500, 0.0000]]))

    Args:
        rows: (..., Q) relevancy of the queries.
        vision: number of vision tokens M.
        samples: number of samples, for rows of shape (samples, ..., Q).
    """

    def __init__(self, rows: Tensor, vision: int, samples: int = 1) -> None:
        self._count, self._shape = rows.shape[-1], rows.shape[:-1]
        self._values = torch.nn.functional.pad(rows, (0, vision)).view(samples, -1, rows.shape[-1] + vision)

    def begin(self, like: Tensor) -> AddBlock:
        """Begin a layer whose Abar (Q, Q + M) has the dtype and device of ``like``; return what adds its blocks."""
        self._values = self._values.to(like)
        before = self._values[..., : self._count].clone()

        def add(start: int, block: Tensor) -> None:
            _, rows, end = block.shape
            self._values[..., :end] += before[..., start : start + rows] @ block

        return add

    @property
    def queries(self) -> Tensor:
        """(..., Q) relevancy that stays with the queries."""
        return self._values[..., : self._count].reshape(*self._shape, -1)

    @property
    def vision(self) -> Tensor:
        """(..., M) relevancy that flows on to the vision tokens."""
        return self._values[..., self._count :].reshape(*self._shape, -1)


class LayerRelevancy:
    """Rows of R_l of the language model, after every layer l or only after the last, of B samples.

    Args:
        rows: (T,) positions of the rows, the same in all samples.
        length: length of the sequence.
        layers: number of layers.
        every: whether to keep the rows after every layer.
        samples: B.
    """

    def __init__(self, rows: Tensor, length: int, layers: int, every: bool, samples: int = 1) -> None:
        self._start = torch.nn.functional.one_hot(rows, length).float()
        self._shape, self._every = (samples, layers if every else 1), every
        self._values: Tensor | None = None  # until a layer begins
        self._stored: dict[int, tuple[int, Tensor]] = {}  # by layer, first row and last rows of Abar

    def store(self, layer: int, first: int, like: Tensor) -> AddBlock:
        """Store the rows of a layer's Abar from ``first`` on until the layer begins; return what adds its blocks."""
        rows = like.new_zeros(len(like), self._start.shape[-1] - first, self._start.shape[-1])
        self._stored[layer] = first, rows

        def add(start: int, block: Tensor) -> None:
            rows[:, start - first : start - first + block.shape[1], : block.shape[2]] = block

        return add

    def begin(self, layer: int, like: Tensor) -> AddBlock:
        """Begin a layer, which changes the rows after it and after later layers; return what adds its blocks.

        Layers begin from the last to the first. Those of which no block comes but stored rows may be left out.
        """
        for later in sorted((other for other in self._stored if other > layer), reverse=True):
            self.begin(later, self._stored[later][1])
        values = self._start.repeat(*self._shape, 1, 1) if self._values is None else self._values
        self._values = values.to(like)
        touched = (self._values[:, layer:] if self._every else self._values).flatten(1, 2)
        before = touched.clone()

        def add(start: int, block: Tensor) -> None:
            _, rows, end = block.shape
            touched[..., :end].baddbmm_(before[..., start : start + rows], block)

        if layer in self._stored:
            add(*self._stored.pop(layer))
        return add

    def mass(self) -> Tensor:
        """Return the rows of R_l - I, (B, L or 1, T, N)."""
        if self._stored:
            first = min(self._stored)
            self.begin(first, self._stored[first][1])
        values = self._start.repeat(*self._shape, 1, 1) if self._values is None else self._values
        return values - self._start.to(values)


class StoredRelevancy:
    """Rows of R_l after every layer as ``LayerRelevancy``, from the Abar of all layers once they are there.

    The whole R_l takes about N^3 / 3 products a layer, where T rows after each of L layers take T N^2 (L + 1) / 4, so
    that the cost does not grow with the length of the answer beyond that of attention.

    Args:
        rows: (T,) positions of the rows, the same in all samples.
        length: length N of the sequence.
        layers: number of layers.
        samples: B.
    """

    def __init__(self, rows: Tensor, length: int, layers: int, samples: int) -> None:
        self._rows, self._length, self._layers, self._samples = rows, length, layers, samples
        self._maps: dict[int, Tensor] = {}
        self._blocks: dict[int, list[tuple[int, int, int]]] = {}  # by layer first row, last row + 1, last column + 1
        self._mass: Tensor | None = None

    @staticmethod
    def pays(rows: int, length: int, layers: int, samples: int) -> bool:
        """Decide whether this takes less time than ``LayerRelevancy`` and not too much memory."""
        return 4 * length < 3 * rows * (layers + 1) and 4 * samples * layers * length**2 <= _STORED_BYTES

    def store(self, layer: int, first: int, like: Tensor) -> AddBlock:
        """Return what stores the blocks of a layer's rows from ``first`` on."""
        return self.begin(layer, like)

    def begin(self, layer: int, like: Tensor) -> AddBlock:
        """Return what stores the blocks of a layer."""
        if layer not in self._maps:
            self._maps[layer], self._blocks[layer] = like.new_zeros(len(like), self._length, self._length), []
        abar, blocks = self._maps[layer], self._blocks[layer]

        def add(start: int, block: Tensor) -> None:
            stop, end = start + block.shape[1], block.shape[2]
            abar[:, start:stop, :end] = block
            blocks.append((start, stop, end))

        return add

    def mass(self) -> Tensor:
        """Return the rows of R_l - I, (B, L, T, N), and release the maps."""
        if self._mass is None:
            like = next(iter(self._maps.values()))
            relevancy = identity_like(like).repeat(self._samples, 1, 1)
            causal = all(end <= stop for blocks in self._blocks.values() for _, stop, end in blocks)
            after = []
            for layer in range(self._layers):
                before = relevancy.clone()
                for start, stop, end in self._blocks.get(layer, ()):
                    columns = end if causal else self._length  # R has no columns after its rows
                    rows = self._maps[layer][:, start:stop, :end]
                    relevancy[:, start:stop, :columns].baddbmm_(rows, before[:, :end, :columns])
                after.append(relevancy[:, self._rows.to(like.device)])
            identity = torch.nn.functional.one_hot(self._rows, self._length).to(like)
            self._mass = torch.stack(after, 1) - identity
            self._maps.clear()
        return self._mass


class BlockRelevancy:
    """Rows times the R of a part of the model whose Abar is block-diagonal: one block per crop or window.

    Args:
        rows: (..., M) relevancy that flows into the part's tokens, block by block. The identity gives R itself. Where a
            sample has more than M rows, R is computed and they are multiplied by it at the end, which costs less.
        samples: number of samples, for rows of shape (samples, ..., M); blocks come one sample after another.
    """

    def __init__(self, rows: Tensor, samples: int = 1) -> None:
        self._shape, width = rows.shape, rows.shape[-1]
        self._values = rows.reshape(samples, -1, width)
        self._rows = self._values if self._values.shape[1] > width else None
        if self._rows is not None:
            self._values = torch.eye(width, dtype=rows.dtype, device=rows.device).expand(samples, -1, -1)
        self._values = self._values.clone()

    def begin(self, offset: int, size: int, like: Tensor) -> AddBlock:
        """Begin a layer on the diagonal blocks from column ``offset``, ``size`` columns each; return what adds to them.

        ``like`` is a block of the layer's Abar, (samples * diagonal blocks, rows, columns).
        """
        samples = len(self._values)
        blocks = len(like) // samples
        self._values = self._values.to(like)
        touched = self._values[..., offset : offset + blocks * size].unflatten(-1, (blocks, size))
        before = touched.clone()

        def add(start: int, block: Tensor) -> None:
            block = block.unflatten(0, (samples, -1))
            rows, end = block.shape[2:]
            touched[..., :end] += torch.einsum("skbr,sbrm->skbm", before[..., start : start + rows], block)

        return add

    @property
    def values(self) -> Tensor:
        """Rows after the layers applied so far, in the shape of the initial ones."""
        values = self._values if self._rows is None else self._rows.to(self._values) @ self._values
        return values.view(self._shape)


class Saliency:
    """|A * dz/dA| summed over heads in the rows that predict tokens, by layer.

    Args:
        rows: positions of the rows.
        length: length of the sequence.
        layers: number of layers.
        samples: B.
    """

    def __init__(self, rows: Iterable[int], length: int, layers: int, samples: int = 1) -> None:
        self._rows = list(rows)
        self.values = torch.zeros(samples, layers, len(self._rows), length)

    def receive(self, layer: int, start: int, saliency: Tensor) -> None:
        """Store the rows of a block (B, rows, columns), the first of which is ``start``."""
        stop = start + saliency.shape[1]
        indices = [index for index, row in enumerate(self._rows) if start <= row < stop]
        if indices:
            self.values = self.values.to(saliency)
            rows = [self._rows[index] - start for index in indices]
            self.values[:, layer, indices, : saliency.shape[-1]] = saliency[:, rows]
