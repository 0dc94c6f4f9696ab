"""Questions about one picture that share its prefix get the answers that they get alone, in every family."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from helpers.contract_helpers import NEAR, REQUIREMENTS, WAYS, picture, reuses, same

from stethoscope.adapters.prefixes import common_length
from stethoscope.core.types import Generation
from stethoscope.mitigation.decoding import Cut, FirstLogitBoosting, NoImageContrast, NoiseContrast

ABOUT = (
    (0, "Is there a dog in the image?"),
    (0, "Is there a cat in the image, or is there none at all?"),
    (1, "Yes?"),
    (0, "Yes?"),
    (1, "Please describe this image in detail."),
    (1, "Yes?"),
    (2, "Is there a dog in the image?"),
)
"""Numbers of pictures, and questions: several about the first two, one about the last."""


@pytest.fixture(scope="module")
def prompts(adapter):
    if not reuses(adapter):
        pytest.skip("shares nothing")
    images = [picture(50 + seed) for seed in range(3)]
    return [adapter.encode(images[index], question) for index, question in ABOUT]


@pytest.fixture(scope="module")
def expected(adapter, prompts):
    """Greedy answers of the prompts alone."""
    return alone(adapter, prompts, WAYS["greedy"])


@contextmanager
def counted(adapter):
    """The number of pictures that every pass reads, as they come."""
    rows = []

    def count(module, arguments, options):
        if options.get("pixel_values") is not None or options.get("mm_encoder_outputs"):
            rows.append(len(options["input_ids"]))

    handle = adapter.model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()


def equal(answers, others):
    for answer, other in zip(answers, others, strict=True):
        assert answer.token_ids == other.token_ids
        assert (answer.text, answer.finished) == (other.text, other.finished)
        assert answer.logprobs == pytest.approx(other.logprobs, abs=NEAR)


def alone(adapter, prompts, generation):
    return [adapter.generate([prompt], generation)[0] for prompt in prompts]


def test_only_causal_models_share(adapter):
    prompts = [adapter.encode(picture(50), question) for _, question in ABOUT[:2]]
    assert (adapter._generator.prefixes.compute(prompts) is not None) == reuses(adapter)


@pytest.mark.parametrize("way", ["sampled", "stopped"])
def test_a_batch_about_few_pictures_gives_what_its_prompts_give_alone(adapter, prompts, way):
    with counted(adapter) as rows:
        answers = adapter.generate(prompts, WAYS[way])
    assert rows == [3]
    equal(answers, alone(adapter, prompts, WAYS[way]))


@pytest.mark.parametrize(
    "size", [1, 3, pytest.param(2, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow)]
)
def test_later_batches_go_on_from_the_last_picture(adapter, prompts, expected, size):
    order = sorted(range(len(prompts)), key=lambda index: ABOUT[index][0])
    answers = {}
    with counted(adapter) as rows, adapter.sharing_prefixes():
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            generated = adapter.generate([prompts[index] for index in batch], WAYS["greedy"])
            answers.update(zip(batch, generated, strict=True))
    equal([answers[index] for index in range(len(prompts))], expected)
    assert sum(rows) == 3
    assert adapter._generator.prefixes._last is None  # nothing stays behind the block
    assert adapter.generate(prompts[:1], WAYS["greedy"]) == expected[:1]


def test_traces_behind_shared_prefixes_are_those_of_whole_passes(adapter, prompts, expected):
    answers, kept = adapter.generate_with_cache(prompts, WAYS["greedy"])
    equal(answers, expected)
    assert all(prompt.cache.length == prompt.spans.length for prompt in kept)
    for requires in REQUIREMENTS[:2]:
        whole = adapter.trace_batch(prompts, answers, requires)
        for trace, other in zip(adapter.trace_batch(kept, answers, requires), whole, strict=True):
            same(trace, other)


@pytest.mark.parametrize(
    "method",
    [
        NoiseContrast(),
        *(pytest.param(m, marks=pytest.mark.slow) for m in (Cut(), FirstLogitBoosting(), NoImageContrast())),
    ],
    ids=lambda method: method.name,
)
def test_mitigations_change_scores_behind_shared_prefixes_as_alone(adapter, prompts, method):
    generation = Generation(max_new_tokens=4, mitigation=method)
    equal(adapter.generate(prompts, generation), alone(adapter, prompts, generation))


def test_prompts_with_hidden_tokens_share_nothing(adapter, prompts):
    hidden = []
    for prompt in prompts[:2]:
        mask = prompt.inputs["attention_mask"].clone()
        mask[:, list(prompt.spans.image)] = 0
        hidden.append(replace(prompt, inputs={**prompt.inputs, "attention_mask": mask}))
    with counted(adapter) as rows:
        answers = adapter.generate(hidden, WAYS["greedy"])
    assert rows == [2]
    equal(answers, alone(adapter, hidden, WAYS["greedy"]))


def test_changed_weights_are_read_again(adapter, prompts):
    with adapter.sharing_prefixes(), counted(adapter) as rows:
        adapter.generate(prompts[:1], WAYS["greedy"])
        with torch.no_grad():
            adapter.model.get_output_embeddings().weight.mul_(1.0)
        adapter.generate(prompts[1:2], WAYS["greedy"])
        adapter.generate(prompts[3:4], WAYS["greedy"])
    assert rows == [1, 1]


def test_common_prefixes_leave_a_token_to_read():
    assert common_length([[1, 2, 3], [1, 2, 3, 4]]) == 2
    assert common_length([[1, 2], [3, 2]]) == 0
