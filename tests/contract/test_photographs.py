"""On photographs an adapter prepares what the family's own processor prepares, asked directly."""

from pathlib import Path

import matplotlib
import sklearn.datasets
import torch
from helpers.contract_helpers import phrased, squared
from PIL import Image

PHOTOGRAPHS = (
    Path(sklearn.datasets.__file__).parent / "images" / "china.jpg",
    Path(sklearn.datasets.__file__).parent / "images" / "flower.jpg",
    Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg",
)
QUESTIONS = ("What is in the image?", "Is there a person in the photo?")


def direct(adapter, photograph, question, prompt):
    """What the processor makes of a photograph and a question, in the way that model cards show."""
    processor = adapter.processor
    if prompt is None:
        parts = [{"type": "image", "image": photograph}, {"type": "text", "text": question}]
        return processor.apply_chat_template(
            [{"role": "user", "content": parts}],
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        )  # fmt: skip
    text = prompt.replace("{question}", question).replace("{image}", "<image>")
    return processor(images=photograph, text=text, return_tensors="pt")


def test_inputs_are_those_of_the_processor_also_when_they_are_repeated(adapter):
    photographs = [Image.open(path).convert("RGB") for path in PHOTOGRAPHS]
    assert len({photograph.size for photograph in photographs}) > 1
    pairs = [(photograph, question) for photograph in photographs for question in QUESTIONS]
    first, again = ([adapter.encode(*pair) for pair in pairs] for _ in range(2))
    for (photograph, question), encoded, other in zip(pairs, first, again, strict=True):
        wanted = direct(adapter, squared(adapter, photograph), phrased(adapter, question), adapter.prompt)
        wanted.pop("labels", None)  # PaliGemma's, for training
        assert wanted.keys() == encoded.inputs.keys() == other.inputs.keys()
        for name, value in wanted.items():
            assert value.dtype == encoded.inputs[name].dtype
            torch.testing.assert_close(encoded.inputs[name], value, rtol=0, atol=1e-5)
            assert torch.equal(other.inputs[name], encoded.inputs[name])
