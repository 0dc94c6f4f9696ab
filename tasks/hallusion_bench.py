"""HallusionBench: illusions, charts, maps, tables, each also in an edited version, and yes/no questions about them.

Guan et al., "HallusionBench: An Advanced Diagnostic Suite for Entangled Language Hallucination and Visual Illusion in
Large Vision-Language Models", CVPR 2024, arXiv 2310.14566. The authors let GPT-4 compare answers; here a parser reads
yes or no, as VLMEvalKit and lmms-eval do.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np

from stethoscope.core.errors import DataError, unknown
from stethoscope.core.types import Answer, Mention, Sample, Score
from stethoscope.tasks import yes_no
from stethoscope.tasks.annotations import clipped, read_rows, shown, with_suffix
from stethoscope.tasks.base import ScoredSample, Tally, Task, Totals
from stethoscope.tasks.counts import complete_sets, ratio, set_counts
from stethoscope.tasks.image_folder import ImageFolder
from stethoscope.tasks.sources import DataSource, HubSource, SourceRow, check_choice, setting_path

CATEGORIES = ("VD", "VS")
KEYS = ("category", "subcategory", "visual_input", "set_id", "figure_id", "question_id", "question", "gt_answer")
SETS = {"figures": ("set_id", "figure_id"), "questions": ("set_id", "question_id")}
"""Prefix of counts -> what, beside category and subcategory, names the answers that must all be right."""


class HallusionBench(Task):
    """Yes/no questions in sets: every figure has several questions, every question is asked of several figures.

    ``aAcc`` is the accuracy of answers, ``fAcc`` the share of figures with all their questions right, ``qAcc`` the
    share of questions answered rightly of all their figures; all over what could be read. Those called ``published``
    take an answer that cannot be read for a wrong one. Questions without an image, which some of ``VS`` are, are not
    asked: the published figures of the paper include them.
    """

    name = "hallusion_bench"
    version: ClassVar[str] = "1"
    primary = "aAcc"

    def __init__(
        self,
        source: str = "files",
        parser: str = "either",
        suffix: str = "",
        file: str | None = None,
        images: str | None = None,
        dataset: str = "lmms-lab/HallusionBench",
        split: str = "image",
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> None:
        """Store and check the settings; ``conf/task/hallusion_bench.yaml`` explains every argument.

        Raises:
            ConfigError: an unknown source or parser, or a path that the source needs.
        """
        self.data = DataSource(
            "hallusion_bench",
            source,
            {"files": self._read_files, "hub": self._read_hub},
            {"file": (file, "HallusionBench.json"), "images": (images, "the folder with VD/ and VS/")},
        )
        check_choice("parser of hallusion_bench", parser, yes_no.PARSERS)
        self.source, self.parser, self.suffix, self.file, self.images = source, parser, suffix, file, images
        self.hub = HubSource(dataset, split, revision, local_files_only)
        self._samples: list[Sample] = []

    def setup(self) -> None:
        """Read the questions and check that every image is there.

        Raises:
            DataError: a file is missing or broken; the message names file and line.
        """
        if self._samples:
            return
        samples: dict[str, Sample] = {}
        self._without_image = 0
        for row in self.data.rows():
            sample = self._sample(row)
            if sample.id in samples:
                raise DataError(f"{row.origin}: question {clipped(sample.id)} occurs twice")
            samples[sample.id] = sample
        if not samples:
            raise DataError(f"{self.file if self.source == 'files' else self.hub.dataset} has no question on an image")
        if self._without_image:
            warnings.warn(
                f"hallusion_bench: {self._without_image} questions without an image are left out, "
                f"{len(samples)} are asked",
                stacklevel=2,
            )
        self._samples = list(samples.values())

    def _read_files(self) -> Iterator[SourceRow]:
        path, images = setting_path(self.file), ImageFolder(setting_path(self.images))
        for _, origin, row in read_rows(path, KEYS):
            if self._has_image(row):
                yield SourceRow(row, images.find(_file_name(row), origin), origin)

    def _read_hub(self) -> Iterator[SourceRow]:
        return (row for row in self.hub.rows(KEYS, _file_name) if self._has_image(row.values))

    def _has_image(self, row: Mapping[str, Any]) -> bool:
        """Tell whether a question is about an image, and count those that are not."""
        self._without_image += str(row["visual_input"]) == "0"
        return str(row["visual_input"]) != "0"

    def _sample(self, row: SourceRow) -> Sample:
        values, origin = row.values, row.origin
        if values["category"] not in CATEGORIES:
            raise DataError(f"{origin}: {unknown('category', clipped(values['category']), CATEGORIES)}")
        label = {"1": "yes", "0": "no"}.get(str(values["gt_answer"]))
        if label is None:
            raise DataError(f"{origin}: gt_answer {shown(values['gt_answer'])} is neither 0 (no) nor 1 (yes)")
        if not isinstance(values["question"], str) or not values["question"].strip():
            raise DataError(f"{origin}: {shown(values['question'])} is no question")
        ids = {key: str(values[key]) for key in ("subcategory", "set_id", "figure_id", "question_id")}
        return Sample(
            id="_".join([values["category"], *ids.values()]),
            image=row.image,
            question=with_suffix(values["question"].strip(), self.suffix),
            group=f"{values['category']}_{ids['subcategory']}_{ids['set_id']}",  # figures of a set are versions of one
            subset=values["category"],
            reference={"label": label, **ids},
        )

    def samples(self) -> Sequence[Sample]:
        """Return the questions in the order of the source."""
        return self._samples

    def score(self, sample: Sample, answer: Answer) -> Score:
        """Count the answer as right or wrong; ``unparsed`` if the parser reads neither yes nor no."""
        reply, label = yes_no.PARSERS[self.parser](answer.text), sample.reference["label"]
        counts = {"asked": 1.0, "read": float(reply is not None), "right": float(reply == label)}
        return Score("unparsed" if reply is None else "ok", counts, {"reply": reply, "label": label})

    def mentions(self, sample: Sample, answer: Answer) -> tuple[Mention, ...]:
        """Return the word yes as a mention of what is asked about, hallucinated if the truth is no."""
        reply = yes_no.PARSERS[self.parser](answer.text)
        return yes_no.claim(answer.text, reply, sample.reference["label"], sample.reference["subcategory"])

    def unit(self, sample: Sample) -> Hashable:
        """Return the set of figures and questions, every one of which is asked of every other."""
        return _set_key(sample, ("set_id",))

    def tally(self, scored: Sequence[ScoredSample]) -> Sequence[Tally]:
        """Total every sample under ``all`` and its category; the first of a set also carries the counts of the set."""
        self.setup()  # the task of a finished run has read nothing yet
        counts = [dict(own) for _, own in scored]
        for name, keys in SETS.items():
            for indices in complete_sets(scored, self.samples(), key=partial(_set_key, fields=keys)):
                rights, reads = ([scored[index][1][count] for index in indices] for count in ("right", "read"))
                counts[indices[0]] |= set_counts(name, rights, reads)
        return [
            Tally(sample.group, subset, own)
            for subset in ("all", *CATEGORIES)
            for (sample, _), own in zip(scored, counts, strict=True)
            if subset in ("all", sample.subset)
        ]

    def notes(self, samples: Sequence[Sample]) -> Sequence[str]:
        """Name the parser."""
        return [f"Replies are read by the parser {self.parser!r}."]

    def metrics(self) -> Mapping[str, Callable[[Totals], np.ndarray]]:
        """Return the accuracy of answers, of whole figures and of whole questions, from 0 to 1."""
        return {
            "aAcc": lambda totals: ratio(totals["right"], totals["read"]),
            "fAcc": lambda totals: _share(totals, "figures_right", "figures"),
            "qAcc": lambda totals: _share(totals, "questions_right", "questions"),
            "aAcc_published": lambda totals: ratio(totals["right"], totals["asked"]),
            "fAcc_published": lambda totals: _share(totals, "figures_right", "figures_asked"),
            "qAcc_published": lambda totals: _share(totals, "questions_right", "questions_asked"),
        }


def _file_name(row: Mapping[str, Any]) -> str:
    return f"{row['category']}/{row['subcategory']}/{row['set_id']}_{row['figure_id']}.png"


def _set_key(sample: Sample, fields: Sequence[str]) -> tuple[str, ...]:
    """Return what identifies the set of a sample: category, subcategory and the given fields."""
    return (sample.subset, sample.reference["subcategory"], *(sample.reference[field] for field in fields))


def _share(totals: Totals, part: str, whole: str) -> np.ndarray:
    """Divide counts that only complete sets have; NaN where a limited run completed none."""
    nothing = np.zeros_like(totals["asked"])
    return ratio(totals.get(part, nothing), totals.get(whole, nothing))
