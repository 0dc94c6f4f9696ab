"""ConvLLaVA: folders in the authors' format give the model that the authors' formulas give."""

import json
import shutil
import sys
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from helpers import authors_checks as checks
from helpers import authors_convllava as authors
from helpers import authors_llama as llama
from hydra import compose, initialize_config_module
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_sample_image
from transformers import AutoConfig, AutoTokenizer

import stethoscope
from stethoscope.adapters.authors.convllava import PROMPTS, ConvLlavaAdapter, ConvLlavaForConditionalGeneration
from stethoscope.core.errors import CapabilityError, ConfigError, DataError
from stethoscope.core.types import Generation
from stethoscope.relevancy import token_relevancy

QUESTION = "Is there a dog in the image?"
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 90, 3), dtype=np.uint8))
SYSTEM = {
    "v1": "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions.",
    "llava_v1": "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the human's questions.",
}
MEAN, STD = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The folders, and what is in them."""
    folder = tmp_path_factory.mktemp("authors")
    return folder, authors.save(folder)


def sources(folder):
    return {"model_id": str(folder / "model"), "tower": str(folder / "tower")}


def load(folder, **settings):
    chosen = {"name": "convllava-768", "resolution": authors.RESOLUTION, "dtype": "auto", "device": "cpu"}
    adapter = ConvLlavaAdapter(**{**chosen, **sources(folder), **settings})
    adapter.setup()
    return adapter


@pytest.fixture(scope="module")
def adapter(parts):
    """By the published configuration."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing in the published files is a surprise
        return stethoscope.load("convllava-768", **sources(parts[0]), resolution=authors.RESOLUTION, device="cpu")


def pixels(image, side):
    """(3, side, side) by the authors' rules, in double precision."""
    longest = max(image.size)
    square = Image.new("RGB", (longest, longest), tuple(int(part * 255) for part in MEAN))
    square.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
    values = np.asarray(square.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float64) / 255
    return torch.tensor((values - MEAN) / STD).permute(2, 0, 1)


def written_out(parts, answer=(), name="v1"):
    """The authors' logits (S, words) over prompt and answer."""
    folder, held = parts
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    before = tokenizer(f"{SYSTEM[name]} USER: ")["input_ids"]
    behind = tokenizer(f"\n{QUESTION} ASSISTANT:")["input_ids"][1:]
    image = authors.tokens(held, pixels(IMAGE, authors.RESOLUTION).float()[None])
    words = held["model.embed_tokens.weight"]
    return llama.logits(held, torch.cat([words[before], image, words[[*behind, *answer]]]))


def test_logits_are_those_of_the_authors_formulas(parts, adapter):
    encoded = adapter.encode(IMAGE, QUESTION)
    with torch.no_grad():
        logits = adapter.model(**encoded.inputs).logits[0]
    expected = written_out(parts)
    assert logits.shape == expected.shape
    assert expected.std() > 0.5
    assert (logits - expected).abs().max() < 1e-4


def test_cached_generation_is_greedy_by_the_authors_formulas(parts, adapter):
    answer = adapter.generate([adapter.encode(IMAGE, QUESTION)], Generation(max_new_tokens=5))[0]
    ids = []
    for _ in range(5):
        ids.append(int(written_out(parts, ids)[-1].argmax()))
    assert list(answer.token_ids) == ids
    logprobs = written_out(parts, ids)[-6:-1].log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]
    assert answer.logprobs == pytest.approx(logprobs.tolist(), abs=1e-4)


def test_every_tensor_comes_from_the_files_but_the_norm_that_nothing_reads(parts, adapter):
    state = adapter.model.state_dict()
    assert adapter.report.loaded == len(state)
    assert adapter.report.unexpected == ()
    assert len(state) == len([name for name in parts[1] if "rotary" not in name]) + 2
    for tensor, value in (("weight", 1.0), ("bias", 0.0)):
        assert (state[f"model.vision_tower.layernorm.{tensor}"] == value).all()


def test_the_model_is_not_the_clip_llava_that_its_files_say(parts, adapter):
    assert AutoConfig.from_pretrained(parts[0] / "model").vision_config.model_type == "clip_vision_model"
    assert adapter.model.config.vision_config.model_type == "convnext"
    assert type(adapter.model) is ConvLlavaForConditionalGeneration


