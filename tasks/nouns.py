"""Nouns of a text that belong to a vocabulary, without a language model; and names of several words.

AMBER defines its nouns by NLTK's part-of-speech tagger and WordNet's lemmatiser, both of which need downloads. Within a
vocabulary of things that can be pictured little of that is needed: a word is a noun unless its neighbours say that it
is a verb, and its singular is whichever of a few regular forms the vocabulary has. On 1,000 captions of LLaVA-1.5 and
MiniGPT-4, with AMBER's vocabulary, 98.5 % of the nouns are nouns to spaCy's small English tagger too, and 99.5 % of its
nouns are found; most of the rest are "orange" and "light" as adjectives.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence

from stethoscope.tasks.objects import Mention

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
    """The word itself, then what could be its singular, likeliest first.

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


class Nouns:
    """Finds the words of a vocabulary where they are nouns.

    Words are compared as they are written: AMBER's vocabulary is in small letters but for "TV", so a word that begins
    a sentence with a capital is not found, there as here. "can" is a noun only behind an article or what is kept in
    cans; words that are verbs as well ("watch", "board") are not nouns behind "to" (but "next to"), a modal or a
    pronoun. A noun used as an adjective ("orange cat", "light brown") counts as a noun.

    Attributes:
        vocabulary: the words that count, each in its singular.
    """

    def __init__(self, vocabulary: Collection[str]) -> None:
        """Takes the vocabulary."""
        self.vocabulary = frozenset(vocabulary)

    def __call__(self, text: str) -> list[Mention]:
        """The nouns of a text in reading order, named by the vocabulary's word.

        >>> [noun.name for noun in Nouns(["dog", "board", "can"])("A dog can see two dogs on boards, about to board.")]
        ['dog', 'dog', 'board']
        """
        words = list(WORD.finditer(text))
        found = []
        for index, word in enumerate(words):
            name = next((form for form in singulars(word[0]) if form in self.vocabulary), None)
            if name is not None and self._noun(
                word[0], [before[0].lower() for before in words[max(0, index - 2) : index]]
            ):
                found.append(Mention(name, word.start(), word.end()))
        return found

    @staticmethod
    def _noun(word: str, before: Sequence[str]) -> bool:
        """Whether a word is a noun behind the (at most two) words before it, which are in small letters."""
        last = before[-1] if before else ""
        if word == "can":
            return last in _TIN
        verb = word in _DOING and last in _BEFORE_VERB and not (last == "to" and before[0] in _BEFORE_TO)
        return not verb and word not in _NEVER


class Vocabulary:
    """Finds objects of one's own choosing, which may be called by several names of several words each.

    Attributes:
        names: lower-case words, joined by single blanks -> canonical name.
    """

    def __init__(self, objects: Mapping[str, Sequence[str]]) -> None:
        """Takes canonical names, each with the other names that stand for it."""
        self.names = {
            self._key(name): canonical for canonical, names in objects.items() for name in (canonical, *names)
        }
        self._longest = max((len(key.split()) for key in self.names), default=0)

    @staticmethod
    def _key(name: str) -> str:
        return " ".join(name.lower().split())

    def mentions(self, text: str) -> list[Mention]:
        """Every mention in reading order; of several names that fit at one place the longest, its last word in the
        singular or plural.

        >>> words = Vocabulary({"dog": ["puppy"], "hot dog": []})
        >>> [mention.name for mention in words.mentions("Puppies eat hot dogs; a dog looks on.")]
        ['dog', 'hot dog', 'dog']
        """
        words = list(WORD.finditer(text))
        found, index = [], 0
        while index < len(words):
            for last in range(min(index + self._longest, len(words)) - 1, index - 1, -1):
                name = self._name(text, words[index : last + 1])
                if name is not None:
                    found.append(Mention(name, words[index].start(), words[last].end()))
                    index = last
                    break
            index += 1
        return found

    def _name(self, text: str, words: Sequence[re.Match]) -> str | None:
        """What these words of a text name; nothing if more than blanks stands between them."""
        if text[words[0].start() : words[-1].end()].split() != [word[0] for word in words]:
            return None
        *first, last = (word[0].lower() for word in words)
        keys = (" ".join([*first, form]) for form in singulars(last))
        return next((self.names[key] for key in keys if key in self.names), None)
