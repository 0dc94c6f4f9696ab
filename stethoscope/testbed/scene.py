"""Sample scenes and render them, with an exact id mask.

A scene is plain data; its picture is rendered on demand and is always the same. "Visible" means that the object owns
pixels in the mask: objects of which less than ``MIN_PIXELS`` would be seen are not drawn at all, so the ground
truth has no doubtful cases.
"""

from __future__ import annotations

import dataclasses
import math
import random
from functools import cached_property, lru_cache

import numpy as np
from PIL import Image, ImageFilter

from stethoscope.testbed.drawing import SIZE, background
from stethoscope.testbed.sprites import SLENDER, palette, silhouette, sprites
from stethoscope.testbed.vocabulary import ALIKE, BIG, CATEGORIES, INDEX, SETTINGS, SMALL, boost, partners

MODES = ("prior", "counter", "collage")
MIN_PIXELS = 45
MAX_OVERLAP = 0.22
COVERED, COVERED_BY_SLENDER = 0.28, 0.15
"""Share of its square that an object covers at least, with a margin."""
SOLID = 110
"""Alpha above which a pixel belongs to its object in the mask."""
_COUNTS = {
    "prior": ((2, 3, 4, 5, 6), (0.1, 0.26, 0.32, 0.2, 0.12)),
    "counter": ((2, 3, 4, 5), (0.25, 0.35, 0.25, 0.15)),
}
_HAZES = ((0.0, 0.0), (0.0, 0.4), (0.4, 0.72))
"""Ranges of haze for solid, light and faint objects, in equal shares; priors can overrule faint evidence."""
DOUBTFUL = 0.3
"""Share of objects that look partly like another category."""
_DOUBTS = (0.3, 0.49)
_FOREIGN = {"prior": 0.06, "counter": 0.45}


@dataclasses.dataclass(frozen=True)
class SceneObject:
    """One annotated object.

    Attributes:
        category: COCO category name.
        colour: name of its main colour (not every colour has a spoken name).
        x: left edge of its square, in pixels; may lie slightly outside the picture.
        y: upper edge of its square, in pixels.
        size: side of its square, in pixels.
        depth: drawing order, 0 (back) to 1 (front).
        haze: share of the background that shines through, 0 (solid) to 1.
        seed: decides the details of the drawing.
        visible: whether it owns pixels in the picture. False is annotation noise: annotated, never drawn.
        alike: category of ``vocabulary.ALIKE`` that is blended into its drawing; empty for
            most.
        doubt: opacity of ``alike``, from 0 to less than 0.5: the object itself is always more opaque.
    """

    category: str
    colour: str
    x: float
    y: float
    size: float
    depth: float
    haze: float
    seed: int
    visible: bool = True
    alike: str = ""
    doubt: float = 0.0


@dataclasses.dataclass(frozen=True)
class Scene:
    """One picture of the world with its exact ground truth.

    Attributes:
        id: stable and unique name, such as ``"counter-000017"``.
        setting: one of ``vocabulary.SETTINGS``.
        objects: all annotated objects, at most one per category.
        seed: decides the backdrop, the blur and the noise.
        noise: standard deviation of the pixel noise, in grey levels.
        mode: how it was sampled: ``prior``, ``counter`` or ``collage``.
    """

    id: str
    setting: str
    objects: tuple[SceneObject, ...]
    seed: int
    noise: float
    mode: str

    @cached_property
    def visible(self) -> tuple[str, ...]:
        """Categories that are in the picture."""
        return tuple(o.category for o in self.objects if o.visible)

    @property
    def annotated(self) -> tuple[str, ...]:
        """Categories that the (prior-driven) annotator lists."""
        return tuple(o.category for o in self.objects)

    def image(self) -> Image.Image:
        """Render the picture: RGB, 96 x 96 pixels, always the same."""
        return Image.frombytes("RGB", (SIZE, SIZE), _pixels(self))

    def mask(self) -> np.ndarray:
        """Map pixels to objects: uint8, shape (96, 96); 0 is background, 1 + index into CATEGORIES an object."""
        ids = np.zeros((SIZE, SIZE), np.uint8)
        for item in self._drawn():
            solid = np.asarray(_fit(silhouette(item.category, item.colour, item.seed), item)) > SOLID
            x, y = int(item.x), int(item.y)
            # objects may stand out of the picture
            covered = ids[max(y, 0) : y + len(solid), max(x, 0) : x + len(solid)]
            covered[solid[max(-y, 0) :, max(-x, 0) :][: len(covered), : covered.shape[1]]] = 1 + INDEX[item.category]
        return ids

    def without(self, category: str, id: str) -> Scene:
        """Take an object out of the picture; everything else, noise included, stays as it is.

        Args:
            category: of the object.
            id: name of the new scene.

        Raises:
            ValueError: no such object is visible.
        """
        if category not in self.visible:
            raise ValueError(f"scene {self.id} shows no {category!r}, only {', '.join(self.visible)}")
        return dataclasses.replace(self, id=id, objects=tuple(o for o in self.objects if o.category != category))

    def _drawn(self) -> list[SceneObject]:
        return sorted((o for o in self.objects if o.visible), key=lambda o: o.depth)


