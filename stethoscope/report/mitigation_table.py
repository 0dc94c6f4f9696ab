"""Compare mitigations with greedy decoding and with trivial methods: figures, tables and the frontier, from counts.

Who says less errs less, and a method with a plausibility cut is nearly greedy: the controls that a comparison needs
are the unchanged answers, answers cut off after some words, CHAIR_i at equal length, and the recall that trivial
methods reach at the same CHAIR_i (after Yin et al. 2025, arXiv 2504.10020).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from stethoscope.core.errors import DataError
from stethoscope.metrics.bootstrap import Interval, Resamples, count_metrics, count_replicates, group_weights, holm
from stethoscope.report.plots import Plot, plot_frontier
from stethoscope.report.tables import Cell, PairedDifference, Table
from stethoscope.storage.records import FAILED, Record

if TYPE_CHECKING:
    from stethoscope.tasks.base import Totals

CAPTION_METRICS = {"chair_i": "CHAIR_i", "chair_s": "CHAIR_s", "recall": "recall", "length": "words"}
"""Metrics that a task of descriptions must have, and their names in tables."""
REPLY_METRICS = {"accuracy": "accuracy", "f1": "F1", "yes_rate": "share of yes", "tpr": "TPR", "tnr": "TNR"}
"""Metrics of a task of yes/no questions that are shown, and their names in tables."""
COMPARED = {"chair_i": "CHAIR_i − greedy", "recall": "recall − greedy", "front": "recall − trivial front"}
"""Paired differences, and their names in tables."""
_COUNTS = ("mentions", "hallucinated", "captions", "words")


@dataclass(frozen=True)
class MethodAnswers:
    """What one method wrote.

    Attributes:
        name: of the method, for tables.
        captions: a row for every sample by its id: ``group`` (its image) and the counts of its score.
        trivial: whether it is a control that no one would call a method.
        passes: forward passes for every answer token; None if unknown.
        seconds: for one description; None if it was not measured.
        replies: metrics of yes/no questions, see ``REPLY_METRICS``; empty if none were asked.
    """

    name: str
    captions: pd.DataFrame
    trivial: bool = False
    passes: float | None = None
    seconds: float | None = None
    replies: Mapping[str, Interval] = field(default_factory=dict)


@dataclass(frozen=True)
class MethodFigures:
    """Figures of one method.

    Attributes:
        answers: what they are computed from.
        metrics: those of ``CAPTION_METRICS`` and ``mentions``, the mentions of a description.
        adjusted: CHAIR_i at the common length, see ``length_adjusted``, by the names of its two forms.
        differences: those of ``COMPARED``; p-values are Holm-corrected for the number of methods, None for controls.
    """

    answers: MethodAnswers
    metrics: Mapping[str, Interval]
    adjusted: Mapping[str, float]
    differences: Mapping[str, PairedDifference]

    def to_dict(self) -> dict[str, Any]:
        """Convert to a JSON object."""
        differences = {
            name: {**difference.interval.to_dict(), "p_holm": _known(difference.p)}
            for name, difference in self.differences.items()
        }
        return {
            "name": self.answers.name,
            "trivial": self.answers.trivial,
            "metrics": {name: interval.to_dict() for name, interval in self.metrics.items()},
            "chair_i_at_common_length": {name: _known(value) for name, value in self.adjusted.items()},
            "differences": differences,
            "replies": {name: interval.to_dict() for name, interval in self.answers.replies.items()},
            "passes_per_token": self.answers.passes,
            "seconds_per_answer": self.answers.seconds,
        }


def _known(value: float | None) -> float | None:
    """Return None for NaN."""
    return None if value is None or math.isnan(value) else value


def score_counts(records: Iterable[Record], excluded: Iterable[str] = ()) -> pd.DataFrame:
    """Collect the counts of the answers that did not fail, by sample id.

    Args:
        records: of one task.
        excluded: images to leave out.
    """
    left_out = set(excluded)
    rows = {
        record.sample_id: {"group": record.group, **record.score.counts}
        for record in records
        if record.status != FAILED and record.score is not None and record.group not in left_out
    }
    return pd.DataFrame.from_dict(rows, orient="index")


def reply_figures(
    records: Iterable[Record], metrics: Mapping[str, Callable[[Totals], np.ndarray]]
) -> dict[str, Interval]:
    """Compute the metrics of ``REPLY_METRICS`` over all yes/no questions of a task together.

    Args:
        records: of the task; those that failed are left out.
        metrics: of the task; of those that are shown it may lack some.
    """
    counts = score_counts(records).fillna(0.0)
    if not len(counts):
        return {}
    shown = {name: metrics[name] for name in REPLY_METRICS if name in metrics}
    rows = count_metrics(shown, counts.drop(columns="group"), counts["group"].to_numpy(), [""] * len(counts))
    return {row.metric: row.interval for row in rows}


def length_adjusted(
    words: np.ndarray, mentions: np.ndarray, hallucinated: np.ndarray, length: float
) -> dict[str, float]:
    """Compute CHAIR_i as it would be if the answers had another mean length, in two forms.

    Hallucinated mentions of an answer of w words are fitted as Poisson(exp(a + b w)), by maximum likelihood, and
    expected at ``length``. ``raw`` divides that by the mean number of mentions as it is, ``fitted`` by the number that
    a fit of the same kind expects at that length.

    Args:
        words: (n,) length of every answer.
        mentions: (n,) objects that it names.
        hallucinated: (n,) those among them that are not there.
        length: in words. Beyond the shortest and the longest answer nothing is known: NaN.

    Returns:
        ``raw`` and ``fitted``, in [0, inf) and lower is better; NaN where there is no mention.
    """
    if not len(words) or not words.min() <= length <= words.max() or not mentions.sum():
        return {"raw": math.nan, "fitted": math.nan}
    expected = _expected_count(words, hallucinated, length)
    return {
        "raw": expected / float(mentions.mean()),
        "fitted": expected / _expected_count(words, mentions, length),
    }


def _expected_count(words: np.ndarray, counts: np.ndarray, length: float) -> float:
    """Fit counts by length, and return what the fit expects at one length."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import PoissonRegressor

    spread = float(words.std())
    if not counts.any() or not spread:  # the likelihood has no maximum, or no slope
        return float(counts.mean())
    centre = float(words.mean())
    fit = PoissonRegressor(alpha=0, solver="newton-cholesky", tol=1e-8, max_iter=1000)
    with warnings.catch_warnings():  # where all short answers have none, the slope has no end: it goes far enough
        warnings.simplefilter("ignore", ConvergenceWarning)
        fit.fit(((words - centre) / spread)[:, None], counts)
    return float(fit.predict(np.array([[(length - centre) / spread]]))[0])


