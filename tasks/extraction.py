"""Choose how the objects that a text names are found: COCO's, AMBER's, all common nouns, or a vocabulary of your own.

The choice is one word or path, the same for every task and command:

- ``coco``: CHAIR's 80 COCO objects with their synonyms (``object_extraction``).
- ``amber:FOLDER``: AMBER's words, from the ``relation.json`` of the authors' data folder, where they are nouns. The
  list is theirs and does not come with this package.
- ``nouns`` or ``nouns:MODEL``: every common noun that a spaCy model tags, but for words about the picture itself. Which
  words are nouns cannot be told from a list, so this needs spaCy.
- a YAML or JSON file: a vocabulary of names with synonyms.
- ``package.module.function``, for commands alone: a function of your own that lists ``TextMention``.

``NamePrefixes`` decides from text alone whether a token can begin a name, or be part of one, which a stream has to know
before the name is complete. Names are compared with the text that a token adds and with the text around it, so the
result holds for any tokenizer: sub-words, several words in one token, bytes of a character, with or without a leading
blank. It errs on one side only: no token of a mention is ever ruled out.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from stethoscope.core.component import import_name
from stethoscope.core.errors import ConfigError, DataError, first_line, unknown, wrong_type
from stethoscope.core.json_rows import read_json, read_text, shown
from stethoscope.tasks import object_extraction
from stethoscope.tasks.noun_extraction import CommonNouns, NounExtractor, Vocabulary
from stethoscope.tasks.object_extraction import OBJECTS, MentionExtractor, TextMention

_LETTER = re.compile(r"[^\W\d_]")
"""A character within words; every extraction of a vocabulary begins a name at a letter, behind anything else."""
_LETTERS = re.compile(r"[^\W\d_]+")
_BLANKS = re.compile(r"\s+")
_NOT = "n't"
"""The only letters behind a name: CHAIR's tokenizer sets this ending apart, whatever it follows."""


