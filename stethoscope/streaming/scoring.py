"""A detector on the rows of tokens as they come: the features that decoding steps can fill, judged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from stethoscope.diagnosis.detecting import feature_set
from stethoscope.errors import CapabilityError, CaptureError, ConfigError
from stethoscope.features import FEATURES
from stethoscope.features.reduce import token_logprob
from stethoscope.features.selection import as_columns
from stethoscope.records import Answer
from stethoscope.streaming.direct import COUNTED, NAMES, Direct
from stethoscope.streaming.steps import STEP_NEEDS

if TYPE_CHECKING:
    from stethoscope.detector import Detector
    from stethoscope.features import Feature
    from stethoscope.streaming.steps import Steps
    from stethoscope.trace import Trace

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
        self.needs = features.needs
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
        needs = frozenset().union(*(item.needs for item in features))
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
    late = [name for name in names if not FEATURES[name].needs <= STEP_NEEDS]
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
