"""Scores of attention: heads, rows from layer to layer, over the answer, on the grid."""

import math

import numpy as np
import pytest
from helpers.plain_pass import ROWS, TOLERANCE, check, check_layers, entropy, image_rows, mean

from stethoscope.features.attention import dispersion


@ROWS
def test_heads(columns, plain, row):
    for layer in range(plain.layers):
        for head in range(plain.heads):
            suffix = f"_{row}_l{layer:02d}h{head:02d}"
            expected = {name: [] for name in ("head_image", "top20_mean", "top20_entropy")}
            for token in range(len(plain.ids)):
                weights = plain.maps[layer, head, plain.at(token, row)].tolist()
                image = [weights[column] for column in plain.spans.image]
                expected["head_image"].append(sum(image))
                expected["top20_mean"].append(mean(sorted(image)[-20:]))
                expected["top20_entropy"].append(entropy(sorted(image)[-20:]))
            for name, values in expected.items():
                check(columns, name + suffix, values)


@ROWS
@pytest.mark.parametrize("context", ["image", "question", "context"])
def test_lookback(columns, plain, row, context):
    spans = plain.spans
    there = {"image": spans.image, "question": spans.question, "context": (*spans.image, *spans.question)}[context]
    for layer in range(plain.layers):
        for head in range(plain.heads):
            expected = []
            for token in range(len(plain.ids)):
                weights = plain.maps[layer, head, plain.at(token, row)]
                back = mean(float(weights[column]) for column in there)
                new = plain.before(token, row)
                expected.append(back / (back + mean(float(weights[column]) for column in new)) if new else 1.0)
            check(columns, f"lookback_{context}_{row}_l{layer:02d}h{head:02d}", expected)


def test_head_means(columns, plain):
    parts = {"attn_image": lambda _: plain.spans.image, "attn_question": lambda _: plain.spans.question}
    parts |= {"attn_previous": lambda token: plain.before(token, "q"), "attn_first": lambda _: [0]}
    for name, positions in parts.items():
        for layer in range(plain.layers):
            rows = [plain.maps[layer, :, plain.at(token, "q")] for token in range(len(plain.ids))]
            expected = [
                sum(mean(float(w) for w in row[:, key]) for key in positions(token)) for token, row in enumerate(rows)
            ]
            check(columns, f"{name}_l{layer:02d}", expected)
    for layer in range(plain.layers):
        maps = [image_rows(plain, "q", token, layer) for token in range(len(plain.ids))]
        check(columns, f"attn_entropy_l{layer:02d}", [entropy(values) / math.log(len(values)) for values in maps])


@pytest.mark.parametrize(("name", "row"), [("svar", "q"), ("svar_c", "c")])
def test_svar(columns, plain, name, row):
    layers = range(round(0.15 * plain.layers), round(0.55 * plain.layers) + 1)
    expected = [sum(sum(image_rows(plain, row, token, layer)) for layer in layers) for token in range(len(plain.ids))]
    check(columns, name, expected)


@ROWS
def test_attention_to_the_answer_in_the_first_layer(columns, plain, row):
    maps = plain.maps[0].mean(0)
    expected = [sum(float(maps[plain.at(k, row), key]) for key in plain.before(k, row)) for k in range(len(plain.ids))]
    check(columns, f"pas_{row}", expected)


@ROWS
def test_drift_and_peak(columns, plain, row):
    def drift(token, layer):
        here, before = (image_rows(plain, row, token, index) for index in (layer + 1, layer))
        here, before = [a / sum(here) for a in here], [a / sum(before) for a in before]
        return sum(p * math.log(p / q) for p, q in zip(here, before, strict=True))

    check_layers(columns, f"attention_drift_{row}", plain, drift, range(plain.layers - 1))
    assert f"attention_drift_{row}_l{plain.layers - 1:02d}" not in columns

    def peak(token, layer):
        rows = plain.maps[layer, :, plain.at(token, row)]
        return mean(max(float(rows[head, column]) for column in plain.spans.image) for head in range(plain.heads))

    check_layers(columns, f"attention_peak_{row}", plain, peak, range(plain.layers))


@ROWS
def test_overtrust(columns, plain, row):
    most = plain.maps[-1].amax(0)
    most = most / most.sum(-1, keepdim=True)
    scores, chosen = [], []
    for token in range(len(plain.ids)):
        window = plain.before(token, row)
        products = [1e-7 * math.prod(50 * float(most[i, j]) for i in window if i >= j) for j in window] or [1e-7]
        scores.append(math.log(max(products)))
        chosen.append(products.index(max(products)))
    check(columns, f"overtrust_{row}", scores)
    check(columns, f"overtrust_column_{row}", chosen)


def flood(top, rows, columns):
    """Components of 8 neighbours, by walking from patch to patch."""
    left, sizes = set(top), []
    while left:
        waiting, component = [left.pop()], set()
        while waiting:
            cell = waiting.pop()
            component.add(cell)
            y, x = divmod(cell, columns)
            near = [(y + dy) * columns + x + dx for dy in (-1, 0, 1) for dx in (-1, 0, 1) if 0 <= x + dx < columns]
            waiting += [n for n in near if n in left]
            left -= set(near)
        sizes.append(component)
    return sizes


def slow_dispersion(values, rows, columns):
    low = [v - min(values) for v in values]
    low = [v / sum(low) for v in low]
    top = sorted(range(len(low)), key=lambda cell: -low[cell])[: int(0.1 * len(low))]
    kept = [component for component in flood(top, rows, columns) if len(component) >= 3]
    inside = set().union(*kept)
    mass = sum(low[cell] for cell in inside)
    background = [low[cell] for cell in range(len(low)) if cell not in inside]
    return (1 - mass) * entropy(background) / math.log(len(low)), len(kept), mass


@ROWS
def test_dispersion_of_the_model(columns, plain, row):
    ((rows, width),) = plain.spans.grids
    for index, name in enumerate(("dispersion_score", "components", "component_mass")):
        for layer in range(plain.layers):
            expected = [
                slow_dispersion(image_rows(plain, row, token, layer), rows, width)[index]
                for token in range(len(plain.ids))
            ]
            np.testing.assert_allclose(columns[f"{name}_{row}_l{layer:02d}"], expected, atol=TOLERANCE)


def test_dispersion_of_maps_with_spots():
    """Smooth maps, whose peaks are spots of all sizes; the tiny model's own seldom have one."""
    random = np.random.default_rng(0)
    maps = random.random((40, 14, 12))
    for _ in range(2):
        maps = sum(np.roll(maps, shift, axis) for axis in (1, 2) for shift in (-1, 0, 1))
    measured = dispersion([maps])
    expected = [slow_dispersion(image.ravel().tolist(), 14, 12) for image in maps]
    assert len({spots for _, spots, _ in expected}) > 3
    np.testing.assert_allclose(measured, expected, atol=TOLERANCE)
    mirrored = dispersion([maps[:, :7], maps[:, 7:]])  # two tiles: spots end at their border
    assert (mirrored[:, 1] != measured[:, 1]).any()
