"""POPE: is there a dog in the image? (Li et al., "Evaluating Object Hallucination in LVLMs", EMNLP 2023)

Also with the labels of RePOPE (Neuhaus and Hein 2025, arXiv 2504.15707), which corrects 9 % of POPE's yes labels and
leaves out what is ambiguous, and on the pictures of A-OKVQA and GQA.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, NamedTuple

import numpy as np

from stethoscope.core.errors import ConfigError, DataError
from stethoscope.core.json_rows import clipped, read_rows
from stethoscope.core.types import UNKNOWN, Answer, Mention, Sample, Score
from stethoscope.tasks.base import Metric, Task, Totals
from stethoscope.tasks.counts import YES_NO_METRICS, confusion
from stethoscope.tasks.image_folder import ImageFolder
from stethoscope.tasks.questions import asked_object, label_text, question_text, with_suffix
from stethoscope.tasks.sources import (
    DataSource,
    HubSource,
    SourceRow,
    check_choice,
    check_choices,
    check_name,
    check_positive,
    check_unused,
    scene_image,
    setting_path,
)
from stethoscope.tasks.yes_no import PARSERS, claim

SUBSETS = ("random", "popular", "adversarial")
LABELS = ("pope", "repope", "both")
REPOPE_FILE = "coco_repope_{subset}.json"
QUESTION_KEYS = ("question_id", "image", "text", "label")
LABEL_NAMES = {
    "pope": "POPE's",
    "repope": "RePOPE's",
    "both": "POPE's, and RePOPE's for ..._repope; ..._difference is RePOPE's figure less POPE's, paired over images",
}
OLD_RANDOM = Counter(yes=1500, no=1410)
"""Labels of the random questions before POPE's fix of 2023: 90 of the 3,000 are missing, and all have other ids."""


class CorrectedLabels:
    """Labels of RePOPE, by subset and question.

    POPE's file before its fix numbers the same questions otherwise, so that a label counts only where picture and
    object agree too; with other ids it is looked up by these.
    """

    def __init__(self, folder: Path, subsets: Sequence[str]) -> None:
        """Read ``coco_repope_<subset>.json`` of every subset.

        Raises:
            DataError: a file is missing or broken; the message names file and line.
        """
        self.folder = folder
        self._by_id: dict[tuple[str, str], tuple[tuple[str, str, str], str]] = {}
        self._by_question: dict[tuple[str, str, str], str] = {}
        for subset in subsets:
            for _, origin, row in read_rows(folder / REPOPE_FILE.format(subset=subset), QUESTION_KEYS):
                question = _question_key(subset, str(row["image"]), row["text"])
                label = self._by_question[question] = label_text(row["label"], origin)
                self._by_id[subset, str(row["question_id"])] = question, label

    def find(self, subset: str, id_: Any, image: str, text: str) -> str | None:
        """Return the corrected label of a question; None if it has none."""
        asked = _question_key(subset, image, text)
        question, label = self._by_id.get((subset, str(id_)), (None, None))
        return label if question == asked else self._by_question.get(asked)


def _question_key(subset: str, image: str, text: Any) -> tuple[str, str, str]:
    asked = asked_object(str(text))
    return subset, PurePosixPath(image).stem, (str(text) if asked == UNKNOWN else asked).strip().lower()


class Kept(NamedTuple):
    """What became of the rows of one subset.

    Attributes:
        labels: POPE's labels, counted.
        left_out: rows without a corrected label.
    """

    labels: Counter[str]
    left_out: int


