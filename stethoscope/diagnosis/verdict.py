"""Hold a detector's verdicts on tokens and mentions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stethoscope.detection.visual_consistency import NamedProbability

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
    def outcome(self) -> str:
        """Name the outcome, see ``mention_outcome``; empty without a detector, or where the truth is not known."""
        return "" if self.verdict is None or self.label < 0 else mention_outcome(self.label, self.warned)

    def to_dict(self) -> dict[str, Any]:
        """Convert to a JSON-able dictionary."""
        verdict = {} if self.verdict is None else {**self.verdict.to_dict(), "warned": self.warned}
        span = {"start": self.start, "end": self.end, "tokens": list(self.tokens)}
        return {"object": self.object, **span, **verdict, "label": self.label}


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
