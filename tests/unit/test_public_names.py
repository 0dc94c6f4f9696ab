"""The public door: what ``dir`` shows, what a picture may be, what is printed, and how wrong types are refused."""

import io

import pytest

import stethoscope
from stethoscope import Detector, Evaluator, testbed
from stethoscope.core.errors import ConfigError, StethoscopeError
from stethoscope.detection.text_only import TextOnlyDetector
from stethoscope.relevancy import token_relevancy
from stethoscope.storage.run_dir import RunStore

QUESTION = "Is there a dog in the image?"


@pytest.fixture(scope="module")
def adapter():
    return stethoscope.load("testbed")


@pytest.fixture(scope="module")
def picture():
    return testbed.scenes(1)[0].image()


def test_dir_shows_the_public_names():
    assert dir(stethoscope) == sorted(stethoscope.__all__)


def test_a_picture_is_an_image_a_path_or_bytes(adapter, picture, tmp_path):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    (tmp_path / "scene.png").write_bytes(buffer.getvalue())
    expected = adapter.encode(picture, QUESTION).inputs["pixel_values"]
    for image in (buffer.getvalue(), tmp_path / "scene.png", str(tmp_path / "scene.png")):
        assert adapter.encode(image, QUESTION).inputs["pixel_values"].equal(expected)
        assert stethoscope.diagnose(adapter, image, QUESTION).image.tobytes() == picture.tobytes()
        *_, final = stethoscope.stream(adapter, image, QUESTION)
        assert final.answer.text == "No"


def test_reprs_are_short(adapter, picture):
    prompt = adapter.encode(picture, QUESTION)
    (answer,) = adapter.generate([prompt])
    assert repr(adapter) == "TestbedAdapter('testbed')"
    assert repr(prompt) == f"Encoded({QUESTION!r}, 79 tokens, 64 of them image)"
    assert repr(adapter.trace(prompt, answer)).startswith("Trace('No', logits, mass, ")
    relevancy = stethoscope.diagnose(adapter, picture, QUESTION).relevancy
    assert repr(relevancy) == "Relevancy(1 answer token, 64 image tokens)"
    assert repr(answer) == "Answer('No', 1 token)"
    assert repr(answer.until(0)) == "Answer('', 0 tokens, cut off)"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda adapter, picture: adapter.generate(adapter.encode(picture, QUESTION)), "list of prompts, [prompt]"),
        (lambda adapter, picture: adapter.generate(["a"]), "should be one as encode returns it, got str"),
        (lambda adapter, picture: adapter.generate([], 5), "should be a Generation(max_new_tokens=...), got int"),
        (lambda adapter, picture: token_relevancy(adapter, picture, QUESTION, 5), "answer should be a text or an"),
        (lambda adapter, picture: adapter.encode(picture, 5), "question should be a text, got int"),
        (lambda adapter, picture: adapter.encode(5, QUESTION), "a path or the bytes of a file, got int"),
        (lambda adapter, picture: adapter.encode("https://a.b/c.png", QUESTION), "nothing is fetched"),
        (lambda adapter, picture: stethoscope.diagnose("testbed", picture, QUESTION), "stethoscope.load('testbed')"),
        (lambda adapter, picture: stethoscope.diagnose(adapter, picture, QUESTION, answer=5), "answer should be"),
        (lambda adapter, picture: stethoscope.diagnose(adapter, picture, QUESTION, detector=5), "detector should be"),
        (lambda adapter, picture: stethoscope.stream("testbed", picture, QUESTION), "stethoscope.load('testbed')"),
    ],
)  # fmt: skip
def test_wrong_types_are_one_line(adapter, picture, call, words):
    with pytest.raises(StethoscopeError) as raised:
        call(adapter, picture)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: stethoscope.load(5), "hub id or a folder, got int"),
        (lambda: Detector.load(5), "folder should be a path (text or Path), got int"),
        (lambda: Detector.from_pretrained(None), "name should be a path"),
        (lambda: Detector().save(b"a"), "folder should be a path (text or Path), got bytes"),
        (lambda: Detector().push_to_hub(5), "(owner/name), got int"),
        (lambda: Detector().fit(5), "token table (pandas.DataFrame)"),
        (lambda: Detector(labels="few").fit([5]), "token table (pandas.DataFrame)"),
        (lambda: Detector.load(testbed.DETECTOR_DIR).predict([5]), "token table (pandas.DataFrame)"),
        (lambda: Detector.load(testbed.DETECTOR_DIR).recalibrate([5]), "token table (pandas.DataFrame)"),
        (lambda: Evaluator(run_dir=5), "run_dir should be a path"),
        (lambda: Evaluator(answers=5), "answers should be an AnswerLog"),
        (lambda: Evaluator(callbacks=5), "callbacks should be a list"),
        (lambda: Evaluator(loggers="csv"), "loggers should be a list"),
        (lambda: Evaluator(generation=5), "should be a Generation(max_new_tokens=...), got int"),
        (lambda: RunStore(5), "run_dir should be a path"),
        (lambda: TextOnlyDetector.load(5), "path should be a path"),
    ],
)  # fmt: skip
def test_wrong_types_without_a_model_are_one_line(call, words):
    with pytest.raises(ConfigError) as raised:
        call()
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("truth", 5, "truth should be a list"),
        ("truth", "dog", "truth should be a list"),
        ("mentions", 5, "mentions should be a list of Mention, got int"),
        ("mentions", ["dog"], "mentions should be a list of Mention, got str"),
        ("extraction", 5, "extraction should be coco"),
    ],
)
def test_wrong_types_of_what_is_known_are_one_line(adapter, picture, name, value, words):
    with pytest.raises(ConfigError, match=words):
        stethoscope.diagnose(adapter, picture, QUESTION, "A dog.", **{name: value})


def test_a_token_that_is_no_number_is_one_line(adapter, picture):
    diagnosis = stethoscope.diagnose(adapter, picture, QUESTION, "A dog.")
    with pytest.raises(ConfigError, match="token should be a whole number, got str"):
        diagnosis.picture("dog")
