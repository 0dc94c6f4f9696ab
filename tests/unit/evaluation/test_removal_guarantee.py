"""The promise about the text that remains: counts by hand, simulated promises, refusals."""

import numpy as np
import pytest

from stethoscope.core.errors import ArtefactError, DataError
from stethoscope.evaluation.removal_guarantee import (
    JudgedText,
    certify_removal,
    counts_after_removal,
    read_judged_texts,
)
from stethoscope.mitigation.answers import Drop
from stethoscope.storage.records import encode_line

CAPTION = "A cat and a dog are on a couch. There is a cup next to a bowl."
SPANS = [(2, 5), (12, 15), (25, 30), (43, 46), (57, 61)]


def judged(group, labels, probabilities, text=CAPTION, spans=SPANS):
    return JudgedText(group, text, spans, np.array(labels), np.array(probabilities))


def test_counts_by_hand():
    texts = [
        judged("b", [0, 1, 0, 1, 0], [0.1, 0.6, 0.2, 0.9, 0.3]),
        judged("a", [0, 0, -1, 0, 1], [0.1, 0.1, 0.1, 0.1, 0.1]),
        judged("b", [1, 0, 0, 0, 0], [0.8, 0.0, 0.0, 0.0, 0.0]),
    ]
    groups, right, wrong, kept = counts_after_removal(texts, np.array([0.5, 0.85, 1.1]))
    assert groups.tolist() == ["a", "b"]
    assert right.tolist() == [3, 7]
    # image b: at 0.5 the first text loses its dog and the whole second sentence, the last one its cat
    assert wrong.tolist() == [[1, 1, 1], [0, 2, 3]]
    assert kept.tolist() == [[4, 4, 4], [2 + 4, 3 + 5, 5 + 5]]


def draw(seed, images, noise=1.0):
    """Images with a caption each, a quarter of the mentions hallucinated, and a detector that mostly knows."""
    random = np.random.default_rng(seed)
    texts = []
    for index in range(images):
        labels = (random.random(5) < 0.25).astype(int)
        odds = 3 * (2 * labels - 1) + noise * 2 * random.standard_normal(5)
        texts.append(judged(f"{seed}-{index:05d}", labels, 1 / (1 + np.exp(-odds))))
    return texts


def test_promises_are_kept():
    training, world = draw(0, 200), draw(1, 1000)
    shares = []
    for seed in range(12):
        certificate = certify_removal(draw(100 + seed, 250), training, 0.1)
        left = counts_after_removal(world, np.array([certificate.threshold]))
        shares.append(left.wrong.sum() / left.kept.sum())
        assert certificate.images == 250
        assert certificate.observed <= 0.1
        assert 0.3 < certificate.kept < 1
    assert sum(share > 0.1 for share in shares) <= 2  # each with 5 % at most: more than two have a chance of 2 %
    assert np.mean(shares) > 0.03  # and no more is removed than needed


def test_more_images_keep_more():
    training = draw(0, 200)
    kept = [certify_removal(draw(5, images), training, 0.1).kept for images in (150, 1000)]
    assert kept[1] > kept[0]


def test_a_promise_that_cannot_be_given_names_the_images():
    with pytest.raises(DataError, match=r"cannot be promised on 10 calibration images; it takes about \d+"):
        certify_removal(draw(1, 10), draw(0, 200), 0.05)
    blind = [judged(f"{index}", [1] * 5, [0.5] * 5) for index in range(50)]
    with pytest.raises(DataError, match="no threshold leaves so few hallucinated mentions"):
        certify_removal(blind, blind, 0.05)


def test_where_nothing_has_to_go_a_certain_mention_stays_too():
    """The last threshold of the test keeps all mentions; a certificate of 1 would remove those of probability 1."""
    certain = [judged(f"{index:03d}", [0] * 5, [0.2, 0.4, 0.6, 0.8, 1.0]) for index in range(200)]
    certificate = certify_removal(certain, certain, 0.1)
    assert certificate.kept == 1
    assert not Drop().unwanted(certain[0].probabilities, certificate.threshold)
    assert "nothing is removed" in str(certificate)


@pytest.mark.parametrize(("content", "message"), [("{", "is damaged"), ("", "has no warnings.jsonl")])
def test_warnings_of_a_run_that_cannot_be_read(tmp_path, content, message):
    (tmp_path / "warnings.jsonl").write_text(content)
    with pytest.raises(ArtefactError, match=message):
        read_judged_texts(tmp_path, None)


def test_warnings_with_a_line_separator_inside_are_read(tmp_path):
    line = {"task": "chair", "sample_id": "1", "group": "a\u2028b", "object": "dog", "fold": "train", "start": 0}
    line |= {"end": 3, "label": 0, "probability": 0.5, "evidence": None, "prior": None, "visual_evidence": []}
    (tmp_path / "warnings.jsonl").write_bytes(encode_line({**line, "warned": False}))
    with pytest.raises(ArtefactError, match=r"no samples\.jsonl in"):  # the next file that is read
        read_judged_texts(tmp_path, None)
