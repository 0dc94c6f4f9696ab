"""The part of MME that is about hallucination: existence, count, position and colour.

Fu et al., "MME: A Comprehensive Evaluation Benchmark for Multimodal Large Language Models", arXiv 2306.13394. Two
questions about every image, one of which deserves a yes.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from stethoscope.core.errors import DataError
from stethoscope.core.json_rows import clipped, read_text
from stethoscope.core.types import Answer, Mention, Sample, Score
from stethoscope.metrics.ranking import divide
from stethoscope.tasks import yes_no
from stethoscope.tasks.base import Metric, ScoredSample, Tally, Task, Totals
from stethoscope.tasks.counts import complete_sets, set_counts, share, total
from stethoscope.tasks.image_folder import ImageFolder
from stethoscope.tasks.questions import asked_object, label_text, question_text, with_suffix
from stethoscope.tasks.sources import DataSource, HubSource, SourceRow, check_choices, setting_path

CATEGORIES = ("existence", "count", "position", "color")
TOTAL = "total"
"""The subset that stands for all categories together."""

READINGS = {"": yes_no.prefix, "strict_": yes_no.strict}
"""Prefix of counts -> parser: the published one, and one that wants a plain yes or no."""


class Mme(Task):
    """Pairs of yes/no questions. The score of a category is 100 (accuracy + accuracy+), so at most 200.

    ``accuracy`` is over the answers that could be read, ``accuracy_plus`` over the images of which both answers could:
    how many have both right. ``score_published`` takes an answer that cannot be read for a wrong one, ``score_strict``
    reads nothing but a plain yes or no. On the subset ``total`` scores are the sums over categories, at most 800.
    """

    name = "mme"
    version: ClassVar[str] = "1"
    primary = "score"
    max_new_tokens: int = 32

    def __init__(
        self,
        source: str = "files",
        categories: Sequence[str] = CATEGORIES,
        suffix: str = "",
        folder: str | None = None,
        dataset: str = "lmms-lab/MME",
        split: str = "test",
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> None:
        """Store and check the settings; ``conf/task/mme.yaml`` explains every argument.

        Raises:
            ConfigError: an unknown source or category, or no folder.
        """
        self.data = DataSource(
            "mme",
            source,
            {"files": self._read_files, "hub": self._read_hub},
            {"folder": (folder, "the published folder with one folder per category")},
        )
        check_choices("categories", "category of mme", categories, CATEGORIES)
        self.source, self.categories, self.suffix, self.folder = source, categories, suffix, folder
        self.hub = HubSource(dataset, split, revision, local_files_only)
        self._samples: list[Sample] = []

    def setup(self) -> None:
        """Read the questions and check that every image is there.

        Raises:
            DataError: a file is missing or broken; the message names file and line.
        """
        if self._samples:
            return
        asked: Counter[str] = Counter()
        samples = []
        for values, image, _ in self.data.rows():
            name, category = Path(image.name).stem, values["category"]
            pair = f"{category}-{name}"
            asked[pair] += 1
            samples.append(
                Sample(
                    id=f"{pair}-{asked[pair]}",
                    image=image,
                    question=with_suffix(values["question"], self.suffix),
                    group=name,  # categories share images
                    subset=category,
                    reference={"label": values["label"], "object": asked_object(values["question"])},
                )
            )
        self._samples = samples  # at the end: an error above leaves none behind

    def _read_files(self) -> Iterator[SourceRow]:
        for category in self.categories:
            folder = setting_path(self.folder) / category
            # large categories keep texts and images apart
            texts = folder / "questions_answers_YN" if (folder / "questions_answers_YN").is_dir() else folder
            images = ImageFolder(folder / "images" if (folder / "images").is_dir() else folder)
            names: dict[str, list[str]] = {}
            for name in images.names():
                names.setdefault(Path(name).stem, []).append(name)
            files = [path for path in sorted(texts.glob("*")) if path.suffix.lower() == ".txt" and path.name[0] != "."]
            if not files:
                raise DataError(f"{texts} has no text file with questions")
            for path in files:
                if len(names.get(path.stem, ())) != 1:
                    there = ", ".join(map(clipped, names.get(path.stem, ()))) or "none"
                    wanted = f"one image named {clipped(path.stem)} was expected in {images.path}"
                    raise DataError(f"{path}: {wanted}, there is {there}")
                image = images.find(names.pop(path.stem)[0], str(path))
                for question, label in read_questions(path):
                    yield SourceRow({"category": category, "question": question, "label": label}, image, str(path))
            if names:
                warnings.warn(
                    f"{len(names)} images in {images.path} are left out, having no text file in {texts}: "
                    f"{clipped(', '.join(sorted(names)))}",
                    stacklevel=2,
                )

    def _read_hub(self) -> Iterator[SourceRow]:
        columns, categories = ("question_id", "question", "answer", "category"), set()
        for row, image, origin in self.hub.rows(columns, lambda row: Path(str(row["question_id"])).name):
            category = row["category"]
            if category in self.categories:
                question, label = question_text(row["question"], origin), label_text(row["answer"], origin)
                yield SourceRow({"category": category, "question": question, "label": label}, image, origin)
                categories.add(category)
        for category in self.categories:
            if category not in categories:
                raise DataError(f"data set {self.hub.dataset!r} has no row of category {category!r}")

    def samples(self) -> Sequence[Sample]:
        """Return the questions category by category; the two about an image follow each other."""
        return self._samples

    def score(self, sample: Sample, answer: Answer) -> Score:
        """Count the answer as right or wrong, as both parsers read it; ``unparsed`` if the published one cannot."""
        label, counts = sample.reference["label"], {"asked": 1.0}
        replies = {prefix: parse(answer.text) for prefix, parse in READINGS.items()}
        for prefix, reply in replies.items():
            counts |= {f"{prefix}read": float(reply is not None), f"{prefix}right": float(reply == label)}
        detail = {"reply": replies[""], "strict": replies["strict_"], "label": label}
        return Score("unparsed" if replies[""] is None else "ok", counts, detail)

    def mentions(self, sample: Sample, answer: Answer) -> tuple[Mention, ...]:
        """Return the word yes as a mention of what is asked about, hallucinated if the truth is no."""
        return yes_no.claim(
            answer.text, yes_no.prefix(answer.text), sample.reference["label"], sample.reference["object"]
        )

    def unit(self, sample: Sample) -> Hashable:
        """Return category and image: both questions about it count together."""
        return sample.subset, sample.group

    def tally(self, scored: Sequence[ScoredSample]) -> Sequence[Tally]:
        """Total every sample under ``total`` and its category; the first of an image also carries the pair's counts.

        Counts are named by category, since the total of the scores is not the score of the totals.
        """
        self.setup()  # the task of a finished run has read nothing yet
        counts = [{f"{sample.subset} {name}": value for name, value in own.items()} for sample, own in scored]
        for indices in complete_sets(scored, self.samples(), key=self.unit):
            first = scored[indices[0]][0]
            for prefix in READINGS:
                rights, reads = ([scored[index][1][prefix + name] for index in indices] for name in ("right", "read"))
                pair = set_counts(f"{prefix}images", rights, reads)
                counts[indices[0]] |= {f"{first.subset} {name}": value for name, value in pair.items()}
        subsets = [TOTAL, *self.categories] if len(self.categories) > 1 else list(self.categories)
        return [
            Tally(sample.group, subset, own)
            for subset in subsets
            for (sample, _), own in zip(scored, counts, strict=True)
            if subset in (TOTAL, sample.subset)
        ]

    def notes(self, samples: Sequence[Sample]) -> Sequence[str]:
        """Name the parser."""
        return ["Replies are read by the parser 'prefix'."]

    def metrics(self) -> Mapping[str, Metric]:
        """Return accuracy and accuracy+ from 0 to 1, scores from 0 to 200 for a category."""
        return {
            "accuracy": self._share("right", "read"),
            "accuracy_plus": self._share("images_right", "images"),
            "score": lambda totals: self._score(totals, "", "read", "images"),
            "score_published": lambda totals: self._score(totals, "", "asked", "images_asked"),
            "score_strict": lambda totals: self._score(totals, "strict_", "strict_read", "strict_images"),
        }

    def _share(self, part: str, whole: str) -> Metric:
        """Return the metric that divides one count by another, both over all categories."""
        parts, wholes = ([f"{category} {name}" for category in self.categories] for name in (part, whole))
        return lambda totals: divide(total(totals, *parts), total(totals, *wholes))

    def _score(self, totals: Totals, prefix: str, answers: str, images: str) -> np.ndarray:
        """Sum the scores of the categories that were asked about; NaN if one of them has nothing to score."""
        scores = []
        for category in self.categories:
            if total(totals, f"{category} asked").any():
                accuracy = share(f"{category} {prefix}right", f"{category} {answers}")
                accuracy_plus = share(f"{category} {prefix}images_right", f"{category} {images}")
                scores.append(100 * (accuracy(totals) + accuracy_plus(totals)))
        return np.sum(scores, axis=0)


def read_questions(path: Path) -> list[tuple[str, str]]:
    """Return (question, label) of every line of one of MME's text files: question, a tab, Yes or No.

    Raises:
        DataError: a line without tab or with another answer, or no line at all.
    """
    questions = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            question, tab, label = line.rpartition("\t")
            if not tab:
                raise DataError(f"{path}, line {number}: a question, a tab and Yes or No were expected")
            origin = f"{path}, line {number}"
            questions.append((question_text(question, origin), label_text(label, origin)))
    if not questions:
        raise DataError(f"{path} holds no question")
    return questions
