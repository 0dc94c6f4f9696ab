"""What the transcriptions are made from: plain eager passes of a real tiny LLaVA, and loops over numbers."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from stethoscope.adapters.hf import HfAdapter

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (56, 72, 3), dtype=np.uint8))
ROWS = pytest.mark.parametrize("row", ["q", "c"])
TOLERANCE = 1e-5


class Deep(HfAdapter):
    """The tiny LLaVA with seventeen layers and a hundred image tokens, so that no two settings mean the same."""

    layers = 17

    def _tiny(self):
        model, processor = super()._tiny()
        config = model.config
        config.text_config.num_hidden_layers, config.vision_config.image_size = self.layers, 140
        config.text_config.initializer_range = 0.15
        config.image_seq_length = 100
        processor.image_processor.size = {"shortest_edge": 140}
        processor.image_processor.crop_size = {"height": 140, "width": 140}
        torch.manual_seed(0)
        return type(model)(config).double(), processor  # so that only the reductions round


def load(family, prompt="USER: {image}\n{question} ASSISTANT:", kind=None):
    kind = kind or (Deep if family == "llava" else HfAdapter)
    adapter = kind(random_init="tiny", family=family, prompt=prompt, device="cpu")
    adapter.setup()
    return adapter


class Shallow(Deep):
    """The same with four layers, as the embedded model has."""

    layers = 4


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
        assert (self.layers, len(self.spans.image)) == (adapter.layers, 100)

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


def cos(left, other):
    return float(
        (left * other).sum() / (math.sqrt(float((left * left).sum())) * math.sqrt(float((other * other).sum())))
    )


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


def image_rows(plain, row, token, layer):
    """Head-mean attention to the image tokens."""
    return [float(plain.maps[layer, :, plain.at(token, row), position].mean()) for position in plain.spans.image]


def divergence(left, other):
    middle = [(a + b) / 2 for a, b in zip(left, other, strict=True)]
    return sum(sum(a * math.log(a / m) for a, m in zip(p, middle, strict=True)) for p in (left, other)) / 2


def predicted(plain, logits):
    """The rows that predict the answer, (T, V)."""
    return torch.stack([logits[plain.at(token, "q")] for token in range(len(plain.ids))]).double()


def logprob(logits, ids):
    return [float(row.log_softmax(-1)[word]) for row, word in zip(logits, ids, strict=True)]


def differences(left, other):
    return [a - b for a, b in zip(left, other, strict=True)]
