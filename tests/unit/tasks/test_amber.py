"""AMBER: its published figures, its scoring against a transcription and by hand on the real annotations, its labels."""

import json
import random
import zlib

import numpy as np
import pytest
from helpers import amber_published
from helpers.by_hand import figures, reply, totals_of

from stethoscope.core.errors import ConfigError
from stethoscope.tasks.amber import Amber, amber_score, compare_nouns


@pytest.fixture
def folder(tmp_path, images):
    """Two descriptions and five questions about a.png and b.png."""
    association = {"person": ["man", "woman"], "sea": ["water", "lake"], "dog": [], "sky": [], "lake": ["water"]}
    (tmp_path / "relation.json").write_text(json.dumps(association | {"light": [], "tree": ["leave"]}))
    (tmp_path / "safe_words.txt").write_text("light\nindividual")
    rows = [
        ("generative", "Describe this image.", ["person", "sea", "dog"], {"hallu": ["sky", "lake"]}),
        ("generative", "Describe this image.", ["tree"], {"hallu": ["person"]}),
        ("discriminative-hallucination", "Is there a tree in this image?", "no", {}),
        ("discriminative-attribute-state", "Is the sea blue in this image?", "yes", {}),
        ("discriminative-attribute-number", "Are there two dogs in this image?", "no", {}),
        ("relation", "Is there direct contact between the person and sea?", "no", {}),
        ("discriminative-relation", "Is there direct contact between the person and dog?", "yes", {}),
    ]
    annotations = [{"id": id_, "type": k, "truth": t, **more} for id_, (k, _, t, more) in enumerate(rows, 1)]
    queries = [{"id": i, "image": "b.png" if i == 2 else "a.png", "query": q} for i, (_, q, *_) in enumerate(rows, 1)]
    (tmp_path / "annotations.json").write_text(json.dumps(annotations, indent=4))
    (tmp_path / "query_all.json").write_text(json.dumps(queries, indent=4))
    return tmp_path


@pytest.fixture
def task(folder, images):
    task = Amber(str(folder), str(images))
    task.setup()
    return task


@pytest.fixture(scope="module")
def real(shared, tmp_path_factory):
    """The real benchmark with empty images, its annotations by id and its associations."""
    images = tmp_path_factory.mktemp("amber")
    for number in range(1, 1005):
        (images / f"AMBER_{number}.jpg").touch()
    task = Amber(str(shared / "amber"), str(images))
    task.setup()
    annotations = {row["id"]: row for row in json.loads((shared / "amber" / "annotations.json").read_text())}
    return task, annotations, json.loads((shared / "amber" / "relation.json").read_text())


@pytest.mark.parametrize(
    ("model", "chair", "f1", "amber"),
    [
        ("LLaVA-1.5", 7.8, 74.7, 83.5),
        ("InstructBLIP", 8.8, 81.7, 86.5),
        ("mPLUG-Owl2", 10.6, 78.5, 84.0),
        ("Qwen2-VL", 6.4, 86.6, 90.1),
    ],
)
def test_published_components_give_the_published_score(model, chair, f1, amber):
    """CHAIR, F1 and AMBER score of the paper's table, each rounded to a tenth."""
    assert abs(amber_score(chair, f1) - amber) <= 0.05 + 1e-9


def test_samples(task):
    samples = task.samples()
    assert [s.id for s in samples[:4]] == ["generative-1", "generative-2", "existence-3", "state-4"]
    assert [s.id for s in samples[4:]] == ["number-5", "relation-6", "relation-7"]
    assert samples[0].reference == {"truth": ["person", "sea", "dog"], "hallu": ["sky", "lake"]}
    assert [s.reference["object"] for s in samples[2:]] == ["tree", "sea", "dog", "person", "person"]
    assert {s.group for s in samples} == {"a", "b"}


def test_a_description_by_hand(task):
    """man: person; lake: the sea's word although the lake itself is not there; light: safe; sky: fallen for."""
    answer = "A man and two women by a lake in the light, under a sky; a tree stands there. Trees, TV, and another dog."
    score = task.score(task.samples()[0], reply(answer))
    assert score.detail["nouns"] == ["man", "woman", "lake", "light", "sky", "tree", "dog"]
    assert score.detail["invented"] == ["sky", "tree"]
    assert score.detail["fallen_for"] == ["sky"]
    expected = {"nouns": 7, "invented": 2, "answers": 1, "with_invented": 1, "truth": 3, "covered": 3, "targets": 2}
    expected |= {"fallen_for": 1}
    assert {name: score.counts[name] for name in expected} == expected


