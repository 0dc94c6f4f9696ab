"""DASH-B: pictures from the open world without an object, chosen because models see it there, and as many with it.

Augustin, Neuhaus and Hein, "DASH: Detection and Assessment of Systematic Hallucinations of VLMs", ICCV 2025, arXiv
2503.23573. A model that always says yes has an accuracy of .5, and 0 by the harmonic mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePath
from typing import ClassVar

from stethoscope.core.errors import ConfigError, DataError
from stethoscope.core.json_rows import clipped, read_json, shown
from stethoscope.core.types import Sample
from stethoscope.tasks.base import Metric
from stethoscope.tasks.counts import balanced_accuracy, harmonic, recall, tnr, yes_rate
from stethoscope.tasks.image_folder import ImageFolder
from stethoscope.tasks.questions import TNR_PUBLISHED, TPR_PUBLISHED, YesNoTask, label_text, question_text
from stethoscope.tasks.sources import DataSource, HubSource, SourceRow, check_choice, setting_path
from stethoscope.tasks.yes_no import PARSERS

QUESTION = "Can you see a {object} in this image? Please answer only with yes or no."
PARTS = {"neg": "no", "pos": "yes"}
"""Folder and file of a part -> the right answer."""


class DashB(YesNoTask):
    """Yes/no questions about one of 70 objects each, half of them about pictures that fool models into a yes.

    ``accuracy`` is the mean of ``tpr`` and ``tnr``, the shares of right answers about pictures with and without the
    object; ``harmonic_mean`` is theirs too.
    """

    name = "dash_b"
    version: ClassVar[str] = "1"
    primary = "harmonic_mean"
    max_new_tokens: int = 32

    def __init__(
        self,
        source: str = "files",
        parser: str = "contains",
        question: str | None = None,
        folder: str | None = None,
        dataset: str = "YanNeu/DASH-B",
        split: str = "test",
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> None:
        """Store and check the settings; ``conf/task/dash_b.yaml`` explains every argument.

        Raises:
            ConfigError: an unknown source or parser, a question without {object}, or no folder.
        """
        readers = {"files": self._read_files, "hub": self._read_hub}
        paths = {"folder": (folder, "the published folder with dash_benchmark_neg.json and dash_benchmark_pos.json")}
        super().__init__(DataSource("dash_b", source, readers, paths))
        check_choice("parser of dash_b", parser, PARSERS)
        if question is not None and "{object}" not in question:
            raise ConfigError(f"task.question={question!r} should contain {{object}}")
        self.source, self.parser, self.question, self.folder = source, parser, question, folder
        self.hub = HubSource(dataset, split, revision, local_files_only)

    def _read_files(self) -> Iterator[SourceRow]:
        folder = setting_path(self.folder)
        images = ImageFolder(folder)
        for part, label in PARTS.items():
            path = folder / f"dash_benchmark_{part}.json"
            sources = read_json(path)
            for source, object_, file in _file_names(sources, str(path)):
                origin = f"{path}, {clipped(source)}, {clipped(object_)}"
                values = {
                    "id": f"{part}-{source}-{object_}-{PurePath(file).stem}",
                    "question": QUESTION.replace("{object}", object_),
                    "object": object_,
                    "label": label,
                    "image": file,
                }
                yield SourceRow(values, images.find(f"{part}/{source}/{object_}/{file}", origin), origin)

    def _read_hub(self) -> Iterator[SourceRow]:
        columns = ("question_id", "question", "object", "answer", "img_id")
        for row, image, origin in self.hub.rows(columns, lambda row: str(row["img_id"])):
            values = {
                "id": str(row["question_id"]),
                "question": row["question"],
                "object": str(row["object"]),
                "label": row["answer"],
                "image": str(row["img_id"]),
            }
            yield SourceRow(values, image, origin)

    def read_row(self, row: SourceRow) -> Iterable[Sample]:
        """Make the sample of a row with ``id``, ``question``, ``object``, ``label`` and ``image``."""
        values = row.values
        question = question_text(values["question"], row.origin)
        if self.question is not None:
            question = self.question.replace("{object}", values["object"])
        label = label_text(values["label"], row.origin)
        yield Sample(
            id=values["id"],
            image=row.image,
            question=question,
            group=f"{label} {values['object']} {PurePath(values['image']).stem}",  # objects use the same file names
            reference={"label": label, "object": values["object"]},
        )

    def metrics(self) -> Mapping[str, Metric]:
        """Return the rates of right answers, their arithmetic and harmonic mean, and the yes-rate, from 0 to 1."""
        return {
            "harmonic_mean": harmonic(recall, tnr),
            "accuracy": balanced_accuracy,
            "tnr": tnr,
            "tpr": recall,
            "yes_rate": yes_rate,
            "harmonic_mean_published": harmonic(TPR_PUBLISHED, TNR_PUBLISHED),
            "accuracy_published": lambda totals: (TPR_PUBLISHED(totals) + TNR_PUBLISHED(totals)) / 2,
            "tnr_published": TNR_PUBLISHED,
            "tpr_published": TPR_PUBLISHED,
        }


def _file_names(sources: object, origin: str) -> Iterator[tuple[str, str, str]]:
    """Yield source, object and file name of every picture of one of the two files."""
    if not isinstance(sources, dict) or not sources:
        raise DataError(f"{origin}: an object of sources, objects and lists of file names was expected")
    for source, objects in sources.items():
        if not isinstance(objects, dict):
            raise DataError(f"{origin}: {clipped(source)} should be an object of lists, not {shown(objects)}")
        for object_, files in objects.items():
            if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
                raise DataError(f"{origin}: {clipped(object_)} should be a list of file names, not {shown(files)}")
            yield from ((source, object_, file) for file in files)
