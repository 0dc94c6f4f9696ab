"""CHAIR: ground truth, scores by hand, mentions, and what is said of broken input."""

import json
import random

import numpy as np
import pytest
from helpers.by_hand import reply

from stethoscope.core.errors import ConfigError, DataError
from stethoscope.tasks.chair import Chair, complete_sentences


def ready(**arguments):
    task = Chair(source="files", **{key: str(value) for key, value in arguments.items()})
    task.setup()
    return task


@pytest.fixture
def task(instances, captions, images):
    return ready(instances=instances, captions=captions, images=images)


def test_ground_truth_is_annotations_and_captions(task, instances, images):
    assert [sample.id for sample in task.samples()] == ["a", "b"]
    assert [sample.group for sample in task.samples()] == ["a", "b"]
    assert task.samples()[0].reference == {"objects": ["chair", "couch", "dog", "person"]}
    assert task.samples()[1].reference == {"objects": ["cat"]}
    alone = ready(instances=instances, images=images)
    assert [sample.reference["objects"] for sample in alone.samples()] == [["chair", "dog"], []]


def test_image_ids_choose_and_order(instances, images, tmp_path):
    task = Chair(source="files", instances=str(instances), images=str(images), image_ids=[3, 7])
    task.setup()
    assert [sample.id for sample in task.samples()] == ["b", "a"]
    listed = tmp_path / "ids.txt"
    listed.write_text("3\n\n")
    assert [chosen.id for chosen in ready(instances=instances, images=images, image_ids=listed).samples()] == ["b"]
    listed.write_text("3\n4\n")
    with pytest.raises(DataError, match=r"ids\.txt, line 2: image id 4 is not in"):
        ready(instances=instances, images=images, image_ids=listed)


def test_scores_by_hand(task):
    sample = task.samples()[0]
    score = task.score(sample, reply("A dog, a puppy and two zebras. The zebra eats a pizza."))
    assert score.status == "ok"
    assert score.counts == {
        "mentions": 5,
        "hallucinated": 3,
        "captions": 1,
        "hallucinated_captions": 1,
        "truth": 4,
        "found": 1,
        "words": 12,
    }
    assert score.detail == {
        "objects": ["dog", "dog", "zebra", "zebra", "pizza"],
        "hallucinated": ["zebra", "zebra", "pizza"],
    }


def test_metrics_by_hand(task):
    first, second = task.samples()
    scores = [
        task.score(first, reply("A dog, a puppy and two zebras. The zebra eats a pizza.")),
        task.score(second, reply("A cat near a nice wall")),
        task.score(second, reply("Nothing")),
    ]
    totals = {key: np.array([sum(score.counts[key] for score in scores), 0]) for key in scores[0].counts}
    values = {name: metric(totals) for name, metric in task.metrics().items()}
    assert {name: value[0] for name, value in values.items()} == pytest.approx(
        {"chair_i": 3 / 6, "chair_s": 1 / 3, "recall": 2 / 6, "length": 19 / 3}
    )
    assert all(np.isnan(value[1]) for value in values.values())


def test_images_of_published_captions(instances, images, tmp_path):
    """As OPERA writes its captions: one object on each line."""
    listed = tmp_path / "greedy.jsonl"
    listed.write_text('{"image_id": 3, "caption": "A cat."}\n{"image_id": 7, "caption": "A dog."}\n')
    task = ready(instances=instances, images=images, image_ids=listed)
    assert [sample.id for sample in task.samples()] == ["b", "a"]
    listed.write_text('[{"image_id": 8}]')
    with pytest.raises(DataError, match="line 1: image id 8 is not in"):
        ready(instances=instances, images=images, image_ids=listed)


def test_images_are_drawn_by_a_seed(tmp_path, images):
    """The draw of the papers on sorted names: seeded by random.seed, shuffled in place, the first ones taken."""
    names = [f"{number:02d}.png" for number in range(20)]
    listed = [{"id": 100 - number, "file_name": name} for number, name in enumerate(names)]
    path = tmp_path / "many.json"
    path.write_text(json.dumps({"images": listed[::-1], "annotations": [], "categories": []}))
    random.seed(42)
    shuffled = names.copy()
    random.shuffle(shuffled)
    for name in shuffled[:5]:
        (images / "a.png").with_name(name).write_bytes((images / "a.png").read_bytes())
    drawn = {"source": "files", "instances": str(path), "images": str(images), "image_count": 5}
    task = Chair(**drawn)
    task.setup()
    assert [sample.image.name for sample in task.samples()] == shuffled[:5]
    with pytest.raises(DataError, match="is not in"):  # other pictures are not there
        Chair(**drawn, image_seed=7).setup()
    with pytest.raises(DataError, match=r"image_count=21, but .* lists 20 images"):
        Chair(**{**drawn, "image_count": 21}).setup()
    with pytest.raises(ConfigError, match=r"image_ids=.* has its own images"):
        Chair(**drawn, image_ids=[1])


def test_empty_answers_are_counted_apart(task):
    score = task.score(task.samples()[0], reply(" \n"))
    assert score.status == "unparsed"
    assert set(score.counts.values()) == {0.0}
    assert task.mentions(task.samples()[0], reply("")) == ()


