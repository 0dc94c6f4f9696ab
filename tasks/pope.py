"""POPE: is there a dog in the image? (Li et al., "Evaluating Object Hallucination in LVLMs", EMNLP 2023)"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from stethoscope.core.errors import ConfigError, DataError
from stethoscope.core.types import UNKNOWN, Answer, Mention, Sample, Score
from stethoscope.tasks.annotations import clipped, read_rows, shown, with_suffix
from stethoscope.tasks.base import Task, Totals
from stethoscope.tasks.counts import accuracy, confusion, f1, precision, recall, yes_rate
from stethoscope.tasks.image_folder import ImageFolder
from stethoscope.tasks.sources import (
    DataSource,
    HubSource,
    SourceRow,
    check_choice,
    check_choices,
    check_positive,
    scene_image,
    setting_path,
)
from stethoscope.tasks.yes_no import PARSERS, claim

SUBSETS = ("random", "popular", "adversarial")

_ASKED = re.compile(r"\bthere (?:an?|any) (.+?)(?: in (?:the|this) \w+)?\s*\?", re.IGNORECASE)


def asked_object(text: str) -> str:
    """Return the object that a question asks about.

    >>> asked_object("Is there a traffic light in the image?")
    'traffic light'
    >>> asked_object("How many?")
    'unknown'
    """
    match = _ASKED.search(text)
    return match.group(1) if match else UNKNOWN


class Pope(Task):
    """Yes/no questions about one object each, half of them about objects that are not there.

    The subsets differ in the absent objects: random ones, frequent ones, ones that usually stand beside what is there.
    """

    name = "pope"
    version: ClassVar[str] = "1"
    primary = "f1"
    macro: ClassVar[tuple[str, ...]] = ("f1",)

    def __init__(
        self,
        source: str = "testbed",
        subsets: Sequence[str] = SUBSETS,
        parser: str = "official",
        suffix: str = "",
        scenes: int = 1000,
        per_scene: int = 3,
        seed: int = 0,
        questions: str | None = None,
        filename: str = "coco_pope_{subset}.json",
        images: str | None = None,
        dataset: str = "lmms-lab/POPE",
        split: str = "test",
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> None:
        """Store and check the settings; ``conf/task/pope.yaml`` explains every argument.

        Raises:
            ConfigError: an unknown source, subset or parser, a number below 1, or a path that the source needs.
        """
        self.data = DataSource(
            "pope",
            source,
            {"testbed": self._read_testbed, "files": self._read_files, "hub": self._read_hub},
            {"questions": (questions, f"a folder with {filename}"), "images": (images, "a folder of images")},
        )
        check_choice("parser of pope", parser, PARSERS)
        check_choices("subsets", "subset of pope", subsets, SUBSETS)
        check_positive(scenes=scenes, per_scene=per_scene)
        if "{subset}" not in filename:
            raise ConfigError(f"task.filename={filename!r} should contain {{subset}}")
        self.source, self.subsets, self.parser, self.suffix = source, tuple(dict.fromkeys(subsets)), parser, suffix
        self.scenes, self.per_scene, self.seed = scenes, per_scene, seed
        self.questions, self.filename, self.images = questions, filename, images
        self.hub = HubSource(dataset, split, revision, local_files_only)
        self._parse = PARSERS[parser]
        self._samples: list[Sample] = []

    def setup(self) -> None:
        """Read the questions and check that every image is there.

        Raises:
            DataError: a file is missing or broken; the message names file and line.
        """
        if self._samples:
            return
        samples: dict[str, list[Sample]] = {subset: [] for subset in self.subsets}
        origins: dict[str, str] = {}
        for row in self.data.rows():
            sample = self._sample(row)
            if sample.id in origins:
                repeated = clipped(row.values["question_id"])
                raise DataError(f"{row.origin}: question_id {repeated} is used before, in {origins[sample.id]}")
            origins[sample.id] = row.origin
            samples[sample.subset].append(sample)
        self._samples = [sample for subset in self.subsets for sample in samples[subset]]

    def _sample(self, row: SourceRow) -> Sample:
        """Make a sample of a row with ``subset``, ``question_id``, ``text`` and ``label``."""
        values, label = row.values, str(row.values["label"]).strip().lower()
        if label not in ("yes", "no"):
            raise DataError(f"{row.origin}: label {shown(values['label'])} is neither yes nor no")
        if not isinstance(values["text"], str) or not values["text"].strip():
            raise DataError(f"{row.origin}: {shown(values['text'])} is no question")
        question = values["text"].strip()
        return Sample(
            id=f"{values['subset']}-{values['question_id']}",
            image=row.image,
            question=with_suffix(question, self.suffix),
            group=row.image.group,
            subset=values["subset"],
            reference={"label": label, "object": asked_object(question)},
        )

    def _read_testbed(self) -> Iterator[SourceRow]:
        from stethoscope import testbed  # imports the renderer, which only this source needs

        scenes = testbed.scenes(self.scenes)
        images = {image.name: image for image in map(scene_image, scenes)}
        for subset in self.subsets:
            for row in testbed.pope_questions(scenes, subset, seed=self.seed, per_scene=self.per_scene):
                origin = f"testbed, {subset} question {row['question_id']}"
                yield SourceRow({**row, "subset": subset}, images[row["image"]], origin)

    def _read_files(self) -> Iterator[SourceRow]:
        images = ImageFolder(setting_path(self.images))
        for subset in self.subsets:
            path, empty = setting_path(self.questions) / self.filename.replace("{subset}", subset), True
            for _, origin, row in read_rows(path, ("question_id", "image", "text", "label")):
                yield SourceRow({**row, "subset": subset}, images.find(str(row["image"]), origin), origin)
                empty = False
            if empty:
                raise DataError(f"{path} holds no question")

    def _read_hub(self) -> Iterator[SourceRow]:
        columns = ("question_id", "question", "answer", "image_source", "category")
        counts: Counter[str] = Counter()
        others: Counter[str] = Counter()
        for values, image, origin in self.hub.rows(columns, lambda row: str(row["image_source"])):
            subset = str(values["category"]).strip().lower()
            counts[subset] += 1
            if subset in self.subsets:
                row: dict[str, Any] = {"question_id": values["question_id"], "subset": subset}
                yield SourceRow(row | {"text": values["question"], "label": values["answer"]}, image, origin)
            elif subset not in SUBSETS:
                others[str(values["category"])] += 1
        if others:
            warnings.warn(
                f"{others.total()} of {counts.total()} rows of data set {self.hub.dataset!r} are left out, being of no "
                f"category of POPE: {clipped(', '.join(others))}",
                stacklevel=2,
            )
        for subset in self.subsets:
            if not counts[subset]:
                raise DataError(f"data set {self.hub.dataset!r} has no row of category {subset!r}")

    def samples(self) -> Sequence[Sample]:
        """Return the questions subset by subset, in the order of the source."""
        return self._samples

    def score(self, sample: Sample, answer: Answer) -> Score:
        """Count the answer as a true or false yes or no; ``unparsed`` if the parser reads neither."""
        reply, label = self._parse(answer.text), sample.reference["label"]
        status = "unparsed" if reply is None else "ok"
        return Score(status, confusion(reply, label, positive="yes"), {"reply": reply, "label": label})

    def mentions(self, sample: Sample, answer: Answer) -> tuple[Mention, ...]:
        """Return the word yes as a mention of the object, hallucinated if the truth is no; a no claims nothing."""
        return claim(answer.text, self._parse(answer.text), sample.reference["label"], sample.reference["object"])

    def metrics(self) -> Mapping[str, Callable[[Totals], np.ndarray]]:
        """Return accuracy, precision, recall, F1 and the model's yes-rate, all from 0 to 1."""
        return {"accuracy": accuracy, "precision": precision, "recall": recall, "f1": f1, "yes_rate": yes_rate}
