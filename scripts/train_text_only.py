"""Train the text-only detector that ships, and judge its recipe on unseen families.

    python scripts/train_text_only.py ../shared/data/real_captions           # train and ship
    python scripts/train_text_only.py ../shared/data/real_captions --judge   # print the tables of docs/captions.md

The folder has JSON lines (`image_id`, `caption`, `model`) and `objects.json` (image id -> objects that are there).
To judge, every family of models is held out in turn: the detector learns from captions of the other families and of
other images. Columns, vocabulary and settings were chosen on half of the images (`development`), and the tables are
about the other half, which no choice has seen. The shipped detector learns from all of it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

import stethoscope.detection
from stethoscope.core.token_table import Repeats
from stethoscope.detection.baselines import NamePrior, PositionOnly, TextPrior
from stethoscope.detection.caption_objects import ReadCaption, read_caption
from stethoscope.detection.score_metrics import evaluate_scores
from stethoscope.detection.text_only import SHIPPED, TextOnlyDetector
from stethoscope.metrics.bootstrap import group_weights, mean_interval, split_groups
from stethoscope.tasks.object_extraction import OBJECTS

FOLDS = 3
SCORES = ("position only", "position, repetition, name", "text prior", "text-only detector")
METRICS = {"auroc": "AUROC", "auroc_controlled": "position-controlled", "ece": "ECE"}
PARTS = (0, 20, 40, 60, 80, 120)
"""First words of the parts of an answer in the table of hallucination rates."""


class Caption(NamedTuple):
    """A caption as it was read, with its origin."""

    read: ReadCaption
    image: str
    family: str


def main() -> None:
    """Train and save the shipped detector, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the captions and objects.json")
    parser.add_argument("--judge", action="store_true", help="print the tables instead of training")
    parser.add_argument("--images", choices=("fresh", "development", "all"), default="fresh", help="to judge on")
    parser.add_argument("--repeats", choices=("first", "all"), default="first", help="mentions to judge")
    options = parser.parse_args()
    captions, truth = load(options.folder)
    if not options.judge:
        return ship(captions, truth)
    if options.images == "development":  # a choice must not see the other half, not even in what is learned from
        captions = [caption for caption in captions if development(caption.image)]
    images = {caption.image for caption in captions if options.images != "fresh" or not development(caption.image)}
    table = judge_families(captions, truth, images, options.repeats)
    print_families(table)
    print_parts(table)


def load(folder: Path) -> tuple[list[Caption], dict[str, set[str]]]:
    """Read all captions, and the objects of every image."""
    truth = {image: set(names) for image, names in json.loads((folder / "objects.json").read_text()).items()}
    rows = [
        json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text("utf-8").splitlines()
    ]
    families = [row["model"].removesuffix("-7B") for row in rows]
    return [
        Caption(read_caption(row["caption"]), str(row["image_id"]), family)
        for row, family in zip(rows, families, strict=True)
    ], truth


def development(image: str) -> bool:
    """Return whether an image belongs to the half on which the recipe was chosen."""
    return int(hashlib.blake2b(f"dev:{image}".encode(), digest_size=4).hexdigest(), 16) < 2**31


def train(captions: Sequence[Caption], truth: Mapping[str, set[str]], **facts: object) -> TextOnlyDetector:
    """Train a detector on captions."""
    presence = np.array([[float(name in truth[caption.image]) for name in OBJECTS] for caption in captions])
    groups = np.array([caption.image for caption in captions])
    return TextOnlyDetector().fit_read([caption.read for caption in captions], presence, groups, facts)


def ship(captions: Sequence[Caption], truth: Mapping[str, set[str]]) -> None:
    """Train on everything and replace the file of the package."""
    families = sorted({caption.family for caption in captions})
    detector = train(captions, truth, families=families, data="COCO captions of 12 published files")
    path = Path(stethoscope.detection.__path__[0]) / SHIPPED
    detector.save(path)
    print(f"wrote {path}: {detector.facts}")


