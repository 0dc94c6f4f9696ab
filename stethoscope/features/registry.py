"""The catalogue of features: names, groups, costs and directions. The other modules of this package fill it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stethoscope.core.errors import CaptureError, ConfigError, unknown
from stethoscope.tracing.trace import MENTION_NEEDS

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from stethoscope.tracing.trace import Trace

FORWARD, EXTRA_FORWARD, BACKWARD = "same forward pass", "one more forward pass", "a backward pass"


PER_MENTION, QUESTION = "one more pass per mention", "one more question per mention"


CLASSES = (FORWARD, EXTRA_FORWARD, BACKWARD, PER_MENTION, QUESTION)


"""Cost classes, the cheapest first."""


COSTS = {
    "attention": FORWARD,
    "lens": FORWARD,
    "heads": FORWARD,
    "trajectory": FORWARD,
    "states": FORWARD,
    "image_lens": FORWARD,
    "blank": EXTRA_FORWARD,
    "noise": EXTRA_FORWARD,
    "no_image": EXTRA_FORWARD,
    "core": EXTRA_FORWARD,
    "relevancy": BACKWARD,
    "masked": PER_MENTION,
    "questions": QUESTION,
}


"""Cost class of every part of a trace that a feature may read."""


@dataclass(frozen=True)
class Feature:
    """A named feature.

    Attributes:
        name: column name; features with one column per layer get a suffix ``_l00``, ``_l01``, ..., those with one per
            layer and head ``_l00h00``, ..., those with one per dimension of a state ``_d0000``, ... .
        group: what configs switch on and off together.
        high: what a high value speaks for, as published: ``hallucinated``, ``grounded`` or ``depends``.
        needs: parts of the trace it reads beyond the logits, of ``stethoscope.tracing.trace``.
        function: from a trace to (T,), (T, layers), (T, layers, heads) or (T, dimensions) values.
        vector: the columns are dimensions of a state and mean nothing one by one.
    """

    name: str
    group: str
    high: str
    needs: frozenset[str]
    function: Callable[[Trace], Tensor | np.ndarray]
    vector: bool = False

    @property
    def gaps(self) -> bool:
        """Whether tokens that name no object have no value (NaN)."""
        return not self.needs.isdisjoint(MENTION_NEEDS)

    @property
    def summary(self) -> str:
        """First line of the function's documentation."""
        return (self.function.__doc__ or "").strip().splitlines()[0]

    @property
    def cost(self) -> str:
        """What the feature costs beyond generating the answer."""
        return max((COSTS[need] for need in self.needs), key=CLASSES.index, default=FORWARD)


FEATURES: dict[str, Feature] = {}


def feature(group: str, high: str, needs: Iterable[str] = (), vector: bool = False) -> Callable:
    """Registers the decorated function under its own name."""

    def register(function: Callable[[Trace], Tensor | np.ndarray]) -> Callable[[Trace], Tensor | np.ndarray]:
        name = function.__name__
        FEATURES[name] = Feature(name, group, high, frozenset(needs), function, vector)
        return function

    return register


def both_rows(group: str, high: str, needs: Iterable[str] = (), vector: bool = False) -> Callable:
    """Registers a function of a trace and a row convention twice, as ``<name>_q`` and ``<name>_c``.

    ``q`` is the row that predicts the token, known before the token is shown; ``c`` the next one, which reads it.
    The function's second argument is their offset, 0 or 1.
    """

    def register(function: Callable[[Trace, int], Tensor]) -> Callable[[Trace, int], Tensor]:
        for offset, (suffix, row) in enumerate((("q", "predicting row"), ("c", "consuming row"))):

            def one(trace: Trace, offset: int = offset) -> Tensor:
                return function(trace, offset)

            first, _, rest = (function.__doc__ or "").strip().partition("\n")
            one.__doc__ = f"{first.rstrip('.')}; {row}.\n{rest}"
            one.__name__ = f"{function.__name__}_{suffix}"
            feature(group, high, needs, vector)(one)
        return function

    return register


EVERYWHERE = ("uncertainty", "position", "attention", "lens", "blank", "relevancy", "sight")


"""Groups that every family of models has and that are chosen when nothing is said: those of ``features=default``."""


