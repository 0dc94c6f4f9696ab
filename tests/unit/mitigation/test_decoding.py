"""Decoding methods, compared with two whole passes per step, without a cache, written down from the papers.

The embedded model is fast, a family of every kind slow.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.contract_helpers import load, picture
from transformers import LogitsProcessor

import stethoscope
from stethoscope.core.errors import CapabilityError, ConfigError
from stethoscope.core.types import Generation
from stethoscope.mitigation.decoding import Cut, FirstLogitBoosting, NoImageContrast, NoiseContrast, without_image
from stethoscope.tracing.interventions import noised

STEPS = 10
METHODS = [
    Cut(),
    Cut(0.5),
    FirstLogitBoosting(gamma=0.6, rate=0.3),
    NoImageContrast(alpha=0.9, rate=0.2),
    NoImageContrast(weight=0.5, beta=0.1),
    NoiseContrast(),
]
FAMILIES = ["llava-1.5-7b", "qwen2.5-vl-3b", "gemma-3-4b", "blip2-opt-2.7b", "instructblip-flan-t5-xl"]


class Recorder(LogitsProcessor):
    """Keep the scores of every step."""

    def __init__(self):
        self.scores = []

    def __call__(self, input_ids, scores):
        self.scores.append(scores.clone())
        return scores


@pytest.fixture(scope="module", params=["testbed", *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES)])
def adapter(request):
    torch.set_num_threads(1)
    return load(request.param, *([] if request.param == "testbed" else ["model.random_init=tiny"]))


@pytest.fixture(scope="module")
def prompts(adapter):
    questions = ["Please describe this image in detail.", "Is there a dog in the image?", "What is this?"]
    return [adapter.encode(picture(seed, 200, 160), question) for seed, question in enumerate(questions)]


def recorded(adapter, prompts, method):
    """Scores of every step, (steps, B, V), and the ids of every answer with the end token where it has one."""
    model, arguments = adapter.prepare_generate(prompts, Generation(max_new_tokens=STEPS, mitigation=method))
    recorder = Recorder()
    arguments["logits_processor"] = [*arguments["logits_processor"], recorder]
    sequences = model.generate(**arguments).sequences
    return torch.stack(recorder.scores), sequences[:, -len(recorder.scores) :]


def last_logits(model, inputs):
    with torch.inference_mode():
        return model(**inputs).logits[0, -1].double().numpy()


def whole_pass(adapter, prompt, ids):
    """Logits after the prompt and some answer tokens, in one pass over all of them."""
    model, inputs = adapter.forward_inputs(prompt, ids)
    return last_logits(model, inputs)


def text_only(adapter, prompt, ids):
    """Logits without the image: image tokens are taken out of the sequence, or hidden in an encoder."""
    if prompt.inputs.get("decoder_input_ids") is not None or adapter.model.config.get_text_config().is_encoder_decoder:
        mask = prompt.inputs["attention_mask"].clone()
        mask[:, list(prompt.spans.image)] = 0
        return last_logits(*_with(adapter, prompt, ids, attention_mask=mask))
    image = set(prompt.spans.image)
    kept = [token for index, token in enumerate(prompt.inputs["input_ids"][0].tolist()) if index not in image]
    model = adapter.model
    text_model = model.language_model if model.config.model_type == "blip-2" else model
    return last_logits(text_model, {"input_ids": torch.tensor([[*kept, *ids]])})


def _with(adapter, prompt, ids, **changed):
    model, inputs = adapter.forward_inputs(prompt, ids)
    return model, {**inputs, **changed}


def noisy(adapter, prompt, ids, step=500):
    pixels = noised(prompt.inputs["pixel_values"], step).to(adapter.model.dtype)
    return last_logits(*_with(adapter, prompt, ids, pixel_values=pixels))


def softmax(logits):
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def expected(adapter, prompt, ids, method, forbidden):
    """Scores after some answer tokens, from the papers' formulas and whole passes."""
    step = len(ids)
    z = whole_pass(adapter, prompt, ids)
    z[forbidden] = -1e9  # finite, so that nothing becomes 0 times infinity
    p = softmax(z)
    if isinstance(method, Cut):
        result = z
    elif isinstance(method, FirstLogitBoosting):
        result = z + method.gamma * (1 - math.exp(-method.rate * step)) * whole_pass(adapter, prompt, [])
    elif isinstance(method, NoiseContrast):
        result = (1 + method.alpha) * z - method.alpha * noisy(adapter, prompt, ids)
    elif method.weight is not None:
        gamma = 1 + method.weight  # PAI: gamma z - (gamma - 1) z'
        result = gamma * z - (gamma - 1) * text_only(adapter, prompt, ids)
    else:
        result = z
        if p.max() < method.alpha:
            result = z + (math.exp(method.rate * step) - 1) * (z - text_only(adapter, prompt, ids))
    result[forbidden] = -np.inf
    return np.where(p >= method.beta * p.max(), result, -np.inf)