def test_labels_of_a_description(task):
    sample, text = task.samples()[0], "Two men, light and a tree. A man."
    mentions = task.mentions(sample, reply(text))
    assert [(text[m.start : m.end], m.object, m.label, m.mention_index, m.repeat_index) for m in mentions] == [
        ("men", "man", 0, 0, 0),
        ("light", "light", -1, 1, 0),
        ("tree", "tree", 1, 2, 0),
        ("man", "man", 0, 3, 1),
    ]


def test_labels_of_a_question(task):
    existence, state = task.samples()[2:4]
    (mention,) = task.mentions(existence, reply("Yes, there is."))
    assert (mention.start, mention.end, mention.object, mention.label) == (0, 3, "tree", 1)
    assert task.mentions(state, reply("Yes"))[0].label == 0
    assert task.mentions(existence, reply("No")) == ()


def test_no_is_the_positive_class(task):
    """Of three questions with no for the truth two get it; one of three no is wrong."""
    answers = {"existence-3": "No", "state-4": "no.", "number-5": "No", "relation-6": "Yes", "relation-7": "Yes"}
    values = figures(task, answers)
    assert values["accuracy", "discriminative"] == pytest.approx(3 / 5)
    assert values["precision", "discriminative"] == pytest.approx(2 / 3)
    assert values["recall", "discriminative"] == pytest.approx(2 / 3)
    assert values["accuracy", "attribute"] == pytest.approx(1 / 2)
    assert values["accuracy", "relation"] == pytest.approx(1 / 2)


def test_what_cannot_be_read_counts_only_in_the_published_figures(task):
    answers = {"existence-3": "Hm", "state-4": "Hm", "number-5": "No", "relation-6": "No", "relation-7": "Yes"}
    assert task.score(task.samples()[2], reply("Hm")).status == "unparsed"
    values = figures(task, answers)
    assert values["accuracy", "discriminative"] == 1.0
    assert values["f1", "discriminative"] == 1.0
    assert values["accuracy_published", "discriminative"] == pytest.approx(3 / 5)
    assert values["f1_published", "discriminative"] == pytest.approx(2 * 1 * (2 / 3) / (1 + 2 / 3))


def test_the_score_takes_both_parts_together(task):
    answers = {"generative-1": "A dog and a tree.", "generative-2": "A tree.", "existence-3": "No", "state-4": "No"}
    values = figures(task, answers)
    assert values["chair", "generative"] == values["chair", "all"] == pytest.approx(1 / 3)
    assert values["f1", "all"] == pytest.approx(2 / 3)
    assert values["amber", "all"] == pytest.approx((100 - 100 / 3 + 200 / 3) / 2)
    assert np.isnan(values["amber", "generative"])


def test_an_empty_description_is_unparsed(task):
    score = task.score(task.samples()[0], reply("  "))
    assert score.status == "unparsed"
    assert set(score.counts.values()) == {0.0}


def test_parts_and_the_metric_that_stands_for_them(folder, images):
    for parts, primary, count in ((["generative"], "chair", 2), (["existence", "attribute"], "f1", 3)):
        task = Amber(str(folder), str(images), parts=parts)
        task.setup()
        assert (task.primary, len(task.samples())) == (primary, count)


