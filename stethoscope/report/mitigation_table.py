"""Compare mitigations with greedy decoding and with trivial methods: tables and frontier.

The controls that a comparison needs are the unchanged answers, answers cut off after some words, CHAIR_i at equal
length, and the recall that trivial methods reach at the same CHAIR_i (``metrics.caption_controls``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from stethoscope.core.errors import DataError
from stethoscope.metrics.bootstrap import Interval, Resamples, count_replicates, group_weights, holm
from stethoscope.metrics.caption_controls import beyond_front, front_band, length_adjusted, trivial_front
from stethoscope.report.method_answers import REPLY_METRICS, MethodAnswers
from stethoscope.report.plots import Plot, plot_frontier
from stethoscope.report.tables import Cell, PairedDifference, Table

if TYPE_CHECKING:
    from stethoscope.detection.shift_measures import RunShift
    from stethoscope.tasks.base import Totals

CAPTION_METRICS = {"chair_i": "CHAIR_i", "chair_s": "CHAIR_s", "recall": "recall", "length": "words"}
"""Metrics that a task of descriptions must have, and their names in tables."""
ADJUSTED = {"raw": "CHAIR_i at equal length", "fitted": "the same, mentions fitted"}
"""Forms of CHAIR_i at equal length, see ``length_adjusted``, and their names in tables."""
COMPARED = {
    "chair_i": "CHAIR_i − greedy",
    "fitted": "at equal length − greedy",
    "recall": "recall − greedy",
    "front": "recall − trivial front",
}
"""Paired differences, and their names in tables."""
_COUNTS = ("mentions", "hallucinated", "captions", "words")


@dataclass(frozen=True)
class MethodFigures:
    """Figures of one method.

    Attributes:
        answers: what they are computed from.
        metrics: those of ``CAPTION_METRICS``, ``mentions`` and ``right``: mentions of a description, and right ones.
        adjusted: CHAIR_i at the common length by the names of its two forms.
        differences: those of ``COMPARED``; p-values are Holm-corrected for the number of methods, None for controls.
    """

    answers: MethodAnswers
    metrics: Mapping[str, Interval]
    adjusted: Mapping[str, Interval]
    differences: Mapping[str, PairedDifference]

    @property
    def kept(self) -> bool | None:
        """Whether the share of hallucinated mentions is at most what was promised; None without a promise."""
        promised = self.answers.promised
        return None if promised is None else self.metrics["chair_i"].value <= promised

    def to_dict(self) -> dict[str, Any]:
        """Convert to a JSON object."""
        answers = self.answers
        differences = {
            name: {**difference.interval.to_dict(), "p_holm": _known(difference.p)}
            for name, difference in self.differences.items()
        }
        promise = None if answers.promised is None else {"most": answers.promised, "kept": self.kept}
        return {
            "name": answers.name,
            "trivial": answers.trivial,
            "metrics": {name: interval.to_dict() for name, interval in self.metrics.items()},
            "chair_i_at_common_length": {name: interval.to_dict() for name, interval in self.adjusted.items()},
            "differences": differences,
            "replies": {name: interval.to_dict() for name, interval in answers.replies.items()},
            "detector": None if answers.detector is None else answers.detector.to_dict(),
            "promise": promise,
            "passes_per_token": answers.passes,
            "seconds_per_answer": answers.seconds,
            "peak_memory": answers.peak_memory,
        }


@dataclass(frozen=True)
class MethodComparison:
    """All methods beside greedy decoding.

    Attributes:
        methods: greedy decoding first.
        band: CHAIR_i, lower and upper recall of the 95 % band of the trivial front, (k,) each.
    """

    methods: tuple[MethodFigures, ...]
    band: tuple[np.ndarray, np.ndarray, np.ndarray]


def _known(value: float | None) -> float | None:
    """Return None for NaN."""
    return None if value is None or math.isnan(value) else value


def compare_methods(
    methods: Sequence[MethodAnswers], metrics: Mapping[str, Callable[[Totals], np.ndarray]]
) -> MethodComparison:
    """Compare every method with the first, on the samples that failed for none.

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
    shown = {name: metrics[name] for name in CAPTION_METRICS} | {
        "mentions": lambda totals: np.asarray(totals["mentions"] / totals["captions"]),
        "right": lambda totals: np.asarray((totals["mentions"] - totals["hallucinated"]) / totals["captions"]),
    }
    own = [table["words"].mean() for table, method in zip(counts, methods, strict=True) if not method.trivial]
    replicates = []
    for table in counts:
        values = count_replicates(shown, table, [""] * len(shared), resamples)
        figures = {name: array for (name, _), array in values.items()}
        words, mentions, hallucinated = (table[name].to_numpy(float) for name in ("words", "mentions", "hallucinated"))
        adjusted = length_adjusted(words, mentions, hallucinated, float(np.mean(own)), resamples)
        replicates.append({**figures, **adjusted})
    trivial = [
        (figures["chair_i"], figures["recall"])
        for index, (method, figures) in enumerate(zip(methods, replicates, strict=True))
        if method.trivial or not index
    ]
    differences = _differences(methods, replicates, trivial, resamples)
    compared = [
        MethodFigures(
            method,
            {name: resamples.interval(figures[name]) for name in shown},
            {name: resamples.interval(figures[name]) for name in ADJUSTED},
            paired,
        )
        for method, figures, paired in zip(methods, replicates, differences, strict=True)
    ]
    return MethodComparison(tuple(compared), front_band(trivial))