@pytest.mark.parametrize(("name", "side"), [("convllava-768", 12), ("convllava-1024", 16), ("convllava-1536", 24)])
def test_published_configurations(name, side):
    with initialize_config_module("stethoscope.conf", version_base=None):
        config = compose(overrides=[f"+model={name}"]).model
    assert config.resolution == 64 * side
    size = name.removeprefix("convllava-")
    assert config.model_id == f"ConvLLaVA/ConvLLaVA-sft-{size}"
    assert config.tower == f"ConvLLaVA/ConvLLaVA-ConvNeXt-{size}"


def test_grids_follow_the_resolution(parts):
    for resolution, side in ((64, 1), (128, 2), (320, 5)):
        spans = load(parts[0], resolution=resolution).encode(IMAGE, QUESTION).spans
        assert spans.grids == ((side, side),)
        assert len(spans.image) == side**2
    assert load(parts[0], resolution=None).encode(IMAGE, QUESTION).spans.grids == ((3, 3),)  # of preprocessor_config


def test_relevancy_stays_on_the_grid_of_tokens(adapter):
    relevancy = token_relevancy(adapter, IMAGE, QUESTION, "A cat and a dog.")
    assert torch.equal(relevancy.patches.flatten(2), relevancy.image)
    assert relevancy.patches.shape[-2:] == (3, 3)
    assert (relevancy.patches[:, -1].flatten(1).std(-1) > 0).all()


@pytest.mark.parametrize("name", list(PROMPTS))
def test_prompts(parts, name):
    adapter = load(parts[0], prompt=name)
    encoded = adapter.encode(IMAGE, QUESTION)
    assert encoded.text == f"{SYSTEM[name]} USER: <image>\n{QUESTION} ASSISTANT:"
    with torch.no_grad():
        logits = adapter.model(**encoded.inputs).logits[0]
    assert (logits - written_out(parts, name=name)).abs().max() < 1e-4


def test_a_prompt_of_ones_own(parts):
    assert load(parts[0], prompt="<image> {question}").encode(IMAGE, "b").text == "<image> b"
    assert load(parts[0], prompt=None).encode(IMAGE, "b").text.startswith(SYSTEM["v1"])


@pytest.mark.parametrize("photo", ["china.jpg", "flower.jpg"])
@pytest.mark.parametrize("side", [192, 768])
def test_preprocessing_of_photographs(parts, photo, side):
    image = Image.fromarray(load_sample_image(photo))
    pixel_values = load(parts[0], resolution=side).encode(image, QUESTION).inputs["pixel_values"][0]
    assert (pixel_values.double() - pixels(image, side)).abs().max() < 1e-5


def test_a_saved_model_loads_like_any_of_transformers(adapter, tmp_path):
    checks.check_saved_model(adapter, IMAGE, QUESTION, tmp_path)


def test_layers_on_disk_and_cpu_give_the_same(parts, adapter, tmp_path):
    checks.check_offloaded(adapter, partial(load, parts[0]), 200_000, IMAGE, QUESTION, tmp_path)


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_memory_is_told_without_reading_a_weight(parts, adapter, tmp_path, dtype):
    checks.check_memory(
        adapter, parts[0], tmp_path, lambda folder: ConvLlavaAdapter(**sources(folder), dtype=dtype), dtype
    )


def test_half_precision(parts):
    adapter = load(parts[0], dtype="bfloat16")
    assert {parameter.dtype for parameter in adapter.model.parameters()} == {torch.bfloat16}
    assert adapter.generate([adapter.encode(IMAGE, QUESTION)], Generation(max_new_tokens=2))


