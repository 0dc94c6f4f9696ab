"""Write prompts, captions, reference captions and yes/no questions about a scene.

Every phrase about setting, position, colour or size is read off the scene, so a caption of the visible objects is true.
Templates avoid the COCO synonym vocabulary ("table", "people", "orange", "seat", ...): only real mentions name
objects.
"""

from __future__ import annotations

import dataclasses
import random

from stethoscope.testbed.drawing import SIZE, SPOKEN
from stethoscope.testbed.scene import Scene, SceneObject
from stethoscope.testbed.sprites import palette
from stethoscope.testbed.vocabulary import BIG, CATEGORIES, NEVER_DRAWN, SETTINGS, SMALL, partners, with_article

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

_SETTINGS = {
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
"""Distance of centres, in pixels, below which two objects are "next to" each other."""


@dataclasses.dataclass(frozen=True)
class Question:
    """A yes/no question about one object.

    Attributes:
        before: words before the object, with its article.
        object: object name.
        after: rest of the question.
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
    """Write POPE's question about an object.

    >>> pope_question("umbrella")
    'Is there an umbrella in the image?'
    """
    return f"Is there {with_article(name)} in the image?"


def yes_no_questions(scene: Scene, rng: random.Random, count: int) -> list[Question]:
    """Write training questions, about half with the answer "Yes".

    Negatives are partners of annotated objects (20 %), other categories of the setting (25 %), nouns that are never
    drawn (12 %) or any other category.
    """
    present, questions = set(scene.annotated), []
    tempting = [p for name in scene.annotated for p in partners(name) if p not in present]
    local = [name for name in SETTINGS[scene.setting] if name not in present]
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
    """Describe a scene in detail, as large models do: the setting, the salient objects first, a mood at the end.

    Args:
        scene: to describe, with all annotated objects, drawn or not.
        rng: source of all randomness.
        only_visible: leave out annotated objects that are not in the picture.
        mirrored: the picture is shown mirrored, so left and right are swapped.
    """
    mentioned: list[SceneObject] = []
    rest = _by_salience(scene, rng, only_visible)
    opening = rest[: 1 if len(rest) == 1 or rng.random() < 0.25 else 2]
    sentences = [_opening(scene, rng, opening)]
    mentioned += opening
    if rng.random() < 0.6:
        sentences.append(_remark(rng, rng.choice(opening), mirrored))
    rest = rest[len(opening) :]
    while rest:
        batch = rest[: 2 if len(rest) > 1 and rng.random() < 0.3 else 1]
        sentences.append(_addition(rng, batch, mentioned, mirrored))
        mentioned += batch
        rest = rest[len(batch) :]
    if rng.random() < 0.75:
        sentences.append(rng.choice(_MOOD[scene.setting] if rng.random() < 0.75 else _ANY_MOOD))
    return " ".join(sentences)


def brief_caption(scene: Scene, rng: random.Random, *, only_visible: bool = False) -> str:
    """Write one sentence about the one or two most salient objects."""
    return _opening(scene, rng, _by_salience(scene, rng, only_visible)[: rng.choice((1, 2, 2))])


def reference_captions(scene: Scene, count: int = 5) -> list[str]:
    """Write captions in the style of COCO's annotators: short, and only about visible objects."""
    rng, captions = random.Random(f"references/{scene.seed}"), list[str]()
    setting, preposition = _SETTINGS[scene.setting]
    for _ in range(count):
        items = _by_salience(scene, rng, only_visible=True)[: rng.choice((1, 2, 2, 3))]
        things = _join([_phrase(item, rng) for item in items])
        template = rng.choice(
            (
                "{setting} with {things}.",
                "{things} {preposition} {setting}.",
                "There is {things} {preposition} {setting}.",
            )
        )
        captions.append(_capitalise(template.format(setting=setting, things=things, preposition=preposition)))
    return captions


def _by_salience(scene: Scene, rng: random.Random, only_visible: bool) -> list[SceneObject]:
    """Sort objects, roughly, by size and opacity; ones that are not drawn count as a little smaller."""

    def salience(item: SceneObject) -> float:
        return item.size * (1 - 0.6 * item.haze) * (1.0 if item.visible else 0.9) + rng.uniform(-20, 20)

    return sorted((o for o in scene.objects if o.visible or not only_visible), key=salience, reverse=True)


def _opening(scene: Scene, rng: random.Random, items: list[SceneObject]) -> str:
    setting, preposition = _SETTINGS[scene.setting]
    things = _join([_phrase(o, rng) for o in items])
    return rng.choice(
        (
            f"The image shows {setting} with {things}.",
            f"The image features {things} {preposition} {setting}.",
            f"The image depicts {setting} with {things}.",
            f"In this image, there is {things} {preposition} {setting}.",
            f"The scene takes place {preposition} {setting}, where {things} can be seen.",
        )
    )


def _remark(rng: random.Random, item: SceneObject, mirrored: bool) -> str:
    position = _position(rng, item, mirrored)
    return f"The {item.category} is {rng.choice(('located', 'positioned', 'placed', 'visible'))} {position}."


def _addition(rng: random.Random, items: list[SceneObject], mentioned: list[SceneObject], mirrored: bool) -> str:
    things = _join([_phrase(o, rng) for o in items])
    if len(items) > 1:
        return rng.choice(
            (
                f"There is also {things} in the scene.",
                f"In addition, {things} can be seen.",
                f"{_capitalise(things)} are also visible.",
            )
        )
    position = _position(rng, items[0], mirrored)
    if rng.random() < 0.4:
        position = _relation(items[0], mentioned, mirrored)
    return rng.choice(
        (
            f"There is {things} {position}.",
            f"There is also {things} {position}.",
            f"{_capitalise(things)} can be seen {position}.",
            f"Additionally, {things} is visible {position}.",
            f"{_capitalise(position)}, there is {things}.",
        )
    )


def _phrase(item: SceneObject, rng: random.Random) -> str:
    """Write a noun phrase with article, sometimes with the object's true colour or size."""
    words = [item.category]
    if rng.random() < 0.35 and _has_spoken_colour(item):
        words.insert(0, item.colour)
    elif rng.random() < 0.3 and item.size > 43 and item.category in BIG:
        words.insert(0, "large")
    elif rng.random() < 0.3 and item.size < 24 and item.category in SMALL:
        words.insert(0, "small")
    return with_article(" ".join(words))


def _has_spoken_colour(item: SceneObject) -> bool:
    """Return whether a caption may name the colour: it distinguishes objects, and is not that of clothes."""
    return item.colour in SPOKEN and len(palette(item.category)) > 1 and item.category != "person"


def _position(rng: random.Random, item: SceneObject, mirrored: bool) -> str:
    """Describe truthfully where an object is in the picture."""
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


def _relation(item: SceneObject, mentioned: list[SceneObject], mirrored: bool) -> str:
    """Describe truthfully where an object is relative to the nearest mentioned one."""
    x, y = _centre(item, mirrored)
    offsets = [(o, x - _centre(o, mirrored)[0], y - _centre(o, mirrored)[1]) for o in mentioned]
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


def _capitalise(text: str) -> str:
    return text[0].upper() + text[1:]