def _differences(
    methods: Sequence[MethodAnswers],
    replicates: Sequence[Mapping[str, np.ndarray]],
    trivial: Sequence[tuple[np.ndarray, np.ndarray]],
    resamples: Resamples,
) -> list[dict[str, PairedDifference]]:
    """Compute the differences of ``COMPARED`` for every method; the first has none."""
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
    shown = ("chair_i", "chair_s", "recall", "length", "mentions")
    columns = ("", *(CAPTION_METRICS.get(name, name) for name in shown), *ADJUSTED.values())
    rows: list[tuple[Cell, ...]] = [
        (
            item.answers.name,
            *(item.metrics[name] for name in shown),
            *(_defined(item.adjusted[form]) for form in ADJUSTED),
        )
        for item in figures
    ]
    equal = "Equal length: Poisson fits at the mean length of all methods; – beyond the lengths of a method's answers."
    tables = [Table("descriptions", columns, tuple(rows), " ".join((*notes, equal)), frozenset({0}))]
    compared: list[tuple[Cell, ...]] = [
        (item.answers.name, *(_defined(item.differences.get(name)) for name in COMPARED)) for item in figures[1:]
    ]
    if compared:
        tested = sum(not item.answers.trivial for item in figures[1:])
        note = (
            f"Paired over the same resampled images; p is two-sided and Holm-corrected for {tested} methods. Equal "
            "length: mentions fitted. Trivial front: the best recall at a method's CHAIR_i that greedy decoding and "
            "the trivial controls reach."
        )
        tables.append(Table("against greedy", ("", *COMPARED.values()), tuple(compared), note))
    makers = (_promise_table, _detector_table, _reply_table, _cost_table)
    return [*tables, *filter(None, (make(figures) for make in makers))]


def _defined(cell: Interval | PairedDifference | None) -> Cell:
    """Return a dash in place of what is not defined."""
    interval = cell.interval if isinstance(cell, PairedDifference) else cell
    return cell if interval is None or math.isfinite(interval.value) else "–"


