"""Extract the mentions of an answer, score its tokens and mentions with a detector, and hold its verdicts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stethoscope.core.errors import CapabilityError, ConfigError
from stethoscope.core.picture_profile import profile_text
from stethoscope.core.token_table import FeatureSchema, stem
from stethoscope.core.types import Answer, Generation, ImageRef, Mention, Sample, with_limit
from stethoscope.features import FeatureSet
from stethoscope.features.registry import TokenColumns
from stethoscope.features.relevancy import image_tokens
from stethoscope.storage.tokens import TokenRows
from stethoscope.tasks.extraction import Extraction, as_extraction, other_words
from stethoscope.tasks.object_extraction import OBJECTS, MentionExtractor, label_mentions

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from PIL.Image import Image

    from stethoscope.detection.detector import Detector
    from stethoscope.detection.visual_consistency import NamedProbability
    from stethoscope.tracing.mention_passes import Resampling
    from stethoscope.tracing.trace import Encoded, Trace

FeatureContributions = tuple[tuple[str, float], ...]
"""Features and their contributions to the evidence, in log-odds, strongest first; above 0 means hallucinated."""


@dataclass(frozen=True)
class TokenVerdict:
    """A detector's verdict on a token or a mention.

    Attributes:
        probability: that it is hallucinated, in [0, 1]. Calibrated for object names, from which detectors learn; for
            other tokens it is an extrapolation, shown for orientation only.
        evidence, prior: log-odds that add up to those of the probability (``detection.evidence_prior.Explanation``);
            None if the detector's calibration is not additive.
        top: the features with the largest contributions; empty unless the detector is linear.
        visual_evidence: objects that the attended image evidence resembles, most probable first, None for nothing known
            (``Detector.visual_evidence``); empty for other tokens and where the detector does not learn it.
    """

    probability: float
    evidence: float | None = None
    prior: float | None = None
    top: FeatureContributions = ()
    visual_evidence: tuple[NamedProbability, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Convert to a JSON-able dictionary, with numbers rounded."""
        return {
            "probability": rounded(self.probability),
            "evidence": rounded(self.evidence),
            "prior": rounded(self.prior),
            "top": [{"feature": name, "push": rounded(contribution)} for name, contribution in self.top],
            "visual_evidence": [
                {"object": name, "probability": rounded(probability)} for name, probability in self.visual_evidence
            ],
        }


@dataclass(frozen=True)
class DiagnosedMention:
    """An object that the answer names, with the detector's verdict.

    Attributes:
        object: canonical name.
        start, end: characters of the answer, as a half-open range.
        tokens: indices of the tokens that name the object.
        verdict: None without a detector.
        warned: whether the probability is at or above the detector's threshold.
        label: the truth: 1 hallucinated, 0 grounded, -1 not known.
    """

    object: str
    start: int
    end: int
    tokens: tuple[int, ...]
    verdict: TokenVerdict | None = None
    warned: bool = False
    label: int = -1

    @property
    def probability(self) -> float:
        """Return the verdict's probability that the object is hallucinated, in [0, 1]; NaN without a detector."""
        return float("nan") if self.verdict is None else self.verdict.probability

    @property
    def outcome(self) -> str:
        """Name the outcome, see ``mention_outcome``; empty without a detector, or where the truth is not known."""
        return "" if self.verdict is None or self.label < 0 else mention_outcome(self.label, self.warned)

    def to_dict(self) -> dict[str, Any]:
        """Convert to a JSON-able dictionary."""
        verdict = {} if self.verdict is None else {**self.verdict.to_dict(), "warned": self.warned}
        span = {"start": self.start, "end": self.end, "tokens": list(self.tokens)}
        return {"object": self.object, **span, **verdict, "label": self.label}


class AnswerFeatures(NamedTuple):
    """What a detector reads of one answer.

    Attributes:
        columns: (T,) features by name, of the detector's table; empty without a detector.
        image_tokens: of the picture as text (``core.token_table.pack_vectors``); empty where none are read.
    """

    columns: Mapping[str, np.ndarray] = {}
    image_tokens: str = ""


class ReadAnswer(NamedTuple):
    """An answer with the objects that it names, and what a detector reads of it.

    Attributes:
        encoded: the prompt.
        answer: of the model.
        mentions: of ``extract_mentions``.
        features: of the answer; empty without a detector.
    """

    encoded: Encoded
    answer: Answer
    mentions: Sequence[Mention]
    features: AnswerFeatures = AnswerFeatures()


