"""Score tokens by a detector as they are generated, from the features that decoding steps provide."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from stethoscope.core.errors import CapabilityError, CaptureError, ConfigError
from stethoscope.core.token_table import in_half_precision, pack_vectors, reduce_subtokens
from stethoscope.core.types import Answer
from stethoscope.diagnosis.answer_verdicts import feature_set
from stethoscope.features import FEATURES
from stethoscope.features.attention import middle
from stethoscope.features.registry import column_names
from stethoscope.features.relevancy import project_image_tokens
from stethoscope.streaming.recorded_steps import STEP_REQUIREMENTS
from stethoscope.tracing.trace import SEGMENTS

if TYPE_CHECKING:
    from stethoscope.detection.detector import Detector
    from stethoscope.features import Feature
    from stethoscope.streaming.events import MentionKeys
    from stethoscope.streaming.recorded_steps import RecordedSteps, Step
    from stethoscope.tracing.trace import Trace

HISTORY = frozenset(
    {"sequence_logprob"}
    | {f"lookback_{part}_{row}" for part in ("image", "question", "context") for row in "qc"}
    | {f"{name}_{row}" for name in ("overtrust", "overtrust_column") for row in "qc"}
)
"""Features of a token that also depend on the tokens before it; most others read only the token's own rows."""
COUNTED = ("position", "log_position", "repetition")
"""Features that are counted: index, log(1 + index), earlier occurrences of the token."""

_UNCERTAINTY = ("nll", "entropy", "max_prob", "margin")
_MASS = tuple(f"attn_{segment}" for segment in SEGMENTS[:-1])  # no feature reads the rest
_LENS = ("lens_rank", "lens_logprob")
FAST_FEATURES = frozenset((*_UNCERTAINTY, *_MASS, "svar", "attn_entropy", *_LENS, *COUNTED))
"""Features that ``FastFeatures`` computes, and ``FAST_STATES``."""
FAST_STATES = tuple(f"hidden_{layer}_{row}" for layer in ("middle", "last") for row in "qc")
"""Hidden states of the row that predicts a token (q) and of the row that reads it (c), as ``Lens.probed`` has them."""
_FIRST = len(_UNCERTAINTY) + len(COUNTED)  # columns, one for each
_MAX_NUMBERS = 2**18  # numbers per array; beyond that torch is faster, because it has threads
_GROW = 512
_PENDING = 32  # steps after which tokens are read although no name is complete, so that few are kept


