"""Run directories and detectors with anything changed in them: read, or refused in one line."""

import hashlib
import json

import pytest
from fuzz.broken import VALUES, answers, changed, damaged, json_bytes, line_bytes
from helpers.tiny_world import TinyAdapter, TinyFeatures, TinyTask
from helpers.token_tables import halves, token_table
from hypothesis import given, settings
from hypothesis import strategies as st

from stethoscope.detection import artifact
from stethoscope.detection.detector import Detector
from stethoscope.evaluation.evaluator import Evaluator
from stethoscope.storage.records import Record
from stethoscope.storage.run_dir import RunStore


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, and what its files hold."""
    folder = tmp_path_factory.mktemp("run")
    Evaluator(run_dir=folder, features=TinyFeatures(), trace="all").run(TinyAdapter(), TinyTask(3))
    return folder, [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """A saved detector, and its manifest."""
    folder = tmp_path_factory.mktemp("detector") / "saved"
    Detector().fit(*halves(token_table(60))).save(folder)
    return folder, json.loads((folder / artifact.MANIFEST).read_text()), (folder / artifact.OBJECTS).read_bytes()


def test_samples(run):
    folder, rows = run

    @given(data=line_bytes(rows))
    def check(data):
        (folder / "samples.jsonl").write_bytes(data)
        result = answers(lambda: list(RunStore(folder).records()))
        assert result is None or all(isinstance(record, Record) for record in result)

    check()


@pytest.mark.parametrize("name", ["metrics.json", "status.json", "fingerprint.json"])
def test_json_files_of_a_run(run, name):
    folder, rows = run
    few = settings(max_examples=max(settings().max_examples // 4, 1))  # each is a run
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = (folder / name).read_bytes()

    @few
    @given(data=json_bytes(json.loads(whole)))
    def check(data):
        (folder / name).write_bytes(data)
        store = RunStore(folder)
        for read in (store.metrics, store.status, store.fingerprints):
            result = answers(read)
            assert result is None or isinstance(result, dict)
        answers(lambda: Evaluator(run_dir=folder).run(TinyAdapter(), TinyTask(3)))

    check()
    (folder / name).write_bytes(whole)


def test_detector_manifest(detector):
    folder, manifest, _ = detector

    @given(data=st.one_of(json_bytes(manifest), changed(manifest["settings"]).map(
        lambda settings: json.dumps({**manifest, "settings": settings}).encode())))  # fmt: skip
    def check(data):
        (folder / artifact.MANIFEST).write_bytes(data)
        answers(lambda: Detector.load(folder))

    check()
    (folder / artifact.MANIFEST).write_text(json.dumps(manifest))


def test_detector_objects(detector):
    folder, manifest, objects = detector

    @given(
        data=damaged(st.just(objects)),
        position=st.integers(0, len(objects) - 1),
        byte=st.integers(0, 255),
        sealed=st.booleans(),
    )
    def check(data, position, byte, sealed):
        if data == objects:
            data = objects[:position] + bytes([byte]) + objects[position + 1 :]
        (folder / artifact.OBJECTS).write_bytes(data)
        if sealed:  # even with a digest that fits
            new = {**manifest, "sha256": {artifact.OBJECTS: hashlib.sha256(data).hexdigest()}}
            (folder / artifact.MANIFEST).write_text(json.dumps(new))
        answers(lambda: Detector.load(folder))
        (folder / artifact.MANIFEST).write_text(json.dumps(manifest))

    check()


@given(line=VALUES)
def test_any_line_as_a_record(line):
    answers(lambda: artifact.load_arrays(json.dumps(line).encode()))
