"""Relevancy of every family against plain autograd per token with all maps kept, and the full matrix recursion."""

import pytest
import torch
from helpers import brute_force, zoo

from stethoscope.relevancy import relevancy_from_inputs
from stethoscope.relevancy.rules import RULES

NEAR = 2e-5
SCOPES = ("row", "token")
_built = {}
_cams = {}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def case(family):
    if family not in _built:
        _built[family] = (zoo.FAMILIES | zoo.QFORMERS | zoo.SEQ2SEQ)[family]()
    return _built[family]


def language(family, scope):
    """Expected (T, L, S), and Abar of every token, computed once."""
    example = case(family)
    rows, _cams[family] = brute_force.language(example.model, example.inputs, zoo.ANSWER, scope, _cams.get(family))
    return rows


def query_relevancy(family, scope, rule, image):
    """Expected (T, L, M) over vision tokens and (T, L, Q) over the Q-Former's question tokens."""
    pairs = brute_force.queries(_cams[family], scope, rule, case(family).queries)
    return [torch.stack([rows @ pair[side] for rows, pair in zip(image, pairs, strict=True)]) for side in (0, 1)]


def check(record_property, **pairs):
    """Every found tensor is near what was expected; the distances are kept in the report."""
    for name, (actual, expected) in pairs.items():
        distance = brute_force.error(actual, expected)
        record_property(name, distance)
        assert distance < NEAR, (name, distance)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_decoder_only(family, scope, record_property):
    example = case(family)
    rows = language(family, scope)
    vision = brute_force.through_tower(rows[..., example.image], example.merge, _cams[family], scope, example.order)
    result = relevancy_from_inputs(example.model, example.inputs, zoo.ANSWER, scope=scope)
    check(record_property, llm=(result.llm, rows), vision=(result.vision, vision))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("family", zoo.QFORMERS)
def test_through_a_qformer(family, scope, rule, record_property):
    example = case(family)
    rows = language(family, scope)
    vision, text = query_relevancy(family, scope, rule, rows[..., example.image])
    result = relevancy_from_inputs(example.model, example.inputs, zoo.ANSWER, scope=scope, rule=rule)
    check(record_property, llm=(result.llm, rows), vision=(result.vision, vision))
    if text.shape[-1]:
        check(record_property, text=(result.query_text, text))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("family", zoo.SEQ2SEQ)
def test_encoder_decoder(family, scope, rule, record_property):
    example = case(family)
    decoder, encoder, _cams[family] = brute_force.seq2seq(example.model, example.inputs, zoo.ANSWER, scope, rule)
    vision, text = query_relevancy(family, scope, rule, encoder[..., example.image])
    result = relevancy_from_inputs(example.model, example.inputs, zoo.ANSWER, scope=scope, rule=rule)
    assert result.llm is None
    check(record_property, encoder=(result.encoder, encoder), vision=(result.vision, vision))
    if text.shape[-1]:
        check(record_property, text=(result.query_text, text))
    assert (result.decoder[0] == 0).all() == (decoder[0] == 0).all()
    check(record_property, decoder=(result.decoder, decoder))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("family", [*zoo.FAMILIES, *zoo.QFORMERS, *zoo.SEQ2SEQ])
def test_saliency(family, scope, record_property):
    example = case(family)
    if family in zoo.SEQ2SEQ:
        expected = brute_force.saliency(
            brute_force.seq2seq(example.model, example.inputs, zoo.ANSWER, scope, "plain")[2], 0
        )
    else:
        language(family, scope)
        expected = brute_force.saliency(_cams[family], example.inputs["input_ids"].shape[1] - len(zoo.ANSWER) - 1)
    result = relevancy_from_inputs(example.model, example.inputs, zoo.ANSWER, scope=scope)
    check(record_property, saliency=(result.saliency, expected))
    last = relevancy_from_inputs(example.model, example.inputs, zoo.ANSWER, scope=scope, layers="final", tokens=[2])
    torch.testing.assert_close(last.saliency[0, 0], result.saliency[2, -1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scope", SCOPES)
def test_maps_that_are_large(scope, record_property):
    """Their forward pass is SDPA, which differs from eager attention by rounding."""
    _built.setdefault("large", zoo.llava(23))
    example = case("large")
    rows = language("large", scope)
    vision = brute_force.through_tower(rows[..., example.image], example.merge, _cams["large"], scope)
    result = relevancy_from_inputs(example.model, example.inputs, zoo.ANSWER, scope=scope, budget=2**24)
    assert result.llm.shape[-1] ** 2 * 4 > 2**20
    record_property("patches", brute_force.error(result.patches.flatten(2), vision[..., 1:]))
    assert brute_force.error(result.llm, rows) < 1e-4
    assert brute_force.error(result.vision, vision) < 1e-4
