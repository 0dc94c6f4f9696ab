"""CHAIR: which objects does a caption invent?

Rohrbach et al., "Object Hallucination in Image Captioning", EMNLP 2018, arXiv 1809.02156.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from stethoscope.core.errors import ConfigError, DataError, unknown
from stethoscope.core.json_rows import clipped, read_rows, read_text
from stethoscope.core.types import Answer, Mention, Sample, Score
from stethoscope.tasks.annotations import image_id, read_captions, read_instances
from stethoscope.tasks.base import Metric, Task
from stethoscope.tasks.counts import CHAIR_METRICS, complete_sentences, score_caption
from stethoscope.tasks.extraction import COCO, beside_coco, load_extraction
from stethoscope.tasks.image_folder import ImageFolder
from stethoscope.tasks.object_extraction import OBJECTS, TextMention, label_mentions, mentions
from stethoscope.tasks.sources import (
    DataSource,
    HubSource,
    SourceRow,
    check_choice,
    check_flags,
    check_positive,
    scene_image,
    setting_path,
)

SCENE_MODES = ("counter", "prior", "collage")  # as in ``stethoscope.testbed.scenes``, which is imported late

__all__ = ["Chair", "TextMention", "complete_sentences", "mentions"]


class Chair(Task):
    """Captions, with every COCO object that they name checked against what is in the picture.

    Ground truth is what the original takes: the annotated categories and whatever people named in their captions.
    Every mention counts, also of the same object again. ``object_extraction.mentions`` finds them by default; what an
    ``extraction`` finds beside them, and names of a vocabulary that are not annotated, are not judged. Answers of
    published data may have 512 tokens, as is usual; for CHAIR at 64, set ``generation.max_new_tokens`` and
    ``drop_incomplete``.
    """

    name = "chair"
    version: ClassVar[str] = "1"
    primary = "chair_i"

    def __init__(
        self,
        source: str = "testbed",
        question: str = "Please describe this image in detail.",
        drop_incomplete: bool = False,
        scenes: int = 1000,
        scene_mode: str = "counter",
        scene_seed: int | None = None,
        instances: str | None = None,
        captions: str | None = None,
        images: str | None = None,
        image_ids: str | Sequence[int] | None = None,
        image_count: int | None = None,
        image_seed: int = 42,
        extraction: str = COCO,
        dataset: str = "tsunghanwu/mscoco_chair",
        split: str = "test",
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> None:
        """Store and check the settings; ``conf/task/chair.yaml`` explains every argument.

        Raises:
            ConfigError: an unknown source or mode, a number below 1, no question, or a path that the source needs.
        """
        self.data = DataSource(
            "chair",
            source,
            {"testbed": self._read_testbed, "files": self._read_files, "hub": self._read_hub},
            {"instances": (instances, "a COCO instances_*.json"), "images": (images, "a folder of images")},
        )
        if not isinstance(question, str) or not question.strip():
            raise ConfigError(
                f"task.question={question!r} should be a text; the usual one is 'Please describe this image in detail.'"
            )
        check_flags(drop_incomplete=drop_incomplete)
        check_positive(scenes=scenes)
        check_choice("scene_mode of chair", scene_mode, SCENE_MODES)
        if not (image_ids is None or isinstance(image_ids, (str, list, tuple))):
            raise ConfigError(f"task.image_ids={image_ids!r} should be a list of image ids or a file with one per line")
        if image_count is not None:
            check_positive(image_count=image_count)
            if source != "files" or image_ids is not None:
                given = f"task.image_ids={image_ids!r}" if image_ids is not None else f"task.source={source}"
                raise ConfigError(
                    f"task.image_count draws from the files of task.source=files; {given} has its own images"
                )
        self.max_new_tokens = 128 if source == "testbed" else 512  # the usual length; the embedded model is brief
        self.source, self.question, self.drop_incomplete = source, question, drop_incomplete
        self.scenes, self.scene_mode, self.scene_seed = scenes, scene_mode, scene_seed
        self.instances, self.captions, self.images, self.image_ids = instances, captions, images, image_ids
        self.image_count, self.image_seed = image_count, image_seed
        self.extraction = extraction
        self.hub = HubSource(dataset, split, revision, local_files_only)
        self._samples: list[Sample] = []

    def setup(self) -> None:
        """Read images and ground truth and check that every image is there.

        Raises:
            DataError: a file is missing or broken; the message names it.
            ConfigError: an unknown extraction, or one of which the ground truth knows no object.
        """
        if self._samples:
            return
        self._extract = load_extraction(self.extraction, key="task.extraction")
        self._judged = self._extract.own_names(OBJECTS)
        samples = [
            Sample(
                id=Path(image.name).stem,
                image=image,
                question=self.question,
                group=image.group,
                reference={"objects": sorted(values["objects"])},
                asks="description",
            )
            for values, image, _ in self.data.rows()
        ]
        repeated = [id_ for id_, count in Counter(sample.id for sample in samples).items() if count > 1]
        if repeated:
            raise DataError(f"image {repeated[0]!r} is there more than once ({len(repeated)} such images)")
        if not self._judged:
            raise ConfigError(
                f"task.extraction={self.extraction}: none of its names is an object that the ground truth knows, such "
                f"as {OBJECTS[0]}"
            )
        self._samples = samples

    def _read_testbed(self) -> Iterator[SourceRow]:
        from stethoscope import testbed  # imports the renderer, which only this source needs

        stream = {} if self.scene_seed is None else {"seed": self.scene_seed}
        for scene in testbed.scenes(self.scenes, self.scene_mode, **stream):
            yield SourceRow(
                {"objects": self._extract.own_names(scene.visible)}, scene_image(scene), f"testbed, scene {scene.id}"
            )

    def _read_files(self) -> Iterator[SourceRow]:
        path = setting_path(self.instances)
        synonyms = self._extract.synonyms
        names, objects = read_instances(path, synonyms or None)
        if synonyms:
            self._judged = frozenset().union(*objects.values())
        folder = ImageFolder(setting_path(self.images))
        ids = self._drawn(names, path) if self.image_ids is None else self._chosen(names, path)
        extract = self._extract if synonyms else mentions
        captioned = read_captions(setting_path(self.captions), ids, extract) if self.captions else {}
        for id_ in ids:
            origin = f"{path}, image id {id_}"
            truth = objects[id_] | captioned.get(id_, frozenset())
            yield SourceRow({"objects": truth}, folder.find(names[id_], origin), origin)

    def _drawn(self, names: Mapping[int | str, str], path: Path) -> list[int | str]:
        """Return all image ids, or those of as many images as are drawn: file names in order, shuffled by the seed."""
        if self.image_count is None:
            return list(names)
        if self.image_count > len(names):
            raise DataError(f"task.image_count={self.image_count}, but {path} lists {len(names)} images")
        ids = sorted(names, key=lambda id_: names[id_])
        random.Random(self.image_seed).shuffle(ids)
        return ids[: self.image_count]

    def _chosen(self, names: Mapping[int | str, str], path: Path) -> list[int | str]:
        """Return the image ids that the user lists, here or in a file."""
        if isinstance(self.image_ids, str):
            ids = _read_ids(setting_path(self.image_ids))
        else:
            ids = [(id_, "task.image_ids") for id_ in self.image_ids or ()]
        for id_, origin in ids:
            if image_id(id_) not in names:
                raise DataError(f"{origin}: image id {id_} is not in {path}")
        if not ids:
            raise DataError(f"task.image_ids={self.image_ids!r} lists no image")
        return [image_id(id_) for id_, _ in ids]

    def _read_hub(self) -> Iterator[SourceRow]:
        for values, image, origin in self.hub.rows(("question_id", "gt_object"), lambda row: str(row["question_id"])):
            objects = values["gt_object"]
            wrong = [name for name in objects if name not in OBJECTS] if isinstance(objects, list) else [objects]
            if wrong:
                raise DataError(f"{origin}, gt_object: {unknown('COCO object', clipped(wrong[0]), OBJECTS)}")
            yield SourceRow({"objects": self._extract.own_names(objects)}, image, origin)

    def identity(self) -> Mapping[str, Any]:
        """Return the identity of the extraction: a file of words counts by its words."""
        return {"extraction": self._extract.identity}

    def samples(self) -> Sequence[Sample]:
        """Return one sample per image, in the order of the source."""
        return self._samples

    def _named(self, text: str) -> tuple[list[TextMention], list[bool]]:
        """Return the mentions of a text, and which of them the ground truth can judge."""
        if self._extract.identity == COCO or self._extract.synonyms:
            named = self._extract(text)
            return named, [mention.name in self._judged for mention in named]
        return beside_coco(self._extract, text)

    def evaluate(self, sample: Sample, answer: Answer) -> tuple[Score, tuple[Mention, ...]]:
        """Extract the objects of an answer once, for its score and its mentions."""
        text, truth = answer.text, set(sample.reference["objects"])
        if self.drop_incomplete and not answer.finished:
            text = complete_sentences(text)
        named, judged = self._named(text)
        names = [mention.name for mention, own in zip(named, judged, strict=True) if own]
        labels = [int(mention.name not in truth) if own else -1 for mention, own in zip(named, judged, strict=True)]
        return score_caption(text, names, sample.reference["objects"]), label_mentions(named, labels)

    def score(self, sample: Sample, answer: Answer) -> Score:
        """Count mentions, hallucinated mentions, true objects named and words; an empty answer is ``unparsed``."""
        return self.evaluate(sample, answer)[0]

    def mentions(self, sample: Sample, answer: Answer) -> tuple[Mention, ...]:
        """Return every object that the scored text names: 1 if it is not in the picture, else 0; -1 not judged."""
        return self.evaluate(sample, answer)[1]

    def metrics(self) -> Mapping[str, Metric]:
        """Return CHAIR_i, CHAIR_s, object recall and length in words; ``counts.CHAIR_METRICS`` defines them."""
        return CHAIR_METRICS


def _read_ids(path: Path) -> list[tuple[Any, str]]:
    """Return id and origin of every line of a file: an id, or a JSON object with an ``image_id``."""
    text = read_text(path)
    if text.lstrip()[:1] in ("{", "["):
        return [(row["image_id"], origin) for _, origin, row in read_rows(path, ("image_id",))]
    lines = enumerate(text.split("\n"), 1)
    return [(line.strip(), f"{path}, line {number}") for number, line in lines if line.strip()]
