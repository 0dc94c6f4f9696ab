"""Identity of a model: the prompt as rendered and the weights as loaded, wherever their files lie."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from stethoscope.adapters import fingerprint as digests
from stethoscope.adapters.fingerprint import _weight_files
from stethoscope.adapters.hf import HfAdapter
from stethoscope.core.errors import DataError, StethoscopeError


def fingerprint(folder, **settings):
    return HfAdapter(str(folder), dtype="float32", device="cpu", **settings).fingerprint()


def test_the_prompt_is_identified_as_rendered_not_by_the_text_of_its_template(saved_qwen):
    file = saved_qwen / "chat_template.jinja"
    text = file.read_text()
    try:
        before = fingerprint(saved_qwen)
        file.write_text("{# another comment #}" + text)
        assert fingerprint(saved_qwen) == before
        file.write_text("Today: {{ strftime_now('%H:%M:%S.%f') }} " + text)
        dated = [fingerprint(saved_qwen)["prompt"] for _ in range(2)]
        assert dated[0] != dated[1]
        assert "{question}" in dated[0]
        assert fingerprint(saved_qwen, prompt=dated[0])["prompt"] == dated[0]  # how a run goes on with its own prompt
    finally:
        file.write_text(text)


def test_weights_of_shards_in_subfolders_count(saved_qwen, tmp_path):
    model = HfAdapter(random_init="tiny", family="qwen2_vl", device="cpu").model
    (tmp_path / "parts").mkdir()
    shard = tmp_path / "parts" / "model-00001-of-00001.safetensors"
    shard.write_bytes((saved_qwen / "model.safetensors").read_bytes())
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: f"parts/{shard.name}" for name in load_file(shard)}}))
    before = digests.weights(model, str(tmp_path), True)
    assert before.startswith("sha256:")
    tensors = load_file(shard)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name] + 1}, shard)
    assert digests.weights(model, str(tmp_path), True) != before
    index.write_text("[]")
    with pytest.raises(DataError, match="no index of weights"):
        digests.weights(model, str(tmp_path), True)


@pytest.mark.parametrize("way", ["a folder without weights of its own", "an adapter on a base model"])
def test_where_files_do_not_say_the_weights_in_memory_count(way, saved_qwen, tmp_path):
    model = HfAdapter(random_init="tiny", family="qwen2_vl", device="cpu").model
    folder = tmp_path if way.startswith("a folder") else saved_qwen
    if folder is saved_qwen:
        model._hf_peft_config_loaded = True  # as transformers marks it
    before = digests.weights(model, str(folder), True)
    assert before.startswith("state:")
    with torch.no_grad():
        model.get_output_embeddings().weight.add_(1)
    assert digests.weights(model, str(folder), True) != before


@pytest.mark.parametrize("value", ["2", [[2]], [None], -1, {"id": 2}])
def test_ids_of_ends_that_are_no_ids_are_one_line(saved_qwen, tmp_path, value):
    folder = tmp_path / "model"
    shutil.copytree(saved_qwen, folder)
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": value}))
    with pytest.raises(StethoscopeError, match=r"eos_token_id|generation_config") as error:
        HfAdapter(str(folder), dtype="float32", device="cpu").setup()
    assert "\n" not in str(error.value)


def test_an_id_far_beyond_the_vocabulary_is_refused(saved_qwen, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(saved_qwen, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    token = next(iter(tokenizer["model"]["vocab"]))
    tokenizer["model"]["vocab"][token] = 2**31 - 1
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(StethoscopeError):  # at the latest where the tokenizer is digested; it took minutes
        fingerprint(folder)


APPLE_DOUBLE = b"\0\5\26\7\0\2\0\0Mac OS X        \xb0\xff"


def test_files_that_macos_leaves_are_no_weights(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = _weight_files(tmp_path)
    for name in ("._model.safetensors", "._model.safetensors.index.json", "._pytorch_model.bin"):
        (tmp_path / name).write_bytes(APPLE_DOUBLE)
    assert _weight_files(tmp_path) == before
    assert [path.name for path in before] == ["model.safetensors"]
