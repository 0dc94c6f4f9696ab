"""Add a benchmark: two questions about every image, one right answer is not enough.

PYTHONPATH=examples stethoscope evaluate --config-dir examples/conf plugins=[custom_task] task=both_right
"""

from collections.abc import Sequence

from stethoscope import testbed
from stethoscope.core.types import Answer, ImageRef, Sample, Score
from stethoscope.tasks import yes_no
from stethoscope.tasks.base import ScoredSample, Tally, Task


class BothRight(Task):
    """Ask of every scene for an object that is there and for one that is not."""

    name, version, primary = "both_right", "1", "pairs"
    max_new_tokens = 8

    def __init__(self, scenes: int = 100) -> None:
        self.scenes = scenes

    def samples(self) -> list[Sample]:
        """Return all samples in a fixed order. `group` is the image: intervals and data splits go by it."""
        return [
            Sample(
                id=f"{scene.id}-{label}",
                image=ImageRef(f"{scene.id}.png", scene.image),
                question=f"Is there a {name} in the image?",
                group=scene.id,
                subset=label,
                reference={"label": label},
            )
            for scene in testbed.scenes(self.scenes)
            if scene.visible
            for label, name in (("yes", scene.visible[0]), ("no", self._absent(scene)))
        ]

    def score(self, sample: Sample, answer: Answer) -> Score:
        """Score one answer; what cannot be read is `unparsed`, never wrong."""
        reply = yes_no.first_word(answer.text)
        if reply is None:
            return Score("unparsed")
        return Score("ok", {"asked": 1, "right": reply == sample.reference["label"]})

    def tally(self, scored: Sequence[ScoredSample]) -> list[Tally]:
        """Add up single answers by subset, and pairs over all."""
        rows = [Tally(sample.group, sample.subset, counts) for sample, counts in scored]
        right = {(sample.group, sample.subset): counts["right"] for sample, counts in scored}
        groups = [group for group, label in right if label == "yes" and (group, "no") in right]
        pairs = [(group, right[group, "yes"] * right[group, "no"]) for group in groups]
        return rows + [Tally(group, "all", {"pairs": 1, "both": both}) for group, both in pairs]

    def metrics(self) -> dict:
        """Return metrics as functions of the summed counts, which are arrays: one entry for each replicate."""
        return {"accuracy": lambda total: total["right"] / total["asked"], "pairs": lambda t: t["both"] / t["pairs"]}

    @staticmethod
    def _absent(scene: testbed.Scene) -> str:
        return next(name for name in testbed.CATEGORIES if name not in scene.annotated)
