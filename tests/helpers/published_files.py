"""Rendered scenes in the authors' file formats, with ground truth that the scenes themselves give."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path

from helpers.parquet_folder import write_split
from stethoscope import testbed
from stethoscope.testbed import Scene

SUBSETS = ("random", "popular", "adversarial")


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


def dash_b(folder: Path, scenes: Sequence[Scene]) -> list[str]:
    """DASH-B's folder: every scene without and with an object, in two sources."""
    for part in ("neg", "pos"):
        sources: dict[str, dict[str, list[str]]] = {"coco": {}, "imagenet": {}}
        for index, scene in enumerate(scenes):
            name, source = (absent(scene), scene.visible[0])[part == "pos"], ("coco", "imagenet")[index % 2]
            sources[source].setdefault(name, []).append(f"{scene.id}.png")
            target = folder / part / source / name
            target.mkdir(parents=True, exist_ok=True)
            scene.image().save(target / f"{scene.id}.png")
        (folder / f"dash_benchmark_{part}.json").write_text(json.dumps(sources, indent=4))
    return ["task=dash_b", f"task.folder={folder}", "task.question='Is there a {object} in the image?'"]


def scene_pairs(scenes: Sequence[Scene]) -> list[tuple[Scene, Scene, str, str]]:
    """Pairs of scenes, each with an object that the other does not show."""
    pairs = []
    for first, second in zip(scenes[::2], scenes[1::2], strict=True):
        own, other = ([n for n in a.visible if n not in b.visible] for a, b in ((first, second), (second, first)))
        if own and other:
            pairs.append((first, second, own[0], other[0]))
    return pairs


def natural_bench(folder: Path, scenes: Sequence[Scene]) -> list[str]:
    """NaturalBench's table with pictures in base64: two scenes, an object of each, four rows a group."""
    folder.mkdir(parents=True)
    lines = ["index\timage\tquestion\tanswer\ttype\tsource"]
    for group, (*pair, name, other) in enumerate(scene_pairs(scenes)):
        cells = []
        for scene in pair:
            scene.image().save(folder / f"{scene.id}.png")
            cells.append(base64.b64encode((folder / f"{scene.id}.png").read_bytes()).decode())
        for position in range(4):
            question, image = divmod(position, 2)
            asked = f"Is there a {(name, other)[question]} in the image?"
            answer = ("No", "Yes")[question == image]
            lines.append("\t".join([str(4 * group + position), cells[image], asked, answer, "yes_no", "x"]))
    file = folder / "NaturalBenchDataset.tsv"
    file.write_text("\n".join(lines) + "\n")
    return ["task=natural_bench", "task.source=files", f"task.file={file}", "task.suffix=false"]


def mmvp(folder: Path, scenes: Sequence[Scene]) -> list[str]:
    """MMVP's table and folder: pairs of scenes with one question, of which option (a) is right for the first."""
    images = folder / "MMVP Images"
    images.mkdir(parents=True)
    lines = ["Index,Question,Options,Correct Answer"]
    for *pair, name, other in scene_pairs(scenes):
        for scene, letter in zip(pair, "ab", strict=True):
            index = len(lines)
            scene.image().save(images / f"{index}.jpg", quality=95)
            lines.append(f'{index},"Is there a {name}, or a {other}, in the image?",(a) {name} (b) {other},({letter})')
    file = folder / "Questions.csv"
    file.write_text("\n".join(lines) + "\n")
    return ["task=mmvp", "task.source=files", f"task.file={file}", f"task.images={images}"]


def beaf(folder: Path, scenes: Sequence[Scene]) -> list[str]:
    """BEAF's file and images: originals as JPEG, edited scenes as <original>_NN.png."""
    (folder / "images").mkdir(parents=True)
    rows, versions = testbed.removal_questions(scenes)
    originals = {row["image"] for row in rows if row["orig_img"]}
    names = {name: name.replace(".png", ".jpg") if name in originals else name for name in versions}
    for name, scene in versions.items():
        scene.image().save(folder / "images" / names[name], quality=95)
    file = dump(folder / "beaf_qna.json", [{**row, "image": names[row["image"]]} for row in rows])
    return ["task=beaf", "task.source=files", f"task.file={file}", f"task.images={folder / 'images'}"]


def phd(folder: Path, scenes: Sequence[Scene]) -> list[str]:
    """PhD's file and folders: scenes in train2014 and val2014 with both contexts, and some as CCS images."""
    for part in ("train2014", "val2014", "CCS_images"):
        (folder / "images" / part).mkdir(parents=True)
    rows: list[dict] = []
    for index, scene in enumerate(scenes):
        part, visible, missing = ("train2014", "val2014")[index % 2], scene.visible[0], absent(scene)
        row = {
            "image_id": str(index),
            "task": ("object recognition", "counting")[index % 2],
            "yes_question": f"Is there a {visible} in the image?",
            "no_question": f"Is there a {missing} in the image?",
        }
        if index % 3 == 0:
            scene.image().save(folder / "images" / "CCS_images" / f"{index}.png")
            rows.append({**row, "ccs_description": "Odd."})
        else:
            scene.image().save(folder / "images" / part / f"COCO_{part}_{index:012d}.jpg", quality=95)
            context = {"iac": f"A {missing} is often seen.", "icc": f"There is a {missing}."}
            rows.append({**row, "hitem": missing, "gt": visible, "subject": visible, "context": context})
    return ["task=phd", f"task.file={dump(folder / 'data.json', rows)}", f"task.images={folder / 'images'}"]


