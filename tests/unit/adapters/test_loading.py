"""Loading options: where weights lie changes no answer, no trace and no map; what goes wrong is one line."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from stethoscope import testbed
from stethoscope.adapters import loading, tiny
from stethoscope.adapters.hf import HfAdapter
from stethoscope.adapters.load_settings import NOT_QUANTIZED, Loading
from stethoscope.adapters.testbed import TestbedAdapter
from stethoscope.core.errors import CapabilityError, ConfigError, DataError, StethoscopeError
from stethoscope.core.types import Generation
from stethoscope.tracing.trace import REQUIREMENTS

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8))
QUESTION = "Is there a dog in the image?"
FAMILIES = {
    "llava": ("USER: <image>\n{question} ASSISTANT:", "model.language_model.layers"),
    "blip-2-opt": (
        "Question: {question} Answer:",
        "language_model.model.decoder.layers",
        "language_model.model.decoder",
    ),
    "blip-2-t5": ("Question: {question} Answer:", "language_model.decoder.block", "language_model.decoder"),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    """A folder with a tiny model of a family, and the family's name."""
    folder = tmp_path_factory.mktemp(request.param)
    model, processor = tiny.build(request.param)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, request.param


def load(saved, **settings):
    folder, family = saved
    adapter = HfAdapter(str(folder), prompt=FAMILIES[family][0], dtype="float32", **settings)
    adapter.setup()
    return adapter


def tensors(value, prefix=""):
    """Every tensor of nested dataclasses by its path."""
    if torch.is_tensor(value):
        return {prefix: value}
    if dataclasses.is_dataclass(value):
        parts = {}
        for field in dataclasses.fields(value):
            parts |= tensors(getattr(value, field.name), f"{prefix}.{field.name}")
        return parts
    return {}


def measured(adapter):
    encoded = adapter.encode(IMAGE, QUESTION)
    greedy, beams = Generation(max_new_tokens=6), Generation(max_new_tokens=6, num_beams=2)
    answers = [adapter.generate([encoded], generation)[0] for generation in (greedy, beams)]
    return answers, adapter.trace(encoded, answers[0], REQUIREMENTS)


def leaves(model, layers, spread):
    """A map of all modules, at the depth of one layer of the list ``layers``, in turns to ``spread``.

    Modules that share their weights stay together, as in the maps that accelerate makes.
    """
    places, device_map = iter(spread * 1000), {}
    owners = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    shared = {owner for owner in owners if owners.count(owner) > 1}

    def walk(module, path):
        inside = layers.startswith(f"{path}.") or layers == path or path == ""
        if not inside:
            tied = any(id(parameter) in shared for parameter in module.parameters())
            device_map[path] = spread[0] if tied else next(places)
            return
        for name, child in module.named_children():
            walk(child, f"{path}.{name}".lstrip("."))
        for name, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            device_map[f"{path}.{name}".lstrip(".")] = "cpu"

    walk(model, "")
    return device_map


LOCATIONS = {"cpu": None, "by name": None, "cpu and disk": ["cpu", "disk"], "disk": ["disk"], "full": None}


@pytest.mark.parametrize("device_map", LOCATIONS)
def test_the_device_map_changes_no_result(saved, device_map, tmp_path):
    plain = load(saved, device="cpu")
    if device_map == "cpu":
        settings = {"device_map": {"": "cpu"}}
    elif device_map == "by name":
        settings = {"device_map": "auto", "max_memory": {"cpu": "1GiB"}}
    elif device_map == "full":  # what the CPU may not take goes to disk
        largest = sum(p.nbytes for p in plain.model.parameters()) // 2
        settings = {"device_map": "sequential", "max_memory": {"cpu": largest}, "offload_folder": str(tmp_path)}
    else:
        spread = leaves(plain.model, FAMILIES[saved[1]][1], LOCATIONS[device_map])
        settings = {"device_map": spread, "offload_folder": str(tmp_path)}
    adapter = load(saved, **settings)
    away = [name for name, parameter in adapter.model.named_parameters() if parameter.is_meta]
    assert bool(away) == (device_map not in ("cpu", "by name"))  # offloaded weights are on no device between the passes
    (answers, trace), (expected, whole) = measured(adapter), measured(plain)
    assert answers == expected
    parts = tensors(trace)
    assert any(name.startswith(".relevancy.") for name in parts)
    for name, tensor in tensors(whole).items():
        torch.testing.assert_close(parts[name], tensor, atol=0, rtol=0, msg=f"{device_map}: {name}")
    assert adapter.fingerprint() == plain.fingerprint()


