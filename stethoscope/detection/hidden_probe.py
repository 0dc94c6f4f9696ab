"""Reduce hidden states to two scores: what labels and what the model's own verification say about such states.

The probe is a small network with two outputs. One learns the labels of mentions. The other learns, where the training
table has it, the reply of the model when it is asked whether the object is there (self-verification): a pass per
mention that only training pays for. Replies are learned best in more passes than labels, so that each score then has
networks of its own, and from mentions without a label as well. The classifier reads both scores, cross-fitted by image,
beside its other columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy.special import expit
from sklearn.base import BaseEstimator

from stethoscope.detection.artifact import Arrays
from stethoscope.detection.estimators import (
    GroupedEstimator,
    SharedFits,
    Stacked,
    add_prefix,
    cross_fit,
    inner_folds,
    make_once,
    out_of_fold,
    restore_estimator,
)
from stethoscope.detection.recalibration import reply_boundary

COLUMNS = ("hidden_labels", "hidden_verification")
"""Names of the two scores, log-odds of hallucination, for explanations."""
TEACHER = "verify_odds"
"""Column that the second score learns from: log-odds of a yes; NaN where the model was not asked."""
UNITS, MEMBERS = 128, 3
"""Units of the hidden layer, and networks whose scores are averaged."""
EPOCHS, TAUGHT_EPOCHS, STEPS, BATCH, RATE, DECAY, DROPOUT = 12, 50, 100, 256, 4e-3, 1e-2, (0.1, 0.3)
"""Training by AdamW with one cycle of the learning rate, of ``STEPS`` at least; dropout of inputs and hidden units.
What the teacher teaches may be learned for longer than labels: with 50 passes over the mentions the AUROC of a detector
without labels on those of other pictures is .001 higher than with 30. Of 1,000 captions 100 steps learn as
much as 300: AUROC on held-out mentions .0009 higher (8 splits, standard error .0002)."""
DRAFT_STEPS = 50
"""Of a draft."""
LARGEST_ODDS = 20.0


@dataclass(frozen=True)
class HiddenProbe:
    """An average of networks with one hidden layer of rectified units behind a standardisation.

    Attributes:
        mean, scale: (columns,) of the standardisation; a missing value counts as the mean.
        hidden, hidden_bias: (members, columns, ``UNITS``) and (members, ``UNITS``).
        output, bias: (members, ``UNITS``, 2) and (members, 2).
    """

    mean: np.ndarray
    scale: np.ndarray
    hidden: np.ndarray
    hidden_bias: np.ndarray
    output: np.ndarray
    bias: np.ndarray

    @classmethod
    def fit(
        cls,
        states: np.ndarray,
        targets: np.ndarray,
        seed: int = 0,
        members: int = MEMBERS,
        epochs: int = EPOCHS,
        steps: int = STEPS,
        taught_epochs: int = 0,
    ) -> HiddenProbe:
        """Fit on the states of mentions.

        Args:
            states: (rows, columns) float, NaN where a value is missing.
            targets: (rows, 2) probabilities of hallucination by ``COLUMNS``, NaN where not known.
            seed: of weights, order and dropout.
            members: number of networks.
            epochs: passes over the mentions.
            steps: batches to learn from at least, in more passes if need be.
            taught_epochs: passes of further networks, as many again, that make the second score; 0 for none: those of
                the first score make both.
        """
        mean, scale = _moments(states)
        inputs = _standardise(states, mean, scale)
        fitted = [_train(inputs, targets, seed + member, epochs, steps) for member in range(members)]
        if taught_epochs:
            known = np.isfinite(targets[:, 1])
            rows, alone = inputs[known], np.where([False, True], targets[known], np.nan)
            taught = [_train(rows, alone, seed + member, taught_epochs, steps) for member in range(members)]
            fitted = [*_with_one_score(fitted, 0), *_with_one_score(taught, 1)]
        return cls(mean, scale, *(np.stack(parts).astype(np.float64) for parts in zip(*fitted, strict=True)))

    @classmethod
    def restore(cls, arrays: Arrays, columns: int) -> HiddenProbe:
        """Restore and check what ``arrays`` returned.

        Args:
            arrays: arrays of a file by name.
            columns: number of columns of the states.

        Raises:
            ArtefactError: an array is missing, has another shape or type, or holds invalid numbers.
        """
        hidden = arrays.weights("hidden", None, columns, UNITS)
        members = len(hidden)
        arrays.require(members, "hidden", "should hold a network")
        return cls(
            arrays.numbers("mean", columns),
            arrays.positive("scale", columns),
            hidden,
            arrays.weights("hidden_bias", members, UNITS),
            arrays.weights("output", members, UNITS, len(COLUMNS)),
            arrays.weights("bias", members, len(COLUMNS)),
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by name."""
        return in_single_precision(vars(self))

    def transform(self, states: np.ndarray) -> np.ndarray:
        """Compute the log-odds of hallucination by ``COLUMNS``, (rows, 2).

        Args:
            states: (rows, columns) float, NaN where a value is missing.
        """
        inputs, scores = _standardise(states, self.mean, self.scale), np.zeros((len(states), len(COLUMNS)))
        for weights, shift, output, bias in zip(self.hidden, self.hidden_bias, self.output, self.bias, strict=True):
            scores += np.maximum(inputs @ weights + shift, 0) @ output + bias
        return np.clip(scores / len(self.hidden), -LARGEST_ODDS, LARGEST_ODDS)


