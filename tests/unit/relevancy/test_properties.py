"""What must hold of relevancy whatever the numbers are, and that the model is left as it was."""

import copy

import pytest
import torch
from helpers import zoo

from stethoscope.core.errors import CapabilityError, CaptureError, ConfigError, DataError
from stethoscope.relevancy import gradient_recorder, relevancy_from_inputs, token_alignment
from stethoscope.relevancy.backward_pass import BlockRelevancy, StoredRelevancy
from stethoscope.tracing import hooks

SCOPES = ("row", "token")
NAMES = ("llm", "decoder", "encoder", "vision", "tiles", "query_text", "saliency")
SOME = ("llava", "paligemma", "instructblip_llama", "instructblip_t5")
_built = {}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def case(family):
    if family not in _built:
        _built[family] = (zoo.FAMILIES | zoo.QFORMERS | zoo.SEQ2SEQ)[family]()
    return _built[family]


def relevancy(family, **options):
    example = case(family)
    return relevancy_from_inputs(example.model, example.inputs, zoo.ANSWER, **options)


def same(first, other, rows=slice(None), layers=slice(None), tolerance=1e-5):
    """``one`` is the chosen rows and layers of ``other``."""
    for name in NAMES:
        actual, expected = getattr(first, name), getattr(other, name)
        assert (actual is None) == (expected is None)
        if actual is not None:
            torch.testing.assert_close(actual, expected[rows][:, layers], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("family", SOME)
def test_a_token_is_the_same_alone_or_with_others(family, scope):
    whole = relevancy(family, scope=scope)
    assert whole.tokens == (0, 1, 2, 3, 4)
    for tokens in ([3, 1], [0], [4]):
        same(relevancy(family, scope=scope, tokens=tokens), whole, tokens)
    same(relevancy(family, scope=scope, layers="final"), whole, layers=slice(-1, None))


@pytest.mark.parametrize("family", SOME)
def test_the_first_token_is_the_same_in_both_scopes(family):
    same(relevancy(family, scope="row", tokens=[0]), relevancy(family, scope="token", tokens=[0]))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("family", [*zoo.FAMILIES, *zoo.QFORMERS, *zoo.SEQ2SEQ])
def test_nothing_from_later_tokens_and_parts_make_the_whole(family, scope):
    result = relevancy(family, scope=scope)
    own = result.llm if result.llm is not None else result.decoder
    for token in result.tokens:
        assert (own[token, :, result.first + token + 1 :] == 0).all()
        assert (result.saliency[token, :, result.first + token + 1 :] == 0).all()
        assert (result.answer[token, :, token:] == 0).all()
    parts = [part.sum(-1) for part in (result.image, result.question, result.answer, result.rest)]
    torch.testing.assert_close(sum(parts), result.total)
    assert (result.total[1:] > 0).all()
    assert (result.vision >= 0).all()
    sequence = case(family).inputs["input_ids"].shape[1]
    parts = (result.image, result.question, result.answer, result.rest)
    assert sum(part.shape[-1] for part in parts) == sequence + (0 if result.decoder is None else len(zoo.ANSWER))


def test_a_known_question_is_a_part_of_its_own():
    from dataclasses import replace

    result = relevancy("llava")
    asked = replace(result, question_positions=(20, 21))
    assert torch.equal(asked.question, result.llm[..., 20:22])
    torch.testing.assert_close(asked.rest.sum(-1) + asked.question.sum(-1), result.rest.sum(-1))


@pytest.mark.parametrize("family", [name for name in zoo.FAMILIES if "next" not in name and "onevision" not in name])
def test_patches_are_the_vision_tokens_without_classes(family):
    result = relevancy(family, layers="final")
    example = case(family)
    if example.patches is None:
        assert result.patches is None
        assert result.tiles.shape[2] == 2
        assert result.tiles.sum() <= result.vision.sum()
    else:
        assert result.patches.shape == (5, 1, *example.patches)
        kept = result.vision[..., example.classes :]
        torch.testing.assert_close(result.patches.flatten(2).sort(-1)[0], kept.sort(-1)[0])


def test_patches_of_qwen_are_in_rows_and_columns():
    result = relevancy("qwen2_vl", tokens=[2], layers="final")
    for row in range(8):
        for column in range(12):
            token, part = row // 2 * 6 + column // 2, row % 2 * 2 + column % 2
            assert result.patches[0, 0, row, column] == result.vision[0, 0, 4 * token + part]


@pytest.mark.parametrize("small", [2**20, 0], ids=["eager forward", "SDPA forward"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("family", ["llava", "blip2_opt", "qwen2_5_vl", "gemma3"])
def test_left_padding_changes_nothing(family, scope, small, monkeypatch):
    monkeypatch.setattr(hooks, "SMALL_MAP", small)
    monkeypatch.setattr(gradient_recorder, "SMALL_MAP", small)
    example = case(family)
    fills = {"input_ids": 0, "attention_mask": 0, "token_type_ids": 0, "mm_token_type_ids": 0}
    padded = {
        name: torch.nn.functional.pad(value, (3, 0), value=fills[name]) if name in fills else value
        for name, value in example.inputs.items()
    }
    result = relevancy_from_inputs(example.model, padded, zoo.ANSWER, scope=scope)
    plain = relevancy(family, scope=scope)
    assert (result.llm[..., :3] == 0).all()
    torch.testing.assert_close(result.llm[..., 3:], plain.llm, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.vision, plain.vision, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "scope"), [(name, "row") for name in (*zoo.FAMILIES, *zoo.QFORMERS, *zoo.SEQ2SEQ)] + [("llava", "token")]
)
def test_half_precision_is_near_and_float32(family, scope):
    example = case(family)
    model = copy.deepcopy(example.model).bfloat16()
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in example.inputs.items()}
    result = relevancy_from_inputs(model, inputs, zoo.ANSWER, scope=scope)
    for name in NAMES:
        if getattr(result, name) is not None:
            assert getattr(result, name).dtype == torch.float32
            assert torch.isfinite(getattr(result, name)).all()
    plain = relevancy(family, scope=scope)
    if not family.endswith("t5"):  # whose unscaled scores saturate in half precision
        both = torch.stack([result.total.flatten(), plain.total.flatten()])
        assert torch.corrcoef(both)[0, 1] > 0.9


def test_float64_stays_float64():
    example = case("llava")
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in example.inputs.items()}
    result = relevancy_from_inputs(copy.deepcopy(example.model).double(), inputs, zoo.ANSWER)
    assert result.llm.dtype == torch.float64
    torch.testing.assert_close(result.llm.float(), relevancy("llava").llm, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["llava", "paligemma2", "instructblip_t5", "qwen2_5_vl"])
