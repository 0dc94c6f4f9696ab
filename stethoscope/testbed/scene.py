"""Scenes: what is in a picture, where, and how to draw it with an exact id mask.

A scene is plain data; the picture is rendered from it on demand and always comes out the same. "Visible" means that
the object owns pixels in the mask: objects that would be hidden to less than :data:`MIN_PIXELS` are not drawn at all,
so the ground truth has no grey zone.
"""

from __future__ import annotations

import dataclasses
import math
import random
from functools import lru_cache

import numpy as np
from PIL import Image, ImageFilter

from stethoscope.testbed.drawing import SIZE, background
from stethoscope.testbed.sprites import palette, sprite
from stethoscope.testbed.vocabulary import ALIKE, BIG, CATEGORIES, INDEX, PLACES, SMALL, boost, partners

MODES = ("prior", "counter", "collage")
MIN_PIXELS = 45
MAX_OVERLAP = 0.22
_COUNTS = {
    "prior": ((2, 3, 4, 5, 6), (0.1, 0.26, 0.32, 0.2, 0.12)),
    "counter": ((2, 3, 4, 5), (0.25, 0.35, 0.25, 0.15)),
}
_HAZES = ((0.0, 0.0), (0.0, 0.4), (0.4, 0.72))
"""Solid, light and faint objects in equal parts: the faint ones are the weak evidence that priors can overrule."""
DOUBTFUL = 0.3
"""Share of objects that could be taken for something else."""
_DOUBTS = (0.3, 0.49)
_FOREIGN = {"prior": 0.06, "counter": 0.45}


@dataclasses.dataclass(frozen=True)
class SceneObject:
    """One annotated object.

    Attributes:
        category: COCO category name.
        colour: Name of its main colour (not every colour has a spoken name).
        x: Left edge of its square, in pixels; may lie slightly outside the picture.
        y: Upper edge of its square, in pixels.
        size: Side of its square, in pixels.
        depth: Drawing order, 0 (back) to 1 (front).
        haze: Share of the background that shines through, 0 (solid) to 1.
        seed: Decides the details of the drawing.
        visible: Whether it owns pixels in the picture. False is annotation noise: written down, never drawn.
        alike: What it could be taken for: one of :data:`stethoscope.testbed.vocabulary.ALIKE`, which shines through
            its drawing; empty for most.
        doubt: Share of ``alike`` in what is seen, from 0 to less than 0.5: the object itself is always more of it.
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
        id: Stable and unique name, such as ``"counter-000017"``.
        place: One of :data:`stethoscope.testbed.vocabulary.PLACES`.
        objects: All annotated objects, at most one per category.
        seed: Decides the backdrop, the blur and the noise.
        noise: Standard deviation of the pixel noise, in grey levels.
        mode: How it was sampled: ``prior``, ``counter`` or ``collage``.
    """

    id: str
    place: str
    objects: tuple[SceneObject, ...]
    seed: int
    noise: float
    mode: str

    @property
    def visible(self) -> tuple[str, ...]:
        """Categories that truly are in the picture."""
        return tuple(o.category for o in self.objects if o.visible)

    @property
    def annotated(self) -> tuple[str, ...]:
        """Categories that the (prior-driven) annotator wrote down."""
        return tuple(o.category for o in self.objects)

    def image(self) -> Image.Image:
        """Render the picture: RGB, 96 x 96 pixels, always the same."""
        return Image.frombytes("RGB", (SIZE, SIZE), _pixels(self))

    def mask(self) -> np.ndarray:
        """Which object owns each pixel: uint8, shape (96, 96); 0 is background, 1 + index into CATEGORIES an object."""
        ids = Image.new("L", (SIZE, SIZE), 0)
        for item in self._drawn():
            solid = _stamp(item, item.category).getchannel("A").point([255 * (level > 110) for level in range(256)])
            ids.paste(1 + INDEX[item.category], (int(item.x), int(item.y)), solid)
        return np.asarray(ids)

    def _drawn(self) -> list[SceneObject]:
        return sorted((o for o in self.objects if o.visible), key=lambda o: o.depth)


@lru_cache(maxsize=1024)  # POPE asks 18 questions about a picture, far apart
def _pixels(scene: Scene) -> bytes:
    """Of a rendered scene, row by row."""
    rng = random.Random(scene.seed)
    canvas = background(scene.place, rng)
    for item in scene._drawn():
        _paint(canvas, item, item.category, (1 - item.haze) * (1 - item.doubt))
        if item.alike:
            _paint(canvas, item, item.alike, (1 - item.haze) * item.doubt)
    if rng.random() < 0.3:
        canvas = canvas.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.8)))
    pixels = np.asarray(canvas, np.float32) * rng.uniform(0.82, 1.12)
    pixels += np.random.default_rng(scene.seed).standard_normal(pixels.shape, np.float32) * scene.noise
    return pixels.clip(0, 255).astype(np.uint8).tobytes()


def scene_at(index: int, mode: str, seed: int, unseen_rate: float = 0.0, name: str | None = None) -> Scene:
    """Scene number ``index`` of a stream; it depends on nothing but the arguments (``name`` only begins its id)."""
    rng = random.Random(f"stethoscope/{seed}/{mode}/{index}")
    return sample_scene(rng, mode, id=f"{name or mode}-{index:06d}", unseen_rate=unseen_rate)


