"""Which tokens a stream scores: those that can begin a name, as soon as that can be known."""

import pytest

from stethoscope.adapters.tiny.tokenizers import byte_tokenizer
from stethoscope.streaming.candidates import Candidates
from stethoscope.tasks.extraction import NamePrefixes

NAMES = NamePrefixes(["dog", "dogs", "airplane", "toaster", "hot dog", "café"])


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer("<pad>", None, "</s>")


def decisions(candidates, tokenizer, pieces, finished=True):
    """What is decided of each piece, in "+", "-" and "?", when it is the newest, and once the next is known."""
    ids = [tokenizer(piece, add_special_tokens=False)["input_ids"][0] if piece else 0 for piece in pieces]
    marks = {True: "+", False: "-", None: "?"}
    early = [candidates.decide(pieces[: index + 1], ids, index) for index in range(len(pieces))]
    late = [
        candidates.decide(pieces[: index + 2], ids, index, finished and index == len(pieces) - 1)
        for index in range(len(pieces))
    ]
    return "".join(marks[decision] for decision in early), "".join(marks[decision] for decision in late)


@pytest.mark.parametrize(
    ("pieces", "early", "late"),
    [
        (("A", " dog", " in", " the", " hot", " sun", "."), "?+--+--", "-+--+--"),
        (("An", " air", "plane"), "-+-", "-+-"),
        ((" a", " dog", "house", "\n", "Dogs"), "?+--+", "----+"),
        ((" to", "aster", " to", " a"), "?-??", "+---"),
        (("x", "dog", "(", "dog"), "---+", "---+"),
        ((" caf", "", "é"), "+--", "+--"),
        ((" the dog and",), "+", "+"),
        ((" do",), "?", "-"),
    ],
    ids=str,
)  # fmt: skip
def test_first_tokens_of_names(tokenizer, pieces, early, late):
    assert decisions(Candidates(NAMES, tokenizer), tokenizer, pieces) == (early, late)


def test_all_tokens_of_names_and_all_tokens(tokenizer):
    pieces = ("A", " hot", " ", "do", "g", "-", "house", " do", "gma")
    assert decisions(Candidates(NAMES, tokenizer, every=True), tokenizer, pieces)[1] == "-++++----"
    assert decisions(Candidates(None, tokenizer), tokenizer, pieces)[0] == "+" * len(pieces)


def test_pieces_that_the_tokenizer_itself_uses_are_not_waited_for(tokenizer):
    first = tokenizer(" airplane", add_special_tokens=False)["input_ids"][0]
    piece = tokenizer.decode([first])
    assert 1 < len(piece) < len(" airplane")
    expected = None if piece == " a" else True
    assert Candidates(NAMES, tokenizer).decide([piece], [first], 0) is expected
    assert Candidates(NAMES, tokenizer).decide([" airp"], [tokenizer.pad_token_id], 0) is None
