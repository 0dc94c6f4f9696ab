"""The detector that comes with the embedded model: it fits that model, is small, and reads without a warning."""

import warnings
from pathlib import Path

import numpy as np
import pytest

import stethoscope
from stethoscope.detection.lookup import bundled_detectors
from stethoscope.evaluation.evaluator import Evaluator
from stethoscope.features import FeatureSet
from stethoscope.metrics import classification
from stethoscope.storage.run_dir import RunStore
from stethoscope.tasks.chair import Chair
from stethoscope.testbed import DETECTOR_DIR


@pytest.fixture(scope="module")
def adapter():
    adapter = stethoscope.load("testbed")
    adapter.setup()
    return adapter


def test_it_is_that_of_the_embedded_model_as_it_is(adapter):
    """If this fails after the model was trained again: scripts/train_testbed/detector.py."""
    assert bundled_detectors(adapter) == [DETECTOR_DIR]


def test_an_altered_model_does_not_get_it(adapter, monkeypatch):
    known = adapter.fingerprint()
    for changed in ({"weights": "sha256:0"}, {"prompt": "{question}"}, {"dtype": "bfloat16"}, {"settings": {}}):
        monkeypatch.setattr(adapter, "fingerprint", lambda changed=changed: {**known, **changed})
        assert bundled_detectors(adapter) == []
    tiny = stethoscope.load("testbed", random_init="tiny")
    tiny.setup()
    assert bundled_detectors(tiny) == []
    other = stethoscope.load("qwen2-vl-2b", random_init="tiny")  # whose weights are not even digested
    monkeypatch.setattr(other, "fingerprint", None)
    assert bundled_detectors(other) == []


def test_it_is_small_and_reads_without_a_warning():
    files = {path.name: path.stat().st_size for path in DETECTOR_DIR.iterdir()}
    assert files.keys() == {"detector.safetensors", "manifest.json", "README.md"}
    assert sum(files.values()) < 2_000_000  # nearly all of it the weights of the probe of hidden states
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert stethoscope.Detector.load(DETECTOR_DIR).fitted
    assert str(Path.home()) not in (DETECTOR_DIR / "manifest.json").read_text()


def test_it_warns_of_what_is_not_there(adapter, tmp_path):
    """On scenes that it has not learned from."""
    detector = stethoscope.Detector.load(DETECTOR_DIR)
    task = Chair(scenes=3040)
    task.setup()
    names = FeatureSet()  # those of features=default
    task.samples = lambda samples=task.samples: list(samples())[3000:]
    Evaluator(features=names, run_dir=tmp_path, batch_size=20).run(adapter, task)
    rows = detector.select_mentions(RunStore(tmp_path).tokens("chair"))
    labels, probabilities = rows["label"].to_numpy(), detector.predict(rows)
    assert classification.auroc(labels, probabilities) > 0.8
    assert np.mean(probabilities[labels == 1]) > np.mean(probabilities[labels == 0]) + 0.2