def trivial_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the corners of the best recall that trivial methods reach at no more than a CHAIR_i.

    Args:
        points: CHAIR_i and recall of each; those that are not finite count for nothing. To say nothing, (0, 0), is
            always among them.

    Returns:
        Corners with increasing CHAIR_i and recall; methods between two corners are mixtures of them.

    >>> trivial_front([(0.2, 0.8), (0.1, 0.5), (0.15, 0.4)])
    [(0.0, 0.0), (0.1, 0.5), (0.2, 0.8)]
    """
    corners = [(0.0, 0.0)]
    for chair_i, recall in sorted(point for point in points if np.isfinite(point).all()):
        if recall <= corners[-1][1]:
            continue
        if chair_i == corners[-1][0]:
            corners.pop()
        corners.append((float(chair_i), float(recall)))
    return corners


def beyond_front(
    chair_i: np.ndarray, recall: np.ndarray, trivial: Sequence[tuple[np.ndarray, np.ndarray]]
) -> np.ndarray:
    """Compute how much recall a method has above the trivial front at its own CHAIR_i, in every replicate.

    Args:
        chair_i: (1 + R,) replicate array of the method.
        recall: (1 + R,) its own.
        trivial: those of the trivial methods.

    Returns:
        (1 + R,), NaN where the method's CHAIR_i is not defined, and everywhere where it is above that of all trivial
        methods, as nothing tells what they would recall there.
    """
    differences = np.full(len(chair_i), math.nan)
    for index in np.flatnonzero(np.isfinite(chair_i)):
        corners = trivial_front([(float(x[index]), float(y[index])) for x, y in trivial])
        if not index and chair_i[0] > corners[-1][0]:
            break
        differences[index] = recall[index] - np.interp(chair_i[index], *np.array(corners).T)
    return differences


def compare_methods(
    methods: Sequence[MethodAnswers], metrics: Mapping[str, Callable[[Totals], np.ndarray]]
) -> list[MethodFigures]:
    """Compare every method with the first, on the samples that failed for none, over the same resampled images.

    Args:
        methods: the first one wrote the answers without any change.
        metrics: of the task, those of ``CAPTION_METRICS`` among them.

    Raises:
        DataError: no sample is left, or the task does not count what the figures need.
    """
    shared = [name for name in methods[0].captions.index if all(name in other.captions.index for other in methods)]
    if not shared:
        raise DataError("no description is left that all methods have written without a failure")
    lacking = [name for name in _COUNTS if name not in methods[0].captions]
    if lacking:
        raise DataError(f"the task does not count {', '.join(lacking)}, which this comparison reads")
    counts = [method.captions.loc[shared].drop(columns="group").fillna(0.0) for method in methods]
    resamples = group_weights(methods[0].captions.loc[shared, "group"].to_numpy())
    shown = {name: metrics[name] for name in CAPTION_METRICS} | {"mentions": _mentions_of_one}
    replicates = [
        {name: values for (name, _), values in count_replicates(shown, table, [""] * len(shared), resamples).items()}
        for table in counts
    ]
    own = [table["words"].mean() for table, method in zip(counts, methods, strict=True) if not method.trivial]
    length = float(np.mean(own))
    differences = _differences(methods, replicates, resamples)
    return [
        MethodFigures(
            method,
            {name: resamples.interval(values) for name, values in figures.items()},
            _adjusted(table, length),
            paired,
        )
        for method, table, figures, paired in zip(methods, counts, replicates, differences, strict=True)
    ]


def _adjusted(counts: pd.DataFrame, length: float) -> dict[str, float]:
    """Compute ``length_adjusted`` of a table of counts."""
    words, mentions, hallucinated = (counts[name].to_numpy(float) for name in ("words", "mentions", "hallucinated"))
    return length_adjusted(words, mentions, hallucinated, length)


def _mentions_of_one(totals: Totals) -> np.ndarray:
    """Return mentions for each description."""
    return np.asarray(totals["mentions"] / totals["captions"])


def _differences(
    methods: Sequence[MethodAnswers], replicates: Sequence[Mapping[str, np.ndarray]], resamples: Resamples
) -> list[dict[str, PairedDifference]]:
    """Compute the differences of ``COMPARED`` for every method; the first has none."""
    trivial = [
        (figures["chair_i"], figures["recall"])
        for index, (method, figures) in enumerate(zip(methods, replicates, strict=True))
        if method.trivial or not index
    ]
    tested = [index for index, method in enumerate(methods) if index and not method.trivial]
    paired: list[dict[str, PairedDifference]] = [{} for _ in methods]
    for name in COMPARED:
        arrays = {
            index: beyond_front(replicates[index]["chair_i"], replicates[index]["recall"], trivial)
            if name == "front"
            else replicates[index][name] - replicates[0][name]
            for index in range(1, len(methods))
            if not (name == "front" and methods[index].trivial)
        }
        corrected = dict(zip(tested, holm([resamples.p_value(arrays[index]) for index in tested]), strict=True))
        for index, values in arrays.items():
            paired[index][name] = PairedDifference(resamples.interval(values), corrected.get(index))
    return paired


def method_tables(figures: Sequence[MethodFigures], notes: Sequence[str] = ()) -> list[Table]:
    """Make the tables of a comparison, with the same rows in each.

    Args:
        figures: greedy decoding first.
        notes: about all of them, shown below the first.
    """
    columns = ("", *CAPTION_METRICS.values(), "mentions", "CHAIR_i at equal length", "the same, mentions fitted")
    rows: list[tuple[Cell, ...]] = [
        (
            item.answers.name,
            *(item.metrics[name] for name in (*CAPTION_METRICS, "mentions")),
            *(_plain(item.adjusted[form]) for form in ("raw", "fitted")),
        )
        for item in figures
    ]
    note = " ".join(
        (
            *notes,
            "Equal length: Poisson fits at the mean length of all methods; – beyond the lengths of a method's answers.",
        )
    )
    tables = [Table("descriptions", columns, tuple(rows), note, frozenset({0}))]
    compared: list[tuple[Cell, ...]] = [
        (item.answers.name, *(item.differences.get(name) for name in COMPARED)) for item in figures[1:]
    ]
    if compared:
        tested = sum(not item.answers.trivial for item in figures[1:])
        note = (
            f"Paired over the same resampled images; p is two-sided and Holm-corrected for {tested} methods. Trivial "
            "front: the best recall at a method's CHAIR_i that greedy decoding and the trivial controls reach."
        )
        tables.append(Table("against greedy", ("", *COMPARED.values()), tuple(compared), note))
    replied = [item for item in figures if item.answers.replies]
    if replied:
        cells = tuple(
            (item.answers.name, *(item.answers.replies.get(name) for name in REPLY_METRICS)) for item in replied
        )
        note = "A gain in F1 that comes with a larger share of yes is no better sight."
        tables.append(Table("questions", ("", *REPLY_METRICS.values()), cells, note, frozenset({0})))
    costs: list[tuple[Cell, ...]] = [
        (item.answers.name, _plain(item.answers.passes, 2), _plain(item.answers.seconds)) for item in figures
    ]
    note = (
        "Passes leave out the one that a detector reads. Seconds of one description on this machine, in batches, all "
        "stages; –: not measured."
    )
    return [*tables, Table("cost", ("", "passes per token", "seconds per answer"), tuple(costs), note)]


def _plain(value: float | None, digits: int = 3) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def frontier(figures: Sequence[MethodFigures]) -> Plot:
    """Plot recall against CHAIR_i of all methods, with the front of the trivial ones."""
    points = [(item.answers.name, item.metrics["chair_i"].value, item.metrics["recall"].value) for item in figures]
    trivial = [
        point[1:]
        for index, (point, item) in enumerate(zip(points, figures, strict=True))
        if not index or item.answers.trivial
    ]
    note = "Up and to the left is better; methods below the dashed line are no better than to stop earlier."
    return plot_frontier(points, trivial_front(trivial), note)
