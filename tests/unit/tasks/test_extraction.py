"""The choice of how objects are found: every choice by hand, alike in tasks and diagnosis, and its identity."""

import json

import pytest
from helpers.by_hand import reply

import stethoscope
from stethoscope import testbed
from stethoscope.core.errors import ConfigError, DataError
from stethoscope.diagnosis.run_diagnosis import diagnose
from stethoscope.storage.run_fingerprint import task_settings
from stethoscope.streaming import Final, stream
from stethoscope.tasks import object_extraction
from stethoscope.tasks.chair import Chair
from stethoscope.tasks.custom import Custom
from stethoscope.tasks.extraction import Extraction, as_extraction, learned_from, load_extraction, other_words

TEXT = "A puppy and a wooden bench stand on a rug, near two palm trees."


def names(extraction, text=TEXT):
    return [(mention.name, text[mention.start : mention.end]) for mention in extraction(text)]


@pytest.fixture
def amber(tmp_path):
    folder = tmp_path / "amber"
    folder.mkdir()
    (folder / "relation.json").write_text(json.dumps({"rug": ["carpet"], "tree": ["palm"], "bench": [], "puppy": []}))
    return folder


@pytest.fixture
def words(tmp_path):
    file = tmp_path / "words.yaml"
    file.write_text("dog: [puppy]\npalm tree:\nrug: [carpet]\n")
    return file


def a_word(text):
    """Find the word rug, as a function of the user's own would."""
    start = text.find("rug")
    return [object_extraction.TextMention("rug", start, start + 3)] if start >= 0 else []


def test_every_choice_finds_its_own(amber, words):
    assert names(load_extraction("coco")) == [("dog", "puppy"), ("bench", "bench")]
    found_by_amber = [("puppy", "puppy"), ("bench", "bench"), ("rug", "rug"), ("palm", "palm"), ("tree", "trees")]
    assert names(load_extraction(f"amber:{amber}")) == found_by_amber
    assert names(load_extraction(str(words))) == [("dog", "puppy"), ("rug", "rug"), ("palm tree", "palm trees")]
    module = "stethoscope.tasks.object_extraction.mentions"
    assert load_extraction(module, plugins=()).identity == "coco"
    assert names(as_extraction(a_word)) == [("rug", "rug")]
    assert as_extraction(None) == as_extraction(object_extraction.mentions) == as_extraction("coco")


def test_the_identity_is_that_of_the_words_wherever_they_lie(words, amber, tmp_path):
    before = load_extraction(str(words)).identity
    moved = tmp_path / "elsewhere" / "words.yaml"
    moved.parent.mkdir()
    words.rename(moved)
    assert load_extraction(str(moved)).identity == before == "words.yaml:" + before.partition(":")[2]
    moved.write_text("dog: [puppy, hound]\npalm tree:\nrug: [carpet]\n")
    assert load_extraction(str(moved)).identity != before
    assert load_extraction(f"amber:{amber}").identity.startswith("amber:")
    assert str(tmp_path) not in load_extraction(f"amber:{amber}").identity


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("coko", "unknown task.extraction 'coko'; did you mean 'coco'?"),
        ("", "unknown task.extraction ''"),
        (
            "amber",
            "needs AMBER's word list, which does not come with this package; give .* as task.extraction=amber:FOLDER",
        ),
        ("stethoscope.tasks.chair.mentions", "unknown task.extraction"),
        ("nouns:no_such_model", "task.extraction=nouns:no_such_model .*python -m spacy download en_core_web_sm"),
    ],
)
def test_wrong_choices_of_tasks_are_one_line(choice, message):
    with pytest.raises(ConfigError, match=message):
        load_extraction(choice, key="task.extraction")


@pytest.mark.parametrize("choice", ["amber:nowhere", "nowhere.yaml"])
def test_files_that_are_not_there(choice):
    with pytest.raises(DataError, match=r"nowhere.* does not exist"):
        load_extraction(choice)


def test_functions_of_other_packages_are_refused():
    with pytest.raises(ConfigError, match="outside the packages that may be used"):
        load_extraction("os.path.join", plugins=())


# --- tasks ------------------------------------------------------------------------------------------------------------


def chair(**settings):
    task = Chair(scenes=3, **settings)
    task.setup()
    return task


def labels(task, text, sample=None):
    sample = sample or task.samples()[0]
    return {mention.object: mention.label for mention in task.mentions(sample, reply(text))}


def test_chair_judges_what_it_did_and_no_more(amber):
    """What AMBER's words add to COCO's is found, and neither judged nor counted."""
    plain, more = chair(), chair(extraction=f"amber:{amber}")
    text = "A dog, a zebra and a puppy on a rug by a palm."
    sample = plain.samples()[0]
    assert more.score(sample, reply(text)) == plain.score(sample, reply(text))
    judged = {name: label for name, label in labels(more, text).items() if label >= 0}
    assert judged == labels(plain, text)
    assert {name: label for name, label in labels(more, text).items() if label < 0} == {"rug": -1, "palm": -1}