def humble_bench(folder: Path, scenes: Sequence[Scene]) -> list[str]:
    """HumbleBench's lines: four options, of which one is in the picture or none."""
    folder.mkdir(parents=True)
    rows = []
    for index, scene in enumerate(scenes):
        scene.image().save(folder / f"{scene.id}.png")
        options = [name for name in testbed.CATEGORIES if name not in scene.visible][:4]
        label = "ABCDE"[index % 5]
        if label != "E":
            options["ABCD".index(label)] = scene.visible[0]
        lines = [f"{letter}. {text}" for letter, text in zip("ABCDE", [*options, "None of the above"], strict=True)]
        question, kind = "\n".join(["What is in the image?", *lines]), ("Object", "Relation", "Attribute")[index % 3]
        more = {"type": kind, "question_id": index, "file_name": f"{scene.id}.png"}
        rows.append({"label": label, "question": question, **more})
    file = dump(folder / "metadata.jsonl", rows, lines=True)
    return ["task=humble_bench", "task.source=files", f"task.file={file}", f"task.images={folder}"]


def pope(folder: Path, scenes: Sequence[Scene]) -> list[str]:
    """POPE's files, and RePOPE's: every sixth question is left out, every seventh has the other label."""
    testbed.export(folder, scenes)
    (folder / "repope").mkdir()
    for subset in SUBSETS:
        rows = [json.loads(line) for line in (folder / f"coco_pope_{subset}.json").read_text().splitlines()]
        for row in rows[::7]:
            row["label"] = "no" if row["label"] == "yes" else "yes"
        kept = [row for row in rows if row["question_id"] % 6]
        dump(folder / "repope" / f"coco_repope_{subset}.json", kept, lines=True)
    return [
        "task=pope", "task.source=files", f"task.questions={folder}", f"task.images={folder / 'images'}",
        f"task.repope={folder / 'repope'}", "task.labels=both",
    ]  # fmt: skip


def pope_nine(folder: Path, scenes: Sequence[Scene]) -> list[str]:
    """POPE's files for three origins of pictures; those of A-OKVQA and GQA are one list each."""
    testbed.export(folder, scenes)
    for subset in SUBSETS:
        rows = [json.loads(line) for line in (folder / f"coco_pope_{subset}.json").read_text().splitlines()]
        for origin in ("aokvqa", "gqa"):
            (folder / f"{origin}_pope_{subset}.json").write_text(json.dumps(rows, indent=4))
    for origin in ("coco", "aokvqa", "gqa"):
        (folder / origin).symlink_to(folder / "images")
    return ["task=pope_nine", f"task.questions={folder}", f"task.images={folder}/{{origin}}"]


def _pictures(scenes: Sequence[Scene]) -> list[bytes]:
    files = [io.BytesIO() for _ in scenes]
    for scene, file in zip(scenes, files, strict=True):
        scene.image().save(file, "PNG")
    return [file.getvalue() for file in files]


def h_pope(folder: Path, scenes: Sequence[Scene]) -> list[str]:
    """H-POPE's columns in one Parquet file, with questions that the embedded model reads."""
    rows = []
    for index, scene in enumerate(scenes):
        for variant, name in (("positive", scene.visible[0]), ("negative", absent(scene))):
            label = int(variant == "positive")
            asked = {"question": f"Is there a {name} in the image?", "attribute": "left", "object": name}
            truth = {"answer": ("No", "Yes")[label], "label": label, "variant": variant}
            rows.append({"image_id": index, "question_id": f"{index}-{label}", **asked, **truth})
    pictures = [data for data in _pictures(scenes) for _ in range(2)]
    return ["task=h_pope", f"task.dataset={write_split(folder, rows, pictures, 'data-00000-of-00001')}"]


def hub_choice(folder: Path, scenes: Sequence[Scene]) -> list[str]:
    """Multiple-choice questions with a list of options, as CRPE has them, in one Parquet file."""
    rows = []
    for index, scene in enumerate(scenes):
        options = [name for name in testbed.CATEGORIES if name not in scene.visible][:3]
        options.insert(index % 4, scene.visible[0])
        rows.append(
            {"text": "What is in the image?", "options": options, "correct": "ABCD"[index % 4], "part": "exist"}
        )
    dataset = write_split(folder, rows, _pictures(scenes), "test")
    columns = ["task.question=text", "task.label=correct", "task.options=options", "task.subset=part"]
    return ["task=hub_choice", f"task.dataset={dataset}", *columns, "task.letters=ABCD", "task.parser=leading_letter"]


def mhal_detect(folder: Path, scenes: Sequence[Scene]) -> list[str]:
    """M-HalDetect's file and COCO's folder: descriptions with a right, an invented and an unjudged phrase."""
    (folder / "val2014").mkdir(parents=True)
    rows = []
    for index, scene in enumerate(scenes):
        scene.image().save(folder / "val2014" / f"COCO_val2014_{index:012d}.jpg", quality=95)
        right, invented, doubtful = f"A {scene.visible[0]}", f"and a {absent(scene)}", "in the image"
        answer, segments = f"{right} {invented} {doubtful}.", []
        for text, label in ((right, "ACCURATE"), (invented, "INACCURATE"), (doubtful, "UNSURE")):
            start = answer.index(text)
            segments.append({"start": start, "end": start + len(text), "text": text, "label": label})
        question = "Please describe this image in detail."
        rows.append({"question": question, "response": answer, "image": index, "annotations": segments})
    file = dump(folder / "val_raw.json", rows)
    return ["task=mhal_detect", "task.source=files", f"task.file={file}", f"task.images={folder / 'val2014'}"]


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