def test_random_models_follow_device_map_too():
    spread = {"model": "disk", "lm_head": "cpu"}
    plain, placed = (HfAdapter(random_init="tiny", device_map=device_map) for device_map in (None, spread))
    assert plain.generate([plain.encode(IMAGE, QUESTION)], Generation(4)) == placed.generate(
        [placed.encode(IMAGE, QUESTION)], Generation(4)
    )
    assert next(placed.model.model.parameters()).is_meta
    assert plain.fingerprint()["weights"] == placed.fingerprint()["weights"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quantize": "3bit"}, "unknown quantize '3bit'"),
        ({"device_map": "automatic"}, "device_map='automatic' should be auto"),
        ({"device_map": ["cpu"]}, r"device_map=\['cpu'\] should be auto"),
        ({"device_map": "auto", "max_memory": "20GiB"}, "max_memory='20GiB' should be sizes by device"),
        ({"trust_remote_code": "false"}, "trust_remote_code='false' should be true or false"),
        ({"local_files_only": 1}, "local_files_only=1 should be true or false"),
        ({"revision": 5}, "revision=5 should be a text or null"),
        ({"offload_folder": 5}, "offload_folder=5 should be a text"),
        ({"attention": 5}, "attention=5 should be a text"),
        ({"max_memory": {0: "20GiB"}}, "device_map=auto"),
        ({"device_map": {"": "cpu"}, "max_memory": {0: "20GiB"}}, "device_map=auto"),
        ({"device_map": "auto", "max_memory": {"gpu": "20GiB"}}, "device 'gpu'"),
        ({"device_map": "auto", "max_memory": {0: "much"}}, "20GiB"),
        ({"device_map": "auto", "max_memory": {0: None}}, "20GiB"),
    ],
)
def test_wrong_settings(settings, words):
    with pytest.raises(ConfigError, match=words) as error:
        Loading(**settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("settings", [{"device_map": {"": 9}}, {"device_map": "auto", "max_memory": {9: "1GiB"}}])
def test_a_gpu_that_is_not_there(settings):
    with pytest.raises(CapabilityError, match="names GPU 9; this machine has"):
        HfAdapter(random_init="tiny", **settings).setup()


@pytest.mark.parametrize("device", ["cuda:7", "mps", "meta", "nowhere"])
@pytest.mark.parametrize("setting", ["device", "device_map", "part of the map"])
def test_a_device_that_holds_nothing_here(device, setting, monkeypatch):
    """The files of the model are not blamed, and none is read."""
    monkeypatch.setattr(Loading, "location", lambda *_: pytest.fail("asked where the files are"))
    if setting == "device_map" and device in ("meta", "nowhere"):
        pytest.skip("is refused as no device map at all")
    settings = (
        {"device_map": {"model": "cpu", "lm_head": device}} if setting == "part of the map" else {setting: device}
    )
    with pytest.raises(CapabilityError, match=f"device '{device}' cannot be used") as error:
        HfAdapter(str(testbed.MODEL_DIR), **settings).setup()
    assert "\n" not in str(error.value)


def test_quantising_without_bitsandbytes_is_refused_before_anything_is_read(monkeypatch):
    import transformers.utils.import_utils as installed

    monkeypatch.setattr(installed, "is_bitsandbytes_available", lambda *_: False)
    monkeypatch.setattr(Loading, "location", lambda *_: pytest.fail("asked where the files are"))
    for settings in ({"model_id": "nobody/has-this-model"}, {"random_init": "tiny"}):
        with pytest.raises(CapabilityError, match=r"bitsandbytes>=0\.46\.1.*lvlm-stethoscope\[quantize\]"):
            HfAdapter(**settings, quantize="4bit", prompt="{image}{question}").setup()


def test_quantising_without_a_device_for_it_is_refused(monkeypatch):
    import transformers.utils.import_utils as installed

    class Bits:
        supported_torch_devices = frozenset({"xpu"})
        __version__ = "0.48.0"

    monkeypatch.setattr(installed, "is_bitsandbytes_available", lambda *_: True)
    monkeypatch.setitem(sys.modules, "bitsandbytes", Bits)
    with pytest.raises(CapabilityError, match=r"quantize=8bit runs on xpu .* has cpu"):
        Loading(quantize="8bit").check_machine()


def test_names_that_stay_whole():
    """The rule that transformers applies, on paths of the families (and of modules with similar names)."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    whole = [
        "lm_head", "language_model.lm_head", "model.vision_tower.encoder.layers.0.self_attn.q_proj",
        "model.multi_modal_projector.linear_1", "model.visual.blocks.3.attn.qkv", "model.visual.merger.mlp.0",
        "qformer.encoder.layer.0.attention.attention.query", "language_projection",
        "model.connector.modality_projection",
        "vision_model.encoder.layers.0.mlp.fc1", "model.visual_abstractor.encoder.layers.0.crossattention.k_proj",
    ]  # fmt: skip
    smaller = [
        "model.language_model.layers.0.self_attn.q_proj", "language_model.model.decoder.layers.11.fc1",
        "language_model.encoder.block.0.layer.0.SelfAttention.q", "model.text_model.layers.0.mlp.down_proj",
        "model.language_model.layers.0.self_attn.k_proj.multiway.0",
    ]  # fmt: skip
    assert not any(should_convert_module(name, [NOT_QUANTIZED]) for name in whole)
    assert all(should_convert_module(name, [NOT_QUANTIZED]) for name in smaller)


@pytest.mark.parametrize(("quantize", "kind"), [("4bit", "Linear4bit"), ("8bit", "Linear8bitLt")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_the_language_model_is_quantised(quantize, kind, dtype):
    pytest.importorskip("bitsandbytes", minversion="0.46.1")
    whole = HfAdapter(random_init="tiny", family="llava", dtype=dtype, device="cpu")
    adapter = HfAdapter(random_init="tiny", family="llava", dtype=dtype, device="cpu", quantize=quantize)
    kinds = {name: type(module).__name__ for name, module in adapter.model.named_modules() if "inear" in repr(module)}
    small = {name for name, class_name in kinds.items() if class_name == kind}
    assert small == {
        name for name, class_name in kinds.items() if "language_model.layers." in name and kind in class_name
    }
    assert "model.language_model.layers.0.mlp.up_proj" in small
    if quantize == "4bit":
        module = adapter.model.get_submodule("model.language_model.layers.0.mlp.up_proj")
        assert (module.compute_dtype, module.weight.quant_type) == (getattr(torch, dtype), "nf4")
    assert adapter.fingerprint()["quantize"] == quantize
    assert adapter.fingerprint()["weights"] != whole.fingerprint()["weights"]


@pytest.mark.parametrize(("quantize", "alike"), [("8bit", 0.99), ("4bit", 0.9)])
def test_a_quantised_model_answers_and_its_maps_are_those_of_the_whole_one(quantize, alike):
    """The trained model: gradients through quantised layers give nearly the maps that whole layers give."""
    pytest.importorskip("bitsandbytes", minversion="0.46.1")
    scene, adapters = testbed.scenes(1)[0].image(), [TestbedAdapter(device="cpu", quantize=q) for q in (None, quantize)]
    encoded = [adapter.encode(scene, "Please describe this image in detail.") for adapter in adapters]
    answer = adapters[0].generate(encoded[:1], Generation(max_new_tokens=6))[0]
    whole, small = (
        adapter.trace(prompt, answer, REQUIREMENTS) for adapter, prompt in zip(adapters, encoded, strict=True)
    )
    assert 0 < (small.logits - whole.logits).abs().mean() < 0.5
    assert 0 < (small.mass - whole.mass).abs().mean() < 0.02
    maps = torch.stack([trace.relevancy.image.flatten() for trace in (whole, small)])
    assert alike < torch.corrcoef(maps)[0, 1] < 1


def broken(folder, change):
    """Changes the file of weights."""
    path = Path(folder) / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


@pytest.fixture
def folder(tmp_path):
    model, processor = tiny.build("llava")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    return tmp_path


def one_line(folder, kind, *words):
    with pytest.raises(kind) as error:
        load((folder, "llava"), device="cpu")
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("length", [0, 7, 100, -1000])
def test_weights_cut_short(folder, length):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    one_line(folder, DataError, str(folder), "cannot be read")


def test_weights_of_another_size(folder):
    def change(weights):
        name = next(name for name in weights if name.endswith("layers.1.mlp.up_proj.weight"))
        weights[name] = weights[name][:-1].clone()

    broken(folder, change)
    one_line(folder, DataError, "layers.1.mlp.up_proj.weight", "63", "64")


def test_weights_of_another_model(folder):
    broken(folder, lambda weights: [weights.__setitem__(f"other.{name}", weights.pop(name)) for name in list(weights)])
    one_line(folder, DataError, "lacks", "weights, the first is")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "preprocessor_config.json", "processor_config.json"])
def test_files_that_are_no_json(folder, name):
    if (folder / name).exists():
        (folder / name).write_text("{")
        one_line(folder, StethoscopeError, str(folder))


def test_weights_that_nobody_needs(folder):
    broken(folder, lambda weights: weights.__setitem__("model.extra.weight", torch.zeros(2)))
    with pytest.warns(UserWarning, match=r"no use for 1 weights of its files, the first is model\.extra\.weight"):
        load((folder, "llava"), device="cpu")


def test_a_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    one_line(folder, StethoscopeError, str(folder), "safetensors")


def test_a_folder_without_a_model(tmp_path):
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(DataError, match=r"holds no model: it has no config.json; name one that save_pretrained wrote"):
        HfAdapter(str(tmp_path)).setup()


@pytest.fixture
def old_llava(tmp_path):
    """A LLaVA folder without ``processor_config.json``, as from before it had one."""
    model, processor = tiny.build("llava")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    (tmp_path / "processor_config.json").unlink()
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings["image_processor"]))
    return tmp_path, settings


def test_an_old_llava_folder_tells_its_patches_by_its_model(old_llava):
    adapter = load((old_llava[0], "llava"))
    text = tiny.build("llava")[1]
    for name in ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens"):
        assert getattr(adapter.processor, name) == getattr(text, name)
    assert adapter.generate([adapter.encode(IMAGE, QUESTION)], Generation(max_new_tokens=2))


@pytest.mark.parametrize(("name", "value"), [("num_additional_image_tokens", 3), ("patch_size", 7)])
def test_a_processor_that_does_not_fit_its_model_is_corrected(old_llava, name, value):
    folder, settings = old_llava
    (folder / "processor_config.json").write_text(json.dumps({**settings, name: value}))
    with pytest.warns(UserWarning, match=f"{name}={value}"):
        adapter = load((folder, "llava"))
    assert adapter.generate([adapter.encode(IMAGE, QUESTION)], Generation(max_new_tokens=2))


def test_fewer_layers_than_the_file_holds_are_refused(old_llava):
    path = old_llava[0] / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["num_hidden_layers"] -= 1
    config["text_config"].pop("layer_types", None)
    path.write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"more layers than its config\.json"):
        load((old_llava[0], "llava"))


def test_an_adapter_of_peft_without_peft_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "a/b", "peft_type": "LORA"}))
    monkeypatch.setattr("transformers.utils.is_peft_available", lambda: False)
    with pytest.raises(CapabilityError, match="pip install peft"):
        HfAdapter(str(tmp_path)).setup()


def test_an_adapter_of_peft_is_read_with_its_base(tmp_path):
    """peft's own ``save_pretrained`` writes no processor; the base model has one."""
    peft = pytest.importorskip("peft")
    model, processor = tiny.build("llava")
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    base = loading.pretrained(type(model), str(tmp_path / "base"), Loading())
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    tuned = peft.get_peft_model(base, settings)
    tuned.save_pretrained(tmp_path / "lora")
    adapter = HfAdapter(str(tmp_path / "lora"), prompt=FAMILIES["llava"][0], dtype="float32")
    encoded = adapter.encode(IMAGE, QUESTION)
    answer = adapter.generate([encoded], Generation(max_new_tokens=4))[0]
    ids = torch.tensor([answer.token_ids])
    inputs = {**encoded.inputs, "input_ids": torch.cat([encoded.inputs["input_ids"], ids], 1)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        expected = tuned(**inputs).logits[0, -len(answer.token_ids) - 1 : -1]
    assert torch.allclose(adapter.trace(encoded, answer).logits, expected, atol=1e-4)
    assert adapter.fingerprint()["weights"].startswith("state:")


@pytest.mark.parametrize("own", [False, True])
def test_the_processor_of_an_adapter_of_peft_is_its_own_or_that_of_its_base(tmp_path, own, monkeypatch):
    monkeypatch.setattr("transformers.utils.is_peft_available", lambda: True)
    monkeypatch.setattr(loading, "pretrained", lambda *_: pytest.fail("weights were read"))
    model, processor = tiny.build("llava")
    lora, base = tmp_path / "lora", tmp_path / "base"
    for folder in (base, lora) if own else (base,):
        processor.patch_size = 7 if folder == lora else 14
        processor.save_pretrained(folder)
    model.config.save_pretrained(base)
    lora.mkdir(exist_ok=True)
    settings = {"base_model_name_or_path": str(base), "peft_type": "LORA"}
    (lora / "adapter_config.json").write_text(json.dumps(settings))

    def check(loaded):
        raise RuntimeError(f"{loaded.patch_size} pixels")

    with pytest.raises(RuntimeError, match=f"{7 if own else 14} pixels"):
        loading.load(str(lora), Loading(), check)


def test_a_checkpoint_of_llavas_authors_is_named_for_what_it_is(tmp_path):
    config = {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"], "mm_vision_tower": "openai/clip"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CapabilityError, match=r"format of LLaVA's authors.*llava-hf"):
        HfAdapter(str(tmp_path)).setup()
