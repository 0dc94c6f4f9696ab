"""AMBER: what does a description invent, and what does the model deny or affirm about objects, attributes, relations?

Wang et al., "AMBER: An LLM-free Multi-dimensional Benchmark for MLLMs Hallucination Evaluation", arXiv 2311.07397. The
definitions are those of the authors' ``inference.py`` (junyangwang0410/AMBER).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from stethoscope.core.errors import ConfigError, DataError, unknown
from stethoscope.core.json_rows import clipped, read_rows, read_text, shown
from stethoscope.core.types import UNKNOWN, Answer, Mention, Sample, Score
from stethoscope.metrics.ranking import divide
from stethoscope.tasks import yes_no
from stethoscope.tasks.base import Metric, ScoredSample, Tally, Task
from stethoscope.tasks.counts import CONFUSION, accuracy, confusion, f1, precision, recall, share
from stethoscope.tasks.extraction import read_association
from stethoscope.tasks.image_folder import ImageFolder
from stethoscope.tasks.noun_extraction import NounExtractor, SpacyNounExtractor
from stethoscope.tasks.object_extraction import MentionExtractor, TextMention, label_mentions
from stethoscope.tasks.questions import question_text, with_suffix
from stethoscope.tasks.sources import check_choice, check_choices, check_paths, check_unused, setting_path

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


class NounVerdicts(NamedTuple):
    """The verdicts on the nouns of one description.

    Attributes:
        labels: 1 invented, 0 grounded, -1 one of the words that AMBER never holds against a model; by noun.
        covered: indices in the list of true objects of those that were named.
        fallen_for: indices in the list of likely hallucinations of those that were named.
    """

    labels: dict[str, int]
    covered: set[int]
    fallen_for: set[int]


def compare_nouns(
    nouns: Sequence[str],
    truth: Sequence[str],
    targets: Sequence[str],
    association: Mapping[str, Sequence[str]],
    safe_words: Collection[str] = (),
    similar: Callable[[str, str], bool] | None = None,
) -> NounVerdicts:
    """Compare the nouns of a description with an image's annotation.

    A noun stands for the first annotated object that lists it as an association, else for the object of that name. As
    in the authors' code, two objects with the same words cannot both be covered.

    Args:
        nouns: singulars, all from AMBER's vocabulary.
        truth: the objects in the image.
        targets: objects that people would expect there but that are not.
        association: object -> words that may stand for it.
        safe_words: words that never count as invented.
        similar: whether two different words mean the same (the authors ask spaCy's vectors); None for never.

    >>> verdicts = compare_nouns(["man", "sea", "dog"], ["person"], ["sea"], {"person": ["man", "boy"]})
    >>> verdicts.labels, verdicts.covered, verdicts.fallen_for
    ({'man': 0, 'sea': 1, 'dog': 1}, {0}, {0})
    """

    def index_of_words(objects: Sequence[str]) -> dict[str, int]:
        indices: dict[str, int] = {}
        words = [(word, index) for index, name in enumerate(objects) for word in association.get(name, ())]
        for word, index in [*words, *((name, index) for index, name in enumerate(objects))]:
            indices.setdefault(word, index)
        return indices

    def synonym(noun: str, known: Mapping[str, int]) -> int | None:
        return next((known[word] for word in known if similar(noun, word)), None) if similar else None

    true, expected = index_of_words(truth), index_of_words(targets)
    verdicts = NounVerdicts({}, set(), set())
    for noun in dict.fromkeys(nouns):
        if noun in safe_words:
            verdicts.labels[noun] = -1
        elif noun in true:
            verdicts.labels[noun] = 0
            verdicts.covered.add(true[noun])
        else:
            likely = (expected.get(noun), synonym(noun, expected))
            verdicts.fallen_for.update(index for index in likely if index is not None)
            covered = synonym(noun, true)
            verdicts.labels[noun] = int(covered is None)
            if covered is not None:
                verdicts.covered.add(covered)
    return verdicts


def amber_score(chair: Any, f1: Any) -> Any:
    """Compute AMBER's one figure, (100 - CHAIR + F1) / 2, from CHAIR and F1 in per cent.

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

    name = "amber"
    version: ClassVar[str] = "1"
    max_new_tokens = 512
    primary = "amber"

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
        """Store and check the settings; ``conf/task/amber.yaml`` explains every argument.

        Raises:
            ConfigError: no folders, an unknown part or parser, a similarity outside 0 to 1.
        """
        data = "the authors' data folder with annotations.json"
        check_paths("amber", {"folder": (folder, data), "images": (images, "its images")})
        check_choice("parser of amber", parser, yes_no.PARSERS)
        check_choices("parts", "part of amber", parts, PARTS)
        if not isinstance(similarity, (int, float)) or not 0 < similarity <= 1:
            raise ConfigError(f"task.similarity={similarity!r} should be a number above 0 and at most 1")
        self.folder, self.images, self.parts, self.suffix = folder, images, parts, suffix
        self.parser, self.spacy, self.similarity = parser, spacy, similarity
        if "generative" not in parts:
            self.primary = "f1"
        elif set(parts) == {"generative"}:
            self.primary = "chair"
        self._samples: list[Sample] = []

    def setup(self) -> None:
        """Read questions and annotations and check that every image is there.

        Raises:
            DataError: a file is missing or broken; the message names file and line.
            ConfigError: spaCy or its model is asked for and missing.
        """
        if self._samples:
            return
        self._association = read_association(self._path("relation.json"))
        self._safe_words = frozenset(read_text(self._path("safe_words.txt")).split())
        self._similar: Callable[[str, str], bool] | None = None
        nouns = NounExtractor({*self._association, *sum(self._association.values(), ())})
        self._nouns: MentionExtractor = nouns
        if self.spacy is not None:
            spacy = SpacyNounExtractor(self.spacy, nouns, self.similarity)
            self._nouns, self._similar = spacy, spacy.similar
        self._samples = self._read_samples(self._read_annotations(self._path("annotations.json")))

    def _path(self, name: str) -> Path:
        """Return the path of one of the authors' files, which keep the questions in a folder of their own."""
        folder = setting_path(self.folder)
        return next((path for path in (folder / name, folder / "query" / name) if path.is_file()), folder / name)

    @staticmethod
    def _read_annotations(path: Path) -> dict[int, tuple[str, dict[str, Any]]]:
        """Read by question id the authors' type, and the reference of its sample."""
        annotations: dict[int, tuple[str, dict[str, Any]]] = {}
        origins: dict[int, str] = {}
        for _, origin, row in read_rows(path, ("id", "type", "truth")):
            if str(row["type"]) not in SUBSETS:
                raise DataError(f"{origin}: {unknown('type of question', clipped(row['type']), SUBSETS)}")
            if not isinstance(row["id"], int):
                raise DataError(f"{origin}: id {shown(row['id'])} is no number")
            check_unused(origins, row["id"], origin)
            reference: dict[str, Any] = {"label": row["truth"]}
            if row["type"] == "generative":
                reference = {"truth": row["truth"], "hallu": row.get("hallu")}
                for key, words in reference.items():
                    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
                        raise DataError(f"{origin}: {key!r} should be a list of words, not {shown(words)}")
            elif row["truth"] not in ("yes", "no"):
                raise DataError(f"{origin}: truth {shown(row['truth'])} is neither yes nor no")
            annotations[row["id"]] = row["type"], reference
        return annotations

    def _read_samples(self, annotations: Mapping[int, tuple[str, dict[str, Any]]]) -> list[Sample]:
        path, images = self._path("query_all.json"), ImageFolder(setting_path(self.images))
        samples: list[Sample] = []
        origins: dict[int, str] = {}
        for _, origin, row in read_rows(path, ("id", "image", "query")):
            if not isinstance(row["id"], int) or row["id"] not in annotations:
                raise DataError(f"{origin}: id {shown(row['id'])} is not among the annotations")
            check_unused(origins, row["id"], origin)
            question = question_text(row["query"], origin)
            kind, reference = annotations[row["id"]]
            part, subset = SUBSETS[kind]
            if part not in self.parts:
                continue
            if part != "generative":
                nouns = self._nouns(question)
                reference = {**reference, "object": nouns[0].name if nouns else UNKNOWN}
                question = with_suffix(question, self.suffix)
            image = images.find(str(row["image"]), origin)
            samples.append(
                Sample(
                    f"{subset}-{row['id']}", image, question, image.group, subset, reference,
                    asks="description" if part == "generative" else "question",
                )
            )  # fmt: skip
        if not samples:
            raise DataError(f"{path} has no question of {', '.join(self.parts)}")
        return samples

    def samples(self) -> Sequence[Sample]:
        """Return descriptions and questions in the order of the authors' file."""
        return self._samples

    def evaluate(self, sample: Sample, answer: Answer) -> tuple[Score, tuple[Mention, ...]]:
        """Read the nouns of a description once, for its score and its mentions."""
        if sample.subset != "generative":
            return super().evaluate(sample, answer)
        nouns: list[TextMention] = self._nouns(answer.text)
        names = [noun.name for noun in nouns]
        verdicts = self._verdicts(sample, names)
        mentions = label_mentions(nouns, [verdicts.labels[name] for name in names])
        counts = dict.fromkeys((*_CAPTION, *CONFUSION, *_PUBLISHED), 0.0)
        if not answer.text.strip():
            return Score("unparsed", counts, {"nouns": [], "invented": []}), mentions
        truth, targets = sample.reference["truth"], sample.reference["hallu"]
        invented = [name for name in names if verdicts.labels[name] == 1]
        caption = {
            "nouns": len(names),
            "invented": len(invented),
            "answers": 1,
            "with_invented": bool(invented),
            "truth": len(truth),
            "covered": len(verdicts.covered),
            "targets": len(targets),
            "fallen_for": len(verdicts.fallen_for),
        }
        counts |= {name: float(count) for name, count in caption.items()}
        fallen_for = [targets[index] for index in sorted(verdicts.fallen_for)]
        return Score("ok", counts, {"nouns": names, "invented": invented, "fallen_for": fallen_for}), mentions

    def score(self, sample: Sample, answer: Answer) -> Score:
        """Count nouns of a description, or the answer as a true or false no; ``unparsed`` if it cannot be read."""
        if sample.subset == "generative":
            return self.evaluate(sample, answer)[0]
        label, reply = sample.reference["label"], yes_no.PARSERS[self.parser](answer.text)
        exact = yes_no.exact(answer.text)
        missed = exact is None and label == "no"  # a no that was not said, though no yes was said either
        published = confusion("yes" if missed else exact, label, positive="no")
        counts = dict.fromkeys((*_CAPTION, *CONFUSION, *_PUBLISHED), 0.0)
        counts |= confusion(reply, label, positive="no") | {"published_questions": 1.0}
        counts |= {f"published_{name}": value for name, value in published.items()}
        return Score("unparsed" if reply is None else "ok", counts, {"reply": reply, "label": label})

    def mentions(self, sample: Sample, answer: Answer) -> tuple[Mention, ...]:
        """Return the nouns of a description, or of a question's answer the word yes, which claims what is asked."""
        if sample.subset == "generative":
            return self.evaluate(sample, answer)[1]
        reply = yes_no.PARSERS[self.parser](answer.text)
        return yes_no.claim(answer.text, reply, sample.reference["label"], sample.reference["object"])

    def _verdicts(self, sample: Sample, nouns: Sequence[str]) -> NounVerdicts:
        truth, targets = sample.reference["truth"], sample.reference["hallu"]
        return compare_nouns(nouns, truth, targets, self._association, self._safe_words, self._similar)

    def tally(self, scored: Sequence[ScoredSample]) -> Sequence[Tally]:
        """Total every sample under its subset and under the pools of subsets that are taken together."""
        asked = {sample.subset for sample, _ in scored}
        pools = {name: pool for name, pool in POOLS.items() if len(pool) == 1 or len(asked.intersection(pool)) > 1}
        return [
            Tally(sample.group, name, counts)
            for name, pool in pools.items()
            for sample, counts in scored
            if sample.subset in pool
        ]

    def notes(self, samples: Sequence[Sample]) -> Sequence[str]:
        """Name the parser."""
        return [f"Replies are read by the parser {self.parser!r}."]

    def metrics(self) -> Mapping[str, Metric]:
        """Return the authors' figures: ``amber`` from 0 to 100, all others from 0 to 1.

        ``chair``: invented nouns among all nouns. ``cover``: true objects named. ``hal``: descriptions with an
        invented noun. ``cog``: likely hallucinations named. ``accuracy``, ``precision``, ``recall``, ``f1``: of the
        questions, with no as the positive class.
        """
        chair = share("invented", "nouns")
        return {
            "amber": lambda totals: amber_score(100 * chair(totals), 100 * f1(totals)),
            "chair": chair,
            "cover": share("covered", "truth"),
            "hal": share("with_invented", "answers"),
            "cog": share("fallen_for", "targets"),
            "accuracy": accuracy,
            "precision": precision,
            "recall": recall,
            "f1": f1,
            "accuracy_published": lambda totals: divide(
                totals["published_tp"] + totals["published_tn"], totals["published_questions"]
            ),
            "f1_published": lambda totals: f1({name: totals[f"published_{name}"] for name in CONFUSION}),
        }
