"""Every published score against a slow transcription of its formula, from plain eager passes of a real tiny LLaVA."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stethoscope.adapters.hf import HfAdapter
from stethoscope.errors import CapabilityError
from stethoscope.features import FEATURES, GROUPS, FeatureSet
from stethoscope.features.maps import dispersion
from stethoscope.noise import noised
from stethoscope.records import Generation
from stethoscope.states import sinks
from stethoscope.trace import MORE_NEEDS

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (56, 72, 3), dtype=np.uint8))
ROWS = pytest.mark.parametrize("row", ["q", "c"])
TOLERANCE = 1e-5


class Deep(HfAdapter):
    """The tiny LLaVA with eight layers and a hundred image tokens, so that no two settings mean the same."""

    def _tiny(self):
        model, processor = super()._tiny()
        config = model.config
        config.text_config.num_hidden_layers, config.vision_config.image_size = 8, 140
        config.text_config.initializer_range = 0.2
        config.image_seq_length = 100
        processor.image_processor.size = {"shortest_edge": 140}
        processor.image_processor.crop_size = {"height": 140, "width": 140}
        torch.manual_seed(0)
        return type(model)(config).double(), processor  # so that only the reductions round


def load(family, prompt="USER: {image}\n{question} ASSISTANT:"):
    kind = Deep if family == "llava" else HfAdapter
    adapter = kind(random_init="tiny", family=family, prompt=prompt, device="cpu")
    adapter.setup()
    return adapter


@pytest.fixture(scope="module")
def adapter():
    return load("llava")


@pytest.fixture(scope="module")
def encoded(adapter):
    return adapter.encode(PICTURE, "Please describe this image in detail.")


@pytest.fixture(scope="module")
def answer(adapter, encoded):
    return adapter.generate([encoded], Generation(max_new_tokens=14, do_sample=True, temperature=3.0, seed=1))[0]


@pytest.fixture(scope="module")
def columns(adapter, encoded, answer):
    trace = adapter.trace(encoded, answer, MORE_NEEDS)
    return FeatureSet([group for group in GROUPS if group not in ("attention", "lens", "blank", "relevancy")]).compute(
        trace
    )


class Plain:
    """What one eager pass over prompt and answer returns, as plain numbers.

    Attributes:
        maps: (L, H, S, S). ``states``: L + 1 tensors (S, D). ``logits``: (S, V).
    """

    def __init__(self, adapter, encoded, answer):
        ids = torch.cat([encoded.inputs["input_ids"], torch.tensor([answer.token_ids])], 1)
        self.pixels = encoded.inputs["pixel_values"]
        self.inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": self.pixels}
        self.adapter, self.spans, self.ids = adapter, encoded.spans, answer.token_ids
        output = self.run(output_attentions=True, output_hidden_states=True)
        self.maps = torch.stack(output.attentions)[:, 0].double()
        self.states = [state[0].double() for state in output.hidden_states]
        self.logits = output.logits[0].double()
        self.head = adapter.model.get_output_embeddings().weight.double()
        self.layers, self.heads = self.maps.shape[:2]
        assert (self.layers, len(self.spans.image)) == (8, 100)

    def run(self, **changes):
        model = self.adapter.model
        model.set_attn_implementation("eager")
        try:
            with torch.no_grad():
                return model(**{**self.inputs, **changes})
        finally:
            model.set_attn_implementation("sdpa")

    def at(self, token, row):
        """Position of the row that predicts the token (``q``) or consumes it (``c``)."""
        return self.spans.length + token - (row == "q")

    def before(self, token, row):
        """Positions of the answer tokens that the row sees."""
        return list(range(self.spans.length, self.at(token, row) + 1))

    def depth(self, layer):
        return round(layer / 32 * self.layers)

    def lens(self, layer, position, word, temperature=1.0):
        """Probability of a word when a state is multiplied by the head's matrix."""
        logits = self.head @ self.states[layer][position] / temperature
        return float(logits.softmax(-1)[word])


@pytest.fixture(scope="module")
def plain(adapter, encoded, answer):
    return Plain(adapter, encoded, answer)


