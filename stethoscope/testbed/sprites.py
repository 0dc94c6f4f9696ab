"""Draw the objects with a pen: one short function per category, registered with its colours."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Iterable

from PIL import Image, ImageDraw

from stethoscope.testbed.drawing import COLOURS, Colour, jitter

CANVAS = 64
"""Side of the canvas on which a sprite is drawn before it is scaled into the scene, in pixels."""

ANY = ("red", "green", "blue", "yellow", "white", "black", "purple", "pink", "amber", "teal")
INK, GLASS, METAL = (28, 28, 30), (175, 215, 235), (60, 60, 62)
LONG = frozenset({"fork", "knife", "spoon", "remote", "surfboard"})
"""Categories that are drawn at any angle; all others are nearly upright."""
SLENDER = frozenset({"knife", "fork", "spoon", "bicycle"})
"""Categories that cover least of their square: 0.19 of it or more; all others 0.31 or more."""


class Pen:
    """Draws on a transparent square canvas; all coordinates are fractions of its side.

    Attributes:
        main: the object's own colour (the one a caption may name).
        rng: source of the details that vary between two objects of one category.

    Args:
        main: the object's own colour, which is jittered.
        rng: see the attribute.
    """

    def __init__(self, main: Colour, rng: random.Random) -> None:
        self.image = Image.new("RGBA", (CANVAS, CANVAS), (0, 0, 0, 0))
        self.main = jitter(main, rng)
        self.rng = rng
        self._draw = ImageDraw.Draw(self.image)

    def pick(self, *names: str) -> Colour:
        """Choose one of the named colours and jitter it."""
        return jitter(COLOURS[self.rng.choice(names)], self.rng)

    def wobble(self, by: float = 0.05) -> float:
        """Draw a small random offset."""
        return self.rng.uniform(-by, by)

    def oval(self, x0: float, y0: float, x1: float, y1: float, fill: Colour) -> None:
        self._draw.ellipse(self._box(x0, y0, x1, y1), fill=(*fill, 255))

    def ring(self, x0: float, y0: float, x1: float, y1: float, colour: Colour, width: int) -> None:
        self._draw.ellipse(self._box(x0, y0, x1, y1), outline=(*colour, 255), width=width)

    def box(self, x0: float, y0: float, x1: float, y1: float, fill: Colour, radius: float = 0.0) -> None:
        self._draw.rounded_rectangle(self._box(x0, y0, x1, y1), radius * CANVAS, fill=(*fill, 255))

    def shape(self, points: list[tuple[float, float]], fill: Colour) -> None:
        self._draw.polygon([(x * CANVAS, y * CANVAS) for x, y in points], fill=(*fill, 255))

    def line(self, points: list[tuple[float, float]], colour: Colour, width: float) -> None:
        scaled = [(x * CANVAS, y * CANVAS) for x, y in points]
        self._draw.line(scaled, fill=(*colour, 255), width=max(1, int(width * CANVAS)))

    def slice(self, x0: float, y0: float, x1: float, y1: float, start: int, end: int, fill: Colour) -> None:
        self._draw.pieslice(self._box(x0, y0, x1, y1), start, end, fill=(*fill, 255))

    @staticmethod
    def _box(x0: float, y0: float, x1: float, y1: float) -> tuple[float, float, float, float]:
        return (x0 * CANVAS, y0 * CANVAS, x1 * CANVAS, y1 * CANVAS)


_DRAWINGS: dict[str, tuple[tuple[str, ...], Callable[[Pen], None]]] = {}


def _draws(category: str, *palette: str) -> Callable[[Callable[[Pen], None]], Callable[[Pen], None]]:
    def register(function: Callable[[Pen], None]) -> Callable[[Pen], None]:
        _DRAWINGS[category] = (palette, function)
        return function

    return register


def palette(category: str) -> tuple[str, ...]:
    """List the names of a category's colours."""
    return _DRAWINGS[category][0]