def mention_outcome(label: int, warned: bool) -> str:
    """Name the outcome of a mention by its label (1 hallucinated, 0 grounded, -1 none) and its warning.

    >>> [mention_outcome(label, warned) for label, warned in ((1, True), (1, False), (0, True), (0, False), (-1, True))]
    ['caught', 'missed', 'false alarm', 'right', 'not judged']
    """
    if label < 0:
        return "not judged"
    return ("caught" if warned else "missed") if label else ("false alarm" if warned else "right")


def rounded(value: float | None) -> float | None:
    """Round a number to six digits for JSON; None stays None."""
    return None if value is None else round(float(value), 6)


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
    named = sorted(extractor(answer.text), key=lambda mention: mention.start)
    labels = [int(mention.name not in shown) if mention.name in judged else -1 for mention in named]
    return list(label_mentions(named, labels))


def make_resampling(extractor: MentionExtractor, generation: Generation | None) -> Resampling:
    """Describe how one answer is sampled again and its objects are read, for ``trace_answers``."""
    from stethoscope.tracing.mention_passes import Resampling  # importing this package imports no torch

    return Resampling(
        with_limit(generation), [lambda answer: {mention.object for mention in extract_mentions(answer, extractor)}]
    )


def score_mentions(
    read: ReadAnswer, detector: Detector | None
) -> tuple[tuple[TokenVerdict, ...], tuple[DiagnosedMention, ...]]:
    """Score every token and every mention of an answer with a detector.

    Args:
        read: the answer.
        detector: None for mentions without verdicts.

    Returns:
        The verdict of every token (none without a detector), and the mentions with their verdicts.
    """
    diagnosed = [
        DiagnosedMention(
            mention.object,
            mention.start,
            mention.end,
            tuple(read.answer.covering(mention.start, mention.end)),
            label=mention.label,
        )
        for mention in read.mentions
    ]
    if detector is None:
        return (), tuple(diagnosed)
    tokens, verdicts = _score(detector, read)
    for index, verdict in verdicts.items():
        warned = verdict.probability >= detector.threshold
        diagnosed[index] = replace(diagnosed[index], verdict=verdict, warned=warned)
    return tokens, tuple(diagnosed)


def locate_objects(read: ReadAnswer, detector: Detector | None) -> dict[str, np.ndarray]:
    """Let the detector look for every object that an answer names, see ``Diagnosis.seen``; None sees nothing."""
    if detector is None:
        return {}
    names = dict.fromkeys(mention.object for mention in read.mentions)
    seen = {name: detector.design.locate(read.features.image_tokens, name) for name in names}
    return {name: values for name, values in seen.items() if values is not None}


def shift_sentence(read: ReadAnswer, detector: Detector | None, picture: Image, extraction: Extraction) -> str:
    """Say in one sentence that an answer or its mentions are unlike those that its detector learned from; else "".

    Args:
        read: the answer.
        detector: one without a monitor says nothing.
        picture: that the answer is about.
        extraction: that found the mentions.
    """
    if detector is not None and read.encoded.history:
        return FOLLOW_UP
    if detector is None or not read.mentions:
        return ""
    if words := other_words(extraction.identity, detector.notes.get("task")):
        return words
    if detector.monitor is None:
        return ""
    table = token_rows(read, profile_text(picture))
    return detector.monitor.sentence(detector.readings(table, contents=False))


def token_rows(read: ReadAnswer, picture: str = "") -> pd.DataFrame:
    """Build the token table of one answer.

    Args:
        read: the answer.
        picture: profile of the picture, see ``core.picture_profile``; empty where it does not matter.
    """
    encoded, answer, mentions, features = read
    sample = Sample("answer", ImageRef("image", Path("image")), encoded.question, "image")  # the image is not read
    owners, columns = answer.owners(mentions), TokenColumns.of(features.columns)
    rows = TokenRows(sample, answer, owners, columns, encoded.text, picture, features.image_tokens)
    return rows.frame("diagnose")


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


def read_features(features: FeatureSet, trace: Trace, detector: Detector, model: str) -> AnswerFeatures:
    """Compute what a detector reads of one answer.

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
    return AnswerFeatures({name: columns[name] for name in detector.schema.names}, image_tokens(trace, columns))


def _score(detector: Detector, read: ReadAnswer) -> tuple[tuple[TokenVerdict, ...], dict[int, TokenVerdict]]:
    """Compute the verdict on every token, and on every mention by its index."""
    table = token_rows(read)
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