def cos(one, other):
    return float((one * other).sum() / (math.sqrt(float((one * one).sum())) * math.sqrt(float((other * other).sum()))))


def entropy(values, base=math.e):
    total = sum(values)
    return -sum(v / total * math.log(v / total, base) for v in values if v > 0)


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def check(columns, name, expected):
    assert np.ptp(expected) > 0 or len(set(columns[name])) == 1, "the expected values tell nothing"
    np.testing.assert_allclose(columns[name], expected, rtol=TOLERANCE, atol=TOLERANCE, err_msg=name)


def check_layers(columns, name, plain, value, layers):
    for layer in layers:
        check(columns, f"{name}_l{layer:02d}", [value(token, layer) for token in range(len(plain.ids))])


# --- logits ---------------------------------------------------------------------------------------------------------


def test_logits(columns, plain):
    rows = [plain.logits[plain.at(token, "q")].tolist() for token in range(len(plain.ids))]
    top = [sorted(row)[-100:] for row in rows]
    check(columns, "top100_entropy", [entropy([math.exp(z) for z in row]) for row in top])
    check(columns, "max_logit", [max(row) for row in rows])
    logprob = [row[word] - math.log(sum(map(math.exp, row))) for row, word in zip(rows, plain.ids, strict=True)]
    gaps = [max(row) - row[word] for row, word in zip(rows, plain.ids, strict=True)]
    check(columns, "logprob_gap", gaps)
    check(columns, "sequence_logprob", [mean(logprob[: k + 1]) for k in range(len(logprob))])


# --- attention ------------------------------------------------------------------------------------------------------


@ROWS
def test_heads(columns, plain, row):
    for layer in range(plain.layers):
        for head in range(plain.heads):
            suffix = f"_{row}_l{layer:02d}h{head:02d}"
            found = {name: [] for name in ("head_image", "top20_mean", "top20_entropy")}
            for token in range(len(plain.ids)):
                weights = plain.maps[layer, head, plain.at(token, row)].tolist()
                image = [weights[at] for at in plain.spans.image]
                found["head_image"].append(sum(image))
                found["top20_mean"].append(mean(sorted(image)[-20:]))
                found["top20_entropy"].append(entropy(sorted(image)[-20:]))
            for name, values in found.items():
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
                back = mean(float(weights[at]) for at in there)
                new = plain.before(token, row)
                expected.append(back / (back + mean(float(weights[at]) for at in new)) if new else 1.0)
            check(columns, f"lookback_{context}_{row}_l{layer:02d}h{head:02d}", expected)


@ROWS
def test_attention_to_the_answer_in_the_first_layer(columns, plain, row):
    maps = plain.maps[0].mean(0)
    expected = [sum(float(maps[plain.at(k, row), at]) for at in plain.before(k, row)) for k in range(len(plain.ids))]
    check(columns, f"pas_{row}", expected)


def image_rows(plain, row, token, layer):
    """Head-mean attention to the image tokens."""
    return [float(plain.maps[layer, :, plain.at(token, row), at].mean()) for at in plain.spans.image]


@ROWS
def test_drift_and_peak(columns, plain, row):
    def drift(token, layer):
        here, before = (image_rows(plain, row, token, one) for one in (layer + 1, layer))
        here, before = [a / sum(here) for a in here], [a / sum(before) for a in before]
        return sum(p * math.log(p / q) for p, q in zip(here, before, strict=True))

    check_layers(columns, f"attention_drift_{row}", plain, drift, range(plain.layers - 1))
    assert f"attention_drift_{row}_l{plain.layers - 1:02d}" not in columns

    def peak(token, layer):
        rows = plain.maps[layer, :, plain.at(token, row)]
        return mean(max(float(rows[head, at]) for at in plain.spans.image) for head in range(plain.heads))

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
    left, found = set(top), []
    while left:
        waiting, component = [left.pop()], set()
        while waiting:
            at = waiting.pop()
            component.add(at)
            y, x = divmod(at, columns)
            near = [(y + dy) * columns + x + dx for dy in (-1, 0, 1) for dx in (-1, 0, 1) if 0 <= x + dx < columns]
            waiting += [n for n in near if n in left]
            left -= set(near)
        found.append(component)
    return found


