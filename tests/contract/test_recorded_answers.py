"""What generation records gives the traces of a pass over the answers, and changes no answer."""

from dataclasses import replace

import pytest
from helpers.contract_helpers import NEAR, WAYS, picture, reuses, same

from stethoscope.core.types import Generation
from stethoscope.tracing.answer_recorder import RECORDED_REQUIREMENTS
from stethoscope.tracing.hooks import uses_sdpa

MORE = ("lens_entropy", "lens_top", "evidence", "peaks", "own", "layer_states")
REQUIRES = (("attention", "lens"), tuple(sorted(RECORDED_REQUIREMENTS)), ())


def records(adapter):
    """Whether answers can be recorded: caches go on, and all parts call SDPA (not ConvLLaVA's tower)."""
    return reuses(adapter) and uses_sdpa(adapter.model)


def answered(adapter, encoded, requires, generation):
    """Answer prompts, and return answers and prompts with the record, if there is one."""
    answers, kept = adapter.generate_with_cache(adapter.prefill(encoded, requires), generation)
    others = adapter.generate(encoded, generation)
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in others]
    return answers, kept


def assert_same_traces(adapter, kept, answers, requires):
    passes = adapter.trace_batch([replace(prompt, recorded=None) for prompt in kept], answers, requires)
    for trace, other in zip(adapter.trace_batch(kept, answers, requires), passes, strict=True):
        same(trace, other)
        for name in MORE:
            part, expected = getattr(trace, name), getattr(other, name)
            assert (part is None) == (expected is None)
            assert part is None or not part.numel() or (part.float() - expected.float()).abs().max() <= NEAR, name


@pytest.mark.parametrize("way", WAYS)
def test_recorded_answers_have_the_traces_of_a_pass(adapter, encoded, way, monkeypatch):
    for requires in REQUIRES:
        answers, kept = answered(adapter, encoded, requires, WAYS[way])
        recorded = [index for index, prompt in enumerate(kept) if prompt.recorded is not None]
        assert recorded == (list(range(len(encoded))) if records(adapter) else [])
        assert_same_traces(adapter, kept, answers, requires)
        if len(recorded) > 1:  # two of them, in another order, without any pass
            pair = [recorded[-1], recorded[0]]
            parts = [kept[index] for index in pair], [answers[index] for index in pair]
            assert_same_traces(adapter, *parts, requires)
            with monkeypatch.context() as patch:
                patch.setattr(type(adapter.model), "forward", None)
                adapter.trace_batch(*parts, requires)


def test_answers_about_one_picture_are_recorded_behind_their_common_prefix(adapter):
    if not records(adapter):
        pytest.skip("records nothing")
    questions = ("What is this?", "Is there a dog in this picture, or is it a cat?", "Why?")
    encoded = [adapter.encode(picture(5, 64, 48), question) for question in questions]
    with adapter.sharing_prefixes():
        answers, kept = answered(adapter, encoded, REQUIRES[1], Generation(max_new_tokens=4))
    assert all(prompt.recorded is not None for prompt in kept)
    assert_same_traces(adapter, kept, answers, REQUIRES[1])


def test_other_answers_and_other_parts_get_a_pass(adapter, encoded):
    answers, kept = answered(adapter, encoded, ("attention",), WAYS["greedy"])
    assert_same_traces(adapter, kept, [answer.until(1) for answer in answers], ("attention",))
    assert_same_traces(adapter, kept, answers, ("attention", "lens"))


def test_what_takes_the_last_token_or_changes_scores_is_not_recorded(adapter, encoded):
    for requires in (("attention", "hidden"), ("attention", "relevancy"), ("heads",)):
        assert all(prompt.recorded is None for prompt in answered(adapter, encoded, requires, WAYS["greedy"])[1])
    assert all(prompt.recorded is None for prompt in adapter.generate_with_cache(encoded, WAYS["greedy"])[1])
