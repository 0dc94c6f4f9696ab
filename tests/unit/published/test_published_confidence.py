"""Scores of 2025 and 2026 without a further pass: words of layers, peaks of heads, dominant words, evidence."""

import math

import numpy as np
import pytest
import torch
from helpers.plain_pass import PICTURE, check, check_layers, cos, entropy, load, mean, predicted

from stethoscope.adapters.answer_tokens import continuation_ids
from stethoscope.core.types import Answer, Generation
from stethoscope.features import FeatureSet
from stethoscope.tracing.trace import Spans, Trace


def layer_words(plain, adapter, token):
    """Distribution over words after every layer, as lists: the final norm and the head, the last state as it is."""
    norm, rows = adapter.model.model.language_model.norm, []
    for layer in range(1, plain.layers + 1):
        state = plain.states[layer][plain.at(token, "q")]
        logits = plain.head @ (state if layer == plain.layers else norm(state[None])[0])
        rows.append(logits.softmax(-1).tolist())
    return rows


def test_overthinking(adapter, columns, plain):
    entropies, scores = [], []
    for token in range(len(plain.ids)):
        rows = layer_words(plain, adapter, token)
        entropies.append([entropy(row) for row in rows])
        words = {max(range(len(row)), key=lambda word, row=row: row[word]) for row in rows}
        scores.append(mean(entropies[-1]) * len(words) / len(rows))
    check(columns, "overthinking", scores)
    check_layers(columns, "lens_entropy", plain, lambda token, layer: entropies[token][layer], range(plain.layers))


def test_peaks(columns, plain):
    def peaks(token, layer, positions):
        row = plain.maps[layer, :, plain.at(token, "q")]
        return mean(max(float(row[head, key]) for head in range(plain.heads)) for key in positions)

    image, layers = plain.spans.image, range(plain.layers)
    check_layers(columns, "image_peaks", plain, lambda token, layer: peaks(token, layer, image), layers)
    rest = {
        token: [key for key in range(plain.at(token, "q") + 1) if key not in image] for token in range(len(plain.ids))
    }
    check_layers(columns, "text_peaks", plain, lambda token, layer: peaks(token, layer, rest[token]), layers)


def test_self_certainty(columns, plain):
    expected = []
    for row in predicted(plain, plain.logits):
        share = row.softmax(-1).tolist()
        expected.append(sum(1 / len(share) * math.log(1 / len(share) / q) for q in share))
    check(columns, "self_certainty", expected)


def boosted(share, word):
    """The dominant words are walked from the last to the first."""
    order = sorted(range(len(share)), key=lambda index: -share[index])[:1024]
    ends = [
        rank
        for rank in range(len(order) - 1)
        if share[order[rank]] - share[order[rank + 1]] > max(0.3 * share[order[rank]], 0.005)
    ]
    dominant = order[: ends[-1] + 1] if ends else []
    return sum(share[index] for index in dominant) if word in dominant else share[word]


def test_boosted_prob(columns, plain):
    rows = predicted(plain, plain.logits).softmax(-1).tolist()
    check(columns, "boosted_prob", [boosted(row, word) for row, word in zip(rows, plain.ids, strict=True)])


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        ([0.24, 0.26, 0.25, 0.25], [0.24, 0.26, 0.25, 0.25]),  # no drop, so no word is dominant
        ([0.4, 0.4, 0.1, 0.1], [0.8, 0.8, 0.1, 0.1]),
        ([0.5, 0.3, 0.15, 0.05], [0.95, 0.95, 0.95, 0.05]),  # the last drop counts, not the first
        ([0.9, 0.0965, 0.0025, 0.001], [0.9965, 0.9965, 0.0025, 0.001]),  # later drops are too small
    ],
)
def test_dominant_words(share, expected):
    answer = Answer("abcd", (0, 1, 2, 3), ((0, 1), (1, 2), (2, 3), (3, 4)), (0.0,) * 4)
    trace = Trace(answer, Spans(1, (0,), ()), torch.tensor([share] * 4).log())
    np.testing.assert_allclose(FeatureSet([], ["boosted_prob"]).compute(trace)["boosted_prob"], expected, rtol=1e-5)
    assert [boosted(share, word) for word in range(4)] == pytest.approx(expected)


