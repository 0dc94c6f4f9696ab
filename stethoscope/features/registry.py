"""Registry of token features: names, groups, costs and directions. The other modules of this package fill it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, Union

import numpy as np

from stethoscope.core.errors import CaptureError, ConfigError, unknown
from stethoscope.tracing.trace import MENTION_REQUIREMENTS, SAMPLES

if TYPE_CHECKING:
    from torch import Tensor

    from stethoscope.tracing.trace import Trace

Values: TypeAlias = Union["Tensor", np.ndarray]
FeatureFunction: TypeAlias = Callable[["Trace"], Values]
Decorated = TypeVar("Decorated", bound=Callable[..., Values])

FORWARD, EXTRA_FORWARD, BACKWARD = "same forward pass", "one more forward pass", "a backward pass"
CONTINUATION = "a short continuation of the answer"
PER_MENTION, QUESTION = "one more pass per mention", "one more question per mention"
RESAMPLING = f"{SAMPLES} more answers"
COST_CLASSES = (FORWARD, EXTRA_FORWARD, CONTINUATION, BACKWARD, PER_MENTION, QUESTION, RESAMPLING)
"""Cost classes, the cheapest first."""

COSTS = {
    "attention": FORWARD,
    "lens": FORWARD,
    "hidden": FORWARD,
    "heads": FORWARD,
    "trajectory": FORWARD,
    "states": FORWARD,
    "image_lens": FORWARD,
    "layer_entropy": FORWARD,
    "evidence": FORWARD,
    "peaks": FORWARD,
    "own": FORWARD,
    "layer_states": FORWARD,
    "no_image_states": EXTRA_FORWARD,
    "continuation": CONTINUATION,
    "blank": EXTRA_FORWARD,
    "noise": EXTRA_FORWARD,
    "no_image": EXTRA_FORWARD,
    "core": EXTRA_FORWARD,
    "relevancy": BACKWARD,
    "masked": PER_MENTION,
    "questions": QUESTION,
    "question_states": QUESTION,
    "samples": RESAMPLING,
}
"""Cost class of every part of a trace that a feature may require."""


DIRECTIONS = ("hallucinated", "grounded", "depends")
"""What a higher value of a feature may speak for."""


@dataclass(frozen=True)
class Feature:
    """A named feature.

    Attributes:
        name: column name; features with one column per layer get a suffix ``_l00``, ``_l01``, ..., those with one per
            layer and head ``_l00h00``, ..., those with one per dimension of a state ``_d0000``, ..., and of states of
            several layers ``_l00_d0000``, ... .
        group: name by which configurations choose features together.
        higher_means: what a higher value speaks for, as published: ``hallucinated``, ``grounded`` or ``depends``.
        requires: parts of the trace that it reads beyond the logits, see ``stethoscope.tracing.trace``.
        function: maps a trace to (T,), (T, layers), (T, layers, heads), (T, dimensions) or (T, layers, dimensions)
            values.
        document: the function's docstring, which says unit, range and direction.
        vector: the columns are dimensions of a state and mean nothing one by one.
    """

    name: str
    group: str
    higher_means: str
    requires: frozenset[str]
    function: FeatureFunction
    document: str = ""
    vector: bool = False

    @property
    def mentions_only(self) -> bool:
        """Whether only tokens that name an object have a value; all others are NaN."""
        return not self.requires.isdisjoint(MENTION_REQUIREMENTS)

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return self.document.strip().splitlines()[0]

    @property
    def cost(self) -> str:
        """Cost class: what the feature costs beyond generating the answer."""
        return max((COSTS[part] for part in self.requires), key=COST_CLASSES.index, default=FORWARD)


FEATURES: dict[str, Feature] = {}


def _call_with_offset(function: Callable[..., Values], offset: int, trace: Trace) -> Values:
    return function(trace, offset)


def feature(
    group: str, higher_means: str, requires: Iterable[str] = (), vector: bool = False, rows: str = "predicting"
) -> Callable[[Decorated], Decorated]:
    """Register the decorated function as a feature under its own name.

    Args:
        group: name by which configurations choose features together.
        higher_means: ``hallucinated``, ``grounded`` or ``depends``.
        requires: parts of the trace that the function reads beyond the logits.
        vector: the columns are dimensions of a state and mean nothing one by one.
        rows: ``predicting``: a function of a trace. ``both``: a function of a trace and an offset, registered twice:
            ``<name>_q`` reads the row that predicts the token (offset 0), which is known before the token is shown;
            ``<name>_c`` reads the next row (offset 1), which consumes the token.

    Raises:
        ValueError: ``rows`` is neither.
        ConfigError: ``requires`` or ``higher_means`` holds an unknown word; the message names the feature.
    """
    if rows not in ("predicting", "both"):
        raise ValueError(f"rows={rows!r} should be 'predicting' or 'both'")
    requires = (requires,) if isinstance(requires, str) else tuple(requires)

    def register(function: Decorated) -> Decorated:
        name, document = function.__name__, function.__doc__ or ""
        for part in requires:
            if part not in COSTS:
                raise ConfigError(f"feature {name}: {unknown('part of a trace in requires', str(part), COSTS)}")
        if higher_means not in DIRECTIONS:
            raise ConfigError(f"feature {name}: {unknown('higher_means', str(higher_means), DIRECTIONS)}")
        variants: list[tuple[str, FeatureFunction, str]] = [(name, function, document)]
        if rows == "both":
            first, _, rest = document.strip().partition("\n")
            variants = [
                (
                    f"{name}_{suffix}",
                    partial(_call_with_offset, function, offset),
                    f"{first.rstrip('.')}; {row}.\n{rest}",
                )
                for offset, (suffix, row) in enumerate((("q", "predicting row"), ("c", "consuming row")))
            ]
        for column, variant, text in variants:
            FEATURES[column] = Feature(column, group, higher_means, frozenset(requires), variant, text, vector)
        return function

    return register


DEFAULT_GROUPS = ("uncertainty", "position", "attention", "lens", "hidden", "visual_evidence")
"""Groups that every family of models supports, used where none is chosen: those of ``features=default``."""


class FeatureSet:
    """Features of a run, chosen by group and by name.

    Attributes:
        features: the chosen features in the order of the registry.
        requires: parts that a trace must have for them.
        score: name of the feature that is a published detector's score by itself; None where it learns from them all.
        learner: how a published detector learns from them, see ``stethoscope.detection.learners``; None is a logistic
            regression.
    """

    def __init__(
        self,
        groups: Sequence[str] = DEFAULT_GROUPS,
        names: Sequence[str] = (),
        exclude: Sequence[str] = (),
        score: str | None = None,
        learner: Mapping[str, Any] | None = None,
        sets: Sequence[str] = (),
    ) -> None:
        """Choose all features of some groups and single features by name, less those that are excluded.

        Args:
            groups: names of groups.
            names: names of features that are added to the groups.
            exclude: names of features, or of whole groups, that are left out.
            score: name of the chosen feature that is a published detector's score by itself.
            learner: how a published detector learns from the features; excludes ``score``.
            sets: names of feature sets, such as ``fast``, whose features are added too.

        Raises:
            ConfigError: a set, a group or name is unknown, no feature is left, or the score is not among the features.
        """
        known = tuple(dict.fromkeys(item.group for item in FEATURES.values()))
        for group in groups:
            if group not in known:
                raise ConfigError(unknown("feature group", group, known))
        for name in names:
            if name not in FEATURES:
                raise ConfigError(unknown("feature", name, FEATURES))
        for name in exclude:
            if name not in FEATURES and name not in known:
                raise ConfigError(unknown("feature or group", name, [*FEATURES, *known]))
        wanted = {*names, *(item.name for name in sets for item in named_set(name).features)}
        left_out = {group for group in exclude if group not in FEATURES}  # "position" is a feature first
        self.features: tuple[Feature, ...] = tuple(
            item
            for item in FEATURES.values()
            if (item.group in groups or item.name in wanted) and item.name not in exclude and item.group not in left_out
        )
        if not self.features:
            raise ConfigError("no feature is left; choose groups from " + ", ".join(known))
        self.requires: frozenset[str] = frozenset().union(*(item.requires for item in self.features))
        if score is not None and score not in self.names:
            raise ConfigError(f"features.score={score} is not among the chosen features: {', '.join(self.names)}")
        if score is not None and learner is not None:
            raise ConfigError("features.learner with a score: a detector that is one score learns nothing")
        self.score = score
        self.learner = None if learner is None else dict(learner)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the features, without layer suffixes."""
        return tuple(item.name for item in self.features)

    @property
    def cost(self) -> str:
        """Most expensive cost class among the features."""
        return max((item.cost for item in self.features), key=COST_CLASSES.index, default=FORWARD)

    @property
    def summary(self) -> str:
        """Number, groups and cost of the features, in one line.

        >>> FeatureSet(["position", "blank"]).summary
        'features: 6 of position, blank; cost: one more forward pass (blank)'
        >>> FeatureSet(["noise", "core", "relevancy"]).summary.partition("; ")[2]
        'cost: 2 more forward passes (noise, core), a backward pass (relevancy)'
        >>> FeatureSet(["verification"]).summary
        'features: 2 of verification; cost: one more question per mention (questions)'
        """
        groups = dict.fromkeys(item.group for item in self.features)
        parts = []
        for cost in COST_CLASSES[1:]:
            requires = [part for part in COSTS if part in self.requires and COSTS[part] == cost]
            several = cost == EXTRA_FORWARD and len(requires) > 1
            label = f"{len(requires)} more forward passes" if several else cost
            parts += [f"{label} ({', '.join(requires)})"] if requires else []
        return f"features: {len(self.features)} of {', '.join(groups)}; cost: {', '.join(parts) or FORWARD}"

    def compute(self, trace: Trace) -> Mapping[str, np.ndarray]:
        """Compute the columns of all features for one trace: name to (T,) float32.

        Raises:
            CaptureError: a value is not finite; the message names the feature.
            CapabilityError: a feature is not defined for this model, or the trace lacks a part that it requires.
        """
        columns: dict[str, np.ndarray] = {}
        for item in self.features:
            values = np.asarray(item.function(trace), dtype=np.float32)
            if not (np.isfinite(values) | (np.isnan(values) & item.mentions_only)).all():
                raise CaptureError(f"feature {item.name!r} gave a value that is not finite")
            columns.update(as_columns(item, values))
        trace.cache.clear()
        return columns