def test_queries_may_lie_in_their_own_folder_as_published(folder, images):
    (folder / "query").mkdir()
    (folder / "query_all.json").rename(folder / "query" / "query_all.json")
    task = Amber(str(folder), str(images), suffix=" Yes or no?")
    task.setup()
    assert task.samples()[0].question == "Describe this image."
    assert task.samples()[2].question == "Is there a tree in this image? Yes or no?"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parts": ["generativ"]}, "did you mean 'generative'"),
        ({"parts": "generative"}, "should be a list"),
        ({"parser": "exakt"}, "did you mean 'exact'"),
        ({"similarity": 1.5}, "similarity=1.5"),
        ({"similarity": "high"}, "similarity='high' should be a number"),
        ({"folder": None}, "task.folder"),
        ({"images": None}, "task.images"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        Amber(**{"folder": "a", "images": "b", **settings})


def test_a_spacy_model_that_is_not_there(folder, images):
    with pytest.raises(ConfigError, match="pip install 'lvlm-stethoscope"):
        Amber(str(folder), str(images), spacy="en_no_such_model").setup()


# --- the real annotations --------------------------------------------------------------------------------------------


def test_real_questions_by_hand(real):
    """All no: 9,427 of 14,216 questions deserve it. Then yes to every relation: of 1,664 these are 975."""
    task, _, _ = real
    asked = [sample for sample in task.samples() if sample.subset != "generative"]
    assert len(task.samples()) - len(asked) == 1004
    values = figures(task, {sample.id: "No" for sample in asked})
    assert values["accuracy", "discriminative"] == values["precision", "discriminative"] == 9427 / 14216
    assert values["recall", "discriminative"] == 1.0
    assert values["f1", "discriminative"] == pytest.approx(2 * 9427 / (14216 + 9427))
    assert values["accuracy", "existence"] == 1.0
    for subset in ("attribute", "state", "number", "action"):
        assert values["accuracy", subset] == 0.5
        assert values["f1", subset] == pytest.approx(2 / 3)
    values = figures(task, {sample.id: "Yes" if sample.subset == "relation" else "No" for sample in asked})
    assert values["accuracy", "relation"] == 975 / 1664
    assert values["recall", "relation"] == 0.0
    assert values["precision", "discriminative"] == pytest.approx(8738 / (8738 + 3814))
    assert values["recall", "discriminative"] == pytest.approx(8738 / 9427)


def test_real_questions_against_the_transcription(real):
    task, annotations, _ = real
    draw = random.Random(0)
    asked = [sample for sample in task.samples() if sample.subset != "generative"]
    answers = {sample.id: draw.choices(("Yes", "No", "Yes.", "Perhaps"), (4, 4, 1, 1))[0] for sample in asked}
    values = figures(task, answers)
    for subset in ("existence", "state", "relation", "discriminative"):
        ids = [s.id for s in asked if subset in (s.subset, "discriminative")]
        theirs = amber_published.questions({int(i.split("-")[1]): answers[i] for i in ids}, annotations)
        assert values["accuracy_published", subset] == pytest.approx(theirs["accuracy"])
        assert values["f1_published", subset] == pytest.approx(theirs["f1"])


@pytest.mark.parametrize("likeness", [0, 40])
def test_real_descriptions_against_the_transcription(real, likeness):
    """Random words of the vocabulary; of all pairs of words one in ``likeness`` counts as synonyms."""
    task, annotations, association = real
    safe, words = (
        task._safe_words,
        sorted({*association, *(w for nouns in association.values() for w in nouns)}),
    )

    def alike(first, other):
        return first == other or (likeness > 0 and zlib.crc32(f"{first} {other}".encode()) % likeness == 0)

    draw = random.Random(likeness)
    answers = {}
    for id_ in range(1, 1005):
        truth = [word for name in annotations[id_]["truth"] for word in (name, *association[name])]
        hallu = [word for name in annotations[id_]["hallu"] for word in (name, *association[name])]
        named = [draw.choice(draw.choice((truth, truth, truth, hallu, words))) for _ in range(draw.randrange(9))]
        answers[id_] = " and ".join(f"a {word}" for word in named) or "Nothing"
    theirs = amber_published.describe(
        answers, annotations, association, safe, lambda text: [noun.name for noun in task._nouns(text)], alike
    )
    totals = totals_of(
        judge_counts(task, answers[int(s.id.split("-")[1])], s, alike if likeness else None)
        for s in task.samples()
        if s.subset == "generative"
    )
    for name, value in theirs.items():
        assert float(task.metrics()[name](totals)) == pytest.approx(value), name
    assert 0.05 < theirs["chair"] < 0.6
    assert theirs["cog"] > 0.01


def judge_counts(task, text, sample, alike):
    """The counts of one description under another likeness of words."""
    task._similar = alike
    try:
        return task.score(sample, reply(text)).counts
    finally:
        task._similar = None


def test_real_captions_have_sensible_nouns(real, shared):
    """LLaVA's captions of other images: about a dozen nouns each, all of the vocabulary, and hardly a "can"."""
    task, _, association = real
    words = {*association, *(w for associated in association.values() for w in associated)}
    texts = [json.loads(line)["caption"] for line in (shared / "captions" / "llava-1.5.jsonl").read_text().splitlines()]
    nouns = [noun for text in texts for noun in task._nouns(text)]
    assert {noun.name for noun in nouns} <= words
    assert 5 < len(nouns) / len(texts) < 15
    assert sum(noun.name == "can" for noun in nouns) < 5
    assert sum(text.split().count("can") for text in texts) > 50


def test_first_word_of_several_associations_counts():
    verdicts = compare_nouns(["water"], ["sea", "lake"], [], {"sea": ["water", "lake"], "lake": ["water"]})
    assert verdicts.covered == {0}
    verdicts = compare_nouns(["lake"], ["sea", "lake"], [], {"sea": ["water", "lake"], "lake": ["water"]})
    assert verdicts.covered == {0}  # as published: the sea's word comes before the lake itself
