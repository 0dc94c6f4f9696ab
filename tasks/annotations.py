"""Read annotation files: COCO's, and JSON and text by way of ``core.json_rows``. Errors are one line."""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from stethoscope.core.errors import DataError, unknown
from stethoscope.core.json_rows import clipped, read_json, read_rows, read_text, shown
from stethoscope.tasks.object_extraction import OBJECTS, MentionExtractor, mentions

__all__ = [
    "clipped",
    "image_id",
    "read_captions",
    "read_instances",
    "read_json",
    "read_rows",
    "read_text",
    "shown",
    "with_suffix",
]


SUFFIXES = {"lmms_eval": "\nAnswer the question using a single word or phrase."}
"""Suffixes by name: ``lmms_eval`` is that of lmms-eval's POPE and of LLaVA's own POPE file."""


def with_suffix(question: str, suffix: str) -> str:
    """Add a suffix, or the one of that name in ``SUFFIXES``, to a question.

    A blank comes between words where the command line has lost it.

    >>> with_suffix("Is there a dog?", "Answer yes or no."), with_suffix("Is it red?", "\\n(yes or no)")
    ('Is there a dog? Answer yes or no.', 'Is it red?\\n(yes or no)')
    >>> with_suffix("Is there a dog?", "lmms_eval")
    'Is there a dog?\\nAnswer the question using a single word or phrase.'
    """
    suffix = SUFFIXES.get(suffix, suffix)
    return question + (" " if suffix[:1].isalnum() else "") + suffix


# --- COCO -------------------------------------------------------------------------------------------------------------


def _read_lists(path: Path, keys: tuple[str, ...]) -> dict[str, list[dict[str, Any]]]:
    """Read an annotation file that has the given lists of objects.

    Raises:
        DataError: not JSON, or a list is missing.
    """
    data = read_json(path)
    for key in keys:
        if not isinstance(data, dict) or not isinstance(data.get(key), list):
            raise DataError(f"{path}: a COCO annotation file has a list {key!r}, this one does not")
    return data


def _field(path: Path, kind: str, index: int, row: Any, key: str) -> Any:
    """Return one value of a row; JSON of one line has no useful line number, so messages name the row's index."""
    if not isinstance(row, dict) or key not in row:
        raise DataError(f"{path}: {kind}[{index}] has no {key!r}")
    if isinstance(row[key], (list, dict)):
        raise DataError(f"{path}: {kind}[{index}], {key!r} should be a single value, not {shown(row[key])}")
    return row[key]


_IMAGE_ID = re.compile(r"(?:.*/)?(?:COCO_\w+_)?0*(\d+)(?:\.[A-Za-z]\w*)?")


def image_id(value: Any) -> int | str:
    """Normalise an id, which files write as a number, as its digits or as the name of COCO's file.

    >>> image_id(42), image_id("42"), image_id(42.0), image_id("COCO_val2014_000000000042.jpg"), image_id("cat.jpg")
    (42, 42, 42, 42, 'cat.jpg')
    """
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    digits = _IMAGE_ID.fullmatch(text)
    return int(digits[1]) if digits and digits[1].isascii() and len(digits[1]) < 20 else text


def read_instances(
    path: Path, synonyms: Mapping[str, str] | None = None
) -> tuple[dict[int | str, str], dict[int | str, frozenset[str]]]:
    """Read the images of a COCO file and the objects annotated in them.

    Args:
        path: COCO ``instances`` file: lists ``images`` (id, file_name), ``annotations`` (image_id, category_id) and
            ``categories`` (id, name).
        synonyms: lower-case name of a category -> name of the object, for a vocabulary of other objects than COCO's;
            categories that it lacks are left out. None for COCO's own, beside which there is none.

    Returns:
        Image id -> file name in the file's order; image id -> canonical names of the objects (empty set for none).

    Raises:
        DataError: the file is not of that form, has no image, or annotates a category that is not one of COCO's 80
            and no vocabulary is given.
    """
    data = _read_lists(path, ("images", "annotations", "categories"))
    images: dict[int | str, str] = {}
    for index, row in enumerate(data["images"]):
        image = image_id(_field(path, "images", index, row, "id"))
        if image in images:
            raise DataError(f"{path}: images[{index}] has the id {shown(row['id'])}, which is used before")
        images[image] = str(_field(path, "images", index, row, "file_name"))
    if not images:
        raise DataError(f"{path} lists no image")
    names = {
        str(_field(path, "categories", index, row, "id")): str(_field(path, "categories", index, row, "name"))
        for index, row in enumerate(data["categories"])
    }
    objects: dict[int | str, set[str]] = {image: set() for image in images}
    for index, row in enumerate(data["annotations"]):
        image = image_id(_field(path, "annotations", index, row, "image_id"))
        category = _field(path, "annotations", index, row, "category_id")
        name = names.get(str(category))
        if name is None:
            raise DataError(
                f"{path}: annotations[{index}] has category_id {shown(category)}, which is not among categories"
            )
        if synonyms is None and name not in OBJECTS:
            raise DataError(f"{path}: annotations[{index}]: {unknown('COCO object', clipped(name), OBJECTS)}")
        if image not in objects:
            name = shown(row["image_id"])
            raise DataError(f"{path}: annotations[{index}] has image_id {name}, which is not among images")
        name = name if synonyms is None else synonyms.get(" ".join(name.lower().split()))
        objects[image].update(() if name is None else (name,))
    return images, {image: frozenset(names) for image, names in objects.items()}


def read_captions(
    path: Path, images: Collection[int | str], extract: MentionExtractor = mentions
) -> Mapping[int | str, frozenset[str]]:
    """Read the objects that people named in the captions of some images.

    Args:
        path: COCO ``captions`` file: list ``annotations`` (image_id, caption).
        images: ids of the images to read captions of.
        extract: finds the objects that a caption names.

    Returns:
        Image id -> canonical names, for those of the images that have captions; how many have none is warned of.

    Raises:
        DataError: the file is not of that form, or has captions of none of the images.
    """
    wanted = set(images)
    objects: dict[int | str, set[str]] = defaultdict(set)
    for index, row in enumerate(_read_lists(path, ("annotations",))["annotations"]):
        image = image_id(_field(path, "annotations", index, row, "image_id"))
        caption = _field(path, "annotations", index, row, "caption")
        if image in wanted:
            objects[image].update(mention.name for mention in extract(str(caption)))
    if wanted and not objects:
        raise DataError(f"{path} has captions of none of the {len(wanted)} images")
    if len(objects) < len(wanted):
        warnings.warn(
            f"{path} has no caption of {len(wanted) - len(objects)} of {len(wanted)} images: "
            "what is in these is known from the annotated boxes alone",
            stacklevel=2,
        )
    return {image: frozenset(names) for image, names in objects.items()}