class NamePrefixes:
    """The names of objects by their prefixes.

    Args:
        forms: every way to write a name: singular and plural, synonyms, words joined by single blanks; and pairs of
            words that name nothing together ("train track"). Case is ignored, which can only let more tokens through.

    >>> names = NamePrefixes(["dog", "dogs", "hot dog", "hot dogs"])
    >>> [names.can_begin("A", piece) for piece in (" do", " hot", " dogs.", " dogma", "dog")]
    [True, True, True, False, False]
    >>> names.can_begin("A", " do", "es"), names.can_belong("A hot d", "og"), names.can_belong("A hot d", "rink")
    (False, True, False)
    """

    def __init__(self, forms: Iterable[str]) -> None:
        folded = {_fold(form) for form in forms}
        self._forms = frozenset(folded)
        self._sorted = sorted(folded)
        self._first_words = frozenset(form.partition(" ")[0] for form in folded)
        self._first_letters = frozenset(letters[0] for form in folded if (letters := _LETTERS.match(form)))
        self._longest = max((len(form) for form in folded), default=0)

    def can_begin(self, before: str, piece: str, after: str = "") -> bool:
        """Decide whether a name can begin within a piece of text.

        Args:
            before: the text before it; only the last character matters.
            piece: the text that one token adds.
            after: the text behind it, as far as it is known.
        """
        return any(self._fits(piece[start:] + after, self._first_words) for start in _word_starts(before, piece))

    def can_belong(self, before: str, piece: str, after: str = "") -> bool:
        """Decide whether a piece of text can share a character with a name, which may have begun before it."""
        if not piece:
            return False
        text = before + piece + after
        return self.can_begin(before, piece, after) or any(
            self._fits(text[start:], self._forms, len(before) - start) for start in self._recent_starts(before)
        )

    def continuations(self, before: str, piece: str) -> Iterator[str]:
        """Yield the letters with which first words of names go on behind a piece that ends within them."""
        for start in _word_starts(before, piece):
            prefix = _fold(piece[start:])
            for index in range(bisect_left(self._sorted, prefix), len(self._sorted)):
                if not self._sorted[index].startswith(prefix):
                    break
                yield self._sorted[index].partition(" ")[0][len(prefix) :]

    def goes_on(self, text: str) -> bool:
        """Decide whether a text is the start of a longer name, or of two words that name nothing together.

        >>> names = NamePrefixes(["dog", "hot dog"])
        >>> names.goes_on("hot "), names.goes_on("hot d"), names.goes_on("hot s"), names.goes_on("dog ")
        (True, True, False, False)
        """
        folded = _fold(text)
        index = bisect_left(self._sorted, folded)
        return index < len(self._sorted) and self._sorted[index].startswith(folded)

    def first_open(self, text: str) -> int:
        """Return where the first name begins that the text may go on with; the length of the text if there is none."""
        return min((start for start in self._recent_starts(text) if self.goes_on(text[start:])), default=len(text))

    def has_first(self, word: str) -> bool:
        """Decide whether a name can begin with these letters, behind which the text goes on with another character."""
        folded = word.lower() if word.isascii() else "".join(_LETTERS.findall(_fold(word))[:1])
        return folded in self._first_letters or folded.removesuffix("n") in self._first_letters  # "dogn't" has a dog

    def is_open(self, text: str, asked: int) -> bool:
        """Decide whether a name begins with a text, or can with what will follow.

        Args:
            text: the text from the first letter of a word on.
            asked: length of the part in which the extraction has named nothing that begins there. Once the longest name
                and a further word fit into it, the word is used in another sense.
        """
        past = asked > self._longest and " " in _fold(text[:asked])[self._longest :].lstrip()
        return not past and self._fits(text, self._forms)

    def _recent_starts(self, text: str) -> Iterator[int]:
        """Yield the starts of words in which a name can have begun that is not over at the end of a text."""
        blanks = 0
        for start in range(len(text) - 1, -1, -1):
            blanks += text[start].isspace()
            if len(text) - start - blanks > self._longest:
                return
            if _LETTER.match(text[start]) and not (start and _LETTER.match(text[start - 1])):
                yield start

    def _fits(self, text: str, forms: Collection[str], least: int = 0) -> bool:
        """Decide whether a text is the start of a name, or begins with a form of more than ``least`` characters."""
        folded = _fold(text)
        if self.goes_on(text):
            return True
        ends = range(len(_fold(text[:least])) + 1, min(len(folded), self._longest + 1))
        return any(
            folded[:end] in forms
            for end in ends
            if not _LETTER.match(folded[end]) or _NOT.startswith(folded[end : end + len(_NOT)])
        )


def _word_starts(before: str, piece: str) -> list[int]:
    """List the indices in a piece at which a word begins."""
    text = before[-1:] + piece
    first = len(text) - len(piece)
    letters = [bool(_LETTER.match(character)) for character in text]
    return [index - first for index in range(first, len(text)) if letters[index] and not (index and letters[index - 1])]


def _fold(text: str) -> str:
    """Lower a text, with single blanks and one small sigma."""
    return _BLANKS.sub(" ", text.lower().replace("ς", "σ"))


COCO, AMBER, NOUNS = "coco", "amber", "nouns"
SPACY_MODEL = "en_core_web_sm"
"""Model of ``nouns`` where none is named; it has the tagger that is needed, and no vectors."""
FILES = (".yaml", ".yml", ".json")
"""Endings of vocabulary files."""
_KNOWN = (COCO, "amber:FOLDER", NOUNS, "nouns:MODEL", "a YAML or JSON file of names")