def slow_dispersion(values, rows, columns):
    low = [v - min(values) for v in values]
    low = [v / sum(low) for v in low]
    top = sorted(range(len(low)), key=lambda at: -low[at])[: int(0.1 * len(low))]
    kept = [component for component in flood(top, rows, columns) if len(component) >= 3]
    inside = set().union(*kept)
    mass = sum(low[at] for at in inside)
    background = [low[at] for at in range(len(low)) if at not in inside]
    return (1 - mass) * entropy(background) / math.log(len(low)), len(kept), mass


@ROWS
def test_dispersion_of_the_model(columns, plain, row):
    ((rows, width),) = plain.spans.grids
    for place, name in enumerate(("dispersion_score", "components", "component_mass")):
        for layer in range(plain.layers):
            expected = [
                slow_dispersion(image_rows(plain, row, token, layer), rows, width)[place]
                for token in range(len(plain.ids))
            ]
            np.testing.assert_allclose(columns[f"{name}_{row}_l{layer:02d}"], expected, atol=TOLERANCE)


def test_dispersion_of_maps_with_spots():
    """Smooth maps, whose peaks are spots of all sizes; the tiny model's own seldom have one."""
    random = np.random.default_rng(0)
    maps = random.random((40, 14, 12))
    for _ in range(2):
        maps = sum(np.roll(maps, shift, axis) for axis in (1, 2) for shift in (-1, 0, 1))
    found = dispersion([maps])
    expected = [slow_dispersion(one.ravel().tolist(), 14, 12) for one in maps]
    assert len({spots for _, spots, _ in expected}) > 3
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    mirrored = dispersion([maps[:, :7], maps[:, 7:]])  # two tiles: spots end at their border
    assert (mirrored[:, 1] != found[:, 1]).any()


@ROWS
def test_sinks(columns, plain, row):
    def is_sink(layer, at):
        size = plain.states[0].shape[-1]
        root = [math.sqrt(mean(v * v for v in plain.states[layer][where].tolist())) for where in (at, 0)]
        first = [abs(v) / root[1] for v in plain.states[layer][0].tolist()]
        dimensions = sorted(range(size), key=lambda d: -first[d])[:2]
        return max(abs(float(plain.states[layer][at][d])) / root[0] for d in dimensions) > 20 * math.sqrt(size / 4096)

    flags = [[is_sink(layer, at) for at in plain.spans.image] for layer in range(plain.layers)]

    def share(token, layer):
        image = image_rows(plain, row, token, layer)
        return sum(a for a, sink in zip(image, flags[layer], strict=True) if sink) / sum(image)

    def rest(token, layer):
        image = image_rows(plain, row, token, layer)
        kept = sum(a for a, sink in zip(image, flags[layer], strict=True) if not sink)
        first = float(plain.maps[layer, :, plain.at(token, row), 0].mean())
        return kept / (1 - first - (sum(image) - kept))

    for layer in range(plain.layers):
        found = [share(token, layer) for token in range(len(plain.ids))]
        np.testing.assert_allclose(columns[f"sink_share_{row}_l{layer:02d}"], found, atol=TOLERANCE)
    check_layers(columns, f"image_without_sinks_{row}", plain, rest, range(plain.layers))


def test_a_sink_is_massive_in_the_dimensions_of_the_first_token():
    first, image = torch.ones(4096), torch.ones(3, 4096)
    first[[7, 9]] = 500.0
    image[0, 7], image[1, 100], image[2, 7] = 40.0, 40.0, 20.0
    assert sinks(image, first).tolist() == [True, False, False]


# --- hidden states --------------------------------------------------------------------------------------------------


@ROWS
def test_cosines_to_patches(columns, plain, row):
    image, count = plain.spans.image, max(1, round(0.05 * len(plain.spans.image)))
    for layer in range(1, plain.layers + 1):
        states = plain.states[layer]
        rows = [sorted(cos(states[plain.at(t, row)], states[at]) for at in image) for t in range(len(plain.ids))]
        check(columns, f"patch_consistency_{row}_l{layer - 1:02d}", [mean(one[-count:]) for one in rows])
        check(columns, f"contextual_lens_{row}_l{layer - 1:02d}", [one[-1] for one in rows])