def _promise_table(figures: Sequence[MethodFigures]) -> Table | None:
    """Make the table of promises; None where no method gives one."""
    before = figures[0].metrics["right"].value
    rows: list[tuple[Cell, ...]] = [
        (
            item.answers.name,
            f"{item.answers.promised:.1%}",
            item.metrics["chair_i"],
            "kept" if item.kept else "broken",
            f"{item.metrics['right'].value / before:.1%}" if before else "–",
        )
        for item in figures
        if item.answers.promised is not None
    ]
    if not rows:
        return None
    note = (
        "Promised: at most this share of the objects that remain is hallucinated. What that costs: the share of right "
        "mentions that are left of greedy decoding's."
    )
    columns = ("", "promised", "hallucinated", "promise", "right mentions left")
    return Table("promises", columns, tuple(rows), note)


def _detector_table(figures: Sequence[MethodFigures]) -> Table | None:
    """Make the table of the detector on the answers of all methods; None where it was not asked."""
    judged = [(item.answers.name, item.answers.detector) for item in figures if item.answers.detector is not None]
    if not judged:
        return None
    rows: list[tuple[Cell, ...]] = [
        (name, _defined(detector.auroc), _defined(detector.ece), _shift_cell(detector.shift))
        for name, detector in judged
    ]
    shifted = [name for name, detector in judged if detector.shift is not None and detector.shift.shifted]
    monitored = [name for name, detector in judged if detector.shift is not None]
    note = "Hallucinated mentions in what each method wrote, and in what it left, are to be told from the right ones. "
    if shifted:
        note += f"Unlike the answers that the detector was calibrated on: {', '.join(shifted)}; "
        note += "there its probabilities are not calibrated and no guarantee of its threshold holds."
    elif monitored:
        note += "No shift is seen: its probabilities keep their calibration."
    return Table("warnings on what they wrote", ("", "AUROC", "ECE", "shift"), tuple(rows), note, frozenset({0}))


def _shift_cell(shift: RunShift | None) -> str:
    if shift is None:
        return "–"
    p = "p < 0.001" if shift.p < 0.001 else f"p {shift.p:.3f}"
    return f"{shift.view}, {p}" if shift.shifted else f"not seen, {p}"


def _reply_table(figures: Sequence[MethodFigures]) -> Table | None:
    """Make the table of yes/no questions; None where none were asked."""
    rows = tuple(
        (item.answers.name, *(item.answers.replies.get(name) for name in REPLY_METRICS))
        for item in figures
        if item.answers.replies
    )
    note = "A gain in F1 that comes with a larger share of yes is no better sight."
    return Table("questions", ("", *REPLY_METRICS.values()), rows, note, frozenset({0})) if rows else None


def _cost_table(figures: Sequence[MethodFigures]) -> Table:
    """Make the table of costs."""
    rows: list[tuple[Cell, ...]] = [
        (
            item.answers.name,
            _plain(item.answers.passes, 2),
            _plain(item.answers.seconds),
            "–" if item.answers.peak_memory is None else f"{item.answers.peak_memory / 2**20:.0f}",
        )
        for item in figures
    ]
    note = (
        "Forward passes of the language model for every token of a description, all that a method needs counted, a "
        "detector's too. Seconds of one description on this machine, in batches, without features. Memory: the "
        "largest of the process, on a GPU of torch. –: not measured."
    )
    return Table("cost", ("", "passes per token", "seconds per answer", "peak memory, MiB"), tuple(rows), note)


def _plain(value: float | None, digits: int = 3) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def frontier(comparison: MethodComparison) -> Plot:
    """Plot recall against CHAIR_i of all methods, with the front of the trivial ones and its band."""
    figures = comparison.methods
    points = [(item.answers.name, item.metrics["chair_i"].value, item.metrics["recall"].value) for item in figures]
    trivial = [
        point[1:]
        for index, (point, item) in enumerate(zip(points, figures, strict=True))
        if not index or item.answers.trivial
    ]
    note = (
        "Up and to the left is better; methods below the dashed line are no better than to stop earlier. The band "
        "holds 95 % of the line over resampled images."
    )
    return plot_frontier(points, trivial_front(trivial), note, comparison.band)