def test_rauq(columns, plain):
    layers, tokens = range(17 // 3, math.ceil(2 * 17 / 3) + 1), range(len(plain.ids))
    chances = [
        float(row.softmax(-1)[word]) for row, word in zip(predicted(plain, plain.logits), plain.ids, strict=True)
    ]
    surprise = []
    for layer in layers:
        # token t is predicted at the position of token t - 1, so "to the token before" is the map's own diagonal
        weights = [
            [float(plain.maps[layer, h, plain.at(t, "q"), plain.at(t, "q")]) for t in tokens]
            for h in range(plain.heads)
        ]
        head = max(weights, key=lambda values: mean(values[1:]))
        confidence = [chances[0]]
        for token in tokens[1:]:
            confidence.append(0.5 * chances[token] + 0.5 * head[token] * confidence[-1])
        surprise.append([-math.log(value) for value in confidence])
    check(columns, "rauq", [max(layer[token] for layer in surprise) for token in tokens])
    answer = max(1 + mean(layer) for layer in surprise)
    np.testing.assert_allclose(columns["rauq_answer"], [answer] * len(tokens), rtol=1e-5)


def test_evidence(columns, plain):
    head = plain.head - plain.head.mean(1, keepdim=True)
    width, expected = plain.head.shape[1], []
    for token in range(len(plain.ids)):
        weights = (head @ plain.states[plain.layers][plain.at(token, "q")]).tolist()
        positive = sum(max(w, 0) for w in weights) / len(weights)
        negative = sum(max(-w, 0) for w in weights) / len(weights)
        plus = 1 / (sum(math.exp(positive) for _ in range(width)) - width + 1)
        minus = 1 / (1 - math.prod(1 - math.exp(-negative) for _ in range(width)))
        conflict = sum(plus * (math.exp(positive) - 1) * (1 - minus * math.exp(-negative)) for _ in range(width))
        ignorance = sum(math.exp(-negative) for _ in range(width)) * plus * minus / (1 - conflict)
        expected.append((positive, negative, conflict, ignorance))
    for name, values in zip(
        ("logit_pos_mean", "logit_neg_mean", "euq_conflict", "euq_ignorance"), zip(*expected, strict=True), strict=True
    ):
        check(columns, name, values)


def test_ig_score(adapter, encoded, answer, columns, plain):
    """The answer and " There is also", two words more, and the whole map of one eager pass."""
    tokenizer = adapter.processor.tokenizer
    ids = [*answer.token_ids, *continuation_ids(tokenizer, " There is also")]
    assert tokenizer.decode(ids[len(answer.token_ids) :]).strip() == "There is also"
    prompt = encoded.inputs["input_ids"]

    def whole(**options):
        text = torch.cat([prompt, torch.tensor([ids])], 1)
        return plain.run(input_ids=text, attention_mask=torch.ones_like(text), **options)

    image = adapter.model.config.image_token_id
    for _ in range(2):
        row = whole().logits[0, -1].tolist()
        ids.append(max((word for word in range(len(row)) if word != image), key=lambda word, row=row: row[word]))
    maps = torch.stack(whole(output_attentions=True).attentions)[:, 0][..., list(plain.spans.image)].double()
    expected = [cos(maps[:, :, plain.at(token, "c")], maps[:, :, -1]) for token in range(len(plain.ids))]
    check(columns, "ig_score", expected)


@pytest.mark.parametrize("family", ["qwen2_vl", "blip-2-t5", "idefics3"])
def test_other_families(family):
    """Cached prompts, positions with three axes, and the two attentions of a decoder."""
    prompt = "Question: {question} Answer:" if family == "blip-2-t5" else None
    adapter = load(family, prompt)
    features = FeatureSet(["confidence", "overthinking", "continuation"])
    encoded = [adapter.encode(PICTURE, text) for text in ("What is there?", "Please describe this image.")]
    answers, cached = adapter.generate_with_cache(encoded, Generation(max_new_tokens=4, do_sample=True, seed=3))
    together = adapter.trace_batch(cached, answers, features.requires)
    for prompt_, answer, trace in zip(encoded, answers, together, strict=True):
        columns = features.compute(trace)
        for name, values in features.compute(adapter.trace(prompt_, answer, features.requires)).items():
            np.testing.assert_allclose(columns[name], values, atol=1e-4, rtol=1e-3, err_msg=name)
            assert np.isfinite(values).all()
        assert columns["rauq_answer"][0] >= 1
