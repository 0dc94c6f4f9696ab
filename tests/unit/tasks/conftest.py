"""Images and published files made by hand."""

import json
from pathlib import Path

import pytest
from helpers.by_hand import QUESTIONS
from PIL import Image


@pytest.fixture
def images(tmp_path) -> Path:
    """A folder with two small images, a.png and b.png."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (4, 4), colour).save(folder / name)
    return folder


@pytest.fixture
def pope_folder(tmp_path) -> Path:
    """The three question files of POPE, three questions each."""
    for subset in ("random", "popular", "adversarial"):
        lines = [json.dumps(row) for row in QUESTIONS]
        (tmp_path / f"coco_pope_{subset}.json").write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.fixture
def instances(tmp_path) -> Path:
    """COCO instances: a dog and a chair in a.png, nothing in b.png."""
    path = tmp_path / "instances.json"
    path.write_text(
        json.dumps(
            {
                "images": [{"id": 7, "file_name": "a.png"}, {"id": 3, "file_name": "b.png"}],
                "annotations": [{"image_id": 7, "category_id": 18}, {"image_id": 7, "category_id": 62}],
                "categories": [{"id": 18, "name": "dog"}, {"id": 62, "name": "chair"}],
            }
        )
    )
    return path


@pytest.fixture
def captions(tmp_path) -> Path:
    """COCO captions: people also saw a man on a sofa in a.png, and a cat in b.png."""
    path = tmp_path / "captions.json"
    rows = [
        {"image_id": 7, "caption": "A man on a sofa with a puppy"},
        {"image_id": 7, "caption": "The dog sits"},
        {"image_id": 3, "caption": "A cat."},
        {"image_id": 999, "caption": "Zebras"},
    ]
    path.write_text(json.dumps({"annotations": rows}))
    return path