@lru_cache(maxsize=1024)  # POPE asks 18 questions about a picture, far apart
def _pixels(scene: Scene) -> bytes:
    """Render a scene to RGB bytes, row by row."""
    rng = random.Random(scene.seed)
    canvas = background(scene.setting, rng)
    layers: list[tuple[SceneObject, str, float]] = []  # an object, the category that it is drawn as, and its opacity
    for item in scene._drawn():
        layers.append((item, item.category, (1 - item.haze) * (1 - item.doubt)))
        if item.alike:
            layers.append((item, item.alike, (1 - item.haze) * item.doubt))
    drawings = sprites([(category, item.colour, item.seed) for item, category, _ in layers])
    for (item, _, opacity), drawing in zip(layers, drawings, strict=True):
        stamp = _fit(drawing, item)
        alpha = stamp.getchannel("A").point([round(level * opacity) for level in range(256)])
        canvas.paste(stamp, (int(item.x), int(item.y)), alpha)
    if rng.random() < 0.3:
        canvas = canvas.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.8)))
    pixels = np.asarray(canvas, np.float32) * rng.uniform(0.82, 1.12)
    pixels += np.random.default_rng(scene.seed).standard_normal(pixels.shape, np.float32) * scene.noise
    return pixels.clip(0, 255).astype(np.uint8).tobytes()


@lru_cache(maxsize=2048)  # POPE and CHAIR ask about the same scenes
def scene_at(index: int, mode: str, seed: int, unseen_rate: float = 0.0, name: str | None = None) -> Scene:
    """Sample a scene by its index in a stream; it depends only on the arguments (``name`` only starts its id)."""
    rng = random.Random(f"stethoscope/{seed}/{mode}/{index}")
    return sample_scene(rng, mode, id=f"{name or mode}-{index:06d}", unseen_rate=unseen_rate)


def sample_scene(rng: random.Random, mode: str = "counter", *, id: str = "", unseen_rate: float = 0.0) -> Scene:
    """Draw one scene.

    Args:
        rng: source of all randomness.
        mode: ``prior`` follows the co-occurrence priors; ``counter`` breaks them (an anchor is present, all its
            partners are missing, unrelated objects are mixed in); ``collage`` has none (7 to 11 objects of any
            category).
        id: name of the scene.
        unseen_rate: annotation noise: probability that an annotated object is not drawn, doubled if another object
            predicts it. This teaches a model to name objects that it does not see.

    Raises:
        ValueError: ``mode`` is unknown.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    while True:
        setting = rng.choice(list(SETTINGS))
        objects: list[SceneObject] = []
        for category in sample_categories(rng, setting, mode):
            objects.append(_place_object(rng, category, objects))
        if unseen_rate:
            objects = _hide_predictable(rng, setting, objects, unseen_rate)
        scene = Scene(id, setting, tuple(objects), rng.getrandbits(30), rng.uniform(2, 13), mode)
        scene = _hide_slivers(scene)
        if scene.visible:
            return scene


def sample_categories(rng: random.Random, setting: str, mode: str) -> list[str]:
    """Draw the categories of a scene one by one, with the setting's weight times the boosts of those already drawn."""
    if mode == "collage":
        return rng.sample(CATEGORIES, rng.randint(7, 11))
    weights = SETTINGS[setting]
    chosen: list[str] = []
    banned: tuple[str, ...] = ()
    if mode == "counter":
        anchors = [name for name in weights if partners(name)]
        chosen = rng.choices(anchors, [weights[name] for name in anchors])
        banned = partners(chosen[0])
    count = rng.choices(*_COUNTS[mode])[0]
    boosts = {name: math.prod(boost(name, other) for other in chosen) for name in weights}
    while len(chosen) < count:
        pool = [name for name in weights if name not in chosen and name not in banned]
        if rng.random() < _FOREIGN[mode] or not pool:
            pool = [name for name in CATEGORIES if name not in chosen and name not in banned]
            drawn = rng.choice(pool)
        else:
            drawn = rng.choices(pool, [weights[name] * boosts[name] for name in pool])[0]
        chosen.append(drawn)
        boosts = {name: value * boost(name, drawn) for name, value in boosts.items()}
    rng.shuffle(chosen)
    return chosen