@ROWS
def test_glsim(columns, plain, row):
    image, last, near = plain.spans.image, plain.layers, plain.depth(31)
    count = min(max(round(len(image) / 18), 4), len(image))
    local, total = [], []
    for token, word in enumerate(plain.ids):
        state = plain.states[near][plain.at(token, row)]
        said = sorted(image, key=lambda at, word=word: -plain.lens(last, at, word))[:count]
        local.append(mean(cos(plain.states[last][at], state) for at in said))
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
        said = {at: plain.lens(asked, at, word, temperature=10) for at in question}
        cafe.append(max(said.values()))
        near.append(cafe[-1] * mean(sorted(cos(state, plain.states[vision][at]) for at in image)[-count:]))
        best = sorted(said, key=lambda at: -said[at])[:4]
        centre = sum(plain.states[asked][at] for at in best) / len(best)
        distance = float((state - centre).norm() / state.norm())
        context.append((2 - distance) * mean(said[at] for at in best))
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
        said = [plain.lens(last, at, word) for at in image]
        gate = 1 / (1 + math.exp(-sum(said)))
        evidence.append(cos(plain.states[last][plain.spans.length - 1], state) * gate)
        seen = sum(
            p / sum(said) * max(cos(plain.states[last][at], state), 0) for p, at in zip(said, image, strict=True)
        )
        prefix = [*plain.spans.question, *range(plain.spans.length, plain.spans.length + token)]
        read = mean(sorted(max(cos(plain.states[0][at], state), 0) for at in prefix)[-10:])
        ratio.append(seen / (seen + read))
    check(columns, f"visual_evidence_{row}", evidence)
    check(columns, f"visual_ratio_{row}", ratio)
    check(columns, f"viser_{row}", [0.4 * a + 0.6 * b for a, b in zip(evidence, ratio, strict=True)])


def test_internal_confidence(columns, plain):
    best, where, sums = [], [], []
    for word in plain.ids:
        by_layer = [[plain.lens(layer, at, word) for at in plain.spans.image] for layer in range(plain.layers + 1)]
        most = [max(values) for values in by_layer]
        best.append(max(most))
        where.append(most.index(max(most)) / plain.layers)
        sums.append(sum(by_layer[-1]))
    check(columns, "internal_confidence", best)
    check(columns, "internal_confidence_layer", where)
    check(columns, "internal_confidence_sum", sums)


def test_lens_trajectory(columns, plain):
    norm = next(m for n, m in plain.adapter.model.named_modules() if n.endswith("language_model.norm"))

    def distance(token, layer):
        with torch.no_grad():
            state = norm(plain.states[layer + 1][plain.at(token, "q")].float()).double()
        p, q = (plain.head @ state).softmax(-1).tolist(), plain.logits[plain.at(token, "q")].softmax(-1).tolist()
        middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        halves = [sum(a * math.log(a / m) for a, m in zip(one, middle, strict=True) if a > 0) for one in (p, q)]
        return sum(halves) / 2

    check_layers(columns, "lens_divergence", plain, distance, range(plain.layers - 1))


# --- contrasts ------------------------------------------------------------------------------------------------------


def divergence(one, other):
    middle = [(a + b) / 2 for a, b in zip(one, other, strict=True)]
    return sum(sum(a * math.log(a / m) for a, m in zip(p, middle, strict=True)) for p in (one, other)) / 2


def predicted(plain, logits):
    """The rows that predict the answer, (T, V)."""
    return torch.stack([logits[plain.at(token, "q")] for token in range(len(plain.ids))]).double()


def logprob(logits, ids):
    return [float(row.log_softmax(-1)[word]) for row, word in zip(logits, ids, strict=True)]


def differences(one, other):
    return [a - b for a, b in zip(one, other, strict=True)]


