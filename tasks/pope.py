"""POPE: is there a dog in the image? (Li et al., "Evaluating Object Hallucination in LVLMs", EMNLP 2023)"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from stethoscope.core.errors import ConfigError, DataError, unknown
from stethoscope.core.types import UNKNOWN, Answer, ImageRef, Mention, Sample, Score
from stethoscope.task import Task, Totals
from stethoscope.tasks import hub
from stethoscope.tasks.image_folder import ImageFolder
from stethoscope.tasks.published import Question, clipped, question, read_pope, unique, with_suffix
from stethoscope.tasks.totals import accuracy, confusion, f1, precision, ratio, recall
from stethoscope.tasks.yes_no import PARSERS, claim

SUBSETS = ("random", "popular", "adversarial")
SOURCES = ("testbed", "files", "hub")

_ASKED = re.compile(r"\bthere (?:an?|any) (.+?)(?: in (?:the|this) \w+)?\s*\?", re.IGNORECASE)


def asked_object(text: str) -> str:
    """The object that a question asks about.

    >>> asked_object("Is there a traffic light in the image?")
    'traffic light'
    >>> asked_object("How many?")
    'unknown'
    """
    found = _ASKED.search(text)
    return found.group(1) if found else UNKNOWN


def yes_rate(totals: Totals) -> np.ndarray:
    """How often the model says yes; half the questions ask for one."""
    return ratio(totals["tp"] + totals["fp"], totals["tp"] + totals["fp"] + totals["tn"] + totals["fn"])


class Pope(Task):
    """Yes/no questions about one object each, half of them about objects that are not there.

    The subsets differ in the absent objects: random ones, frequent ones, ones that usually stand beside what is there.
    """

    name: ClassVar[str] = "pope"
    version: ClassVar[str] = "1"
    primary: ClassVar[str] = "f1"
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
        """Stores and checks; see ``conf/task/pope.yaml`` for every argument.

        Raises:
            ConfigError: an unknown source, subset or parser, a number below 1, or a path that the source needs.
        """
        if source not in SOURCES:
            raise ConfigError(unknown("source of pope", source, SOURCES))
        if parser not in PARSERS:
            raise ConfigError(unknown("parser of pope", parser, PARSERS))
        if isinstance(subsets, str) or not subsets:
            raise ConfigError(f"task.subsets={subsets!r} should be a list of {', '.join(SUBSETS)}")
        for subset in subsets:
            if subset not in SUBSETS:
                raise ConfigError(unknown("subset of pope", subset, SUBSETS))
        if scenes < 1 or per_scene < 1:
            raise ConfigError(f"task.scenes={scenes} and task.per_scene={per_scene} must be at least 1")
        if source == "files" and not (questions and images):
            raise ConfigError(
                f"task.source=files needs task.questions, a folder with {filename}, and task.images, a folder of images"
            )
        if "{subset}" not in filename:
            raise ConfigError(f"task.filename={filename!r} should contain {{subset}}")
        self.source, self.subsets, self.parser, self.suffix = source, tuple(dict.fromkeys(subsets)), parser, suffix
        self.scenes, self.per_scene, self.seed = scenes, per_scene, seed
        self.questions, self.filename, self.images = questions, filename, images
        self.hub = hub.HubSource(dataset, split, revision, local_files_only)
        self._parse = PARSERS[parser]
        self._samples: list[Sample] = []

    def setup(self) -> None:
        """Reads the questions and checks that every image is there.

        Raises:
            DataError: a file is missing or broken; the message names file and line.
        """
        if self._samples:
            return
        read = {"testbed": self._from_testbed, "files": self._from_files, "hub": self._from_hub}[self.source]
        self._samples = [
            Sample(
                id=f"{subset}-{one.id}",
                image=one.image,
                question=with_suffix(one.text, self.suffix),
                group=one.group,
                subset=subset,
                reference={"label": one.label, "object": asked_object(one.text)},
            )
            for subset, questions in read().items()
            for one in questions
        ]

    def _from_testbed(self) -> dict[str, list[Question]]:
        from stethoscope import testbed

        scenes = testbed.scenes(self.scenes)
        images = {f"{scene.id}.png": ImageRef(f"{scene.id}.png", scene.image) for scene in scenes}
        return {
            subset: [
                question(row, images[row["image"]], f"testbed, {subset} question {row['question_id']}")
                for row in testbed.pope_questions(scenes, subset, seed=self.seed, per_scene=self.per_scene)
            ]
            for subset in self.subsets
        }

    def _from_files(self) -> dict[str, list[Question]]:
        images = ImageFolder(Path(self.images).expanduser())
        folder = Path(self.questions).expanduser()
        return {
            subset: read_pope(folder / self.filename.replace("{subset}", subset), images) for subset in self.subsets
        }

    def _from_hub(self) -> dict[str, list[Question]]:
        columns = ("question_id", "question", "answer", "image_source", "image", "category")
        images, rows = hub.load(self.hub, columns)
        found: dict[str, list[Question]] = {subset: [] for subset in self.subsets}
        places: dict[str, list[tuple[str, str]]] = {subset: [] for subset in self.subsets}
        others: Counter[str] = Counter()
        for index, row in enumerate(rows):
            subset, where = str(row["category"]).strip().lower(), f"data set {self.hub.dataset!r}, row {index}"
            if subset in found:
                image = images.ref(index, str(row["image_source"]))
                checked = {"question_id": row["question_id"], "text": row["question"], "label": row["answer"]}
                found[subset].append(question(checked, image, where))
                places[subset].append((found[subset][-1].id, where))
            elif subset not in SUBSETS:
                others[str(row["category"])] += 1
        if others:
            warnings.warn(
                f"{others.total()} of {len(rows)} rows of data set {self.hub.dataset!r} are left out, being of no "
                f"category of POPE: {clipped(', '.join(others))}",
                stacklevel=2,
            )
        for subset, questions in found.items():
            if not questions:
                raise DataError(f"data set {self.hub.dataset!r} has no row of category {subset!r}")
            unique(places[subset])
        return found

    def samples(self) -> Sequence[Sample]:
        """Questions subset by subset, in the order of the source."""
        return self._samples

    def score(self, sample: Sample, answer: Answer) -> Score:
        """Counts the answer as a true or false yes or no; ``unparsed`` if the parser reads neither."""
        reply, label = self._parse(answer.text), sample.reference["label"]
        status = "unparsed" if reply is None else "ok"
        return Score(status, confusion(reply, label, positive="yes"), {"reply": reply, "label": label})

    def mentions(self, sample: Sample, answer: Answer) -> tuple[Mention, ...]:
        """A yes claims the object: its word is one mention, hallucinated if the truth is no. A no claims nothing."""
        return claim(answer.text, self._parse(answer.text), sample.reference["label"], sample.reference["object"])

    def metrics(self) -> Mapping[str, Callable[[Totals], np.ndarray]]:
        """Accuracy, precision, recall, F1 and the model's yes-rate."""
        return {"accuracy": accuracy, "precision": precision, "recall": recall, "f1": f1, "yes_rate": yes_rate}