@dataclass(frozen=True)
class Extraction:
    """A way to find the objects that a text names; call it with the text.

    Attributes:
        identity: the choice with a digest of its words, the same wherever the file lies; part of a run's fingerprint
            and so of a detector's manifest.
        mentions: lists the mentions of a text in reading order.
        objects: all names that it can give; None where any noun can be one.
        synonyms: lower-case name or synonym -> name, for a vocabulary of your own; empty for the others.
        name_forms: lists every way to write a name, as ``NamePrefixes`` needs them. What it lists decides alone which
            words a name has: no word behind them changes it. None where any word can be one.
    """

    identity: str
    mentions: MentionExtractor
    objects: tuple[str, ...] | None
    synonyms: Mapping[str, str] = field(default_factory=dict)
    name_forms: Callable[[], Collection[str]] | None = None

    def __call__(self, text: str) -> list[TextMention]:
        """Return the mentions of a text in reading order."""
        return self.mentions(text)

    def own_names(self, names: Iterable[str]) -> frozenset[str]:
        """Translate COCO's names into this extraction's; a vocabulary drops those that it lacks."""
        if not self.synonyms:
            return frozenset(names)
        return frozenset(self.synonyms[name] for name in names if name in self.synonyms)

    @cached_property
    def name_prefixes(self) -> NamePrefixes | None:
        """Prefixes of all names, by which tokens are known that can begin one; None where any word can."""
        return None if self.name_forms is None else NamePrefixes(self.name_forms())


_COCO = Extraction(COCO, object_extraction.mentions, OBJECTS, name_forms=object_extraction.name_forms)


def load_extraction(choice: str, plugins: Iterable[str] | None = None, key: str = "extraction") -> Extraction:
    """Make the extraction that a setting names; the choices are those of this module.

    Args:
        choice: see this module.
        plugins: packages of the user that a function may come from; None to refuse functions, as tasks do.
        key: the setting, for messages.

    Raises:
        ConfigError: there is no such choice, or spaCy or its model is not installed.
        DataError: a file is missing or of another form.
    """
    text = str(choice or "").strip()
    kind, _, rest = text.partition(":")
    if text == COCO:
        return _COCO
    if kind == AMBER:
        return _amber(rest, key)
    if kind == NOUNS:
        model = rest or SPACY_MODEL
        return Extraction(f"{NOUNS}:{Path(model).name}", CommonNouns(model, f"{key}={text}"), None)
    if text.lower().endswith(FILES):
        path = Path(text).expanduser()
        words = read_vocabulary(path)
        vocabulary = Vocabulary(words)
        identity = f"{path.name}:{_digest(sorted(words.items()))}"
        return Extraction(identity, vocabulary.mentions, tuple(words), vocabulary.names, vocabulary.name_forms)
    if plugins is not None and "." in text:
        return as_extraction(import_name(text, key, tuple(plugins)))
    functions = () if plugins is None else ("package.module.function",)
    raise ConfigError(unknown(key, text, (*_KNOWN, *functions)))


def as_extraction(choice: Extraction | MentionExtractor | str | None) -> Extraction:
    """Return the extraction that a caller of Python means: a choice, a function, or None for ``coco``.

    Raises:
        ConfigError: it is none of them.
    """
    if choice is None or choice is object_extraction.mentions:
        return load_extraction(COCO)
    if isinstance(choice, Extraction):
        return choice
    if isinstance(choice, str):
        return load_extraction(choice)
    if not callable(choice):
        raise wrong_type("extraction", f"{', '.join(_KNOWN)}, or a function of a text", choice)
    name = getattr(choice, "__qualname__", type(choice).__qualname__)
    return Extraction(f"{getattr(choice, '__module__', '')}.{name}", choice, None)


def learned_from(task: Any) -> str | None:
    """Return the identity of the extraction behind a detector's mentions; None where it is not known.

    Args:
        task: entry ``task`` of the detector's manifest: the task's fingerprint, or its name.
    """
    name = task.get("name") if isinstance(task, Mapping) else task
    settings = task.get("settings") if isinstance(task, Mapping) else None
    if isinstance(settings, Mapping) and isinstance(settings.get("extraction"), str):
        return str(settings["extraction"])
    return {"chair": COCO, "amber": AMBER}.get(str(name))


def other_words(identity: str, task: Any) -> str:
    """Say in one sentence that a detector learned from mentions of another extraction; "" where it did not.

    Args:
        identity: of the extraction that found the mentions which the detector is asked about; "" for none.
        task: see ``learned_from``.

    >>> other_words("nouns:en_core_web_sm", "chair")
    "The detector learned from mentions found by coco; these are found by nouns, so nothing here is calibrated."
    >>> other_words("coco", "chair")
    ''
    """
    learned = learned_from(task)
    same = learned == identity or (learned == AMBER and identity.startswith(f"{AMBER}:"))
    if not identity or learned is None or same:
        return ""
    names = learned.partition(":")[0], identity.partition(":")[0]
    learned_name, name = names if names[0] != names[1] else (learned, identity)
    return (
        f"The detector learned from mentions found by {learned_name}; these are found by {name}, so nothing here is "
        "calibrated."
    )


