"""Remove objects from a text so that what remains is grammatical: an item of a list, a clause, or a whole sentence.

The rules read words, not syntax, and take the smallest part that is safe to take. Where none is, the sentence goes, and
with it the sentences behind it that begin with a pronoun for what it was about.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

NOTHING_LEFT = "No object can be named with confidence."
"""Text of an answer of which every sentence was removed."""

_DETERMINERS = (
    "a few|a couple of|a group of|a number of|a variety of|a pair of|a set of|a bunch of|a piece of|a slice of|"
    "a lot of|a|an|the|some|several|many|multiple|numerous|various|few|one|two|three|four|five|six|seven|eight|nine|"
    "ten|another|other|his|her|its|their"
)
_NO_MODIFIER = (  # words that end a noun phrase instead of describing its noun
    "a|an|the|is|are|was|were|be|has|have|can|in|on|at|of|to|with|by|for|from|near|next|behind|beside|between|under|over|"
    "above|below|around|through|into|onto|against|towards?|and|or|as|which|that|who|where|while|there|it|they|seen|"
    "visible|sitting|standing|lying|walking|holding|wearing|riding|placed|positioned|located"
)
_MODIFIER = rf"(?!(?:{_NO_MODIFIER})\b)[\w'-]+ "
_PHRASE_START = re.compile(rf"\b(?:(?:{_DETERMINERS}) (?:{_MODIFIER}){{0,3}})$", re.IGNORECASE)
_GAP = re.compile(
    rf"^(?P<joint>,? and|,? or|,? as well as|,) (?:(?:{_DETERMINERS}) )?(?:{_MODIFIER}){{0,3}}$", re.IGNORECASE
)
_BARE = re.compile(r"(?:^|\b(?:of|with|like|including|as|are|and|or|has|have|features?|contains?|includes?)|,) $", re.I)
_SENTENCE = re.compile(r"[^.!?\n]*(?:\.(?=\d)[^.!?\n]*)*(?:[.!?]+[\"')]*|(?=\n)|$)")
_TAIL = re.compile(
    r",? (?:with|along with|as well as|including|such as|accompanied by|surrounded by|while|which|where|featuring|"
    r"suggesting|indicating|possibly|likely|next to|near)\b",
    re.IGNORECASE,
)
_AND_TAIL = re.compile(
    r", (?:and|but)\b(?=.*\b(?:is|are|was|were|can|has|have|appears?|seems?|stands?|sits?|lies?)\b)", re.I
)
_TAKES_WITH = re.compile(r"(?:\w+(?:ed|ing)|is|are|was|were|up|along|together) *$", re.IGNORECASE)
_REFERENCE = re.compile(
    r"(?:(?:some|one|all|most|each|both|many) of (?:them|these|those)|it|its|they|their|these|this|those|he|she|his|"
    r"her|both|one|others|another|the others?)\b",
    re.IGNORECASE,
)
_ONE = re.compile(r"(?:a|an|one|another)\b(?! (?:few|couple|group|number|variety|pair|set|bunch|lot) )", re.IGNORECASE)
_DEFINITE = re.compile(r"(?:the|his|her|its|their) ", re.IGNORECASE)
_PLURAL_VERB = re.compile(r" (are|were|have)\b")
_SINGULAR = {"are": "is", "were": "was", "have": "has"}
_OTHER_VERB = re.compile(r" (?:sit|stand|lie|rest|appear|seem|hang|run|walk|play|add|create|make|include|serve)\b")
_NEEDS_TWO = re.compile(r"\b(?:between|both|either|neither) $", re.IGNORECASE)

Span = tuple[int, int]


class Removal(NamedTuple):
    """A part of a text that was taken out.

    Attributes:
        start, end: character span in the original text.
        kind: ``item`` of a list, ``clause``, ``sentence``, or ``reference``: a sentence about a removed one.
        mentions: indices of the mentions that it held, those to be removed and others that went with them.
    """

    start: int
    end: int
    kind: str
    mentions: tuple[int, ...]


class EditedText(NamedTuple):
    """A text without some of its mentions.

    Attributes:
        text: what remains.
        removals: what was taken out, in reading order.
    """

    text: str
    removals: tuple[Removal, ...]

    @property
    def removed(self) -> tuple[int, ...]:
        """Indices of the mentions that are no longer in the text."""
        return tuple(sorted({index for removal in self.removals for index in removal.mentions}))


class _Sentence(NamedTuple):
    """A sentence: its span without surrounding blanks, and the indices of its mentions."""

    start: int
    end: int
    mentions: tuple[int, ...]


def remove_mentions(text: str, spans: Sequence[Span], unwanted: Collection[int]) -> EditedText:
    """Remove mentions from a text.

    Args:
        text: an answer.
        spans: character spans of its mentions, in reading order.
        unwanted: indices of those to remove.

    Returns:
        The text that remains (``NOTHING_LEFT`` where that is none) and what was removed. No unwanted mention remains;
        others may go with their sentence.

    >>> caption = "A cat and a dog are on a couch. There is also a lamp."
    >>> remove_mentions(caption, [(2, 5), (12, 15), (25, 30), (47, 51)], {1, 3}).text
    'A cat is on a couch.'
    """
    pieces: list[str] = []
    removals: list[Removal] = []
    dropped_before, position, blank = False, 0, ""
    for sentence in _sentences(text, spans):
        blank += text[position : sentence.start]
        position = sentence.end
        body = text[sentence.start : sentence.end]
        unwanted_here = [index for index in sentence.mentions if index in unwanted]
        if not unwanted_here and dropped_before and _REFERENCE.match(body):
            removals.append(Removal(sentence.start, sentence.end, "reference", sentence.mentions))
            continue
        edited = _edit_sentence(text, sentence, spans, set(unwanted_here)) if unwanted_here else (body, [])
        dropped_before = edited is None
        if edited is None:
            removals.append(Removal(sentence.start, sentence.end, "sentence", sentence.mentions))
            continue
        removals += edited[1]
        pieces += [("\n\n" if "\n" in blank else " ") if pieces else "", edited[0]]
        blank = ""
    if not removals:
        return EditedText(text, ())
    return EditedText("".join(pieces) or NOTHING_LEFT, tuple(removals))


def _sentences(text: str, spans: Sequence[Span]) -> Iterator[_Sentence]:
    """Yield the sentences of a text; one that a mention crosses the end of goes on to the next end."""
    start = 0
    while start < len(text):
        match = _SENTENCE.match(text, start)
        end = match.end() if match else len(text)
        while any(first < end < last for first, last in spans):
            more = _SENTENCE.match(text, end)
            end = max(more.end() if more else len(text), end + 1)
        end = max(end, start + 1)
        body = text[start:end]
        if body.strip():
            first = start + len(body) - len(body.lstrip())
            last = start + len(body.rstrip())
            inside = tuple(index for index, span in enumerate(spans) if first <= span[0] < last)
            yield _Sentence(first, last, inside)
        start = end


def _edit_sentence(
    text: str, sentence: _Sentence, spans: Sequence[Span], unwanted: set[int]
) -> tuple[str, list[Removal]] | None:
    """Return a sentence without its unwanted mentions, and what was removed; None where it has to go as a whole."""
    edits: list[tuple[int, int, str]] = []  # parts of the text and what replaces them
    removals: list[Removal] = []
    left = set(unwanted)
    for items in _lists(text, sentence, spans):
        out = [index for index in items if index in left]
        if not out or len(out) == len(items):
            continue
        edited_to = max((end for _, end, _ in edits), default=sentence.start)
        edit = _shorten_list(text, sentence, spans, items, set(out), edited_to)
        if edit is None:
            continue
        edits += edit
        removals += [Removal(*spans[index], "item", (index,)) for index in out]
        left -= set(out)
    if left:
        clause = _clause_start(text, sentence, spans, left)
        if clause is None:
            return None
        ending = re.search(r"[.!?]+[\"')]*$", text[sentence.start : sentence.end])
        edits = [edit for edit in edits if edit[1] <= clause] + [(clause, sentence.end, ending[0] if ending else "")]
        gone = tuple(index for index in sentence.mentions if spans[index][0] >= clause)
        removals = [removal for removal in removals if removal.end <= clause]
        removals.append(Removal(clause, sentence.end - len(ending[0] if ending else ""), "clause", gone))
    pieces, position = [], sentence.start
    for start, end, replacement in sorted(edits):
        pieces += [text[position:start], replacement]
        position = end
    edited = "".join([*pieces, text[position : sentence.end]])
    return edited[:1].upper() + edited[1:], removals


def _lists(text: str, sentence: _Sentence, spans: Sequence[Span]) -> Iterator[list[int]]:
    """Yield runs of two or more mentions that are the items of a list."""
    items: list[int] = []
    for index in sentence.mentions:
        if items and _GAP.match(text[spans[items[-1]][1] : spans[index][0]]):
            items.append(index)
            continue
        if len(items) > 1:
            yield items
        items = [index]
    if len(items) > 1:
        yield items


def _shorten_list(
    text: str, sentence: _Sentence, spans: Sequence[Span], items: list[int], out: set[int], edited_to: int
) -> list[tuple[int, int, str]] | None:
    """Return the edits that leave some items out of a list; None where the rest would not be grammatical.

    Text before ``edited_to`` belongs to another edit.
    """
    first = spans[items[0]][0]
    mentioned_to = max([sentence.start, *(end for _, end in spans if end <= first)])
    phrase = _PHRASE_START.search(text, mentioned_to, first)
    if phrase is None and items[0] not in out:  # "a stove top oven": an earlier mention may be part of one that stays
        phrase = _PHRASE_START.search(text, edited_to, first)
    if phrase is None and not _BARE.search(text[sentence.start : first]):
        return None
    begin = phrase.start() if phrase else first
    texts, joints, position = [], [], begin
    for index in items:
        if position != begin:
            gap = _GAP.match(text[position : spans[index][0]])
            joints.append(gap["joint"] if gap else ",")
            position += len(joints[-1]) + 1
        texts.append(text[position : spans[index][1]])
        position = spans[index][1]
    closed = bool(joints[-1].strip(","))  # the last joint is a word, so that the list ends with its last item
    kept = [words for words, index in zip(texts, items, strict=True) if index not in out]
    after = text[position : sentence.end]
    if not closed or re.match(r",? (?:and|or|as well as) |, \w+ing\b", after):
        return None
    word = joints[-1].strip(", ").lower()
    if len(kept) > 1:
        joined = f"{kept[0]} {word} {kept[1]}" if len(kept) == 2 else f"{', '.join(kept[:-1])}, {word} {kept[-1]}"
        return [(begin, position, joined)]
    return _leave_one_item(text, sentence, begin, position, kept[0])


def _leave_one_item(
    text: str, sentence: _Sentence, begin: int, end: int, item: str
) -> list[tuple[int, int, str]] | None:
    """Return the edits that leave one item of a list, with the verb behind or before it in the singular."""
    before, after = text[sentence.start : begin], text[end : sentence.end]
    if _NEEDS_TWO.search(before):
        return None
    singular = bool(_ONE.match(item) or (_DEFINITE.match(item) and not item.endswith(("s", "people", "men"))))
    edits = [(begin, end, item)]
    is_subject = not before.strip() or bool(re.search(r"(?:^|[,.] )$|\b(?:while|where|and|also) $", before))
    if singular and is_subject:
        verb = _PLURAL_VERB.match(after)
        if verb:
            edits.append((end + 1, end + 1 + len(verb[1]), _SINGULAR[verb[1]]))
        elif _OTHER_VERB.match(after):
            return None
    there = re.search(r"\bthere (are|were)( also)? $", before, re.IGNORECASE)
    if singular and there:
        start = sentence.start + there.start(1)
        edits.append((start, start + len(there[1]), _SINGULAR[there[1].lower()]))
    return edits


def _clause_start(text: str, sentence: _Sentence, spans: Sequence[Span], left: set[int]) -> int | None:
    """Return where a clause begins that ends the sentence, holds all unwanted mentions and can go; None without one."""
    first = min(spans[index][0] for index in left)
    body = text[sentence.start : sentence.end]
    starts = [match.start() for pattern in (_TAIL, _AND_TAIL) for match in pattern.finditer(body)]
    for start in sorted(starts, reverse=True):
        head, begin = body[:start], sentence.start + start
        others = [index for index in sentence.mentions if index not in left and spans[index][0] >= begin]
        if begin >= first or others or len(head.split()) < 3:
            continue
        if not body.startswith(",", start) and _TAKES_WITH.search(head):
            continue
        if any(index not in left for index in sentence.mentions if spans[index][0] < begin):
            return begin
    return None
