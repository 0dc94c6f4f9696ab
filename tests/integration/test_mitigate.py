"""Methods against hallucinations in one table, on a few scenes of the embedded model."""

import json

import pytest

RUN = ["mitigate", "methods=[none,cut,drop]", "chair.scenes=20", "pope.scenes=4", "callbacks=none", "name=all"]


def test_methods_are_compared_and_resumed(stethoscope, tmp_path):
    words = [*RUN, "stop=[8,16]", "brief=Describe this image briefly.", "temperatures=[0.5]"]
    printed = stethoscope(*words, code=0)
    folder = tmp_path / "runs" / "all"
    methods = {item["name"]: item for item in json.loads((folder / "mitigation.json").read_text())["methods"]}
    assert list(methods) == ["greedy", "cut", "drop", "temperature 0.5", "brief", "stop at 8", "stop at 16"]
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