def table_of(captions: Sequence[Caption], truth: Mapping[str, set[str]], repeats: Repeats = "first") -> pd.DataFrame:
    """Make a table as of an answer's tokens, a row for every mention; positions are words, not tokens.

    Of the columns only ``family`` and ``row`` (of the object among all objects) are not those of a run.
    """
    rows: list[dict[str, object]] = []
    start = 0
    for number, (read, image, family) in enumerate(captions):
        seen = dict.fromkeys(read.mention_objects, 0)
        for index, mention in enumerate(read.mentions):
            object_index = read.mention_objects[index]
            if repeats == "all" or not seen[object_index]:
                rows.append(
                    {
                        "task": "captions", "sample_id": str(number), "family": family, "row": start + object_index,
                        "group": image, "token": read.mention_words[index], "object": mention.name,
                        "label": int(mention.name not in truth[image]), "mention_index": index,
                        "repeat_index": seen[object_index], "is_first_subtoken": True,
                    }
                )  # fmt: skip
            seen[object_index] += 1
        start += len(read.objects)
    return pd.DataFrame(rows)


def judge_families(
    captions: Sequence[Caption], truth: Mapping[str, set[str]], images: set[str], repeats: Repeats
) -> pd.DataFrame:
    """Judge the mentions of every family by what was learned from other families and other images.

    Args:
        captions: of all families.
        truth: objects by image.
        images: to judge on; the others are only learned from.
        repeats: ``first`` or ``all`` mentions of an object.

    Returns:
        The judged rows of ``table_of`` with a column for each of ``SCORES``.
    """
    groups = np.array([caption.image for caption in captions])
    families = np.array([caption.family for caption in captions])
    judged = np.isin(groups, list(images))
    parts = []
    for mask in split_groups(groups, {str(fold): 1 / FOLDS for fold in range(FOLDS)}, seed=1).values():
        fold = mask & judged
        for family in np.unique(families):
            known = [captions[index] for index in np.flatnonzero(~fold & (families != family)).tolist()]
            asked = [captions[index] for index in np.flatnonzero(fold & (families == family)).tolist()]
            learned, table = table_of(known, truth, repeats), table_of(asked, truth, repeats)
            baselines = [baseline(repeats).fit(learned) for baseline in (PositionOnly, NamePrior, TextPrior)]
            detector = train(known, truth)
            values = [
                *(baseline.predict(table) for baseline in baselines),
                detector.predict_objects([caption.read for caption in asked])[table["row"]],
            ]
            scores = dict(zip(SCORES, values, strict=True))
            parts.append(table.assign(**scores))
            print(f"{family}: {len(asked)} captions judged, {len(known)} learned from", flush=True)
    return pd.concat(parts, ignore_index=True)


def print_families(table: pd.DataFrame) -> None:
    """Print a Markdown table of the metrics of all scores, for every family and for all together."""
    print(f"\n| held-out family | mentions, hallucinated | score | {' | '.join(METRICS.values())} |")
    print("| --- " * (3 + len(METRICS)) + "|")
    for family in [*sorted(table["family"].unique()), "all, each held out"]:
        rows = table if family.startswith("all") else table[table["family"] == family]
        resamples = group_weights(rows["group"].to_numpy(dtype=str))
        figures = evaluate_scores(rows, {name: rows[name].to_numpy() for name in SCORES}, resamples)
        for name in SCORES:
            cells = [_short(str(resamples.interval(figures[name, metric]))) for metric in METRICS]
            head = f"{family} | {len(rows)}, {rows['label'].mean():.0%}" if name == SCORES[0] else " | "
            print(f"| {head} | {name} | {' | '.join(cells)} |")


def print_parts(table: pd.DataFrame) -> None:
    """Print the share of hallucinated mentions by place in the answer, for every family.

    The table is Markdown.
    """
    names = [f"{first}-{end - 1}" for first, end in pairwise(PARTS)] + [f"{PARTS[-1]} and later"]
    print(f"\n| family | {' | '.join(f'words {name}' for name in names)} |")
    print("| --- " * (1 + len(names)) + "|")
    part = np.searchsorted(PARTS, table["token"], side="right") - 1
    for family in sorted(table["family"].unique()):
        cells = []
        for index in range(len(PARTS)):
            rows = table[(part == index) & (table["family"] == family)]
            share = mean_interval(rows["label"], rows["group"]) if len(rows) >= 20 else None
            cells.append("" if share is None else _short(str(share)))
        print(f"| {family} | {' | '.join(cells)} |")


def _short(text: str) -> str:
    """Leave out the zero before the point.

    >>> _short("0.850 [0.812, 1.000]")
    '.850 [.812, 1.000]'
    """
    return text.replace("0.", ".")


if __name__ == "__main__":
    main()