def test_fingerprints_follow_both_folders_and_hold_no_path(parts, adapter, tmp_path):
    first = adapter.fingerprint()
    assert str(parts[0]) not in json.dumps(first)
    again = load(parts[0])
    assert again.weights_digest() == first["weights"]
    assert again.fingerprint() == first
    assert load(parts[0], text={"rms_norm_eps": 1e-6}).fingerprint() != first
    shutil.copytree(parts[0] / "tower", tmp_path / "tower")
    path = tmp_path / "tower" / "model.safetensors"
    save_file({name: tensor + 1e-3 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    second = load(parts[0], tower=str(tmp_path / "tower")).fingerprint()
    assert second["weights"] != first["weights"]
    path = tmp_path / "tower" / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_mean": [0.5, 0.5, 0.5]}))
    third = load(parts[0], tower=str(tmp_path / "tower")).fingerprint()
    assert third["settings"]["image_processor"] != second["settings"]["image_processor"]


def test_a_tokenizer_of_sentencepiece(parts, adapter, tmp_path):
    """Only ``tokenizer.model``, as in the published folders: chunk by chunk the ids are SentencePiece's own."""
    spm = pytest.importorskip("sentencepiece")
    folder = copied(parts, tmp_path, "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    text = [f"{SYSTEM['v1']} USER: Is there a dog in the picture? ASSISTANT: Yes, a dog and a cat."] * 20
    (tmp_path / "text").write_text("\n".join(text))
    spm.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(folder / "tokenizer"), vocab_size=360, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=True, remove_extra_whitespaces=False,
        unk_id=0, bos_id=1, eos_id=2, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    loaded = load(tmp_path, tower=str(parts[0] / "tower"))
    own = spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    encoded = loaded.encode(IMAGE, "Is  there a café, 日本?")
    ids, image = encoded.inputs["input_ids"][0].tolist(), list(encoded.spans.image)
    assert ids[: image[0]] == [1, *own.encode(f"{SYSTEM['v1']} USER: ")]
    assert ids[image[-1] + 1 :] == own.encode("\nIs  there a café, 日本? ASSISTANT:")
    assert own.decode([ids[position] for position in encoded.spans.question]).strip() == encoded.question
    assert loaded.model.config.image_token_id >= adapter.model.lm_head.out_features


# wrong files and settings


def copied(parts, tmp_path, part):
    shutil.copytree(parts[0] / part, tmp_path / part)
    return tmp_path / part


def refused(error, parts, *words, **settings):
    with pytest.raises(error) as caught:
        load(parts[0], **settings)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert str(word) in text, text


def test_sentencepiece_that_is_missing(parts, tmp_path, monkeypatch):
    folder = copied(parts, tmp_path, "model")
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    refused(CapabilityError, parts, folder, "sentencepiece", "pip install", model_id=str(folder))


def test_a_folder_without_a_tokenizer(parts, tmp_path):
    folder = copied(parts, tmp_path, "model")
    (folder / "tokenizer.json").unlink()
    refused(ConfigError, parts, folder, "tokenizer.model", model_id=str(folder))


def test_a_tower_of_another_width(parts, tmp_path):
    folder = copied(parts, tmp_path, "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.mm_projector.0.weight"] = torch.ones(llama.WIDTH, 16)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    words = (folder / "model.safetensors", "model.mm_projector.0.weight", "(40, 16)", "(40, 20)")
    refused(DataError, parts, *words, model_id=str(folder))


def test_a_tower_of_four_stages(parts, tmp_path):
    folder = copied(parts, tmp_path, "tower")
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if ".stages.4." not in k}, folder / "model.safetensors")
    refused(DataError, parts, "lacks", "model.vision_tower.encoder.stages.4", tower=str(folder))


def test_the_folders_exchanged(parts):
    settings = {"model_id": str(parts[0] / "tower"), "tower": str(parts[0] / "model")}
    refused(ConfigError, parts, "tokenizer", **settings)


def test_a_model_of_one_weight_too_many(parts, tmp_path):
    folder = copied(parts, tmp_path, "model")
    weights = load_file(folder / "model.safetensors") | {"model.layers.0.mlp.bias": torch.ones(2)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=r"1 tensors.*layers\.0\.mlp\.bias"):
        loaded = load(parts[0], model_id=str(folder))
    assert loaded.report.unexpected == ("model.language_model.layers.0.mlp.bias",)


def test_a_layer_behind_the_last(parts, tmp_path):
    folder = copied(parts, tmp_path, "model")
    weights = load_file(folder / "model.safetensors") | {"model.layers.3.mlp.up_proj.weight": torch.ones(2)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused(DataError, parts, folder / "model.safetensors", "number of layers", model_id=str(folder))


def test_weights_that_are_cut_short(parts, tmp_path):
    path = copied(parts, tmp_path, "tower") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(DataError, parts, path, tower=str(path.parent))


def test_a_config_that_is_no_json(parts, tmp_path):
    path = copied(parts, tmp_path, "tower") / "config.json"
    path.write_text("{depths: ")
    refused(DataError, parts, path, "JSON", tower=str(path.parent))
    path.write_text("[]")
    refused(DataError, parts, path, "list", tower=str(path.parent))


def test_another_resolution_than_the_tower_has_learnt(parts):
    with pytest.warns(UserWarning, match=f"resolution=64, .*tower.* says {authors.RESOLUTION}"):
        load(parts[0], resolution=64)


def test_fewer_layers_than_the_files_hold(parts):
    refused(DataError, parts, "layer behind the last", "layers.1.", text={"num_hidden_layers": 1})


@pytest.mark.parametrize(
    ("file", "setting", "value", "words"),
    [
        ("tower/preprocessor_config.json", "image_mean", 3, ("image_mean=3", "three numbers")),
        ("tower/preprocessor_config.json", "image_mean", [0.5, 0.5], ("image_mean=[0.5, 0.5]",)),
        ("tower/preprocessor_config.json", "image_mean", [], ("image_mean=[]", "three numbers")),
        ("tower/preprocessor_config.json", "image_std", [0.3, 0.3, 0], ("image_std=[0.3, 0.3, 0]", "above 0")),
        ("tower/preprocessor_config.json", "image_std", [1, 1, {}], ("image_std=[1, 1, {}]",)),
        ("tower/config.json", "num_channels", -1, ("convllava-768 cannot be built with its sizes",)),
        ("tower/config.json", "hidden_act", "none", ("convllava-768 cannot be built with its sizes", "none")),
        ("tower/config.json", "hidden_sizes", [4, 6, 8, 12, 10**30], ("convllava-768 cannot be built with its sizes",)),
        ("model/config.json", "vocab_size", 10**9, ("vocab_size=1,000,000,000", "tokens")),
        ("model/config.json", "mm_vision_tower", 5, ("model.tower is missing",)),
    ],
)
def test_settings_in_files_that_cannot_be(parts, tmp_path, file, setting, value, words):
    for part in ("model", "tower"):
        copied(parts, tmp_path, part)
    path = tmp_path / file
    path.write_text(json.dumps({**json.loads(path.read_text()), setting: value}))
    tower = None if setting == "mm_vision_tower" else str(tmp_path / "tower")
    given = {"model_id": str(tmp_path / "model"), "tower": tower}
    with pytest.raises((ConfigError, DataError)) as caught:
        load(tmp_path, **given)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value
    if path.name == "config.json" and setting in ("num_channels", "hidden_act"):
        with pytest.raises(ConfigError, match="cannot be built"):
            ConvLlavaAdapter(name="convllava-768", resolution=authors.RESOLUTION, **given).memory(100)


def test_another_projector(parts, tmp_path):
    path = copied(parts, tmp_path, "model") / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "mm_projector_type": "linear"}))
    refused(CapabilityError, parts, "'linear'", "mlp2x_gelu", model_id=str(path.parent))


