"""Extract the mentions of an answer, and score its tokens and mentions with a detector."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stethoscope.core.errors import CapabilityError, ConfigError
from stethoscope.core.images import profile_text
from stethoscope.core.token_table import FeatureSchema, stem
from stethoscope.core.types import Answer, Generation, ImageRef, Mention, Sample, with_limit
from stethoscope.diagnosis.verdict import DiagnosedMention, TokenVerdict
from stethoscope.features import FeatureSet
from stethoscope.storage.tokens import token_table
from stethoscope.tasks.extraction import Extraction, as_extraction, other_words
from stethoscope.tasks.object_extraction import OBJECTS, MentionExtractor

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from PIL.Image import Image

    from stethoscope.detection.detector import Detector
    from stethoscope.tracing.mention_passes import Resampling
    from stethoscope.tracing.trace import Encoded, Trace

TOP_FEATURES = 5  # features with the largest contributions to a token's verdict
FOLLOW_UP = (
    "This answers a follow-up question. The detector was calibrated on first questions, so no probability here is "
    "calibrated, and no guarantee of its threshold holds."
)


def extract_mentions(
    answer: Answer, extractor: MentionExtractor, truth: Collection[str] | None = None
) -> list[Mention]:
    """Extract the mentions of an answer, in reading order and with indices as tasks give them.

    Args:
        answer: its text is read.
        extractor: finds the objects that it names.
        truth: COCO's names of all objects that the picture shows, by which names that COCO knows are labelled; None for
            mentions without labels.
    """
    extraction = as_extraction(extractor)
    shown = extraction.own_names(truth or ())
    judged = frozenset[str]() if truth is None else extraction.own_names(OBJECTS)
    repeats: Counter[str] = Counter()
    mentions = []
    for index, mention in enumerate(sorted(extractor(answer.text), key=lambda mention: mention.start)):
        label = int(mention.name not in shown) if mention.name in judged else -1
        mentions.append(Mention(mention.start, mention.end, mention.name, label, index, repeats[mention.name]))
        repeats[mention.name] += 1
    return mentions


def read_samples(extractor: MentionExtractor, generation: Generation | None) -> Resampling:
    """Describe how one answer is sampled again and its objects are read, for ``trace_answers``."""
    from stethoscope.tracing.mention_passes import Resampling  # importing this package imports no torch

    return Resampling(
        with_limit(generation), [lambda answer: {mention.object for mention in extract_mentions(answer, extractor)}]
    )


def score_mentions(
    encoded: Encoded, answer: Answer, mentions: list[Mention], columns: dict[str, Any], detector: Detector | None
) -> tuple[tuple[TokenVerdict, ...], tuple[DiagnosedMention, ...]]:
    """Score every token and every mention of an answer with a detector.

    Args:
        encoded: the prompt.
        answer: of the model.
        mentions: of ``extract_mentions``.
        columns: (T,) features of the answer by the detector's columns; empty without a detector.
        detector: None for mentions without verdicts.

    Returns:
        The verdict of every token (none without a detector), and the mentions with their verdicts.
    """
    diagnosed = [
        DiagnosedMention(
            mention.object,
            mention.start,
            mention.end,
            tuple(answer.covering(mention.start, mention.end)),
            label=mention.label,
        )
        for mention in mentions
    ]
    if detector is None:
        return (), tuple(diagnosed)
    tokens, verdicts = _score(detector, encoded, answer, mentions, columns)
    for index, verdict in verdicts.items():
        warned = verdict.probability >= detector.threshold
        diagnosed[index] = replace(diagnosed[index], verdict=verdict, warned=warned)
    return tokens, tuple(diagnosed)


def shift_sentence(
    encoded: Encoded,
    answer: Answer,
    mentions: Sequence[Mention],
    columns: Mapping[str, Any],
    detector: Detector | None,
    picture: Image,
    extraction: Extraction,
) -> str:
    """Say in one sentence that an answer or its mentions are unlike those that its detector learned from; else "".

    Args:
        encoded: the prompt.
        answer: of the model.
        mentions: of ``extract_mentions``.
        columns: (T,) features of the answer by the detector's columns.
        detector: one without a monitor says nothing.
        picture: that the answer is about.
        extraction: that found the mentions.
    """
    if detector is not None and encoded.history:
        return FOLLOW_UP
    if detector is None or not mentions:
        return ""
    if words := other_words(extraction.identity, detector.notes.get("task")):
        return words
    if detector.monitor is None:
        return ""
    table = token_rows(encoded, answer, mentions, columns, profile_text(picture))
    return detector.monitor.sentence(detector.monitored_mentions(table))


def token_rows(
    encoded: Encoded, answer: Answer, mentions: Sequence[Mention], columns: Mapping[str, Any], picture: str = ""
) -> pd.DataFrame:
    """Build the token table of one answer.

    Args:
        encoded: the prompt.
        answer: of the model.
        mentions: of ``extract_mentions``.
        columns: (T,) features by the detector's columns.
        picture: profile of the picture, see ``core.images.picture_profile``; empty where it does not matter.
    """
    sample = Sample("answer", ImageRef("image", Path("image")), encoded.question, "image")  # the image is not read
    return token_table("diagnose", sample, answer, mentions, columns, encoded.text, picture=picture).to_pandas()


def feature_set(columns: Sequence[str]) -> FeatureSet:
    """Select the features that the columns of a detector belong to, such as ``attn_image`` for ``attn_image_l00``.

    Raises:
        CapabilityError: a column belongs to no registered feature.
    """
    try:
        return FeatureSet(groups=(), names=list(dict.fromkeys(map(stem, columns))))
    except ConfigError as error:
        raise CapabilityError(
            "the detector reads a feature that stethoscope does not compute; add plugins=[...] with the package that "
            f"defines it: {error}"
        ) from None


def compute_columns(features: FeatureSet, trace: Trace, detector: Detector, model: str) -> dict[str, np.ndarray]:
    """Compute the (T,) features of one answer, in the columns that the detector reads.

    Raises:
        CapabilityError: the model gives other columns, for instance because it has fewer layers.
    """
    try:
        columns = features.compute(trace)
    except CapabilityError as error:
        raise CapabilityError(f"the detector reads features that {model} does not give: {error}") from None
    schema = FeatureSchema(tuple(columns))
    if schema.hash != detector.schema.hash:
        raise CapabilityError(
            f"the detector reads features that {model} does not give, it was trained on another model "
            f"({detector.schema.difference(schema)})"
        )
    return {name: columns[name] for name in detector.schema.names}


def _score(
    detector: Detector,
    encoded: Encoded,
    answer: Answer,
    mentions: Sequence[Mention],
    columns: Mapping[str, np.ndarray],
) -> tuple[tuple[TokenVerdict, ...], dict[int, TokenVerdict]]:
    """Compute the verdict on every token, and on every mention by its index."""
    table = token_rows(encoded, answer, mentions, columns)
    rows = detector.select_mentions(table, judged=False)
    rows = rows[rows["is_first_subtoken"]].reset_index(drop=True)
    row_verdicts = _verdicts(detector, rows)
    mention_verdicts = [row_verdicts[row] for row in detector.deciding_rows(rows)]
    indices = rows["mention_index"].astype(int).tolist()
    return tuple(_verdicts(detector, table)), dict(zip(indices, mention_verdicts, strict=True))


def _verdicts(detector: Detector, rows: pd.DataFrame) -> list[TokenVerdict]:
    """Compute the verdict on every row of a token table."""
    if not len(rows):
        return []
    visual_evidence = detector.visual_evidence(rows)
    if not detector.additive:
        pairs = zip(detector.predict(rows), visual_evidence, strict=True)
        return [TokenVerdict(float(probability), visual_evidence=objects) for probability, objects in pairs]
    explanation = detector.explain(rows)
    values = zip(explanation.probability, explanation.evidence, explanation.prior, visual_evidence, strict=True)
    return [
        TokenVerdict(
            float(probability), float(evidence), float(prior), tuple(explanation.top(row, TOP_FEATURES)), objects
        )
        for row, (probability, evidence, prior, objects) in enumerate(values)
    ]
