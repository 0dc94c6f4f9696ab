"""A tiny model on disk, for tests that load or change its files."""

import pytest

from stethoscope.adapters.hf import HfAdapter


@pytest.fixture(scope="module")
def saved_qwen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    adapter = HfAdapter(random_init="tiny", family="qwen2_vl", device="cpu")
    adapter.model.save_pretrained(folder)
    adapter.processor.save_pretrained(folder)
    return folder
