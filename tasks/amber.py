"""AMBER: what does a description invent, and what does the model deny or affirm about objects, attributes, relations?

Wang et al., "AMBER: An LLM-free Multi-dimensional Benchmark for MLLMs Hallucination Evaluation", arXiv 2311.07397. The
definitions are those of the authors' ``inference.py`` (junyangwang0410/AMBER).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from stethoscope.core.errors import ConfigError, DataError, unknown
from stethoscope.core.types import UNKNOWN, Answer, Mention, Sample, Score
from stethoscope.task import Judged, Tally, Task, Totals
from stethoscope.tasks import yes_no
from stethoscope.tasks.captions import labelled
from stethoscope.tasks.image_folder import ImageFolder
from stethoscope.tasks.nouns import Nouns
from stethoscope.tasks.published import clipped, read_json, read_rows, read_text, shown, with_suffix
from stethoscope.tasks.totals import CONFUSION, accuracy, confusion, f1, precision, ratio, recall

PARTS = ("generative", "existence", "attribute", "relation")
SUBSETS = {
    "generative": ("generative", "generative"),
    "discriminative-hallucination": ("existence", "existence"),
    "discriminative-attribute-state": ("attribute", "state"),
    "discriminative-attribute-number": ("attribute", "number"),
    "discriminative-attribute-action": ("attribute", "action"),
    "discriminative-relation": ("relation", "relation"),
    "relation": ("relation", "relation"),
}
"""The authors' types of questions -> part and subset here."""

POOLS = {
    "all": ("generative", "existence", "state", "number", "action", "relation"),
    "generative": ("generative",),
    "discriminative": ("existence", "state", "number", "action", "relation"),
    "existence": ("existence",),
    "attribute": ("state", "number", "action"),
    "state": ("state",),
    "number": ("number",),
    "action": ("action",),
    "relation": ("relation",),
}
"""What is reported -> the subsets that are taken together for it."""

_CAPTION = ("nouns", "invented", "answers", "with_invented", "truth", "covered", "targets", "fallen_for")
_PUBLISHED = ("published_questions", *(f"published_{name}" for name in CONFUSION))


class Judgement(NamedTuple):
    """What the nouns of one description come to.

    Attributes:
        labels: 1 invented, 0 grounded, -1 one of the words that AMBER never holds against a model; by noun.
        covered: places in the list of true objects of those that were named.
        fallen_for: places in the list of likely hallucinations of those that were named.
    """

    labels: dict[str, int]
    covered: set[int]
    fallen_for: set[int]


def judge(
    nouns: Sequence[str],
    truth: Sequence[str],
    targets: Sequence[str],
    association: Mapping[str, Sequence[str]],
    safe_words: Sequence[str] = (),
    similar: Callable[[str, str], bool] | None = None,
) -> Judgement:
    """Compares the nouns of a description with an image's annotation.

    A noun stands for the first object of which it is an association, or else which it is; so of two objects with the
    same words only one can be covered, as in the authors' code.

    Args:
        nouns: singulars, all from AMBER's vocabulary.
        truth: the objects in the image.
        targets: objects that people would expect there but that are not.
        association: object -> words that may stand for it.
        safe_words: words that are never judged.
        similar: whether two different words mean the same (the authors ask spaCy's vectors); None for never.

    >>> judged = judge(["man", "sea", "dog"], ["person"], ["sea"], {"person": ["man", "boy"]})
    >>> judged.labels, judged.covered, judged.fallen_for
    ({'man': 0, 'sea': 1, 'dog': 1}, {0}, {0})
    """

    def places(objects: Sequence[str]) -> dict[str, int]:
        found: dict[str, int] = {}
        words = [(word, place) for place, name in enumerate(objects) for word in association.get(name, ())]
        for word, place in [*words, *((name, place) for place, name in enumerate(objects))]:
            found.setdefault(word, place)
        return found

    true, expected = places(truth), places(targets)
    judged = Judgement({}, set(), set())

    def place(noun: str, known: Mapping[str, int]) -> int | None:
        return next((known[word] for word in known if similar(noun, word)), None) if similar else None

    for noun in dict.fromkeys(nouns):
        if noun in safe_words:
            judged.labels[noun] = -1
        elif noun in true:
            judged.labels[noun] = 0
            judged.covered.add(true[noun])
        else:
            judged.fallen_for.update({expected.get(noun), place(noun, expected)} - {None})
            like = place(noun, true)
            judged.labels[noun] = int(like is None)
            judged.covered.update({like} - {None})
    return judged


def amber_score(chair: Any, f1: Any) -> Any:
    """AMBER's one figure, (100 - CHAIR + F1) / 2, from CHAIR and F1 in per cent.

    >>> amber_score(7.8, 74.7)
    83.45
    """
    return (100 - chair + f1) / 2