def _with_one_score(networks: Sequence[tuple[np.ndarray, ...]], score: int) -> Iterator[tuple[np.ndarray, ...]]:
    """Yield networks that are half of an average, with twice one of their two scores and nothing of the other."""
    factors = np.where(np.arange(len(COLUMNS)) == score, 2, 0).astype(np.float32)
    for hidden, hidden_bias, output, bias in networks:
        yield hidden, hidden_bias, output * factors, bias * factors


def in_single_precision(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return a network's arrays, its weights as float32, which they were trained in; mean and scale stay float64."""
    return {name: array if name in ("mean", "scale") else array.astype(np.float32) for name, array in arrays.items()}


def _moments(states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of the columns; 0 and 1 where there is no spread."""
    missing = np.isnan(states)
    count = np.maximum(len(states) - missing.sum(0), 1)
    mean = np.where(missing, 0, states).sum(0) / count
    squares = states - mean
    squares *= squares
    squares[missing] = 0
    spread = np.sqrt(squares.sum(0) / count)
    return mean, np.where(spread > 1e-6, spread, 1.0)


def _standardise(states: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
    inputs = states - mean
    inputs /= scale
    inputs[np.isnan(inputs)] = 0
    return inputs


def _train(inputs: np.ndarray, targets: np.ndarray, seed: int, epochs: int, steps: int) -> tuple[np.ndarray, ...]:
    """Train one network; returns its weights and biases, first to last.

    Written in numpy: in torch most of a fit was not matrix products but masks of dropout, the graph and the imports of
    ``torch.optim``. 300 steps on 640 columns took 1.1 s of CPU time there and take 0.5 s here.
    """
    random, columns = np.random.default_rng(seed), inputs.shape[1]
    states, wanted = inputs.astype(np.float32), np.nan_to_num(targets).astype(np.float32)
    known = np.isfinite(targets)
    count = known.sum(0)
    share = (known * len(targets) / np.maximum(count, 1)).astype(np.float32)  # in sum each output weighs the same
    weights, parts, gradient, slopes = initial_weights(columns, targets.shape[1], random)
    drop_inputs, drop_units = (
        Masks(share_of, BATCH * width, random) for share_of, width in zip(DROPOUT, (columns, UNITS), strict=True)
    )
    batches = math.ceil(len(states) / BATCH)
    epochs = max(epochs, math.ceil(steps / batches))
    optimiser = AdamW(weights, epochs * batches)
    for _ in range(epochs):
        order = random.permutation(len(states))
        for start in range(0, len(states), BATCH):
            chosen = order[start : start + BATCH]
            rows = states[chosen]
            rows *= drop_inputs.draw(*rows.shape)
            backward(parts, rows, drop_units.draw(len(rows), UNITS), wanted[chosen], share[chosen], slopes)
            optimiser.step(gradient)
    learned = count > 0  # a score without a single target is 0
    return parts[0], parts[1], parts[2] * learned, parts[3] * learned


def initial_weights(
    columns: int, outputs: int, random: np.random.Generator
) -> tuple[np.ndarray, list[np.ndarray], np.ndarray, list[np.ndarray]]:
    """Draw a network's weights and biases, first to last, in one array and as its parts; and the same of zeros."""
    shapes, reads = ((columns, UNITS), (UNITS,), (UNITS, outputs), (outputs,)), (columns, columns, UNITS, UNITS)
    initial = [random.uniform(-1, 1, shape).ravel() / math.sqrt(n) for shape, n in zip(shapes, reads, strict=True)]
    weights = np.concatenate(initial).astype(np.float32)
    gradient = np.zeros_like(weights)
    return weights, _split(weights, shapes), gradient, _split(gradient, shapes)


def _split(flat: np.ndarray, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
    """Return views of consecutive parts of an array, by their shapes."""
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    return [part.reshape(shape) for part, shape in zip(np.split(flat, ends[:-1]), shapes, strict=True)]


class Masks:
    """Masks of dropout, cut out of one pool of random factors: to draw each of them took 40 % of a fit.

    Args:
        share: of values to drop; the others are divided by 1 - ``share``.
        size: values of the largest mask.
        random: source of the factors and of where masks begin.
    """

    def __init__(self, share: float, size: int, random: np.random.Generator) -> None:
        self._pool = (random.random(2 * size, np.float32) >= share) / np.float32(1 - share)
        self._random = random

    def draw(self, *shape: int) -> np.ndarray:
        """Return a mask; do not write to it."""
        start = int(self._random.integers(len(self._pool) // 2))
        return self._pool[start : start + math.prod(shape)].reshape(shape)


def backward(
    parts: Sequence[np.ndarray],
    rows: np.ndarray,
    kept: np.ndarray,
    wanted: np.ndarray,
    share: np.ndarray,
    slopes: Sequence[np.ndarray],
) -> None:
    """Compute the gradient of the mean cross-entropy of a batch, summed over outputs.

    Args:
        parts: weights and biases, (columns, units), (units,), (units, outputs) and (outputs,).
        rows: (rows, columns) inputs after dropout.
        kept: (rows, units) factors of dropout, 0 for units that are dropped.
        wanted: (rows, outputs) probabilities.
        share: (rows, outputs) weights of the cross-entropies, 0 where a probability is not known.
        slopes: arrays of the shapes of ``parts``, to which the derivatives are written.
    """
    units = hidden_units(parts, rows, kept)
    error = (expit(units @ parts[2] + parts[3]) - wanted) * share / np.float32(len(rows))
    propagate(parts, rows, kept, units, error, slopes)


def hidden_units(parts: Sequence[np.ndarray], rows: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Compute the rectified units of a batch after dropout, (rows, units); arguments as in ``backward``."""
    units = rows @ parts[0]
    units += parts[1]
    np.maximum(units, 0, out=units)
    units *= kept
    return units


def propagate(
    parts: Sequence[np.ndarray],
    rows: np.ndarray,
    kept: np.ndarray,
    units: np.ndarray,
    error: np.ndarray,
    slopes: Sequence[np.ndarray],
) -> None:
    """Write the derivatives of all weights and biases, given (rows, outputs) those of the outputs.

    Args:
        parts: weights and biases, as in ``backward``.
        rows: (rows, columns) inputs after dropout.
        kept: (rows, units) factors of dropout.
        units: of ``hidden_units``.
        error: (rows, outputs) derivatives of the loss by the outputs.
        slopes: arrays to which the derivatives are written.
    """
    back = error @ parts[2].T
    back *= kept
    back *= units > 0
    np.matmul(rows.T, back, out=slopes[0])
    np.sum(back, axis=0, out=slopes[1])
    np.matmul(units.T, error, out=slopes[2])
    np.sum(error, axis=0, out=slopes[3])


class AdamW:
    """AdamW (Loshchilov & Hutter 2019) with one cycle of rate and momentum (Smith & Topin 2018), as torch has both.

    Args:
        weights: (weights,) float32, which every step changes.
        steps: number of steps of the cycle.
        rate: the largest learning rate.
    """

    def __init__(self, weights: np.ndarray, steps: int, rate: float = RATE) -> None:
        self._weights, self._mean, self._square = weights, np.zeros_like(weights), np.zeros_like(weights)
        step, rise = np.arange(steps), 0.3 * steps - 1
        turn = (1 + np.cos(np.pi * np.where(step <= rise, step / rise, (step - rise) / (steps - 1 - rise)))) / 2
        rates = np.where(step <= rise, rate + (rate / 25 - rate) * turn, rate / 25e4 + (rate - rate / 25e4) * turn)
        momenta = np.where(step <= rise, 0.85 + 0.1 * turn, 0.95 - 0.1 * turn)
        self._cycle = enumerate(zip(rates.tolist(), momenta.tolist(), strict=True), start=1)

    def step(self, gradient: np.ndarray) -> None:
        """Take the next step against a gradient, (weights,), whose values are not kept."""
        number, (rate, momentum) = next(self._cycle)
        self._mean *= momentum
        self._mean += (1 - momentum) * gradient
        self._square *= 0.999
        gradient *= gradient
        gradient *= 0.001
        self._square += gradient
        size = np.sqrt(self._square)
        size /= math.sqrt(1 - 0.999**number)
        size += 1e-8
        np.divide(self._mean, size, out=size)
        size *= rate / (1 - momentum**number)
        self._weights *= 1 - rate * DECAY
        self._weights -= size


def fit_hidden_probe(
    states: np.ndarray,
    targets: np.ndarray,
    further_states: np.ndarray,
    further_targets: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    seed: int,
    taught: bool,
    draft: bool,
) -> tuple[HiddenProbe, np.ndarray]:
    """Fit a probe on mentions, and score each of them by one that was fitted without its image.

    Args:
        states: (rows, columns) of ``HiddenProbe.fit``.
        targets: (rows, 2) of ``HiddenProbe.fit``.
        further_states: (others, columns) of further mentions, of which every probe learns.
        further_targets: (others, 2) of theirs.
        labels: (rows,) of 0 and 1, by which the folds are made.
        groups: (rows,) image ids.
        seed: of everything random.
        taught: as in ``Probed``.
        draft: as in ``Probed``.

    Returns:
        The probe and (rows, 2) scores, which are its own where there are too few images for folds.
    """
    members, epochs, steps = MEMBERS, TAUGHT_EPOCHS if taught else EPOCHS, STEPS
    asked = np.isfinite(targets[:, 1]).any() or np.isfinite(further_targets[:, 1]).any()
    apart = TAUGHT_EPOCHS if asked and not taught and not draft else 0
    if draft:
        members, epochs, steps = 1, 1, DRAFT_STEPS

    def fitted_on(rows: np.ndarray | slice, members: int) -> HiddenProbe:
        learned = np.vstack([states[rows], further_states]), np.vstack([targets[rows], further_targets])
        return HiddenProbe.fit(*learned, seed, members, epochs, steps, apart)

    whole, folds = partial(fitted_on, slice(None), members), inner_folds(groups, labels, draft)
    return cross_fit(partial(fitted_on, members=1), whole, states, len(COLUMNS), folds, draft)


class Probed(Stacked):
    """A classifier whose first columns are the scores of a ``HiddenProbe`` on the last ones.

    The last columns are the states and, at the very end, the teacher's log-odds of a yes, which ``fit`` alone reads.
    The classifier is fitted on cross-fitted scores, made without the row's image.

    Args:
        classifier: unfitted result of ``make_estimator``, or ``Factored``.
        size: number of columns of states.
        C: inverse regularisation strength of the classifier; None chooses it in inner folds.
        seed: of everything random.
        taught: learn the second score alone, from the teacher; the first is 0.
        unlabelled: (rows, columns) of further mentions without labels, for the teacher's score; None for none.
        draft: cross-fit in fewer folds with ``DRAFT_STEPS`` steps, and judge others by the probe of the last fold.
        shared: fits in common with other detectors; None for none.
    """

    def __init__(
        self,
        classifier: BaseEstimator,
        size: int = 1,
        C: float | None = None,
        seed: int = 0,
        taught: bool = False,
        unlabelled: np.ndarray | None = None,
        draft: bool = False,
        shared: SharedFits | None = None,
    ) -> None:
        self.classifier, self.size, self.C, self.seed = classifier, size, C, seed
        self.taught, self.unlabelled, self.draft, self.shared = taught, unlabelled, draft, shared

    def fit(self, X: np.ndarray, y: np.ndarray, groups: np.ndarray) -> Probed:
        """Fit on (rows, own columns + states + teacher), labels and image ids."""
        labels = np.full(len(y), np.nan) if self.taught else y
        more = np.zeros((0, X.shape[1])) if self.unlabelled is None else self.unlabelled
        boundary = 0.0 if self.taught else reply_boundary(X[:, -1], y)
        states, targets = self._states(X), np.column_stack([labels, expit(boundary - X[:, -1])])
        further = self._states(more), np.column_stack([np.full(len(more), np.nan), expit(boundary - more[:, -1])])
        data = (states, targets, *further, y, groups)
        self.probe_, scores = make_once(self.shared, fit_hidden_probe, *data, self.seed, self.taught, self.draft)
        matrix = np.hstack([scores, X[:, : -self.size - 1]])
        classifier = self._fit_classifier(matrix, y, groups)
        self.held_out_ = None
        if self.taught and not isinstance(classifier, GroupedEstimator):
            folds = inner_folds(groups, y, self.draft)
            if folds is not None:  # no label is in the scores that it reads
                self.held_out_ = out_of_fold(classifier, matrix, y, folds)
        return self

    def _states(self, X: np.ndarray) -> np.ndarray:
        return X[:, -self.size - 1 : -1]

    def restore(self, arrays: Arrays, columns: int) -> Probed:
        """Restore the fitted state; see ``GroupedEstimator.restore``."""
        self.probe_ = HiddenProbe.restore(arrays.under("probe"), self.size)
        own = columns - self.size - 1 + len(COLUMNS)
        self.classifier_ = restore_estimator(self.classifier, arrays.under("classifier"), own)
        return self

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the fitted state; see ``GroupedEstimator.arrays``."""
        return add_prefix("probe", self.probe_.arrays()) | add_prefix("classifier", self.classifier_.arrays())

    def join_inputs(self, X: np.ndarray) -> np.ndarray:
        """Build the classifier's inputs, (rows, 2 + own columns)."""
        return np.hstack([self.probe_.transform(self._states(X)), X[:, : -self.size - 1]])
