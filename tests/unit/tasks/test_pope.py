"""POPE: samples, scores by hand, mentions, and what is said of broken input."""

import json

import numpy as np
import pytest
from helpers.by_hand import QUESTIONS, reply

from stethoscope.core.errors import ConfigError, DataError
from stethoscope.tasks.pope import Pope
from stethoscope.tasks.questions import asked_object

FILES = {"source": "files", "questions": "pope", "images": "val2014"}


@pytest.fixture
def task(pope_folder, images):
    task = Pope(source="files", questions=str(pope_folder), images=str(images), parser="first_word")
    task.setup()
    return task


def totals(task, answers):
    scores = [task.score(sample, reply(text)) for sample, text in answers]
    return {key: np.array(sum(score.counts[key] for score in scores)) for key in scores[0].counts}


def test_samples_of_the_published_files(task):
    samples = task.samples()
    assert [sample.id for sample in samples[:4]] == ["random-1", "random-2", "random-3", "popular-1"]
    assert len({sample.id for sample in samples}) == 9
    assert samples[2].reference == {"label": "yes", "object": "apple"}
    assert samples[1].reference == {"label": "no", "object": "fire hydrant"}
    assert {sample.group for sample in samples} == {"a", "b"}
    assert {sample.subset for sample in samples} == {"random", "popular", "adversarial"}
    assert samples[0].image.load().getpixel((0, 0)) == (255, 0, 0)


def test_suffix_and_choice_of_subsets(pope_folder, images):
    task = Pope("files", subsets=["popular"], suffix=" Yes or no?", questions=str(pope_folder), images=str(images))
    task.setup()
    assert [sample.id for sample in task.samples()] == ["popular-1", "popular-2", "popular-3"]
    assert task.samples()[0].question == "Is there a dog in the image? Yes or no?"


def test_the_suffix_of_lmms_eval_has_a_name(pope_folder, images):
    task = Pope("files", subsets=["popular"], suffix="lmms_eval", questions=str(pope_folder), images=str(images))
    task.setup()
    question = task.samples()[0].question
    assert question == "Is there a dog in the image?\nAnswer the question using a single word or phrase."


def test_metrics_by_hand(task):
    yes, no, also_yes = task.samples()[:3]
    answers = [(yes, "Yes")] * 6 + [(yes, "No")] * 2 + [(no, "yes")] * 3 + [(no, "no")] * 5 + [(also_yes, "Hm")] * 4
    values = {name: float(metric(totals(task, answers))) for name, metric in task.metrics().items()}
    shares = {"accuracy": 11 / 16, "precision": 6 / 9, "recall": 6 / 8, "f1": 12 / 17, "yes_rate": 9 / 16}
    assert values == pytest.approx({**shares, "tpr": 6 / 8, "tnr": 5 / 8, "balanced_accuracy": 11 / 16})
    assert task.macro == ("accuracy", "f1")


def test_metrics_are_element_wise_and_nan_where_undefined(task):
    counts = {"tp": np.array([2, 0]), "fp": np.array([2, 0]), "tn": np.array([4, 0]), "fn": np.array([0, 0])}
    for name, expected in {"accuracy": 0.75, "precision": 0.5, "recall": 1.0, "f1": 2 / 3, "yes_rate": 0.5}.items():
        value = task.metrics()[name](counts)
        assert value[0] == pytest.approx(expected)
        assert np.isnan(value[1])


def test_an_answer_that_cannot_be_read_counts_nothing(task):
    score = task.score(task.samples()[0], reply("Perhaps"))
    assert score.status == "unparsed"
    assert set(score.counts.values()) == {0.0}


def test_mention_is_the_word_yes(task):
    there, absent = task.samples()[:2]
    (mention,) = task.mentions(absent, reply('"Yes", I think.'))
    assert (mention.start, mention.end, mention.object, mention.label, mention.mention_index, mention.repeat_index) == (
        1,
        4,
        "fire hydrant",
        1,
        0,
        0,
    )
    assert task.mentions(there, reply("yes"))[0].label == 0
    assert task.mentions(there, reply("No")) == ()
    assert task.mentions(there, reply("")) == ()


