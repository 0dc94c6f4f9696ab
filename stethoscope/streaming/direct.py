"""The features of ``features=fast`` straight from decoding steps, without a trace: the same values, by numpy.

For one token of a small model there is less to compute than a call of torch takes, and the feature functions make a
hundred of them. Here all layers go together, what several features read is made once, and numpy, whose calls take a
third of the time, works on the memory of the tensors. Where there is much to compute torch is as good, or better.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from stethoscope.features import FEATURES
from stethoscope.features.attention import middle
from stethoscope.trace import SEGMENTS

if TYPE_CHECKING:
    from stethoscope.streaming.steps import Step, Steps

NAMES = frozenset(name for name, item in FEATURES.items() if item.group in ("uncertainty", "attention", "lens"))
"""Features that are known here."""
_MOST = 2**18  # numbers of one kind; more are torch's business, which has threads


class Direct:
    """What features say of decoding steps, on the CPU and in float32.

    Args:
        steps: of the answer.
        names: the features to compute, of ``NAMES``.
    """

    def __init__(self, steps: Steps, names: Collection[str]) -> None:
        self._steps, self._names = steps, frozenset(names)
        self._attends, self._decodes = (
            any(need in FEATURES[name].needs for name in names) for need in ("attention", "lens")
        )
        self._members = np.zeros((0, len(SEGMENTS)), np.float32)
        self._fits: bool | None = None  # the model

    def takes(self, some: Sequence[Step], start: int) -> bool:
        """Whether these steps, of the tokens from ``start`` on, can be read here and are small enough."""
        if not some[0].later:
            return False
        if self._fits is None:
            self._fits = self._fitting(some[0], start)
        logits, rows = self._steps.logits[start], some[0].rows.get("language", ())
        words = len(logits) * max(len(some[0].hidden), 1)
        heads = sum(row.query.shape[1] for row in rows)
        return self._fits and len(some) * max(words, heads * self._steps.seen(start + len(some) - 1)) <= _MOST

    def _fitting(self, step: Step, start: int) -> bool:
        rows = step.rows.get("language", ())
        tensors = [self._steps.logits[start], *step.hidden, *(part for row in rows for part in (row.query, row.keys.newest))]
        checked = not self._decodes or self._steps.lens.checked
        return checked and all(one.device.type == "cpu" and one.dtype == torch.float32 for one in tensors)

    def values(self, some: Sequence[Step], ids: Sequence[int], start: int) -> dict[str, np.ndarray]:
        """Feature name to (T,) or (T, layers) float32 of T tokens, whose numbers begin with ``start``."""
        found = self._words(some, ids, start)
        if self._attends:
            found |= self._looks(some, start)
        return found

    def _words(self, some: Sequence[Step], ids: Sequence[int], start: int) -> dict[str, np.ndarray]:
        """Uncertainty, and the logit lens of all layers but the last, which is the model's own distribution."""
        count = len(some)
        rows = self._steps.logits[start : start + count]
        logits = (rows[0][None] if count == 1 else torch.stack(rows))[:, None]
        if self._decodes:
            hidden = torch.cat([layer for step in some for layer in step.hidden[:-1]], 1)
            layers = self._steps.lens.decode(hidden).view(count, -1, logits.shape[-1])
            logits = torch.cat([layers, logits], 1)
        logprobs, logits = logits.log_softmax(-1).numpy(), logits.numpy()
        at, ids = np.arange(count), np.asarray(ids)
        chosen = logprobs[at, :, ids]
        found = {"nll": -chosen[:, -1], "lens_logprob": chosen[:, :-1]}
        if "lens_rank" in self._names:
            above = logits[:, :-1] > logits[at, :-1, ids][..., None]
            found["lens_rank"] = np.log1p(above.sum(-1), dtype=np.float32)
        own = logprobs[:, -1]
        shares = np.exp(own)
        found["entropy"] = -(shares * own).sum(-1)
        best = shares.argmax(-1)
        found["max_prob"] = shares[at, best]
        shares[at, best] = 0
        found["margin"] = found["max_prob"] - shares.max(-1)
        return found

    def _looks(self, some: Sequence[Step], start: int) -> dict[str, np.ndarray]:
        """Attention of the rows, mean over heads, by layer."""
        weights = self._weights(some, self._steps.seen(start + len(some) - 1))
        mean = np.add.reduce(weights, 1) / weights.shape[1]  # (L, T, k), in a third of the time of mean
        mass = (mean @ self._membership(mean.shape[-1])).transpose(2, 1, 0)
        found = {f"attn_{name}": mass[number] for number, name in enumerate(SEGMENTS)}
        found["svar"] = found["attn_image"][:, middle(len(weights))].sum(-1)
        if "attn_entropy" in self._names:  # as ``stethoscope.features.reduce`` has it
            image = mean[..., self._steps.image]
            share = image / np.maximum(image.sum(-1, keepdims=True), 1e-12)
            spread = -(share * np.log(np.maximum(share, 1e-12))).sum(-1)
            found["attn_entropy"] = spread.T / math.log(max(image.shape[-1], 2))
        return found

    def _weights(self, some: Sequence[Step], seen: int) -> np.ndarray:
        """(L, H, T, seen) attention of the queries of T steps in a row to the keys that the last has seen."""
        layers, count = list(zip(*(step.rows["language"] for step in some), strict=True)), len(some)
        heads = layers[0][0].query.shape[1]
        scores = np.empty((len(layers), heads, count, seen), np.float32)
        for rows, out in zip(layers, scores, strict=True):
            keys = rows[0].keys.newest.numpy()[0, :, :seen]
            query = rows[0].query if count == 1 else torch.cat([row.query for row in rows], 2)
            query = query.numpy().reshape(len(keys), -1, keys.shape[-1]) * rows[0].keys.scaling  # by group of heads
            np.matmul(query, keys.transpose(0, 2, 1), out=out.reshape(len(keys), -1, seen))
        if count > 1:
            scores[..., -count:] += np.triu(np.full((count, count), -np.inf, np.float32), 1)
        return torch.from_numpy(scores).softmax(-1).numpy()

    def _membership(self, length: int) -> np.ndarray:
        """(length, 5) which segment every key belongs to, as 0 and 1."""
        if len(self._members) < length:
            self._members = self._steps.membership("language", length + 512).cpu().numpy()
        return self._members[:length]
