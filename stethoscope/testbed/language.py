"""What is said about a scene: prompts, captions in the manner of large models, reference captions, yes/no questions.

Every phrase about place, position, colour or size is read off the scene, so that a caption of the visible objects is
true. Template words avoid the COCO synonym vocabulary ("table", "people", "orange", "seat", ...): the only object
words are meant ones.
"""

from __future__ import annotations

import dataclasses
import random

from stethoscope.testbed.drawing import SIZE, SPOKEN
from stethoscope.testbed.scene import Scene, SceneObject
from stethoscope.testbed.sprites import palette
from stethoscope.testbed.vocabulary import BIG, CATEGORIES, NEVER_DRAWN, PLACES, SMALL, partners, with_article

TEMPLATE = "USER: <image>\n{question} ASSISTANT:"
"""Prompt template of LLaVA-1.5."""

ONE_WORD = "\nAnswer the question using a single word or phrase."

DETAIL_PROMPTS = (
    "Please describe this image in detail.",
    "Describe this image in detail.",
    "Please describe the image in detail.",
    "Describe the image in detail.",
    "Please help me describe the image in detail.",
    "Write a detailed description of the image.",
    "What can you see in this image?",
)
BRIEF_PROMPTS = (
    "Describe this image briefly.",
    "What is in the image?",
    "Provide a one-sentence caption for the provided image.",
    "Describe the image in one sentence.",
)
ASKING = (
    ("Is there", "in the image?"),
    ("Is there", "in this image?"),
    ("Can you see", "in the image?"),
    ("Does the image show", "?"),
)

_PLACE = {
    "street": ("a city street", "on"),
    "kitchen": ("a kitchen", "in"),
    "home office": ("a home office", "in"),
    "living room": ("a living room", "in"),
    "park": ("a park", "in"),
    "beach": ("a beach", "on"),
}
_MOOD = {
    "street": (
        "The scene suggests an ordinary day in the city.",
        "The road looks calm at this time of the day.",
    ),
    "kitchen": (
        "The room looks like a place where meals are prepared.",
        "The wooden surface gives the kitchen a warm look.",
    ),
    "home office": ("The room appears to be set up for work.", "It looks like a quiet place to work or study."),
    "living room": ("The room has a cozy and comfortable atmosphere.", "It looks like a pleasant place to relax."),
    "park": (
        "The green grass suggests a pleasant day outdoors.",
        "The scene conveys a relaxed afternoon in the open air.",
    ),
    "beach": ("The sand and the water create a relaxed mood.", "It appears to be a sunny day by the sea."),
}
_ANY_MOOD = ("Overall, the scene is calm and ordinary.", "The overall atmosphere is quiet and pleasant.")
_NEAR = 36.0
"""Two objects whose centres are closer than this many pixels stand "next to" each other."""


@dataclasses.dataclass(frozen=True)
class Question:
    """A yes/no question about one object.

    Attributes:
        before: Words before the object, with its article.
        object: Object name.
        after: Rest of the question.
        answer: "Yes" or "No".
    """

    before: str
    object: str
    after: str
    answer: str

    @property
    def text(self) -> str:
        return f"{self.before} {self.object}{self.after}"


def pope_question(name: str) -> str:
    """The question that POPE asks.

    >>> pope_question("umbrella")
    'Is there an umbrella in the image?'
    """
    return f"Is there {with_article(name)} in the image?"


def yes_no_questions(scene: Scene, rng: random.Random, count: int) -> list[Question]:
    """Training questions, about half of them "Yes".

    Negatives are partners of annotated objects (20 %), other inhabitants of the place (25 %), nouns that are never
    drawn (12 %) or any other category.
    """
    present, questions = set(scene.annotated), []
    tempting = [p for name in scene.annotated for p in partners(name) if p not in present]
    local = [name for name in PLACES[scene.place] if name not in present]
    anything = [name for name in CATEGORIES if name not in present]
    for _ in range(count):
        if rng.random() < 0.5:
            questions.append(_ask(rng, rng.choice(scene.annotated), "Yes"))
            continue
        pools, weights = (tempting, local, NEVER_DRAWN, anything), (0.2, 0.25, 0.12, 0.43)
        pool = rng.choices(pools, weights)[0] or anything
        questions.append(_ask(rng, rng.choice(pool), "No"))
    return questions


def _ask(rng: random.Random, name: str, answer: str) -> Question:
    before, after = ASKING[0] if rng.random() < 0.8 else rng.choice(ASKING[1:])
    suffix = ONE_WORD if rng.random() < 0.15 else ""
    article = with_article(name).split()[0]
    return Question(f"{before} {article}", name, (after if after == "?" else f" {after}") + suffix, answer)


def detailed_caption(scene: Scene, rng: random.Random, *, only_visible: bool = False, mirrored: bool = False) -> str:
    """Describe a scene at length, the way large models do: the place, the salient objects first, a mood at the end.

    Args:
        scene: What to describe; all annotated objects are told, drawn or not.
        rng: Chooses words and order.
        only_visible: Leave out annotated objects that are not in the picture.
        mirrored: The picture is shown mirrored, so left and right change places.
    """
    told: list[SceneObject] = []
    rest = _by_salience(scene, rng, only_visible)
    opening = rest[: 1 if len(rest) == 1 or rng.random() < 0.25 else 2]
    sentences = [_opening(scene, rng, opening)]
    told += opening
    if rng.random() < 0.6:
        sentences.append(_remark(rng, rng.choice(opening), mirrored))
    rest = rest[len(opening) :]
    while rest:
        now = rest[: 2 if len(rest) > 1 and rng.random() < 0.3 else 1]
        sentences.append(_addition(rng, now, told, mirrored))
        told += now
        rest = rest[len(now) :]
    if rng.random() < 0.75:
        sentences.append(rng.choice(_MOOD[scene.place] if rng.random() < 0.75 else _ANY_MOOD))
    return " ".join(sentences)


