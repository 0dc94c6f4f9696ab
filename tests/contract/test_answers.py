"""Generation keeps ids, characters and log-probabilities, whatever the batch."""

from dataclasses import replace

import pytest
import torch
from helpers.contract_helpers import attention, extended, picture, predicting, said

from stethoscope.adapters.base import ForeignTokens
from stethoscope.core.errors import ConfigError
from stethoscope.core.types import Generation
from stethoscope.tracing.hooks import NAME

GREEDY = Generation(max_new_tokens=7)
SAMPLED = Generation(max_new_tokens=7, do_sample=True, temperature=0.9, top_p=0.95, seed=3)
BEAMS = Generation(max_new_tokens=7, num_beams=3)


def close(answer, other, tolerance=1e-4):
    assert answer.text == other.text
    assert answer.token_ids == other.token_ids
    assert answer.offsets == other.offsets
    assert answer.finished == other.finished
    assert answer.logprobs == pytest.approx(other.logprobs, abs=tolerance)


def teacher_forced(adapter, encoded, answer):
    """Log-probabilities by a plain pass of the model, written out."""
    ids = answer.token_ids
    with torch.no_grad():
        logits = adapter.model(**extended(adapter, encoded, ids)).logits[0, predicting(adapter, encoded, ids)]
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0].tolist()


@pytest.mark.parametrize("generation", [GREEDY, SAMPLED, BEAMS], ids=["greedy", "sampled", "beams"])
def test_a_batch_gives_what_its_prompts_give_alone(adapter, encoded, generation):
    assert len({prompt.spans.length for prompt in encoded}) > 1
    for together, prompt in zip(adapter.generate(encoded, generation), encoded, strict=True):
        close(together, adapter.generate([prompt], generation)[0])


@pytest.mark.parametrize("generation", [GREEDY, SAMPLED, BEAMS], ids=["greedy", "sampled", "beams"])
def test_logprobs_are_those_of_a_teacher_forced_pass(adapter, encoded, generation):
    for answer, prompt in zip(adapter.generate(encoded, generation), encoded, strict=True):
        assert answer.logprobs == pytest.approx(teacher_forced(adapter, prompt, answer), abs=1e-4)


def test_greedy_takes_the_most_probable_token(adapter, encoded):
    answer = adapter.generate(encoded[:1], GREEDY)[0]
    logits = adapter.trace(encoded[0], answer, ()).logits
    assert tuple(logits.argmax(-1).tolist()) == answer.token_ids


def test_sampling_goes_by_the_seed_alone(adapter, encoded):
    torch.manual_seed(0)
    first = adapter.generate(encoded, SAMPLED)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert adapter.generate(encoded, SAMPLED) == first
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)
    hot = replace(SAMPLED, temperature=3.0, top_p=1.0)
    assert len({adapter.generate(encoded[:1], replace(hot, seed=seed))[0].token_ids for seed in range(4)}) > 1


def test_tokens_cover_the_text(adapter, encoded):
    for answer in adapter.generate(encoded, replace(SAMPLED, max_new_tokens=30, temperature=2.0, top_p=1.0)):
        assert "".join(answer.tokens) == answer.text
        assert answer.offsets[0][0] == 0
        assert answer.offsets[-1][1] == len(answer.text)
        assert answer.text == answer.text.lstrip()


@pytest.mark.parametrize("text", ["Yes", "A cat and a dog lie on the table.", "a café, 日本 and 😀😀!", "no, no", ""])
def test_a_given_answer_keeps_its_text(adapter, encoded, text):
    answer = adapter.answer(encoded[0], text)
    assert answer.text == "".join(answer.tokens) == said(adapter, text)
    assert answer.finished
    if text:
        assert answer.logprobs == pytest.approx(teacher_forced(adapter, encoded[0], answer), abs=1e-4)


def test_each_byte_of_a_long_character_is_a_token_and_the_last_gets_it(adapter, encoded):
    if said(adapter, "日") != "日":
        pytest.skip("the tokenizer has no bytes")
    answer = adapter.answer(encoded[0], "a 日b")
    lengths = [end - start for start, end in answer.offsets]
    assert answer.tokens[answer.covering(2, 3)[0]].endswith("日")
    assert lengths.count(0) >= 1
    assert answer.covering(2, 3) == [index for index in answer.covering(2, 3) if lengths[index]]


@pytest.mark.parametrize("more", [0, 1], ids=["without an end token", "with one"])
def test_an_answer_of_its_own_is_read_back_from_its_ids_as_its_first_choice(adapter, encoded, more):
    for prompt, answer in zip(encoded, adapter.generate(encoded, GREEDY), strict=True):
        end = list(adapter.fingerprint()["ends"])[:more]
        given = adapter.answer(prompt, f" {answer.text}\n", token_ids=[*answer.token_ids, *end])
        close(replace(given, finished=answer.finished), answer)
        assert all(given.argmax)


def test_ids_of_another_text_or_vocabulary_are_refused(adapter, encoded):
    answer = adapter.answer(encoded[0], "a dog")
    with pytest.raises(
        ForeignTokens, match=r"the token ids decode to .*, not to 'a cat': they are another tokenizer's"
    ):
        adapter.answer(encoded[0], "a cat", token_ids=answer.token_ids)
    with pytest.raises(ForeignTokens, match="token id 99999999 is none of the"):
        adapter.answer(encoded[0], "a dog", token_ids=[99_999_999])


def test_ids_behind_a_stop_string_are_left_out(adapter, encoded):
    whole = adapter.answer(encoded[0], "a dog and a cat")
    cut = adapter.answer(encoded[0], "a dog", token_ids=whole.token_ids)
    assert cut.text == "a dog"
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]


def test_an_answer_cut_off_is_not_finished(adapter, encoded):
    answer = adapter.generate(encoded[1:2], Generation(max_new_tokens=2))[0]
    assert len(answer.token_ids) == 2
    assert not answer.finished


def test_an_answer_that_ends_is_finished_and_does_not_hold_the_end(adapter, encoded, monkeypatch):
    first = adapter.generate(encoded[1:2], GREEDY)[0]
    monkeypatch.setattr(adapter._tokens, "end_ids", (first.token_ids[3],))
    position = first.token_ids.index(first.token_ids[3])
    for answer in (adapter.generate(encoded[1:2], GREEDY)[0], adapter.generate(encoded, GREEDY)[1]):
        assert answer.finished
        assert answer.token_ids == first.token_ids[:position]


def test_generation_under_the_registered_function_equals_sdpa(adapter, encoded):
    before = adapter.generate(encoded, GREEDY)
    with attention(adapter.model, NAME):
        after = adapter.generate(encoded, GREEDY)
    for answer, other in zip(before, after, strict=True):
        close(answer, other)


@pytest.mark.parametrize(
    ("field", "value"), [("max_new_tokens", 0), ("temperature", 0.0), ("top_p", 0.0), ("top_p", 1.1), ("num_beams", 0)]
)
def test_settings_out_of_range_are_refused(adapter, encoded, field, value):
    with pytest.raises(ConfigError, match=field):
        adapter.generate(encoded, replace(SAMPLED, **{field: value}))


def test_an_empty_batch_is_no_answers(adapter):
    assert adapter.generate([], GREEDY) == []
    assert adapter.trace_batch([], []) == []


def test_images_decide_answers_not_only_prompts(adapter):
    question = "Please describe this image in detail."
    seen = {adapter.generate([adapter.encode(picture(s), question)], GREEDY)[0].logprobs for s in range(3)}
    assert len(seen) == 3
