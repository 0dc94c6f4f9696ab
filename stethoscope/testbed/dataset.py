"""Create held-out scenes, POPE questions, a ``datasets.Dataset``, and COCO and POPE files."""

from __future__ import annotations

import collections
import functools
import json
import pathlib
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from stethoscope.core.files import write_json
from stethoscope.testbed import language
from stethoscope.testbed.drawing import SIZE
from stethoscope.testbed.scene import MODES, Scene, sample_categories, scene_at
from stethoscope.testbed.vocabulary import CATEGORIES, COCO_IDS, INDEX, SETTINGS

if TYPE_CHECKING:
    import datasets

EVALUATION_SEED = 20_000
"""Default seed of ``scenes``. Training uses seeds below 1,000, validation during development those from 10,000."""

POPE_SPLITS = ("random", "popular", "adversarial")


def scenes(n: int, mode: str = "counter", *, seed: int = EVALUATION_SEED) -> list[Scene]:
    """Sample held-out scenes.

    Args:
        n: how many. Scene i does not depend on n.
        mode: ``counter`` breaks the co-occurrence priors (the hard and default case), ``prior`` follows them,
            ``collage`` has none.
        seed: stream of scenes.

    Returns:
        Scenes named ``<mode>-<index>``, with the seed in between if it is not the default one.

    Raises:
        ValueError: ``n`` is negative or ``mode`` unknown.

    >>> [scene.id for scene in scenes(2)]
    ['counter-000000', 'counter-000001']
    """
    if n < 0:
        raise ValueError(f"n must not be negative, got {n}")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    name = mode if seed == EVALUATION_SEED else f"{mode}-s{seed}"
    return [scene_at(i, mode, seed, name=name) for i in range(n)]


def pope_questions(scenes: Sequence[Scene], split: str, *, seed: int = 0, per_scene: int = 3) -> list[dict[str, Any]]:
    """Create yes/no questions as in POPE (Li et al. 2023, section 4).

    Each scene gets min(``per_scene``, number of visible objects) questions about visible objects and as many about
    absent ones. Absent objects are drawn at random (``random``), by how many of the given scenes contain them
    (``popular``), or by how often they co-occur with the visible ones in the training distribution
    (``adversarial``).

    Args:
        scenes: scenes to ask about.
        split: ``random``, ``popular`` or ``adversarial``.
        seed: seed of the random choices; positives are the same in all splits.
        per_scene: maximum number of positives per scene.

    Returns:
        Records with question_id (from 1), image (file name), text, label ("yes" or "no") and object.

    Raises:
        ValueError: ``split`` is unknown.
    """
    if split not in POPE_SPLITS:
        raise ValueError(f"split must be one of {', '.join(POPE_SPLITS)}, got {split!r}")
    popularity: collections.Counter[str] = collections.Counter()
    if split == "popular":
        popularity.update(name for scene in scenes for name in scene.visible)
    records: list[dict[str, Any]] = []
    for scene in scenes:
        rng = random.Random(f"pope/{seed}/{scene.id}")
        count = min(per_scene, len(scene.visible))
        present = rng.sample(scene.visible, count)
        absent = [name for name in CATEGORIES if name not in scene.visible]
        rng.shuffle(absent)  # random order, and random order among equals in the sorts below
        if split == "popular":
            absent.sort(key=lambda name: -popularity[name])
        elif split == "adversarial":
            company = co_occurrence()[[INDEX[name] for name in scene.visible]].sum(0)
            absent.sort(key=lambda name: -company[INDEX[name]])
        for name, label in zip([*present, *absent[:count]], ["yes"] * count + ["no"] * count, strict=True):
            records.append(
                {
                    "question_id": len(records) + 1,
                    "image": f"{scene.id}.png",
                    "text": language.pope_question(name),
                    "label": label,
                    "object": name,
                }
            )
    return records


def removal_questions(scenes: Sequence[Scene], edits: int = 2) -> tuple[list[dict[str, Any]], dict[str, Scene]]:
    """Create yes/no questions about scenes and the same scenes without one object, as in BEAF (Ye-Bin et al. 2024).

    Every version of a scene is asked about every object that the scene shows, and about as many that it does not
    show but that usually stand beside those. Scenes with a single object are left out.

    Args:
        scenes: scenes to ask about.
        edits: maximum number of edited versions per scene, each without another object.

    Returns:
        Records with id (from 0), image (file name), question, orig_img, removed_q (whether it asks about an object that
        some version lacks) and gt ("yes" or "no"); file name -> scene, originals first.
    """
    records: list[dict[str, Any]] = []
    versions: dict[str, Scene] = {}
    for scene in scenes:
        count = min(edits, len(scene.visible) - 1)
        if count < 1:
            continue
        removed = random.Random(f"beaf/{scene.id}").sample(scene.visible, count)
        pope = pope_questions([scene], "adversarial", per_scene=len(scene.visible))
        asked = [*scene.visible, *(record["object"] for record in pope if record["label"] == "no")]
        edited = [(f"{scene.id}_{i:02d}", name) for i, name in enumerate(removed)]
        for version in (scene, *(scene.without(name, id) for id, name in edited)):
            versions[f"{version.id}.png"] = version
            records += [
                {
                    "id": len(records) + i,
                    "image": f"{version.id}.png",
                    "question": language.pope_question(name),
                    "orig_img": version is scene,
                    "removed_q": name in removed,
                    "gt": "yes" if name in version.visible else "no",
                }
                for i, name in enumerate(asked)
            ]
    return records, versions