class Pope(Task):
    """Yes/no questions about one object each, half of them about objects that are not there.

    The subsets differ in the absent objects: random ones, frequent ones, ones that usually stand beside what is there.
    With several ``origins`` every one has its own subsets, such as ``gqa random``. With ``labels=both`` every answer is
    scored twice; metrics of the corrected labels are called ``..._repope``, and those less POPE's, on the same
    resampled images, ``..._difference``.
    """

    version: ClassVar[str] = "2"
    primary = "f1"
    locations: ClassVar[tuple[str, ...]] = (*Task.locations, "repope")
    macro: tuple[str, ...] = ("accuracy", "f1")

    def __init__(
        self,
        source: str = "testbed",
        subsets: Sequence[str] = SUBSETS,
        labels: str = "pope",
        repope: str | None = None,
        parser: str | None = None,
        suffix: str = "",
        scenes: int = 1000,
        per_scene: int = 3,
        seed: int = 0,
        questions: str | None = None,
        origins: Sequence[str] = ("coco",),
        filename: str = "{origin}_pope_{subset}.json",
        images: str | Mapping[str, str] | None = None,
        dataset: str = "lmms-lab/POPE",
        split: str = "test",
        revision: str | None = None,
        local_files_only: bool = False,
        name: str | int = "pope",
    ) -> None:
        """Store and check the settings; ``conf/task/pope.yaml`` explains every argument.

        Raises:
            ConfigError: an unknown source, subset, labels or parser, a number below 1, or a path that the source needs.
        """
        self.data = DataSource(
            "pope",
            source,
            {"testbed": self._read_testbed, "files": self._read_files, "hub": self._read_hub},
            {
                "questions": (questions, f"a folder with {filename}"),
                "images": (str(images or ""), "a folder of images"),
            },
        )
        self.name = check_name(name)
        check_choice("labels of pope", labels, LABELS)
        parser = parser or ("official" if labels == "pope" else "repope")
        check_choice("parser of pope", parser, PARSERS)
        check_choices("subsets", "subset of pope", subsets, SUBSETS)
        check_positive(scenes=scenes, per_scene=per_scene)
        self.source, self.labels, self.parser, self.suffix = source, labels, parser, suffix
        self.subsets = tuple(dict.fromkeys(subsets))
        self.scenes, self.per_scene, self.seed = scenes, per_scene, seed
        self.questions, self.filename, self.images, self.repope = questions, filename, images, repope
        self.origins = _check_origins(source, origins, filename, images)
        if labels != "pope" and source == "testbed":
            raise ConfigError(
                f"task.labels={labels} corrects POPE's questions about COCO (task.source=files or hub); the labels of "
                "rendered scenes are exact"
            )
        if labels != "pope" and not repope:
            raise ConfigError(
                f"task.labels={labels} needs task.repope, a folder with {REPOPE_FILE} (annotations/ of "
                "github.com/YanNeu/RePOPE)"
            )
        self.hub = HubSource(dataset, split, revision, local_files_only)
        self._parse = PARSERS[parser]
        self._samples: list[Sample] = []
        self._kept: dict[str, Kept] = {}
        if labels == "both":
            self.macro = tuple(f"{metric}{end}" for metric in self.macro for end in ("", "_repope", "_difference"))

    def setup(self) -> None:
        """Read the questions and check that every image is there.

        Raises:
            DataError: a file is missing or broken; the message names file and line.
        """
        if self._samples:
            return
        corrected = None
        if self.labels != "pope":
            corrected = CorrectedLabels(setting_path(self.repope), self.subsets)
        samples: dict[str, list[Sample]] = {}
        origins: dict[str, str] = {}
        labels: dict[str, Counter[str]] = {}
        for row in self.data.rows():
            sample = self._sample(row)
            check_unused(origins, sample.id, row.origin, f"question_id {clipped(row.values['question_id'])}")
            labels.setdefault(sample.subset, Counter())[sample.reference["label"]] += 1
            kept = sample if corrected is None else self._correct(sample, row, corrected)
            samples.setdefault(sample.subset, []).extend([kept] if kept else [])
        asked = [sample for part in samples.values() for sample in part]
        if self.labels == "both":
            asked = [sample for sample in asked if sample.reference["repope"] is not None]
        if corrected is not None and not asked:
            raise DataError(
                f"none of the {len(origins)} questions is in {corrected.folder}; RePOPE's labels are those of POPE's "
                "questions about COCO"
            )
        names = [self._subset_name(origin, subset) for origin in self.origins for subset in self.subsets]
        self._samples = [sample for name in names for sample in samples.get(name, ())]
        self._kept = {name: Kept(count, count.total() - len(samples[name])) for name, count in labels.items()}

    def _subset_name(self, origin: str, subset: str) -> str:
        return subset if len(self.origins) == 1 else f"{origin} {subset}"

    def _sample(self, row: SourceRow) -> Sample:
        """Make a sample of a row with ``subset``, ``question_id``, ``text`` and ``label``."""
        values = row.values
        label, question = label_text(values["label"], row.origin), question_text(values["text"], row.origin)
        return Sample(
            id=f"{values['subset']}-{values['question_id']}",
            image=row.image,
            question=with_suffix(question, self.suffix),
            group=row.image.group,
            subset=values["subset"],
            reference={"label": label, "object": asked_object(question)},
        )

    def _correct(self, sample: Sample, row: SourceRow, corrected: CorrectedLabels) -> Sample | None:
        """Give a sample its corrected label; None for one that is left out."""
        subset = sample.subset.rpartition(" ")[2]
        label = corrected.find(subset, row.values["question_id"], row.image.name, row.values["text"])
        if self.labels == "both":
            return replace(sample, reference={**sample.reference, "repope": label})
        return None if label is None else replace(sample, reference={**sample.reference, "label": label})

    def _read_testbed(self) -> Iterator[SourceRow]:
        from stethoscope import testbed  # imports the renderer, which only this source needs

        scenes = testbed.scenes(self.scenes)
        images = {image.name: image for image in map(scene_image, scenes)}
        for subset in self.subsets:
            for row in testbed.pope_questions(scenes, subset, seed=self.seed, per_scene=self.per_scene):
                origin = f"testbed, {subset} question {row['question_id']}"
                yield SourceRow({**row, "subset": subset}, images[row["image"]], origin)

    def _read_files(self) -> Iterator[SourceRow]:
        for origin in self.origins:
            folder = self.images if isinstance(self.images, (str, Path)) else (self.images or {})[origin]
            images = ImageFolder(setting_path(str(folder).replace("{origin}", origin)))
            for subset in self.subsets:
                name = self.filename.replace("{subset}", subset).replace("{origin}", origin)
                path, empty = setting_path(self.questions) / name, True
                for _, line, row in read_rows(path, QUESTION_KEYS):
                    values = {**row, "subset": self._subset_name(origin, subset)}
                    yield SourceRow(values, images.find(str(row["image"]), line), line)
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
        counts, detail = confusion(reply, label, positive="yes"), {"reply": reply, "label": label}
        if self.labels == "both":
            corrected = sample.reference["repope"]
            again = confusion(None if corrected is None else reply, corrected or "", positive="yes")
            counts |= {f"repope_{name}": count for name, count in again.items()}
            detail["repope"] = corrected
        return Score("unparsed" if reply is None else "ok", counts, detail)

    def mentions(self, sample: Sample, answer: Answer) -> tuple[Mention, ...]:
        """Return the word yes as a mention of the object, hallucinated if the truth is no; a no claims nothing.

        With ``labels=both`` the truth is RePOPE's; where that has none, the mention is not judged.
        """
        label = sample.reference["label"] if self.labels != "both" else sample.reference["repope"]
        claims = claim(answer.text, self._parse(answer.text), label or "", sample.reference["object"])
        return claims if label else tuple(replace(mention, label=-1) for mention in claims)

    def metrics(self) -> Mapping[str, Metric]:
        """Return accuracy, balanced accuracy and the other shares of the confusion matrix, from 0 to 1."""
        if self.labels != "both":
            return YES_NO_METRICS
        metrics: dict[str, Metric] = {}
        for name, metric in YES_NO_METRICS.items():
            metrics |= {name: metric, f"{name}_repope": partial(_by_repope, metric)}
            metrics[f"{name}_difference"] = partial(_correction, metric)
        return metrics

    def notes(self, samples: Sequence[Sample]) -> Sequence[str]:
        """Name the parser, the labels with what they leave out, and POPE's file before its fix."""
        notes = [f"Replies are read by the parser {self.parser!r}; labels: {LABEL_NAMES[self.labels]}."]
        if self.labels == "both":
            asked = Counter(sample.subset for sample in samples)
            left = Counter(sample.subset for sample in samples if sample.reference["repope"] is None)
            notes.append(f"RePOPE leaves out {_shares({name: (left[name], asked[name]) for name in asked})}.")
        elif self.labels == "repope":
            counts = {name: (kept.left_out, kept.labels.total()) for name, kept in self._kept.items()}
            notes.append(f"RePOPE leaves out {_shares(counts)} of POPE's questions; they are not asked.")
        for name, kept in self._kept.items():
            if name.endswith("random") and kept.labels == OLD_RANDOM:
                notes.append(
                    f"{name}: POPE's file before its fix, 2,910 of now 3,000 questions, as LLaVA's authors use it; its "
                    "question ids are others."
                )
        return notes


