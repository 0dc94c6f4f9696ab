"""HallusionBench: illusions, charts, maps, tables, each also in an edited version, and yes/no questions about them.

Guan et al., "HallusionBench: An Advanced Diagnostic Suite for Entangled Language Hallucination and Visual Illusion in
Large Vision-Language Models", CVPR 2024, arXiv 2310.14566. The authors let GPT-4 compare answers; here a parser reads
yes or no, as VLMEvalKit and lmms-eval do.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from stethoscope.core.errors import DataError, unknown
from stethoscope.core.json_rows import clipped, read_rows, shown
from stethoscope.core.types import Answer, Mention, Sample
from stethoscope.tasks import yes_no
from stethoscope.tasks.base import Metric
from stethoscope.tasks.image_folder import ImageFolder
from stethoscope.tasks.questions import ACCURACY, QuestionTask, question_text, set_share, with_suffix
from stethoscope.tasks.sources import DataSource, HubSource, SourceRow, check_choice, setting_path

CATEGORIES = ("VD", "VS")
KEYS = ("category", "subcategory", "visual_input", "set_id", "figure_id", "question_id", "question", "gt_answer")


class HallusionBench(QuestionTask):
    """Yes/no questions in sets: every figure has several questions, every question is asked of several figures.

    ``aAcc`` is the accuracy of answers, ``fAcc`` the share of figures with all their questions right, ``qAcc`` the
    share of questions answered rightly of all their figures; all over what could be read. Those called ``published``
    take an answer that cannot be read for a wrong one. Questions without an image, which some of ``VS`` are, are not
    asked: the published figures of the paper include them.
    """

    name = "hallusion_bench"
    version: ClassVar[str] = "1"
    primary = "aAcc"
    sets: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "figures": ("subcategory", "set_id", "figure_id"),
        "questions": ("subcategory", "set_id", "question_id"),
    }

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
        paths = {"file": (file, "HallusionBench.json"), "images": (images, "the folder with VD/ and VS/")}
        readers = {"files": self._read_files, "hub": self._read_hub}
        super().__init__(DataSource("hallusion_bench", source, readers, paths))
        check_choice("parser of hallusion_bench", parser, yes_no.PARSERS)
        self.source, self.parser, self.suffix, self.file, self.images = source, parser, suffix, file, images
        self.hub = HubSource(dataset, split, revision, local_files_only)

    def setup(self) -> None:
        """Read the questions and check that every image is there; warn of questions without one.

        Raises:
            DataError: a file is missing or broken; the message names file and line.
        """
        if self._samples:
            return
        self._without_image = 0
        super().setup()
        if self._without_image:
            warnings.warn(
                f"hallusion_bench: {self._without_image} questions without an image are left out, "
                f"{len(self._samples)} are asked",
                stacklevel=2,
            )

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

    def read_row(self, row: SourceRow) -> Iterator[Sample]:
        """Make the sample of a row."""
        values, origin = row.values, row.origin
        if values["category"] not in CATEGORIES:
            raise DataError(f"{origin}: {unknown('category', clipped(values['category']), CATEGORIES)}")
        label = {"1": "yes", "0": "no"}.get(str(values["gt_answer"]))
        if label is None:
            raise DataError(f"{origin}: gt_answer {shown(values['gt_answer'])} is neither 0 (no) nor 1 (yes)")
        ids = {key: str(values[key]) for key in ("subcategory", "set_id", "figure_id", "question_id")}
        yield Sample(
            id="_".join([values["category"], *ids.values()]),
            image=row.image,
            question=with_suffix(question_text(values["question"], origin), self.suffix),
            group=f"{values['category']}_{ids['subcategory']}_{ids['set_id']}",  # figures of a set are versions of one
            subset=values["category"],
            reference={"label": label, **ids},
        )

    def reply(self, sample: Sample, text: str) -> yes_no.Reply:
        """Read yes or no by the chosen parser."""
        return yes_no.PARSERS[self.parser](text)

    def mentions(self, sample: Sample, answer: Answer) -> tuple[Mention, ...]:
        """Return the word yes as a mention of what is asked about, hallucinated if the truth is no."""
        reply = self.reply(sample, answer.text)
        return yes_no.claim(answer.text, reply, sample.reference["label"], sample.reference["subcategory"])

    def set_key(self, sample: Sample, fields: tuple[str, ...]) -> tuple[Any, ...] | None:
        """See ``QuestionTask.set_key``: ids are counted anew in every category."""
        key = super().set_key(sample, fields)
        return None if key is None else (sample.subset, *key)

    def metrics(self) -> Mapping[str, Metric]:
        """Return the accuracy of answers, of whole figures and of whole questions, from 0 to 1."""
        (figures, figures_published), (questions, questions_published) = map(set_share, self.sets)
        return {
            "aAcc": ACCURACY["accuracy"],
            "fAcc": figures,
            "qAcc": questions,
            "aAcc_published": ACCURACY["accuracy_published"],
            "fAcc_published": figures_published,
            "qAcc_published": questions_published,
        }


def _file_name(row: Mapping[str, Any]) -> str:
    return f"{row['category']}/{row['subcategory']}/{row['set_id']}_{row['figure_id']}.png"