def test_chair_with_words_of_ones_own(words, tmp_path):
    """Names that the scenes know are judged under the vocabulary's name, the others are not."""
    task = chair(extraction=str(words))
    sample = next((sample for sample in task.samples() if not sample.reference["objects"]), task.samples()[0])
    assert set(sample.reference["objects"]) <= {"dog"}
    expected = 0 if "dog" in sample.reference["objects"] else 1
    assert labels(task, "A puppy, a zebra, a rug.", sample) == {"dog": expected, "rug": -1}
    assert task.score(sample, reply("A puppy, a zebra, a rug.")).counts["mentions"] == 1
    (tmp_path / "none.yaml").write_text("- rug\n- lamp\n")
    with pytest.raises(ConfigError, match=r"none\.yaml: none of its names is an object that the ground truth knows"):
        chair(extraction=f"{tmp_path}/none.yaml")


def test_chair_on_categories_that_are_not_cocos(images, tmp_path):
    """An annotation file of other categories, by a vocabulary that has some of them."""
    categories = [{"id": 1, "name": "Fire Engine"}, {"id": 2, "name": "ladder"}, {"id": 3, "name": "hydrangea"}]
    rows = [{"image_id": 1, "category_id": 1}, {"image_id": 2, "category_id": 2}, {"image_id": 2, "category_id": 3}]
    pictures = [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}]
    data = {"images": pictures, "annotations": rows, "categories": categories}
    (tmp_path / "instances.json").write_text(json.dumps(data))
    captions = {
        "annotations": [{"image_id": 1, "caption": "A fire truck and a hose."}, {"image_id": 2, "caption": "-"}]
    }
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    (tmp_path / "words.json").write_text(json.dumps({"fire engine": ["fire truck"], "ladder": [], "hose": []}))
    files = {"instances": f"{tmp_path}/instances.json", "captions": f"{tmp_path}/captions.json", "images": str(images)}
    task = Chair("files", **files, extraction=f"{tmp_path}/words.json")
    task.setup()
    assert [sample.reference["objects"] for sample in task.samples()] == [["fire engine", "hose"], ["ladder"]]
    assert labels(task, "Fire trucks, ladders and a hose.") == {"fire engine": 0, "ladder": 1, "hose": -1}
    with pytest.raises(DataError, match="unknown COCO object 'Fire Engine'"):
        Chair("files", **files).setup()


def test_custom_tasks_find_any_noun_of_a_list(amber, images, tmp_path):
    (tmp_path / "truth.jsonl").write_text(json.dumps({"image": "a.png", "objects": ["rug"]}) + "\n")
    settings = {"kind": "caption", "file": f"{tmp_path}/truth.jsonl", "images": str(images), "question": "Describe it."}
    task = Custom(**settings, extraction=f"amber:{amber}")
    task.setup()
    assert labels(task, "Two rugs and a palm.") == {"rug": 0, "palm": 1}
    (tmp_path / "truth.jsonl").write_text(json.dumps({"image": "a.png", "objects": ["rugg"]}) + "\n")
    with pytest.raises(DataError, match="unknown object of the vocabulary 'rugg'; did you mean 'rug'"):
        Custom(**settings, extraction=f"amber:{amber}").setup()


def test_the_choice_is_in_the_runs_identity(words, images):
    settings = [
        task_settings(chair(extraction=choice))["extraction"] for choice in ("coco", str(words))
    ]  # fmt: skip
    assert settings == ["coco", load_extraction(str(words)).identity]
    task = Custom("unlabelled", images=str(images), question="Describe it.", extraction=str(words))
    task.setup()
    assert task_settings(task)["extraction"] == settings[1]


# --- diagnosis and streams --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter():
    return stethoscope.load("testbed")


def test_diagnosis_and_stream_use_the_choice_and_say_that_the_detector_did_not(adapter, words):
    picture = testbed.scenes(1)[0].image()
    detector = stethoscope.Detector.load(testbed.DETECTOR_DIR)
    question, text = "Please describe this image in detail.", "A dog on a rug."
    own = diagnose(adapter, picture, question, text, detector)
    other = diagnose(adapter, picture, question, text, detector, extraction=str(words))
    assert [mention.object for mention in own.mentions] == ["dog"]
    assert [mention.object for mention in other.mentions] == ["dog", "rug"]
    sentence = "The detector learned from mentions found by coco; these are found by words.yaml, so nothing here is"
    assert other.shift.startswith(sentence)
    assert sentence not in own.shift
    same = [mention.verdict.probability for mention in (own.mentions[0], other.mentions[0])]
    assert same[0] == pytest.approx(same[1], abs=1e-6)
    finds = Extraction("first-word", lambda answer: [object_extraction.TextMention("word", 0, answer.find(" "))], None)
    streamed = [item for item in stream(adapter, picture, question, final=detector, extraction=finds)]
    assert isinstance(streamed[-1], Final)
    assert [mention.object for mention in streamed[-1].mentions] == ["word"]
    assert "these are found by first-word" in streamed[-1].shift


def test_what_a_detector_learned_from_is_in_its_manifest():
    assert learned_from({"name": "chair", "settings": {"extraction": "nouns:en_core_web_sm"}}) == "nouns:en_core_web_sm"
    assert learned_from({"name": "chair", "settings": {}}) == learned_from("chair") == "coco"
    assert learned_from("pope") is learned_from(None) is None
    assert other_words("amber:0123", "amber") == other_words("", "chair") == other_words("nouns:a", "pope") == ""
    other_file = other_words("words.yaml:2", {"name": "chair", "settings": {"extraction": "words.yaml:1"}})
    assert "found by words.yaml:1; these are found by words.yaml:2" in other_file