def as_columns(item: Feature, values: np.ndarray) -> dict[str, np.ndarray]:
    """Name the columns of one feature.

    Args:
        item: the feature.
        values: (T,), (T, layers), (T, layers, heads), (T, dimensions) or (T, layers, dimensions).

    Returns:
        Values (T,) by column name.

    >>> list(as_columns(FEATURES["head_image_q"], np.zeros((3, 1, 2))))
    ['head_image_q_l00h00', 'head_image_q_l00h01']
    >>> list(as_columns(FEATURES["hidden_last_q"], np.zeros((3, 2))))
    ['hidden_last_q_d0000', 'hidden_last_q_d0001']
    """
    name = item.name
    if values.ndim == 1:
        return {name: values}
    if item.vector and values.ndim == 3:
        _, layers, width = values.shape
        return {f"{name}_l{i:02d}_d{j:04d}": values[:, i, j] for i in range(layers) for j in range(width)}
    if item.vector:
        return {f"{name}_d{index:04d}": values[:, index] for index in range(values.shape[1])}
    if values.ndim == 2:
        return {f"{name}_l{layer:02d}": values[:, layer] for layer in range(values.shape[1])}
    _, layers, heads = values.shape
    return {f"{name}_l{i:02d}h{j:02d}": values[:, i, j] for i in range(layers) for j in range(heads)}


