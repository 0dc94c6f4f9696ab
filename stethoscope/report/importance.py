"""How much a saved detector leans on every feature: what its AUROC loses when the feature is shuffled."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from stethoscope.features import FEATURES
from stethoscope.metrics.bootstrap import Interval, group_weights
from stethoscope.metrics.classification import Ranking
from stethoscope.report.source import Source

SHUFFLES, REPLICATES = 3, 200
_MENTION = ["sample_id", "number"]
PRIOR = "place and name"


@dataclass(frozen=True)
class Importance:
    """What one feature is to a detector.

    Attributes:
        feature: its name; ``PRIOR`` for what place and name of the mention are.
        columns: how many columns of the table it has (a layer each, for one).
        loss: AUROC with the feature, less AUROC with its values shuffled among the mentions.
    """

    feature: str
    columns: int
    loss: Interval


def by_feature(columns: Sequence[str]) -> dict[str, list[str]]:
    """Columns by the feature they are of; one that is not in the catalogue stands for itself.

    >>> by_feature(["nll", "lens_rank_l00", "lens_rank_l01", "mine"])
    {'nll': ['nll'], 'lens_rank': ['lens_rank_l00', 'lens_rank_l01'], 'mine': ['mine']}
    """
    found: dict[str, list[str]] = {}
    for column in columns:
        fits = [name for name in FEATURES if column == name or column.startswith(f"{name}_")]
        found.setdefault(max(fits, key=len, default=column), []).append(column)
    return found


def importances(source: Source, seed: int = 0) -> list[Importance]:
    """Permutation importance of every feature on the held-out mentions, the greatest loss first.

    The columns of a feature are shuffled together (Breiman 2001, section 10, for groups). Features that say the same
    share what they are worth, and each alone may lose little.

    Args:
        source: a run with a detector in its directory; else the answer is empty, as without mentions of both kinds.
        seed: of shuffles and bootstrap.

    Raises:
        ArtefactError: the detector is damaged or does not fit the token table.
    """
    if not (source.folder / "detector" / "manifest.json").is_file() or source.held_out["label"].nunique() < 2:
        return []
    from stethoscope.detection.factor import EXTERNAL
    from stethoscope.detector import Detector
    from stethoscope.features.columns import keep_columns

    detector = Detector.load(source.folder / "detector")
    lacking = set(detector.schema.names) - set(source.table.columns)
    if lacking:
        warnings.warn(
            f"the token table of {source.folder} lacks {len(lacking)} columns that its detector reads, so that "
            f"feature importance is left out; `stethoscope train run={source.folder}` makes both fit again",
            stacklevel=2,
        )
        return []
    mentions = pd.MultiIndex.from_frame(source.held_out[_MENTION])
    table = source.table[pd.MultiIndex.from_frame(source.table[_MENTION]).isin(mentions)]
    rows = detector.rows(keep_columns(table, detector.schema.names))
    labels, drawn = rows["label"].to_numpy(dtype=int), group_weights(rows["group"], REPLICATES, seed)
    generator = np.random.default_rng(seed)

    def area(scores: np.ndarray) -> np.ndarray:
        return drawn.apply(lambda weights: {"area": Ranking.of(labels, scores, weights).auroc()})["area"]

    whole = area(detector.predict(rows))
    parts = by_feature(detector.features)
    if detector.settings["factored"] or detector.settings["objects"]:
        parts[PRIOR] = list(EXTERNAL) if detector.settings["factored"] else ["object"]
    found = []
    for feature, columns in parts.items():
        areas = [area(detector.predict(mixed)) for mixed in _shuffled(rows, columns, generator)]
        found.append(Importance(feature, len(columns), drawn.interval(whole - np.mean(areas, axis=0))))
    return sorted(found, key=lambda one: -one.loss.value)


def _shuffled(rows: pd.DataFrame, columns: Sequence[str], generator: np.random.Generator) -> Iterator[pd.DataFrame]:
    for _ in range(SHUFFLES):
        order = generator.permutation(len(rows))
        yield rows.assign(**{name: rows[name].to_numpy()[order] for name in columns})
