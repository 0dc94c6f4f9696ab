"""The features of ``features=fast`` straight from decoding steps, without a trace: the same values, by numpy.

For one token of a small model there is less to compute than a call of torch takes, and the feature functions make a
hundred of them. Here all layers go together, what several features read is made once, and numpy, whose calls take a
third of the time, works on the memory of the tensors. Where there is much to compute torch is as good, or better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from stethoscope.features.attention import middle
from stethoscope.trace import SEGMENTS

if TYPE_CHECKING:
    from stethoscope.streaming.steps import Step, Steps

COUNTED = ("position", "log_position", "repetition")
"""Features that are counted: place, log(1 + place), how often the token stands before."""
_WORDS = ("nll", "entropy", "max_prob", "margin")
_MASS = tuple(f"attn_{segment}" for segment in SEGMENTS[:-1])  # nobody reads the rest
_FIRST = len(_WORDS) + len(COUNTED)  # columns, one for each
_LENS = ("lens_rank", "lens_logprob")
NAMES = frozenset((*_WORDS, *_MASS, "svar", "attn_entropy", *_LENS, *COUNTED))
"""Features that are known here."""
_MOST = 2**18  # numbers of one kind; more are torch's business, which has threads
_GROW = 512


class Direct:
    """What features say of decoding steps, on the CPU and in float32.

    Args:
        steps: of the answer.
        columns: of the detector, all of ``NAMES``.

    Attributes:
        logprobs: (T,) of the tokens that were read last, natural logs.
    """

    def __init__(self, steps: Steps, columns: Sequence[str]) -> None:
        self._steps, self._columns = steps, columns
        self._decodes = any(column.startswith(_LENS) for column in columns)
        self._attends = any(column.startswith((*_MASS, "svar", "attn_entropy")) for column in columns)
        self._members = np.zeros((0, len(SEGMENTS)), np.float32)
        self._fits: bool | None = None  # the model; not known before the first step

    def takes(self, some: Sequence[Step], start: int) -> bool:
        """Whether these steps, of the tokens from ``start`` on, can be read here and are few enough."""
        if not some[0].later:
            return False
        if self._fits is None:
            self._fits = self._fitting(some[0], self._steps.logits[start])
        keys = self._steps.seen(start + len(some) - 1)
        return self._fits and len(some) * max(self._words, self._heads * keys) <= _MOST

    def _fitting(self, step: Step, logits: Tensor) -> bool:
        """Finds sizes and places of columns; whether all is there, on the CPU and in float32."""
        rows, layers = step.rows["language"] if self._attends else [], len(step.hidden) if self._decodes else 1
        self._words, self._heads = layers * len(logits), sum(row.query.shape[1] for row in rows)
        widths = dict.fromkeys((*_WORDS, *COUNTED), 1)
        if self._attends:
            widths |= {**dict.fromkeys(_MASS, len(rows)), "svar": 1, "attn_entropy": len(rows)}
        widths |= dict.fromkeys(_LENS, layers - 1)
        names: list[str] = []
        self._at: dict[str, slice] = {}
        for name, width in widths.items():
            self._at[name] = slice(len(names), len(names) + width)
            single = name in (*_WORDS, *COUNTED, "svar")
            names += [name] if single else [f"{name}_l{layer:02d}" for layer in range(width)]
        if not set(self._columns) <= set(names) or (self._decodes and not self._steps.lens.checked):
            return False  # a trace says why, and checks the lens
        self._width, self._places = len(names), np.array([names.index(column) for column in self._columns])
        if len({(*row.query.shape, row.keys.scaling) for row in rows}) > 1:  # layers of different kinds
            return False
        tensors = [logits, *step.hidden, *(part for row in rows for part in (row.query, row.keys.newest))]
        return all(one.device.type == "cpu" and one.dtype == torch.float32 for one in tensors)

    def rows(self, some: Sequence[Step], ids: Sequence[int], start: int, counted: Sequence[tuple]) -> np.ndarray:
        """The detector's columns of tokens in a row.

        Args:
            some: their steps, T of them. ``ids``: the tokens.
            start: number of the first one.
            counted: their values of ``COUNTED``.

        Returns:
            (T, columns) float32.
        """
        out = np.empty((len(some), self._width), np.float32)
        self._read_words(some, ids, start, counted, out)
        if self._attends:
            self._read_attention(some, start, out)
        self.logprobs = -out[:, 0]
        return out.take(self._places, 1)

    def _read_words(
        self, some: Sequence[Step], ids: Sequence[int], start: int, counted: Sequence[tuple], out: np.ndarray
    ) -> None:
        """Uncertainty, and the logit lens of all layers but the last, which is the model's own distribution."""
        count = len(some)
        own = self._steps.logits[start : start + count]
        if self._decodes:
            own = [self._lens([layer for step in some for layer in step.hidden[:-1]]).view(-1), *own]
        together = (own[0] if len(own) == 1 else torch.cat(own)).view(-1, self._steps.logits[start].shape[0])
        logprobs, raw = together.log_softmax(-1).numpy(), together.numpy()
        rank, logprob = (self._at[name] for name in _LENS)
        layers = rank.stop - rank.start
        for number, (row, token, known) in enumerate(zip(out, ids, counted, strict=True)):
            last = logprobs[number - count]
            shares, best = np.exp(last), last.argmax()
            entropy, top = -shares.dot(last), shares[best]
            shares[best] = 0
            row[:_FIRST] = -last[token], entropy, top, top - np.maximum.reduce(shares), *known
            if layers:
                here = slice(number * layers, (number + 1) * layers)
                row[rank] = [math.log1p(np.count_nonzero(layer > layer[token])) for layer in raw[here]]
                row[logprob] = logprobs[here, token]

    def _lens(self, hidden: list[Tensor]) -> Tensor:
        """(states, V) logits of residual streams (1, 1, D)."""
        lens = self._steps.lens
        return lens.unembed(lens.normalise(torch.cat(hidden, 1)[0]))

    def _read_attention(self, some: Sequence[Step], start: int, out: np.ndarray) -> None:
        """Attention of the rows, mean over heads, by layer."""
        weights = self._weights(some, self._steps.seen(start + len(some) - 1))
        mean = np.add.reduce(weights, 1)  # (L, T, k), times the number of heads
        mean *= 1 / weights.shape[1]
        mass = mean @ self._membership(mean.shape[-1])
        every = mass[..., : len(_MASS)].transpose(1, 2, 0)
        out[:, self._at[_MASS[0]].start : self._at[_MASS[-1]].stop] = every.reshape(len(some), -1)
        out[:, self._at["svar"].start] = np.add.reduce(mass[middle(len(mass)), :, 0], 0)
        image = mean[..., self._steps.image]
        share = image / np.maximum(mass[..., :1], 1e-12)  # as ``stethoscope.features.reduce`` has it
        spread = np.einsum("ltn,ltn->tl", share, np.log(np.maximum(share, 1e-12)))
        out[:, self._at["attn_entropy"]] = spread / -math.log(max(image.shape[-1], 2))

    def _weights(self, some: Sequence[Step], seen: int) -> np.ndarray:
        """(L, H, T, seen) attention of the queries of T steps in a row to the keys that the last has seen."""
        layers, count = list(zip(*(step.rows["language"] for step in some), strict=True)), len(some)
        queries = torch.cat([row.query for rows in layers for row in rows], 2).numpy()[0]
        queries *= layers[0][0].keys.scaling
        heads, _, size = queries.shape
        scores = np.empty((len(layers), heads, count, seen), np.float32)
        for number, rows in enumerate(layers):
            keys = rows[0].keys.newest.numpy()[0, :, :seen]
            grouped = queries[:, number * count : (number + 1) * count].reshape(len(keys), -1, size)
            np.matmul(grouped, keys.transpose(0, 2, 1), out=scores[number].reshape(len(keys), -1, seen))
        if count > 1:
            scores[..., -count:] += _after(count)
        return torch.from_numpy(scores).softmax(-1).numpy()

    def _membership(self, length: int) -> np.ndarray:
        """(length, 5) which segment every key belongs to, as 0 and 1."""
        if len(self._members) < length:
            self._members = self._steps.membership("language", length + _GROW, torch.device("cpu")).numpy()
        return self._members[:length]


@cache
def _after(count: int) -> np.ndarray:
    """(count, count) of 0, and -inf where a key comes after its step."""
    return np.triu(np.full((count, count), -np.inf, np.float32), 1)
