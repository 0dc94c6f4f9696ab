"""Which mentions are shown as examples, and their surroundings."""

import pandas as pd

from stethoscope.report import examples


def test_the_gallery_takes_the_clearest_and_different_ones():
    rows = pd.DataFrame(
        {
            "label": [1, 1, 1, 1, 0, 0],
            "warned": [True, True, True, False, True, False],
            "probability": [0.9, 0.8, 0.7, 0.1, 0.6, 0.05],
            "object": ["cat", "cat", "dog", "cup", "car", "car"],
            "sample_id": ["a", "b", "c", "a", "b", "c"],
        }
    )
    chosen = {kind: list(mentions.index) for kind, mentions in examples.select_mentions(rows, 2).items()}
    assert chosen == {"caught": [0, 2], "missed": [3], "false alarm": [4]}
    assert list(examples.select_mentions(rows, 3)["caught"].index) == [0, 1, 2]


def test_pieces_spell_the_answer():
    text = "A cat and a dog and a cat."
    pieces = list(examples.cut_answer(text, (11, 15), [(1, 5), (11, 15), (21, 25)]))
    assert pieces == [
        ("A ", ""), ("cat", "warned"), (" and a ", ""), ("dog", "this"), (" and a ", ""), ("cat", "warned"), (".", ""),
    ]  # fmt: skip
    long = "x " * 400 + "dog" + " y" * 400
    pieces = list(examples.cut_answer(long, (800, 803), []))
    assert (pieces[0], pieces[-1]) == (("… ", ""), (" …", ""))
    assert ("dog", "this") in pieces
    assert sum(len(part) for part, _ in pieces) < 2 * examples.CONTEXT + 10
