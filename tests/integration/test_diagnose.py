"""``stethoscope diagnose``: what it prints and writes, and what it says of wrong input."""

import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

import stethoscope as package
from stethoscope import testbed
from stethoscope.commands.diagnose import answer_text
from stethoscope.core.errors import ConfigError
from stethoscope.core.text import percent
from stethoscope.core.token_table import unpack_vectors
from stethoscope.evaluation.evaluator import Evaluator
from stethoscope.features import FeatureSet
from stethoscope.storage.run_dir import RunStore
from stethoscope.tasks.chair import Chair


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Make a run directory with a detector that warns of every mention."""
    return run_with_detector(tmp_path_factory.mktemp("trained"), "attended_embedding")


@pytest.fixture(scope="module")
def without_backward_pass(tmp_path_factory):
    """Make the same with hidden states."""
    return run_with_detector(tmp_path_factory.mktemp("states"), "hidden_last_q")


def run_with_detector(folder, name):
    features = FeatureSet(groups=["uncertainty", "position"], names=[name])
    Evaluator(features=features, run_dir=folder, batch_size=24).run(package.load("testbed"), Chair(scenes=24))
    detector = package.Detector(C=0.1).fit(RunStore(folder).tokens("chair"))
    detector.threshold = 0.0
    detector.save(folder / "detector")
    return folder


def test_without_anything_it_looks_at_a_rendered_scene(stethoscope, tmp_path):
    out = stethoscope("diagnose", code=0)
    assert "testbed on counter-000001.png" in out
    assert "the truth: the picture shows clock, knife, surfboard" in out
    assert "  caught: " in out  # the first that a user sees: something is invented, and warned of
    assert "The image" in out
    assert "detector: the one that comes with the embedded model" in out
    assert "detector=none switches it off" in out
    assert re.search(r"warned of \d of \d mentions", out)
    folder = tmp_path / "runs" / "diagnose-testbed"
    data = json.loads((folder / "diagnosis.json").read_text())
    assert data["answer"].split()[0] in out
    maps = sorted(path.name for path in (folder / "heatmaps").iterdir())
    assert len(maps) == len({(named["tokens"][0], named["object"]) for named in data["mentions"]}) > 0
    for name in maps:
        assert Image.open(folder / "heatmaps" / name).width >= 480
    assert (folder / "report.html").read_text().startswith("<!DOCTYPE html>")


@pytest.mark.parametrize("run", ["trained", "without_backward_pass"])
def test_the_objects_in_the_picture_count_in_runs_diagnoses_and_streams_alike(run, request):
    folder = request.getfixturevalue(run)
    detector, adapter = package.Detector.load(folder / "detector"), package.load("testbed")
    assert "image_objects" in detector.inputs.explained_columns
    store = RunStore(folder)
    rows = detector.select_mentions(store.tokens("chair"))
    rows = rows[rows["sample_id"] == rows["sample_id"].iloc[0]]
    scene, question = testbed.scenes(1)[0].image(), next(store.records("chair")).question
    tokens = adapter.model.get_image_features(
        pixel_values=adapter.processor.image_processor([scene], return_tensors="pt")["pixel_values"]
    ).pooler_output[0]
    assert unpack_vectors(rows["image_tokens"].iloc[0]) == pytest.approx(tokens.detach().numpy(), rel=1e-3, abs=1e-3)
    expected = dict(zip(rows["token"], detector.predict(rows), strict=True))
    *_, last = package.stream(adapter, scene, question, final=detector)
    for mentions in (package.diagnose(adapter, scene, question, detector=detector).mentions, last.mentions):
        judged = {named.tokens[0]: named.verdict.probability for named in mentions}
        first = {token: probability for token, probability in judged.items() if token in expected}
        assert first == pytest.approx(expected, abs=1e-4)


def test_a_detector_that_reads_states_of_another_model_is_refused(trained, tmp_path):
    detector = package.Detector.load(trained / "detector")
    detector.notes["model"] = {"weights": "sha256:0", "model_id": "another"}
    adapter, scene = package.load("testbed"), testbed.scenes(1)[0].image()
    with pytest.raises(ConfigError, match="other weights than the model that the detector learns from, another"):
        package.diagnose(adapter, scene, "What is this?", detector=detector)
    with pytest.raises(ConfigError, match="attended_embedding are states"):
        list(package.stream(adapter, scene, "What is this?", final=detector))
    own = package.Detector(visual_consistency=False, C=0.1).fit(RunStore(trained).tokens("chair"))
    own.notes["model"] = detector.notes["model"]  # other features may be tried elsewhere
    package.diagnose(adapter, scene, "What is this?", detector=own)


def test_a_picture_with_a_detector_and_hostile_words(stethoscope, tmp_path, trained):
    Image.new("RGB", (120, 80), "teal").save(tmp_path / "my photo, (1).png")
    text = "A [red]dog[/red], <script>alert('x')</script> and ${a} \x1b[31m cat: it's {1}."
    words = [
        "image=my photo, (1).png",
        "question=What's this, a dog?",
        f"answer={text}",
        f"detector={trained}",
        "out=o",
    ]
    out = stethoscope("diagnose", *words, code=0)
    assert "\x1b" not in out  # no terminal, no colour, and none of the model's own
    data = json.loads((tmp_path / "o" / "diagnosis.json").read_text())
    assert data["question"] == "What's this, a dog?"
    assert [named["object"] for named in data["mentions"]] == ["dog", "cat"]
    assert data["warned"] == ["dog", "cat"]
    state = {"shifted": "(not calibrated)", "unknown": "(score)"}[data["calibration"]]
    for named in data["mentions"]:
        assert f"{named['object']} [{percent(named['probability'])}]" in out
        assert f"{named['object']}: {percent(named['probability'])} {state}, evidence {named['evidence']:+.2f}" in out
        looks = ", ".join(
            f"{evidence['object'] or 'nothing known'} {percent(evidence['probability'])}"
            for evidence in named["visual_evidence"]
            if evidence["probability"] >= 0.005
        )
        assert f"{named['object']}: looks like {looks}" in out
    assert "no object detector" in out
    assert "features: " in out
    assert "picture: " in out
    assert f"detector: that of the run {trained.name}" in out
    assert "<script>alert" not in (tmp_path / "o" / "report.html").read_text()
    stethoscope("diagnose", *words, "answer=Nothing here.", code=0)
    assert not list((tmp_path / "o" / "heatmaps").iterdir())  # none is left of the answer before


def test_colours_are_for_terminals(trained):
    image = testbed.scenes(1)[0].image()
    adapter, detector = package.load("testbed"), package.Detector.load(trained / "detector")
    for diagnosis in (
        package.diagnose(adapter, image, "What is there?", answer="A dog on a tree."),
        package.diagnose(adapter, image, "What is there?", answer="A dog on a tree.", detector=detector),
    ):
        shown = {}
        for terminal, colours in ((True, "truecolor"), (False, "auto")):
            console = Console(file=io.StringIO(), force_terminal=terminal, color_system=colours, width=100)
            console.print(answer_text(diagnosis))
            shown[terminal] = console.file.getvalue()
        assert "\x1b[" in shown[True]
        assert "\x1b[" not in shown[False]
        assert re.sub(r" \[[\d.]+\xa0%\]", "", shown[False]) == "A dog on a tree.\n"


@pytest.mark.parametrize("off", ["detector=none", "detector=null"])
def test_the_detector_can_be_switched_off(stethoscope, off):
    out = stethoscope("diagnose", off, "answer=a dog", code=0)
    assert "The detector is switched off, so there are no warnings." in out
    assert "warned of" not in out


def test_an_altered_model_has_no_detector(stethoscope):
    out = stethoscope("diagnose", "model.random_init=tiny", "answer=a dog", code=0)
    assert "No detector of this model was found" in out
    assert "stethoscope benchmark model=testbed" in out
    assert "warned of" not in out


def test_another_model_and_the_other_scope(stethoscope, tmp_path):
    words = ["model=smolvlm-2.2b", "model.random_init=tiny", "answer=a dog", "scope=token", "out=o"]
    assert "stethoscope benchmark model=smolvlm-2.2b" in stethoscope("diagnose", *words, code=0)
    assert (tmp_path / "o" / "heatmaps").is_dir()
    assert len(json.loads((tmp_path / "o" / "diagnosis.json").read_text())["grids"]) > 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["image=nowhere.png"], "image 'nowhere.png' is missing"),
        (["question="], "question is empty"),
        (["question= "], "question is empty"),
        (["answer="], "the answer is empty"),
        (["detector=nowhere"], "detector=nowhere is no directory"),
        (["detector=."], "no detector"),
        (["scope=rows"], "scope='rows' should be row or token"),
        (["extraction=os.system"], "'os.system' is outside the packages that may be used"),
        (["extraction=stethoscope.tasks.chair.nothing"], "cannot be imported"),
        (["model=testbet"], "did you mean 'testbed'?"),
        (["imagee=a.png"], "did you mean 'image'?"),
        (["out=file/inside", "answer="], "out=file/inside cannot be written to"),  # before the model is asked
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_wrong_input_is_one_line(stethoscope, tmp_path, words, message):
    (tmp_path / "file").write_text("")
    assert message in stethoscope("diagnose", *words)


def test_a_further_turn_goes_on_from_the_last(stethoscope, tmp_path):
    """By the file of the last turn or by a list of pairs; a model of one turn says so."""
    several = ("+model.follow_up='</s>USER: {question} ASSISTANT:'", "model.device=cpu", "detector=none")
    question = "Is there a dog in the image?"
    stethoscope("diagnose", *several, f"question={question}", "out=one", code=0)
    output = stethoscope("diagnose", *several, "history=one/diagnosis.json", "out=two", code=0)
    assert "Please describe this image in detail. (turn 2)" in output
    first, second = (json.loads(Path(f"{name}/diagnosis.json").read_text()) for name in ("one", "two"))
    assert second["history"] == [[question, first["answer"]]]
    Path("turns.json").write_text(json.dumps([*second["history"], {"question": "Where?", "answer": "Here."}]))
    stethoscope("diagnose", *several, "history=turns.json", "out=three", code=0)
    assert json.loads(Path("three/diagnosis.json").read_text())["history"][1] == ["Where?", "Here."]
    assert "testbed is asked one question at a time" in stethoscope("diagnose", "history=turns.json")
    for content, message in {
        "[": "is damaged",
        '"no"': "history should be a list of earlier turns",
        '[["a"]]': "turn 1 of the history should be a pair",
        '{"question": "a"}': "the answer of turn 1 of the history should be a text, got NoneType",
    }.items():
        Path("turns.json").write_text(content)
        assert message in stethoscope("diagnose", "history=turns.json")


def test_a_picture_that_is_none(stethoscope, tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    assert "a.png cannot be read" in stethoscope("diagnose", "image=a.png")


def test_a_detector_of_another_model(stethoscope, tmp_path):
    features = FeatureSet(groups=["attention"])
    Evaluator(features=features, run_dir=tmp_path / "run", batch_size=24).run(package.load("testbed"), Chair(scenes=16))
    package.Detector(C=0.1).fit(RunStore(tmp_path / "run").tokens("chair")).save(tmp_path / "run" / "detector")
    line = stethoscope("diagnose", "model=qwen2-vl-2b", "model.random_init=tiny", "answer=a dog", "detector=run")
    assert "the detector reads features that" in line
    assert "it was trained on another model (missing: attn_" in line