def test_neither_repetition_nor_budget_changes_anything(family):
    once = relevancy(family)
    again = relevancy(family)
    for name in NAMES:
        actual, expected = getattr(again, name), getattr(once, name)
        assert actual is None or torch.equal(actual, expected)
    same(relevancy(family, budget=1), once)
    same(relevancy(family, budget=1, scope="token"), relevancy(family, scope="token"))  # one row and one token at once


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("family", [*zoo.FAMILIES, *zoo.QFORMERS, *zoo.SEQ2SEQ])
def test_layers_that_run_again_change_nothing_and_leave_no_trace(family, scope):
    model = case(family).model
    model(**case(family).inputs)  # transformers marks some models when they first run
    before = state(model)
    again, kept = (relevancy(family, scope=scope, tokens=[0, 3], recompute=recompute) for recompute in (True, False))
    same(again, kept)
    assert state(model) == before


def test_merged_patches_are_found_anew_for_another_shape_alone(monkeypatch):
    calls = []
    find = token_alignment._probe
    monkeypatch.setattr(token_alignment, "_probe", lambda *arguments: calls.append(1) or find(*arguments))
    example = zoo.llava_next()
    other = {**example.inputs, "input_ids": example.inputs["input_ids"].where(example.inputs["input_ids"] != 7, 11)}
    for inputs in (example.inputs, other, example.inputs):
        token_alignment.probe_alignment(example.model, inputs, example.image)
    assert len(calls) == 1
    wider = {**example.inputs, "image_sizes": torch.tensor([[56, 56]])}
    assert token_alignment._cache_key(example.model, wider, len(example.image)) != token_alignment._cache_key(
        example.model, example.inputs, len(example.image)
    )


