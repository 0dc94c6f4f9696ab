"""Choose how much to remove so that at most a given share of the mentions that remain is hallucinated.

The promise. After the mentions at or above a threshold t are removed (``mitigation.editing``), image i keeps G_i(t)
judged mentions, F_i(t) of them hallucinated. With the weights w_i of ``detection.risk_control``,

    E[w F(t)] / E[w G(t)] <= alpha    with probability 1 - delta over the draw of the calibration images.

One threshold is tested by betting, exactly as there: X_i = w_i (F_i - alpha G_i), and the promise is broken if and
only if E[X] > 0. Unlike there, F and G both change with t, and F / G need not grow with it: whole sentences go. So
thresholds are tested in an order that does not depend on the calibration images, from a start that the training fold
chooses to bolder ones (which keep more), until one is refused; the last one accepted is taken. A threshold that breaks
its promise is accepted only if the first such in that order is, which has probability delta at most (fixed-sequence
testing; Angelopoulos et al. 2021, "Learn then Test", arXiv 2110.01052). No monotone risk is needed for that.

What depends on the calibration images elsewhere (the slope of the probabilities) is a monotone map of the scores, so
that thresholds taken as quantiles of the training fold are the same cuts of scores whatever the map.

``scripts/check/remaining_text.py`` simulates it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from stethoscope.core.errors import ArtefactError, DataError
from stethoscope.core.types import required
from stethoscope.detection.lookup import mention_probabilities
from stethoscope.detection.risk_control import MAX_BET, RiskGuarantee, choose_limit, log_wealth
from stethoscope.mitigation.editing import remove_mentions
from stethoscope.storage.run_dir import RunStore, read_warnings

if TYPE_CHECKING:
    from stethoscope.adapters.base import Adapter
    from stethoscope.detection.detector import Detector
    from stethoscope.mitigation.answers import Drop

THRESHOLDS = 60
"""Number of thresholds that are tried, quantiles of the probabilities of the training fold."""
CAUTION = 0.5
"""The test begins at the most cautious threshold with this share of the largest growth of wealth."""
ORDER_SEED = 0


class JudgedText(NamedTuple):
    """A description with what is known of its mentions.

    Attributes:
        group: id of its image.
        text: the description.
        spans: (start, end) characters of its M mentions.
        labels: (M,) 1 hallucinated, 0 grounded, -1 not judged.
        probabilities: (M,) of hallucination, by the detector.
    """

    group: str
    text: str
    spans: Sequence[tuple[int, int]]
    labels: np.ndarray
    probabilities: np.ndarray


@dataclass(frozen=True)
class RemovalCertificate:
    """A threshold of removal and the calibration data that it rests on.

    Attributes:
        threshold: probability at or above which a mention is removed; above 1 where nothing has to be.
        most, confidence: the promise: at most this share of the remaining mentions is hallucinated.
        observed: that share on the calibration images, in [0, 1].
        images: number of calibration images.
        kept: share of the right mentions that stay on the calibration images, in [0, 1].
        most_per_image: most mentions that an image counts with.
    """

    threshold: float
    most: float
    confidence: float
    observed: float
    images: int
    kept: float
    most_per_image: int

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON-able values."""
        return asdict(self)

    def __str__(self) -> str:
        removed = "nothing is removed" if self.threshold > 1 else f"removed from a probability of {self.threshold:.3f}"
        return (
            f"at most {self.most:.3g} of the objects that remain are hallucinated, at confidence "
            f"{self.confidence:.3g}; {removed}; {self.kept:.1%} of the right "
            f"ones stay ({self.images} calibration images, on which {self.observed:.1%} of the rest is hallucinated)"
        )


class RemovalCounts(NamedTuple):
    """Judged mentions of images before removal, and after it at each of K thresholds.

    Attributes:
        groups: ids of the images, sorted.
        right: (images,) mentions that are not hallucinated, before removal.
        wrong: (images, K) hallucinated mentions that remain.
        kept: (images, K) all mentions that remain.
    """

    groups: np.ndarray
    right: np.ndarray
    wrong: np.ndarray
    kept: np.ndarray

    def select(self, images: np.ndarray) -> RemovalCounts:
        """Return the counts of some images, given by a mask or by indices."""
        return RemovalCounts(*(part[images] for part in self))