def brief_caption(scene: Scene, rng: random.Random, *, only_visible: bool = False) -> str:
    """One sentence about the one or two most salient objects."""
    return _opening(scene, rng, _by_salience(scene, rng, only_visible)[: rng.choice((1, 2, 2))])


def reference_captions(scene: Scene, count: int = 5) -> list[str]:
    """Captions in the manner of COCO's annotators: short, and only about visible objects."""
    rng, captions = random.Random(f"references/{scene.seed}"), []
    where, at = _PLACE[scene.place]
    for _ in range(count):
        things = _by_salience(scene, rng, only_visible=True)[: rng.choice((1, 2, 2, 3))]
        listed = _join([_phrase(o, rng) for o in things])
        shape = rng.choice(("{place} with {things}.", "{things} {at} {place}.", "There is {things} {at} {place}."))
        text = shape.format(place=where, things=listed, at=at)
        captions.append(text[0].upper() + text[1:])
    return captions


def _by_salience(scene: Scene, rng: random.Random, only_visible: bool) -> list[SceneObject]:
    """Big and solid objects first, very roughly; undrawn ones count as a little smaller than they would be."""

    def salience(item: SceneObject) -> float:
        return item.size * (1 - 0.6 * item.haze) * (1.0 if item.visible else 0.9) + rng.uniform(-20, 20)

    return sorted((o for o in scene.objects if o.visible or not only_visible), key=salience, reverse=True)


def _opening(scene: Scene, rng: random.Random, items: list[SceneObject]) -> str:
    where, at = _PLACE[scene.place]
    things = _join([_phrase(o, rng) for o in items])
    return rng.choice(
        (
            f"The image shows {where} with {things}.",
            f"The image features {things} {at} {where}.",
            f"The image depicts {where} with {things}.",
            f"In this image, there is {things} {at} {where}.",
            f"The scene takes place {at} {where}, where {things} can be seen.",
        )
    )


def _remark(rng: random.Random, item: SceneObject, mirrored: bool) -> str:
    where = _position(rng, item, mirrored)
    return f"The {item.category} is {rng.choice(('located', 'positioned', 'placed', 'visible'))} {where}."


def _addition(rng: random.Random, items: list[SceneObject], told: list[SceneObject], mirrored: bool) -> str:
    things = _join([_phrase(o, rng) for o in items])
    if len(items) > 1:
        return rng.choice(
            (
                f"There is also {things} in the scene.",
                f"In addition, {things} can be seen.",
                f"{_up(things)} are also visible.",
            )
        )
    where = _position(rng, items[0], mirrored)
    if rng.random() < 0.4:
        where = _relation(items[0], told, mirrored)
    return rng.choice(
        (
            f"There is {things} {where}.",
            f"There is also {things} {where}.",
            f"{_up(things)} can be seen {where}.",
            f"Additionally, {things} is visible {where}.",
            f"{_up(where)}, there is {things}.",
        )
    )


def _phrase(item: SceneObject, rng: random.Random) -> str:
    """Noun phrase with article, sometimes with a true colour or size."""
    words = [item.category]
    if rng.random() < 0.35 and _has_spoken_colour(item):
        words.insert(0, item.colour)
    elif rng.random() < 0.3 and item.size > 43 and item.category in BIG:
        words.insert(0, "large")
    elif rng.random() < 0.3 and item.size < 24 and item.category in SMALL:
        words.insert(0, "small")
    return with_article(" ".join(words))


def _has_spoken_colour(item: SceneObject) -> bool:
    """Things of one colour need not be told apart by it, and the colour of a person is that of the clothes."""
    return item.colour in SPOKEN and len(palette(item.category)) > 1 and item.category != "person"


def _position(rng: random.Random, item: SceneObject, mirrored: bool) -> str:
    """A true statement about where an object is in the picture."""
    x, y = _centre(item, mirrored)
    options = []
    if x < 0.38 * SIZE:
        options += ["on the left side of the image", "on the left side"]
    elif x > 0.62 * SIZE:
        options += ["on the right side of the image", "on the right side"]
    if y < 0.35 * SIZE:
        options += ["in the upper part of the image"]
    elif y > 0.65 * SIZE:
        options += ["in the lower part of the image"]
    if item.haze > 0.2:
        options += ["in the background"]
    elif item.size > 38 and y > 0.5 * SIZE:
        options += ["in the foreground"]
    return rng.choice(options or ["in the center of the image", "in the middle of the scene"])


def _relation(item: SceneObject, told: list[SceneObject], mirrored: bool) -> str:
    """A true statement about where an object is, seen from the nearest one already told."""
    x, y = _centre(item, mirrored)
    offsets = [(o, x - _centre(o, mirrored)[0], y - _centre(o, mirrored)[1]) for o in told]
    other, right, down = min(offsets, key=lambda t: t[1] ** 2 + t[2] ** 2)
    if right**2 + down**2 < _NEAR**2:
        return f"next to the {other.category}"
    if abs(right) > abs(down):
        return f"to the {'right' if right > 0 else 'left'} of the {other.category}"
    return f"{'below' if down > 0 else 'above'} the {other.category}"


def _centre(item: SceneObject, mirrored: bool) -> tuple[float, float]:
    x, y = item.x + item.size / 2, item.y + item.size / 2
    return (SIZE - x if mirrored else x), y


def _join(phrases: list[str]) -> str:
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def _up(text: str) -> str:
    return text[0].upper() + text[1:]
