"""Your own benchmark: a JSON-lines file, or a folder of images, described by configuration alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from stethoscope.core.errors import ConfigError, DataError, unknown
from stethoscope.core.json_rows import check_line, clipped, read_rows
from stethoscope.core.types import UNKNOWN, Answer, ImageRef, Mention, Sample, Score
from stethoscope.metrics.ranking import divide
from stethoscope.tasks import counts, yes_no
from stethoscope.tasks.base import Metric, Task
from stethoscope.tasks.extraction import COCO, load_extraction
from stethoscope.tasks.image_folder import ImageFolder
from stethoscope.tasks.object_extraction import label_mentions
from stethoscope.tasks.questions import with_suffix
from stethoscope.tasks.sources import check_choice, check_name, check_positive, setting_path

KINDS = ("yes_no", "caption", "unlabelled", "free")
_PRIMARY = {"yes_no": "f1", "caption": "chair_i", "unlabelled": "length", "free": "length"}
_TRUTH = {"yes_no": "label", "caption": "objects", "unlabelled": None, "free": None}
_NOT_READ = {"yes_no": ("objects",), "caption": ("label",), "unlabelled": ("label",), "free": ("label", "objects")}


class Custom(Task):
    """Questions about images, scored in one of three ways.

    ``yes_no``: every line has a ``label``, yes or no. ``caption``: every line has ``objects``, the list of what is in
    the image, and answers are searched for names of objects (``extraction``), as CHAIR does. ``unlabelled``: the same,
    but only some lines have ``objects``, or none; mentions of the others are not judged. A detector learns from them
    with ``labels=few`` or ``none``. ``free``: nothing is scored; for answers and features alone.
    """

    version: ClassVar[str] = "2"

    def __init__(
        self,
        kind: str = "free",
        name: str | int = "custom",
        file: str | None = None,
        images: str | None = None,
        question: str | None = None,
        suffix: str = "",
        parser: str = "first_word",
        extraction: str = COCO,
        max_new_tokens: int = 128,
        asks: str | None = None,
    ) -> None:
        """Store and check the settings; ``conf/task/custom.yaml`` explains every argument.

        Raises:
            ConfigError: an unknown kind or parser, neither file nor images, or what the kind needs is missing.
        """
        self.name = check_name(name)
        check_choice("kind of custom task", kind, KINDS)
        check_choice("parser of custom task", parser, yes_no.PARSERS)
        if not (file or images):
            raise ConfigError("a custom task needs task.file, a JSON-lines file, or task.images, a folder, or both")
        if not file and _TRUTH[kind]:
            raise ConfigError(
                f"task.kind={kind} needs task.file, a JSON-lines file with {_TRUTH[kind]!r} on every line; "
                "a folder alone has no truth to judge by (task.kind=unlabelled, or free)"
            )
        if not file and not (question or "").strip():
            raise ConfigError("a folder of images needs task.question, which is asked of every one")
        check_positive(max_new_tokens=max_new_tokens)
        self.asks = asks or ("description" if kind in ("caption", "unlabelled") else "question")
        check_choice("asks of custom task", self.asks, ("question", "description"))
        self.kind, self.primary, self.max_new_tokens = kind, _PRIMARY[kind], max_new_tokens
        self.file, self.images, self.question, self.suffix = file, images, question, suffix
        self.parser, self.extraction = parser, extraction
        self._samples: list[Sample] = []

    def setup(self) -> None:
        """Read file, vocabulary and folder and check that every image is there.

        Raises:
            DataError: a file is missing or broken; the message names file and line.
        """
        if self._samples:
            return
        captions = self.kind in ("caption", "unlabelled")
        self._extract = load_extraction(self.extraction if captions else COCO, key="task.extraction")
        self._samples = self._from_file() if self.file else self._from_folder()

    def _from_folder(self) -> list[Sample]:
        folder = ImageFolder(setting_path(self.images))
        names = folder.walk()
        if not names:
            raise DataError(f"image folder {folder.path} and the folders in it hold no image")
        return [self._sample(name, folder.find(name, "task.images"), self.question or "", {}) for name in names]

    def _from_file(self) -> list[Sample]:
        path = setting_path(self.file)
        truth = _TRUTH[self.kind]
        rows = list(read_rows(path, ("image", *((truth,) if truth else ())), nulls=False))
        folder = ImageFolder(setting_path(self.images) if self.images else path.parent)
        samples: dict[str, Sample] = {}
        for number, origin, row in rows:
            question, answer = row.get("question", self.question), row.get("answer")
            id_, subset = str(row.get("id", "")).strip() or str(number), row.get("subset", "all")
            check_line("custom", {**row, "question": question}, origin, _NOT_READ[self.kind])
            if question is None:
                raise DataError(f"{origin}: None is no question; give one on every line, or task.question")
            if id_ in samples:
                own = f"id {clipped(id_)} is used before"
                raise DataError(f"{origin}: {own if 'id' in row else f'a line without id has its number, but {own}'}")
            value = row[truth] if truth else row.get("objects") if self.kind == "unlabelled" else None
            reference = {} if value is None else self._truth(value, origin)
            reference |= {"answer": answer} if answer is not None else {}
            image = folder.find(str(row["image"]), origin)
            samples[id_] = self._sample(id_, image, question, reference, str(subset), answer)
        if not samples:
            raise DataError(f"{path} holds no question")
        return list(samples.values())

    def _sample(
        self,
        id_: str,
        image: ImageRef,
        question: str,
        reference: Mapping[str, Any],
        subset: str = "all",
        answer: str | None = None,
    ) -> Sample:
        asked = with_suffix(question.strip(), self.suffix)
        return Sample(id_, image, asked, image.group, subset, reference, answer, self.asks)

    def _truth(self, value: Any, origin: str) -> dict[str, Any]:
        """Return the reference of one line: its label, or its objects by the vocabulary's names."""
        if self.kind == "yes_no":
            return {"label": value.strip().lower()}
        names = self._extract.objects
        for name in value:
            if names is not None and name not in names:
                raise DataError(f"{origin}: {unknown('object of the vocabulary', clipped(name), names)}")
        return {"objects": sorted(set(value)), "extraction": self._extract.identity}  # other words, other scores

    def identity(self) -> Mapping[str, Any]:
        """Return the identity of the extraction: a file of words counts by its words."""
        return {"extraction": self._extract.identity}

    def samples(self) -> Sequence[Sample]:
        """Return the questions in the order of the file, or of the images' names."""
        return self._samples

    def evaluate(self, sample: Sample, answer: Answer) -> tuple[Score, tuple[Mention, ...]]:
        """Extract the objects of a caption once, for its score and its mentions."""
        if self.kind not in ("caption", "unlabelled"):
            return super().evaluate(sample, answer)
        text, truth = answer.text, sample.reference.get("objects")
        named = self._extract(text)
        if truth is None:
            return counts.unjudged_caption(text), label_mentions(named, [-1] * len(named))
        mentions = label_mentions(named, [int(mention.name not in truth) for mention in named])
        return counts.score_caption(text, [mention.name for mention in named], truth), mentions

    def score(self, sample: Sample, answer: Answer) -> Score:
        """Count what the kind asks for; ``unparsed`` for an empty answer or one that is no yes and no no."""
        text = answer.text
        if self.kind in ("caption", "unlabelled"):
            return self.evaluate(sample, answer)[0]
        if self.kind == "yes_no":
            reply, label = yes_no.PARSERS[self.parser](text), sample.reference["label"]
            status = "unparsed" if reply is None else "ok"
            counted = {**counts.confusion(reply, label, positive="yes"), "asked": 1.0}
            return Score(status, counted, {"reply": reply, "label": label})
        return Score("ok" if text.strip() else "unparsed", {"answers": 1.0, "words": float(len(text.split()))})

    def mentions(self, sample: Sample, answer: Answer) -> tuple[Mention, ...]:
        """Return the objects that a caption names, or the yes of a reply; a free answer has none."""
        if self.kind in ("caption", "unlabelled"):
            return self.evaluate(sample, answer)[1]
        if self.kind == "yes_no":
            reply = yes_no.PARSERS[self.parser](answer.text)
            return yes_no.claim(answer.text, reply, sample.reference["label"], UNKNOWN)
        return ()

    def notes(self, samples: Sequence[Sample]) -> Sequence[str]:
        """Name the parser of yes and no, and say what replies that are neither count as."""
        if self.kind != "yes_no":
            return []
        return [
            f"Replies are read by the parser {self.parser!r}.",
            "answered: the share of replies that are a yes or a no; accuracy_all takes the others for wrong, all other "
            "metrics leave them out.",
        ]

    def metrics(self) -> Mapping[str, Metric]:
        """Return the metrics of the kind: with yes as the positive class, CHAIR's, or words per answer.

        Of ``yes_no``, ``answered`` is the share of replies that are a yes or a no; the others are over those alone, but
        for ``accuracy_all``, which takes a reply that is neither for a wrong one.
        """
        if self.kind == "caption":
            return counts.CHAIR_METRICS
        if self.kind == "unlabelled":
            return {**counts.CHAIR_METRICS, "length": counts.share("words", "captions", "unjudged")}
        if self.kind == "free":
            return {"length": counts.share("words", "answers")}
        return {
            **{name: counts.YES_NO_METRICS[name] for name in ("accuracy", "precision", "recall", "f1", "yes_rate")},
            "accuracy_all": lambda totals: divide(totals["tp"] + totals["tn"], totals["asked"]),
            "answered": lambda totals: divide(counts.total(totals, *counts.CONFUSION), totals["asked"]),
        }
