"""Spans are what they claim to be, and what is cached changes nothing."""

import pytest
import torch
from helpers.contract_helpers import QUESTIONS, phrased, picture, reads_by_queries, said, squared

from stethoscope.core.errors import DataError


def ids_of(encoded):
    return encoded.inputs["input_ids"][0]


def test_question_tokens_decode_to_the_question(adapter, encoded):
    for prompt, question in zip(encoded, QUESTIONS, strict=True):
        ids = ids_of(prompt)[list(prompt.spans.question)]
        assert adapter.processor.tokenizer.decode(ids).strip() == phrased(adapter, question)
        assert prompt.question == question
        assert question in prompt.text


@pytest.mark.parametrize("question", ["a", "IMAGE: USER: ASSISTANT", "How many café crèmes? 日本", "a  b\nc"])
def test_question_is_found_where_its_words_occur_elsewhere_too(adapter, question):
    prompt = adapter.encode(picture(0), question)
    words = adapter.processor.tokenizer.decode(ids_of(prompt)[list(prompt.spans.question)], skip_special_tokens=True)
    assert words.strip() == said(adapter, phrased(adapter, question)).strip()
    assert list(prompt.spans.question) == list(range(prompt.spans.question[0], prompt.spans.question[-1] + 1))


def test_image_span_covers_exactly_the_image_tokens(adapter, encoded):
    for prompt in encoded:
        expected = (ids_of(prompt) == adapter.model.config.image_token_id).nonzero()[:, 0].tolist()
        assert list(prompt.spans.image) == expected
        assert len(expected) > 1
        assert prompt.spans.length == len(ids_of(prompt))
        assert not set(prompt.spans.image) & set(prompt.spans.question)


def test_grids_account_for_every_image_token(adapter, encoded):
    for prompt in encoded:
        if reads_by_queries(adapter):  # every query reads the whole picture
            assert prompt.spans.grids == prompt.spans.separators == ()
            continue
        assert set(prompt.spans.separators) <= set(prompt.spans.image)
        tokens = sum(rows * columns for rows, columns in prompt.spans.grids)
        assert tokens + len(prompt.spans.separators) == len(prompt.spans.image)


def test_cached_encodings_are_the_processors_own(adapter):
    shown = [(picture(seed), question) for question in QUESTIONS for seed in range(2)]
    twice = [[adapter.encode(image, question) for image, question in shown] for _ in range(2)]
    for (image, _), first, second in zip(shown, *twice, strict=True):
        begun = first.text.startswith(adapter.processor.tokenizer.bos_token or " ")
        shown_image = squared(adapter, image)
        direct = adapter.processor(
            images=shown_image, text=first.text, return_tensors="pt", add_special_tokens=not begun
        )
        direct.pop("labels", None)  # PaliGemma's, for training
        assert set(direct) == set(first.inputs)
        for name, value in direct.items():
            assert torch.equal(value, first.inputs[name])
            assert torch.equal(value, second.inputs[name])
        assert first.spans == second.spans


def test_other_image_modes_are_read_as_rgb(adapter):
    for mode in ("L", "RGBA", "CMYK", "P"):
        image = picture(0).convert(mode)
        direct, converted = adapter.encode(image, "a"), adapter.encode(image.convert("RGB"), "a")
        assert torch.equal(direct.inputs["pixel_values"], converted.inputs["pixel_values"])


def test_a_question_that_holds_the_placeholder_is_refused(adapter):
    token = adapter.processor.tokenizer.convert_ids_to_tokens(adapter.model.config.image_token_id)
    with pytest.raises(DataError, match="placeholder"):
        adapter.encode(picture(0), f"what is {token}?")


def test_a_prompt_longer_than_the_context_is_refused_before_the_model_runs(adapter):
    context = getattr(adapter.model.config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        pytest.skip("relative positions have no end")
    with pytest.raises(DataError, match=f"reads fewer than {context:,}"):
        adapter.encode(picture(0), "a b " * context)