def sprites(objects: Iterable[tuple[str, str, int]]) -> list[Image.Image]:
    """Draw objects, each on a transparent canvas of its own.

    Args:
        objects: category, one of :data:`stethoscope.testbed.vocabulary.CATEGORIES`; name of its main colour, the first
            of the category where it does not come in this one; and a seed, which decides details, mirroring and
            rotation.

    Returns:
        RGBA images of 64 x 64 pixels.
    """
    upright = [_upright(*item) for item in objects]
    return [image.rotate(angle, Image.Resampling.BILINEAR) for image, angle in upright]


def silhouette(category: str, colour: str, seed: int) -> Image.Image:
    """Return the alpha channel of a sprite without rotating its colours, L, 64 x 64 pixels."""
    image, angle = _upright(category, colour, seed)
    return image.getchannel("A").rotate(angle, Image.Resampling.BILINEAR)


@functools.lru_cache(maxsize=64)  # the mask and the picture of a scene need the same one
def _upright(category: str, colour: str, seed: int) -> tuple[Image.Image, float]:
    """Draw an object before its rotation, and draw the angle; the image is shared: do not write to it."""
    rng = random.Random(seed)
    colours, draw = _DRAWINGS[category]
    pen = Pen(COLOURS[colour if colour in colours else colours[0]], rng)
    draw(pen)
    image = pen.image
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image, rng.uniform(-60, 60) if category in LONG else rng.uniform(-12, 12)


def shade(colour: Colour, factor: float) -> Colour:
    """Darken (factor < 1) a colour."""
    return tuple(int(min(255, c * factor)) for c in colour)  # type: ignore[return-value]


@_draws("person", *ANY)
def _person(p: Pen) -> None:
    skin = jitter(p.rng.choice(((225, 180, 145), (150, 100, 70), (95, 65, 45))), p.rng)
    legs, swing = p.pick("blue", "black", "brown", "gray"), p.wobble()
    p.oval(0.36, 0.0, 0.64, 0.27, skin)
    p.box(0.29, 0.26, 0.71, 0.62, p.main, 0.06)
    p.box(0.32, 0.6, 0.48, 0.98, legs)
    p.box(0.52, 0.6, 0.68, 0.98, legs)
    p.line([(0.3, 0.3), (0.14, 0.58 + swing)], skin, 0.1)
    p.line([(0.7, 0.3), (0.86, 0.58 - swing)], skin, 0.1)


@_draws("car", *ANY)
def _car(p: Pen) -> None:
    top = p.wobble()
    p.shape([(0.2, 0.45), (0.32, 0.25 + top), (0.68, 0.25 + top), (0.82, 0.45)], p.main)
    p.box(0.02, 0.43, 0.98, 0.7, p.main, 0.08)
    p.shape([(0.26, 0.44), (0.35, 0.3 + top), (0.48, 0.3 + top), (0.48, 0.44)], GLASS)
    p.shape([(0.53, 0.44), (0.53, 0.3 + top), (0.65, 0.3 + top), (0.74, 0.44)], GLASS)
    for x in (0.14, 0.64):
        p.oval(x, 0.58, x + 0.22, 0.8, INK)
        p.oval(x + 0.06, 0.64, x + 0.16, 0.74, (180, 180, 180))


@_draws("truck", "red", "yellow", "amber", "blue", "white", "green")
def _truck(p: Pen) -> None:
    top = p.wobble()
    p.box(0.02, 0.12 + top, 0.64, 0.72, p.main, 0.03)
    cab = p.pick("white", "gray", "dusk")
    p.shape([(0.68, 0.72), (0.68, 0.3 + top), (0.86, 0.3 + top), (0.98, 0.5), (0.98, 0.72)], cab)
    p.shape([(0.74, 0.5), (0.74, 0.36 + top), (0.84, 0.36 + top), (0.91, 0.5)], GLASS)
    p.box(0.02, 0.7, 0.98, 0.78, INK)
    for x in (0.08, 0.34, 0.74):
        p.oval(x, 0.68, x + 0.19, 0.87, INK)


