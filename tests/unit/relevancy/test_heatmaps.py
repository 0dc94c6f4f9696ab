"""Where tiles lie in the picture, against what each processor is known to do; and heat maps, against brute force."""

import numpy as np
import pytest
from PIL import Image

import stethoscope
from stethoscope.relevancy.heatmaps import colours, coverage, heat, overlay
from stethoscope.tracing.token_spans import token_regions

WIDE = (100, 40)
HALVES = [(0, 0, 50, 40), (50, 0, 100, 40), (0, 0, 100, 40)]


@pytest.mark.parametrize(
    ("model", "settings", "boxes"),
    [
        ("llava-1.5-7b", {"pad": False}, [(30, 0, 70, 40)]),  # the shorter edge is scaled, the middle is cut out
        ("llava-1.5-7b", {}, [(0, -30, 100, 70)]),  # padded to a square
        ("paligemma-3b", {}, [(0, 0, 100, 40)]),  # squashed
        ("paligemma-3b", {"pad": True}, [(0, -30, 100, 70)]),
        ("convllava-768", {}, [(0, -30, 100, 70)]),  # padded by the authors' own steps
        ("smolvlm-2.2b", {}, HALVES),  # tiles, and the whole behind them
        ("smolvlm-2.2b", {"max_pixels": 56 * 56}, [(0, 0, 100, 40)]),  # the whole alone
        ("internvl3-1b", {}, HALVES),
        ("internvl3-1b", {"max_pixels": 56 * 56}, [(0, 0, 100, 40)]),
        ("qwen2-vl-2b", {}, [(0, 0, 100, 40)]),
    ],
)
def test_tiles_lie_where_the_processor_takes_them_from(model, settings, boxes):
    adapter = stethoscope.load(model, random_init="tiny", **settings)
    spans = adapter.encode(Image.new("RGB", WIDE), "What?").spans
    regions = token_regions(adapter, WIDE, spans, tiles=len(boxes))
    assert np.allclose([box for _, box in regions.grids], boxes, atol=0.5)
    assert np.allclose(regions.tiles, boxes, atol=0.5)
    assert tuple(grid for grid, _ in regions.grids) == spans.grids
    assert len(regions.cells) == sum(rows * columns for rows, columns in spans.grids)


def test_a_picture_with_separators_lies_in_it_twice():
    adapter = stethoscope.load("llava-1.6-vicuna-7b", random_init="tiny")
    spans = adapter.encode(Image.new("RGB", WIDE), "What?").spans
    tiled = token_regions(adapter, WIDE, spans, tiles=4)
    assert [box for _, box in tiled.grids] == [(0, 0, 100, 40)] * 2
    assert len(tiled.cells) == len(spans.image) - len(spans.separators)
    assert np.allclose(tiled.tiles[0], (0, 0, 100, 40), atol=0.5)
    assert np.allclose(tiled.tiles[2], (30, 0, 70, 40), atol=0.5)  # the middle one of three squares, padded at the ends


@pytest.mark.parametrize(("start", "stop", "cells", "pixels"), [(0, 6, 3, 6), (-2.5, 9.25, 4, 7), (1.2, 3.1, 5, 4)])
def test_coverage_is_what_many_points_of_a_cell_show(start, stop, cells, pixels):
    points = np.linspace(start, stop, cells * 20_000, endpoint=False) + (stop - start) / cells / 40_000
    counted = np.array(
        [
            np.histogram(sampled, np.arange(pixels + 1))[0] / len(sampled)
            for sampled in points.reshape(cells, -1)
        ]
    )  # fmt: skip
    assert np.allclose(coverage(start, stop, cells, pixels), counted, atol=1e-3)


def test_heat_keeps_what_the_cells_hold_and_puts_it_in_their_place():
    values = np.zeros((2, 2, 4))
    values[0, 1, 3], values[1, 0, 0] = 3.0, 5.0
    heat_map = heat([values], [(20, 0, 100, 40)], (100, 40), (40, 100))
    assert heat_map.shape == (2, 40, 100)
    assert np.allclose(heat_map.sum((1, 2)), (3, 5))
    assert np.allclose(heat_map[0, 20:, 80:], 3 / 400)
    assert np.allclose(heat_map[1, :20, 20:40], 5 / 400)
    assert not heat_map[0, :20].any()
    assert not heat_map[:, :, :20].any()


def test_padding_takes_its_share_with_it_and_a_tile_without_a_place_is_left_out():
    ones = np.ones((4, 4))
    assert heat([ones], [(0, -30, 100, 70)], (100, 40), (40, 100)).sum() == pytest.approx(16 * 0.4)
    both = heat([ones, 7 * ones], [(0, 0, 100, 40), None], (100, 40), (10, 25))
    assert both == pytest.approx(np.full((10, 25), 16 / 250))


def test_overlay_shows_the_place_and_leaves_the_rest_as_it_is():
    picture = Image.new("RGB", (60, 40), (10, 120, 10))
    hot = np.zeros((40, 60))
    hot[:20, 30:] = 2.0
    shown = np.asarray(overlay(picture, hot, opacity=1.0, width=120))
    assert shown.shape == (80, 120, 3)
    assert (shown[:38, 62:] == colours(np.array(1.0))).all()
    assert (shown[44:, :56] == (10, 120, 10)).all()
    assert (np.asarray(overlay(picture, np.zeros((40, 60)))) == (10, 120, 10)).all()
