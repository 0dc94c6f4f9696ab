"""A small whole data set of every task, in one folder, and the tasks that read it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

POPE = [
    {"question_id": 1, "image": "a.png", "text": "Is there a dog in the image?", "label": "no"},
    {"question_id": 2, "image": "b.png", "text": "Is there a cat in the image?", "label": "yes"},
]
IMAGES = [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}]
FILES = {
    "coco_pope_random.json": POPE,
    "instances.json": {
        "images": IMAGES,
        "annotations": [{"image_id": 1, "category_id": 18}, {"image_id": 2, "category_id": 17}],
        "categories": [{"id": 18, "name": "dog"}, {"id": 17, "name": "cat"}],
    },
    "captions.json": {
        "images": IMAGES,
        "annotations": [{"image_id": 1, "caption": "a dog"}, {"image_id": 2, "caption": "cats"}],
    },
    "amber/annotations.json": [
        {"id": 1, "type": "generative", "truth": ["dog"], "hallu": ["cat"]},
        {"id": 2, "type": "discriminative-hallucination", "truth": "no"},
    ],
    "amber/query_all.json": [
        {"id": 1, "image": "AMBER_1.png", "query": "Describe this image."},
        {"id": 2, "image": "AMBER_1.png", "query": "Is there a cat in this image?"},
    ],
    "amber/relation.json": {"dog": ["puppy"], "cat": []},
    "hallusion.json": [
        {
            "category": "VD", "subcategory": "illusion", "set_id": "0", "figure_id": "1", "question_id": "0",
            "visual_input": "1", "question": "Is it longer?", "gt_answer": "1",
        }
    ],
    "halloc.jsonl": [
        {
            "image": "a.png", "question": "What is there?", "answer": "A dog and a cat.",
            "spans": [{"start": 12, "end": 15, "type": "object"}],
        }
    ],
    "yes_no.jsonl": [{"id": "1", "image": "a.png", "question": "Is it red?", "label": "yes", "subset": "colour"}],
    "caption.jsonl": [{"image": "a.png", "question": "What is there?", "objects": ["dog", "cat"], "answer": "A dog."}],
    "words.yaml": {"dog": ["puppy", "hound"], "cat": []},
}  # fmt: skip
README = """---
configs:
- config_name: default
  data_files:
  - split: test
    path: data.parquet
---
# Questions
"""


def write(folder: Path) -> None:
    """Writes everything."""
    import datasets
    from PIL import Image

    for name in ("a.png", "b.png", "AMBER_1.png", "VD/illusion/0_1.png"):
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(folder / "images" / name)
    (folder / "mme" / "existence").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(folder / "mme" / "existence" / "a.png")
    (folder / "mme" / "existence" / "a.txt").write_text("Is there a dog?\tYes\nIs there a cat?\tNo\n")
    for name, data in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        lines = name.endswith(".jsonl") or name.startswith("coco_pope")
        text = "\n".join(map(json.dumps, data)) + "\n" if lines else json.dumps(data)
        (folder / name).write_text(text)
    (folder / "amber" / "safe_words.txt").write_text("light\nday")
    row = {"image": Image.new("RGB", (4, 4)), "question_id": "1", "image_source": "a", "question": "Is there a dog?"}
    row |= {"answer": "no", "category": "random"}
    table = datasets.Dataset.from_list([row])
    (folder / "hub").mkdir()
    table.to_parquet(folder / "hub" / "data.parquet")
    (folder / "hub" / "README.md").write_text(README)


def tasks(folder: Path) -> dict[str, Callable[[], Any]]:
    """How to make every task over the files of the folder."""
    from stethoscope.tasks.amber import Amber
    from stethoscope.tasks.chair import Chair
    from stethoscope.tasks.custom import Custom
    from stethoscope.tasks.halloc import HalLoc
    from stethoscope.tasks.hallusion_bench import HallusionBench
    from stethoscope.tasks.mme import Mme
    from stethoscope.tasks.pope import Pope

    images, coco = str(folder / "images"), {name: str(folder / f"{name}.json") for name in ("instances", "captions")}
    caption = {"file": str(folder / "caption.jsonl"), "images": images, "extraction": str(folder / "words.yaml")}
    return {
        "pope": lambda: Pope(source="files", subsets=["random"], questions=str(folder), images=images),
        "chair": lambda: Chair(source="files", images=images, **coco),
        "amber": lambda: Amber(folder=str(folder / "amber"), images=images),
        "mme": lambda: Mme(source="files", folder=str(folder / "mme"), categories=["existence"]),
        "hallusion": lambda: HallusionBench(source="files", file=str(folder / "hallusion.json"), images=images),
        "halloc": lambda: HalLoc(file=str(folder / "halloc.jsonl"), images=images),
        "yes_no": lambda: Custom(kind="yes_no", file=str(folder / "yes_no.jsonl"), images=images),
        "caption": lambda: Custom(kind="caption", **caption),
        "hub": lambda: Pope(source="hub", dataset=str(folder / "hub"), subsets=["random"], local_files_only=True),
    }
