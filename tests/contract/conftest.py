"""Every model configuration, as an adapter that needs neither files nor network."""

import pytest
import torch
from contract_helpers import CONFIGS, QUESTIONS, load, picture

from stethoscope.records import Generation


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


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
