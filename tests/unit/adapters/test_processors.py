"""Processors of families that read videos too, loaded for images where torchvision and num2words are missing."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, ProcessorMixin
from transformers.utils import is_num2words_available, is_torchvision_available

from stethoscope.adapters import processors, tiny
from stethoscope.adapters.hf import HfAdapter
from stethoscope.core.errors import CapabilityError, StethoscopeError
from stethoscope.core.types import Generation

PROMPTS = {
    "paligemma": "<image>answer en {question}",
    "paligemma2": "<image>answer en {question}",
    "llava": "USER: <image>\n{question} ASSISTANT:",
}
NATIVE = (
    "llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "idefics3", "smolvlm",
    "paligemma", "paligemma2", "gemma3",
)  # fmt: skip
VIDEO = ("llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm")
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 100, 3), dtype=np.uint8))
QUESTION = "Is there a dog in the image?"
HERE = {"revision": "main", "local_files_only": True, "trust_remote_code": False}


def adapter(family, model_id=None):
    settings = {"prompt": PROMPTS.get(family), "dtype": "float32", "device": "cpu"}
    hf_adapter = (
        HfAdapter(model_id, **settings) if model_id else HfAdapter(random_init="tiny", family=family, **settings)
    )
    hf_adapter.setup()
    return hf_adapter


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folder of a family's tiny model and processor, written once."""
    written = {}

    def folder(family):
        if family not in written:
            written[family] = tmp_path_factory.mktemp(family)
            for part in tiny.build(family):
                part.save_pretrained(written[family])
        return written[family]

    return folder


@pytest.mark.parametrize("family", NATIVE)
def test_a_folder_gives_the_answers_of_the_model_in_memory(folders, family):
    saved, loaded = adapter(family), adapter(family, str(folders(family)))
    assert type(loaded.model) is type(saved.model)
    assert type(loaded.processor).__name__ == type(saved.processor).__name__
    in_memory, other = saved.encode(IMAGE, QUESTION), loaded.encode(IMAGE, QUESTION)
    assert (in_memory.text, in_memory.spans) == (other.text, other.spans)
    assert in_memory.inputs.keys() == other.inputs.keys()
    assert all(torch.equal(in_memory.inputs[name], other.inputs[name]) for name in in_memory.inputs)
    generation = Generation(max_new_tokens=5)
    first, second = (a.generate([e], generation)[0] for a, e in ((saved, in_memory), (loaded, other)))
    assert first.token_ids == second.token_ids
    assert first.logprobs == pytest.approx(second.logprobs, abs=1e-5)


@pytest.fixture(params=VIDEO)
def like_the_hub(request, folders, tmp_path):
    """A folder as the hub has it: settings in several files, one of them for videos."""
    source = folders(request.param)
    for path in source.iterdir():
        if path.name not in ("processor_config.json", "model.safetensors"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    settings = json.loads((source / "processor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings.pop("image_processor")))
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    video = settings["processor_class"].replace("2_5_VL", "2VL").replace("Processor", "VideoProcessor")
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps({"video_processor_type": video}))
    return request.param, tmp_path


@pytest.mark.skipif(is_torchvision_available(), reason="with torchvision the whole processor loads")
def test_the_layout_of_the_hub_without_torchvision(like_the_hub):
    family, folder = like_the_hub
    with pytest.raises((ImportError, ValueError, AttributeError, OSError, TypeError)):
        AutoProcessor.from_pretrained(folder, **HERE)
    loaded, (_, built) = processors.load(str(folder), HERE), tiny.build(family)
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    text = built.apply_chat_template(prompt, add_generation_prompt=True)
    assert loaded.apply_chat_template(prompt, add_generation_prompt=True) == text
    expected, other = (processor(images=IMAGE, text=text, return_tensors="pt") for processor in (built, loaded))
    assert expected.keys() == other.keys()
    assert all(torch.equal(expected[name], other[name]) for name in expected)


def test_transformers_is_left_as_it_was(folders):
    before = dict(vars(ProcessorMixin))
    loaded = processors.load(str(folders("smolvlm")), HERE)
    own = type(loaded).__mro__[2]  # behind the mixed-in class
    module = sys.modules[own.__module__]
    assert vars(ProcessorMixin) == before
    assert (module.num2words is None) == (not is_num2words_available())
    assert "video_processor" in own.get_attributes()
    assert "video_processor" not in type(loaded).get_attributes()
    if not is_num2words_available():
        with pytest.raises(ImportError, match="num2words"):
            own(loaded.image_processor, loaded.tokenizer, None)


def test_what_is_missing_is_named(folders, tmp_path):
    source = folders("qwen2_vl")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    with pytest.raises(CapabilityError, match="Qwen2VLProcessor") as error:
        processors.load(str(tmp_path), HERE)
    assert "\n" not in str(error.value)


def test_other_families_fail_as_they_did(folders, tmp_path):
    (tmp_path / "config.json").write_bytes((folders("llava") / "config.json").read_bytes())
    with pytest.raises(StethoscopeError) as error:
        adapter("llava", str(tmp_path))
    assert "\n" not in str(error.value)