def centred(scores):
    """Scores that are equal for equal distributions: a constant added to all changes nothing."""
    finite = scores[np.isfinite(scores)]
    return scores - finite.max()


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_ten_steps_equal_whole_passes(adapter, prompts, method, batch):
    scores, ids = recorded(adapter, prompts[:batch], method)
    forbidden = adapter._tokens.placeholder_ids
    for row, prompt in enumerate(prompts[:batch]):
        answer = ids[row].tolist()
        end = next((index for index, token in enumerate(answer) if token in adapter._tokens.end_ids), len(answer) - 1)
        for step in range(end + 1):
            raw = expected(adapter, prompt, answer[:step], method, forbidden)
            wanted = centred(raw)
            got = centred(scores[step, row].double().numpy())
            assert (np.isinf(got) == np.isinf(wanted)).all()
            finite = np.isfinite(wanted)
            scale = max(1.0, np.abs(raw[finite]).max())  # float32 rounds the logits themselves
            assert np.abs(got[finite] - wanted[finite]).max() / scale < 1e-5


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_batch_answers_as_one_by_one(adapter, prompts, method):
    generation = Generation(max_new_tokens=STEPS, mitigation=method)
    together = adapter.generate(prompts, generation)
    alone = [adapter.generate([prompt], generation)[0] for prompt in prompts]
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]


def test_log_probabilities_are_the_models_own(adapter, prompts):
    [answer] = adapter.generate(prompts[:1], Generation(max_new_tokens=STEPS, mitigation=NoiseContrast()))
    for step, (token, logprob) in enumerate(zip(answer.token_ids, answer.logprobs, strict=True)):
        p = softmax(whole_pass(adapter, prompts[0], answer.token_ids[:step]))
        assert logprob == pytest.approx(math.log(p[token]), abs=1e-4)


def test_sampling_obeys_the_cut():
    adapter = stethoscope.load("testbed")
    prompt = adapter.encode(picture(0, 64, 64), "Please describe this image in detail.")
    generation = Generation(max_new_tokens=30, do_sample=True, temperature=3.0, seed=1)
    [answer] = adapter.generate([prompt], replace(generation, mitigation=Cut(0.3)))
    for step, token in enumerate(answer.token_ids):
        p = softmax(whole_pass(adapter, prompt, answer.token_ids[:step]))
        assert p[token] >= 0.3 * p.max() * (1 - 1e-6)
    assert adapter.generate([prompt], generation)[0].token_ids != answer.token_ids


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cut(beta=2), "mitigation.beta=2 should be a number from 0 to 1"),
        (lambda: FirstLogitBoosting(gamma=-1), "mitigation.gamma=-1 should be a number of at least 0"),
        (lambda: FirstLogitBoosting(gamma=float("inf")), "mitigation.gamma=inf should be a number of at least 0"),
        (lambda: NoiseContrast(step=1000), "mitigation.step=1000 should be a whole number from 0 to 999"),
        (lambda: NoiseContrast(step=1.5), "mitigation.step=1.5 should be a whole number from 0 to 999"),
        (lambda: NoiseContrast(seed="a"), "mitigation.seed='a' should be a whole number of at least 0"),
        (lambda: NoImageContrast(alpha="much"), "mitigation.alpha='much' should be a number from 0 to 1"),
        (lambda: Generation(num_beams=2, mitigation=Cut()), "mitigation=cut goes with greedy decoding and sampling"),
    ],
)
def test_wrong_settings_are_told(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_prompt_without_image_tokens_is_refused():
    adapter = stethoscope.load("testbed")
    prompt = adapter.encode(picture(0, 64, 64), "What is this?")
    with pytest.raises(CapabilityError, match="hides the image tokens"):
        without_image(replace(prompt, spans=replace(prompt.spans, image=())), adapter.model)