def _check_origins(
    source: str, origins: Sequence[str], filename: str, images: str | Mapping[str, str] | None
) -> tuple[str, ...]:
    """Check the names of the questions' origins, and what depends on them.

    Raises:
        ConfigError: they are no list, or the source, the file name or the images do not fit them.
    """
    if isinstance(origins, str) or not origins or not all(isinstance(origin, str) and origin for origin in origins):
        raise ConfigError(f"task.origins={origins!r} should be a list of names, such as [coco,aokvqa,gqa]")
    names = tuple(dict.fromkeys(origins))
    if source != "files" and names != ("coco",):
        raise ConfigError(f"task.origins={list(names)} needs task.source=files; source={source} has POPE's own alone")
    if "{subset}" not in filename:
        raise ConfigError(f"task.filename={filename!r} should contain {{subset}}")
    if len(names) > 1 and "{origin}" not in filename:
        raise ConfigError(f"task.filename={filename!r} should contain {{origin}}, one of {', '.join(names)}")
    if isinstance(images, Mapping) and not set(names) <= set(images):
        missing = ", ".join(name for name in names if name not in images)
        raise ConfigError(f"task.images={dict(images)} has no folder for {missing}")
    return names


def _by_repope(metric: Metric, totals: Totals) -> np.ndarray:
    """Evaluate a metric on the counts by RePOPE's labels."""
    return metric({name.removeprefix("repope_"): total for name, total in totals.items() if name.startswith("repope_")})


def _correction(metric: Metric, totals: Totals) -> np.ndarray:
    """Return by how much a metric is higher by RePOPE's labels than by POPE's."""
    return _by_repope(metric, totals) - metric(totals)


def _shares(counts: Mapping[str, tuple[int, int]]) -> str:
    """Write parts of subsets.

    >>> _shares({"random": (226, 3000), "popular": (273, 3000)})
    '226 of 3000 (random), 273 of 3000 (popular)'
    """
    return ", ".join(f"{part} of {whole} ({name})" for name, (part, whole) in counts.items())
