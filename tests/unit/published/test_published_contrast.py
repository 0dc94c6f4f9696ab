"""Scores of the predicted distribution, and of contrasts with other pictures."""

import math

import torch
from helpers.plain_pass import check, differences, divergence, entropy, image_rows, logprob, mean, predicted

from stethoscope.tracing.interventions import noised


def test_uncertainty(columns, plain):
    rows = [row.softmax(-1).tolist() for row in predicted(plain, plain.logits)]
    check(columns, "nll", [-math.log(row[word]) for row, word in zip(rows, plain.ids, strict=True)])
    check(columns, "entropy", [entropy(row) for row in rows])
    check(columns, "max_prob", [max(row) for row in rows])
    check(columns, "margin", [sorted(row)[-1] - sorted(row)[-2] for row in rows])


def test_logits(columns, plain):
    rows = [plain.logits[plain.at(token, "q")].tolist() for token in range(len(plain.ids))]
    top = [sorted(row)[-100:] for row in rows]
    check(columns, "top100_entropy", [entropy([math.exp(z) for z in row]) for row in top])
    check(columns, "max_logit", [max(row) for row in rows])
    logprob = [row[word] - math.log(sum(map(math.exp, row))) for row, word in zip(rows, plain.ids, strict=True)]
    check(columns, "token_prob", [math.exp(value) for value in logprob])
    gaps = [max(row) - row[word] for row, word in zip(rows, plain.ids, strict=True)]
    check(columns, "logprob_gap", gaps)
    check(columns, "sequence_logprob", [mean(logprob[: k + 1]) for k in range(len(logprob))])


def test_blank_image(columns, plain):
    blank = predicted(plain, plain.run(pixel_values=torch.zeros_like(plain.pixels)).logits[0])
    shown = predicted(plain, plain.logits)
    check(columns, "pmi", differences(logprob(shown, plain.ids), logprob(blank, plain.ids)))
    rows = [[row.softmax(-1).tolist() for row in logits] for logits in (shown, blank)]
    check(columns, "blank_entropy_difference", differences(map(entropy, rows[1]), map(entropy, rows[0])))
    pairs = zip(*rows, strict=True)
    kl = [sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) for p, q in pairs]
    check(columns, "blank_divergence", kl)


def test_noised_image(columns, plain):
    kept = 1.0
    for step in range(501):
        beta = 1 / (1 + math.exp(-(-6 + 12 * step / 999))) * (5e-3 - 1e-5) + 1e-5
        kept *= 1 - beta
    noise = torch.randn(plain.pixels.shape, generator=torch.Generator().manual_seed(0))
    pixels = math.sqrt(kept) * plain.pixels + math.sqrt(1 - kept) * noise
    torch.testing.assert_close(noised(plain.pixels), pixels)
    shown, other = predicted(plain, plain.logits), predicted(plain, plain.run(pixel_values=pixels).logits[0])
    check(columns, "vcd_gap", differences(logprob(shown, plain.ids), logprob(other, plain.ids)))
    check(columns, "vcd_logprob", logprob(2 * shown - other, plain.ids))
    pairs = zip(shown.softmax(-1).tolist(), other.softmax(-1).tolist(), strict=True)
    check(columns, "noise_divergence", [divergence(*pair) for pair in pairs])


def without(plain, hidden):
    """Logits when a mask that is written out hides image tokens from everything that is none."""
    size = plain.inputs["input_ids"].shape[1]
    mask = torch.zeros(1, 1, size, size)
    for query in range(size):
        for key in range(size):
            if key > query or (key in hidden and query not in plain.spans.image):
                mask[0, 0, query, key] = torch.finfo(torch.float32).min
    return predicted(plain, plain.run(attention_mask=mask).logits[0])


def test_no_image(columns, plain):
    shown, other = predicted(plain, plain.logits), without(plain, set(plain.spans.image))
    check(columns, "pmi_no_image", differences(logprob(shown, plain.ids), logprob(other, plain.ids)))
    pairs = zip(shown.softmax(-1).tolist(), other.softmax(-1).tolist(), strict=True)
    check(columns, "no_image_divergence", [divergence(*pair) for pair in pairs])


def test_core(columns, plain):
    layers = range(plain.depth(10), min(plain.depth(25) + 1, plain.layers))
    sums = dict.fromkeys(plain.spans.image, 0.0)
    for token in range(len(plain.ids)):
        for layer in layers:
            for column, value in zip(plain.spans.image, image_rows(plain, "q", token, layer), strict=True):
                sums[column] += value
    core = set(sorted(sums, key=lambda column: -sums[column])[: round(0.4 * len(sums))])
    shown, other = predicted(plain, plain.logits), without(plain, core)
    bits = [[entropy(row.softmax(-1).tolist(), 2) for row in rows] for rows in (shown, other)]
    information = differences(bits[1], bits[0])
    check(columns, "core_information", information)
    check(columns, "vauq", [h - 0.6 * s for h, s in zip(bits[0], information, strict=True)])
    check(columns, "core_gap", differences(logprob(shown, plain.ids), logprob(other, plain.ids)))