def test_the_last_key_that_a_query_sees():
    def ends(mask, queries=3, keys=4):
        return gradient_recorder.visible_ends(queries, keys, mask, hooks.is_causal(torch.nn.Identity(), queries, True))

    seen = torch.tensor([[True, False, True, False], [False, False, False, False], [True, True, False, False]])
    assert ends(None) == [1, 2, 3]
    assert ends(None, queries=1) == [4]
    assert ends(seen[None, None]) == [3, 4, 2]  # a query that sees nothing is even over all keys
    assert ends(torch.zeros(1, 1, 3, 4).masked_fill(~seen, torch.finfo(torch.float32).min)) == [3, 4, 2]
    assert ends(torch.tensor([True, True, False, False])[None, None, None]) == [2, 2, 2]
    assert ends(torch.stack([seen, seen.roll(1, -1)])[None]) == [4, 4, 3]


def state(model):
    configs = [model.config, *(getattr(model.config, key) for key in model.config.sub_configs)]
    return (
        [config._attn_implementation for config in configs],
        [(p.requires_grad, p.grad, p.data_ptr()) for p in model.parameters()],
        [(m.training, sorted(vars(m)), len(m._forward_hooks), len(m._backward_hooks)) for m in model.modules()],
        torch.is_grad_enabled(),
    )


@pytest.mark.parametrize("scope", SCOPES)
def test_trainable_or_frozen_training_or_not_and_no_trace(scope):
    plain = relevancy("instructblip_llama", scope=scope)
    example = case("instructblip_llama")
    for frozen in (True, False):
        model = copy.deepcopy(example.model).train().requires_grad_(not frozen)
        before = state(model)
        with torch.inference_mode():
            result = relevancy_from_inputs(model, example.inputs, zoo.ANSWER, scope=scope)
        assert state(model) == before
        same(result, plain)


BROKEN = {
    "language_model.layers.1": r"language_model\.layers\.1",
    "vision_tower.encoder.layers.0": r"vision_tower.*\.0",
}


@pytest.mark.parametrize(("broken", "named"), BROKEN.items())
def test_values_that_are_not_finite_name_the_layer_and_leave_no_trace(broken, named):
    example = case("llava")
    model = copy.deepcopy(example.model)
    model.get_submodule(f"model.{broken}.self_attn.v_proj").weight.data[0, 0] = torch.nan
    model(**example.inputs)  # transformers marks some models when they first run
    before = state(model)
    with pytest.raises(CaptureError, match=named):
        relevancy_from_inputs(model, example.inputs, zoo.ANSWER)
    assert state(model) == before


@pytest.mark.parametrize("recompute", [True, False])
def test_gradients_that_are_not_finite_name_the_layer(recompute):
    example = case("llava")
    model = copy.deepcopy(example.model)

    def spoil(module, arguments, output):
        if output.requires_grad:  # a layer that will run again has no graph in its first run
            output.register_hook(lambda gradient: gradient * torch.inf)

    model.model.language_model.layers[1].mlp.register_forward_hook(spoil)
    with pytest.raises(CaptureError, match=r"gradient .*language_model\.layers\.1"):
        relevancy_from_inputs(model, example.inputs, zoo.ANSWER, recompute=recompute)


def test_what_is_not_supported_is_refused():
    example = case("llava")

    def refused(error, match, inputs=example.inputs, answer=zoo.ANSWER, model=example.model, **options):
        with pytest.raises(error, match=match):
            relevancy_from_inputs(model, inputs, answer, **options)

    double = {name: torch.cat([value, value]) for name, value in example.inputs.items()}
    refused(CapabilityError, "one sample", double)
    refused(DataError, "do not end with", answer=[1, 2, 3])
    refused(DataError, "no tokens", answer=[])
    refused(
        DataError,
        "no image token",
        {**example.inputs, "input_ids": example.inputs["input_ids"].where(example.inputs["input_ids"] != zoo.IMAGE, 5)},
    )
    refused(ConfigError, "scope", scope="rows")
    refused(ConfigError, "rule", rule="eq11")
    refused(ConfigError, "layers", layers="last")
    refused(ConfigError, "tokens", tokens=[5])
    refused(ConfigError, "tokens", tokens=[])
    cross = zoo.mllama()
    refused(CapabilityError, "cross-attend", cross.inputs, model=cross.model)
    decoder = case("blip2_t5")
    without = {name: value for name, value in decoder.inputs.items() if name != "decoder_input_ids"}
    refused(DataError, "decoder_input_ids", without, model=decoder.model)