@_draws("bicycle", "red", "blue", "black", "green", "amber")
def _bicycle(p: Pen) -> None:
    for x in (0.0, 0.58):
        p.ring(x, 0.45, x + 0.42, 0.87, INK, 4)
    p.line([(0.21, 0.66), (0.4, 0.38), (0.7, 0.38), (0.48, 0.66), (0.21, 0.66)], p.main, 0.07)
    p.line([(0.4, 0.38), (0.48, 0.66)], p.main, 0.07)
    p.line([(0.79, 0.66), (0.68, 0.28), (0.8, 0.24)], p.main, 0.07)
    p.line([(0.34, 0.34), (0.46, 0.34)], INK, 0.06)


@_draws("traffic light", "dusk")
def _traffic_light(p: Pen) -> None:
    p.box(0.43, 0.66, 0.57, 1, p.pick("gray", "black"))
    p.box(0.26, 0.0, 0.74, 0.72, p.pick("black", "dusk"), 0.08)
    lit = p.rng.randrange(3)
    for i, lamp in enumerate(((235, 40, 40), (250, 205, 40), (50, 215, 80))):
        p.oval(0.38, 0.06 + 0.22 * i, 0.62, 0.26 + 0.22 * i, lamp if i == lit else shade(lamp, 0.6))


@_draws("stop sign", "red")
def _stop_sign(p: Pen) -> None:
    p.box(0.46, 0.6, 0.54, 1, p.pick("gray"))
    corners = [math.pi / 8 + k * math.pi / 4 for k in range(8)]
    for radius, colour in ((0.37, (240, 240, 240)), (0.31, p.main)):
        p.shape([(0.5 + radius * math.cos(a), 0.37 + radius * math.sin(a)) for a in corners], colour)
    p.box(0.27, 0.31, 0.73, 0.43, (245, 245, 245))


@_draws("fork", "silver", "gray", "gold")
def _fork(p: Pen) -> None:
    p.box(0.44, 0.42, 0.56, 0.99, p.main)
    p.box(0.28, 0.32, 0.72, 0.47, p.main)
    for x in (0.28, 0.455, 0.63):
        p.box(x, 0.0, x + 0.09, 0.36, p.main)


@_draws("knife", "silver", "gray", "pale")
def _knife(p: Pen) -> None:
    p.shape([(0.42, 0.56), (0.42, 0.0), (0.57, 0.1), (0.63, 0.3), (0.6, 0.56)], p.main)
    p.box(0.4, 0.55, 0.61, 0.99, p.pick("black", "brown", "red"), 0.03)


@_draws("spoon", "silver", "gray", "gold")
def _spoon(p: Pen) -> None:
    p.box(0.44, 0.38, 0.56, 0.99, p.main)
    p.oval(0.28, 0.0, 0.72, 0.48, p.main)
    p.oval(0.37, 0.08, 0.63, 0.38, shade(p.main, 0.82))


@_draws("cup", *ANY)
def _cup(p: Pen) -> None:
    p.ring(0.58, 0.32, 0.98, 0.74, p.main, 6)
    p.box(0.1, 0.18, 0.76, 0.9, p.main, 0.08)
    p.oval(0.1, 0.08, 0.76, 0.28, shade(p.main, 0.6))


@_draws("bowl", *ANY)
def _bowl(p: Pen) -> None:
    p.slice(0.03, 0.02, 0.97, 0.9, 0, 180, p.main)
    p.box(0.34, 0.84, 0.66, 0.92, p.main)
    p.oval(0.03, 0.34, 0.97, 0.58, p.pick("white", "amber", "leaf", "brown"))


