"""Every kind of model configuration, as an adapter that needs neither files nor network.

Sizes of one family with one prompt have the same tiny model, so one of them is here; that every file can be used is
in tests/integration/test_every_model.py. One family of every kind is fast, the others are slow.
"""

import pytest
import torch
from helpers.contract_helpers import CONFIGS, QUESTIONS, SIZES, distinct, load, others_slow, picture

from stethoscope.core.types import Generation


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session", params=[*others_slow(distinct(CONFIGS)), "testbed, trained"])
def adapter(request):
    name, _, trained = request.param.partition(", ")
    return load(name) if trained else load(name, "model.random_init=tiny")


@pytest.fixture(scope="session")
def encoded(adapter):
    pairs = zip(QUESTIONS, SIZES, strict=True)
    return [adapter.encode(picture(seed, *size), question) for seed, (question, size) in enumerate(pairs)]


@pytest.fixture(scope="session")
def answers(adapter, encoded):
    """Answers of different lengths."""
    batch = adapter.generate(encoded, Generation(max_new_tokens=7))
    return [batch[0], adapter.generate(encoded[1:2], Generation(max_new_tokens=12))[0], batch[2]]