def test_official_parser_marks_the_first_word_of_a_yes_without_yes(pope_folder, images):
    task = Pope("files", questions=str(pope_folder), images=str(images))
    task.setup()
    (mention,) = task.mentions(task.samples()[1], reply("There is."))
    assert (mention.start, mention.end, mention.label) == (0, 5, 1)


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("Is there an apple in the image?", "apple"),
        ("Is there a dining table in this picture?", "dining table"),
        ("Are there any dogs?", "dogs"),
        ("What is this?", "unknown"),
    ],
)
def test_object_that_is_asked_about(question, expected):
    assert asked_object(question) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "file"}, "did you mean 'files'"),
        ({"parser": "stricd"}, "did you mean 'strict'"),
        ({"subsets": ["randon"]}, "did you mean 'random'"),
        ({"subsets": []}, "should be a list"),
        ({"subsets": "random"}, "should be a list"),
        ({"source": "files"}, "needs task.questions"),
        ({"scenes": 0}, "at least 1"),
        ({"filename": "pope.json"}, "{subset}"),
        ({"labels": "repop"}, "did you mean 'repope'"),
        ({"labels": "both"}, "labels of rendered scenes are exact"),
        ({"labels": "repope", "source": "hub"}, "needs task.repope"),
        ({"origins": ["gqa"]}, "needs task.source=files"),
        ({"origins": "gqa"}, "should be a list"),
        ({**FILES, "origins": ["coco", "gqa"], "filename": "{subset}.json"}, "should contain {origin}"),
        ({**FILES, "origins": ["coco", "gqa"], "images": {"coco": "val2014"}}, "no folder for gqa"),
        ({"name": "my pope"}, "letters, digits"),
    ],
    ids=str,
)
def test_wrong_settings_are_found_at_construction(arguments, message):
    with pytest.raises(ConfigError) as error:
        Pope(**arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


BROKEN = {
    "broken line": ('{"question_id": 2, "image": ', "line 2: not JSON"),
    "no object": ("[1, 2]", "line 2: a JSON object was expected"),
    "missing key": (json.dumps({"question_id": 2, "image": "a.png", "text": "?"}), "line 2: key 'label' is missing"),
    "label": (json.dumps({**QUESTIONS[1], "label": "maybe"}), "line 2: label 'maybe' is neither yes nor no"),
    "same id": (json.dumps(QUESTIONS[0]), "line 2: question_id 1 is used before"),
    "missing image": (json.dumps({**QUESTIONS[1], "image": "z.png"}), "line 2: image 'z.png' is not in"),
    "no question": (json.dumps({**QUESTIONS[1], "text": " "}), "line 2: ' ' is no question"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_named_with_their_line(case, pope_folder, images):
    line, message = BROKEN[case]
    path = pope_folder / "coco_pope_popular.json"
    path.write_text(json.dumps(QUESTIONS[0]) + "\n" + line + "\n")
    task = Pope("files", questions=str(pope_folder), images=str(images))
    with pytest.raises(DataError) as error:
        task.setup()
    assert f"{path}, {message}" in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_and_empty_files_and_folders(pope_folder, images, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = [
        (pope_folder, tmp_path / "nowhere", "nowhere does not exist"),
        (pope_folder, empty, "holds no image"),
        (pope_folder, images / "a.png", "cannot be read"),
        (empty, images, "coco_pope_random.json does not exist"),
    ]
    for questions, folder, message in cases:
        with pytest.raises(DataError, match=message):
            Pope("files", questions=str(questions), images=str(folder)).setup()
    (empty / "coco_pope_random.json").write_text("\n")
    with pytest.raises(DataError, match="is empty"):
        Pope("files", questions=str(empty), images=str(images)).setup()


def test_an_image_that_is_no_image_is_named_when_it_is_read(task, images):
    (images / "a.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"a\.png cannot be read"):
        task.samples()[0].image.load()


def test_the_real_files_load_and_half_are_yes(shared, tmp_path):
    rows = [
        json.loads(line) for path in sorted((shared / "pope").glob("*.json")) for line in path.read_text().splitlines()
    ]
    for name in {row["image"] for row in rows}:
        (tmp_path / name).touch()
    task = Pope("files", questions=str(shared / "pope"), images=str(tmp_path))
    task.setup()
    for subset in ("random", "popular", "adversarial"):
        samples = [sample for sample in task.samples() if sample.subset == subset]
        assert len(samples) == 3000
        assert sum(sample.reference["label"] == "yes" for sample in samples) == 1500
        assert len({sample.group for sample in samples}) == 500
    assert "unknown" not in {sample.reference["object"] for sample in task.samples()}
