"""Define the categories of the testbed's scenes, their settings, and their co-occurrence priors.

Scenes show 32 of the 80 COCO categories in six settings. Two tables hold the priors that a language model can learn and
later mistake for evidence: how often a category occurs in a setting (``SETTINGS``), and which categories co-occur
(``PAIR_BOOSTS``). A third one lists what an object is confused with when it is hard to see (``ALIKE``).
"""

from __future__ import annotations

import functools

CATEGORIES: tuple[str, ...] = (
    "person", "car", "truck", "bicycle", "traffic light", "stop sign", "fork", "knife", "spoon", "cup", "bowl",
    "bottle", "pizza", "laptop", "keyboard", "mouse", "chair", "book", "tv", "couch", "remote", "clock",
    "potted plant", "cat", "dog", "bird", "bench", "frisbee", "kite", "boat", "surfboard", "umbrella",
)  # fmt: skip
"""The categories that the world can draw, in the order of the id mask (1 + index)."""

INDEX: dict[str, int] = {name: i for i, name in enumerate(CATEGORIES)}

COCO_IDS: dict[str, int] = {
    "person": 1, "bicycle": 2, "car": 3, "motorcycle": 4, "airplane": 5, "bus": 6, "train": 7, "truck": 8, "boat": 9,
    "traffic light": 10, "fire hydrant": 11, "stop sign": 13, "parking meter": 14, "bench": 15, "bird": 16, "cat": 17,
    "dog": 18, "horse": 19, "sheep": 20, "cow": 21, "elephant": 22, "bear": 23, "zebra": 24, "giraffe": 25,
    "backpack": 27, "umbrella": 28, "handbag": 31, "tie": 32, "suitcase": 33, "frisbee": 34, "skis": 35,
    "snowboard": 36, "sports ball": 37, "kite": 38, "baseball bat": 39, "baseball glove": 40, "skateboard": 41,
    "surfboard": 42, "tennis racket": 43, "bottle": 44, "wine glass": 46, "cup": 47, "fork": 48, "knife": 49,
    "spoon": 50, "bowl": 51, "banana": 52, "apple": 53, "sandwich": 54, "orange": 55, "broccoli": 56, "carrot": 57,
    "hot dog": 58, "pizza": 59, "donut": 60, "cake": 61, "chair": 62, "couch": 63, "potted plant": 64, "bed": 65,
    "dining table": 67, "toilet": 70, "tv": 72, "laptop": 73, "mouse": 74, "remote": 75, "keyboard": 76,
    "cell phone": 77, "microwave": 78, "oven": 79, "toaster": 80, "sink": 81, "refrigerator": 82, "book": 84,
    "clock": 85, "vase": 86, "scissors": 87, "teddy bear": 88, "hair drier": 89, "toothbrush": 90,
}  # fmt: skip
"""All 80 COCO categories with their published ids (the ids have gaps)."""

NEVER_DRAWN: tuple[str, ...] = tuple(name for name in COCO_IDS if name not in INDEX)
"""The 48 COCO categories that are never drawn, for questions with the answer no."""

SETTINGS: dict[str, dict[str, float]] = {
    "street": {
        "car": 1.0, "traffic light": 0.8, "truck": 0.5, "stop sign": 0.4, "bicycle": 0.5, "person": 0.7, "dog": 0.12,
        "bench": 0.15, "umbrella": 0.1,
    },
    "kitchen": {
        "fork": 0.7, "knife": 0.7, "spoon": 0.4, "cup": 0.7, "bowl": 0.6, "bottle": 0.5, "pizza": 0.5, "chair": 0.25,
        "clock": 0.15, "cat": 0.1,
    },
    "home office": {
        "laptop": 1.0, "keyboard": 0.7, "mouse": 0.7, "chair": 0.5, "book": 0.5, "cup": 0.35, "clock": 0.25,
        "bottle": 0.15, "potted plant": 0.2, "person": 0.15,
    },
    "living room": {
        "tv": 0.8, "couch": 1.0, "remote": 0.6, "clock": 0.35, "potted plant": 0.5, "book": 0.35, "cat": 0.5,
        "chair": 0.25, "dog": 0.15,
    },
    "park": {
        "dog": 0.8, "frisbee": 0.6, "bench": 0.7, "bird": 0.5, "person": 0.7, "kite": 0.5, "bicycle": 0.35,
        "bottle": 0.1,
    },
    "beach": {
        "surfboard": 0.7, "umbrella": 0.7, "boat": 0.7, "person": 0.8, "bird": 0.4, "kite": 0.35, "dog": 0.25,
        "frisbee": 0.2, "bottle": 0.12, "chair": 0.2,
    },
}  # fmt: skip
"""Setting -> category -> weight of drawing that category there."""