@functools.cache
def co_occurrence(samples: int = 4000) -> np.ndarray:
    """Estimate how often categories co-occur in the training distribution.

    Returns:
        float, (32, 32): share of the scenes with the row's category that also have the column's; the diagonal is 0.
    """
    rng, settings = random.Random("co-occurrence"), list(SETTINGS)
    present = np.zeros((samples, len(CATEGORIES)))
    for scene in present:
        scene[[INDEX[name] for name in sample_categories(rng, rng.choice(settings), "prior")]] = 1
    together = present.T @ present
    frequency = np.maximum(together.diagonal().copy(), 1)
    np.fill_diagonal(together, 0)
    return together / frequency[:, None]


def as_dataset(scenes: Sequence[Scene]) -> datasets.Dataset:
    """Convert scenes to a Hugging Face dataset.

    Returns:
        Columns image (decoded to PIL), id, setting, objects (visible categories), captions (five references) and
        questions (POPE's of all splits, as a list of records with split).
    """
    import datasets

    questions: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    for split in POPE_SPLITS:
        for record in pope_questions(scenes, split):
            questions[record["image"]].append({"split": split, **record})
    rows = {
        "image": [scene.image() for scene in scenes],
        "id": [scene.id for scene in scenes],
        "setting": [scene.setting for scene in scenes],
        "objects": [list(scene.visible) for scene in scenes],
        "captions": [language.reference_captions(scene) for scene in scenes],
        "questions": [questions[f"{scene.id}.png"] for scene in scenes],
    }
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())


def export(folder: str | pathlib.Path, scenes: Sequence[Scene]) -> pathlib.Path:
    """Write scenes as published benchmark files.

    Args:
        folder: to write to: ``images/<id>.png``, ``instances.json`` and ``captions.json`` (COCO 2014 annotation
            format) and ``coco_pope_<split>.json`` (POPE's JSON lines).
        scenes: to write.

    Returns:
        The folder. CHAIR's ground truth read from these files (instances and objects named by the reference captions)
        is exactly ``scene.visible``.
    """
    folder = pathlib.Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    instances: list[dict[str, Any]] = []
    captions: list[dict[str, Any]] = []
    for image_id, scene in enumerate(scenes, start=1):
        file_name = f"{scene.id}.png"
        scene.image().save(folder / "images" / file_name)
        images.append({"id": image_id, "file_name": file_name, "width": SIZE, "height": SIZE})
        for instance in _instances(scene):
            instances.append({"id": len(instances) + 1, "image_id": image_id, **instance})
        for caption in language.reference_captions(scene):
            captions.append({"id": len(captions) + 1, "image_id": image_id, "caption": caption})
    info = {"description": "stethoscope testbed scenes", "version": "1"}
    categories = [{"id": coco_id, "name": name, "supercategory": "object"} for name, coco_id in COCO_IDS.items()]
    base = {"info": info, "licenses": [], "images": images}
    write_json(folder / "instances.json", {**base, "annotations": instances, "categories": categories}, indent=None)
    write_json(folder / "captions.json", {**base, "annotations": captions}, indent=None)
    for split in POPE_SPLITS:
        lines = (
            json.dumps({key: record[key] for key in ("question_id", "image", "text", "label")})
            for record in pope_questions(scenes, split)
        )
        (folder / f"coco_pope_{split}.json").write_text("".join(line + "\n" for line in lines))
    return folder


def _instances(scene: Scene) -> list[dict[str, Any]]:
    """Create COCO annotations of the visible objects, without ids; boxes are tight around the visible pixels."""
    mask, records = scene.mask(), []
    for name in scene.visible:
        rows, columns = np.nonzero(mask == 1 + INDEX[name])
        x, y = int(columns.min()), int(rows.min())
        records.append(
            {
                "category_id": COCO_IDS[name],
                "bbox": [x, y, int(columns.max()) - x + 1, int(rows.max()) - y + 1],
                "area": len(rows),
                "segmentation": [],
                "iscrowd": 0,
            }
        )
    return records
