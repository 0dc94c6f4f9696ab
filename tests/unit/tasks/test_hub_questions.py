"""Data sets described by configuration: columns of H-POPE, HumbleBench and CRPE on made-up Parquet folders."""

import numpy as np
import pytest
import yaml
from helpers.by_hand import figures, reply
from helpers.parquet_folder import write_split

from stethoscope.core.component import build, conf_folder
from stethoscope.core.errors import ConfigError, DataError
from stethoscope.tasks.base import Task
from stethoscope.tasks.hub_questions import HubChoice, HubYesNo

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def pictures(images):
    """The bytes of a.png, a.png and b.png."""
    return [(images / name).read_bytes() for name in ("a.png", "a.png", "b.png")]


H_POPE = [
    {"image_id": 139, "question_id": "139-0", "question": "Is there a left dog in the image?", "attribute": "left"}
    | {"object": "dog", "answer": "Yes", "label": 1, "variant": "positive"},
    {"image_id": 139, "question_id": "139-1", "question": "Is there a right dog in the image?", "attribute": "right"}
    | {"object": "dog", "answer": "No", "label": 0, "variant": "negative"},
    {"image_id": 785, "question_id": "785-0", "question": "Is there a large cat in the image?", "attribute": "large"}
    | {"object": "cat", "answer": "No", "label": 0, "variant": "negative"},
]
HUMBLE = [
    {"question": "What is it?\nA. dog\nB. cat\nC. cow\nD. fox\nE. None of the above", "label": "A", "type": "Object"},
    {
        "question": "What colour?\nA. red\nB. blue\nC. green\nD. grey\nE. None of the above",
        "label": "E",
        "type": "Attr",
    },
    {"question": "Where?\nA. left\nB. right\nC. above\nD. below\nE. None of the above", "label": "B", "type": "Attr"},
]
CRPE = [
    {"id": 7, "text": "What is on the mat?", "choices": ["a dog", "a cat"], "correct": "(b)", "kind": "exist"},
    {"id": 8, "text": "What is on the mat?", "choices": ["a cat", "a dog"], "correct": "(a)", "kind": "exist"},
    {"id": 9, "text": "Who holds it?", "choices": ["a man", "a girl", "a boy"], "correct": "(c)", "kind": "subject"},
]


def from_yaml(name, **settings):
    config = yaml.safe_load((conf_folder() / "task" / f"{name}.yaml").read_text())
    base, _ = config.pop("defaults")
    base = yaml.safe_load((conf_folder() / "task" / f"{base}.yaml").read_text())
    return build({**base, **config, **settings}, Task, "task")


def test_h_pope_is_configuration_alone(tmp_path, pictures):
    folder = write_split(tmp_path / "hub", H_POPE, pictures, "data-00000-of-00001")
    task = from_yaml("h_pope", dataset=str(folder))
    task.setup()
    first, second, third = task.samples()
    assert (first.id, first.group, first.subset, first.question) == ("139-0", "139", "positive", H_POPE[0]["question"])
    assert first.reference == {"label": "yes", "object": "dog"}
    assert (second.group, third.group) == ("139", "785")
    assert third.image.load().getpixel((0, 0)) == (0, 0, 255)
    values = figures(task, {"139-0": "Yes", "139-1": "Yes, there is.", "785-0": "No"})
    assert values["accuracy", "all"] == pytest.approx(2 / 3)
    assert values["balanced_accuracy", "all"] == pytest.approx(0.75)
    assert (values["tpr", "all"], values["tnr", "all"], values["f1", "all"]) == pytest.approx((1, 0.5, 2 / 3))
    assert values["accuracy", "negative"] == 0.5
    assert np.isnan(values["tnr", "positive"])
    (mention,) = task.mentions(second, reply("Yes"))
    assert (mention.object, mention.label) == ("dog", 1)
    assert task.notes(task.samples()) == ["Replies are read by the parser 'official'."]


def test_labels_of_numbers_and_another_subset(tmp_path, pictures):
    folder = write_split(tmp_path / "hub", H_POPE, pictures, "train")
    settings = dict(label="label", positive="1", negative="0", subset="attribute", split="train")
    task = HubYesNo(dataset=str(folder), **settings)
    task.setup()
    assert [sample.reference["label"] for sample in task.samples()] == ["yes", "no", "no"]
    assert [sample.subset for sample in task.samples()] == ["left", "right", "large"]
    assert [sample.id for sample in task.samples()] == ["0", "1", "2"]
    groups = [sample.group for sample in task.samples()]
    assert groups[0] == groups[1] != groups[2]  # the same bytes are the same picture


