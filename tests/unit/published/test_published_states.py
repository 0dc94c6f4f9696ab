"""Scores of hidden states: cosines, sinks, the lens on image and question."""

import math

import numpy as np
import torch
from helpers.plain_pass import (
    PICTURE,
    ROWS,
    TOLERANCE,
    Plain,
    Shallow,
    check,
    check_layers,
    cos,
    divergence,
    image_rows,
    load,
    mean,
)

from stethoscope.core.types import Generation
from stethoscope.features import FeatureSet
from stethoscope.tracing.state_recorder import sinks


@ROWS
def test_sinks(columns, plain, row):
    def is_sink(layer, patch):
        size = plain.states[0].shape[-1]
        root = [math.sqrt(mean(v * v for v in plain.states[layer][position].tolist())) for position in (patch, 0)]
        first = [abs(v) / root[1] for v in plain.states[layer][0].tolist()]
        dimensions = sorted(range(size), key=lambda d: -first[d])[:2]
        return max(abs(float(plain.states[layer][patch][d])) / root[0] for d in dimensions) > 20 * math.sqrt(
            size / 4096
        )

    flags = [[is_sink(layer, patch) for patch in plain.spans.image] for layer in range(plain.layers)]

    def share(token, layer):
        image = image_rows(plain, row, token, layer)
        return sum(a for a, sink in zip(image, flags[layer], strict=True) if sink) / sum(image)

    def rest(token, layer):
        image = image_rows(plain, row, token, layer)
        kept = sum(a for a, sink in zip(image, flags[layer], strict=True) if not sink)
        first = float(plain.maps[layer, :, plain.at(token, row), 0].mean())
        return kept / (1 - first - (sum(image) - kept))

    for layer in range(plain.layers):
        shares = [share(token, layer) for token in range(len(plain.ids))]
        np.testing.assert_allclose(columns[f"sink_share_{row}_l{layer:02d}"], shares, atol=TOLERANCE)
    check_layers(columns, f"image_without_sinks_{row}", plain, rest, range(plain.layers))


def test_a_sink_is_massive_in_the_dimensions_of_the_first_token():
    first, image = torch.ones(4096), torch.ones(3, 4096)
    first[[7, 9]] = 500.0
    image[0, 7], image[1, 100], image[2, 7] = 40.0, 40.0, 20.0
    assert sinks(image, first).tolist() == [True, False, False]


@ROWS
def test_cosines_to_patches(columns, plain, row):
    image, count = plain.spans.image, max(1, round(0.05 * len(plain.spans.image)))
    for layer in range(1, plain.layers + 1):
        states = plain.states[layer]
        rows = [sorted(cos(states[plain.at(t, row)], states[patch]) for patch in image) for t in range(len(plain.ids))]
        check(columns, f"patch_consistency_{row}_l{layer - 1:02d}", [mean(cosines[-count:]) for cosines in rows])
        check(columns, f"contextual_lens_{row}_l{layer - 1:02d}", [cosines[-1] for cosines in rows])


@ROWS
def test_glsim(columns, plain, row):
    check_glsim(columns, plain, row, near=16)


@ROWS
def test_glsim_reads_two_layers_of_a_shallow_model(row):
    adapter = load("llava", kind=Shallow)
    encoded = adapter.encode(PICTURE, "Please describe this image in detail.")
    answer = adapter.generate([encoded], Generation(max_new_tokens=6, do_sample=True, temperature=3.0, seed=1))[0]
    columns = FeatureSet([], [f"glsim_local_{row}", f"glsim_global_{row}", f"glsim_{row}"]).compute(
        adapter.trace(encoded, answer, ["states"])
    )
    check_glsim(columns, Plain(adapter, encoded, answer), row, near=3)


def check_glsim(columns, plain, row, near):
    """The token's state after layer ``near``, the last but one; image and prompt after the last."""
    image, last = plain.spans.image, plain.layers
    assert near == last - 1
    count = min(max(round(len(image) / 18), 4), len(image))
    local, total = [], []
    for token, word in enumerate(plain.ids):
        state = plain.states[near][plain.at(token, row)]
        nearest = sorted(image, key=lambda column, word=word: -plain.lens(last, column, word))[:count]
        local.append(mean(cos(plain.states[last][column], state) for column in nearest))
        total.append(cos(plain.states[last][plain.spans.length - 1], state))
    check(columns, f"glsim_local_{row}", local)
    check(columns, f"glsim_global_{row}", total)
    check(columns, f"glsim_{row}", [0.6 * b + 0.4 * a for a, b in zip(local, total, strict=True)])


