"""Files of detectors with a right digest and hostile contents: every one is an error in one line."""

import hashlib
import json
import os
import warnings

import numpy as np
import pytest
from helpers.token_tables import halves, token_table
from safetensors.numpy import load

from stethoscope.core.errors import ArtefactError
from stethoscope.detection import artifact
from stethoscope.detection.detector import Detector
from stethoscope.detection.lookup import detectors_for_model

TRAIN, CALIBRATION = halves(token_table(200))
KINDS = {
    "logistic": {"estimator": "logistic"},
    "boosting": {"estimator": "boosting", "calibration": "isotonic"},
    "per_head": {"estimator": "per_head", "calibration": "none", "objects": True},
    "factored": {"factored": True, "C": 0.1},
    "grounded": {"factored": True, "C": 0.1},
}


def with_places(table):
    """The table with three dimensions of the feature that the grounding classifier reads."""
    random = np.random.default_rng(0)
    columns = {f"attended_embedding_{n}": random.normal(size=len(table)).astype(np.float32) for n in range(3)}
    return table.assign(**columns)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of detectors by kind, with a hole in a column, so that there are indicators."""
    folder = tmp_path_factory.mktemp("detectors")
    for kind, settings in KINDS.items():
        train, calibration = (
            table.assign(mass=table["mass"].where(table["token"] != 9)) for table in (TRAIN, CALIBRATION)
        )
        if kind == "grounded":
            train, calibration = with_places(train), with_places(calibration)
        Detector(**settings).fit(train, calibration).save(folder / kind, {"model": {"name": "testbed"}})
    return folder


def forge(source, folder, change):
    """A copy of a detector with other arrays and the digest that belongs to them; ``change`` alters the dictionary."""
    arrays = {name: array.copy() for name, array in load((source / artifact.OBJECTS).read_bytes()).items()}
    change(arrays)
    manifest = json.loads((source / artifact.MANIFEST).read_text())
    data = artifact.dump_arrays(arrays, {key: manifest[key] for key in artifact.COLUMNS})
    return seal(folder, data, manifest)


def seal(folder, data, manifest):
    """A detector's folder with these bytes and the digest that belongs to them."""
    folder.mkdir(parents=True)
    (folder / artifact.OBJECTS).write_bytes(data)
    manifest = {**manifest, "sha256": {artifact.OBJECTS: hashlib.sha256(data).hexdigest()}}
    (folder / artifact.MANIFEST).write_text(json.dumps(manifest))
    return folder


def refused(folder):
    """The message of the error that reading gives: one line that names the file."""
    with pytest.raises(ArtefactError) as error:
        Detector.load(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def put(name, value, index=...):
    """A change of one array."""

    def change(arrays):
        arrays[name][index] = value

    return change


def names(saved, kind):
    return load((saved / kind / artifact.OBJECTS).read_bytes())


@pytest.mark.parametrize("kind", KINDS)
def test_every_array_is_needed_in_its_shape_and_type(saved, tmp_path, kind):
    for number, (name, array) in enumerate(names(saved, kind).items()):
        forged = {
            "missing": lambda arrays, name=name: arrays.pop(name),
            "longer": lambda arrays, name=name, array=array: arrays.update({name: np.stack([array, array])}),
            "retyped": lambda arrays, name=name, array=array: arrays.update({name: np.zeros(array.shape, np.int8)}),
        }
        for case, change in forged.items():
            assert repr(name) in refused(forge(saved / kind, tmp_path / f"{number}{case}", change)), case
        if array.dtype == np.float64 and array.size:
            for value in (np.nan, np.inf, -np.inf) + ((1e60,) if not name.endswith("threshold") else ()):
                message = refused(forge(saved / kind, tmp_path / f"{number}{value}", put(name, value)))
                assert repr(name) in message
    foreign = forge(saved / kind, tmp_path / "foreign", lambda arrays: arrays.update(code=np.zeros(3)))
    assert "'code' belongs to no part" in refused(foreign)


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("boosting", "model.feature", 2**40),
        ("boosting", "model.feature", -1),
        ("logistic", "model.missing", 2**40),
        ("logistic", "model.missing", -1),
        ("logistic", "model.scale", 0.0),
        ("logistic", "model.scale", 1e-60),
        ("logistic", "model.C", -1.0),
        ("logistic", "model.low", 1e9),
        ("boosting", "calibrator.probabilities", 1.5),
        ("grounded", "model.grounding.counts", -1),
        ("grounded", "model.grounding.counts", 2**62),
        ("factored", "model.knots", 1.0),
    ],
)
def test_numbers_that_an_array_cannot_have_are_refused(saved, tmp_path, kind, name, value):
    assert repr(name) in refused(forge(saved / kind, tmp_path / "forged", put(name, value)))


def test_trees_may_not_be_more_than_are_ever_fitted(saved, tmp_path):
    def multiply(arrays):
        for name in list(arrays):
            if name.startswith("model.") and name != "model.baseline":
                arrays[name] = np.concatenate([arrays[name]] * 2)

    assert "250" in refused(forge(saved / "boosting", tmp_path / "forest", multiply))


