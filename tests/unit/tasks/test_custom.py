"""One's own benchmark: the three kinds by hand, files and folders, vocabularies."""

import json

import pytest
import yaml
from helpers.by_hand import figures, reply
from helpers.tiny_world import TinyAdapter

from stethoscope.core.component import build
from stethoscope.core.errors import ConfigError, DataError
from stethoscope.core.types import Generation
from stethoscope.storage.run_fingerprint import answer_fingerprint, constructor_settings
from stethoscope.tasks.base import Task
from stethoscope.tasks.custom import Custom
from stethoscope.tasks.extraction import read_vocabulary


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def made(**settings):
    task = Custom(**settings)
    task.setup()
    return task


@pytest.fixture
def asked(tmp_path, images):
    return write(
        tmp_path / "asked.jsonl",
        {"image": "images/a.png", "question": "Is there a dog? ", "label": "Yes", "subset": "dogs"},
        {"image": "images/b.png", "label": "no", "id": "second"},
        {"image": "./images/b.png", "label": "no", "answer": "Yes, it is."},
    )


def test_yes_no(asked):
    task = made(kind="yes_no", file=asked, question="Is it red?", suffix=" Yes or no?", name="mine")
    first, two, three = task.samples()
    assert (first.id, first.question, first.subset, first.group) == (
        "1",
        "Is there a dog? Yes or no?",
        "dogs",
        "images/a",
    )
    assert (two.id, two.question, two.subset, two.group) == ("second", "Is it red? Yes or no?", "all", "images/b")
    assert (three.group, three.answer, two.answer) == ("images/b", "Yes, it is.", None)
    assert (task.name, task.primary) == ("mine", "f1")
    values = figures(task, {"1": "Yes", "second": "no", "3": "Yes, it is."})
    assert (values["f1", "dogs"], values["accuracy", "all"], values["yes_rate", "all"]) == (1.0, 0.5, 0.5)
    assert task.score(first, reply("Hm")).status == "unparsed"
    assert (values["answered", "all"], values["accuracy_all", "all"]) == (1.0, 0.5)
    values = figures(task, {"1": "Yes", "second": "Hm", "3": "Yes, it is."})
    assert (values["answered", "all"], values["accuracy", "all"], values["accuracy_all", "all"]) == (0.5, 0.0, 0.0)
    assert any("accuracy_all takes the others for wrong" in note for note in task.notes(task.samples()))
    assert [m.label for m in task.mentions(three, reply("Yes, it is."))] == [1]


def test_captions_with_the_coco_objects(tmp_path, images):
    file = write(tmp_path / "truth.jsonl", {"image": "a.png", "objects": ["dog", "chair", "dog"]})
    task = made(kind="caption", file=file, images=str(images), question="Describe it.")
    (sample,), text = task.samples(), "A puppy and two cats."
    assert sample.reference["objects"] == ["chair", "dog"]
    assert [(m.object, m.label) for m in task.mentions(sample, reply(text))] == [
        ("dog", 0),
        ("cat", 1),
    ]
    values = figures(task, {"1": text})
    assert (values["chair_i", "all"], values["recall", "all"], values["length", "all"]) == (0.5, 0.5, 5)
    assert task.primary == "chair_i"


def test_captions_with_a_vocabulary(tmp_path, images):
    (tmp_path / "words.yaml").write_text("fire engine: [fire truck]\nladder:\nhose: [water pipe]\n")
    file = write(tmp_path / "truth.jsonl", {"image": "a.png", "objects": ["fire engine"]})
    words = {
        "kind": "caption",
        "file": file,
        "images": str(images),
        "question": "?",
        "extraction": f"{tmp_path}/words.yaml",
    }
    task = made(**words)
    sample, text = task.samples()[0], "Two fire trucks with ladders and dogs."
    mentions = task.mentions(sample, reply(text))
    assert [(text[m.start : m.end], m.object, m.label) for m in mentions] == [
        ("fire trucks", "fire engine", 0),
        ("ladders", "ladder", 1),
    ]
    assert task.extraction == words["extraction"]  # a setting stays as it was given
    assert constructor_settings(task)["extraction"] == words["extraction"]
    identified = answer_fingerprint(TinyAdapter(), task, Generation())["task"]["settings"]
    assert identified["extraction"].startswith("words.yaml:")
    (tmp_path / "words.yaml").write_text("fire engine: [fire truck]\nladder:\nhose:\n")
    other = answer_fingerprint(TinyAdapter(), made(**words), Generation())["task"]["settings"]
    assert {key for key in other if other[key] != identified[key]} == {"extraction"}
    assert made(**words).samples()[0].reference != sample.reference  # so that a run does not keep the old scores


