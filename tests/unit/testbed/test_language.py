"""What is said: parseable object words, true references, balanced questions."""

from __future__ import annotations

import random
import re

import pytest

from stethoscope import testbed
from stethoscope.testbed import language
from stethoscope.testbed.scene import scene_at
from stethoscope.testbed.vocabulary import CATEGORIES, NEVER_DRAWN

NAMES = re.compile(rf"\b({'|'.join(sorted(CATEGORIES, key=len, reverse=True))})s?\b", re.IGNORECASE)

# Words of CHAIR's synonym vocabulary that templates could slip in without meaning an object of the world.
TRAPS = set(
    re.findall(
        r"\w+",
        """people man men woman women boy girl child children kid player driver worker adult male female guy student
        camper bike van cab taxi truck train plane jet ship vessel liner ferry motorcycle scooter light signal hydrant
        meter glass container seat stool sofa table desk bed toilet sink oven stove phone telephone computer notebook
        television monitor ball bow tie bag purse orange apple banana sandwich sub donut cake carrot vase scissors bear
        cow horse sheep duck goose seagull kitten puppy houseplant racket ski microwave toaster fridge refrigerator""",
    )
)


@pytest.fixture(scope="module")
def noisy() -> list[testbed.Scene]:
    return [scene_at(i, "prior", 3, unseen_rate=0.2) for i in range(80)]


def named(text: str) -> set[str]:
    return {match.group(1).lower() for match in NAMES.finditer(text)}


def test_detailed_captions_name_exactly_the_annotated_objects(noisy: list[testbed.Scene]) -> None:
    for i, scene in enumerate(noisy):
        assert named(language.detailed_caption(scene, random.Random(i))) == set(scene.annotated)
        assert named(language.detailed_caption(scene, random.Random(i), only_visible=True)) == set(scene.visible)


def test_references_mention_only_visible_objects(noisy: list[testbed.Scene]) -> None:
    for scene in noisy:
        references = language.reference_captions(scene)
        assert len(references) == 5
        assert all(named(text) and named(text) <= set(scene.visible) for text in references)


def test_templates_hold_no_accidental_object_words(noisy: list[testbed.Scene]) -> None:
    for i, scene in enumerate(noisy):
        rng = random.Random(i)
        texts = [
            language.detailed_caption(scene, rng),
            language.brief_caption(scene, rng),
            *language.reference_captions(scene),
        ]
        words = set(re.findall(r"[a-z]+", NAMES.sub(" ", " ".join(texts)).lower()))
        assert not words & TRAPS
        assert not any(name in " ".join(texts) for name in NEVER_DRAWN)


def test_left_and_right_change_places_in_a_mirror() -> None:
    scene = next(s for s in testbed.scenes(200) if all(o.x + o.size / 2 < 36 for o in s.objects))
    straight = " ".join(language.detailed_caption(scene, random.Random(i)) for i in range(20))
    mirrored = " ".join(language.detailed_caption(scene, random.Random(i), mirrored=True) for i in range(20))
    assert ("left side" in straight, "right side" in straight) == (True, False)
    assert ("left side" in mirrored, "right side" in mirrored) == (False, True)


def test_training_questions_are_half_yes_and_true_to_the_annotation(noisy: list[testbed.Scene]) -> None:
    rng = random.Random(0)
    asked = [(scene, q) for scene in noisy for q in language.yes_no_questions(scene, rng, 10)]
    assert all((q.answer == "Yes") == (q.object in scene.annotated) for scene, q in asked)
    assert 0.45 < sum(q.answer == "Yes" for _, q in asked) / len(asked) < 0.55
    assert any(q.object in NEVER_DRAWN for _, q in asked)


def test_question_reads_as_in_pope() -> None:
    assert language.pope_question("car") == "Is there a car in the image?"
    question = language.Question("Is there an", "umbrella", " in the image?", "Yes")
    assert question.text == language.pope_question("umbrella")


def test_chair_reads_the_object_words(noisy: list[testbed.Scene]) -> None:
    chair = pytest.importorskip("stethoscope.tasks.chair")
    for i, scene in enumerate(noisy):
        read = {mention.name for mention in chair.mentions(language.detailed_caption(scene, random.Random(i)))}
        assert read == set(scene.annotated)