class Amber(Task):
    """Descriptions of images, and yes/no questions about their objects, attributes and relations.

    In the questions **no** is the positive class: precision is over the model's no, recall over the questions of which
    the truth is no. An answer that ``parser`` cannot read counts nowhere, except in the figures called ``published``:
    these take, as the authors do, every answer but the very words "Yes" and "No" for a wrong one. (The authors also
    round precision and recall before they make F1, and add 1e-4 to its divisor, 1e-3 for existence. That moves the
    third digit and is not done here.)
    """

    name: ClassVar[str] = "amber"
    version: ClassVar[str] = "1"
    max_new_tokens = 512
    primary: str = "amber"

    def __init__(
        self,
        folder: str | None = None,
        images: str | None = None,
        parts: Sequence[str] = PARTS,
        parser: str = "first_word",
        suffix: str = "",
        spacy: str | None = None,
        similarity: float = 0.8,
    ) -> None:
        """Stores and checks; see ``conf/task/amber.yaml`` for every argument.

        Raises:
            ConfigError: no folders, an unknown part or parser, a similarity outside 0 to 1.
        """
        if not (folder and images):
            raise ConfigError(
                "amber needs task.folder, the authors' data folder with annotations.json, and task.images, its images"
            )
        if parser not in yes_no.PARSERS:
            raise ConfigError(unknown("parser of amber", parser, yes_no.PARSERS))
        if isinstance(parts, str) or not parts:
            raise ConfigError(f"task.parts={parts!r} should be a list of {', '.join(PARTS)}")
        for part in parts:
            if part not in PARTS:
                raise ConfigError(unknown("part of amber", str(part), PARTS))
        if not 0 < similarity <= 1:
            raise ConfigError(f"task.similarity={similarity} should be above 0 and at most 1")
        self.folder, self.images, self.parts, self.suffix = folder, images, parts, suffix
        self.parser, self.spacy, self.similarity = parser, spacy, similarity
        if "generative" not in parts:
            self.primary = "f1"
        elif set(parts) == {"generative"}:
            self.primary = "chair"
        self._samples: list[Sample] = []

    def setup(self) -> None:
        """Reads questions and annotations and checks that every image is there.

        Raises:
            DataError: a file is missing or broken; the message names file and line.
            ConfigError: spaCy or its model is asked for and missing.
        """
        if self._samples:
            return
        self._association = self._read_association(self._path("relation.json"))
        self._safe_words = frozenset(read_text(self._path("safe_words.txt")).split())
        self._similar: Callable[[str, str], bool] | None = None
        self._nouns: Callable[[str], list] = Nouns({*self._association, *sum(self._association.values(), ())})
        if self.spacy is not None:
            from stethoscope.tasks.spacy_nouns import SpacyNouns

            spacy = SpacyNouns(self.spacy, self._nouns, self.similarity)
            self._nouns, self._similar = spacy, spacy.similar
        self._samples = self._read_samples(self._read_annotations(self._path("annotations.json")))

    def _path(self, name: str) -> Path:
        """One of the authors' files, which keep the questions in a folder of their own."""
        folder = Path(self.folder).expanduser()
        return next((path for path in (folder / name, folder / "query" / name) if path.is_file()), folder / name)

    @staticmethod
    def _read_association(path: Path) -> dict[str, tuple[str, ...]]:
        words = read_json(path)
        if not isinstance(words, dict) or not all(
            isinstance(some, list) and all(isinstance(word, str) for word in some) for some in words.values()
        ):
            raise DataError(f"{path}: an object was expected that gives every word a list of words")
        return {word: tuple(some) for word, some in words.items()}

    @staticmethod
    def _read_annotations(path: Path) -> dict[int, tuple[str, dict[str, Any]]]:
        """Question id -> the authors' type, and the reference of its sample."""
        found: dict[int, tuple[str, dict[str, Any]]] = {}
        for _, where, row in read_rows(path, ("id", "type", "truth")):
            if str(row["type"]) not in SUBSETS:
                raise DataError(f"{where}: {unknown('type of question', clipped(row['type']), SUBSETS)}")
            if not isinstance(row["id"], int):
                raise DataError(f"{where}: id {shown(row['id'])} is no number")
            if row["id"] in found:
                raise DataError(f"{where}: id {row['id']} is used before")
            reference: dict[str, Any] = {"label": row["truth"]}
            if row["type"] == "generative":
                reference = {"truth": row["truth"], "hallu": row.get("hallu")}
                for key, words in reference.items():
                    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
                        raise DataError(f"{where}: {key!r} should be a list of words, not {shown(words)}")
            elif row["truth"] not in ("yes", "no"):
                raise DataError(f"{where}: truth {shown(row['truth'])} is neither yes nor no")
            found[row["id"]] = row["type"], reference
        return found

    def _read_samples(self, annotations: Mapping[int, tuple[str, dict[str, Any]]]) -> list[Sample]:
        path, images, samples = self._path("query_all.json"), ImageFolder(Path(self.images).expanduser()), {}
        for _, where, row in read_rows(path, ("id", "image", "query")):
            if not isinstance(row["id"], int) or row["id"] not in annotations:
                raise DataError(f"{where}: id {shown(row['id'])} is not among the annotations")
            if row["id"] in samples:
                raise DataError(f"{where}: id {row['id']} is used before")
            if not isinstance(row["query"], str) or not row["query"].strip():
                raise DataError(f"{where}: {shown(row['query'])} is no question")
            kind, reference = annotations[row["id"]]
            part, subset = SUBSETS[kind]
            if part not in self.parts:
                continue
            question = row["query"]
            if part != "generative":
                nouns = self._nouns(question)
                reference = {**reference, "object": nouns[0].name if nouns else UNKNOWN}
                question = with_suffix(question, self.suffix)
            image = images.find(str(row["image"]), where)
            samples[row["id"]] = Sample(f"{subset}-{row['id']}", image, question, image.group, subset, reference)
        if not samples:
            raise DataError(f"{path} has no question of {', '.join(self.parts)}")
        return list(samples.values())

    def samples(self) -> Sequence[Sample]:
        """Descriptions and questions in the order of the authors' file."""
        return self._samples

    def score(self, sample: Sample, answer: Answer) -> Score:
        """Counts nouns of a description, or the answer as a true or false no; ``unparsed`` if it cannot be read."""
        counts = dict.fromkeys((*_CAPTION, *CONFUSION, *_PUBLISHED), 0.0)
        if sample.subset != "generative":
            label, reply = sample.reference["label"], yes_no.PARSERS[self.parser](answer.text)
            exact = yes_no.exact(answer.text)
            missed = exact is None and label == "no"  # a no that was not said, though no yes was said either
            published = confusion("yes" if missed else exact, label, positive="no")
            counts |= confusion(reply, label, positive="no") | {"published_questions": 1.0}
            counts |= {f"published_{name}": value for name, value in published.items()}
            return Score("unparsed" if reply is None else "ok", counts, {"reply": reply, "label": label})
        if not answer.text.strip():
            return Score("unparsed", counts, {"nouns": [], "invented": []})
        nouns = [noun.name for noun in self._nouns(answer.text)]
        truth, targets = sample.reference["truth"], sample.reference["hallu"]
        judged = judge(nouns, truth, targets, self._association, self._safe_words, self._similar)
        invented = [noun for noun in nouns if judged.labels[noun] == 1]
        values = (len(nouns), len(invented), 1, bool(invented), len(truth), len(judged.covered), len(targets))
        counts |= dict(zip(_CAPTION, map(float, (*values, len(judged.fallen_for))), strict=True))
        fallen_for = [targets[place] for place in sorted(judged.fallen_for)]
        return Score("ok", counts, {"nouns": nouns, "invented": invented, "fallen_for": fallen_for})

    def mentions(self, sample: Sample, answer: Answer) -> tuple[Mention, ...]:
        """Nouns of a description, invented or not; of a question the word yes, which claims what is asked about."""
        if sample.subset != "generative":
            reply = yes_no.PARSERS[self.parser](answer.text)
            return yes_no.claim(answer.text, reply, sample.reference["label"], sample.reference["object"])
        found = self._nouns(answer.text)
        truth, targets = sample.reference["truth"], sample.reference["hallu"]
        names = [noun.name for noun in found]
        judged = judge(names, truth, targets, self._association, self._safe_words, self._similar)
        return labelled(found, judged.labels.__getitem__)

    def tally(self, judged: Judged) -> Sequence[Tally]:
        """Every sample under its subset and under those that are taken together."""
        there = {sample.subset for sample, _ in judged}
        pools = {name: some for name, some in POOLS.items() if len(some) == 1 or len(there.intersection(some)) > 1}
        return [
            Tally(sample.group, name, counts)
            for name, some in pools.items()
            for sample, counts in judged
            if sample.subset in some
        ]

    def metrics(self) -> Mapping[str, Callable[[Totals], np.ndarray]]:
        """The authors' figures: ``amber`` from 0 to 100, all others from 0 to 1.

        ``chair``: invented nouns among all nouns. ``cover``: true objects named. ``hal``: descriptions with an
        invented noun. ``cog``: likely hallucinations named. ``accuracy``, ``precision``, ``recall``, ``f1``: of the
        questions, with no as the positive class.
        """
        return {
            "amber": lambda totals: amber_score(100 * _chair(totals), 100 * f1(totals)),
            "chair": _chair,
            "cover": lambda totals: ratio(totals["covered"], totals["truth"]),
            "hal": lambda totals: ratio(totals["with_invented"], totals["answers"]),
            "cog": lambda totals: ratio(totals["fallen_for"], totals["targets"]),
            "accuracy": accuracy,
            "precision": precision,
            "recall": recall,
            "f1": f1,
            "accuracy_published": lambda totals: ratio(
                totals["published_tp"] + totals["published_tn"], totals["published_questions"]
            ),
            "f1_published": lambda totals: f1({name: totals[f"published_{name}"] for name in CONFUSION}),
        }


def _chair(totals: Totals) -> np.ndarray:
    return ratio(totals["invented"], totals["nouns"])
