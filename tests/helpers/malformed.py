"""Malformed datasets, detectors and run directories, each made in a folder, with the command that meets it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from helpers.tiny_world import TinyAdapter, TinyFeatures, TinyTask
from helpers.token_tables import halves, token_table
from stethoscope.detection import artifact
from stethoscope.detection.detector import Detector
from stethoscope.evaluation.evaluator import Evaluator

EVALUATE = ["evaluate", "model.random_init=tiny", "logger=none", "callbacks=none"]
POPE = {"question_id": 1, "image": "a.png", "text": "Is there a dog in the image?", "label": "no"}
IMAGES = [{"id": 1, "file_name": "a.png"}]
INSTANCES = {
    "images": IMAGES,
    "annotations": [{"image_id": 1, "category_id": 18}],
    "categories": [{"id": 18, "name": "dog"}],
}
CAPTIONS = {"images": IMAGES, "annotations": [{"image_id": 1, "caption": "a dog"}]}
HALLUSION = {
    "category": "VD", "subcategory": "map", "set_id": "0", "figure_id": "1", "question_id": "0", "visual_input": "1",
    "question": "Is it so?", "gt_answer": "1",
}  # fmt: skip
HALLOC = {
    "image": "a.png",
    "question": "What?",
    "answer": "A dog.",
    "spans": [{"start": 2, "end": 5, "type": "object"}],
}
AMBER = {"id": 1, "type": "generative", "truth": ["dog"], "hallu": ["cat"]}
CUSTOM = {"image": "a.png", "question": "Is it?", "label": "yes"}

Maker = Callable[[Path], list[str]]


def pictures(folder: Path) -> Path:
    """A folder with one picture, and one outside of it."""
    (folder / "images").mkdir(exist_ok=True)
    for name in ("images/a.png", "outside.png"):
        Image.new("RGB", (8, 8)).save(folder / name)
    return folder / "images"


def pope(*rows: dict | str | bytes, images: str = "images") -> Maker:
    """POPE's file with these lines."""

    def make(folder: Path) -> list[str]:
        pictures(folder)
        lines = [row if isinstance(row, (str, bytes)) else json.dumps(row) for row in rows]
        data = b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines)
        (folder / "coco_pope_random.json").write_bytes(data)
        words = ["task=pope", "task.source=files", "task.subsets=[random]", f"task.questions={folder}"]
        return [*EVALUATE, *words, f"task.images={folder / images}"]

    return make


def chair(instances: object = INSTANCES, captions: object = CAPTIONS) -> Maker:
    """COCO's files with this content."""

    def make(folder: Path) -> list[str]:
        (folder / "instances.json").write_text(json.dumps(instances))
        (folder / "captions.json").write_text(json.dumps(captions))
        words = ["task=chair", "task.source=files", f"task.images={pictures(folder)}"]
        return [*EVALUATE, *words, *(f"task.{name}={folder / name}.json" for name in ("instances", "captions"))]

    return make


def amber(annotations: object, queries: object = ({"id": 1, "image": "a.png", "query": "Describe."},)) -> Maker:
    """AMBER's files with this content."""

    def make(folder: Path) -> list[str]:
        (folder / "annotations.json").write_text(json.dumps(annotations))
        (folder / "query_all.json").write_text(json.dumps(queries))
        (folder / "relation.json").write_text(json.dumps({"dog": [], "cat": []}))
        (folder / "safe_words.txt").write_text("light")
        return [*EVALUATE, "task=amber", f"task.folder={folder}", f"task.images={pictures(folder)}"]

    return make


def mme(text: str) -> Maker:
    """MME's folders with this text for one picture."""

    def make(folder: Path) -> list[str]:
        (folder / "existence").mkdir()
        Image.new("RGB", (8, 8)).save(folder / "existence" / "a.png")
        (folder / "existence" / "a.txt").write_text(text)
        return [*EVALUATE, "task=mme", "task.source=files", f"task.folder={folder}", "task.categories=[existence]"]

    return make


def one_file(task: str, content: object, *more: str, lines: bool = False) -> Maker:
    """A task that reads one JSON file."""

    def make(folder: Path) -> list[str]:
        text = "\n".join(map(json.dumps, content)) if lines else json.dumps(content)
        (folder / "data.json").write_text(text)
        words = [f"task={task}", f"task.file={folder / 'data.json'}", f"task.images={pictures(folder)}", *more]
        return [*EVALUATE, *words]

    return make


def vocabulary(text: str) -> Maker:
    """A custom caption task with this vocabulary."""

    def make(folder: Path) -> list[str]:
        (folder / "words.yaml").write_text(text)
        rows = [{"image": "a.png", "question": "What?", "objects": []}]
        make_file = one_file(
            "custom", rows, "task.kind=caption", f"task.extraction={folder / 'words.yaml'}", lines=True
        )
        return make_file(folder)

    return make


def detector(change: Callable[[Path], None]) -> Maker:
    """A saved detector with something changed in its folder."""

    def make(folder: Path) -> list[str]:
        Detector().fit(*halves(token_table(60))).save(folder / "detector")
        change(folder / "detector")
        pictures(folder)
        words = [f"image={folder / 'outside.png'}", f"detector={folder / 'detector'}", "model.random_init=tiny"]
        return ["diagnose", *words, "question=What is there?"]

    return make


def manifest(**changes: object) -> Callable[[Path], None]:
    """Changes keys of a detector's manifest."""

    def change(folder: Path) -> None:
        file = folder / artifact.MANIFEST
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def finished(command: list[str], change: Callable[[Path], None]) -> Maker:
    """A finished run with something changed in its directory, beside a whole one."""

    def make(folder: Path) -> list[str]:
        run = folder / "runs" / "done"
        Evaluator(run_dir=run, features=TinyFeatures(), trace="all").run(TinyAdapter(), TinyTask(4))
        whole = shutil.copytree(run, run.with_name("whole"))
        change(run)
        return [word.replace("RUN", str(run)).replace("WHOLE", str(whole)) for word in command]

    return make


def line(number: int, **changes: object) -> Callable[[Path], None]:
    """Changes keys of one record."""

    def change(run: Path) -> None:
        rows = (run / "samples.jsonl").read_text().splitlines()
        rows[number] = json.dumps({**json.loads(rows[number]), **changes})
        (run / "samples.jsonl").write_text("\n".join(rows) + "\n")

    return change


def write(name: str, data: bytes) -> Callable[[Path], None]:
    """Puts bytes into a file."""
    return lambda folder: (folder / name).write_bytes(data) and None


def cut(name: str) -> Callable[[Path], None]:
    """Keeps the first half of a file."""
    return lambda folder: write(name, (folder / name).read_bytes()[: (folder / name).stat().st_size // 2])(folder)


def remove(name: str) -> Callable[[Path], None]:
    """Removes a file."""
    return lambda folder: (folder / name).unlink()
