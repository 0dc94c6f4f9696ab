"""What a user can get wrong: one line on stderr that says what would be right, exit code 2, no traceback."""

import json

import pytest
from PIL import Image


@pytest.fixture
def pope(tmp_path):
    """A folder with one question file about one image, and the words that choose it."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (96, 96)).save(tmp_path / "images" / "a.png")
    asked = {"question_id": 1, "image": "a.png", "text": "Is there a dog in the image?", "label": "no"}
    (tmp_path / "coco_pope_random.json").write_text(json.dumps(asked) + "\n")
    words = ["model.random_init=tiny", "task=pope", "task.source=files", "task.subsets=[random]", "logger=none"]
    return tmp_path, [*words, f"task.questions={tmp_path}", f"task.images={tmp_path / 'images'}"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluat"], "unknown command 'evaluat'; did you mean 'evaluate'?"),
        (["evaluate", "model=testbet"], "unknown model 'testbet'; did you mean 'testbed'?"),
        (["evaluate", "task=poppe"], "unknown task 'poppe'; did you mean 'pope'?"),
        (["benchmark", "detector=logistics"], "unknown detector 'logistics'; did you mean 'logistic'?"),
        (["evaluate", "bach_size=3"], "unknown setting 'bach_size'; did you mean 'batch_size'?"),
        (["extract", "run=.", "logger=none"], "unknown setting 'logger'. There are: callbacks, features"),
        (["evaluate", "task.parzer=strict"], "unknown setting of task 'parzer'; did you mean 'parser'?"),
        (["evaluate", "task.parser=offical"], "unknown parser of pope 'offical'; did you mean 'official'?"),
        (["evaluate", "batch_size=0"], "batch_size=0 should be at least 1"),
        (["evaluate", "on_error=explode"], "unknown on_error 'explode'"),
        (["evaluate", "model._target_=os.system"], "'os.system' is outside the packages that may be instantiated"),
        (["evaluate", "model=hf"], "model_id"),
        (["extract"], "run must be given"),
        (["train", "run=nowhere"], "run=nowhere is no directory"),
        (["extract", "run=nowhere"], "nowhere is not a run directory"),
        (["benchmark", "split.train=0.9"], "split.train=0.9 and split.calibration=0.2"),
        (["list", "modl"], "unknown group 'modl'; did you mean 'model'?"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_names_and_settings(words, message, stethoscope):
    assert message in stethoscope(*words)


def test_good_input_for_comparison(pope, stethoscope):
    _, words = pope
    assert "1 ok, 0 unparsed, 0 failed" in stethoscope("evaluate", *words, code=0)


def test_missing_image(pope, stethoscope):
    folder, words = pope
    (folder / "images" / "a.png").rename(folder / "images" / "b.png")
    line = stethoscope("evaluate", *words)
    assert "a.png" in line
    assert "coco_pope_random.json" in line


def test_corrupt_image(pope, stethoscope):
    folder, words = pope
    whole = (folder / "images" / "a.png").read_bytes()
    (folder / "images" / "a.png").write_bytes(whole[: len(whole) // 2])
    assert "a.png cannot be read" in stethoscope("evaluate", *words)


def test_one_corrupt_image_of_two_loses_nothing_else(pope, stethoscope):
    """The run goes on; the line names the sample, and its mended file is all that the next run asks about."""
    folder, words = pope
    Image.new("RGB", (96, 96)).save(folder / "images" / "b.png")
    (folder / "images" / "a.png").write_bytes(b"this is no image")
    file = folder / "coco_pope_random.json"
    second = {"question_id": 2, "image": "b.png", "text": "Is there a cat in the image?", "label": "yes"}
    file.write_text(file.read_text() + json.dumps(second) + "\n")
    line = stethoscope("evaluate", *words)
    assert "1 of 2 samples failed" in line
    assert "a.png cannot be read" in line
    Image.new("RGB", (96, 96)).save(folder / "images" / "a.png")
    assert "2 ok, 0 unparsed, 0 failed" in stethoscope("evaluate", *words, code=0)


def test_empty_image_folder(pope, stethoscope):
    folder, words = pope
    (folder / "images" / "a.png").unlink()
    assert "images" in stethoscope("evaluate", *words)


def test_broken_line(pope, stethoscope):
    folder, words = pope
    file = folder / "coco_pope_random.json"
    file.write_text(file.read_text() + "{'question_id': 2\n")
    assert "coco_pope_random.json, line 2: not JSON" in stethoscope("evaluate", *words)


def test_another_setting_in_the_same_run_directory(pope, stethoscope):
    _, words = pope
    stethoscope("evaluate", *words, "name=one", code=0)
    line = stethoscope("evaluate", *words, "name=one", "task.parser=strict")
    assert "parser" in line
    assert "overwrite=true" in line
