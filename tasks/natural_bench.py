"""NaturalBench: two pictures and two questions in a group, each question with another answer to each picture.

Li et al., "NaturalBench: Evaluating Vision-Language Models on Natural Adversarial Samples", NeurIPS 2024, arXiv
2410.14669. An answer that does not look at the picture is right half of the time and never right for a whole group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import ClassVar

from stethoscope.core.errors import DataError, unknown
from stethoscope.core.json_rows import clipped, shown
from stethoscope.core.types import Answer, Mention, Sample
from stethoscope.tasks import choice, yes_no
from stethoscope.tasks.annotations import TableImages, read_table
from stethoscope.tasks.base import Metric
from stethoscope.tasks.image_folder import ImageFolder
from stethoscope.tasks.questions import ACCURACY, QuestionTask, asked_object, question_text, set_share
from stethoscope.tasks.sources import DataSource, HubSource, SourceRow, check_flags, setting_path

SUFFIXES = {
    "yes_no": "Please answer Yes or No.",
    "multiple_choice": "Please output the letter corresponding to the correct option.",
}
"""What is added to a question, by its type."""
REPLIES = {"yes_no": ("yes", "no"), "multiple_choice": ("A", "B")}
"""Replies by type: the first is right for the first question and picture, and for the second question and picture."""
OPTIONS = {"A": "", "B": ""}  # their texts are part of the question
GROUP = 4


class NaturalBench(QuestionTask):
    """Yes/no and two-choice questions in groups of four: (first question, first picture), (first, second), ...

    ``Acc`` is over answers, ``Q_Acc`` over questions with both pictures right, ``I_Acc`` over pictures with both
    questions right, ``G_Acc`` over groups with all four right.
    """

    name = "natural_bench"
    version: ClassVar[str] = "1"
    primary = "G_Acc"
    max_new_tokens: int = 16
    parser = "earlier"
    sets: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "questions": ("group", "question"),
        "images": ("group", "image"),
        "groups": ("group",),
    }

    def __init__(
        self,
        source: str = "hub",
        suffix: bool | str = True,  # the command line takes every suffix for a text
        file: str | None = None,
        images: str | None = None,
        dataset: str = "BaiqiL/NaturalBench-lmms-eval",
        split: str = "test",
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> None:
        """Store and check the settings; ``conf/task/natural_bench.yaml`` explains every argument.

        Raises:
            ConfigError: an unknown source, or no file.
        """
        readers = {"files": self._read_files, "hub": self._read_hub}
        super().__init__(
            DataSource("natural_bench", source, readers, {"file": (file, "the table NaturalBenchDataset.tsv")})
        )
        suffix = {"true": True, "false": False}.get(suffix, suffix) if isinstance(suffix, str) else suffix
        check_flags(suffix=suffix)
        self.source, self.suffix, self.file, self.images = source, suffix, file, images
        self.hub = HubSource(dataset, split, revision, local_files_only, image="Image")

    def _read_files(self) -> Iterator[SourceRow]:
        path = setting_path(self.file)
        if self.images:
            folder = ImageFolder(setting_path(self.images))
            for row in read_table(path, ("index", "question", "type", "image_path")):
                yield SourceRow(row.values, folder.find(row.values["image_path"], row.origin), row.origin)
        else:
            pictures = TableImages(path)
            for row in read_table(path, ("index", "question", "type", "image")):
                values = {key: value for key, value in row.values.items() if key != "image"}
                yield SourceRow(values, pictures.ref(row, row.values["index"].strip()), row.origin)

    def _read_hub(self) -> Iterator[SourceRow]:
        columns = ("Index", "Question", "Question_Type")
        for row, image, origin in self.hub.rows(columns, lambda row: str(row["Index"])):
            values = {"index": row["Index"], "question": row["Question"], "type": row["Question_Type"]}
            yield SourceRow(values, image, origin)

    def read_row(self, row: SourceRow) -> Iterable[Sample]:
        """Make the sample of a row with ``index``, ``question`` and ``type``; its index tells the right reply."""
        values, kind = row.values, str(row.values["type"]).strip()
        if kind not in REPLIES:
            raise DataError(f"{row.origin}: {unknown('type of question', clipped(kind), REPLIES)}")
        text = str(values["index"]).strip()
        if not text.isdecimal():
            raise DataError(f"{row.origin}: index {shown(values['index'])} is no whole number")
        group, position = divmod(int(text), GROUP)
        question, image = divmod(position, 2)
        asked = question_text(values["question"], row.origin)
        yield Sample(
            id=text,
            image=row.image,
            question=f"{asked} {SUFFIXES[kind]}" if self.suffix else asked,
            group=f"group {group}",
            subset=kind,
            reference={
                "label": REPLIES[kind][question != image],
                "object": asked_object(asked),
                "group": group,
                "question": question,
                "image": image,
            },
        )

    def arrange(self, samples: list[Sample]) -> list[Sample]:
        """Check that all groups are whole.

        Raises:
            DataError: a row of a group is missing.
        """
        for group, count in Counter(sample.reference["group"] for sample in samples).items():
            if count != GROUP:
                rows = f"{GROUP * group} to {GROUP * group + GROUP - 1}"
                raise DataError(f"natural_bench: {count} of the {GROUP} rows with the indices {rows} are there")
        return samples

    def reply(self, sample: Sample, text: str) -> yes_no.Reply:
        """Read the earlier one of the two words or letters."""
        if sample.subset == "yes_no":
            return yes_no.earlier(text)
        return choice.earlier_letter(text, OPTIONS)

    def mentions(self, sample: Sample, answer: Answer) -> tuple[Mention, ...]:
        """Return a yes as a mention of what is asked about, or the chosen letter; hallucinated if it is wrong."""
        reply, label = self.reply(sample, answer.text), sample.reference["label"]
        if sample.subset == "yes_no":
            return yes_no.claim(answer.text, reply, label, sample.reference["object"])
        return choice.claim(answer.text, reply, label, OPTIONS)

    def metrics(self) -> Mapping[str, Metric]:
        """Return the accuracy of answers, of whole questions, pictures and groups, from 0 to 1."""
        shares = {f"{name[0].upper()}_Acc": set_share(name) for name in self.sets}
        plain = {name: metric for name, (metric, _) in shares.items()}
        published = {f"{name}_published": metric for name, (_, metric) in shares.items()}
        return {"Acc": ACCURACY["accuracy"], **plain, "Acc_published": ACCURACY["accuracy_published"], **published}
