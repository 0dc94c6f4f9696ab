"""HalLoc-style answers: labels where the file puts them, whatever the tokenizer does to the text; surprise by hand."""

import json

import pytest
from helpers.by_hand import totals_of

from stethoscope.core.errors import ConfigError, DataError
from stethoscope.core.types import Answer
from stethoscope.tasks.halloc import HalLoc, move_spans

TEXT = "A red dog's bowl near a cat, indoors."
SPANS = [(2, 5, "attribute"), (17, 21, "relation"), (24, 27, "object"), (29, 36, "scene")]


def written(text, size=1, logprob=-1.0):
    """An answer of ``size`` characters per token; token n is n times as surprising as ``logprob`` says."""
    starts = range(0, len(text), size)
    offsets = tuple((start, min(start + size, len(text))) for start in starts)
    return Answer(text, tuple(starts), offsets, tuple(logprob * (n + 1) for n in range(len(offsets))))


@pytest.fixture
def task(tmp_path, images):
    spans = [{"start": start, "end": end, "type": kind} for start, end, kind in reversed(SPANS)]
    rows = [
        {"image": "a.png", "question": "What is it?", "answer": TEXT, "spans": spans, "subset": "Caption"},
        {"image": "b.png", "question": "What is it?", "answer": "  A cat. ", "spans": [], "id": "second"},
    ]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = HalLoc(str(tmp_path / "answers.jsonl"), str(images))
    task.setup()
    return task


def labelled(task, text, sample=0):
    mentions = task.mentions(task.samples()[sample], written(text))
    assert [mention.mention_index for mention in mentions] == list(range(len(mentions)))
    return [(text[mention.start : mention.end], mention.label) for mention in mentions]


def test_samples_bring_their_answers(task):
    first, other = task.samples()
    assert (first.id, first.subset, first.group, first.answer) == ("1", "Caption", "a", TEXT)
    assert (other.id, other.subset, other.group, other.answer) == ("second", "all", "b", "  A cat. ")
    assert first.reference["spans"] == SPANS


def test_a_broken_file_leaves_no_answers_behind(task, tmp_path, images):
    with (tmp_path / "answers.jsonl").open("a") as file:
        file.write("{}\n")
    task = HalLoc(str(tmp_path / "answers.jsonl"), str(images))
    for _ in range(2):  # asked again it does not go on with the answers above the broken line
        with pytest.raises(DataError, match="line 3"):
            task.setup()
    assert not task.samples()


def test_marked_words_are_hallucinated_and_all_others_grounded(task):
    expected = [("A", 0), ("red", 1), ("dog's", 0), ("bowl", 0), ("near", 1), ("a", 0), ("cat", 1), ("indoors", 1)]
    assert labelled(task, TEXT) == expected
    assert labelled(task, "A cat.", sample=1) == [("A", 0), ("cat", 0)]


def test_labels_follow_the_text_through_the_tokenizer(task):
    assert labelled(task, "a red dog 's bowl  near a cat , indoors .")[1] == ("red", 1)
    assert ("cat", 1) in labelled(task, TEXT.lower().replace(" ", "  "))
    assert labelled(task, TEXT.replace("red", "r?d")) == []
    assert task.score(task.samples()[0], written(TEXT.replace("red", "r?d"))).status == "unparsed"


def test_a_name_does_not_tell_the_type(task):
    names = [mention.object for mention in task.mentions(task.samples()[0], written(TEXT))]
    assert names == ["a", "red", "dog's", "bowl", "near", "a", "cat", "indoors"]


def test_every_place_is_judged_also_of_a_word_that_was_there_before(task):
    assert [mention.repeat_index for mention in task.mentions(task.samples()[0], written(TEXT))] == [0] * 8


def test_surprise_by_hand(task):
    """Two characters a token, of which token n costs n nats: of "A cat." the tokens are "A ", "ca" and "t."."""
    second = task.samples()[1]
    counts = task.score(second, written("A cat.", size=2)).counts
    assert (counts["tokens_grounded"], counts["nll_grounded"]) == (3.0, 6.0)
    first = task.score(task.samples()[0], written(TEXT, size=1)).counts
    assert (first["tokens_attribute"], first["nll_attribute"]) == (3.0, 3 + 4 + 5)
    assert first["tokens_scene"] == 7
    assert first["tokens_grounded"] == len("Adog'sbowla")


def test_metrics(task):
    """Every character as surprising as its place in its answer."""
    counts = [task.score(sample, written(sample.answer.strip())).counts for sample in task.samples()]
    values = {name: float(metric(totals_of(counts))) for name, metric in task.metrics().items()}
    marked = [index + 1 for start, end, _ in SPANS for index in range(start, end)]
    words = [(0, 1), (6, 11), (12, 16), (22, 23)]
    others = [index + 1 for start, end in words for index in range(start, end)] + [1, 3, 4, 5]
    assert values["nll_grounded"] == pytest.approx(sum(others) / len(others))
    assert values["nll_scene"] == pytest.approx(sum(range(30, 37)) / 7)
    assert values["nll_gap"] == pytest.approx(sum(marked) / len(marked) - sum(others) / len(others))
    assert values["hallucinated"] == pytest.approx(len(marked) / (len(marked) + len(others)))


def test_the_control_shows_grey_pictures_of_the_same_size(tmp_path, images, task):
    control = HalLoc(task.file, task.images, text_only=True)
    control.setup()
    for grey, other in zip(control.samples(), task.samples(), strict=True):
        assert (grey.id, grey.question, grey.answer, grey.image.name) == (
            other.id,
            other.question,
            other.answer,
            other.image.name,
        )
        assert grey.image.load().size == other.image.load().size
        assert len(set(grey.image.load().getdata())) == 1
    assert control.samples()[0].image.sha256 == control.samples()[1].image.sha256
    assert task.samples()[0].image.sha256 != task.samples()[1].image.sha256


@pytest.mark.parametrize("missing", ["file", "images"])
def test_what_is_required(missing):
    with pytest.raises(ConfigError, match=f"task.{missing}"):
        HalLoc(**{"file": "a", "images": "b", missing: None})


def test_the_text_false_is_refused_as_a_flag():
    with pytest.raises(ConfigError, match=r"task\.text_only='false' should be true"):
        HalLoc(file="a", images="b", text_only="false")


@pytest.mark.parametrize(
    ("text", "spans", "answer", "expected"),
    [
        ("a b", [(0, 1), (2, 3)], "a b", [(0, 1), (2, 3)]),
        ("a b", [(0, 3)], " a  b ", [(1, 5)]),
        ("A\nB", [(1, 3)], "ab", [(1, 2)]),
        ("a b", [(0, 1)], "a", None),
        ("a", [(0, 1)], "a b", None),
        ("", [], "  ", []),
    ],
)
def test_move_spans(text, spans, answer, expected):
    assert move_spans(text, spans, answer) == expected
