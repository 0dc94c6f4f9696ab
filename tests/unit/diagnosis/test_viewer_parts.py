"""What a mitigation did: both texts letter by letter, and every reason as the detector and the model gave it."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import stethoscope
from stethoscope import testbed
from stethoscope.core.types import Generation
from stethoscope.diagnosis.run_diagnosis import diagnose
from stethoscope.diagnosis.viewer_parts import compare_texts, describe_edit, edit_payload
from stethoscope.mitigation.answers import Ask, Drop, Rerank
from stethoscope.tracing.mention_passes import yes_odds

QUESTION = "Please describe this image in detail."


TEXTS = st.lists(st.sampled_from(["a", " cat", "  ", ".", "\n", " dogs", "é"]), max_size=12).map("".join)


@given(TEXTS, TEXTS)
def test_the_pieces_of_two_texts_give_them_back(before, after):
    left, right = compare_texts(before, after)
    assert ("".join(text for _, text in left), "".join(text for _, text in right)) == (before, after)
    common = ["".join(text for kind, text in pieces if kind == "same") for pieces in (left, right)]
    assert common[0] == common[1]
    assert {kind for kind, _ in left} <= {"same", "removed"}
    assert {kind for kind, _ in right} <= {"same", "added"}


@pytest.fixture(scope="module")
def adapter():
    return stethoscope.load("testbed")


def mitigated(adapter, method, index, question=QUESTION):
    """Diagnose a mitigated answer about a scene, and the answer as it would have been."""
    scene = testbed.scenes(index + 1)[index]
    generation = Generation(max_new_tokens=128, mitigation=method)
    given = {"detector": testbed.DETECTOR_DIR, "truth": scene.visible}
    return diagnose(adapter, scene.image(), question, generation=generation, **given), diagnose(
        adapter, scene.image(), question, **given
    )


def test_dropped_mentions_have_the_detectors_probability_as_their_reason(adapter):
    after, before = mitigated(adapter, Drop(), 1)
    data = edit_payload(after.edit, after.answer.text, after.truth)
    assert "".join(text for _, text in data["before"]) == before.answer.text
    assert "".join(text for _, text in data["after"]) == after.answer.text
    doubted = {mention.object: mention for mention in before.mentions if mention.warned}
    assert len(doubted) == 2
    assert {reason["object"] for reason in data["reasons"]} == doubted.keys()
    for reason in data["reasons"]:
        mention = doubted[reason["object"]]
        assert reason["probability"] == pytest.approx(mention.verdict.probability, abs=1e-4)
        assert reason["threshold"] == pytest.approx(before.threshold, abs=1e-6)
        assert (reason["yes"], reason["label"]) == (None, mention.label)
        assert reason["object"] not in after.answer.text
    assert json.loads(json.dumps(after.to_dict()))["edit"]["text"] == before.answer.text
    lines = "\n".join(describe_edit(after.edit, after.answer.text, after.truth))
    assert lines.startswith(f"before: {before.answer.text}")
    assert edit_payload(before.edit, before.answer.text) is None


@pytest.mark.parametrize(("index", "removed"), [pytest.param(1, False, marks=pytest.mark.slow), (2, True)])
def test_what_the_model_answered_when_it_was_asked(adapter, index, removed):
    after, before = mitigated(adapter, Ask(), index)
    data = edit_payload(after.edit, after.answer.text, after.truth)
    doubted = {mention.object for mention in before.mentions if mention.warned}
    [odds] = yes_odds(adapter, [before.image], [sorted(doubted)])
    assert {reason["object"] for reason in data["reasons"]} == doubted
    for reason in data["reasons"]:
        own = odds[reason["object"]]
        assert reason["yes"] == pytest.approx(1 / (1 + math.exp(-own)), abs=1e-3)
        assert (own < 0) == (reason["fate"] == "removed") == removed


@pytest.mark.slow
def test_the_candidates_of_a_choice_are_shown_with_their_scores(adapter):
    method = Rerank(candidates=2)
    after, _ = mitigated(adapter, method, 2)
    candidates = edit_payload(after.edit, after.answer.text)["candidates"]
    chosen = [item for item in candidates if item["chosen"]]
    assert [item["text"] for item in chosen] == [after.answer.text]
    assert chosen[0]["score"] == min(item["score"] for item in candidates)
    own = [mention.verdict.probability for mention in after.mentions]
    assert chosen[0]["score"] == pytest.approx(method.score(own), abs=1e-3)


def test_what_was_taken_back_while_it_was_written():
    taken = {"text": " and a dog", "start": 5, "token": 2, "object": "dog", "probability": 0.9}
    edit = {"taken_back": [taken], "passes": 9}
    data = edit_payload(edit, "A cat and a couch.", ("cat", "couch"))
    assert data["before"] == [["same", "A cat"], ["removed", " and a dog"], ["same", " and a couch."]]
    assert data["after"] == [["same", "A cat and a couch."]]
    assert data["reasons"] == [
        {"object": "dog", "probability": 0.9, "yes": None, "label": 1, "threshold": None,
         "fate": "taken back while it was written"}
    ]  # fmt: skip
    assert list(describe_edit(edit, "A cat and a couch.")) == ["  dog: taken back while it was written, 90\xa0%"]


def test_a_yes_or_no_is_not_edited(adapter):
    after, before = mitigated(adapter, Drop(threshold=0.0), 1, "Is there a knife in the image?")
    assert (after.answer.text, after.edit) == (before.answer.text, {})
