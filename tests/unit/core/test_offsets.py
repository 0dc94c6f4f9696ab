"""Characters of tokens: bytes of long characters, spaces, tokens that write nothing."""

import random

import pytest

from stethoscope.adapters.tiny import llama_tokenizer
from stethoscope.core.offsets import GrowingText, decode_with_offsets


@pytest.fixture(scope="module")
def decode():
    tokenizer = llama_tokenizer()
    return tokenizer, lambda ids: tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_no_tokens(decode):
    assert decode_with_offsets([], decode[1]) == ("", ())


@pytest.mark.parametrize("text", ["a cat", "😀😀", "日本 a", "é", "a  b", "x\ny", "A dog. 😀 and é"])
def test_round_trip(decode, text):
    tokenizer, of = decode
    decoded, offsets = decode_with_offsets(tokenizer.encode(text, add_special_tokens=False), of)
    assert decoded == text
    assert "".join(text[start:end] for start, end in offsets) == text


def test_a_character_belongs_to_the_token_that_completes_it(decode):
    tokenizer, of = decode
    ids = tokenizer.convert_tokens_to_ids(["▁a", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "▁", "a"])
    assert decode_with_offsets(ids, of) == ("a😀 a", ((0, 1), (1, 1), (1, 1), (1, 1), (1, 2), (2, 3), (3, 4)))


def test_bytes_that_never_become_a_character_are_covered(decode):
    tokenizer, of = decode
    ids = tokenizer.convert_tokens_to_ids(["▁a", "<0xF0>", "<0x9F>", "a"])
    text, offsets = decode_with_offsets(ids, of)
    assert "".join(text[start:end] for start, end in offsets) == text
    assert text.startswith("a")
    assert text.endswith("a")


def test_special_tokens_write_nothing(decode):
    tokenizer, of = decode
    ids = tokenizer.convert_tokens_to_ids(["▁a", "<s>", "▁a"])
    assert decode_with_offsets(ids, of) == ("a a", ((0, 1), (1, 1), (1, 3)))


def test_any_ids_are_covered_in_order(decode):
    tokenizer, of = decode
    draw = random.Random(0)
    for _ in range(50):
        ids = [draw.randrange(len(tokenizer)) for _ in range(20)]
        text, offsets = decode_with_offsets(ids, of)
        assert len(offsets) == len(ids)
        assert "".join(text[start:end] for start, end in offsets) == text
        assert all(start <= end for start, end in offsets)


@pytest.mark.parametrize("seed", range(4))
def test_text_that_grows_is_that_of_the_whole(decode, seed):
    tokenizer, of = decode
    written = random.Random(seed).choices(["a cat", "é", "😀", "日本", "  two", "\n", " dog."], k=60)
    ids = [token for word in written for token in tokenizer.encode(word, add_special_tokens=False)]
    text, offsets = decode_with_offsets(ids, of)
    growing, asked = GrowingText(lambda tokens: asked.append(len(tokens)) or of(tokens)), []
    pieces = [growing.add(token) for token in ids]
    assert "".join(part for part, _, _ in pieces) == text
    assert [(start, end) for _, start, end in pieces] == list(offsets)
    assert max(asked) < 40 < 100 < len(ids)
