"""Registry of token features: names, groups, costs and directions. The other modules of this package fill it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, Union

import numpy as np

from stethoscope.core.errors import CaptureError, ConfigError, StethoscopeError, first_line, unknown
from stethoscope.core.system import out_of_memory
from stethoscope.features.joining import join, joinable, share_cache
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
        by_row: the values of a token depend on its own rows alone, so answers are computed together.
    """

    name: str
    group: str
    higher_means: str
    requires: frozenset[str]
    function: FeatureFunction
    document: str = ""
    vector: bool = False
    by_row: bool = False

    @cached_property
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

    @cached_property
    def module(self) -> str:
        """Module that defines the function."""
        function = self.function.args[0] if isinstance(self.function, partial) else self.function
        return str(getattr(function, "__module__", ""))

    @cached_property
    def plugin(self) -> str:
        """Module of a plug-in that defines the function; empty for features of this package."""
        return "" if self.module.partition(".")[0] == "stethoscope" else self.module

    def compute(self, trace: Trace) -> np.ndarray:
        """Compute the values of a trace, float32.

        Raises:
            CaptureError: a plug-in's function failed, or gave another number of rows; the message names the feature.
        """
        if not self.plugin:
            return np.asarray(self.function(trace), np.float32)
        try:
            values = np.asarray(self.function(trace), np.float32)
        except StethoscopeError:
            raise
        except Exception as error:  # a plug-in may raise anything: the message names it, the cause stays attached
            if out_of_memory(error):
                raise
            raise CaptureError(
                f"feature {self.name!r} of {self.plugin} failed, {type(error).__name__}: {first_line(error)}"
                f"{self._missing_part(error)}"
            ) from error
        rows = len(trace.answer.token_ids)
        if values.shape[:1] != (rows,):
            raise CaptureError(
                f"feature {self.name!r} of {self.plugin} gave values of shape {values.shape} for {rows} tokens; the "
                "first dimension should be the tokens"
            )
        return values

    def _missing_part(self, error: Exception) -> str:
        """Explain an error that a part of the trace which was not asked for may have caused; empty for others."""
        if not isinstance(error, (AttributeError, TypeError)):
            return ""
        return f"; the parts of the trace that it reads should be named in requires, now {sorted(self.requires)}"


FEATURES: dict[str, Feature] = {}


LIST_FEATURES = "`stethoscope list features` explains them"


def _call_with_offset(function: Callable[..., Values], offset: int, trace: Trace) -> Values:
    return function(trace, offset)


