"""Rendered scenes in the authors' file formats, with ground truth that the scenes themselves give."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from stethoscope import testbed
from stethoscope.testbed import Scene


def dump(path: Path, rows: list[dict], lines: bool = False) -> Path:
    """A JSON list, or JSON lines."""
    text = "".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows, indent=1)
    path.write_text(text)
    return path


def absent(scene: Scene) -> str:
    """The object that the scene does not show but that usually stands beside what it shows."""
    asked = testbed.pope_questions([scene], "adversarial", per_scene=1)
    return next(row["text"] for row in asked if row["label"] == "no").partition(" in ")[0].split(maxsplit=3)[3]


def amber(folder: Path, scenes: Sequence[Scene]) -> list[str]:
    """AMBER's files in ``folder``, its images in ``folder/image``; gives the words that choose them."""
    (folder / "image").mkdir(parents=True)
    words = [name for name in testbed.CATEGORIES if " " not in name]
    (folder / "relation.json").write_text(json.dumps({word: [] for word in words} | {"person": ["man", "woman"]}))
    (folder / "safe_words.txt").write_text("light\nindividual")
    annotations, queries = [], []

    def add(image: str, query: str, kind: str, truth: object, **more: object) -> None:
        annotations.append({"id": len(annotations) + 1, "type": kind, "truth": truth, **more})
        queries.append({"id": len(queries) + 1, "image": image, "query": query})

    for number, scene in enumerate(scenes, 1):
        image = f"AMBER_{number}.jpg"
        scene.image().save(folder / "image" / image, quality=95)
        truth, hallu = [w for w in words if w in scene.visible], [w for w in words if w not in scene.visible][:3]
        add(image, "Please describe this image in detail.", "generative", truth, hallu=hallu)
        visible = scene.visible[0]
        add(image, f"Is there a {absent(scene)} in the image?", "discriminative-hallucination", "no")
        add(image, f"Is there a {visible} in the image?", "discriminative-attribute-state", "yes")
        add(image, f"Is there a {absent(scene)} in the image?", "discriminative-attribute-action", "no")
        add(image, f"Is there a {absent(scene)} in the image?", "relation", "no")
        add(image, f"Is there a {visible} in the image?", "discriminative-relation", "yes")
    dump(folder / "annotations.json", annotations)
    dump(folder / "query_all.json", queries)
    return ["task=amber", f"task.folder={folder}", f"task.images={folder / 'image'}"]


def mme(folder: Path, scenes: Sequence[Scene]) -> list[str]:
    """MME's folders: two questions about every image, the same images in every category."""
    for category in ("existence", "count", "position", "color"):
        (folder / category).mkdir(parents=True)
        for number, scene in enumerate(scenes):
            scene.image().save(folder / category / f"{number:04d}.jpg", quality=95)
            asked = [(scene.visible[0], "Yes"), (absent(scene), "No")]
            lines = [f"Is there a {name} in the image?\t{truth}" for name, truth in asked]
            (folder / category / f"{number:04d}.txt").write_text("\n".join(lines) + "\n")
    return ["task=mme", f"task.folder={folder}"]


def hallusion_bench(folder: Path, scenes: Sequence[Scene]) -> list[str]:
    """HallusionBench's file and folder: sets of two figures, both asked about the same two objects."""
    rows = []
    for set_id, (first, other) in enumerate(zip(scenes[::2], scenes[1::2], strict=True)):
        category, subcategory = ("VD", "illusion") if set_id % 2 == 0 else ("VS", "map")
        target = folder / "hallusion_bench" / category / subcategory
        target.mkdir(parents=True, exist_ok=True)
        common = {"category": category, "subcategory": subcategory, "set_id": str(set_id), "sample_note": ""}
        if category == "VS":
            more = {"visual_input": "0", "figure_id": "0", "question_id": "0", "question": "Is it?", "gt_answer": "1"}
            rows.append({**common, **more})
        for figure, scene in enumerate((first, other), 1):
            scene.image().save(target / f"{set_id}_{figure}.png")
            for question, name in enumerate((first.visible[0], absent(first))):
                more = {"visual_input": str(figure), "figure_id": str(figure), "question_id": str(question)}
                truth = str(int(name in scene.visible))
                asked = f"Is there a {name} in the image?"
                rows.append({**common, **more, "question": asked, "gt_answer": truth, "gt_answer_details": ""})
    file = dump(folder / "HallusionBench.json", rows)
    return ["task=hallusion_bench", f"task.file={file}", f"task.images={folder / 'hallusion_bench'}"]


def halloc(folder: Path, scenes: Sequence[Scene]) -> list[str]:
    """Answers that name what is there and what is not, the latter marked as an object or as an attribute."""
    folder.mkdir(parents=True)
    rows = []
    for index, scene in enumerate(scenes):
        scene.image().save(folder / f"{scene.id}.png")
        answer = f"A {scene.visible[0]} and a {absent(scene)}."
        start = answer.index(absent(scene), len(f"A {scene.visible[0]} and a"))
        kind = ("object", "attribute")[index % 2]
        spans = [{"start": start, "end": start + len(absent(scene)), "type": kind}]
        question = "Please describe this image in detail."
        rows.append({"image": f"{scene.id}.png", "question": question, "answer": answer, "spans": spans})
    return ["task=halloc", f"task.file={dump(folder / 'halloc.jsonl', rows, lines=True)}", f"task.images={folder}"]
