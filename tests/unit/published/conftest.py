"""One traced answer of a tiny LLaVA, its published features, and the same answer in a plain eager pass."""

import pytest
from helpers.plain_pass import PICTURE, Plain, load

from stethoscope.core.types import Generation
from stethoscope.features import FEATURES, GROUPS, FeatureSet
from stethoscope.tracing.trace import EXTRA_REQUIREMENTS, REQUIREMENTS


@pytest.fixture(scope="session")
def adapter():
    return load("llava")


@pytest.fixture(scope="session")
def encoded(adapter):
    return adapter.encode(PICTURE, "Please describe this image in detail.")


@pytest.fixture(scope="session")
def answer(adapter, encoded):
    return adapter.generate([encoded], Generation(max_new_tokens=10, do_sample=True, temperature=3.0, seed=1))[0]


@pytest.fixture(scope="session")
def columns(adapter, encoded, answer):
    asked = {item.group for item in FEATURES.values() if item.mentions_only}
    return FeatureSet([group for group in GROUPS if group not in asked]).compute(
        adapter.trace(encoded, answer, [*REQUIREMENTS, *EXTRA_REQUIREMENTS])
    )


@pytest.fixture(scope="session")
def plain(adapter, encoded, answer):
    return Plain(adapter, encoded, answer)