def counts_after_removal(texts: Sequence[JudgedText], thresholds: np.ndarray) -> RemovalCounts:
    """Count the judged mentions that remain after removal at each threshold, by image.

    Args:
        texts: descriptions.
        thresholds: (K,) probabilities at or above which mentions are removed.
    """
    names = sorted({text.group for text in texts})
    rows = {name: index for index, name in enumerate(names)}
    right, (wrong, kept) = np.zeros(len(names)), np.zeros((2, len(names), len(thresholds)))
    for text in texts:
        row = rows[text.group]
        right[row] += (text.labels == 0).sum()
        known: dict[frozenset[int], tuple[float, float]] = {}
        for column, threshold in enumerate(thresholds):
            unwanted = frozenset(np.flatnonzero(text.probabilities >= threshold).tolist())
            if unwanted not in known:
                removed = remove_mentions(text.text, text.spans, unwanted).removed
                left = np.delete(text.labels, list(removed))
                known[unwanted] = float((left == 1).sum()), float((left >= 0).sum())
            wrong[row, column] += known[unwanted][0]
            kept[row, column] += known[unwanted][1]
    return RemovalCounts(np.array(names), right, wrong, kept)


def removal_thresholds(training: Sequence[JudgedText]) -> np.ndarray:
    """Return the thresholds that are tested, (K,) from cautious to bold; the last one, above 1, removes nothing.

    Args:
        training: descriptions of the training fold.
    """
    known = np.concatenate([text.probabilities for text in training])
    quantiles = np.unique(np.quantile(known, np.linspace(0.02, 1, THRESHOLDS)))
    return np.r_[quantiles, np.nextafter(1.0, 2.0)]


def certify_removal(
    calibration: Sequence[JudgedText], training: Sequence[JudgedText], most: float, confidence: float = 0.95
) -> RemovalCertificate:
    """Find the boldest threshold of removal for which the promise holds.

    Args:
        calibration: descriptions of images that the detector was not fitted on.
        training: descriptions of other images, which choose the thresholds and where their test begins.
        most: largest share alpha of the remaining mentions that may be hallucinated, in (0, 1).
        confidence: probability 1 - delta with which that holds, in (0, 1).

    Raises:
        DataError: no threshold meets it; the message says how many images it would take.
    """
    thresholds = removal_thresholds(training)
    held_out, learned = (counts_after_removal(texts, thresholds) for texts in (calibration, training))
    return certify_counts(held_out, learned, thresholds, most, confidence)


def certify_counts(
    calibration: RemovalCounts,
    training: RemovalCounts,
    thresholds: np.ndarray,
    most: float,
    confidence: float = 0.95,
) -> RemovalCertificate:
    """Do what ``certify_removal`` does from counts at ``removal_thresholds`` of the training fold.

    Raises:
        DataError: see ``certify_removal``.
    """
    guarantee = RiskGuarantee("max_missed", most, confidence)
    columns = range(len(thresholds))
    growth = np.array([_growth(training.wrong[:, k], training.kept[:, k], most) for k in columns])
    start = int(np.argmax(growth >= CAUTION * growth.max()))  # fitted there, the detector does worse elsewhere
    limit = choose_limit(training.kept[:, start], len(calibration.groups), guarantee)
    mean = float(np.minimum(training.kept[:, start], limit).mean())
    tested, wrong, kept = thresholds[start:], calibration.wrong[:, start:], calibration.kept[:, start:]
    order = np.random.default_rng(ORDER_SEED).permutation(len(wrong))
    refused = log_wealth(wrong[order], kept[order], guarantee, limit, mean) < guarantee.required
    accepted = int(np.argmax(refused)) - 1 if refused.any() else len(tested) - 1
    if accepted < 0:
        raise DataError(_refusal(most, confidence, len(wrong), float(growth[start]), guarantee.required))
    right = (kept - wrong)[:, accepted].sum()
    return RemovalCertificate(
        threshold=float(tested[accepted]),
        most=most,
        confidence=confidence,
        observed=float(wrong[:, accepted].sum() / max(kept[:, accepted].sum(), 1)),
        images=len(wrong),
        kept=float(right / max(calibration.right.sum(), 1)),
        most_per_image=limit,
    )


