"""The world: deterministic, exact, and with priors that counter scenes break."""

from __future__ import annotations

import dataclasses
import random
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from stethoscope import testbed
from stethoscope.testbed.scene import (
    COVERED,
    COVERED_BY_SLENDER,
    DOUBTFUL,
    MIN_PIXELS,
    SOLID,
    _pixels_left,
    sample_scene,
    scene_at,
)
from stethoscope.testbed.sprites import SLENDER, palette, silhouette, sprites
from stethoscope.testbed.vocabulary import ALIKE, CATEGORIES, COCO_IDS, INDEX, NEVER_DRAWN, SETTINGS, partners


@pytest.fixture(scope="module")
def counter_scenes() -> list[testbed.Scene]:
    return testbed.scenes(60)


def test_same_scene_and_same_pixels_every_time(counter_scenes: list[testbed.Scene]) -> None:
    again = testbed.scenes(60)
    assert again == counter_scenes
    assert all(np.array_equal(a.image(), b.image()) for a, b in zip(again[:10], counter_scenes[:10], strict=True))


def test_scene_does_not_depend_on_how_many_are_asked_for(counter_scenes: list[testbed.Scene]) -> None:
    assert testbed.scenes(7) == counter_scenes[:7]
    assert testbed.scenes(0) == []


def test_ids_are_unique_across_modes_and_seeds(counter_scenes: list[testbed.Scene]) -> None:
    everything = [*counter_scenes, *testbed.scenes(20, "prior"), *testbed.scenes(20, seed=7)]
    assert len({scene.id for scene in everything}) == len(everything)
    assert counter_scenes[17].id == "counter-000017"


def test_held_out_scenes_are_not_training_scenes(counter_scenes: list[testbed.Scene]) -> None:
    training = {scene_at(i, "counter", 1).seed for i in range(60)}
    assert not training & {scene.seed for scene in counter_scenes}


@pytest.mark.parametrize("mode", ["prior", "counter", "collage"])
def test_mask_agrees_with_visibility(mode: str) -> None:
    for scene in testbed.scenes(25, mode):
        mask = scene.mask()
        assert mask.shape == (96, 96)
        assert mask.dtype == np.uint8
        counts = np.bincount(mask.ravel(), minlength=len(CATEGORIES) + 1)
        owners = {name for name in CATEGORIES if counts[1 + INDEX[name]]}
        assert owners == set(scene.visible), scene.id
        assert all(counts[1 + INDEX[name]] >= MIN_PIXELS for name in scene.visible)


@pytest.mark.parametrize("mode", ["prior", "counter", "collage"])
def test_what_is_seen_without_drawing_is_seen(mode: str) -> None:
    """Masks are drawn only where an object might be a sliver; the bound never says more than there is."""
    for scene in testbed.scenes(60, mode, seed=5):
        counts, drawn = np.bincount(scene.mask().ravel(), minlength=len(CATEGORIES) + 1), scene._drawn()
        for i, item in enumerate(drawn):
            assert _pixels_left(item, drawn[i + 1 :]) <= counts[1 + INDEX[item.category]]


@pytest.mark.parametrize("category", CATEGORIES)
def test_an_object_covers_its_share_of_the_square(category: str) -> None:
    rng = random.Random(category)
    for side in (21, 26, 31, 40):
        for _ in range(8):
            drawing = silhouette(category, palette(category)[0], rng.getrandbits(30))
            solid = np.asarray(drawing.resize((side, side), Image.Resampling.BILINEAR)) > SOLID
            assert solid.mean() > (COVERED_BY_SLENDER if category in SLENDER else COVERED)


def test_undrawn_annotations_leave_no_trace() -> None:
    rng = random.Random(0)
    noisy = [sample_scene(rng, "prior", unseen_rate=0.5) for _ in range(40)]
    hidden = [(scene, name) for scene in noisy for name in scene.annotated if name not in scene.visible]
    assert hidden
    assert all(not (scene.mask() == 1 + INDEX[name]).any() for scene, name in hidden)


def test_counter_scenes_break_the_priors(counter_scenes: list[testbed.Scene]) -> None:
    def company(scenes: list[testbed.Scene]) -> float:
        pairs = sum(other in scene.visible for scene in scenes for shown in scene.visible for other in partners(shown))
        return pairs / sum(len(scene.visible) for scene in scenes)

    def foreign(scenes: list[testbed.Scene]) -> float:
        return float(np.mean([name not in SETTINGS[scene.setting] for scene in scenes for name in scene.visible]))

    usual = testbed.scenes(60, "prior")
    assert company(counter_scenes) < 0.5 * company(usual)
    assert foreign(counter_scenes) > 0.2 > 0.12 > foreign(usual)


def test_doubtful_objects_look_somewhat_like_something_else(counter_scenes: list[testbed.Scene]) -> None:
    objects = [(scene, o) for scene in counter_scenes for o in scene.objects if o.category in ALIKE]
    doubtful = [(scene, o) for scene, o in objects if o.alike]
    assert abs(len(doubtful) / len(objects) - DOUBTFUL) < 0.12
    assert all(o.alike in ALIKE[o.category] and o.alike in CATEGORIES and 0 < o.doubt < 0.5 for _, o in doubtful)
    scene, item = next((s, o) for s, o in doubtful if o.visible and o.haze < 0.2)
    certain = tuple(dataclasses.replace(o, alike="", doubt=0.0) if o is item else o for o in scene.objects)
    clear = dataclasses.replace(scene, objects=certain)
    assert np.array_equal(scene.mask(), clear.mask())  # the truth is the same, what is seen is not
    changed = np.asarray(scene.image(), int) != np.asarray(clear.image(), int)
    assert changed.any(-1)[scene.mask() == 1 + INDEX[item.category]].mean() > 0.5


def test_every_category_has_a_drawing() -> None:
    for name in CATEGORIES:
        for colour in palette(name):
            alpha = np.asarray(sprites([(name, colour, 0)])[0])[..., 3]
            assert (alpha > SOLID).mean() > 0.1, name
            assert np.array_equal(alpha, silhouette(name, colour, 0)), name


def test_categories_are_coco_categories() -> None:
    assert (len(CATEGORIES), len(COCO_IDS), len(NEVER_DRAWN)) == (32, 80, 48)
    assert set(CATEGORIES) <= set(COCO_IDS)


@pytest.mark.parametrize("arguments", [{"n": 3, "mode": "countr"}, {"n": -1}])
def test_wrong_arguments_are_refused(arguments: dict) -> None:
    with pytest.raises(ValueError, match="must"):
        testbed.scenes(**arguments)


def test_import_stays_light() -> None:
    code = (
        "import sys, stethoscope.testbed; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