class Scorer:
    """Features and warning probability of tokens of one answer.

    Only the tokens that are asked for cost anything. What their features need of all others is counted here or kept by
    the recorder: occurrences, and for ``HISTORY`` every step.

    A detector that needs the name of the object, for instance because it looks for it among the image tokens, judges
    whole mentions (``judge``) as soon as their names are complete, and no token.

    Args:
        detector: fitted; only the features that it reads are computed, not the whole table that it was fitted on.
        delay: number of steps that a token may wait for its probability, see ``stethoscope.stream``.

    Attributes:
        requires: parts that the steps must record.
        lookahead: 1 if a token can be scored only after the next step has read it, else 0.
        batch_size: number of tokens that are scored at a time.
        named: whether the detector needs the name of the object.
        imaged: whether it reads the image tokens.

    Raises:
        CapabilityError: the detector reads features that are unknown at that time.
    """

    def __init__(self, detector: Detector, delay: int = 0) -> None:
        _check(detector, delay)
        features = feature_set(detector.features)
        self.requires = features.requires
        self.named, self.imaged = detector.inputs.needs_objects, detector.inputs.imaged
        self.lookahead = int(any(name.endswith("_c") for name in features.names))
        self.batch_size = _PENDING if self.named else delay + 1 - self.lookahead
        self._own = [item for item in features.features if item.name not in (*HISTORY, *COUNTED)]
        self._history = [item for item in features.features if item.name in HISTORY]
        self._features, self._table = detector.features, detector.schema.names
        self._detector = detector
        self._image_tokens: np.ndarray | None = None  # of the picture
        self._absence: np.ndarray | None = None  # what the detector makes of them
        self._fast: FastFeatures | None = None
        self._simple = FAST_FEATURES.union(FAST_STATES).issuperset(features.names)
        self._indices: list[int] = []  # of the detector's columns among those that are computed
        self._counted: list[tuple[int, float, int]] = []  # ``COUNTED`` of every token so far
        self._seen: dict[int, int] = {}  # occurrences by token
        self._rows: dict[int, np.ndarray] = {}  # by token, of those that were scored

    def score(self, steps: RecordedSteps, ids: Sequence[int], indices: Sequence[int]) -> np.ndarray:
        """Compute the probabilities of some tokens, in [0, 1]; higher means hallucinated; none with ``named``.

        Args:
            steps: steps of all tokens, and of ``lookahead`` more.
            ids: all tokens up to the last that is scored.
            indices: of the tokens to score, ascending, all later than those of the last call.

        Raises:
            CapabilityError: the model does not give what the detector reads.
            CaptureError: a value is not finite.
        """
        self._count(ids)
        parts: list[np.ndarray] = []
        for _, group in groupby(enumerate(indices), lambda pair: pair[1] - pair[0]):
            run = [index for _, index in group]
            self.skip(steps, run[0])
            parts += self._score_run(steps, ids[: run[-1] + 1], run[0])
        if not parts:
            return np.zeros(0)
        rows = parts[0] if len(parts) == 1 else np.concatenate(parts)
        # a finite sum is a cheap sufficient check; fall back to the full scan
        if not math.isfinite(np.add.reduce(rows, None)) and not np.isfinite(rows).all():
            name = self._features[int(np.isfinite(rows).all(0).argmin())]
            raise CaptureError(f"feature {name!r} gave a value that is not finite")
        self._rows.update(zip(indices, rows, strict=True))
        return np.zeros(0) if self.named else self._predict(rows)

    def judge(self, mention: MentionKeys, steps: RecordedSteps) -> float | None:
        """Compute the probability of a mention whose name is complete, with ``named``; the tokens have been scored.

        Args:
            mention: with its tokens.
            steps: of the answer.

        Returns:
            In [0, 1]; None where not all of its tokens have been scored, such as the last one of a cut answer.

        Raises:
            CapabilityError: the detector reads image tokens, and the model shows none.
        """
        subtokens = self._detector.settings["subtokens"]
        tokens = mention.tokens[: 1 if subtokens in ("first", "all") else None]
        if not tokens or not self._rows.keys() >= set(tokens):
            return None
        row = reduce_subtokens(np.stack([self._rows[token] for token in tokens]), self._features, subtokens)
        places = np.array([[tokens[0], mention.mention_index, mention.repeat_index]], float)
        return float(self._predict(row, [mention.object], places, self._absent_objects(steps))[0])

    def _predict(self, rows: np.ndarray, *mention: Any) -> np.ndarray:
        """Compute the probabilities of rows; ``mention`` is what ``Design.arrange`` needs besides."""
        return self._detector.model.predict(self._detector.design.arrange(rows, *mention))

    def _absent_objects(self, steps: RecordedSteps) -> np.ndarray | None:
        """Look for all objects among the image tokens, once for an answer."""
        if self.imaged and self._absence is None:
            if steps.image_embeds is None or not len(steps.image_embeds):
                raise CapabilityError("the detector looks for objects among the image tokens, which this model hides")
            self._image_tokens = in_half_precision(project_image_tokens(steps.image_embeds))
            self._absence = self._detector.design.absent_objects(self._image_tokens.astype(np.float32))
        return self._absence

    def skip(self, steps: RecordedSteps, stop: int) -> None:
        """Let the recorder release the steps before ``stop`` that are never scored, unless others need them."""
        if not self._history:
            steps.discard(stop)

    def _score_run(self, steps: RecordedSteps, ids: Sequence[int], start: int) -> list[np.ndarray]:
        """Compute the detector's columns (T, features) of all tokens from ``start`` on, in parts."""
        if self._fast is None and self._simple:
            self._fast = FastFeatures(steps, self._features)
        fast = self._fast
        parts: list[np.ndarray] = []
        while start < len(ids):
            steps_batch = steps.next_batch(start, len(ids)) if fast is not None else []
            stop = start + len(steps_batch) if steps_batch else len(ids)
            counted = self._counted[start:stop]
            if fast is not None and steps_batch and fast.supports(steps_batch, start):
                parts.append(fast.rows(steps_batch, ids[start:stop], start, counted))
                steps.discard(stop)
            else:
                parts.append(self._traced(steps, ids[:stop], start, counted))
            start = stop
        return parts

    def _traced(self, steps: RecordedSteps, ids: Sequence[int], start: int, counted: list[tuple]) -> np.ndarray:
        """Compute the detector's columns (T, features) from a trace of the tokens from ``start`` on."""
        trace = self._trace(self._own, steps, ids, start)
        computed = [(item, item.function(trace)) for item in self._own]
        if self._history:
            full_trace = self._trace(self._history, steps, ids, 0)
            computed += [(item, item.function(full_trace)[start:]) for item in self._history]
        arrays = [(item, np.asarray(values, dtype=np.float32)) for item, values in computed]
        if not self._indices:
            names = [
                name for item, values in arrays for name in column_names(item.name, item.vector, values.shape[1:])
            ] + list(COUNTED)
            indices = {name: index for index, name in enumerate(names)}
            missing = [name for name in self._features if name not in indices]
            if missing:
                raise CapabilityError(
                    f"the detector reads {missing[0]}, which this model does not give; it was trained on another model"
                )
            self._indices = [indices[name] for name in self._features]
        parts = [*(values.reshape(len(values), -1) for _, values in arrays), np.array(counted, np.float32)]
        return np.concatenate(parts, 1)[:, self._indices]

    def _trace(self, features: Sequence[Feature], steps: RecordedSteps, ids: Sequence[int], start: int) -> Trace:
        requires: frozenset[str] = frozenset().union(*(item.requires for item in features))
        own = tuple(ids[start:])
        answer = Answer("", own, ((0, 0),) * len(own), (0.0,) * len(own))  # no feature reads its text
        return steps.trace(start, answer, requires, bool(self.lookahead))

    def rewind(self, ids: Sequence[int]) -> None:
        """Go back to the tokens of ``ids``."""
        del self._counted[len(ids) :]
        self._seen = dict(Counter(ids[: len(self._counted)]))
        self._rows = {index: row for index, row in self._rows.items() if index < len(ids)}

    def _count(self, ids: Sequence[int]) -> None:
        """Compute ``COUNTED`` of the tokens that have not been counted."""
        seen = self._seen
        for index in range(len(self._counted), len(ids)):
            before = seen.get(ids[index], 0)
            self._counted.append((index, math.log1p(index), before))
            seen[ids[index]] = before + 1

    @property
    def image_tokens(self) -> str:
        """The image tokens as text, with ``imaged`` once a mention was judged; else empty."""
        return "" if self._image_tokens is None else pack_vectors(self._image_tokens)

    def columns(self, count: int) -> dict[str, np.ndarray]:
        """Return (count,) columns as in the detector's table, with missing values where nothing was computed."""
        columns = {name: np.full(count, np.nan) for name in self._table}
        indices = [index for index in self._rows if index < count]
        if indices:
            rows = np.stack([self._rows[index] for index in indices])
            for name, values in zip(self._features, rows.T, strict=True):
                columns[name][indices] = values
        return columns