def _growth(wrong: np.ndarray, kept: np.ndarray, most: float) -> float:
    """Compute the log-wealth that an image adds in the mean at the best constant bet, in nats; 0 if none helps."""
    losses = wrong - most * kept
    bets = np.linspace(0, MAX_BET, 50) / max((1 - most) * kept.max(initial=1), 1e-9)
    return float(np.log1p(-bets[:, None] * losses[None]).mean(1).max())


def _refusal(most: float, confidence: float, images: int, growth: float, required: float) -> str:
    """Write the message for a promise that cannot be given."""
    asked = f"mitigation.max_hallucinated={most:g} at confidence {confidence:g} cannot be promised"
    if growth <= 0:
        return f"{asked}: on the training fold no threshold leaves so few hallucinated mentions; allow more"
    needed = int(np.ceil(required / growth))
    return f"{asked} on {images} calibration images; it takes about {max(needed, images + 1)}, or allow more"


def promise_removal(method: Drop, adapter: Adapter, detector: Detector) -> RemovalCertificate:
    """Find the threshold for ``mitigation.max_hallucinated`` from the run that the detector belongs to.

    Args:
        method: the mitigation, with ``max_hallucinated``.
        adapter: the model, after ``setup``.
        detector: of the method.

    Raises:
        ArtefactError: the detector's folder is not that of a run with labelled descriptions.
        DataError: see ``certify_removal``.
    """
    folder = method.folder(adapter)
    if folder.name != "detector" or not (folder.parent / "samples.jsonl").is_file():
        raise ArtefactError(
            f"mitigation.max_hallucinated needs labelled descriptions, and {folder} belongs to no run that has them; "
            "mitigation.detector=runs/<name>, a run that `stethoscope train` or `benchmark` has given a detector"
        )
    folds = read_judged_texts(folder.parent, detector)
    return certify_removal(folds["calibration"], folds["train"], required(method.max_hallucinated), method.confidence)


def read_judged_texts(run: Path, detector: Detector) -> dict[str, list[JudgedText]]:
    """Read the labelled descriptions of a run by the fold of the detector that was trained on it.

    Args:
        run: directory of a run with a detector, its token rows and ``warnings.jsonl``.
        detector: that detector.

    Returns:
        ``train``, ``calibration`` and ``test``.

    Raises:
        ArtefactError: the run lacks what is needed.
    """
    lines = read_warnings(run)
    if not lines:
        raise ArtefactError(f"{run} has no warnings.jsonl; `stethoscope train run={run}` writes it with the detector")
    fold_of: Mapping[str, str] = {line["group"]: line["fold"] for line in lines}
    tasks = dict.fromkeys(line["task"] for line in lines)
    store = RunStore(run)
    folds: dict[str, list[JudgedText]] = {"train": [], "calibration": [], "test": []}
    for task in tasks:
        rows, _, values = mention_probabilities(store.tokens(task), detector)
        keys = zip(rows["sample_id"], rows["mention_index"], strict=True)
        probabilities = dict(zip(keys, values.tolist(), strict=True))
        for record in store.records(task):
            if record.answer is None or not record.mentions or fold_of.get(record.group) not in folds:
                continue
            judged = [probabilities.get((record.sample_id, m.mention_index), 0.0) for m in record.mentions]
            spans = [(mention.start, mention.end) for mention in record.mentions]
            labels = np.array([mention.label for mention in record.mentions])
            text = JudgedText(record.group, record.answer.text, spans, labels, np.array(judged))
            folds[fold_of[record.group]].append(text)
    if not folds["train"] or not folds["calibration"]:
        raise ArtefactError(f"{run} has no labelled descriptions of both a training and a calibration fold")
    return folds