def test_letters_of_options_inside_the_question(tmp_path, pictures):
    folder = write_split(tmp_path / "hub", HUMBLE, pictures, "data/train-00000-of-00001")
    task = HubChoice(dataset=str(folder), split="train", subset="type", suffix="\nOnly the letter.")
    task.setup()
    assert task.samples()[0].question == HUMBLE[0]["question"] + "\nOnly the letter."
    values = figures(task, {"0": "A", "1": "(e)", "2": "It is one of them"})
    assert values["accuracy", "all"] == 1.0
    assert values["accuracy_published", "all"] == pytest.approx(2 / 3)
    assert values["accuracy_published", "Attr"] == 0.5
    assert values["chose_A", "all"] == values["chose_E", "all"] == 0.5
    assert task.score(task.samples()[2], reply("It is one of them")).status == "unparsed"
    (mention,) = task.mentions(task.samples()[0], reply("Choice b."))
    assert (mention.start, mention.end, mention.object, mention.label) == (7, 8, "unknown", 1)


def test_a_list_of_options_and_columns_of_other_names(tmp_path, pictures):
    folder = write_split(tmp_path / "hub", CRPE, pictures, "exist/test", image="picture")
    task = HubChoice(
        dataset=str(folder), folder="exist", image="picture", question="text", label="correct", options="choices",
        subset="kind", id="id", letters="ABCD", parser="leading_letter",
    )  # fmt: skip
    task.setup()
    assert task.samples()[0].question == "What is on the mat?\nA. a dog\nB. a cat"
    assert [sample.reference["label"] for sample in task.samples()] == ["B", "A", "C"]
    values = figures(task, {"7": "B. a cat", "8": "B", "9": "It is a boy."})
    assert values["accuracy", "all"] == pytest.approx(2 / 3)
    assert values["accuracy", "exist"] == 0.5
    assert values["chose_D", "all"] == 0
    (mention,) = task.mentions(task.samples()[1], reply("B"))
    assert (mention.object, mention.label) == ("a dog", 1)


def test_a_column_for_every_option_and_the_right_ones_text(tmp_path, pictures):
    rows = [{"question": "What?", "A": "dog", "B": "cat", "C": None, "answer": text} for text in ("cat", "dog", "1")]
    folder = write_split(tmp_path / "hub", rows, pictures, "test")
    task = HubChoice(dataset=str(folder), label="answer", options=["A", "B", "C"])
    task.setup()
    assert [sample.reference["label"] for sample in task.samples()] == ["B", "A", "B"]


@pytest.mark.parametrize("label", [2, "2"])
def test_a_number_that_is_an_options_text_too_is_refused(tmp_path, pictures, label):
    rows = 3 * [{"question": "How many?", "A": "1", "B": "2", "C": "3", "answer": label}]
    folder = write_split(tmp_path / "hub", rows, pictures, "test")
    with pytest.raises(DataError, match=r"answer '?2'? is the text of option B and the number of option C"):
        HubChoice(dataset=str(folder), label="answer", options=["A", "B", "C"]).setup()


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ({"label": "F"}, {}, "row 1: label 'F' should be one of the letters ABCDE"),
        ({"question": " "}, {}, "row 1: ' ' is no question"),
        ({"type": None}, {"subset": "type"}, "row 1: type None is no subset"),
        ({}, {"options": "label"}, "row 0: label 'A' is no list of options"),
        ({}, {"options": ["type"]}, "row 0: 1 options"),
        ({}, {"id": "label", "label": "label"}, "id A is used before"),
        ({}, {"question": "text"}, "has no column 'text'"),
        ({}, {"folder": ".."}, "is no folder in it"),
        ({}, {"image": "question"}, "is not in"),
    ],
    ids=str,
)
def test_broken_rows_are_named(tmp_path, pictures, rows, settings, message):
    table = [HUMBLE[0], {**HUMBLE[1], **rows}, {**HUMBLE[2], "label": "A"}]
    folder = write_split(tmp_path / "hub", table, pictures, "test")
    with pytest.raises(DataError) as error:
        HubChoice(dataset=str(folder), **settings).setup()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_label_that_is_neither_positive_nor_negative(tmp_path, pictures):
    folder = write_split(tmp_path / "hub", H_POPE, pictures, "test")
    with pytest.raises(DataError, match="row 0: variant 'positive' is neither 'yes' nor 'no'"):
        HubYesNo(dataset=str(folder), label="variant").setup()


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (HubYesNo, {"dataset": None}, "needs task.dataset"),
        (HubYesNo, {"label": ""}, "needs task.label"),
        (HubYesNo, {"parser": "stricd"}, "did you mean 'strict'"),
        (HubYesNo, {"positive": "NO"}, "should differ"),
        (HubYesNo, {"name": "a b"}, "letters, digits"),
        (HubChoice, {"letters": "A"}, "letters of the options"),
        (HubChoice, {"letters": "12"}, "letters of the options"),
        (HubChoice, {"max_new_tokens": 0}, "at least 1"),
    ],
    ids=str,
)
def test_wrong_settings_are_found_at_construction(kind, settings, message):
    with pytest.raises(ConfigError, match=message):
        kind(**{"dataset": "owner/name", **settings})
