"""What every adapter that reads the authors' own files has to do, whatever its model is."""

import shutil
from pathlib import Path

import pytest
import torch

from helpers import authors_llama as llama
from stethoscope.core.types import Generation
from stethoscope.relevancy import token_relevancy


def check_saved_model(adapter, image, question, folder):
    """The model is saved and loaded like any of transformers: no key is lost and the logits are the same."""
    adapter.model.save_pretrained(folder)
    again, report = type(adapter.model).from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    inputs = adapter.encode(image, question).inputs
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, adapter.model(**inputs).logits)


def check_offloaded(adapter, load, room, image, question, folder):
    """With ``room`` bytes of memory and the rest on disk, answers and maps are the same."""
    memory = {"cpu": room, "disk": 10**9}
    offloaded = load(device="auto", device_map="auto", max_memory=memory, offload_folder=str(folder))
    assert {"cpu", "disk"} == set(offloaded.model.hf_device_map.values())
    encoded = adapter.encode(image, question)
    answers = [model.generate([encoded], Generation(max_new_tokens=3))[0] for model in (adapter, offloaded)]
    assert answers[0].token_ids == answers[1].token_ids
    assert answers[0].logprobs == pytest.approx(answers[1].logprobs, abs=1e-5)  # last bits may differ
    maps = [token_relevancy(model, image, question, "A cat.").vision for model in (adapter, offloaded)]
    assert torch.allclose(*maps, atol=1e-6)


def check_memory(adapter, source, folder, make, dtype):
    """``make`` tells of a copy of ``source`` without any weights what the loaded model takes."""
    copy = Path(shutil.copytree(source, folder / "copy"))
    for path in (*copy.rglob("*.bin"), *copy.rglob("*.safetensors"), *copy.rglob("tokenizer*")):
        path.unlink()
    memory, bytes_each = make(copy).memory(1000), 2 if dtype == "auto" else 4
    assert memory.parameters == sum(parameter.numel() for parameter in adapter.model.parameters())
    assert memory.dtype == ("float16" if dtype == "auto" else dtype)
    assert memory.weights == memory.parameters * bytes_each
    # of one step in float32, the model's and the processed ones
    scores = 4 * 2 * adapter.model.config.get_text_config(decoder=True).vocab_size
    assert memory.cache == 1000 * llama.LAYERS * 2 * llama.KEYS * llama.WIDTH // llama.HEADS * bytes_each + scores
