"""Sizes of known models that come with the package: complete, and those that the models' cards give."""

import json
from pathlib import Path

import pytest
import yaml

from stethoscope.adapters import memory
from stethoscope.adapters.load_settings import Loading
from stethoscope.core.component import conf_folder

PUBLISHED = {  # billions of parameters, as the models' pages give them (of their safetensors files)
    "llava-hf/llava-1.5-7b-hf": 7.06, "llava-hf/llava-1.5-13b-hf": 13.35, "llava-hf/llava-v1.6-mistral-7b-hf": 7.57,
    "llava-hf/llava-v1.6-vicuna-7b-hf": 7.06, "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": 0.894,
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": 8.03, "Qwen/Qwen2-VL-2B-Instruct": 2.21,
    "Qwen/Qwen2-VL-7B-Instruct": 8.29, "Qwen/Qwen2.5-VL-3B-Instruct": 3.75, "Qwen/Qwen2.5-VL-7B-Instruct": 8.29,
    "Qwen/Qwen3-VL-4B-Instruct": 4.44, "Qwen/Qwen3-VL-8B-Instruct": 8.77, "google/gemma-3-4b-it": 4.30,
    "google/paligemma-3b-mix-224": 2.92, "google/paligemma2-3b-mix-224": 3.03, "HuggingFaceM4/Idefics3-8B-Llama3": 8.46,
    "HuggingFaceTB/SmolVLM-Instruct": 2.25, "HuggingFaceTB/SmolVLM2-2.2B-Instruct": 2.25,
    "HuggingFaceTB/SmolVLM2-500M-Video-Instruct": 0.507, "OpenGVLab/InternVL3-1B-hf": 0.938,
    "OpenGVLab/InternVL3-2B-hf": 2.09, "OpenGVLab/InternVL3-8B-hf": 7.94, "Salesforce/blip2-opt-2.7b": 3.74,
    "Salesforce/blip2-opt-6.7b": 7.75, "Salesforce/blip2-flan-t5-xl": 3.94, "Salesforce/instructblip-flan-t5-xl": 4.02,
    "Salesforce/instructblip-vicuna-7b": 7.91, "Salesforce/instructblip-vicuna-13b": 14.19,
}  # fmt: skip
QUICK = ("llava-hf/llava-1.5-7b-hf", "OpenGVLab/InternVL3-1B-hf", "Salesforce/blip2-flan-t5-xl")


def test_every_hub_model_of_the_configuration_is_known():
    known = json.loads(Path(memory.__file__).with_name("known_configs.json").read_text())
    chosen = [yaml.safe_load(path.read_text()) for path in (conf_folder() / "model").glob("*.yaml")]
    hub = {node["model_id"] for node in chosen if node.get("model_id") and "authors" not in node.get("_target_", "")}
    assert set(known) == set(PUBLISHED) == hub


@pytest.mark.parametrize(
    "model_id", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in PUBLISHED]
)
def test_parameters_are_as_many_as_published(model_id, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    loading = Loading()
    estimate = memory.estimate(memory.skeleton(model_id, loading), loading, context=1024, batch_size=1)
    assert estimate.shipped
    assert estimate.parameters / 1e9 == pytest.approx(PUBLISHED[model_id], rel=0.003)
