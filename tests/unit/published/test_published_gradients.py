"""Scores of gradients: relevancy and saliency from one backward pass per token."""

import math

import pytest
import torch
from helpers.plain_pass import check, mean


@pytest.fixture(scope="module")
def products(plain):
    """A * dz/dA for the logit z of every answer token: (T, L, H, S, S)."""
    model = plain.adapter.model
    model.set_attn_implementation("eager")
    model.requires_grad_(True)
    try:
        output = model(**plain.inputs, output_attentions=True)
        logits = [output.logits[0, plain.at(token, "q"), word] for token, word in enumerate(plain.ids)]
        per_layer = [
            [a[0].detach() * g[0] for a, g in zip(output.attentions, gradients, strict=True)]
            for gradients in (torch.autograd.grad(z, output.attentions, retain_graph=True) for z in logits)
        ]
    finally:
        model.requires_grad_(False)
        model.set_attn_implementation("sdpa")
    return torch.stack([torch.stack(layers) for layers in per_layer]).detach()


@pytest.fixture(scope="module")
def relevancy(plain, products):
    """R - I by layer in scope ``row``: every answer row has its own token's gradient, the prompt the first's."""
    size = products.shape[-1]
    mixed = products[0].clone()
    for token in range(len(plain.ids)):
        mixed[:, :, plain.at(token, "q")] = products[token, :, :, plain.at(token, "q")]
    total, layers = torch.eye(size).double(), []
    for layer in range(plain.layers):
        total = total + mixed[layer].clamp(min=0).mean(0) @ total
        layers.append(total - torch.eye(size))
    return layers


def row(plain, relevancy, token, layer):
    values = relevancy[layer][plain.at(token, "q")].tolist()
    parts = {"image": plain.spans.image, "question": plain.spans.question, "previous": plain.before(token, "q")}
    return values, {name: [values[column] for column in positions] for name, positions in parts.items()}


def test_shares_of_relevancy(columns, plain, relevancy):
    for layer in range(plain.layers):
        rows = [row(plain, relevancy, token, layer) for token in range(len(plain.ids))]
        for name in ("image", "question", "previous"):
            check(columns, f"relevancy_{name}_l{layer:02d}", [sum(parts[name]) / sum(all_) for all_, parts in rows])
    assert {"relevancy_image_l00", "relevancy_question_l00", "relevancy_previous_l00"} < set(columns)


def test_visual_contribution(columns, plain, relevancy):
    rows = [row(plain, relevancy, token, plain.layers - 1)[1] for token in range(len(plain.ids))]
    text = [parts["question"] + parts["previous"] for parts in rows]
    for name, value in (
        ("visual_contribution_sum", sum),
        ("visual_contribution_max", max),
        ("visual_contribution_mean", mean),
    ):
        check(columns, name, [math.log(value(p["image"]) / value(t)) for p, t in zip(rows, text, strict=True)])


def test_shape_of_relevancy(columns, plain, relevancy):
    entropies, peaks = [], []
    for token in range(len(plain.ids)):
        image = row(plain, relevancy, token, plain.layers - 1)[1]["image"]
        share = [value / sum(image) for value in image]
        entropies.append(-sum(p * math.log(p) for p in share if p > 0) / math.log(len(share)))
        peaks.append(sum(sorted(share)[-(len(share) // 10) :]))
    check(columns, "relevancy_entropy", entropies)
    check(columns, "relevancy_peak", peaks)


def test_saliency(columns, plain, products):
    expected = {name: [] for name in ("previous", "previous_max", "previous_share", "image_share")}
    for token in range(len(plain.ids)):
        by_layer = []
        for layer in range(plain.layers // 2, plain.layers):
            values = products[token, layer, :, plain.at(token, "q")].abs().sum(0).tolist()
            norm = math.sqrt(sum(v * v for v in values))
            values = [v / norm for v in values]
            before = [values[key] for key in plain.before(token, "q")] or [0.0]
            image = sum(values[key] for key in plain.spans.image)
            by_layer.append((mean(before), max(before), sum(before) / sum(values), image / sum(values)))
        for name, column in zip(expected, zip(*by_layer, strict=True), strict=True):
            expected[name].append(mean(column))
    check(columns, "saliency_previous", expected["previous"])
    check(columns, "saliency_previous_max", expected["previous_max"])
    check(columns, "saliency_previous_share", expected["previous_share"])
    check(columns, "saliency_image_share", expected["image_share"])


def test_attended_embedding(columns, plain, relevancy):
    """Not published: the places that relevancy points to, as the projector saw them."""
    for dimension in range(len(plain.states[0][0])):
        expected = []
        for token in range(len(plain.ids)):
            weights = [float(relevancy[-1][plain.at(token, "q"), patch]) for patch in plain.spans.image]
            length = math.sqrt(sum(weight * weight for weight in weights))
            pairs = zip(weights, plain.spans.image, strict=True)
            expected.append(sum(weight * float(plain.states[0][patch][dimension]) for weight, patch in pairs) / length)
        check(columns, f"attended_embedding_d{dimension:04d}", expected)
