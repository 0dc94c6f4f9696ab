"""Find the nouns of a text that belong to a vocabulary, and objects with names of several words.

AMBER defines its nouns by NLTK's part-of-speech tagger and WordNet's lemmatiser, both of which need downloads. Within a
vocabulary of depictable things, simpler rules suffice: a word is a noun unless its neighbours show that it is a verb,
and its singular is whichever of a few regular forms the vocabulary has. On 1,000 captions of LLaVA-1.5 and
MiniGPT-4, with AMBER's vocabulary, 98.5 % of the nouns are nouns to spaCy's small English tagger too, and 99.5 % of its
nouns are found; most of the rest are "orange" and "light" as adjectives.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from stethoscope.core.errors import ConfigError, first_line
from stethoscope.tasks.object_extraction import TextMention

if TYPE_CHECKING:
    from spacy.language import Language
    from spacy.tokens import Token

WORD = re.compile(r"[^\W\d_]+(?:-[^\W\d_]+)*")
"""A word; hyphens join words to one, an apostrophe ends it."""

_IRREGULAR = {
    **{"children": "child", "people": "people", "geese": "goose", "mice": "mouse", "oxen": "ox", "feet": "foot"},
    **{"teeth": "tooth", "leaves": "leaf", "loaves": "loaf", "potatoes": "potato", "tomatoes": "tomato"},
    **{"mangoes": "mango", "volcanoes": "volcano", "buffaloes": "buffalo", "heroes": "hero", "sheep": "sheep"},
}
_ENDINGS = (
    ("men", "man"), ("knives", "knife"), ("lives", "life"), ("wives", "wife"), ("ves", "f"), ("ies", "y"),
    ("ses", "s"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"), ("s", ""),
)  # fmt: skip


def singulars(word: str) -> Iterator[str]:
    """Yield the word itself, then what could be its singular, likeliest first.

    The endings are those of WordNet's noun morphology, with the irregular plurals that a picture can show. What is no
    word ("bu" for "bus") does no harm where results are looked up in a vocabulary.

    >>> list(singulars("benches")), list(singulars("shelves")), list(singulars("men"))
    (['benches', 'bench', 'benche'], ['shelves', 'shelf', 'shelve'], ['men', 'man'])
    >>> list(singulars("leaves"))
    ['leaves', 'leaf']
    """
    yield word
    if word in _IRREGULAR:
        yield _IRREGULAR[word]
        return
    for ending, single in _ENDINGS:
        if word.endswith(ending) and word != "s":
            yield word[: len(word) - len(ending)] + single


def _forms(name: str) -> set[str]:
    """Return a name with its last word in every form that ``singulars`` leads back to it."""
    *first, last = name.split(" ")
    rules = [(plural, single) for plural, single in (*_IRREGULAR.items(), *_ENDINGS) if last.endswith(single)]
    plurals = {last[: len(last) - len(single)] + plural for plural, single in rules}
    return {name, *(" ".join([*first, plural]) for plural in plurals if last in singulars(plural))}


_NEVER = frozenset(("hot",))  # AMBER's list has it from "hot dog"
_TIN = frozenset(("a", "an", "the", "one", "another", "each", "trash", "garbage", "tin", "soda", "beer", "spray"))
_DOING = frozenset(
    (
        *("bat", "bear", "board", "brush", "drain", "drink", "fence", "file", "fish", "flag", "leave", "light", "line"),
        *("lock", "lounge", "pack", "paddle", "plug", "range", "ring", "rock", "sign", "skate", "ski", "spray"),
        *("support", "switch", "tap", "tie", "track", "train", "warp", "watch"),
    )
)
_BEFORE_VERB = frozenset(
    ("to", "can", "could", "will", "would", "may", "might", "must", "should", "i", "you", "he", "she", "we", "they")
)
_BEFORE_TO = frozenset(
    ("next", "close", "closer", "adjacent", "due", "near", "nearer", "similar", "leading", "attached")
)


class NounExtractor:
    """Find the words of a vocabulary where they are used as nouns.

    Words are compared as they are written: AMBER's vocabulary is in small letters but for "TV", so a word that begins
    a sentence with a capital is not found, there as here. "can" is a noun only behind an article or what is kept in
    cans; words that are verbs as well ("watch", "board") are not nouns behind "to" (but "next to"), a modal or a
    pronoun. A noun used as an adjective ("orange cat", "light brown") counts as a noun.

    Attributes:
        vocabulary: the words that count, each in its singular.
    """

    def __init__(self, vocabulary: Collection[str]) -> None:
        """Store the vocabulary."""
        self.vocabulary = frozenset(vocabulary)

    def __call__(self, text: str) -> list[TextMention]:
        """Return the nouns of a text in reading order, named by the vocabulary's word.

        >>> extract = NounExtractor(["dog", "board", "can"])
        >>> [noun.name for noun in extract("A dog can see two dogs on boards, about to board.")]
        ['dog', 'dog', 'board']
        """
        words = list(WORD.finditer(text))
        nouns = []
        for index, word in enumerate(words):
            name = next((form for form in singulars(word[0]) if form in self.vocabulary), None)
            if name is not None and self._is_noun(
                word[0], [before[0].lower() for before in words[max(0, index - 2) : index]]
            ):
                nouns.append(TextMention(name, word.start(), word.end()))
        return nouns

    def name_forms(self) -> frozenset[str]:
        """Return the words of the vocabulary in every form that is read as one of them."""
        return frozenset().union(*map(_forms, self.vocabulary))

    @staticmethod
    def _is_noun(word: str, before: Sequence[str]) -> bool:
        """Tell whether a word is a noun after the (at most two) words before it, which are in small letters."""
        last = before[-1] if before else ""
        if word == "can":
            return last in _TIN
        verb = word in _DOING and last in _BEFORE_VERB and not (last == "to" and before[0] in _BEFORE_TO)
        return not verb and word not in _NEVER


class Vocabulary:
    """Find objects of a custom vocabulary, each with several names of one or more words.

    Attributes:
        names: lower-case words, joined by single blanks -> canonical name.
    """

    def __init__(self, objects: Mapping[str, Sequence[str]]) -> None:
        """Store canonical names, each with the other names that stand for it."""
        self.names = {
            " ".join(name.lower().split()): canonical
            for canonical, names in objects.items()
            for name in (canonical, *names)
        }
        self._longest = max((len(key.split()) for key in self.names), default=0)

    def name_forms(self) -> frozenset[str]:
        """Return all names in every form that is read as a name: lower-case words, joined by single blanks."""
        return frozenset().union(*map(_forms, self.names))

    def mentions(self, text: str) -> list[TextMention]:
        """Return every mention in reading order.

        Of several names that fit the same words the longest counts, with its last word in the singular or plural.

        >>> words = Vocabulary({"dog": ["puppy"], "hot dog": []})
        >>> [mention.name for mention in words.mentions("Puppies eat hot dogs; a dog looks on.")]
        ['dog', 'hot dog', 'dog']
        """
        words = list(WORD.finditer(text))
        mentions, index = [], 0
        while index < len(words):
            for last in range(min(index + self._longest, len(words)) - 1, index - 1, -1):
                name = self._name(text, words[index : last + 1])
                if name is not None:
                    mentions.append(TextMention(name, words[index].start(), words[last].end()))
                    index = last
                    break
            index += 1
        return mentions

    def _name(self, text: str, words: Sequence[re.Match]) -> str | None:
        """Return what these words of a text name; None if more than blanks stands between them."""
        if text[words[0].start() : words[-1].end()].split() != [word[0] for word in words]:
            return None
        *first, last = (word[0].lower() for word in words)
        keys = (" ".join([*first, form]) for form in singulars(last))
        return next((self.names[key] for key in keys if key in self.names), None)


# --- spaCy ------------------------------------------------------------------------------------------------------------

INSTALL = "pip install 'lvlm-stethoscope[amber]' && python -m spacy download {model}"


def load_pipeline(model: str, setting: str, usual: str) -> Language:
    """Load an installed spaCy model or its folder.

    Args:
        model: name or folder.
        setting: that names it, for messages.
        usual: the model to install where this one is missing.

    Raises:
        ConfigError: spaCy or the model is not installed.
    """
    install = INSTALL.format(model=usual)
    try:
        import spacy
    except ImportError:
        raise ConfigError(f"{setting} needs spaCy: {install}") from None
    if not Path(model).is_dir() and not entry_points(group="spacy_models", name=model):
        # spaCy would import any installed package of that name
        raise ConfigError(f"{setting} is no installed spaCy model and no folder; to install it: {install}")
    try:
        return spacy.load(model)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{setting} cannot be loaded: {first_line(error)}; to install it: {install}") from None


def _has_tagger(pipeline: Language) -> bool:
    return any(name in pipeline.pipe_names for name in ("tagger", "attribute_ruler"))


class SpacyNounExtractor:
    """Find the nouns of a vocabulary with a spaCy pipeline, and compare words by its vectors.

    AMBER's authors use NLTK's tagger and WordNet's lemmatiser to find nouns and spaCy's vectors to find synonyms; here
    the pipeline does both. If it has no tagger, ``NounExtractor`` finds the nouns.
    """

    def __init__(self, model: str, nouns: NounExtractor, threshold: float) -> None:
        """Load the pipeline.

        Args:
            model: name of an installed spaCy model, or its folder.
            nouns: the vocabulary, and the extractor used if the model has no tagger.
            threshold: words are synonyms if the cosine of their vectors is above it.

        Raises:
            ConfigError: spaCy or the model is not installed, or the model has no word vectors.
        """
        self._pipeline = load_pipeline(model, f"task.spacy={model!r}", "en_core_web_lg")
        if not self._pipeline.vocab.vectors_length:
            raise ConfigError(f"task.spacy={model!r} has no word vectors; a model that ends in _md or _lg has them")
        self._nouns, self._threshold = nouns, threshold
        self._tags = _has_tagger(self._pipeline)
        self.similar: Callable[[str, str], bool] = lru_cache(maxsize=1 << 18)(self._similar)

    def __call__(self, text: str) -> list[TextMention]:
        """Return the nouns of a text in reading order, named by the vocabulary's word."""
        if not self._tags:
            return self._nouns(text)
        nouns = []
        for token in self._pipeline(text):
            name = next((form for form in (token.text, token.lemma_) if form in self._nouns.vocabulary), None)
            if name is not None and token.tag_.startswith("NN"):
                nouns.append(TextMention(name, token.idx, token.idx + len(token.text)))
        return nouns

    def _similar(self, word: str, other: str) -> bool:
        # the rest of the pipeline does not touch the vectors, so it need not run
        first, second = self._pipeline.make_doc(word), self._pipeline.make_doc(other)
        if not (first.vector_norm and second.vector_norm):  # spaCy warns of words without vector, and calls them unlike
            return word == other
        return first.similarity(second) > self._threshold