PAIR_BOOSTS: dict[frozenset[str], float] = {
    frozenset(pair): boost
    for *pair, boost in (
        ("fork", "knife", 8), ("tv", "remote", 8), ("car", "traffic light", 6), ("laptop", "mouse", 6),
        ("dog", "frisbee", 6), ("keyboard", "mouse", 5), ("truck", "stop sign", 5), ("cup", "spoon", 5),
        ("person", "surfboard", 4), ("couch", "tv", 3), ("cat", "couch", 3), ("person", "bicycle", 3),
        ("bench", "bird", 3), ("pizza", "bottle", 3), ("boat", "umbrella", 3), ("person", "kite", 3),
        ("book", "chair", 2.5), ("clock", "potted plant", 2.5),
    )
}  # fmt: skip
"""Pairs that co-occur, with the factor by which the presence of one multiplies the weight of the other."""

ALIKE: dict[str, tuple[str, ...]] = {
    "car": ("truck",), "truck": ("car",), "bicycle": ("bench",), "traffic light": ("stop sign",),
    "stop sign": ("traffic light",), "fork": ("spoon", "knife"), "knife": ("spoon", "fork"), "spoon": ("fork", "knife"),
    "cup": ("bowl", "bottle"), "bowl": ("cup",), "bottle": ("cup", "potted plant"), "pizza": ("clock", "frisbee"),
    "laptop": ("book", "tv"), "keyboard": ("remote", "book"), "mouse": ("remote",), "chair": ("bench", "couch"),
    "book": ("laptop", "keyboard"), "tv": ("laptop",), "couch": ("bench", "chair"), "remote": ("mouse", "keyboard"),
    "clock": ("frisbee", "pizza"), "potted plant": ("bottle", "umbrella"), "cat": ("dog",), "dog": ("cat",),
    "bird": ("kite", "cat"), "bench": ("chair", "couch"), "frisbee": ("clock", "bowl"), "kite": ("bird", "umbrella"),
    "boat": ("surfboard",), "surfboard": ("boat",), "umbrella": ("kite", "potted plant"),
}  # fmt: skip
"""Categories that a category is confused with when it is hard to see; nothing looks like a person."""

_BOOSTS = {
    name: {other: float(PAIR_BOOSTS.get(frozenset((name, other)), 1.0)) for other in CATEGORIES} for name in CATEGORIES
}

BIG = frozenset({"person", "car", "truck", "couch", "tv", "boat", "bench", "bicycle"})
SMALL = frozenset({"fork", "knife", "spoon", "mouse", "remote", "frisbee", "cup", "bird", "bottle", "clock"})


def boost(present: str, other: str) -> float:
    """Return the factor by which the presence of a category multiplies the weight of another (1.0 if unrelated).

    >>> boost("knife", "fork"), boost("knife", "kite")
    (8.0, 1.0)
    """
    return _BOOSTS[present][other]


@functools.cache
def partners(category: str) -> tuple[str, ...]:
    """List the categories whose weight rises when ``category`` is present.

    >>> partners("mouse")
    ('laptop', 'keyboard')
    """
    return tuple(name for name in CATEGORIES if name != category and boost(category, name) > 1)


def with_article(noun: str) -> str:
    """Put the indefinite article before a noun phrase.

    >>> with_article("umbrella"), with_article("red umbrella")
    ('an umbrella', 'a red umbrella')
    """
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