def smallest_delay(detector: Detector) -> int | None:
    """Find the smallest ``delay``, in steps, at which a detector can score an answer as it is written, if any."""
    for delay in (0, 1):
        try:
            Scorer(detector, delay)
        except CapabilityError:
            continue
        return delay
    return None


def _check(detector: Detector, delay: int) -> None:
    if not isinstance(delay, int) or delay < 0:
        raise ConfigError(f"delay={delay!r} should be 0 (a warning with every token) or a number of steps")
    names = feature_set(detector.features).names
    late = [name for name in names if not FEATURES[name].requires <= STEP_REQUIREMENTS]
    if late:
        raise CapabilityError(
            f"the detector reads {', '.join(late)}, which a decoding step does not give; train with features=default "
            "or features=fast to warn while the model writes, or give this one as final="
        )
    consuming = [name for name in names if name.endswith("_c")]
    if consuming and not delay and not detector.inputs.needs_objects:
        raise CapabilityError(
            f"the detector reads {', '.join(consuming)} of the row that consumes the token; use delay=1, or train "
            "with features=fast"
        )


class FastFeatures:
    """Fast path that computes features of decoding steps with numpy, on the CPU and in float32.

    It skips the trace and gives the values of the feature functions within 1e-4. With it a token that is scored takes
    about a quarter more CPU time on the embedded test-bed model (``scripts/bench/stream.py``); it was not measured on a
    GPU. All other cases compute the features from a trace.

    Args:
        steps: steps of the answer.
        columns: of the detector, all of ``FAST_FEATURES`` and ``FAST_STATES``.
    """

    def __init__(self, steps: RecordedSteps, columns: Sequence[str]) -> None:
        self._steps, self._columns = steps, columns
        self._decodes = any(column.startswith(_LENS) for column in columns)
        self._states = [name for name in FAST_STATES if any(column.startswith(f"{name}_d") for column in columns)]
        self._attends = any(column.startswith((*_MASS, "svar", "attn_entropy")) for column in columns)
        self._members = np.zeros((0, len(SEGMENTS)), np.float32)
        self._fits: bool | None = None  # whether the model is supported; unknown before the first step

    def supports(self, steps_batch: Sequence[Step], start: int) -> bool:
        """Decide whether these steps, of the tokens from ``start`` on, can be read here and are few enough."""
        if not steps_batch[0].deferred or (self._decodes and not self._steps.lens.checked):  # a trace checks it
            return False
        if self._fits is None:
            self._fits = self._set_up(steps_batch[0], self._steps.logits[start])
        keys = self._steps.key_count(start + len(steps_batch) - 1)
        return self._fits and len(steps_batch) * max(self._vocab_numbers, self._heads * keys) <= _MAX_NUMBERS

    def _set_up(self, step: Step, logits: Tensor) -> bool:
        """Lay out the columns; return whether all are available, on the CPU and in float32."""
        rows, layers = step.deferred_rows("language") if self._attends else [], len(step.hidden) if self._decodes else 1
        self._vocab_numbers, self._heads = layers * len(logits), sum(row.query.shape[1] for row in rows)
        widths = dict.fromkeys((*_UNCERTAINTY, *COUNTED), 1)
        if self._attends:
            widths |= {**dict.fromkeys(_MASS, len(rows)), "svar": 1, "attn_entropy": len(rows)}
        widths |= dict.fromkeys(_LENS, layers - 1)
        if self._states:
            widths |= dict.fromkeys(self._states, step.hidden[-1].shape[-1])
        names: list[str] = []
        self._slices: dict[str, slice] = {}
        for name, width in widths.items():
            self._slices[name] = slice(len(names), len(names) + width)
            shape = () if name in (*_UNCERTAINTY, *COUNTED, "svar") else (width,)
            names += column_names(name, name in self._states, shape)
        indices = {name: index for index, name in enumerate(names)}
        if not indices.keys() >= set(self._columns):
            return False  # computing a trace reports the reason
        self._width, self._indices = len(names), np.array([indices[column] for column in self._columns])
        if len({(*row.query.shape, row.keys.scaling) for row in rows}) > 1:  # layers of different kinds
            return False
        tensors = [logits, *step.hidden, *(part for row in rows for part in (row.query, row.keys.newest))]
        return all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)

    def rows(self, steps_batch: Sequence[Step], ids: Sequence[int], start: int, counted: Sequence[tuple]) -> np.ndarray:
        """Compute the detector's columns of consecutive tokens.

        Args:
            steps_batch: their steps, T of them.
            ids: the tokens.
            start: index of the first one.
            counted: their values of ``COUNTED``.

        Returns:
            (T, columns) float32.
        """
        out = np.empty((len(steps_batch), self._width), np.float32)
        self._read_predictions(steps_batch, ids, start, counted, out)
        if self._attends:
            self._read_attention(steps_batch, start, out)
        if self._states:
            self._read_states(steps_batch, start, out)
        return out.take(self._indices, 1)

    def _read_predictions(
        self, steps_batch: Sequence[Step], ids: Sequence[int], start: int, counted: Sequence[tuple], out: np.ndarray
    ) -> None:
        """Fill in uncertainty, and the logit lens of all layers but the last, which is the model's output."""
        count = len(steps_batch)
        own = self._steps.logits[start : start + count]
        if self._decodes:
            own = [self._lens([layer for step in steps_batch for layer in step.hidden[:-1]]).view(-1), *own]
        stacked = (own[0] if len(own) == 1 else torch.cat(own)).view(-1, self._steps.logits[start].shape[0])
        logprobs, raw = stacked.log_softmax(-1).numpy(), stacked.numpy()
        rank, logprob = (self._slices[name] for name in _LENS)
        layers = rank.stop - rank.start
        for index, (row, token, known) in enumerate(zip(out, ids, counted, strict=True)):
            last = logprobs[index - count]
            shares, best = np.exp(last), last.argmax()
            entropy, top = -shares.dot(last), shares[best]
            shares[best] = 0
            row[:_FIRST] = -last[token], entropy, top, top - np.maximum.reduce(shares), *known
            if layers:
                lens_rows = slice(index * layers, (index + 1) * layers)
                row[rank] = [math.log1p(np.count_nonzero(layer > layer[token])) for layer in raw[lens_rows]]
                row[logprob] = logprobs[lens_rows, token]

    def _lens(self, hidden: list[Tensor]) -> Tensor:
        """Decode residual streams (1, 1, D) to (states, V) logits."""
        lens = self._steps.lens
        return lens.unembed(lens.normalise(torch.cat(hidden, 1)[0]))

    def _read_attention(self, steps_batch: Sequence[Step], start: int, out: np.ndarray) -> None:
        """Fill in the attention features, mean over heads, by layer."""
        weights = self._weights(steps_batch, self._steps.key_count(start + len(steps_batch) - 1))
        mean = np.add.reduce(weights, 1)  # (L, T, k), times the number of heads
        mean *= 1 / weights.shape[1]
        mass = mean @ self._membership(mean.shape[-1])
        every = mass[..., : len(_MASS)].transpose(1, 2, 0)
        out[:, self._slices[_MASS[0]].start : self._slices[_MASS[-1]].stop] = every.reshape(len(steps_batch), -1)
        out[:, self._slices["svar"].start] = np.add.reduce(mass[middle(len(mass)), :, 0], 0)
        image = mean[..., self._steps.image]
        share = image / np.maximum(mass[..., :1], 1e-12)  # as in ``stethoscope.features.distributions``
        spread = np.einsum("ltn,ltn->tl", share, np.log(np.maximum(share, 1e-12)))
        out[:, self._slices["attn_entropy"]] = spread / -math.log(max(image.shape[-1], 2))

    def _read_states(self, steps_batch: Sequence[Step], start: int, out: np.ndarray) -> None:
        """Fill in the hidden states of the predicting rows and, a step later, of the consuming rows."""
        count = len(steps_batch)
        consumed = any(name.endswith("_c") for name in self._states)
        steps = [*steps_batch, *([self._steps.unread(start + count)] if consumed else [])]
        layers = [torch.cat(states, 1)[0] for states in zip(*(step.hidden for step in steps), strict=True)]
        states = self._steps.lens.probed(layers).numpy()
        for name in self._states:
            first = int(name.endswith("_c"))
            out[:, self._slices[name]] = states[first : first + count, int("last" in name)]

    def _weights(self, steps_batch: Sequence[Step], seen: int) -> np.ndarray:
        """Compute the (L, H, T, seen) attention of T consecutive steps to the keys that the last has seen."""
        layers, count = (
            list(zip(*(step.deferred_rows("language") for step in steps_batch), strict=True)),
            len(steps_batch),
        )
        queries = torch.cat([row.query for rows in layers for row in rows], 2).numpy()[0]
        queries *= layers[0][0].keys.scaling
        heads, _, size = queries.shape
        scores = np.empty((len(layers), heads, count, seen), np.float32)
        for index, rows in enumerate(layers):
            keys = rows[0].keys.newest.numpy()[0, :, :seen]
            grouped = queries[:, index * count : (index + 1) * count].reshape(len(keys), -1, size)
            np.matmul(grouped, keys.transpose(0, 2, 1), out=scores[index].reshape(len(keys), -1, seen))
        if count > 1:
            scores[..., -count:] += _after(count)
        return torch.from_numpy(scores).softmax(-1).numpy()

    def _membership(self, length: int) -> np.ndarray:
        """Return the membership of every key in the segments as 0 and 1, (length, 5)."""
        if len(self._members) < length:
            self._members = self._steps.membership("language", length + _GROW, torch.device("cpu")).numpy()
        return self._members[:length]


@cache
def _after(count: int) -> np.ndarray:
    """Return (count, count) zeros, with -inf where a key comes after its step."""
    return np.triu(np.full((count, count), -np.inf, np.float32), 1)
