"""Models whose language model has an encoder: one row of two distributions, the lens, relevancy, what ends where."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import T5Config, T5ForConditionalGeneration

from stethoscope.adapters.hf import HfAdapter
from stethoscope.core.errors import CaptureError
from stethoscope.core.types import Generation
from stethoscope.features import FeatureSet
from stethoscope.relevancy import relevancy_from_inputs, token_relevancy
from stethoscope.tracing.attention_recorder import RowAttentionRecorder
from stethoscope.tracing.logit_lens import Lens
from stethoscope.tracing.model_parts import Site
from stethoscope.tracing.trace import REQUIREMENTS, SEGMENTS, Spans

QUESTION = "Is there a dog in the image?"
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (56, 72, 3), dtype=np.uint8))


@pytest.fixture(scope="module", params=["blip-2-t5", "instructblip-t5"])
def adapter(request):
    prompt = "Question: {question} Answer:" if request.param.startswith("blip") else "{question}"
    adapter = HfAdapter(random_init="tiny", family=request.param, prompt=prompt, device="cpu", dtype="float32")
    adapter.setup()
    return adapter


@pytest.fixture(scope="module")
def encoded(adapter):
    return adapter.encode(IMAGE, QUESTION)


@pytest.fixture(scope="module")
def answer(adapter, encoded):
    return adapter.generate([encoded], Generation(max_new_tokens=6))[0]


@pytest.fixture(scope="module")
def traced(adapter, encoded, answer):
    return adapter.trace(encoded, answer, REQUIREMENTS)


@pytest.fixture(scope="module")
def plain(adapter, encoded, answer):
    """What a plain eager pass of the language model returns."""
    start = torch.tensor([[0, *answer.token_ids[:-1]]])
    adapter.model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            output = adapter.model(
                **encoded.inputs, decoder_input_ids=start, output_attentions=True, output_hidden_states=True
            )
    finally:
        adapter.model.set_attn_implementation("sdpa")
    return output.language_model_outputs


def close(actual, other, tolerance=5e-6):
    assert actual.shape == other.shape
    assert (actual - other).abs().max() <= tolerance


def test_answers_are_the_decoders_tokens_without_its_start(adapter, encoded, answer):
    with torch.no_grad():
        sequences = adapter.model.generate(**encoded.inputs, max_new_tokens=6, do_sample=False)
    assert sequences[0].tolist() == [0, *answer.token_ids]


def test_an_answer_ends_before_the_end_token(adapter, encoded, monkeypatch):
    head = adapter.model.language_model.lm_head.weight
    whole = adapter.generate([encoded], Generation(max_new_tokens=6))[0]
    monkeypatch.setattr(head, "data", head.data.clone())
    second = whole.token_ids[1]
    assert second != whole.token_ids[0]
    head.data[1], head.data[second] = head.data[second].clone(), head.data[1].clone()  # now </s> is said second
    ended = adapter.generate([encoded], Generation(max_new_tokens=6))[0]
    assert ended.finished
    assert ended.token_ids == whole.token_ids[:1]


def test_a_row_is_half_of_what_the_decoder_gives_the_prompt_and_half_the_answer(encoded, traced, plain):
    spans = encoded.spans
    crossing, own = torch.stack(plain.cross_attentions)[:, 0], torch.stack(plain.decoder_attentions)[:, 0]
    rest = [position for position in range(spans.length) if position not in {*spans.image, *spans.question}]
    assert rest
    parts = {
        "image": crossing[..., list(spans.image)].sum(-1),
        "question": crossing[..., list(spans.question)].sum(-1),
        "previous": own[..., 1:].sum(-1),
        "first": own[..., 0],
        "rest": crossing[..., rest].sum(-1),
    }
    expected = torch.stack([parts[name] for name in SEGMENTS], -1) / 2  # (L, H, T, 5)
    close(traced.mass, expected.permute(2, 0, 1, 3))
    close(traced.mass.sum(-1), torch.ones(traced.mass.shape[:3]))
    close(traced.mass[..., [0, 1, 4]].sum(-1), torch.full(traced.mass.shape[:3], 0.5))
    close(traced.image_attention, crossing[..., list(spans.image)].mean(1).transpose(0, 1) / 2)


def test_logits_and_lens_are_those_of_the_decoder(adapter, answer, traced, plain):
    close(traced.logits, plain.logits[0], 1e-4)
    ids = torch.tensor(answer.token_ids)[:, None]
    norm, head = adapter.model.language_model.decoder.final_layer_norm, adapter.model.language_model.lm_head
    layers = traced.lens_logprob.shape[1]
    assert layers == len(adapter.model.language_model.decoder.block)
    for layer in range(layers - 1):
        with torch.no_grad():
            logits = head(norm(plain.decoder_hidden_states[layer + 1][0]))
        close(traced.lens_logprob[:, layer], logits.log_softmax(-1).gather(-1, ids)[:, 0], 1e-4)


@pytest.mark.parametrize("scaled", [True, False])
def test_the_lens_scales_what_the_head_reads_where_the_model_does(scaled):
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=40, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_decoder_layers=2, num_heads=4,
        tie_word_embeddings=scaled, decoder_start_token_id=0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).eval()
    assert model.config.scale_decoder_outputs == scaled
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad(), Lens(model).listen(torch.tensor([[0, 1, 2]])) as heard:
        logits = model(input_ids=tokens, decoder_input_ids=torch.tensor([[0, 5, 6]])).logits
    assert len(heard) == 2
    with torch.no_grad():
        logprob = Lens(model).read(heard, logits, tokens)["lens_logprob"]  # it checks itself against the model's logits
        middle = model.lm_head(model.decoder.final_layer_norm(heard[0]) * (16**-0.5 if scaled else 1))
    close(logprob[..., 0], middle.log_softmax(-1).gather(-1, tokens[..., None])[..., 0], 1e-5)


def test_forward_inputs_hold_the_decoders_start_and_the_whole_answer(adapter, encoded, answer):
    model, inputs = adapter.forward_inputs(encoded, answer.token_ids)
    assert model is adapter.model
    assert inputs["decoder_input_ids"].tolist() == [[0, *answer.token_ids]]
    assert all(torch.equal(inputs[name], encoded.inputs[name]) for name in encoded.inputs)


@pytest.mark.parametrize("scope", ["row", "token"])
def test_relevancy_is_that_of_inputs_built_by_hand(adapter, answer, scope):
    text = f"Question: {QUESTION} Answer:" if "qformer_input_ids" not in adapter.encode(IMAGE, "a").inputs else QUESTION
    inputs = dict(adapter.processor(images=IMAGE, text=text, return_tensors="pt"))
    inputs["decoder_input_ids"] = torch.tensor([[0, *answer.token_ids]])
    expected = relevancy_from_inputs(adapter.model, inputs, answer.token_ids, scope=scope)
    relevancy = token_relevancy(adapter, IMAGE, QUESTION, answer, scope=scope)
    for name in ("encoder", "decoder", "vision", "patches"):
        torch.testing.assert_close(getattr(relevancy, name), getattr(expected, name))
    tokens = len(answer.token_ids)
    assert relevancy.patches.shape[2:] == (4, 4)
    assert (relevancy.patches[:, -1].flatten(1).sum(-1) > 0).all()
    assert relevancy.answer.shape[::2] == (tokens, tokens)
    parts = (relevancy.image, relevancy.question, relevancy.answer, relevancy.rest)
    torch.testing.assert_close(sum(part.sum(-1) for part in parts), relevancy.total)


def test_all_features_are_finite_and_follow_the_row(adapter, encoded, answer, traced):
    columns = FeatureSet().compute(traced)
    assert all(len(values) == len(answer.token_ids) for values in columns.values())
    image = columns["attn_image_l00"] + columns["attn_question_l00"]
    assert (image > 0).all()
    assert (image <= 0.5 + 1e-6).all()
    assert columns["attn_previous_l00"][0] == 0
    np.testing.assert_allclose(columns["attn_first_l00"][0], 0.5, atol=1e-6)  # there is nothing else to look back at


def test_right_padding_of_the_prompt_gets_no_attention(adapter, encoded, answer, traced):
    longer = adapter.encode(IMAGE, QUESTION + " Please describe this image in detail.")
    other = adapter.generate([longer], Generation(max_new_tokens=3))[0]
    assert longer.spans.length > encoded.spans.length
    together = adapter.trace_batch([encoded, longer], [answer, other])
    close(together[0].mass, traced.mass, 1e-5)
    close(together[0].logits, traced.logits, 1e-4)


def test_a_decoder_whose_cross_attention_is_not_heard_is_an_error():
    rows = RowAttentionRecorder(torch.tensor([[0]]), [Spans(3, (0,), (1,))], 3, decoder=1)
    rows.on_weights(Site("decoder.block.0.SelfAttention", "language", 0), torch.ones(1, 2, 1, 1))
    with pytest.raises(CaptureError, match="1 layers of self-attention were seen and 0 of cross-attention"):
        rows.finish()


def test_values_that_are_not_finite_name_the_cross_attention(adapter, encoded, answer):
    weight = adapter.model.language_model.decoder.block[1].layer[1].EncDecAttention.q.weight
    kept = weight.data.clone()
    weight.data.fill_(float("nan"))
    try:
        with pytest.raises(CaptureError, match=r"decoder\.block\.1\.layer\.1\.EncDecAttention .*not finite"):
            adapter.trace(encoded, answer)
    finally:
        weight.data.copy_(kept)


def test_heads_are_told_apart():
    """Hand-made maps of two heads and two answer tokens; the prompt is other, image, image, question, padding."""
    rows = RowAttentionRecorder(torch.tensor([[0, 1]]), [Spans(4, (1, 2), (3,))], 5, decoder=2)
    own = torch.tensor([[[[1.0, 0.0], [0.3, 0.7]], [[1.0, 0.0], [0.6, 0.4]]]])
    crossing = torch.tensor([[[[0.4, 0.1, 0.2, 0.3, 0.0]] * 2, [[0.1, 0.4, 0.3, 0.2, 0.0]] * 2]])
    rows.on_weights(Site("0.SelfAttention", "language", 0), own)
    rows.on_weights(Site("0.EncDecAttention", "cross", 0), crossing)
    rows.finish()
    expected = {
        "image": [[0.3, 0.7], [0.3, 0.7]],
        "question": [[0.3, 0.2], [0.3, 0.2]],
        "previous": [[0.0, 0.0], [0.7, 0.4]],
        "first": [[1.0, 1.0], [0.3, 0.6]],
        "rest": [[0.4, 0.1], [0.4, 0.1]],
    }
    close(rows.mass()[0, :, 0], torch.tensor([expected[name] for name in SEGMENTS]).permute(1, 2, 0) / 2, 1e-6)
    close(rows.image()[0][:, 0], torch.tensor([[0.25, 0.25]] * 2) / 2, 1e-6)


def test_decoder_only_models_have_no_decoder_of_their_own():
    adapter = HfAdapter(random_init="tiny", family="blip-2-opt", prompt="Question: {question} Answer:", device="cpu")
    encoded = adapter.encode(IMAGE, QUESTION)
    _, inputs = adapter.forward_inputs(encoded, [5, 6])
    assert "decoder_input_ids" not in inputs
    assert inputs["input_ids"][0, -2:].tolist() == [5, 6]
