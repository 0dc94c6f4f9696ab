"""A detector on the tokens of one answer: its features, its probabilities, its reasons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from stethoscope.core.errors import CapabilityError, ConfigError
from stethoscope.core.token_table import FeatureSchema, stem
from stethoscope.core.types import Answer, ImageRef, Mention, Sample
from stethoscope.diagnosis.parts import Judgement
from stethoscope.features import FeatureSet
from stethoscope.storage.tokens import token_table

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from stethoscope.detector import Detector
    from stethoscope.tracing.trace import Encoded, Trace

_TOP = 5  # features that are told for every token


def feature_set(columns: Sequence[str]) -> FeatureSet:
    """The features that columns of a detector are of.

    Raises:
        CapabilityError: one of them is not known here.
    """
    try:
        return FeatureSet(groups=(), names=feature_names(columns))
    except ConfigError as error:
        raise CapabilityError(f"the detector reads features that stethoscope does not compute: {error}") from None


def feature_names(columns: Sequence[str]) -> list[str]:
    """The features that columns are of.

    >>> feature_names(["nll", "attn_image_l00", "attn_image_l01", "head_image_l00h03"])
    ['nll', 'attn_image', 'head_image']
    """
    return list(dict.fromkeys(stem(column) for column in columns))


def columns_of(features: FeatureSet, trace: Trace, detector: Detector, model: str) -> dict[str, np.ndarray]:
    """The features of one answer, in the columns that the detector knows.

    Raises:
        CapabilityError: the model gives others, as one with more or fewer layers does.
    """
    try:
        columns = features.compute(trace)
    except CapabilityError as error:
        raise CapabilityError(f"the detector reads features that {model} does not give: {error}") from None
    given = FeatureSchema(tuple(columns))
    if given.hash != detector.schema.hash:
        raise CapabilityError(
            f"the detector reads features that {model} does not give, it was trained on another model "
            f"({detector.schema.difference(given)})"
        )
    return {name: columns[name] for name in detector.schema.names}


def judge(
    detector: Detector,
    encoded: Encoded,
    answer: Answer,
    mentions: Sequence[Mention],
    columns: Mapping[str, np.ndarray],
) -> tuple[tuple[Judgement, ...], dict[int, Judgement]]:
    """What the detector says of every token, and of every mention by its number."""
    sample = Sample("answer", ImageRef("image", lambda: None), encoded.question, "image")
    table = token_table("diagnose", sample, answer, mentions, columns, encoded.text).to_pandas()
    rows = detector.rows(table, judged=False)
    rows = rows[rows["first"]].reset_index(drop=True)
    found = _judgements(detector, rows)
    named = [found[row] for row in detector.deciding(rows)]
    return tuple(_judgements(detector, table)), dict(zip(rows["number"].astype(int).tolist(), named, strict=True))


def _judgements(detector: Detector, rows: pd.DataFrame) -> list[Judgement]:
    if not len(rows):
        return []
    looks = detector.looks(rows)
    if not detector.additive:
        return [Judgement(float(value), looks=seen) for value, seen in zip(detector.predict(rows), looks, strict=True)]
    why = detector.explain(rows)
    values = zip(why.probability, why.evidence, why.prior, looks, strict=True)
    return [
        Judgement(float(probability), float(evidence), float(prior), tuple(why.top(row, _TOP)), seen)
        for row, (probability, evidence, prior, seen) in enumerate(values)
    ]
