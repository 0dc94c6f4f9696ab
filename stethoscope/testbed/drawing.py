"""Define the size and the colours of pictures, and paint the backdrops of settings."""

from __future__ import annotations

import random
from collections.abc import Callable

from PIL import Image, ImageDraw

Colour = tuple[int, int, int]

SIZE = 96
"""Side of a picture, in pixels."""

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


Brush = ImageDraw.ImageDraw
FULL = (0, 0, SIZE, SIZE)


def background(setting: str, rng: random.Random) -> Image.Image:
    """Paint the backdrop of a setting, RGB, 96 x 96 pixels."""
    image = Image.new("RGB", (SIZE, SIZE))
    _PAINTERS[setting](ImageDraw.Draw(image), rng, int(SIZE * rng.uniform(0.3, 0.5)))
    return image


def _choose(rng: random.Random, *colours: Colour) -> Colour:
    return jitter(rng.choice(colours), rng)


def _street(draw: Brush, rng: random.Random, horizon: int) -> None:
    draw.rectangle(FULL, fill=_choose(rng, (165, 200, 225), (190, 195, 200)))
    x = 0
    while x < SIZE:
        width = rng.randint(12, 26)
        walls = _choose(rng, (150, 130, 115), (120, 125, 135), (175, 150, 125))
        draw.rectangle((x, horizon - rng.randint(8, 28), x + width, horizon), fill=walls)
        x += width
    draw.rectangle((0, horizon, SIZE, SIZE), fill=_choose(rng, (105, 107, 112)))
    middle = (horizon + SIZE) // 2
    for x in range(rng.randint(0, 8), SIZE, 18):
        draw.rectangle((x, middle, x + 8, middle + 2), fill=(225, 225, 215))


def _kitchen(draw: Brush, rng: random.Random, horizon: int) -> None:
    draw.rectangle(FULL, fill=_choose(rng, (205, 165, 115), (180, 135, 90), (225, 215, 195)))
    for y in range(rng.randint(0, 9), SIZE, 14):
        draw.line((0, y, SIZE, y + rng.randint(-2, 2)), fill=_choose(rng, (165, 125, 85)), width=1)


def _home_office(draw: Brush, rng: random.Random, horizon: int) -> None:
    draw.rectangle(FULL, fill=_choose(rng, (215, 215, 220), (200, 210, 215)))
    draw.rectangle((0, horizon, SIZE, SIZE), fill=_choose(rng, (150, 115, 85), (120, 95, 75)))
    window = (rng.randint(0, 60), 3, rng.randint(62, 90), max(8, horizon - 8))
    draw.rectangle(window, fill=_choose(rng, (180, 205, 230)))


def _living_room(draw: Brush, rng: random.Random, horizon: int) -> None:
    floor = SIZE - horizon
    draw.rectangle(FULL, fill=_choose(rng, (225, 205, 180), (200, 215, 200), (215, 200, 215)))
    draw.rectangle((0, floor, SIZE, SIZE), fill=_choose(rng, (150, 105, 75), (170, 140, 120)))
    rug = _choose(rng, (165, 75, 75), (95, 105, 150), (190, 175, 150))
    draw.ellipse((10, floor + 6, SIZE - 10, SIZE + 14), fill=rug)


def _park(draw: Brush, rng: random.Random, horizon: int) -> None:
    draw.rectangle(FULL, fill=_choose(rng, (165, 210, 240)))
    draw.rectangle((0, horizon, SIZE, SIZE), fill=_choose(rng, (105, 165, 80), (125, 180, 90)))
    for _ in range(rng.randint(1, 3)):
        x = rng.randint(0, SIZE)
        draw.rectangle((x - 2, horizon - 12, x + 2, horizon + 2), fill=(105, 75, 50))
        draw.ellipse((x - 12, horizon - 30, x + 12, horizon - 8), fill=_choose(rng, (60, 125, 60)))


def _beach(draw: Brush, rng: random.Random, horizon: int) -> None:
    draw.rectangle(FULL, fill=_choose(rng, (170, 215, 240)))
    draw.rectangle((0, horizon, SIZE, SIZE), fill=_choose(rng, (60, 135, 190)))
    sand = horizon + rng.randint(10, 20)
    draw.rectangle((0, sand, SIZE, SIZE), fill=_choose(rng, (230, 210, 160)))


_PAINTERS: dict[str, Callable[[Brush, random.Random, int], None]] = {
    "street": _street,
    "kitchen": _kitchen,
    "home office": _home_office,
    "living room": _living_room,
    "park": _park,
    "beach": _beach,
}
