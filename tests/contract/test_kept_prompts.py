"""What generation leaves for a trace, and what several answers share, changes no value; and nothing of it stays."""

import gc
import weakref

import pytest
import torch
from helpers.contract_helpers import REQUIREMENTS, WAYS, picture, reuses, same

from stethoscope.core.types import Answer, Generation


@pytest.mark.parametrize("way", WAYS)
def test_traces_behind_kept_prompts_are_those_of_whole_passes(adapter, encoded, way):
    answers, kept = adapter.generate_with_cache(encoded, WAYS[way])
    assert answers == adapter.generate(encoded, WAYS[way])
    assert [trace.cache is not None for trace in kept] == [reuses(adapter)] * len(encoded)
    answers[1] = answers[1].until(
        min(2, len(answers[1].token_ids))
    )  # of different lengths, whatever the model has written
    for requires in REQUIREMENTS:
        whole = adapter.trace_batch(encoded, answers, requires)
        for trace, other in zip(adapter.trace_batch(kept, answers, requires), whole, strict=True):
            same(trace, other)
        same(adapter.trace(kept[2], answers[2], requires), whole[2])
        pair = adapter.trace_batch([kept[2], kept[0]], [answers[2], answers[0]], requires)
        for trace, other in zip(pair, (whole[2], whole[0]), strict=True):
            same(trace, other)


def test_prompts_kept_by_several_calls_and_not_kept_go_together(adapter, encoded):
    (first, second), kept = adapter.generate_with_cache(encoded[:2], WAYS["greedy"])
    (third,), more = adapter.generate_with_cache(encoded[2:], WAYS["greedy"])
    answers, requires = [first, second, third], ("attention", "no_image")
    whole = adapter.trace_batch(encoded, answers, requires)
    for prompts in ([*kept, *more], [kept[0], encoded[1], *more]):
        for trace, other in zip(adapter.trace_batch(prompts, answers, requires), whole, strict=True):
            same(trace, other)


def test_hidden_states_come_from_a_whole_pass(adapter, encoded):
    if not reuses(adapter):
        pytest.skip("keeps nothing")
    answers, kept = adapter.generate_with_cache(encoded, WAYS["greedy"])
    for trace, other in zip(
        adapter.trace_batch(kept, answers, ["states", "heads"]),
        adapter.trace_batch(encoded, answers, ["states", "heads"]),
        strict=True,
    ):
        same(trace, other)
        assert torch.equal(trace.states.patch_top, other.states.patch_top)


def test_beams_leave_nothing(adapter, encoded):
    answers, kept = adapter.generate_with_cache(encoded[:1], Generation(max_new_tokens=3, num_beams=2))
    assert kept[0].cache is None
    assert len(adapter.trace(kept[0], answers[0], ()).logits) == len(answers[0].token_ids)


def test_kept_prompts_do_not_outlive_the_prompts_and_traces(adapter, encoded):
    if not reuses(adapter):
        pytest.skip("keeps nothing")
    answers, kept = adapter.generate_with_cache(encoded, WAYS["greedy"])
    held = [weakref.ref(part) for prompt in kept for layer in prompt.cache.layers for part in layer]
    traces = adapter.trace_batch(kept, answers, ("attention", "blank", "no_image"))
    del kept
    gc.collect()
    assert traces
    assert not any(reference() is not None for reference in held)


def test_blank_prompts_are_computed_once_and_again_for_other_weights_or_hooks(adapter, encoded, monkeypatch):
    if not reuses(adapter):
        pytest.skip("reads blank pictures in whole passes")
    ids = adapter.generate(encoded, WAYS["greedy"])
    calls = []

    def counted(module, arguments, options):
        calls.append(options.get("pixel_values") is not None)

    handle = adapter.model.register_forward_pre_hook(counted, with_kwargs=True)
    try:
        adapter.trace_batch(encoded, ids, ("blank",))
        other = [adapter.encode(picture(9 + seed, *size), prompt.question) for seed, (prompt, size) in enumerate(
            zip(encoded, ((72, 56), (72, 56), (100, 40)), strict=True)
        )]  # fmt: skip
        calls.clear()
        adapter.trace(other[0], ids[0], ("blank",))
        assert calls == [True, False]  # the picture's own pass, and the answer behind the blank one
        weight = adapter.model.get_output_embeddings().weight
        with torch.no_grad():
            weight.mul_(1.0)
        calls.clear()
        adapter.trace(other[0], ids[0], ("blank",))
        assert calls == [True, True, False]
        steering = adapter.model.get_output_embeddings().register_forward_hook(lambda module, given, out: out)
        calls.clear()
        adapter.trace(other[0], ids[0], ("blank",))
        steering.remove()
        assert calls == [True, True, False]
    finally:
        handle.remove()


def test_relevancy_of_several_answers_is_that_of_each(adapter):
    question = "What is in the image?"
    encoded = [adapter.encode(picture(seed), question) for seed in range(3)]
    ids = adapter.generate(encoded, Generation(max_new_tokens=8))
    answers = [
        ids[0],
        *(prompt.until(min(length, len(prompt.token_ids))) for length, prompt in zip((3, 5), ids[1:], strict=True)),
    ]
    together = adapter.trace_batch(encoded, answers, ["relevancy"])
    for prompt, answer, trace in zip(encoded, answers, together, strict=True):
        alone, together_relevancy = adapter.trace(prompt, answer, ["relevancy"]).relevancy, trace.relevancy
        assert (
            together_relevancy.tokens,
            together_relevancy.image_positions,
            together_relevancy.question_positions,
        ) == (
            alone.tokens,
            alone.image_positions,
            alone.question_positions,
        )
        for name in ("llm", "decoder", "encoder", "vision", "tiles", "saliency", "query_text"):
            part, expected = getattr(together_relevancy, name), getattr(alone, name)
            assert (part is None) == (expected is None)
            if expected is not None:
                assert part.shape == expected.shape
                assert (part - expected).abs().max() <= 2e-5 * expected.abs().max(), name


def test_an_empty_answer_behind_a_kept_prompt(adapter, encoded):
    _, kept = adapter.generate_with_cache(encoded[:1], WAYS["greedy"])
    trace = adapter.trace(kept[0], Answer("", (), (), (), True), ("attention", "lens", "blank"))
    assert len(trace.logits) == len(trace.mass) == len(trace.lens_rank) == len(trace.blank_logits) == 0
