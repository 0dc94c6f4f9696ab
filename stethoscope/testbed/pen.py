"""Colours and a pen that draws in unit coordinates, so that the sprites read like geometry."""

from __future__ import annotations

import random

from PIL import Image, ImageDraw

Colour = tuple[int, int, int]

CANVAS = 64
"""Side of the canvas on which a sprite is drawn before it is scaled into the scene, in pixels."""

COLOURS: dict[str, Colour] = {
    "red": (205, 45, 45), "green": (50, 150, 60), "blue": (50, 85, 200), "yellow": (235, 205, 60),
    "white": (238, 238, 238), "black": (30, 30, 34), "gray": (135, 138, 142), "brown": (125, 80, 45),
    "tan": (190, 150, 100), "amber": (235, 135, 40), "purple": (130, 60, 160), "pink": (235, 140, 170),
    "teal": (40, 160, 165), "silver": (190, 193, 199), "gold": (215, 180, 90), "pale": (190, 220, 235),
    "clay": (185, 95, 55), "leaf": (80, 170, 60), "crust": (205, 150, 75), "screen": (90, 150, 220),
    "dusk": (60, 70, 90),
}  # fmt: skip

SPOKEN = frozenset({"red", "green", "blue", "yellow", "white", "black", "gray", "brown", "tan", "purple", "pink"})
"""Colours that captions may name. "orange" is missing on purpose: it is also a COCO category."""


def jitter(colour: Colour, rng: random.Random, light: float = 18, tint: float = 7) -> Colour:
    """Shift brightness by up to ``light`` and each channel by up to ``tint`` grey levels: the colour keeps its name."""
    shift = rng.uniform(-light, light)
    return tuple(int(min(255, max(0, c + shift + rng.uniform(-tint, tint)))) for c in colour)  # type: ignore[return-value]


def shade(colour: Colour, factor: float) -> Colour:
    """Darken (factor < 1) a colour."""
    return tuple(int(min(255, c * factor)) for c in colour)  # type: ignore[return-value]


class Pen:
    """Draws on a transparent square canvas; all coordinates are fractions of its side.

    Attributes:
        main: The object's own colour (the one a caption may name).
        rng: Source of the details that vary between two objects of one category.
    """

    def __init__(self, main: Colour, rng: random.Random) -> None:
        self.image = Image.new("RGBA", (CANVAS, CANVAS), (0, 0, 0, 0))
        self.main = main
        self.rng = rng
        self._draw = ImageDraw.Draw(self.image)

    def pick(self, *names: str) -> Colour:
        """A jittered colour out of the named ones."""
        return jitter(COLOURS[self.rng.choice(names)], self.rng)

    def wobble(self, by: float = 0.05) -> float:
        """A small random offset."""
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
