"""Do relevancy and a detector notice that an object was taken out of the picture?

These are BEAF's pairs, with the same text twice.

    python scripts/check/beaf_causal.py                                    # embedded model, scenes and detector
    python scripts/check/beaf_causal.py --model MODEL --detector FOLDER --file beaf_qna.json --images images

BEAF compares answers before and after an object is erased. Here the *text* is held fixed and only the picture changes,
so that neither position nor wording nor what was named before can tell the two apart:

    description   the model's own description of the original, where it names the erased object, read with both pictures
    question      "Yes." to BEAF's question about the object, where that is the model's own answer to the original

For the token that begins the object's name (or the yes), before and after:

    mass          relevancy in the erased region over all relevancy of the picture, divided by the region's share of the
                  picture (1 is chance); ``falls`` is the share of pairs in which it is smaller afterwards
    p             the detector's probability that the mention is hallucinated; ``rises`` is the share of pairs in which
                  it is larger afterwards: the detector's AUROC with everything but the picture held fixed
    logprob       log-probability of the token, in nats; ``falls`` likewise

The control are mentions, in the same texts, of objects that stay: nothing should happen to them. The erased region is
where the pictures differ by more than ``--threshold`` grey values: exact for scenes, which are rendered with and
without the object, and for published pictures as good as their compression. 95 % intervals over originals.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image

import stethoscope
from stethoscope import testbed
from stethoscope.adapters.base import Adapter
from stethoscope.core.types import Generation, Sample
from stethoscope.detection.detector import Detector
from stethoscope.diagnosis.diagnosis import Diagnosis
from stethoscope.metrics.bootstrap import mean_interval
from stethoscope.tasks.base import ScoredSample
from stethoscope.tasks.beaf import Beaf, pairs

DESCRIBE = "Please describe this image in detail."
SEED = 11  # of the scenes; no detector has learned from them


def changed_region(before: Image.Image, after: Image.Image, threshold: float) -> np.ndarray:
    """Return which pixels of the original differ in the edited picture.

    Args:
        before: the original, RGB.
        after: the edited picture, RGB; it is scaled to the original's size.
        threshold: largest difference in grey values, of any channel, that counts as none.

    Returns:
        (height, width) bool.

    >>> black, white = Image.new("RGB", (4, 2)), Image.new("RGB", (4, 2))
    >>> white.putpixel((3, 0), (0, 9, 0))
    >>> changed_region(black, white, 8).nonzero()
    (array([0]), array([3]))
    """
    first, second = (np.asarray(image, np.int16) for image in (before, after.resize(before.size)))
    return np.abs(first - second).max(-1) > threshold


def mass_inside(heat: np.ndarray, region: np.ndarray) -> float:
    """Return the share of a heat map inside a region over the region's share of the picture.

    >>> mass_inside(np.array([[3.0, 1.0], [0.0, 0.0]]), np.array([[True, False], [False, False]]))
    3.0
    """
    return float((heat * region).sum() / max(heat.sum(), 1e-12) / region.mean())


class Edit:
    """An original, the same picture without one object, and the questions that are asked about both."""

    def __init__(self, questions: Sequence[tuple[Sample, Sample]]) -> None:
        """Sort the questions about one edited picture.

        Args:
            questions: every question about the original and about the edited picture.
        """
        labels = [((before.reference["label"], after.reference["label"]), before) for before, after in questions]
        self.group = questions[0][0].group
        self.images = [sample.image.load() for sample in questions[0]]
        asked = {pair: {s.reference["object"]: s.question for p, s in labels if p == pair} for pair, _ in labels}
        self.removed, self.kept = asked.get(("yes", "no"), {}), asked.get(("yes", "yes"), {})


def read_edits(task: Beaf) -> list[Edit]:
    """Return the edited pictures of a task from which an object that is asked about has been erased."""
    task.setup()
    samples: list[ScoredSample] = [(sample, {}) for sample in task.samples()]
    questions: dict[str, list[tuple[Sample, Sample]]] = {}
    for first, second in pairs(samples):
        after = samples[second][0]
        questions.setdefault(after.image.name, []).append((samples[first][0], after))
    return [edit for edit in map(Edit, questions.values()) if edit.removed]


def compare(diagnoses: Sequence[Diagnosis], region: np.ndarray, token: int, name: str, **about: Any) -> dict[str, Any]:
    """Make the row of one token.

    Args:
        diagnoses: of the same text with the original and with the edited picture.
        region: of the erased object.
        token: index in the answer.
        name: object that the token begins to name, if the detector is asked about it.
        about: further columns.
    """
    row = dict(about)
    for when, diagnosis in zip(("before", "after"), diagnoses, strict=True):
        verdicts = [mention.verdict for mention in diagnosis.mentions if mention.object == name and mention.verdict]
        row[f"mass_{when}"] = mass_inside(diagnosis.heat_map(token, raw=False), region)
        row[f"p_{when}"] = verdicts[0].probability if verdicts else np.nan
        row[f"logprob_{when}"] = diagnosis.answer.logprobs[token]
    return row


def read_description(
    edit: Edit, adapter: Adapter, detector: Detector | None, region: np.ndarray
) -> Iterator[dict[str, Any]]:
    """Yield a row for every object of the original's description, if it names one that is erased."""
    [answer] = adapter.generate([adapter.encode(edit.images[0], DESCRIBE)], Generation(max_new_tokens=128))
    diagnoses = [stethoscope.diagnose(adapter, image, DESCRIBE, answer.text, detector) for image in edit.images]
    named = {mention.object: mention.tokens[0] for mention in reversed(diagnoses[0].mentions)}
    if set(named) & set(edit.removed):
        for kind, objects in (("erased", edit.removed), ("stays", edit.kept)):
            for name in sorted(set(named) & set(objects)):
                about = {"group": edit.group, "reading": "description", "object": kind}
                yield compare(diagnoses, region, named[name], name, **about)