@ROWS
def test_inslen(columns, plain, row):
    image, question = plain.spans.image, plain.spans.question
    text, vision, asked = plain.layers, plain.depth(24), plain.depth(22)
    count = max(round(len(image) / 18), 1)
    cafe, near, context = [], [], []
    for token, word in enumerate(plain.ids):
        state = plain.states[text][plain.at(token, row)]
        scores = {column: plain.lens(asked, column, word, temperature=10) for column in question}
        cafe.append(max(scores.values()))
        near.append(cafe[-1] * mean(sorted(cos(state, plain.states[vision][column]) for column in image)[-count:]))
        best = sorted(scores, key=lambda column: -scores[column])[:4]
        centre = sum(plain.states[asked][column] for column in best) / len(best)
        distance = float((state - centre).norm() / state.norm())
        context.append((2 - distance) * mean(scores[column] for column in best))
    check(columns, "cafe", cafe)
    check(columns, f"inslen_local_{row}", near)
    check(columns, f"inslen_context_{row}", context)
    check(columns, f"inslen_{row}", [0.4 * a + 0.6 * b for a, b in zip(near, context, strict=True)])


@ROWS
def test_viser(columns, plain, row):
    image, last = plain.spans.image, plain.layers
    evidence, ratio = [], []
    for token, word in enumerate(plain.ids):
        state = plain.states[last][plain.at(token, row)]
        scores = [plain.lens(last, patch, word) for patch in image]
        gate = 1 / (1 + math.exp(-sum(scores)))
        evidence.append(cos(plain.states[last][plain.spans.length - 1], state) * gate)
        seen = sum(
            p / sum(scores) * max(cos(plain.states[last][patch], state), 0)
            for p, patch in zip(scores, image, strict=True)
        )
        prefix = [*plain.spans.question, *range(plain.spans.length, plain.spans.length + token)]
        read = mean(sorted(max(cos(plain.states[0][patch], state), 0) for patch in prefix)[-10:])
        ratio.append(seen / (seen + read))
    check(columns, f"visual_evidence_{row}", evidence)
    check(columns, f"visual_ratio_{row}", ratio)
    check(columns, f"viser_{row}", [0.4 * a + 0.6 * b for a, b in zip(evidence, ratio, strict=True)])


def test_internal_confidence(columns, plain):
    best, positions, sums = [], [], []
    for word in plain.ids:
        by_layer = [
            [plain.lens(layer, patch, word) for patch in plain.spans.image] for layer in range(plain.layers + 1)
        ]
        most = [max(values) for values in by_layer]
        best.append(max(most))
        positions.append(most.index(max(most)) / plain.layers)
        sums.append(sum(by_layer[-1]))
    check(columns, "internal_confidence", best)
    check(columns, "internal_confidence_layer", positions)
    check(columns, "internal_confidence_sum", sums)


@ROWS
def test_probe(columns, plain, row):
    for name, layer in (("hidden_middle", 8), ("hidden_last", 17)):
        for dimension in range(len(plain.states[layer][0])):
            expected = [float(plain.states[layer][plain.at(token, row)][dimension]) for token in range(len(plain.ids))]
            check(columns, f"{name}_{row}_d{dimension:04d}", expected)


def decoded(plain, token, layer):
    """Logits when the state after a layer is decoded by norm and head."""
    norm = next(m for n, m in plain.adapter.model.named_modules() if n.endswith("language_model.norm"))
    with torch.no_grad():
        return plain.head @ norm(plain.states[layer + 1][plain.at(token, "q")])


def test_lens(columns, plain):
    def rank(token, layer):
        logits = decoded(plain, token, layer).tolist()
        return math.log(1 + sum(z > logits[plain.ids[token]] for z in logits))

    def said(token, layer):
        return float(decoded(plain, token, layer).log_softmax(-1)[plain.ids[token]])

    for name, value in (("lens_rank", rank), ("lens_logprob", said)):
        check_layers(columns, name, plain, value, range(plain.layers - 1))


def test_lens_trajectory(columns, plain):
    def distance(token, layer):
        rows = decoded(plain, token, layer), plain.logits[plain.at(token, "q")]
        return divergence(*(row.softmax(-1).tolist() for row in rows))

    check_layers(columns, "lens_divergence", plain, distance, range(plain.layers - 1))