@_draws("bottle", "green", "blue", "brown", "teal", "pale")
def _bottle(p: Pen) -> None:
    p.box(0.41, 0.02, 0.59, 0.34, p.main)
    p.box(0.39, 0.0, 0.61, 0.09, p.pick("white", "red", "black"))
    p.box(0.27, 0.3, 0.73, 0.99, p.main, 0.1)
    p.box(0.27, 0.52, 0.73, 0.76, p.pick("white", "yellow", "red"))


@_draws("pizza", "crust")
def _pizza(p: Pen) -> None:
    p.oval(0.02, 0.06, 0.98, 0.96, p.main)
    p.oval(0.1, 0.14, 0.9, 0.88, (245, 205, 90))
    for _ in range(7):
        angle, far = p.rng.uniform(0, 2 * math.pi), p.rng.uniform(0.08, 0.29)
        x, y = 0.5 + far * math.cos(angle), 0.51 + far * math.sin(angle)
        p.oval(x - 0.08, y - 0.08, x + 0.08, y + 0.08, (190, 50, 40))
    p.line([(0.5, 0.1), (0.5, 0.92)], (190, 140, 60), 0.03)
    p.line([(0.08, 0.5), (0.92, 0.5)], (190, 140, 60), 0.03)


@_draws("laptop", "gray", "black", "silver")
def _laptop(p: Pen) -> None:
    p.box(0.16, 0.08, 0.84, 0.6, p.main)
    p.box(0.21, 0.13, 0.79, 0.55, p.pick("screen", "dusk", "pale"))
    p.shape([(0.16, 0.62), (0.84, 0.62), (1.0, 0.9), (0.0, 0.9)], p.main)
    p.shape([(0.22, 0.66), (0.78, 0.66), (0.84, 0.77), (0.16, 0.77)], (50, 50, 55))


@_draws("keyboard", "white", "black", "gray")
def _keyboard(p: Pen) -> None:
    key = (60, 60, 65) if sum(p.main) > 300 else (200, 200, 205)
    p.box(0.0, 0.28, 1, 0.74, p.main, 0.04)
    for row in range(3):
        for column in range(8):
            x, y = 0.05 + 0.115 * column, 0.34 + 0.12 * row
            p.box(x, y, x + 0.08, y + 0.085, key)


@_draws("mouse", "white", "black", "gray")
def _mouse(p: Pen) -> None:
    line = (70, 70, 75) if sum(p.main) > 300 else (190, 190, 195)
    p.line([(0.5, 0.2), (0.58, 0.0)], line, 0.06)
    p.oval(0.2, 0.14, 0.8, 0.99, p.main)
    p.line([(0.5, 0.16), (0.5, 0.5)], line, 0.06)
    p.line([(0.21, 0.5), (0.79, 0.5)], line, 0.05)


@_draws("chair", "brown", "black", "red", "blue", "tan")
def _chair(p: Pen) -> None:
    for box in (
        (0.2, 0.0, 0.32, 0.99), (0.2, 0.5, 0.84, 0.62), (0.72, 0.5, 0.84, 0.99), (0.2, 0.08, 0.64, 0.18),
        (0.2, 0.26, 0.64, 0.36), (0.54, 0.08, 0.64, 0.55),
    ):  # fmt: skip
        p.box(*box, p.main)


@_draws("book", *ANY)
def _book(p: Pen) -> None:
    p.shape([(0.04, 0.18), (0.5, 0.26), (0.96, 0.18), (0.96, 0.84), (0.5, 0.93), (0.04, 0.84)], p.main)
    p.shape([(0.11, 0.13), (0.49, 0.21), (0.49, 0.84), (0.11, 0.76)], (245, 243, 230))
    p.shape([(0.89, 0.13), (0.51, 0.21), (0.51, 0.84), (0.89, 0.76)], (245, 243, 230))
    for i in range(4):
        y = 0.28 + 0.12 * i
        p.line([(0.18, y), (0.44, y + 0.05)], (120, 120, 120), 0.03)
        p.line([(0.82, y), (0.56, y + 0.05)], (120, 120, 120), 0.03)


