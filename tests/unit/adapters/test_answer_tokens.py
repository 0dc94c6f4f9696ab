"""Generated ids are trimmed at end tokens and stop strings."""

import pytest

from stethoscope.adapters.answer_tokens import trim_ids


@pytest.mark.parametrize(
    ("written", "stops", "kept", "surplus"),
    [
        (["yes", ".", "###", " Human"], ["###"], 2, 0),
        (["yes", ".#", "##", " Human"], ["###"], 2, 1),
        (["yes", ".###Human"], ["###"], 2, 8),
        (["###", "yes"], ["###"], 0, 0),
        (["#", "##"], ["###"], 0, 0),
        (["\n", "yes", "\n", "no"], ["\n"], 2, 0),  # a line break before the answer does not end it
        (["no", "##", " #"], ["###"], 3, 0),
        (["a", "<end>", "b"], ["<end>"], 1, 0),
    ],
)
def test_ids_are_trimmed_to_the_answer(written, stops, kept, surplus):
    def decode(ids):
        return "".join(written[i] for i in ids)

    trimmed = trim_ids(range(len(written)), (), stops, decode)
    assert trimmed == (list(range(kept)), any(stop in decode(range(len(written))).lstrip() for stop in stops), surplus)


def test_an_end_token_comes_before_what_stands_behind_it():
    assert trim_ids([0, 9, 1], {9}, ["b"], lambda ids: "".join("ab"[i] for i in ids)) == ([0], True, 0)