def test_labelled_mentions(task):
    text = "Stop signs, a puppy and dogs; a stop sign"
    mentions = task.mentions(task.samples()[0], reply(text))
    assert [text[mention.start : mention.end] for mention in mentions] == ["Stop signs", "puppy", "dogs", "stop sign"]
    assert [(mention.object, mention.label, mention.mention_index, mention.repeat_index) for mention in mentions] == [
        ("stop sign", 1, 0, 0),
        ("dog", 0, 1, 0),
        ("dog", 0, 2, 1),
        ("stop sign", 1, 3, 1),
    ]


def test_a_caption_is_read_once_for_its_score_and_its_mentions(task, monkeypatch):
    sample, answer = task.samples()[0], reply("A dog, a puppy and two zebras.")
    apart, read = (task.score(sample, answer), task.mentions(sample, answer)), type(task)._named
    texts = []
    monkeypatch.setattr(type(task), "_named", lambda self, text: texts.append(text) or read(self, text))
    assert task.evaluate_answer(sample, answer) == apart
    assert texts == [answer.text]


def test_the_unfinished_sentence_of_a_cut_answer_can_be_left_out(instances, images):
    task = Chair("files", instances=str(instances), images=str(images), drop_incomplete=True)
    task.setup()
    sample, text = task.samples()[0], "A dog. A zebra and a"
    assert task.score(sample, reply(text, finished=False)).detail["objects"] == ["dog"]
    assert task.score(sample, reply(text)).detail["objects"] == ["dog", "zebra"]
    assert len(task.mentions(sample, reply(text, finished=False))) == 1
    assert complete_sentences("A dog and") == "A dog and"


def test_wrong_settings_are_found_at_construction():
    for arguments, message in (
        ({"source": "testbet"}, "did you mean 'testbed'"),
        ({"source": "files"}, "needs task.instances"),
        ({"question": " "}, "should be a text"),
        ({"question": None}, "should be a text"),
        ({"drop_incomplete": "no"}, "should be true or false"),
        ({"scenes": 0}, "at least 1"),
        ({"image_ids": 5}, "should be a list"),
        ({"image_count": 0}, "at least 1"),
        ({"image_count": 5}, "source=testbed has its own images"),
    ):
        with pytest.raises(ConfigError, match=message):
            Chair(**arguments)


def change(path, **lists):
    path.write_text(json.dumps({**json.loads(path.read_text()), **lists}))


def test_broken_annotation_files(instances, captions, images, tmp_path):
    whole = instances.read_text()
    cases = [
        ({"images": None}, "has a list 'images'"),
        ({"annotations": {}}, "has a list 'annotations'"),
        ({"categories": None}, "has a list 'categories'"),
        ({"images": []}, "lists no image"),
        ({"images": [{"id": 7}]}, r"images\[0\] has no 'file_name'"),
        ({"images": [{"id": 7, "file_name": "z.png"}]}, "image id 7: image 'z.png' is not in"),
        ({"annotations": [{"image_id": 7}]}, r"annotations\[0\] has no 'category_id'"),
        ({"annotations": [{"image_id": 7, "category_id": 5}]}, "category_id 5, which is not among"),
        ({"annotations": [{"image_id": 8, "category_id": 18}]}, "image_id 8, which is not among"),
        ({"categories": [{"id": 18, "name": "doge"}]}, "did you mean 'dog'"),
    ]
    for lists, message in cases:
        instances.write_text(whole)
        change(instances, **lists)
        with pytest.raises(DataError, match=message):
            ready(instances=instances, images=images)
    instances.write_text(whole.replace("[", "\n[", 1).replace("]}", "]", 1))
    with pytest.raises(DataError, match=r"instances\.json, line 2: not JSON"):
        ready(instances=instances, images=images)
    instances.write_text(whole)
    change(captions, annotations=[{"image_id": 1, "caption": "A dog"}])
    with pytest.raises(DataError, match="captions of none of the 2 images"):
        ready(instances=instances, captions=captions, images=images)
    with pytest.raises(DataError, match=r"gone\.json does not exist"):
        ready(instances=tmp_path / "gone.json", images=images)
    change(instances, images=[{"id": 7, "file_name": "a.png"}, {"id": 8, "file_name": "a.png"}])
    with pytest.raises(DataError, match="'a' is there more than once"):
        ready(instances=instances, images=images)


def test_answers_about_published_pictures_may_be_as_long_as_is_usual(tmp_path):
    files = {"instances": str(tmp_path / "i.json"), "images": str(tmp_path)}
    assert Chair("files", **files).max_new_tokens == Chair("hub").max_new_tokens == 512
    assert Chair().max_new_tokens == 128


def test_scenes_of_another_mode_and_seed_are_other_pictures():
    names = []
    for options in ({}, {"scene_mode": "prior"}, {"scene_seed": 7}):
        scenes = Chair(scenes=2, **options)
        scenes.setup()
        names.append([sample.id for sample in scenes.samples()])
    assert names == [[f"{name}-{i:06d}" for i in range(2)] for name in ("counter", "prior", "counter-s7")]
    with pytest.raises(ConfigError, match="scene_mode"):
        Chair(scene_mode="postprior")