def beside_coco(extraction: Extraction, text: str) -> tuple[list[TextMention], list[bool]]:
    """Return COCO's mentions and, where they leave room, those of another extraction; and which are COCO's.

    For tasks that know the truth of COCO's objects alone: what they judge is the same as with ``coco``.

    >>> words = Extraction("words", Vocabulary({"cake stand": [], "table": []}).mentions, None)
    >>> named, own = beside_coco(words, "A cake on a cake stand, on a table.")
    >>> [mention.name for mention in named], own
    (['cake', 'cake', 'table'], [True, True, False])
    """
    coco = object_extraction.mentions(text)
    more = [
        mention
        for mention in extraction(text)
        if not any(mention.start < known.end and known.start < mention.end for known in coco)
    ]
    both = [(mention, True) for mention in coco] + [(mention, False) for mention in more]
    both.sort(key=lambda pair: pair[0].start)
    return [mention for mention, _ in both], [own for _, own in both]


def _digest(words: object) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of words."""
    return hashlib.sha256(repr(words).encode()).hexdigest()[:16]


def _amber(folder: str, key: str) -> Extraction:
    """Make the extraction of AMBER's words from the authors' folder."""
    if not folder:
        raise ConfigError(
            f"{key}={AMBER} needs AMBER's word list, which does not come with this package; give the authors' data "
            f"folder with relation.json, as {key}={AMBER}:FOLDER"
        )
    path = Path(folder).expanduser()
    association = read_association(path / "relation.json" if path.suffix != ".json" else path)
    words = sorted({*association, *sum(association.values(), ())})
    nouns = NounExtractor(words)
    return Extraction(f"{AMBER}:{_digest(words)}", nouns, tuple(words), name_forms=nouns.name_forms)


def read_association(path: Path) -> dict[str, tuple[str, ...]]:
    """Read AMBER's ``relation.json``: word -> words that may stand for it.

    Raises:
        DataError: the file is missing or of another form.
    """
    words = read_json(path)
    if not isinstance(words, dict) or not all(
        isinstance(others, list) and all(isinstance(word, str) for word in others) for others in words.values()
    ):
        raise DataError(f"{path}: an object was expected that gives every word a list of words")
    return {word: tuple(others) for word, others in words.items()}


def read_vocabulary(path: Path) -> dict[str, tuple[str, ...]]:
    """Read canonical names, each with the other names that stand for it.

    Args:
        path: a YAML or JSON file with an object of lists ("dog: [puppy, hound]"), or with a list of names.

    Raises:
        DataError: the file is missing or of another form, or a name stands for two objects.
    """
    text = read_text(path)
    try:
        data = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # such as a date of month 13
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or first_line(error)
        raise DataError(f"{path}{line}: neither YAML nor JSON ({reason})") from None
    if isinstance(data, list):
        data = {name: [] for name in data if isinstance(name, str)} if all(isinstance(n, str) for n in data) else None
    if not isinstance(data, dict) or not data:
        raise DataError(f"{path}: a list of names was expected, or an object such as 'dog: [puppy, hound]'")
    owner: dict[str, str] = {}
    words: dict[str, tuple[str, ...]] = {}
    for name, others in data.items():
        others = [] if others is None else others
        if not isinstance(name, str) or not isinstance(others, list) or not all(isinstance(o, str) for o in others):
            raise DataError(f"{path}: {shown(name)} should be a name with a list of other names, not {shown(others)}")
        for word in (name, *others):
            key = " ".join(word.lower().split())
            if not key:
                raise DataError(f"{path}: {shown(name)} has an empty name")
            if owner.setdefault(key, name) != name:
                raise DataError(f"{path}: {shown(word)} stands for both {shown(owner[key])} and {shown(name)}")
        words[name] = tuple(others)
    return words