def test_a_tower_whose_attention_is_not_heard_is_refused():
    example = zoo.convolutional()
    example.model.model.vision_tower.add_module("SomeAttention", torch.nn.MultiheadAttention(4, 1))
    with pytest.raises(CapabilityError, match="vision tower"):
        relevancy_from_inputs(example.model, example.inputs, zoo.ANSWER)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_convolutional_tower_is_the_identity(scope):
    example = zoo.convolutional()
    result = relevancy_from_inputs(example.model, example.inputs, zoo.ANSWER, scope=scope)
    assert torch.equal(result.vision, result.image)
    assert torch.equal(result.patches.flatten(2), result.image)


def test_a_decoder_may_hold_the_last_token_too():
    example = case("blip2_t5")
    ids = torch.tensor([[0, *zoo.ANSWER]])
    result = relevancy_from_inputs(example.model, {**example.inputs, "decoder_input_ids": ids}, zoo.ANSWER)
    plain = relevancy("blip2_t5")
    torch.testing.assert_close(result.encoder, plain.encoder, rtol=1e-4, atol=1e-5)
    assert (result.decoder[..., -1] == 0).all()


@pytest.mark.parametrize("family", ["onevision", "onevision_scaled", "llava_next", "qwen2_5_vl"])
def test_merging_is_the_same_in_half_precision(family):
    """32 dimensions round more than the digits of large numbers bear: then they are asked for bit by bit."""
    example = zoo.FAMILIES[family]()
    wanted = token_alignment.probe_alignment(example.model, example.inputs, example.image)
    half = {name: value.bfloat16() if value.is_floating_point() else value for name, value in example.inputs.items()}
    result = token_alignment.probe_alignment(example.model.to(torch.bfloat16), half, example.image)
    for name in ("vision", "image", "weight"):
        assert torch.equal(getattr(result, name), getattr(wanted, name))


@pytest.mark.parametrize("count", [2, 5, 6, 40])  # rows of a sample that has 6 tokens in blocks of 3
def test_many_rows_through_a_tower_are_the_same_as_few(count):
    generator = torch.Generator().manual_seed(0)
    rows, layers = torch.rand(2, count, 6, generator=generator), torch.rand(3, 4, 3, 3, generator=generator)
    relevancy = BlockRelevancy(rows, samples=2)
    expected = rows.clone()
    for abar in layers:
        add = relevancy.begin(0, 3, abar)
        add(0, abar[:, :2])
        add(2, abar[:, 2:])
        both = torch.stack([torch.block_diag(*abar[:2]), torch.block_diag(*abar[2:])])
        expected = expected + expected @ both
    torch.testing.assert_close(relevancy.values, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["llava", "paligemma", "qwen2_5_vl"])  # causal, in both directions, grouped heads
def test_stored_layers_give_the_rows_that_are_propagated(monkeypatch, family):
    by_storage = {}
    for stored in (True, False):
        monkeypatch.setattr(StoredRelevancy, "pays", lambda *sizes, stored=stored: stored)
        by_storage[stored] = relevancy(family)
    same(by_storage[True], by_storage[False], tolerance=1e-6)
    monkeypatch.undo()
    assert StoredRelevancy.pays(rows=512, length=682, layers=4, samples=1)
    assert not StoredRelevancy.pays(rows=64, length=704, layers=8, samples=1)  # rows take less time
    assert not StoredRelevancy.pays(rows=512, length=1500, layers=32, samples=1)  # 288 MB