def _place_object(rng: random.Random, category: str, others: list[SceneObject]) -> SceneObject:
    """Create an object at a position that hides little of the others: the best of a few tries."""
    low, high = (31, 49) if category in BIG else (21, 32) if category in SMALL else (26, 40)
    best, least = (0.0, 0.0, 0.0), math.inf
    for _ in range(16):
        size = rng.uniform(low, high)
        square = (rng.uniform(-0.08 * size, SIZE - 0.92 * size), rng.uniform(-0.04 * size, SIZE - 0.94 * size), size)
        worst = max((_overlap(square, (o.x, o.y, o.size)) for o in others), default=0.0)
        if worst < least:
            best, least = square, worst
        if worst < MAX_OVERLAP:
            break
    haze = rng.uniform(*rng.choice(_HAZES))
    colour = rng.choice(palette(category))
    x, y, size = best
    item = SceneObject(category, colour, x, y, size, rng.random(), haze, rng.getrandbits(30))
    if category in ALIKE and rng.random() < DOUBTFUL:
        item = dataclasses.replace(item, alike=rng.choice(ALIKE[category]), doubt=rng.uniform(*_DOUBTS))
    return item


def _overlap(first: tuple[float, float, float], second: tuple[float, float, float]) -> float:
    """Compute the intersection of two squares (x, y, side) as a share of the smaller one."""
    width = min(first[0] + first[2], second[0] + second[2]) - max(first[0], second[0])
    height = min(first[1] + first[2], second[1] + second[2]) - max(first[1], second[1])
    return max(width, 0) * max(height, 0) / min(first[2], second[2]) ** 2


def _hide_predictable(rng: random.Random, setting: str, items: list[SceneObject], rate: float) -> list[SceneObject]:
    """Make some predictable objects invisible but annotated; at least one stays visible."""
    result = list(items)
    for i, item in enumerate(items):
        if item.category not in SETTINGS[setting]:
            continue
        predicted = any(boost(item.category, o.category) > 1 for o in items if o is not item)
        if rng.random() < rate * (2.0 if predicted else 0.6) and sum(o.visible for o in result) > 1:
            result[i] = dataclasses.replace(item, visible=False)
    return result


def _hide_slivers(scene: Scene) -> Scene:
    """Make objects invisible of which less than MIN_PIXELS are seen (others can only become more visible)."""
    drawn = scene._drawn()
    if all(_pixels_left(item, drawn[i + 1 :]) >= MIN_PIXELS for i, item in enumerate(drawn)):
        return scene
    counts = np.bincount(scene.mask().ravel(), minlength=len(CATEGORIES) + 1)
    objects = tuple(
        dataclasses.replace(o, visible=o.visible and bool(counts[1 + INDEX[o.category]] >= MIN_PIXELS))
        for o in scene.objects
    )
    return dataclasses.replace(scene, objects=objects)


def _pixels_left(item: SceneObject, in_front: list[SceneObject]) -> float:
    """Compute how many pixels of an object are seen at least: drawing the masks takes most of a scene's time."""
    side = int(item.size)
    seen = max(min(int(item.x) + side, SIZE) - max(int(item.x), 0), 0)
    seen *= max(min(int(item.y) + side, SIZE) - max(int(item.y), 0), 0)
    pixels = (COVERED_BY_SLENDER if item.category in SLENDER else COVERED) * side**2 - (side**2 - seen)
    for other in in_front:
        width, height = (
            min(int(low) + side, int(start) + int(other.size)) - max(int(low), int(start))
            for low, start in ((item.x, other.x), (item.y, other.y))
        )
        pixels -= max(width, 0) * max(height, 0)
    return pixels


def _fit(drawing: Image.Image, item: SceneObject) -> Image.Image:
    """Scale a drawing to the square of its object."""
    side = max(4, int(item.size))
    return drawing.resize((side, side), Image.Resampling.BILINEAR)