def test_a_folder_of_images(images):
    task = made(images=str(images), question="What is this?")
    assert [(s.id, s.group, s.question) for s in task.samples()] == [
        ("a.png", "a", "What is this?"),
        ("b.png", "b", "What is this?"),
    ]
    assert task.mentions(task.samples()[0], reply("A dog.")) == ()
    assert figures(task, {"a.png": "One two", "b.png": "One two three four"})["length", "all"] == 3
    assert task.score(task.samples()[0], reply(" ")).status == "unparsed"


def test_yaml_alone_describes_a_task(asked):
    text = f"_target_: stethoscope.tasks.custom.Custom\nkind: yes_no\nfile: {asked}\nname: red-or-not\n"
    task = build(yaml.safe_load(text + "question: Is it red?\n"), Task, "task")
    task.setup()
    assert (task.name, len(task.samples())) == ("red-or-not", 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "yesno", "file": "a"}, "did you mean 'yes_no'"),
        ({"file": "a", "parser": "strikt"}, "did you mean 'strict'"),
        ({}, "task.file, a JSON-lines file, or task.images"),
        ({"kind": "yes_no", "images": "a", "question": "?"}, "needs task.file, a JSON-lines file with 'label'"),
        ({"kind": "caption", "images": "a", "question": "?"}, "'objects' on every line"),
        ({"images": "a"}, "needs task.question"),
        ({"images": "a", "question": "?", "max_new_tokens": 0}, "max_new_tokens=0"),
        ({"images": "a", "question": "?", "name": "../x"}, "task.name='../x'"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ConfigError) as error:
        Custom(**settings)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"dog": ["puppy"], "cat": []}', {"dog": ("puppy",), "cat": ()}),
        ("- dog\n- cat\n", {"dog": (), "cat": ()}),
        ("dog:\ncat: [kitten]", {"dog": (), "cat": ("kitten",)}),
    ],
)
def test_vocabulary_files(tmp_path, text, words):
    (tmp_path / "words").write_text(text)
    assert read_vocabulary(tmp_path / "words") == words


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dog: [puppy\ncat: ]:", "line 2: neither YAML nor JSON"),
        ("dog", "a list of names was expected"),
        ("", "a list of names was expected"),
        ("[]", "a list of names was expected"),
        ("- [dog]", "a list of names was expected"),
        ("dog: puppy", "'dog' should be a name with a list of other names, not 'puppy'"),
        ("dog: [1]", "'dog' should be a name with a list"),
        ("no: [nope]", "False should be a name"),
        ("dog: [pet]\ncat: [Pet]", "'Pet' stands for both 'dog' and 'cat'"),
        ("dog: ['']", "'dog' has an empty name"),
        ("[" * 700, "neither YAML nor JSON"),
        ("dog: [2026-13-01]", "neither YAML nor JSON (month must be"),
    ],
)
def test_broken_vocabularies(tmp_path, text, message):
    (tmp_path / "words").write_text(text)
    with pytest.raises(DataError) as error:
        read_vocabulary(tmp_path / "words")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_null_is_a_key_that_is_not_there(tmp_path, images):
    row = {"image": "images/a.png", "question": None, "id": None, "subset": None, "label": "no"}
    (first, two) = made(kind="yes_no", file=write(tmp_path / "asked.jsonl", row, row), question="Is it red?").samples()
    assert (first.id, two.id, first.question, first.subset) == ("1", "2", "Is it red?", "all")
    with pytest.raises(DataError, match="line 1: key 'image' is missing"):
        made(kind="yes_no", file=write(tmp_path / "asked.jsonl", {**row, "image": None}), question="Is it red?")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"subset": ""}], "subset '' is no name"),
        ([{"subset": ["a", "b"]}], "subset .* is no name"),
        ([{"id": 2}, {}], "line 2: a line without id has its number, but id 2 is used before"),
        ([{"question": "\ud800?"}], "half of a surrogate pair"),
    ],
)
def test_wrong_lines(tmp_path, images, rows, message):
    plain = {"image": "images/a.png", "question": "Is it red?"}
    with pytest.raises(DataError, match=message):
        made(file=write(tmp_path / "asked.jsonl", *({**plain, **row} for row in rows)))


def test_a_byte_order_mark_is_no_text(tmp_path, images):
    file = tmp_path / "asked.jsonl"
    file.write_text(json.dumps({"image": "images/a.png", "question": "Is it red? \U0001f415"}), "utf-8-sig")
    assert made(file=str(file)).samples()[0].question == "Is it red? \U0001f415"


def test_hidden_files_and_folders_are_no_images(images):
    (images / "._a.png").write_bytes(b"of macOS")
    (images / "album.png").mkdir()
    assert [sample.id for sample in made(images=str(images), question="What is it?").samples()] == ["a.png", "b.png"]


def test_a_suffix_whose_blank_was_lost_has_one(asked):
    (sample, *_) = made(kind="yes_no", file=asked, question="Is it red?", suffix="Yes or no?").samples()
    assert sample.question == "Is there a dog? Yes or no?"
