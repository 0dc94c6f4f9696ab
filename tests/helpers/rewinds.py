"""Going back at names that a test doubts: models of random weights name no objects, so every word is one."""

import re
from dataclasses import replace

import numpy as np

import stethoscope as package
from stethoscope import testbed
from stethoscope.core.token_table import FeatureSchema
from stethoscope.core.types import Generation
from stethoscope.detection.design_matrix import Design, Inputs
from stethoscope.features import FEATURES, FeatureSet
from stethoscope.streaming.backtrack import Backtrack, Backtracker
from stethoscope.streaming.recorded_steps import STEP_REQUIREMENTS
from stethoscope.streaming.warning_streamer import WarningStreamer, decode_answers
from stethoscope.tasks.extraction import as_extraction
from stethoscope.tasks.object_extraction import TextMention

STEPWISE = [name for name, item in FEATURES.items() if item.requires <= STEP_REQUIREMENTS and item.group != "grid"]
FAST = FeatureSet(groups=("uncertainty", "position", "attention", "lens")).names


def words(text):
    """Name every run of letters, so that random models name objects too."""
    return [TextMention(match[0], *match.span()) for match in re.finditer(r"[A-Za-z]{2,}", text)]


def doubt(name):
    """Doubt two words in three, by their letters."""
    return sum(map(ord, name)) % 3 > 0


def fake_detector(columns):
    """A detector of the columns of another model, whose probabilities the test sets."""
    detector = package.Detector(repeats="all")
    detector.design = Design(FeatureSchema(tuple(columns)), Inputs(tuple(columns)))
    detector._model = package.Detector.load(testbed.DETECTOR_DIR).model
    return detector


class ByName(Backtracker):
    """Judges mentions by their names instead of a detector's probability, and goes back to the name itself."""

    least = 0.0

    def decide(self, mention, *more):
        return super().decide(replace(mention, probability=float(doubt(mention.object))), *more)

    def starts(self, mention, text, spans):
        return [mention.tokens[0]]


def streamer_of(adapter, encoded, generation, names=(), delay=1):
    """A streamer that takes doubtful words back, and computes features of every token that could name an object."""
    columns = ["nll"]
    if names:
        short = adapter.generate([encoded], Generation(max_new_tokens=3))[0]
        features = FeatureSet(groups=(), names=names)
        columns = features.compute(adapter.trace(encoded, short, features.requires))
    detector = fake_detector(columns)
    backtracker = ByName(
        Backtrack(threshold=0.5, tries_per_place=3, tries_per_answer=12), detector, as_extraction(words)
    )
    streamer = WarningStreamer(adapter, encoded, detector, delay, None, generation, words, backtracker)
    streamer.scorer._predict = lambda rows: np.full(len(rows), 0.5)
    return streamer


def streamed(*streamers):
    """Decode the answers of streamers as one batch."""
    for _ in decode_answers(streamers):
        pass
    return streamers
