"""The reading API: POPE questions, files in published formats, datasets."""

from __future__ import annotations

import collections
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from stethoscope import testbed
from stethoscope.testbed.dataset import POPE_SPLITS, co_occurrence
from stethoscope.testbed.vocabulary import COCO_IDS, INDEX, partners, with_article


@pytest.fixture(scope="module")
def held_out() -> list[testbed.Scene]:
    return testbed.scenes(40)


@pytest.mark.parametrize("split", POPE_SPLITS)
def test_pope_is_balanced_and_true(held_out: list[testbed.Scene], split: str) -> None:
    questions = testbed.pope_questions(held_out, split)
    by_file = {f"{scene.id}.png": scene for scene in held_out}
    labels = collections.Counter((q["image"], q["label"]) for q in questions)
    for name, scene in by_file.items():
        assert labels[name, "yes"] == labels[name, "no"] == min(3, len(scene.visible))
    assert all((q["object"] in by_file[q["image"]].visible) == (q["label"] == "yes") for q in questions)
    assert len({(q["image"], q["object"]) for q in questions}) == len(questions)
    assert [q["question_id"] for q in questions] == list(range(1, len(questions) + 1))
    assert questions == testbed.pope_questions(held_out, split)


def test_pope_splits_differ_in_their_negatives(held_out: list[testbed.Scene]) -> None:
    def negatives(split: str) -> list[tuple[testbed.Scene, str]]:
        by_file = {f"{scene.id}.png": scene for scene in held_out}
        questions = testbed.pope_questions(held_out, split)
        return [(by_file[q["image"]], q["object"]) for q in questions if q["label"] == "no"]

    def tempting(split: str) -> float:
        return float(np.mean([any(p in scene.visible for p in partners(name)) for scene, name in negatives(split)]))

    popularity = collections.Counter(name for scene in held_out for name in scene.visible)
    common = {split: np.mean([popularity[name] for _, name in negatives(split)]) for split in POPE_SPLITS}
    assert common["popular"] > common["random"]
    assert tempting("adversarial") > 2 * tempting("random")


def test_pope_knows_its_splits(held_out: list[testbed.Scene]) -> None:
    with pytest.raises(ValueError, match="random, popular, adversarial"):
        testbed.pope_questions(held_out, "adverse")


def test_co_occurrence_follows_the_boosts() -> None:
    together = co_occurrence()
    assert together.shape == (32, 32)
    assert not together.diagonal().any()
    assert together[INDEX["fork"], INDEX["knife"]] > 0.5 > together[INDEX["fork"], INDEX["clock"]]


def test_export_reads_back_to_the_same_truth(tmp_path: pathlib.Path, held_out: list[testbed.Scene]) -> None:
    folder = testbed.export(tmp_path / "export", held_out)
    instances = json.loads((folder / "instances.json").read_text())
    captions = json.loads((folder / "captions.json").read_text())
    names = {c["id"]: c["name"] for c in instances["categories"]}
    assert names == {v: k for k, v in COCO_IDS.items()}
    objects, texts = collections.defaultdict(set), collections.defaultdict(list)
    for a in instances["annotations"]:
        objects[a["image_id"]].add(names[a["category_id"]])
        assert {"id", "bbox", "area", "segmentation", "iscrowd"} <= set(a)
        assert a["area"] > 0
    for a in captions["annotations"]:
        texts[a["image_id"]].append(a["caption"])
    for image, scene in zip(instances["images"], held_out, strict=True):
        assert image["file_name"] == f"{scene.id}.png"
        assert objects[image["id"]] == set(scene.visible)
        assert len(texts[image["id"]]) == 5
        with Image.open(folder / "images" / image["file_name"]) as stored:
            assert np.array_equal(stored, scene.image())


def test_boxes_are_tight(tmp_path: pathlib.Path, held_out: list[testbed.Scene]) -> None:
    folder = testbed.export(tmp_path, held_out[:5])
    for a in json.loads((folder / "instances.json").read_text())["annotations"]:
        mask = held_out[a["image_id"] - 1].mask() == 1 + INDEX[{v: k for k, v in COCO_IDS.items()}[a["category_id"]]]
        x, y, width, height = a["bbox"]
        assert mask[y : y + height, x : x + width].sum() == mask.sum() == a["area"]


@pytest.mark.parametrize("split", POPE_SPLITS)
def test_exported_pope_has_popes_format(tmp_path: pathlib.Path, held_out: list[testbed.Scene], split: str) -> None:
    folder = testbed.export(tmp_path, held_out[:5])
    lines = (folder / f"coco_pope_{split}.json").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    expected = testbed.pope_questions(held_out[:5], split)
    assert [{**r, "object": e["object"]} for r, e in zip(records, expected, strict=True)] == expected
    assert set(records[0]) == {"question_id", "image", "text", "label"}


def test_as_dataset(held_out: list[testbed.Scene]) -> None:
    rows = testbed.as_dataset(held_out[:4])
    assert {"image", "id", "setting", "objects", "captions", "questions"} <= set(rows.column_names)
    assert np.array_equal(rows[2]["image"], held_out[2].image())
    assert rows[2]["objects"] == list(held_out[2].visible)
    assert {q["split"] for q in rows[2]["questions"]} == set(POPE_SPLITS)


def test_removal_questions_are_those_of_beaf() -> None:
    """Every version is asked the same questions; only the truth about the object that it lacks is another."""
    scenes = testbed.scenes(8)
    rows, versions = testbed.removal_questions(scenes, edits=2)
    assert [row["id"] for row in rows] == list(range(len(rows)))
    truth = {(row["image"], row["question"]): row["gt"] for row in rows}
    originals = {row["image"] for row in rows if row["orig_img"]}
    assert len(versions) > len(originals) > 0
    for name, scene in versions.items():
        if name not in originals:
            original = f"{name[:-7]}.png"
            (lost,) = set(versions[original].visible) - set(scene.visible)
            asked = [question for image, question in truth if image == name]
            changed = [question for question in asked if truth[original, question] != truth[name, question]]
            assert changed == [f"Is there {with_article(lost)} in the image?"]
            assert (truth[original, changed[0]], truth[name, changed[0]]) == ("yes", "no")
            assert all(row["removed_q"] for row in rows if row["question"] in changed and row["image"] == name)


def test_a_scene_without_an_object_differs_only_there() -> None:
    for scene in testbed.scenes(5):
        name = scene.visible[0]
        edited = scene.without(name, "edited")
        assert edited.id == "edited"
        assert name not in edited.visible
        differs = (np.asarray(scene.image()) != np.asarray(edited.image())).any(-1)
        own = scene.mask() == 1 + testbed.CATEGORIES.index(name)
        assert differs[own].mean() > 0.9
        item = next(o for o in scene.objects if o.category == name)
        rows, columns = differs.nonzero()
        margin = 4  # of the blur
        assert rows.min() >= item.y - margin
        assert rows.max() <= item.y + item.size + margin
        assert columns.min() >= item.x - margin
        assert columns.max() <= item.x + item.size + margin
    with pytest.raises(ValueError, match="shows no 'zebra'"):
        testbed.scenes(1)[0].without("zebra", "x")