def read_questions(edit: Edit, adapter: Adapter, region: np.ndarray) -> Iterator[dict[str, Any]]:
    """Yield a row for the question about the erased object, and for one about an object that stays."""
    for kind, objects in (("erased", edit.removed), ("stays", dict(list(edit.kept.items())[:1]))):
        for question in objects.values():
            [reply] = adapter.generate([adapter.encode(edit.images[0], question)], Generation(max_new_tokens=8))
            if reply.text.lower().startswith("yes"):
                diagnoses = [stethoscope.diagnose(adapter, image, question, reply.text) for image in edit.images]
                about = {"group": edit.group, "reading": "question", "object": kind}
                yield compare(diagnoses, region, 0, "", **about)


def print_table(table: pd.DataFrame) -> None:
    """Print means and shares by reading and kind of object."""

    def interval(rows: pd.DataFrame, values: pd.Series) -> str:
        kept = values.notna()
        if not kept.any():
            return "-"
        return str(mean_interval(values[kept].to_numpy(float), rows.loc[kept, "group"].to_numpy()))

    for (reading, kind), rows in table.groupby(["reading", "object"]):
        originals = rows["group"].nunique()
        fate = "is erased" if kind == "erased" else kind
        print(f"{reading}, object that {fate}: {len(rows)} pairs, {originals} originals")
        for name, direction, sign in (("mass", "falls", -1), ("p", "rises", 1), ("logprob", "falls", -1)):
            before, after = rows[f"{name}_before"], rows[f"{name}_after"]
            change = (after - before) * sign
            share = ((change > 0) + 0.5 * (change == 0)).where(change.notna())
            print(
                f"  {name:<8} before {interval(rows, before):<24} after {interval(rows, after):<24} "
                f"{direction} {interval(rows, share)}"
            )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="testbed", help="name or folder of the model (default: %(default)s)")
    parser.add_argument("--detector", help="folder of a detector or of a run with one; testbed: its own")
    pictures = parser.add_mutually_exclusive_group()
    pictures.add_argument("--file", help="beaf_qna.json; without it, the embedded scenes")
    pictures.add_argument("--scenes", type=int, default=200, help="number of scenes (default: %(default)s)")
    parser.add_argument("--images", help="folder of BEAF's pictures, with --file")
    parser.add_argument("--edits", type=int, default=1, help="edited versions of each scene (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="number of edited pictures (default: all)")
    parser.add_argument("--threshold", type=float, help="grey values (default: 0 for scenes, 32 for files)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    files = {"source": "files", "file": options.file, "images": options.images} if options.file else {}
    task = Beaf(scenes=options.scenes, edits=options.edits, scene_seed=SEED, **files)
    edits = read_edits(task)[: options.limit]
    threshold = (32 if files else 0) if options.threshold is None else options.threshold
    folder = options.detector or (testbed.DETECTOR_DIR if options.model == "testbed" else None)
    detector, adapter = Detector.load(Path(folder)) if folder else None, stethoscope.load(options.model)
    table = []
    for edit in edits:
        region = changed_region(edit.images[0], edit.images[1], threshold)
        if region.any():
            table += [*read_description(edit, adapter, detector, region), *read_questions(edit, adapter, region)]
    print_table(pd.DataFrame(table))


if __name__ == "__main__":
    main()
