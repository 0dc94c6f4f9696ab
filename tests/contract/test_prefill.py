"""Generation, traces and relevancy that go on from one pass over the prompts are those of passes of their own."""

import gc
import weakref

import pytest
import torch
from helpers.contract_helpers import reuses

from stethoscope.adapters import prefill
from stethoscope.core.types import Generation
from stethoscope.relevancy import attention_backward, relevancy_from_inputs
from stethoscope.relevancy.engine import _relevancy
from stethoscope.relevancy.result import read_layout
from stethoscope.tracing.hooks import selected

GREEDY = Generation(max_new_tokens=7)
PARTS = ("llm", "vision", "saliency")


def whole_pass(adapter, prompt, answer):
    """Relevancy from one ordinary pass over prompt and answer."""
    model, inputs = adapter.forward_inputs(prompt, answer.token_ids)
    with torch.enable_grad(), selected(model):
        layout = read_layout(model, inputs, answer.token_ids)
        return _relevancy(model, inputs, layout, "row", "eq10", True, None, attention_backward.BUDGET, False)[0]


def near(relevancy, expected):
    for name in PARTS:
        part, other = getattr(relevancy, name), getattr(expected, name)
        assert (part is None) == (other is None)
        if part is not None:
            assert part.shape == other.shape
            assert (part - other).abs().max() <= 2e-5 * other.abs().max(), name


@pytest.mark.parametrize(
    ("room", "share", "kept"), [(2**28, 1, "whole"), (2**28, 0, "sparse"), (2**17, 1, "inputs")],
    ids=["graphs kept", "sparse graphs kept", "layers run again"],
)  # fmt: skip
def test_answers_and_relevancy_behind_a_prefill(adapter, encoded, room, share, kept, monkeypatch):
    if not reuses(adapter):
        assert [prompt.cache for prompt in adapter.prefill(encoded)] == [None] * len(encoded)
        pytest.skip("runs no prompt before it is answered")
    monkeypatch.setattr(prefill, "_GRAPH_BYTES", room)
    monkeypatch.setattr(prefill, "_WHOLE_SHARE", share)
    monkeypatch.setattr(prefill.memory, "input_bytes", lambda model, length: 0)
    prompts = adapter.prefill(encoded)
    assert all(prompt.cache.graph is not None for prompt in prompts)
    graph = prompts[0].cache.graph
    assert ("inputs" if graph.recompute else "sparse" if graph.sparse else "whole") == kept
    answers, behind = adapter.generate_with_cache(prompts, GREEDY)
    assert [prompt.cache for prompt in behind] == [prompt.cache for prompt in prompts]
    alone = adapter.generate(encoded, GREEDY)
    for answer, other in zip(answers, alone, strict=True):
        assert answer.token_ids == other.token_ids
        assert answer.logprobs == pytest.approx(other.logprobs, abs=5e-5)
    answers[1] = answers[1].until(min(2, len(answers[1].token_ids)))
    requires = ("attention", "lens", "relevancy", "no_image")
    traces = adapter.trace_batch(behind, answers, requires)
    others = adapter.trace_batch(encoded, answers, requires[:2])
    for trace, other, prompt, answer in zip(traces, others, encoded, answers, strict=True):
        for name in ("logits", "mass", "image_attention", "lens_logprob"):
            assert (getattr(trace, name) - getattr(other, name)).abs().max() <= 5e-5, name
        near(trace.relevancy, whole_pass(adapter, prompt, answer))
        assert trace.relevancy.question_positions == prompt.spans.question
    assert all(prompt.cache.graph.spent for prompt in behind)
    for trace, other in zip(adapter.trace_batch(behind[:2], answers[:2], ["relevancy"]), traces, strict=False):
        near(trace.relevancy, other.relevancy)  # whose graphs are spent


def test_a_graph_serves_all_of_its_prompts_or_none_and_goes_with_them(adapter, encoded):
    if not reuses(adapter):
        pytest.skip("runs no prompt before it is answered")
    pair = adapter.prefill([encoded[0], encoded[0]])
    answers = adapter.generate(pair, GREEDY)
    (single,) = adapter.trace_batch(pair[1:], answers[1:], ["relevancy"])
    shared = len(pair[0].cache.graph.inputs["input_ids"]) == 2
    assert pair[1].cache.graph.spent is not shared
    both = adapter.trace_batch(pair[::-1], answers, ["relevancy"])
    for trace in (single, *both):
        near(trace.relevancy, whole_pass(adapter, encoded[0], answers[0]))
    graph = weakref.ref(pair[0].cache.graph)
    del pair
    gc.collect()
    assert graph() is None


def test_states_of_the_prompt_come_from_the_prefill(adapter, encoded, answers):
    if not reuses(adapter):
        pytest.skip("runs no prompt before it is answered")
    requires = ("heads", "states", "image_lens")
    prompts = adapter.prefill(encoded, (*requires, "relevancy"))
    assert all(prompt.cache.graph.hidden for prompt in prompts)
    assert not any(prompt.cache for prompt in adapter.prefill(encoded, requires))
    calls = []
    count = adapter.model.register_forward_pre_hook(
        lambda module, given, options: calls.append("pixel_values" in options), with_kwargs=True
    )
    traces = adapter.trace_batch(prompts, answers, (*requires, "relevancy"))
    count.remove()
    assert not any(calls)  # no picture is read again
    for trace, other in zip(traces, adapter.trace_batch(encoded, answers, requires), strict=True):
        for name in ("patch_top", "patch_peak", "prefix", "image_probability", "instruction_probability"):
            part, expected = getattr(trace.states, name), getattr(other.states, name)
            assert part.shape == expected.shape
            assert (part - expected).abs().max() <= 5e-5 * max(1, expected.abs().max()), name
        for name in ("token", "image", "instruction", "prompt_end"):
            for layer, expected in getattr(other.states, name).items():
                part = getattr(trace.states, name)[layer]
                assert (part - expected).abs().max() <= 5e-5 * max(1, expected.abs().max()), name
        assert torch.equal(trace.states.sinks, other.states.sinks)
        assert (trace.image_lens - other.image_lens).abs().max() <= 5e-5
        assert (trace.heads.mass - other.heads.mass).abs().max() <= 5e-5


def test_relevancy_from_inputs_is_that_of_a_whole_pass(adapter, encoded, answers):
    if not reuses(adapter):
        pytest.skip("has whole passes alone")
    model, inputs = adapter.forward_inputs(encoded[0], answers[0].token_ids)
    near(relevancy_from_inputs(model, inputs, answers[0].token_ids), whole_pass(adapter, encoded[0], answers[0]))
