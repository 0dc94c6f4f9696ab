"""Self-verification on the embedded model: runs, diagnoses and the ends of streams ask the same and hear the same."""

import numpy as np
import pytest
from helpers.token_tables import halves, token_table

import stethoscope
from stethoscope import testbed
from stethoscope.core.errors import CapabilityError
from stethoscope.core.token_table import KEY_COLUMNS
from stethoscope.core.types import UNKNOWN, Generation, Mention
from stethoscope.detection.detector import Detector
from stethoscope.diagnosis.answer_verdicts import extract_mentions
from stethoscope.diagnosis.run_diagnosis import diagnose
from stethoscope.evaluation.evaluator import Evaluator
from stethoscope.features import FeatureSet
from stethoscope.storage.run_dir import RunStore
from stethoscope.streaming import Final, stream
from stethoscope.tasks.chair import Chair
from stethoscope.tasks.extraction import load_extraction
from stethoscope.tracing.mention_passes import trace_answers, yes_odds

QUESTION = "Please describe this image in detail."
FEATURES = FeatureSet([], ["nll", "verify_odds"])


@pytest.fixture(scope="module")
def adapter():
    return stethoscope.load("testbed")


@pytest.fixture(scope="module")
def detector():
    table = token_table(200).rename(columns={"mass": "verify_odds"}).drop(columns=["noise", "position"])
    return Detector().fit(*halves(table))


@pytest.fixture(scope="module")
def scene():
    return testbed.scenes(3)[2].image()


def test_it_knows_what_is_there(adapter):
    scenes = testbed.scenes(12)
    absent = [next(name for name in ("pizza", "zebra", "surfboard") if name not in scene.visible) for scene in scenes]
    names = [[*scene.visible[:2], name] for scene, name in zip(scenes, absent, strict=True)]
    measured = yes_odds(adapter, [scene.image() for scene in scenes], names)
    there = [odds[name] for odds, scene in zip(measured, scenes, strict=True) for name in scene.visible[:2]]
    away = [odds[name] for odds, name in zip(measured, absent, strict=True)]
    assert np.median(there) > 1 > -1 > np.median(away)


def test_runs_ask_about_every_object_that_is_named(adapter, tmp_path):
    task = Chair(scenes=4)
    Evaluator(features=FEATURES, run_dir=tmp_path / "run").run(adapter, task)
    table = RunStore(tmp_path / "run").tokens("chair")
    named = table[table["mention_index"] >= 0]
    assert table["verify_odds"].notna().equals(table["mention_index"] >= 0)
    pictures = {scene.id: scene.image() for scene in testbed.scenes(4)}
    for image, rows in named.groupby("group"):
        odds = yes_odds(adapter, [pictures[image]], [list(rows["object"])])[0]
        np.testing.assert_allclose(rows["verify_odds"], [odds[name] for name in rows["object"]], atol=1e-4)


def test_a_diagnosis_and_the_end_of_a_stream_ask_too(adapter, scene, detector):
    diagnosis = diagnose(adapter, scene, QUESTION, detector=detector)
    encoded = adapter.encode(scene, QUESTION)
    answer = adapter.generate([encoded], Generation(max_new_tokens=128))[0]
    mentions = extract_mentions(answer, load_extraction("coco"))
    trace = trace_answers(adapter, [encoded], [answer], FEATURES.requires, [scene], [mentions])[0]
    columns = FEATURES.compute(trace)
    keys = token_table(1, per_image=1)[:1]
    keys = keys[[name for name in keys.columns if name in KEY_COLUMNS]]
    for mention, named in zip(mentions, diagnosis.mentions, strict=True):
        index = next(
            token for token, owner in enumerate(answer.owners(mentions)) if owner and owner.object == mention.object
        )
        row = keys.assign(**{name: values[index] for name, values in columns.items()})
        assert named.verdict.probability == pytest.approx(float(detector.predict(row)[0]), abs=1e-4)
    *_, last = stream(adapter, scene, QUESTION, final=detector)
    assert isinstance(last, Final)
    for ours, other in zip(last.mentions, diagnosis.mentions, strict=True):
        assert ours.verdict.probability == pytest.approx(other.verdict.probability, abs=1e-4)


def test_a_stream_cannot_ask_while_it_writes(adapter, scene, detector):
    with pytest.raises(CapabilityError, match="verify_odds, which a decoding step does not give"):
        next(iter(stream(adapter, scene, QUESTION, detector=detector)))


def test_a_mention_that_names_no_object_is_not_asked_about(adapter, scene):
    encoded = adapter.encode(scene, QUESTION)
    answer = adapter.answer(encoded, "Yes, it is.")
    mention = Mention(0, 3, UNKNOWN, 0, 0, 0)
    (trace,) = trace_answers(adapter, [encoded], [answer], {"questions"}, [scene], [[mention]])
    assert trace.yes_odds.isnan().all()
