"""Relevancy through a visual abstractor against the full matrix recursion over [queries ; vision tokens]."""

import pytest
import torch
from helpers import brute_force, zoo

from stethoscope.adapters import tiny
from stethoscope.adapters.authors import mplug_owl2
from stethoscope.core.errors import CapabilityError
from stethoscope.relevancy import relevancy_from_inputs
from stethoscope.relevancy.backward_pass import QueryRelevancy

QUERIES, VISION = 5, 17
NEAR = 2e-5


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def owl():
    """Tiny mPLUG-Owl2 and inputs: 5 queries and the learned token between words, then the answer."""
    model, processor = tiny.build_from(mplug_owl2.build_tiny)
    assert processor.image_tokens == QUERIES + 1
    ids = [1, 5, 6, *[processor.image_token_id] * processor.image_tokens, 7, 8, 9, *zoo.ANSWER]
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    return model, {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "pixel_values": pixels,
    }


def joint(layers, tower):
    """R_qi: every layer as a square matrix over queries and vision tokens, whose own rows it leaves as they are."""
    whole = torch.block_diag(torch.eye(QUERIES, dtype=torch.float64), tower)
    for cam in layers:
        square = torch.zeros_like(whole)
        square[:QUERIES] = cam
        whole = whole + square @ whole
    assert torch.equal(whole[QUERIES:, QUERIES:], tower)
    return whole[:QUERIES, QUERIES:]


@pytest.mark.parametrize("scope", ["row", "token"])
def test_against_brute_force(owl, scope):
    model, inputs = owl
    rows, cams = brute_force.language(model, inputs, zoo.ANSWER, scope)
    assert cams[0]["joint"][0].shape == (QUERIES, QUERIES + VISION)
    towers = brute_force.towers(cams, scope)
    of = cams if scope == "token" else cams[:1] * len(cams)
    through = [joint(maps["joint"], tower) for maps, tower in zip(of, towers, strict=True)]
    vision = torch.stack([row[:, 3 : 3 + QUERIES] @ matrix for row, matrix in zip(rows, through, strict=True)])
    result = relevancy_from_inputs(model, inputs, zoo.ANSWER, scope=scope)
    assert brute_force.error(result.llm, rows) < NEAR
    assert brute_force.error(result.vision, vision) < NEAR
    assert result.patches.shape == (len(zoo.ANSWER), 3, 4, 4)
    assert torch.equal(result.patches.flatten(2), result.vision[..., 1:])
    assert result.image.shape[-1] == QUERIES + 1


@pytest.mark.parametrize(
    "options", [{"recompute": True}, {"recompute": False}, {"rule": "plain"}, {"rule": "eq10_no_transpose"}]
)
def test_neither_running_again_nor_the_rule_of_cross_attention_changes_anything(owl, options):
    model, inputs = owl
    expected = relevancy_from_inputs(model, inputs, zoo.ANSWER)
    result = relevancy_from_inputs(model, inputs, zoo.ANSWER, **options)
    torch.testing.assert_close(result.vision, expected.vision)


def test_layers_in_blocks_of_rows_are_layers_as_a_whole():
    generator = torch.Generator().manual_seed(0)
    start, abars = torch.rand(2, 3, 4, generator=generator), torch.rand(2, 1, 4, 9, generator=generator)
    whole, parts = QueryRelevancy(start, 5), QueryRelevancy(start, 5)
    for abar in abars:
        whole.begin(abar)(0, abar)
        middle = abar[:, 1:3]
        late = middle * (torch.arange(9) >= 6)
        add = parts.begin(abar)
        for start, block in ((0, abar[:, :1]), (1, middle[..., :6]), (1, late), (3, abar[:, 3:])):
            add(start, block)
    torch.testing.assert_close(parts.vision, whole.vision)
    torch.testing.assert_close(parts.queries, whole.queries)


def test_maps_of_another_shape_are_refused(owl, monkeypatch):
    model, inputs = owl
    attention = model.model.visual_abstractor.encoder.layers[0].crossattention.attention
    cut = attention.forward

    def only_vision(queries, keys, positions):
        return cut(queries, keys[:, 2:], torch.cat([positions[: queries.shape[1]], positions[queries.shape[1] + 2 :]]))

    monkeypatch.setattr(attention, "forward", only_vision)
    with pytest.raises(CapabilityError, match=r"visual_abstractor.*not supported"):
        relevancy_from_inputs(model, inputs, zoo.ANSWER)