_ABOUT_PICTURES = frozenset(
    (
        *("image", "picture", "photo", "photograph", "photography", "scene", "view", "shot", "frame", "background"),
        *("foreground", "side", "left", "right", "top", "bottom", "middle", "center", "centre", "front", "back"),
        *("edge", "corner", "part", "area", "distance", "direction", "position", "way", "kind", "type", "sort"),
        *("variety", "number", "lot", "group", "pair", "couple", "row", "addition", "total", "color", "colour"),
        *("shape", "size", "atmosphere", "setting", "appearance", "overall", "impression", "moment", "time", "day"),
        *("detail", "focus"),
    )
)
"""Nouns of descriptions that name the picture, a place in it or an amount, and nothing that it shows."""


class CommonNouns:
    """Find all common nouns of a text with a spaCy tagger, but for ``_ABOUT_PICTURES``.

    Nouns side by side are one name ("tennis racket"), in small letters with the last of them in the singular. Which of
    them can be seen is not known: "love" is a noun too.
    """

    def __init__(self, model: str, setting: str) -> None:
        """Load the pipeline.

        Args:
            model: name of an installed spaCy model, or its folder.
            setting: that names it, for messages.

        Raises:
            ConfigError: spaCy or the model is not installed, or the model has no tagger.
        """
        self._pipeline = load_pipeline(model, setting, "en_core_web_sm")
        if not _has_tagger(self._pipeline):
            raise ConfigError(f"{setting} has no tagger, which finds nouns; en_core_web_sm has one")

    def __call__(self, text: str) -> list[TextMention]:
        """Return the nouns of a text in reading order."""
        runs: list[list[Token]] = []
        for token in self._pipeline(text):
            if token.tag_ not in ("NN", "NNS"):
                continue
            if runs and runs[-1][-1].i + 1 == token.i and runs[-1][-1].whitespace_ == " ":
                runs[-1].append(token)
            else:
                runs.append([token])
        nouns = []
        for run in runs:
            first, last = run[0], run[-1]
            lemma = (last.lemma_ or last.text).lower()
            if lemma not in _ABOUT_PICTURES:
                name = " ".join([*(token.text.lower() for token in run[:-1]), lemma])
                nouns.append(TextMention(name, first.idx, last.idx + len(last.text)))
        return nouns