@_draws("tv", "dusk", "black")
def _tv(p: Pen) -> None:
    p.box(0.0, 0.08, 1.0, 0.74, p.pick("black"))
    p.box(0.06, 0.14, 0.94, 0.68, p.pick("blue", "dusk", "leaf", "clay"))
    p.box(0.45, 0.74, 0.55, 0.84, (40, 40, 42))
    p.box(0.24, 0.83, 0.76, 0.91, (40, 40, 42))


@_draws("couch", "red", "blue", "green", "brown", "gray", "purple", "teal")
def _couch(p: Pen) -> None:
    dark = shade(p.main, 0.76)
    p.box(0.08, 0.16, 0.92, 0.66, p.main, 0.1)
    p.box(0.0, 0.36, 0.18, 0.84, dark, 0.06)
    p.box(0.82, 0.36, 1.0, 0.84, dark, 0.06)
    p.box(0.16, 0.5, 0.84, 0.8, dark, 0.04)
    p.line([(0.5, 0.5), (0.5, 0.78)], p.main, 0.03)
    for x in (0.06, 0.86):
        p.box(x, 0.82, x + 0.08, 0.92, (40, 30, 25))


@_draws("remote", "black", "gray", "dusk")
def _remote(p: Pen) -> None:
    p.box(0.3, 0.0, 0.7, 0.99, p.main, 0.07)
    p.oval(0.4, 0.05, 0.6, 0.2, (220, 50, 50))
    for row in range(4):
        for column in range(2):
            x, y = 0.38 + 0.14 * column, 0.28 + 0.16 * row
            p.box(x, y, x + 0.09, y + 0.1, (215, 215, 220))


@_draws("clock", "black", "brown", "red", "blue", "yellow")
def _clock(p: Pen) -> None:
    p.oval(0.02, 0.02, 0.98, 0.98, p.main)
    p.oval(0.13, 0.13, 0.87, 0.87, (248, 248, 244))
    for length, width in ((0.3, 0.06), (0.2, 0.09)):
        angle = p.rng.uniform(0, 2 * math.pi)
        p.line([(0.5, 0.5), (0.5 + length * math.cos(angle), 0.5 + length * math.sin(angle))], INK, width)


@_draws("potted plant", "green", "leaf")
def _potted_plant(p: Pen) -> None:
    p.shape([(0.26, 0.62), (0.74, 0.62), (0.65, 0.99), (0.35, 0.99)], p.pick("clay", "white", "brown"))
    for angle in (-1.1, -0.55, 0.0, 0.55, 1.1):
        side, up = math.sin(angle), math.cos(angle)
        tip = (0.5 + 0.45 * side, 0.62 - 0.56 * up)
        left, right = (0.39 + 0.22 * side, 0.62 - 0.3 * up), (0.61 + 0.22 * side, 0.62 - 0.26 * up)
        p.shape([(0.46, 0.62), left, tip, right, (0.54, 0.62)], p.main)


@_draws("cat", "amber", "black", "gray", "white", "tan")
def _cat(p: Pen) -> None:
    p.oval(0.18, 0.42, 0.74, 0.98, p.main)
    p.oval(0.22, 0.12, 0.68, 0.53, p.main)
    p.shape([(0.23, 0.3), (0.25, 0.0), (0.43, 0.16)], p.main)
    p.shape([(0.47, 0.16), (0.65, 0.0), (0.67, 0.3)], p.main)
    p.line([(0.68, 0.86), (0.88, 0.7), (0.9, 0.42)], p.main, 0.09)
    p.oval(0.31, 0.25, 0.39, 0.35, (60, 190, 80))
    p.oval(0.51, 0.25, 0.59, 0.35, (60, 190, 80))