def without_vectors(columns: Mapping[str, np.ndarray], named: Sequence[bool]) -> dict[str, np.ndarray]:
    """Set vectors of tokens that name nothing to NaN: they are wide, and only those of mentions are read from a table.

    Args:
        columns: (T,) values by column name.
        named: (T,) whether the token names an object.
    """
    vectors = tuple(f"{name}_d" for name, item in FEATURES.items() if item.vector)
    gaps = np.where(np.asarray(named, dtype=bool), np.float32(0), np.float32(np.nan))
    return {name: values + gaps if name.startswith(vectors) else values for name, values in columns.items()}


def sets_folder() -> Path:
    """Return the folder of the configuration files of feature sets."""
    import stethoscope.conf  # a package of data files, which only this function reads

    return Path(stethoscope.conf.__file__).parent / "features"


@cache
def set_names() -> tuple[str, ...]:
    """List the names of all feature sets, such as ``fast`` or ``paper/svar``."""
    return tuple(
        path.relative_to(sets_folder()).with_suffix("").as_posix() for path in sorted(sets_folder().rglob("*.yaml"))
    )


def named_set(name: str) -> FeatureSet:
    """Build the feature set of a name.

    Raises:
        ConfigError: no feature set has this name.

    >>> named_set("paper/glsim").score
    'glsim_q'
    """
    import yaml

    if name not in set_names():
        raise ConfigError(unknown("feature set", name, set_names()))
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where PyYAML was built with it
    config = yaml.load((sets_folder() / f"{name}.yaml").read_text(encoding="utf-8"), loader)
    return FeatureSet(**{key: value for key, value in config.items() if key != "_target_"})
