"""M-HalDetect: words have the label of their phrase, what is not judged has none, file and hub."""

import json

import pytest
from helpers.by_hand import totals_of
from test_halloc import written
from test_sources import cache, write  # noqa: F401 (a fixture)

from stethoscope.core.errors import DataError
from stethoscope.tasks.mhal_detect import MHalDetect, read_segments

TEXT = "A dog sits. It has a red hat, perhaps. Who knows?"


def segment(phrase, label, shift=0):
    start = TEXT.index(phrase)
    return {"start": start, "end": start + len(phrase) - shift, "text": phrase, "label": label}


SEGMENTS = [
    segment("A dog sits.", "ACCURATE"),
    segment("It has a red hat", "INACCURATE", shift=1),  # the end is the last character
    segment(", perhaps", "UNSURE"),
    segment(". ", "ANALYSIS"),
]
ROWS = [
    {"question": "Describe it.", "response": TEXT, "image": "a.png", "annotations": SEGMENTS},
    {"question": "Describe it.", "response": "A cat.", "image": "COCO_val2014_000000000042.jpg", "annotations": []},
    {"question": "Describe it.", "response": "A cat.", "image": 42, "annotations": "[]"},
]


@pytest.fixture
def settings(tmp_path, images):
    (images / "b.png").rename(images / "COCO_val2014_000000000042.jpg")
    (tmp_path / "val_raw.json").write_text(json.dumps(ROWS))
    return {"source": "files", "file": str(tmp_path / "val_raw.json"), "images": str(images)}


def made(settings, **more):
    task = MHalDetect(**settings, **more)
    task.setup()
    return task


def labelled(task, text, index=0):
    mentions = task.mentions(task.samples()[index], written(text))
    return [(text[mention.start : mention.end], mention.label) for mention in mentions]


GROUNDED, INVENTED, OTHER = ("A", "dog", "sits"), ("It", "has", "a", "red", "hat"), ("perhaps", "Who", "knows")
EXPECTED = [(word, label) for words, label in ((GROUNDED, 0), (INVENTED, 1), (OTHER, -1)) for word in words]


def test_words_have_the_label_of_their_phrase(settings):
    task = made(settings)
    assert labelled(task, TEXT) == EXPECTED
    lower = [(word.lower(), label) for word, label in EXPECTED]
    assert labelled(task, TEXT.lower().replace(",", " ,")) == lower
    assert labelled(task, "A cat.", 1) == [("A", -1), ("cat", -1)]
    assert labelled(task, TEXT.replace("red", "r?d")) == []


def test_samples_bring_their_answers_and_their_writer(settings):
    task = made(settings)
    first, second, third = task.samples()
    assert (first.id, first.answer, first.group, first.reference["writer"]) == ("1", TEXT, "a", "InstructBLIP")
    assert second.group == third.group == "COCO_val2014_000000000042"
    assert "InstructBLIP" in task.notes(task.samples())[0]
    grey = made(settings, text_only=True)
    assert len(set(grey.samples()[0].image.load().getdata())) == 1


def test_surprise_by_hand(settings):
    """One token for every character, of which token n costs n nats."""
    task = made(settings)
    counts = [task.score(sample, written(sample.answer)).counts for sample in task.samples()]
    values = {name: float(metric(totals_of(counts))) for name, metric in task.metrics().items()}
    positions = {word: range(TEXT.index(word) + 1, TEXT.index(word) + 1 + len(word)) for word in (*GROUNDED, *INVENTED)}
    positions["a"] = range(TEXT.index(" a ") + 2, TEXT.index(" a ") + 3)
    means = []
    for words in (GROUNDED, INVENTED):
        costs = [cost for word in words for cost in positions[word]]
        means.append(sum(costs) / len(costs))
    assert values["nll_grounded"] == pytest.approx(means[0])
    assert values["nll_hallucinated"] == pytest.approx(means[1])
    assert values["nll_gap"] == pytest.approx(means[1] - means[0])
    assert values["hallucinated"] == pytest.approx(len("Ithasaredhat") / len("AdogsitsIthasaredhat"))


def test_phrases_that_contradict_each_other_are_not_judged(settings):
    task = made(settings)
    spans = [(0, 5, "grounded"), (2, 11, "hallucinated")]
    kinds = [kind for _, _, kind in task.label_words(TEXT, spans)]
    assert kinds[:4] == ["grounded", "unknown", "hallucinated", "unknown"]


def test_a_segment_with_another_text_is_not_judged(settings, tmp_path):
    wrong = {**ROWS[0], "annotations": [*SEGMENTS[:1], {**SEGMENTS[1], "text": "It has a hat"}]}
    (tmp_path / "val_raw.json").write_text(json.dumps([wrong]))
    with pytest.warns(UserWarning, match="1 of 2 segments have another text"):
        task = made(settings)
    assert {label for _, label in labelled(task, TEXT)} == {0, -1}


def test_the_hub_gives_the_same(settings, tmp_path):
    files = made(settings)
    annotations = [json.dumps(SEGMENTS), "[]", "[]"]
    rows = [
        {"question": row["question"], "response": row["response"], "annotations": text}
        for row, text in zip(ROWS, annotations, strict=True)
    ]
    pictures = [{"path": None, "bytes": sample.image.source.read_bytes()} for sample in files.samples()]
    hub = MHalDetect(dataset=str(write(tmp_path / "hub" / "mhal", rows, pictures)), split="test")
    hub.setup()
    for sample, twin in zip(hub.samples(), files.samples(), strict=True):
        assert (sample.id, sample.question, sample.answer, sample.reference) == (
            twin.id, twin.question, twin.answer, twin.reference,
        )  # fmt: skip
    assert hub.samples()[1].group == hub.samples()[2].group


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        ("[{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ({}, "should be a list of segments"),
        ([{"start": 0, "end": 2}], r"annotations\[0\]: an object with start, end and label was expected"),
        ([{"start": 0, "end": 2, "label": "INACURATE"}], "did you mean 'INACCURATE'"),
        ([{"start": 0, "end": 99, "label": "UNSURE"}], "0 to 99 is no span of 6 characters"),
        ([{"start": True, "end": 2, "label": "UNSURE"}], "True to 2 is no span"),
    ],
)
def test_wrong_segments(annotations, message):
    with pytest.raises(DataError, match=f"line 3.*{message}") as error:
        read_segments(annotations, "A cat.", "line 3")
    assert "\n" not in str(error.value)
