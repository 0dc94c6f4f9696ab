"""Methods against hallucinations in one table, on a few scenes of the embedded model."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers.token_tables import token_table

from stethoscope.detection.detector import Detector
from stethoscope.testbed import DETECTOR_DIR

RUN = ["mitigate", "methods=[none,drop]", "chair.scenes=12", "pope.scenes=2", "callbacks=none", "name=all"]


def test_methods_are_compared_and_resumed(stethoscope, tmp_path):
    words = [*RUN, "stop=[16]", "brief=Describe this image briefly.", "temperatures=[0.5]"]
    printed = stethoscope(*words, code=0)
    folder = tmp_path / "runs" / "all"
    methods = {item["name"]: item for item in json.loads((folder / "mitigation.json").read_text())["methods"]}
    assert list(methods) == ["greedy", "drop", "temperature 0.5", "brief", "stop at 16"]
    greedy, dropped, stopped = methods["greedy"], methods["drop"], methods["stop at 16"]
    recorded = {
        row["metric"]: row["value"]
        for row in json.loads((folder / "none" / "metrics.json").read_text())["chair"]["metrics"]
    }
    for name in ("chair_i", "chair_s", "recall", "length"):
        assert greedy["metrics"][name]["value"] == pytest.approx(recorded[name])
    assert dropped["metrics"]["chair_i"]["value"] < greedy["metrics"]["chair_i"]["value"]
    assert dropped["differences"]["chair_i"]["high"] < 0
    assert dropped["differences"]["front"]["value"] > 0
    assert stopped["metrics"]["length"]["value"] <= 16
    assert stopped["metrics"]["recall"]["value"] < greedy["metrics"]["recall"]["value"]
    assert set(greedy["replies"]) == {"accuracy", "f1", "yes_rate", "tpr", "tnr"}
    assert methods["brief"]["replies"] == {}
    assert greedy["passes_per_token"] == 1
    assert 1 < dropped["passes_per_token"] < 2  # the detector's passes, and those that read what was edited
    assert greedy["seconds_per_answer"] > 0
    assert greedy["peak_memory"] > 2**20
    assert greedy["detector"]["auroc"]["value"] > 0.8
    assert greedy["chair_i_at_common_length"]["fitted"]["low"] is not None
    assert methods["temperature 0.5"]["metrics"]["length"]["value"] != greedy["metrics"]["length"]["value"]
    assert methods["temperature 0.5"]["trivial"]
    assert (folder / "frontier.svg").read_text().startswith("<svg")
    assert "against greedy" in printed
    assert "against greedy" in (folder / "mitigation.md").read_text()
    # the same command asks nothing again
    before = (folder / "mitigation.json").read_bytes()
    samples = folder / "drop" / "samples.jsonl"
    lines = samples.read_text().splitlines()
    stethoscope(*words, code=0)
    assert samples.read_text().splitlines() == lines
    assert (folder / "mitigation.json").read_bytes() == before
    assert "other settings" in stethoscope(*words, "mitigation.drop.threshold=0.9")
    stethoscope("compare", folder / "none", folder / "drop", code=0)


@pytest.mark.slow
def test_images_of_the_detector_are_left_out(stethoscope, finished, tmp_path):
    folds = {}
    for line in (finished / "greedy" / "warnings.jsonl").read_text().splitlines():
        folds.setdefault(json.loads(line)["fold"], set()).add(json.loads(line)["group"])
    words = ["methods=[none,drop]", "chair.scenes=60", "stop=[]", "temperatures=[]", "brief=null", "~task@pope"]
    words += ["callbacks=none", "name=held"]
    printed = stethoscope("mitigate", *words, f"detector={finished / 'greedy'}", code=0)
    fitted = len(folds["train"] | folds["calibration"])
    assert f"{fitted} images that a detector was fitted on are left out." in printed
    content = json.loads((tmp_path / "runs" / "held" / "mitigation.json").read_text())["methods"]
    assert content[0]["metrics"]["chair_i"]["groups"] == 60 - fitted
    assert content[0]["replies"] == {}


def test_a_detector_of_all_images_is_refused(stethoscope, copy):
    lines = [json.loads(line) for line in (copy / "warnings.jsonl").read_text().splitlines()]
    (copy / "warnings.jsonl").write_text("".join(json.dumps({**line, "fold": "train"}) + "\n" for line in lines))
    words = ["methods=[none,drop]", "chair.scenes=2", "~task@pope", "callbacks=none", "name=few"]
    message = stethoscope("mitigate", *words, f"detector={copy}")
    assert "the detector was fitted on every image of chair" in message


TINY = ["mitigate", "model=hf", "model.random_init=tiny", "chair.scenes=2", "~task@pope", "callbacks=none", "name=tiny"]


def test_a_detector_of_another_model_is_refused_before_a_method_begins(stethoscope, tmp_path):
    message = stethoscope(*TINY, "methods=[none,cut]", f"detector={DETECTOR_DIR}")
    assert "tiny-llava has other weights than the model that the detector learns from" in message
    assert not (tmp_path / "runs").exists()


def test_features_that_the_model_does_not_have_are_refused_before_a_method_begins(stethoscope, tmp_path):
    """Of a model of ten layers; the tiny one has fewer."""
    table = token_table(images=60)
    deep = {f"attn_image_l{layer:02d}": np.float32(layer) + table["mass"] for layer in range(10)}
    Detector(calibration="none").fit(table.drop(columns=["noise", "mass"]).assign(**deep)).save(tmp_path / "deep")
    message = stethoscope(*TINY, "methods=[none,drop]", f"detector={tmp_path / 'deep'}")
    assert message.startswith("stethoscope: tiny-llava lacks 7 columns")
    assert "a column of one layer means the same only in a model of the same depth" in message
    assert not (tmp_path / "runs").exists()


def test_a_promise_that_cannot_be_given_is_refused_before_a_method_begins(stethoscope, tmp_path):
    words = ["methods=[none,promise]", "chair.scenes=2", "~task@pope", "callbacks=none", "name=promised"]
    assert "belongs to no run that has them" in stethoscope("mitigate", *words)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_comparison_killed_within_a_method_ends_with_the_same_table(tmp_path):
    words = [sys.executable, "-m", "stethoscope", "mitigate", "methods=[none,drop]", "chair.scenes=48", "batch_size=8"]
    words += ["~task@pope", "brief=null", "temperatures=[]", "stop=[8]", "callbacks=none", "logger=none"]

    def start(name):
        return subprocess.Popen([*words, f"name={name}"], cwd=tmp_path, stdout=subprocess.DEVNULL)

    def compared(name):
        rows = json.loads((tmp_path / "runs" / name / "mitigation.json").read_text())["methods"]
        passes = [row.pop("passes_per_token") for row in rows]
        return passes, [{**row, "seconds_per_answer": None, "peak_memory": None} for row in rows]

    whole = start("whole")
    cut, samples = start("cut"), tmp_path / "runs" / "cut" / "drop" / "samples.jsonl"
    while cut.poll() is None and not (samples.is_file() and samples.read_text().count("\n") >= 16):
        time.sleep(0.02)
    cut.send_signal(signal.SIGKILL)
    assert cut.wait() == -signal.SIGKILL
    assert 16 <= samples.read_text().count("\n") < 48
    assert not (tmp_path / "runs" / "cut" / "mitigation.json").exists()
    assert start("cut").wait() == whole.wait() == 0
    (whole_passes, whole_rows), (passes, rows) = compared("whole"), compared("cut")
    assert rows == whole_rows
    assert passes == pytest.approx(
        whole_passes, rel=0.05
    )  # of a batch that was killed between two files none are known