class FeatureSet:
    """The features of a run, chosen by group and by name.

    Attributes:
        features: the chosen features in the order of the catalogue.
        needs: what a trace must hold for them.
        score: name of the feature that is a published detector's score by itself; None where it learns from them all.
    """

    def __init__(
        self,
        groups: Sequence[str] = EVERYWHERE,
        names: Sequence[str] = (),
        without: Sequence[str] = (),
        score: str | None = None,
    ) -> None:
        """Chooses all features of ``groups`` plus ``names``, less ``without``: features, or whole groups.

        Raises:
            ConfigError: a group or name is not known, nothing is left, or the score is not among the features.
        """
        known = tuple(dict.fromkeys(item.group for item in FEATURES.values()))
        for group in groups:
            if group not in known:
                raise ConfigError(unknown("feature group", group, known))
        for name in names:
            if name not in FEATURES:
                raise ConfigError(unknown("feature", name, FEATURES))
        for name in without:
            if name not in FEATURES and name not in known:
                raise ConfigError(unknown("feature or group", name, [*FEATURES, *known]))
        left_out = {group for group in without if group not in FEATURES}  # "position" is a feature first
        self.features = tuple(
            item
            for item in FEATURES.values()
            if (item.group in groups or item.name in names) and item.name not in without and item.group not in left_out
        )
        if not self.features:
            raise ConfigError("no feature is left; choose groups of " + ", ".join(known))
        self.needs = frozenset().union(*(item.needs for item in self.features))
        if score is not None and score not in self.names:
            raise ConfigError(
                f"features.score={score} is none of the features that are chosen: {', '.join(self.names)}"
            )
        self.score = score

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the features, without layer suffixes."""
        return tuple(item.name for item in self.features)

    @property
    def cost(self) -> str:
        """The dearest cost class among the features."""
        return max((item.cost for item in self.features), key=CLASSES.index, default=FORWARD)

    @property
    def head(self) -> str:
        """What is computed and what it costs, in a line.

        >>> FeatureSet(["position", "blank"]).head
        'features: 6 of position, blank; cost: one more forward pass (blank)'
        >>> FeatureSet(["noise", "core", "relevancy"]).head.partition("; ")[2]
        'cost: 2 more forward passes (noise, core), a backward pass (relevancy)'
        >>> FeatureSet(["verification"]).head
        'features: 2 of verification; cost: one more question per mention (questions)'
        """
        groups = dict.fromkeys(item.group for item in self.features)
        parts = []
        for cost in CLASSES[1:]:
            needs = [need for need in COSTS if need in self.needs and COSTS[need] == cost]
            several = cost == EXTRA_FORWARD and len(needs) > 1
            words = f"{len(needs)} more forward passes" if several else cost
            parts += [f"{words} ({', '.join(needs)})"] if needs else []
        return f"features: {len(self.features)} of {', '.join(groups)}; cost: {', '.join(parts) or FORWARD}"

    def compute(self, trace: Trace) -> Mapping[str, np.ndarray]:
        """All columns for one trace: name to (T,) float32.

        Raises:
            CaptureError: a value is not finite; the message names the feature.
            CapabilityError: a feature is not defined for this kind of model; the message names it.
        """
        columns: dict[str, np.ndarray] = {}
        for item in self.features:
            values = np.asarray(item.function(trace), dtype=np.float32)
            if not (np.isfinite(values) | (np.isnan(values) & item.gaps)).all():
                raise CaptureError(f"feature {item.name!r} gave a value that is not finite")
            columns.update(as_columns(item, values))
        trace.found.clear()
        return columns


def as_columns(item: Feature, values: np.ndarray) -> dict[str, np.ndarray]:
    """Columns of one feature.

    >>> list(as_columns(FEATURES["head_image_q"], np.zeros((3, 1, 2))))
    ['head_image_q_l00h00', 'head_image_q_l00h01']
    >>> list(as_columns(FEATURES["hidden_last_q"], np.zeros((3, 2))))
    ['hidden_last_q_d0000', 'hidden_last_q_d0001']
    """
    name = item.name
    if values.ndim == 1:
        return {name: values}
    if item.vector:
        return {f"{name}_d{index:04d}": values[:, index] for index in range(values.shape[1])}
    if values.ndim == 2:
        return {f"{name}_l{layer:02d}": values[:, layer] for layer in range(values.shape[1])}
    _, layers, heads = values.shape
    return {f"{name}_l{i:02d}h{j:02d}": values[:, i, j] for i in range(layers) for j in range(heads)}


def folder() -> Path:
    """Where the files lie."""
    import stethoscope.conf

    return Path(stethoscope.conf.__file__).parent / "features"


@cache
def set_names() -> tuple[str, ...]:
    """Names of all sets, such as ``fast`` or ``paper/svar``."""
    return tuple(path.relative_to(folder()).with_suffix("").as_posix() for path in sorted(folder().rglob("*.yaml")))


def named_set(name: str) -> FeatureSet:
    """The feature set of a name.

    Raises:
        ConfigError: there is none of that name.

    >>> named_set("paper/glsim").score
    'glsim_q'
    """
    import yaml

    if name not in set_names():
        raise ConfigError(unknown("feature set", name, set_names()))
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where PyYAML was built with it
    config = yaml.load((folder() / f"{name}.yaml").read_text(encoding="utf-8"), loader)
    return FeatureSet(**{key: value for key, value in config.items() if key != "_target_"})