def test_noised_image(columns, plain):
    kept = 1.0
    for step in range(501):
        beta = 1 / (1 + math.exp(-(-6 + 12 * step / 999))) * (5e-3 - 1e-5) + 1e-5
        kept *= 1 - beta
    noise = torch.randn(plain.pixels.shape, generator=torch.Generator().manual_seed(0))
    pixels = math.sqrt(kept) * plain.pixels + math.sqrt(1 - kept) * noise
    torch.testing.assert_close(noised(plain.pixels), pixels)
    one, other = predicted(plain, plain.logits), predicted(plain, plain.run(pixel_values=pixels).logits[0])
    check(columns, "vcd_gap", differences(logprob(one, plain.ids), logprob(other, plain.ids)))
    check(columns, "vcd_logprob", logprob(2 * one - other, plain.ids))
    pairs = zip(one.softmax(-1).tolist(), other.softmax(-1).tolist(), strict=True)
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
    one, other = predicted(plain, plain.logits), without(plain, set(plain.spans.image))
    check(columns, "pmi_no_image", differences(logprob(one, plain.ids), logprob(other, plain.ids)))
    pairs = zip(one.softmax(-1).tolist(), other.softmax(-1).tolist(), strict=True)
    check(columns, "no_image_divergence", [divergence(*pair) for pair in pairs])


def test_core(columns, plain):
    layers = range(plain.depth(10), min(plain.depth(25) + 1, plain.layers))
    sums = dict.fromkeys(plain.spans.image, 0.0)
    for token in range(len(plain.ids)):
        for layer in layers:
            for at, value in zip(plain.spans.image, image_rows(plain, "q", token, layer), strict=True):
                sums[at] += value
    core = set(sorted(sums, key=lambda at: -sums[at])[: round(0.4 * len(sums))])
    one, other = predicted(plain, plain.logits), without(plain, core)
    bits = [[entropy(row.softmax(-1).tolist(), 2) for row in rows] for rows in (one, other)]
    information = differences(bits[1], bits[0])
    check(columns, "core_information", information)
    check(columns, "vauq", [h - 0.6 * s for h, s in zip(bits[0], information, strict=True)])
    check(columns, "core_gap", differences(logprob(one, plain.ids), logprob(other, plain.ids)))


# --- the rest -------------------------------------------------------------------------------------------------------


def test_every_new_feature_is_transcribed_here():
    """A feature that is added without a transcription is named by this test."""
    text = Path(__file__).read_text()
    new = [item for item in FEATURES.values() if item.needs & set(MORE_NEEDS) or item.group == "logits"]
    stems = {item.name.removesuffix("_q").removesuffix("_c") for item in new}
    assert not {stem for stem in stems if stem not in text and stem.partition("_")[0] != "lookback"}


def test_every_new_feature_says_what_it_reads(adapter, encoded, answer):
    """A feature works when the trace was asked for exactly the parts that it declares."""
    for item in FEATURES.values():
        if item.needs & set(MORE_NEEDS):
            values = item.function(adapter.trace(encoded, answer, item.needs))
            assert len(values) == len(answer.token_ids)
            assert item.high in ("hallucinated", "grounded", "depends")
            assert item.summary.endswith(".")


def test_the_two_rows_are_neighbours(columns):
    """The row that consumes a token predicts the next one."""
    for name in ("glsim_global", "pas", "attention_peak_{}_l01", "top20_mean_{}_l00h01", "overtrust"):
        q, c = (columns[name.format(row) if "{" in name else f"{name}_{row}"] for row in ("q", "c"))
        np.testing.assert_allclose(q[1:], c[:-1], atol=1e-6)


def test_models_that_lack_a_thing_say_so():
    adapter = load("blip-2-t5", "Question: {question} Answer:")
    encoded = adapter.encode(PICTURE, "Is there a dog?")
    answer = adapter.generate([encoded], Generation(max_new_tokens=4))[0]
    with pytest.raises(
        CapabilityError, match=r"reads the image in an encoder.*without=\[sinks,states\].*glsim_local_q"
    ):
        adapter.trace(encoded, answer, ["states"])
    trace = adapter.trace(encoded, answer, ["heads"])
    with pytest.raises(CapabilityError, match=r"dispersion_score.*without=\[grid\]"):
        FeatureSet(["grid"]).compute(trace)