def sample_scene(rng: random.Random, mode: str = "counter", *, id: str = "", unseen_rate: float = 0.0) -> Scene:
    """Draw one scene.

    Args:
        rng: Source of all randomness.
        mode: ``prior`` follows the co-occurrence priors; ``counter`` breaks them (an anchor is there, all its
            partners are missing, strangers are mixed in); ``collage`` has none (7 to 11 objects out of all categories).
        id: Name of the scene.
        unseen_rate: Annotation noise: chance that an annotated object is not drawn, doubled if another object predicts
            it. This is what teaches a model to speak of things it does not see.

    Raises:
        ValueError: If ``mode`` is unknown.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    while True:
        place = rng.choice(list(PLACES))
        placed: list[SceneObject] = []
        for category in sample_categories(rng, place, mode):
            placed.append(_place(rng, category, placed))
        if unseen_rate:
            placed = _forget(rng, place, placed, unseen_rate)
        scene = Scene(id, place, tuple(placed), rng.getrandbits(30), rng.uniform(2, 13), mode)
        scene = _hide_slivers(scene)
        if scene.visible:
            return scene


def sample_categories(rng: random.Random, place: str, mode: str) -> list[str]:
    """Draw the categories of a scene, one after the other: place weight times the boosts of those already there."""
    if mode == "collage":
        return rng.sample(CATEGORIES, rng.randint(7, 11))
    weights, chosen, banned = PLACES[place], [], ()
    if mode == "counter":
        anchors = [name for name in weights if partners(name)]
        chosen = rng.choices(anchors, [weights[name] for name in anchors])
        banned = partners(chosen[0])
    count = rng.choices(*_COUNTS[mode])[0]
    while len(chosen) < count:
        pool = [name for name in weights if name not in chosen and name not in banned]
        if rng.random() < _FOREIGN[mode] or not pool:
            pool = [name for name in CATEGORIES if name not in chosen and name not in banned]
            chosen.append(rng.choice(pool))
        else:
            scores = [weights[name] * math.prod(boost(name, other) for other in chosen) for name in pool]
            chosen.append(rng.choices(pool, scores)[0])
    rng.shuffle(chosen)
    return chosen


def _place(rng: random.Random, category: str, others: list[SceneObject]) -> SceneObject:
    """Find a spot that hides little of the others: the best of a few tries."""
    low, high = (31, 49) if category in BIG else (21, 32) if category in SMALL else (26, 40)
    best, least = None, math.inf
    for _ in range(16):
        size = rng.uniform(low, high)
        spot = (rng.uniform(-0.08 * size, SIZE - 0.92 * size), rng.uniform(-0.04 * size, SIZE - 0.94 * size), size)
        worst = max((_overlap(spot, (o.x, o.y, o.size)) for o in others), default=0.0)
        if worst < least:
            best, least = spot, worst
        if worst < MAX_OVERLAP:
            break
    haze = rng.uniform(*rng.choice(_HAZES))
    colour = rng.choice(palette(category))
    item = SceneObject(category, colour, *best, depth=rng.random(), haze=haze, seed=rng.getrandbits(30))
    if category in ALIKE and rng.random() < DOUBTFUL:
        item = dataclasses.replace(item, alike=rng.choice(ALIKE[category]), doubt=rng.uniform(*_DOUBTS))
    return item


def _overlap(one: tuple[float, float, float], other: tuple[float, float, float]) -> float:
    """Intersection of two squares (x, y, side) as a share of the smaller one."""
    width = min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0])
    height = min(one[1] + one[2], other[1] + other[2]) - max(one[1], other[1])
    return max(width, 0) * max(height, 0) / min(one[2], other[2]) ** 2


def _forget(rng: random.Random, place: str, items: list[SceneObject], rate: float) -> list[SceneObject]:
    """Leave some predictable objects undrawn but annotated; at least one stays."""
    kept = list(items)
    for i, item in enumerate(items):
        if item.category not in PLACES[place]:
            continue
        predicted = any(boost(item.category, o.category) > 1 for o in items if o is not item)
        if rng.random() < rate * (2.0 if predicted else 0.6) and sum(o.visible for o in kept) > 1:
            kept[i] = dataclasses.replace(item, visible=False)
    return kept


def _hide_slivers(scene: Scene) -> Scene:
    """Undraw objects of which others leave less than MIN_PIXELS (this can only uncover the rest)."""
    counts = np.bincount(scene.mask().ravel(), minlength=len(CATEGORIES) + 1)
    objects = tuple(
        dataclasses.replace(o, visible=o.visible and bool(counts[1 + INDEX[o.category]] >= MIN_PIXELS))
        for o in scene.objects
    )
    return dataclasses.replace(scene, objects=objects)


def _paint(canvas: Image.Image, item: SceneObject, category: str, opacity: float) -> None:
    """Draw an object, or what it is taken for."""
    stamp = _stamp(item, category)
    alpha = stamp.getchannel("A").point([round(level * opacity) for level in range(256)])
    canvas.paste(stamp, (int(item.x), int(item.y)), alpha)


def _stamp(item: SceneObject, category: str) -> Image.Image:
    side = max(4, int(item.size))
    colours = palette(category)
    colour = item.colour if item.colour in colours else colours[0]
    return sprite(category, colour, item.seed).resize((side, side), Image.Resampling.BILINEAR)