def test_sizes_without_a_config_come_from_the_settings(parts, adapter, tmp_path):
    folders = {"model_id": copied(parts, tmp_path, "model"), "tower": copied(parts, tmp_path, "tower")}
    for folder in folders.values():
        (folder / "config.json").unlink()
    known = llama.config(400)
    text = {name: known[name] for name in known if name.endswith(("size", "layers", "heads"))}
    vision = {"depths": list(authors.DEPTHS), "hidden_sizes": list(authors.STAGES), "num_stages": 5}
    loaded = load(tmp_path, text=text, vision=vision, **{key: str(value) for key, value in folders.items()})
    ours, theirs = adapter.model.state_dict(), loaded.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    inputs = adapter.encode(IMAGE, QUESTION).inputs
    with torch.no_grad():
        assert torch.equal(loaded.model(**inputs).logits, adapter.model(**inputs).logits)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"resolution": 100}, ("resolution=100", "64")),
        ({"resolution": 0}, ("resolution=0", "64")),
        ({"prompt": "USER: {question}"}, ("<image>",)),
        ({"prompt": "llava_v2"}, ("{question}",)),
        ({"tower": "/no/such/tower"}, ("model.tower=/no/such/tower",)),
        ({"tower": "nobody/has-this", "local_files_only": True}, ("model.tower=nobody/has-this", "not found")),
        ({"model_id": "/no/such/model"}, ("/no/such/model",)),
        ({"model_id": "nobody/has-this", "local_files_only": True}, ("nobody/has-this", "not found")),
        ({"text": {"num_heads": 4}}, ("num_heads", "num_attention_heads")),
        ({"text": {"num_attention_heads": 7}}, ("model.text", "40", "7")),
        ({"vision": {"depth": [1]}}, ("depth", "depths")),
        ({"vision": {"depths": [1, 2]}}, ("depths=[1, 2]", "num_stages=5")),
    ],
)
def test_wrong_settings(parts, settings, words):
    refused(ConfigError, parts, *words, **settings)
