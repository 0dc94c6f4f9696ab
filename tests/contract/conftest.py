"""Every model configuration, as an adapter that needs neither files nor network."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from PIL import Image

import stethoscope.conf
from stethoscope.records import Generation

CONFIGS = sorted(path.stem for path in (Path(stethoscope.conf.__file__).parent / "model").glob("*.yaml"))
QUESTIONS = ("Is there a dog in the image?", "Please describe this image in detail.", "Yes?")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def load(name, *overrides):
    with initialize_config_module("stethoscope.conf", version_base=None):
        config = compose(overrides=[f"+model={name}", "model.device=cpu", "model.dtype=float32", *overrides])
    adapter = instantiate(config.model)
    adapter.setup()
    return adapter


def picture(seed, width=72, height=56):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="session", params=[*CONFIGS, "testbed, trained"])
def adapter(request):
    name, _, trained = request.param.partition(", ")
    return load(name) if trained else load(name, "model.random_init=tiny")


@pytest.fixture(scope="session")
def encoded(adapter):
    return [adapter.encode(picture(seed), question) for seed, question in enumerate(QUESTIONS)]


@pytest.fixture(scope="session")
def answers(adapter, encoded):
    """Answers of different lengths."""
    found = adapter.generate(encoded, Generation(max_new_tokens=7))
    return [found[0], adapter.generate(encoded[1:2], Generation(max_new_tokens=12))[0], found[2]]