def feature(
    group: str,
    higher_means: str,
    requires: Iterable[str] = (),
    vector: bool = False,
    rows: str = "predicting",
    by_row: bool = False,
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
        by_row: the values of a token depend on its own rows of the parts of the trace alone, and on
            ``Trace.positions``, so that a trace may hold several answers that follow one another.

    Raises:
        ValueError: ``rows`` is neither.
        ConfigError: ``requires`` or ``higher_means`` holds an unknown word, the function has no docstring, or another
            module has a feature of this name; the message names the feature.
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
        if not document.strip():
            raise ConfigError(f"feature {name} has no docstring; its first line explains the feature in lists")
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
            _check_free(column, function)
            FEATURES[column] = Feature(column, group, higher_means, frozenset(requires), variant, text, vector, by_row)
        return function

    return register


def _check_free(name: str, function: Callable[..., Values]) -> None:
    """Check that no other module has a feature of this name; the same module may define its own again."""
    if name in FEATURES and FEATURES[name].module != function.__module__:
        other = FEATURES[name].module
        raise ConfigError(f"feature {name} of {function.__module__} needs another name: {other} has one of this name")


DEFAULT_GROUPS = ("uncertainty", "position", "attention", "lens", "hidden")
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
                raise ConfigError(f"{unknown('feature', name, FEATURES)}; {LIST_FEATURES}")
        for name in exclude:
            if name not in FEATURES and name not in known:
                raise ConfigError(f"{unknown('feature or group', name, [*FEATURES, *known])}; {LIST_FEATURES}")
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
    def plugins(self) -> list[str]:
        """Names of the features that plug-ins define."""
        return [item.name for item in self.features if item.plugin]

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

    def compute(self, trace: Trace) -> dict[str, np.ndarray]:
        """Compute the columns of all features for one trace: name to (T,) float32.

        Raises:
            CaptureError: a value is not finite, or a plug-in's function failed; the message names the feature.
            CapabilityError: a feature is not defined for this model, or the trace lacks a part that it requires.
        """
        return dict(self.compute_batch([trace])[0])

    def compute_batch(self, traces: Sequence[Trace]) -> list[TokenColumns]:
        """Compute the columns of several traces as ``compute``, features with ``by_row`` over all answers at once."""
        columns: dict[int, TokenColumns] = {}
        for indices in joinable(traces):
            columns.update(zip(indices, self._compute_together([traces[index] for index in indices]), strict=True))
        return [columns[index] for index in range(len(traces))]

    def _compute_together(self, traces: Sequence[Trace]) -> list[TokenColumns]:
        joined = traces[0] if len(traces) == 1 else join(traces)
        by_name = {item.name: item.compute(joined) for item in self.features if item.by_row}
        if len(traces) > 1:
            share_cache(joined, traces)
        for item in self.features:
            if not item.by_row:
                parts = [item.compute(trace) for trace in traces]
                by_name[item.name] = parts[0] if len(parts) == 1 else np.concatenate(parts)
        for trace in traces:
            trace.cache.clear()
        values = [by_name[name] for name in self.names]
        shapes = [(item.name, item.vector, part.shape[1:]) for item, part in zip(self.features, values, strict=True)]
        names = _all_column_names(tuple(shapes))
        rows = [part.reshape(len(part), math.prod(part.shape[1:])).T for part in values]
        matrix = np.concatenate(rows)
        if not np.isfinite(matrix).all():
            self._check_finite(values)
        ends = np.cumsum([len(trace.answer.token_ids) for trace in traces])
        return [TokenColumns(names, part) for part in np.split(matrix, ends[:-1], 1)]

    def _check_finite(self, values: Sequence[np.ndarray]) -> None:
        for item, part in zip(self.features, values, strict=True):
            if not (np.isfinite(part) | (np.isnan(part) & item.mentions_only)).all():
                raise CaptureError(f"feature {item.name!r} gave a value that is not finite")


class TokenColumns(Mapping[str, np.ndarray]):
    """Columns (T,) by name, rows of one matrix.

    Attributes:
        names: C names.
        matrix: (C, T) float32.
    """

    def __init__(self, names: tuple[str, ...], matrix: np.ndarray) -> None:
        self.names, self.matrix = names, matrix

    @classmethod
    def of(cls, columns: Mapping[str, np.ndarray]) -> TokenColumns:
        """Return the columns of any mapping, stored as float32."""
        if isinstance(columns, TokenColumns):
            return columns
        return cls(tuple(columns), np.array(list(columns.values()), dtype=np.float32))

    def __getitem__(self, name: str) -> np.ndarray:
        return self.matrix[_index_by_name(self.names)[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@lru_cache(maxsize=16)
def _index_by_name(names: tuple[str, ...]) -> dict[str, int]:
    return {name: index for index, name in enumerate(names)}


@lru_cache(maxsize=16)  # there may be a thousand, the same for every answer
def _all_column_names(features: tuple[tuple[str, bool, tuple[int, ...]], ...]) -> tuple[str, ...]:
    """Name the columns of several features, given as the arguments of ``column_names``."""
    return tuple(name for arguments in features for name in column_names(*arguments))


@lru_cache(maxsize=1024)
def column_names(name: str, vector: bool, shape: tuple[int, ...]) -> tuple[str, ...]:
    """Name the columns of one feature.

    Args:
        name: of the feature.
        vector: the columns are dimensions of a state.
        shape: of the values of a token: (), (layers,), (layers, heads), (dimensions,) or (layers, dimensions).

    >>> column_names("head_image_q", False, (1, 2))
    ('head_image_q_l00h00', 'head_image_q_l00h01')
    >>> column_names("hidden_last_q", True, (2,))
    ('hidden_last_q_d0000', 'hidden_last_q_d0001')
    """
    if not shape:
        return (name,)
    if vector and len(shape) == 2:
        return tuple(f"{name}_l{i:02d}_d{j:04d}" for i in range(shape[0]) for j in range(shape[1]))
    if vector:
        return tuple(f"{name}_d{index:04d}" for index in range(shape[0]))
    if len(shape) == 1:
        return tuple(f"{name}_l{layer:02d}" for layer in range(shape[0]))
    return tuple(f"{name}_l{i:02d}h{j:02d}" for i in range(shape[0]) for j in range(shape[1]))


def without_vectors(columns: Mapping[str, np.ndarray], named: Sequence[bool]) -> TokenColumns:
    """Set vectors of tokens that name nothing to NaN: they are wide, and only those of mentions are read from a table.

    Args:
        columns: (T,) values by column name.
        named: (T,) whether the token names an object.
    """
    stored = TokenColumns.of(columns)
    matrix = stored.matrix.copy()
    matrix[np.ix_(_is_vector(stored.names), ~np.asarray(named, dtype=bool))] = np.nan
    return TokenColumns(stored.names, matrix)


@lru_cache(maxsize=16)
def _is_vector(names: tuple[str, ...]) -> np.ndarray:
    """Mark the (C,) columns that are dimensions of a state."""
    vectors = tuple(f"{name}_d" for name, item in FEATURES.items() if item.vector)
    return np.array([name.startswith(vectors) for name in names], dtype=bool)


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
