"""CHAIR: which objects does a caption invent?

Rohrbach et al., "Object Hallucination in Image Captioning", EMNLP 2018, arXiv 1809.02156.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from stethoscope.core import types
from stethoscope.core.errors import ConfigError, DataError, unknown
from stethoscope.core.types import Answer, ImageRef, Sample, Score
from stethoscope.task import Task, Totals
from stethoscope.tasks import hub
from stethoscope.tasks.captions import METRICS, complete_sentences, labelled, score_caption
from stethoscope.tasks.coco import image_id, read_captions, read_instances
from stethoscope.tasks.image_folder import ImageFolder
from stethoscope.tasks.objects import OBJECTS, Mention, mentions
from stethoscope.tasks.published import clipped, read_text

__all__ = ["Chair", "Mention", "complete_sentences", "mentions"]

SOURCES = ("testbed", "files", "hub")


class Chair(Task):
    """Captions, with every COCO object that they name checked against what is in the picture.

    Ground truth is what the original takes: the annotated categories and whatever people named in their captions.
    Every mention counts, also of the same object again. ``objects.mentions`` has the extraction. Answers of published
    data may have 512 tokens, as is usual; for CHAIR at 64, set ``generation.max_new_tokens`` and ``drop_incomplete``.
    """

    name: ClassVar[str] = "chair"
    version: ClassVar[str] = "1"
    primary: ClassVar[str] = "chair_i"

    def __init__(
        self,
        source: str = "testbed",
        question: str = "Please describe this image in detail.",
        drop_incomplete: bool = False,
        scenes: int = 1000,
        instances: str | None = None,
        captions: str | None = None,
        images: str | None = None,
        image_ids: str | Sequence[int] | None = None,
        dataset: str = "tsunghanwu/mscoco_chair",
        split: str = "test",
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> None:
        """Stores and checks; see ``conf/task/chair.yaml`` for every argument.

        Raises:
            ConfigError: an unknown source, a number below 1, no question, or a path that the source needs.
        """
        if source not in SOURCES:
            raise ConfigError(unknown("source of chair", source, SOURCES))
        if not question.strip():
            raise ConfigError("task.question is empty; the usual one is 'Please describe this image in detail.'")
        if scenes < 1:
            raise ConfigError(f"task.scenes={scenes} must be at least 1")
        if not (image_ids is None or isinstance(image_ids, (str, list, tuple))):
            raise ConfigError(f"task.image_ids={image_ids!r} should be a list of image ids or a file with one per line")
        if source == "files" and not (instances and images):
            raise ConfigError(
                "task.source=files needs task.instances, a COCO instances_*.json, and task.images, a folder of images"
            )
        self.max_new_tokens = 128 if source == "testbed" else 512  # the usual length; the embedded model is brief
        self.source, self.question, self.drop_incomplete, self.scenes = source, question, drop_incomplete, scenes
        self.instances, self.captions, self.images, self.image_ids = instances, captions, images, image_ids
        self.hub = hub.HubSource(dataset, split, revision, local_files_only)
        self._samples: list[Sample] = []

    def setup(self) -> None:
        """Reads images and ground truth and checks that every image is there.

        Raises:
            DataError: a file is missing or broken; the message names it.
        """
        if self._samples:
            return
        read = {"testbed": self._from_testbed, "files": self._from_files, "hub": self._from_hub}[self.source]
        samples = [
            Sample(
                id=Path(image.name).stem,
                image=image,
                question=self.question,
                group=image.group,
                reference={"objects": sorted(objects)},
            )
            for image, objects in read()
        ]
        twice = [id_ for id_, count in Counter(sample.id for sample in samples).items() if count > 1]
        if twice:
            raise DataError(f"image {twice[0]!r} is there more than once ({len(twice)} such images)")
        self._samples = samples

    def _from_testbed(self) -> list[tuple[ImageRef, frozenset[str]]]:
        from stethoscope import testbed

        scenes = testbed.scenes(self.scenes)
        return [(ImageRef(f"{scene.id}.png", scene.image), frozenset(scene.visible)) for scene in scenes]

    def _from_files(self) -> list[tuple[ImageRef, frozenset[str]]]:
        path = Path(self.instances).expanduser()
        names, objects = read_instances(path)
        folder = ImageFolder(Path(self.images).expanduser())
        ids = list(names) if self.image_ids is None else self._chosen(names, path)
        named = read_captions(Path(self.captions).expanduser(), ids) if self.captions else {}
        return [
            (folder.find(names[id_], f"{path}, image id {id_}"), objects[id_] | named.get(id_, frozenset()))
            for id_ in ids
        ]

    def _chosen(self, names: Mapping[int | str, str], path: Path) -> list[int | str]:
        """The image ids that the user lists, here or in a file with one on each line."""
        if isinstance(self.image_ids, str):
            listed = Path(self.image_ids).expanduser()
            places = [
                (line.strip(), f"{listed}, line {n}")
                for n, line in enumerate(read_text(listed).split("\n"), 1)
                if line.strip()
            ]
        else:
            places = [(id_, "task.image_ids") for id_ in self.image_ids]
        for id_, where in places:
            if image_id(id_) not in names:
                raise DataError(f"{where}: image id {id_} is not in {path}")
        if not places:
            raise DataError(f"task.image_ids={self.image_ids!r} lists no image")
        return [image_id(id_) for id_, _ in places]

    def _from_hub(self) -> list[tuple[ImageRef, frozenset[str]]]:
        images, rows = hub.load(self.hub, ("question_id", "gt_object", "image"))
        found = []
        for index, row in enumerate(rows):
            objects = row["gt_object"]
            wrong = [name for name in objects if name not in OBJECTS] if isinstance(objects, list) else [objects]
            if wrong:
                where = f"data set {self.hub.dataset!r}, row {index}, gt_object"
                raise DataError(f"{where}: {unknown('COCO object', clipped(wrong[0]), OBJECTS)}")
            found.append((images.ref(index, str(row["question_id"])), frozenset(objects)))
        return found

    def samples(self) -> Sequence[Sample]:
        """One sample per image, in the order of the source."""
        return self._samples

    def _judged(self, answer: Answer) -> str:
        """The part of the answer that is judged: all of it, or its complete sentences."""
        return complete_sentences(answer.text) if self.drop_incomplete and not answer.finished else answer.text

    def score(self, sample: Sample, answer: Answer) -> Score:
        """Counts mentions, hallucinated mentions, true objects named and words; an empty answer is ``unparsed``."""
        text = self._judged(answer)
        return score_caption(text, [mention.name for mention in mentions(text)], sample.reference["objects"])

    def mentions(self, sample: Sample, answer: Answer) -> tuple[types.Mention, ...]:
        """Every object that the judged part of the answer names: 1 if it is not in the picture, 0 if it is."""
        truth = set(sample.reference["objects"])
        return labelled(mentions(self._judged(answer)), lambda name: int(name not in truth))

    def metrics(self) -> Mapping[str, Callable[[Totals], np.ndarray]]:
        """CHAIR_i, CHAIR_s, object recall and length in words; ``captions.METRICS`` defines them."""
        return METRICS
