"""What the passes over prompt and answer keep in memory, and when they let it go."""

import weakref

import pytest
import torch
from helpers import zoo

from stethoscope.relevancy import token_alignment
from stethoscope.relevancy.attention_backward import PrefixGradient
from stethoscope.relevancy.shared_passes import AnswerPass, PrefixCache, PromptPass
from stethoscope.tracing.model_parts import frozen


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_factors_give_the_gradient_of_a_prefix(groups):
    weights, vectors = torch.rand(2, 4, 3, 5), torch.rand(2, 4, 3, 6)
    by_head = torch.einsum("bhrk,bhrd->bhkd", weights, vectors)
    expected = by_head.unflatten(1, (groups, -1)).sum(2)
    gradient = torch.ones(2, groups, 5, 6)
    factors = PrefixGradient(weights, vectors)
    factors.add_to(gradient)
    torch.testing.assert_close(gradient, expected + 1)
    keys = torch.rand(2, groups, 5, 6)
    torch.testing.assert_close(factors.product(keys), (keys * expected).sum())


def test_a_cache_of_a_prefix_copies_nothing():
    keys, values, own = torch.rand(1, 2, 5, 4), torch.rand(1, 2, 5, 4), torch.rand(1, 2, 1, 4)
    cache = PrefixCache([(keys, values)])
    assert (cache.layers[0].keys.data_ptr(), cache.layers[0].values.data_ptr()) == (keys.data_ptr(), values.data_ptr())
    longer, _ = cache.update(own, own, 0)
    assert longer.shape[2] == 6
    assert cache.get_seq_length() == 5


def test_keys_and_values_are_released_before_the_prompt_runs_backward():
    case = zoo.llava()
    count, live = len(zoo.ANSWER), []
    ids = case.inputs["input_ids"]
    prompt = PromptPass(case.model, {"input_ids": ids[:, :-count], "pixel_values": case.inputs["pixel_values"]})
    keys = [weakref.ref(part) for pair in prompt.layers for part in pair]
    answer_pass = AnswerPass(prompt)
    with answer_pass.recorded():
        logits = case.model(**answer_pass.inputs(ids[:, -count - 1 : -1])).logits
    root = logits[0, torch.arange(count), torch.tensor(zoo.ANSWER)].sum()

    def receive(call, layer, is_first, block):
        live.append((call.skipped, sum(key() is not None for key in keys)))

    answer_pass.backward(root, count, receive)
    assert {number for skipped, number in live if skipped} == {len(keys)}
    assert {number for skipped, number in live if not skipped} == {0}


def test_the_probe_of_the_alignment_keeps_no_graph_of_further_layers():
    def saved(layers):
        sizes = []
        config = zoo.llava().model.config
        config.vision_config.num_hidden_layers = layers
        model = zoo.T.LlavaForConditionalGeneration(config).eval()
        inputs, image = zoo.llava().inputs, (zoo.llava().inputs["input_ids"][0] == zoo.IMAGE).nonzero()[:, 0]
        pack = lambda part: sizes.append(part.nbytes) or part  # noqa: E731
        with frozen(model), torch.autograd.graph.saved_tensors_hooks(pack, lambda part: part):
            alignment = token_alignment.probe_alignment(model, inputs, image)
        return sum(sizes), alignment.image.tolist()

    assert saved(8) == saved(3)


def test_generation_writes_behind_the_keys_of_the_graph():
    case = zoo.llava()
    inputs = {name: case.inputs[name] for name in ("input_ids", "pixel_values")}
    assert PromptPass(case.model, inputs, recompute=False).growing_cache() is None  # small models copy them
    prompt = PromptPass(case.model, inputs, recompute=False, sparse=True)
    kept = [part.clone() for pair in prompt.layers for part in pair]
    cache = prompt.growing_cache()
    shared = [(own.keys, own.values) for own in cache.layers]
    assert [part.data_ptr() for pair in shared for part in pair] == [
        part.data_ptr() for pair in prompt.layers for part in pair
    ]
    assert prompt.growing_cache() is None  # two answers would overwrite each other
    own = torch.rand(*shared[0][0].shape[:2], 1, shared[0][0].shape[3])
    keys, _ = cache.update(own, own, 0)
    assert keys.data_ptr() == prompt.layers[0][0].data_ptr()
    assert torch.equal(keys[:, :, -1:], own)
    assert all(torch.equal(part, copy) for part, copy in zip(sum(prompt.layers, ()), kept, strict=True))
    del cache, shared, keys
    assert prompt.growing_cache() is not None
