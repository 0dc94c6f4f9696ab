"""Relevancy behind an adapter: from image, question and answer to parts and patches."""

import pytest
import torch
from helpers.contract_helpers import QUESTIONS, has_encoder, picture, predicting

from stethoscope.relevancy import relevancy_from_inputs, token_relevancy


@pytest.mark.parametrize("scope", ["row", "token"])
def test_parts_of_an_answer(adapter, encoded, answers, scope):
    answer, spans = answers[1], encoded[1].spans
    relevancy = token_relevancy(adapter, picture(1), QUESTIONS[1], answer, scope=scope)
    tokens = len(answer.token_ids)
    assert relevancy.first == predicting(adapter, encoded[1], answer.token_ids).start
    assert (relevancy.image_positions, relevancy.question_positions) == (spans.image, spans.question)
    assert relevancy.image.shape[::2] == (tokens, len(spans.image))
    assert relevancy.question.shape[::2] == (tokens, len(spans.question))
    assert relevancy.answer.shape[::2] == (tokens, tokens)
    parts = (relevancy.image, relevancy.question, relevancy.answer, relevancy.rest)
    torch.testing.assert_close(sum(part.sum(-1) for part in parts), relevancy.total)
    assert (relevancy.answer[0] == 0).all()
    assert (relevancy.image[:, -1].sum(-1) > 0).all()  # early layers of Gemma 3 may see no image through their window
    assert relevancy.tiles is not None
    assert (relevancy.vision[:, -1].sum(-1) > 0).all()


def test_a_text_is_tokenised_and_its_ids_are_used(adapter):
    text = "A cat and a dog."
    relevancy = token_relevancy(adapter, picture(0), QUESTIONS[0], text, layers="final", tokens=[1])
    encoded = adapter.encode(picture(0), QUESTIONS[0])
    ids = adapter.answer(encoded, text).token_ids
    model, inputs = adapter.forward_inputs(encoded, ids)
    assert inputs["decoder_input_ids" if has_encoder(adapter) else "input_ids"][0, -len(ids) :].tolist() == list(ids)
    expected = relevancy_from_inputs(model, inputs, ids, layers="final", tokens=[1])
    for part in ("encoder", "decoder") if has_encoder(adapter) else ("llm",):
        assert torch.equal(getattr(relevancy, part), getattr(expected, part))
