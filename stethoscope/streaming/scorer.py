"""A detector on the rows of tokens as they come: the features that decoding steps can fill, judged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from stethoscope.core.errors import CapabilityError, CaptureError, ConfigError
from stethoscope.core.types import Answer
from stethoscope.diagnosis.run_diagnosis import feature_set
from stethoscope.features import FEATURES
from stethoscope.features.attention import middle
from stethoscope.features.common import token_logprob
from stethoscope.features.registry import as_columns
from stethoscope.streaming.step_recorder import STEP_NEEDS
from stethoscope.tracing.trace import SEGMENTS

if TYPE_CHECKING:
    from stethoscope.detector import Detector
    from stethoscope.features import Feature
    from stethoscope.streaming.step_recorder import Step, Steps
    from stethoscope.tracing.trace import Trace

HISTORY = frozenset(
    {"sequence_logprob"}
    | {f"lookback_{part}_{row}" for part in ("image", "question", "context") for row in "qc"}
    | {f"{name}_{row}" for name in ("overtrust", "overtrust_column") for row in "qc"}
)


"""Features of a token that are functions of the tokens before it too; most others read the token's own rows."""


class Scorer:
    """Features and warning probability of the tokens of one answer.

    Args:
        detector: fitted; only the features that it reads are computed, not all of the table that it was fitted on.
        delay: how many steps a token may wait for its probability, see ``stethoscope.stream``.

    Attributes:
        needs: what the steps must hold.
        logprobs: of the tokens that were judged last, natural logs.
        waits: 1 if a token can be judged only when the next step has read it, else 0.
        together: so many tokens are judged at a time.

    Raises:
        CapabilityError: the detector reads what is not known at that time.
    """

    def __init__(self, detector: Detector, delay: int = 0) -> None:
        _check(detector, delay)
        features = feature_set(detector.features)
        self.requires = features.requires
        self.waits = int(any(name.endswith("_c") for name in features.names))
        self.together = delay + 1 - self.waits
        self._own = [item for item in features.features if item.name not in (*HISTORY, *COUNTED)]
        self._history = [item for item in features.features if item.name in HISTORY]
        self._features, self._table = detector.features, detector.schema.names
        self._predict = detector.model.predict
        self._direct: Direct | None = None
        self._simple = NAMES.issuperset(features.names)
        self._places: list[int] = []  # of the detector's columns among those that are computed
        self.logprobs: list[float] = []
        self._seen: dict[int, int] = {}  # how often
        self._rows: list[np.ndarray] = []

    def judge(self, steps: Steps, ids: Sequence[int], start: int) -> np.ndarray:
        """The probabilities of the newest tokens, which are next in line.

        Args:
            steps: of all tokens, and of the one behind them where the scorer ``waits``.
            ids: all tokens up to the last that is to be judged. ``start``: number of the first one.

        Raises:
            CapabilityError: the model does not give what the detector reads.
            CaptureError: a value is not finite.
        """
        if self._direct is None and self._simple:
            self._direct = Direct(steps, self._features)
        first, counted, parts, self.logprobs = start, self._count(ids, start), [], []
        while start < len(ids):
            some = steps.alike(start, len(ids)) if self._simple else []
            stop = start + len(some) if some else len(ids)
            given = counted[start - first : stop - first]
            if some and self._direct.takes(some, start):
                parts.append(self._direct.rows(some, ids[start:stop], start, given))
                self.logprobs += self._direct.logprobs.tolist()
                steps.forget(stop)
            else:
                parts.append(self._traced(steps, ids[:stop], start, given))
            start = stop
        rows = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if not math.isfinite(np.add.reduce(rows, None)) and not np.isfinite(rows).all():  # the sum is soon told
            name = self._features[int(np.isfinite(rows).all(0).argmin())]
            raise CaptureError(f"feature {name!r} gave a value that is not finite")
        self._rows.append(rows)
        return self._predict(rows)

    def _traced(self, steps: Steps, ids: Sequence[int], start: int, counted: list[tuple]) -> np.ndarray:
        """The detector's columns (T, features) of a trace of the tokens from ``start`` on."""
        trace = self._trace(self._own, steps, ids, start)
        self.logprobs += token_logprob(trace).tolist()
        found = [(item, item.function(trace)) for item in self._own]
        if self._history:
            whole = self._trace(self._history, steps, ids, 0)
            found += [(item, item.function(whole)[start:]) for item in self._history]
        found = [(item, np.asarray(values, dtype=np.float32)) for item, values in found]
        if not self._places:
            names = [name for item, values in found for name in as_columns(item, values)] + list(COUNTED)
            missing = [name for name in self._features if name not in names]
            if missing:
                raise CapabilityError(
                    f"the detector reads {missing[0]}, which this model does not give; it was trained on another model"
                )
            self._places = [names.index(name) for name in self._features]
        parts = [*(values.reshape(len(values), -1) for _, values in found), np.array(counted, np.float32)]
        return np.concatenate(parts, 1)[:, self._places]

    def _trace(self, features: Sequence[Feature], steps: Steps, ids: Sequence[int], start: int) -> Trace:
        needs = frozenset().union(*(item.requires for item in features))
        return steps.trace(start, _unread(ids[start:]), needs, bool(self.waits))

    def _count(self, ids: Sequence[int], start: int) -> list[tuple[int, float, int]]:
        """``COUNTED`` for the tokens from ``start`` on, each asked for once."""
        rows, seen = [], self._seen
        for place, token in enumerate(ids[start:], start):
            before = seen.get(token, 0)
            rows.append((place, math.log1p(place), before))
            seen[token] = before + 1
        return rows

    def columns(self) -> dict[str, np.ndarray]:
        """(T,) columns as the detector's table has them; those that it does not read are missing values."""
        rows = np.concatenate(self._rows) if self._rows else np.zeros((0, len(self._features)))
        read = dict(zip(self._features, rows.T, strict=True))
        return {name: read.get(name, np.full(len(rows), np.nan)) for name in self._table}


def _unread(ids: Sequence[int]) -> Answer:
    """An answer whose text no feature reads."""
    return Answer("", tuple(ids), ((0, 0),) * len(ids), (0.0,) * len(ids))


def _check(detector: Detector, delay: int) -> None:
    if not isinstance(delay, int) or delay < 0:
        raise ConfigError(f"delay={delay!r} should be 0 (a warning with every token) or so many steps later")
    named = [key for key in ("factored", "objects") if detector.settings[key]]
    if named:
        raise CapabilityError(
            f"the detector reads the name of the object ({named[0]}=true), which is known when it is written out; "
            f"train with detector.{named[0]}=false to warn while the model writes, or give this one as final="
        )
    names = feature_set(detector.features).names
    late = [name for name in names if not FEATURES[name].requires <= STEP_NEEDS]
    if late:
        raise CapabilityError(
            f"the detector reads {', '.join(late)}, which a decoding step does not give; train with features=fast "
            "to warn while the model writes, or give this one as final="
        )
    consuming = [name for name in names if name.endswith("_c")]
    if consuming and not delay:
        raise CapabilityError(
            f"the detector reads {', '.join(consuming)} of the row that consumes the token; use delay=1, or train "
            "with features=fast"
        )


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
        share = image / np.maximum(mass[..., :1], 1e-12)  # as ``stethoscope.features.common`` has it
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
