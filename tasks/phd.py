"""PhD: for every picture a question to be answered by yes and one by no, also behind contexts that mislead.

Liu et al., "PhD: A ChatGPT-Prompted Visual Hallucination Evaluation Dataset", CVPR 2025, arXiv 2403.11116. Modes: the
questions alone (base), behind an inaccurate (iac) or an incorrect context (icc), and about generated pictures that
contradict common sense (ccs).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from stethoscope.core.errors import DataError
from stethoscope.core.json_rows import read_rows, shown
from stethoscope.core.types import UNKNOWN, Sample
from stethoscope.tasks.base import Metric
from stethoscope.tasks.counts import harmonic, recall, tnr, yes_rate
from stethoscope.tasks.image_folder import ImageFolder
from stethoscope.tasks.questions import TNR_PUBLISHED, TPR_PUBLISHED, YesNoTask, parsed_cell, question_text, with_suffix
from stethoscope.tasks.sources import DataSource, HubSource, SourceRow, check_choice, check_choices, setting_path
from stethoscope.tasks.yes_no import PARSERS

MODES = ("base", "iac", "icc", "ccs")
INSTRUCTION = (
    " In case there is an inconsistency between the context and the image content, you should follow the image. "
)
"""What stands between a context and its question."""
KEYS = ("image_id", "task", "yes_question", "no_question")
MORE_COLUMNS = ("context", "hitem", "subject", "ccs_description")


class Phd(YesNoTask):
    """Pairs of questions, one to be answered by yes and one by no, in up to four modes.

    ``phd_index`` is the harmonic mean of the shares of yes questions answered by yes and of no questions answered by
    no, for every mode and for every mode and task (object, attribute, sentiment, position, counting). The authors give
    no rule by which replies are read.
    """

    name = "phd"
    version: ClassVar[str] = "1"
    primary = "phd_index"
    max_new_tokens: int = 32

    def __init__(
        self,
        source: str = "files",
        modes: Sequence[str] = MODES,
        parser: str = "earlier",
        suffix: str = "",
        file: str | None = None,
        images: str | None = None,
        dataset: str = "MM-Hallu/PhD",
        split: str = "test",
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> None:
        """Store and check the settings; ``conf/task/phd.yaml`` explains every argument.

        Raises:
            ConfigError: an unknown source, mode or parser, or a path that the source needs.
        """
        paths = {
            "file": (file, "data.json"),
            "images": (images, "the folder with train2014/, val2014/ (COCO) and CCS_images/"),
        }
        super().__init__(DataSource("phd", source, {"files": self._read_files, "hub": self._read_hub}, paths))
        check_choice("parser of phd", parser, PARSERS)
        check_choices("modes", "mode of phd", modes, MODES)
        self.source, self.modes, self.parser, self.suffix = source, tuple(dict.fromkeys(modes)), parser, suffix
        self.file, self.images = file, images
        self.hub = HubSource(dataset, split, revision, local_files_only)

    def _read_files(self) -> Iterator[SourceRow]:
        images = ImageFolder(setting_path(self.images))
        for number, origin, row in read_rows(setting_path(self.file), KEYS, nulls=False):
            values = {**row, "number": number - 1}
            if self._modes_of(row):
                yield SourceRow(values, images.find_first(_file_names(row, origin), origin), origin)

    def _read_hub(self) -> Iterator[SourceRow]:
        rows = self.hub.rows(
            (*KEYS, *MORE_COLUMNS), lambda row: f"{'ccs' if row['ccs_description'] else 'coco'}-{row['image_id']}"
        )
        for number, (row, image, origin) in enumerate(rows):
            if self._modes_of(row):
                yield SourceRow({**row, "number": number}, image, origin)

    def _modes_of(self, row: Mapping[str, Any]) -> list[str]:
        """Return those of the chosen modes in which a row is asked."""
        return [mode for mode in self.modes if (mode == "ccs") == bool(row.get("ccs_description"))]

    def read_row(self, row: SourceRow) -> Iterable[Sample]:
        """Make two samples of a row for every mode in which it is asked."""
        values, origin = row.values, row.origin
        subject = next((str(values[key]) for key in ("hitem", "subject") if values.get(key)), UNKNOWN)
        for mode in self._modes_of(values):
            context = "" if mode in ("base", "ccs") else _context(values.get("context"), mode, origin) + INSTRUCTION
            for label in ("yes", "no"):
                question = question_text(values[f"{label}_question"], f"{origin}, {label}_question")
                yield Sample(
                    id=f"{mode}-{values['number']}-{label}",
                    image=row.image,
                    question=with_suffix(context + question, self.suffix),
                    group=row.image.group,
                    subset=mode,
                    reference={"label": label, "object": subject, "task": str(values["task"]).strip()},
                )

    def arrange(self, samples: list[Sample]) -> list[Sample]:
        """Put the questions in order mode by mode.

        Raises:
            DataError: no row belongs to a mode.
        """
        for mode in self.modes:
            if not any(sample.subset == mode for sample in samples):
                raise DataError(f"phd: the source has no row of mode {mode!r}; choose others by task.modes=[...]")
        return sorted(samples, key=lambda sample: self.modes.index(sample.subset))

    def subsets_of(self, sample: Sample) -> tuple[str, ...]:
        """Return the mode, and the mode with the task."""
        return sample.subset, f"{sample.subset} {sample.reference['task']}"

    def metrics(self) -> Mapping[str, Metric]:
        """Return the index and the two shares that it is made of, and the yes-rate, from 0 to 1."""
        return {
            "phd_index": harmonic(recall, tnr),
            "phd_index_published": harmonic(TPR_PUBLISHED, TNR_PUBLISHED),
            "yes_recall": recall,
            "no_recall": tnr,
            "yes_rate": yes_rate,
        }


def _file_names(row: Mapping[str, Any], origin: str) -> list[str]:
    """Return the files in which the picture of a row may be; the first one that exists counts."""
    id_ = str(row["image_id"]).strip()
    if row.get("ccs_description"):
        return [f"CCS_images/{id_}.png"]
    if not id_.isdecimal():
        raise DataError(f"{origin}: image_id {shown(row['image_id'])} is no number of a COCO image")
    return [f"{part}/COCO_{part}_{id_:0>12}.jpg" for part in ("train2014", "val2014")]


def _context(value: Any, mode: str, origin: str) -> str:
    """Return the context of a mode."""
    value = parsed_cell(value, f"{origin}: context")
    context = value.get(mode) if isinstance(value, Mapping) else None
    if not isinstance(context, str) or not context.strip():
        raise DataError(f"{origin}: context has no text for mode {mode!r}")
    return context