@pytest.mark.parametrize("kind", KINDS)
def test_any_numbers_that_are_let_through_give_probabilities(saved, tmp_path, kind):
    """Also the largest, and every pattern of bits in a tree."""
    random = np.random.default_rng(0)

    def change(arrays):
        for name, array in arrays.items():
            if name.endswith("remaining"):
                array[...] = random.integers(0, 256, array.shape)
            elif array.dtype.kind == "f" and not name.startswith("calibrator.") and "knots" not in name:
                if name.endswith("scale"):
                    array[...] = 1e-50
                elif not name.endswith(("low", "high", "C", "rates")):
                    largest = 1e50 if array.dtype == np.float64 else 3e38
                    array[...] = random.choice([-1, 1], array.shape) * largest

    detector = Detector.load(forge(saved / kind, tmp_path / "wild", change))
    rows = detector.select_mentions(with_places(TRAIN) if kind == "grounded" else TRAIN)
    rows.loc[rows.index[:20], "mass"] = np.nan
    with np.errstate(all="raise", under="ignore"):
        probabilities = detector.predict(rows)
    assert ((probabilities >= 0) & (probabilities <= 1)).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"base_rate": 1},
        {"base_rate": "high"},
        {"threshold": {"value": float("nan"), "chosen": "", "certificate": None}},
        {"threshold": {"value": 0.5, "chosen": "", "certificate": {"risk": "max_missed"}}},
        {"settings": {"estimator": "boosting"}},
        {"settings": {"C": "x"}},
        {"settings": 3},
        {"model": "llava"},
    ],
    ids=str,
)
def test_a_manifest_that_does_not_fit_is_refused(saved, tmp_path, changes):
    source = saved / "logistic"
    manifest = json.loads((source / artifact.MANIFEST).read_text())
    if isinstance(changes.get("settings"), dict):
        changes = {"settings": manifest["settings"] | changes["settings"]}
    refused(seal(tmp_path / "forged", (source / artifact.OBJECTS).read_bytes(), manifest | changes))


def test_names_that_are_no_list_of_names_are_refused(saved, tmp_path):
    source = saved / "logistic"
    manifest, arrays = json.loads((source / artifact.MANIFEST).read_text()), names(saved, "logistic")
    for number, wrong in enumerate(("nll", [1, 2, 3, 4], ["nll"] * 4, {"nll": 1}, ["a", "b", "c", "d"], None)):
        forged = manifest | {"features": wrong}
        data = artifact.dump_arrays(arrays, {key: forged[key] for key in artifact.COLUMNS})
        assert "features should be" in refused(seal(tmp_path / str(number), data, forged))


@pytest.mark.parametrize(
    "data",
    [b"", b"\x00" * 8, b"\xff" * 64, b"PK\x03\x04" + bytes(100), b"\x02" + bytes(7) + b"{}", b"[" * 100_000],
    ids=range(6),
)
def test_bytes_that_are_no_arrays_are_refused(saved, tmp_path, data):
    manifest = json.loads((saved / "logistic" / artifact.MANIFEST).read_text())
    assert artifact.OBJECTS in refused(seal(tmp_path / "forged", data, manifest))


def test_a_manifest_of_brackets_and_one_that_is_no_file_are_refused(saved, tmp_path):
    (tmp_path / artifact.MANIFEST).write_text("[" * 100_000)
    assert "nested too deeply" in refused(tmp_path)
    (tmp_path / artifact.MANIFEST).unlink()
    os.mkfifo(tmp_path / artifact.MANIFEST)
    assert "not a regular file" in refused(tmp_path)


def test_files_that_are_too_large_are_not_read(saved, monkeypatch):
    monkeypatch.setattr(artifact, "MAX_BYTES", 1000)
    assert "more than 1000 bytes" in refused(saved / "logistic")


@pytest.mark.parametrize(
    ("notes", "message"),
    [
        ({"model": "llava"}, "notes cannot be saved: model='llava' should be a fingerprint"),
        ({"share": float("nan")}, "manifest cannot be written as JSON"),
        ({"tags": {"a", "b"}}, "manifest cannot be written as JSON"),
    ],
)
def test_notes_that_no_manifest_can_hold_are_refused(tmp_path, notes, message):
    detector = Detector(C=1.0).fit(*halves(token_table(60)))
    with pytest.raises(ArtefactError, match=message):
        detector.save(tmp_path / "detector", notes)
    assert not (tmp_path / "detector").exists()


def test_what_would_not_be_read_back_is_not_saved(saved, tmp_path, monkeypatch):
    """The older detector stays."""
    detector = Detector.load(saved / "logistic")
    detector.save(tmp_path / "d")
    before = {path.name: path.read_bytes() for path in (tmp_path / "d").iterdir()}
    detector.model.classifier.weights[0] = np.inf
    with pytest.raises(ArtefactError, match=r"'model\.weights' holds numbers that are not finite"):
        detector.save(tmp_path / "d")
    assert {path.name: path.read_bytes() for path in (tmp_path / "d").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_bad_detectors_among_runs_are_passed_over_with_a_warning_each(saved, tmp_path):
    fingerprint = {"name": "testbed"}
    Detector.load(saved / "logistic").save(tmp_path / "good" / "detector")
    bad = forge(saved / "boosting", tmp_path / "hostile" / "detector", put("model.feature", 2**40))
    os.utime(bad / artifact.MANIFEST, (2e9, 2e9))  # the newest
    (tmp_path / "broken" / "detector").mkdir(parents=True)
    (tmp_path / "broken" / "detector" / artifact.MANIFEST).write_text("{")
    with pytest.warns(UserWarning, match="skipped a detector") as caught:
        assert detectors_for_model(tmp_path, fingerprint) == [tmp_path / "good" / "detector"]
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 2
    assert all("\n" not in message for message in messages)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # those of other models are nobody's business
        (tmp_path / "broken" / "detector" / artifact.MANIFEST).unlink()
        assert detectors_for_model(tmp_path, {"name": "another"}) == []