@_draws("dog", "brown", "tan", "black", "white", "gray")
def _dog(p: Pen) -> None:
    p.oval(0.12, 0.38, 0.8, 0.72, p.main)
    for x in (0.17, 0.3, 0.58, 0.69):
        p.box(x, 0.6, x + 0.1, 0.97, p.main)
    p.oval(0.6, 0.12, 0.94, 0.48, p.main)
    p.oval(0.8, 0.26, 1.0, 0.45, p.main)
    p.oval(0.58, 0.14, 0.71, 0.48, shade(p.main, 0.6))
    p.line([(0.17, 0.46), (0.02, 0.22)], p.main, 0.08)
    p.oval(0.93, 0.29, 1.0, 0.37, (20, 20, 20))


@_draws("bird", "blue", "red", "gray", "black", "yellow", "white")
def _bird(p: Pen) -> None:
    p.oval(0.16, 0.32, 0.76, 0.78, p.main)
    p.oval(0.57, 0.15, 0.87, 0.46, p.main)
    p.shape([(0.83, 0.25), (1.0, 0.33), (0.83, 0.39)], (240, 160, 40))
    p.shape([(0.24, 0.54), (0.0, 0.4), (0.04, 0.68)], p.main)
    p.shape([(0.34, 0.48), (0.62, 0.48), (0.28, 0.04)], shade(p.main, 0.7))
    p.line([(0.46, 0.76), (0.46, 0.97)], (220, 150, 40), 0.05)


@_draws("bench", "brown", "tan", "leaf")
def _bench(p: Pen) -> None:
    for y in (0.18, 0.34, 0.52):
        p.box(0.0, y, 1.0, y + 0.12, p.main)
    for x in (0.1, 0.84):
        p.box(x, 0.18, x + 0.07, 0.92, METAL)
    p.box(0.0, 0.64, 1.0, 0.69, METAL)


@_draws("frisbee", "red", "amber", "yellow", "blue", "green", "pink")
def _frisbee(p: Pen) -> None:
    p.oval(0.0, 0.28, 1.0, 0.78, shade(p.main, 0.65))
    p.oval(0.0, 0.22, 1.0, 0.7, p.main)
    p.oval(0.22, 0.33, 0.78, 0.59, shade(p.main, 0.7))


@_draws("kite", *ANY)
def _kite(p: Pen) -> None:
    other = p.pick(*ANY)
    p.shape([(0.5, 0.0), (0.88, 0.3), (0.5, 0.76), (0.12, 0.3)], p.main)
    p.shape([(0.5, 0.0), (0.88, 0.3), (0.5, 0.3)], other)
    p.shape([(0.5, 0.76), (0.12, 0.3), (0.5, 0.3)], other)
    p.line([(0.5, 0.76), (0.6, 0.84), (0.44, 0.91), (0.56, 1.0)], METAL, 0.05)


@_draws("boat", "white", "red", "blue", "brown")
def _boat(p: Pen) -> None:
    p.shape([(0.0, 0.66), (1.0, 0.66), (0.83, 0.94), (0.17, 0.94)], p.main)
    p.box(0.47, 0.02, 0.53, 0.66, (90, 70, 50))
    sail = p.pick("white", "red", "yellow", "amber")
    p.shape([(0.54, 0.04), (0.92, 0.6), (0.54, 0.6)], sail)
    p.shape([(0.45, 0.14), (0.14, 0.6), (0.45, 0.6)], sail)


@_draws("surfboard", *ANY)
def _surfboard(p: Pen) -> None:
    p.oval(0.3, 0.0, 0.7, 1.0, p.main)
    p.line([(0.5, 0.04), (0.5, 0.96)], p.pick("white", "black"), 0.05)
    p.box(0.32, 0.42, 0.68, 0.53, p.pick("red", "blue", "yellow", "black"))


@_draws("umbrella", *ANY)
def _umbrella(p: Pen) -> None:
    p.slice(0.0, 0.04, 1.0, 0.98, 180, 360, p.main)
    p.slice(0.33, 0.04, 0.67, 0.98, 180, 360, p.pick("white", "yellow", "red", "blue"))
    p.box(0.47, 0.5, 0.53, 0.99, (90, 70, 50))
