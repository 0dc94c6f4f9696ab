"""mPLUG-Owl2: a folder in the authors' format gives the model that the authors' formulas give."""

import json
import shutil
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from helpers import authors_checks as checks
from helpers import authors_llama as llama
from helpers import authors_owl2 as authors
from PIL import Image
from sklearn.datasets import load_sample_image
from transformers import AutoTokenizer

import stethoscope
from stethoscope.adapters.authors.mplug_owl2 import MplugOwl2Adapter
from stethoscope.adapters.authors.mplug_owl2_model import position_table
from stethoscope.adapters.forward import collate
from stethoscope.core.errors import ConfigError, DataError
from stethoscope.core.types import Generation
from stethoscope.relevancy import token_relevancy

QUESTION = "Is there a dog in the image?"
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 90, 3), dtype=np.uint8))
MEAN, STD = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The folder, and what is in it."""
    folder = tmp_path_factory.mktemp("authors") / "owl"
    return folder, authors.save(folder)


def load(folder, **settings):
    chosen = {"model_id": str(folder), "name": "mplug-owl2-7b", "device": "cpu"}
    adapter = MplugOwl2Adapter(**{**chosen, **settings})
    adapter.setup()
    return adapter


@pytest.fixture(scope="module")
def adapter(parts):
    """By the published configuration."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing in the published files is a surprise
        return stethoscope.load("mplug-owl2-7b", model_id=str(parts[0]), device="cpu")


def pixels(image, side):
    """(3, side, side) by the authors' rules, in double precision."""
    square = image.resize((max(image.size),) * 2)
    values = np.asarray(square.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float64) / 255
    return torch.tensor((values - MEAN) / STD).permute(2, 0, 1)


def written_out(parts, answer=(), question=QUESTION, image=IMAGE):
    """The authors' logits (S, words) over prompt and answer."""
    folder, held = parts
    tokenizer = AutoTokenizer.from_pretrained(folder)
    before = tokenizer("USER: ")["input_ids"]
    behind = tokenizer(f"{question} ASSISTANT:")["input_ids"][1:]
    seen = authors.tokens(held, pixels(image, authors.SIZE).float()[None])
    words = held["model.embed_tokens.weight"]
    embeddings = torch.cat([words[before], seen, words[[*behind, *answer]]])
    return llama.logits(held, embeddings, range(len(before), len(before) + len(seen)))


def close(actual, expected):
    assert actual.shape == expected.shape
    assert expected.std() > 0.5
    assert (actual - expected).abs().max() < 1e-4


def test_logits_are_those_of_the_authors_formulas(parts, adapter):
    with torch.no_grad():
        logits = adapter.model(**adapter.encode(IMAGE, QUESTION).inputs).logits[0]
    close(logits, written_out(parts))


def test_image_tokens_are_those_of_the_authors_formulas(parts, adapter):
    given = adapter.encode(IMAGE, QUESTION).inputs["pixel_values"]
    with torch.no_grad():
        features = adapter.model.get_image_features(given)
    close(features.last_hidden_state[0], authors.tower(parts[1], given))
    close(features.pooler_output[0], authors.tokens(parts[1], given))
    assert torch.equal(features.pooler_output[0][-1], parts[1]["model.visual_abstractor.vit_eos"][0, 0])


def test_the_way_of_a_token_matters(parts, adapter):
    """Image tokens, the learned one among them, on the way of text: another model altogether."""
    folder, held = parts
    first = {k.replace("multiway.0", "multiway.1"): v for k, v in held.items() if "multiway.0" in k}
    assert (written_out((folder, held | first)) - written_out(parts)).abs().max() > 0.1


def test_cached_generation_is_greedy_by_the_authors_formulas(parts, adapter):
    answer = adapter.generate([adapter.encode(IMAGE, QUESTION)], Generation(max_new_tokens=5))[0]
    ids = []
    for _ in range(5):
        ids.append(int(written_out(parts, ids)[-1].argmax()))
    assert list(answer.token_ids) == ids
    logprobs = written_out(parts, ids)[-6:-1].log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]
    assert answer.logprobs == pytest.approx(logprobs.tolist(), abs=1e-4)


def test_every_prompt_of_a_batch_has_its_own_ways(parts, adapter):
    """Padding on the left puts the image tokens of each prompt elsewhere."""
    other = Image.fromarray(np.random.default_rng(1).integers(0, 255, (70, 40, 3), dtype=np.uint8))
    asked = [(IMAGE, QUESTION), (other, "Yes?")]
    encoded = [adapter.encode(*pair) for pair in asked]
    assert encoded[0].spans.length != encoded[1].spans.length
    with torch.no_grad():
        batch = adapter.model(**collate([prompt.inputs for prompt in encoded], 0, "left")).logits
    for row, prompt, (image, question) in zip(batch, encoded, asked, strict=True):
        close(row[-prompt.spans.length :], written_out(parts, question=question, image=image))


def test_the_fixed_tables(adapter):
    """Sizes as published: against sines written out one by one."""
    table = position_table(64, 32, 1024)
    assert table.shape == (64 + 1 + 32 * 32, 1024)
    assert not table[64].any()
    assert not table.is_inference()
    for row in (0, 1, 63):
        assert table[row].tolist() == pytest.approx(authors.sines(row, 1024), abs=1e-5)
    for row, column in ((0, 0), (0, 31), (5, 2), (31, 31)):
        expected = authors.sines(column, 512) + authors.sines(row, 512)
        assert table[65 + 32 * row + column].tolist() == pytest.approx(expected, abs=1e-5)


def test_every_tensor_of_the_model_comes_from_the_files(adapter):
    assert adapter.report.loaded == len(adapter.model.state_dict())
    assert adapter.report.unexpected == ()


def test_files_with_the_fixed_tables_are_read_too(parts, adapter, tmp_path):
    folder = copied(parts, tmp_path)
    name = "model.visual_abstractor.encoder.layers.0.crossattention.attention"
    tables = {f"{name}.q_pos_embed": torch.zeros(6, 32), f"{name}.k_pos_embed": torch.zeros(17, 32)}
    llama.save_shards(folder, parts[1] | tables)
    assert load(folder).report == replaced(adapter.report, folder)


def replaced(report, folder):
    return type(report)(report.loaded, report.unexpected, tuple(folder / path.name for path in report.files))


def test_prompt_and_spans(adapter):
    encoded = adapter.encode(IMAGE, QUESTION)
    assert encoded.text == f"USER: <|image|>{QUESTION} ASSISTANT:"
    assert encoded.spans.grids == ()
    assert len(encoded.spans.image) == authors.QUERIES + 1
    image_id = adapter.model.config.image_token_id
    assert image_id == adapter.model.lm_head.out_features  # behind all words, so that it cannot be said
    assert (encoded.inputs["input_ids"][0] == image_id).nonzero()[:, 0].tolist() == list(encoded.spans.image)


@pytest.mark.parametrize("photo", ["china.jpg", "flower.jpg"])
def test_preprocessing_of_photographs(parts, photo):
    image = Image.fromarray(load_sample_image(photo))
    for side in (authors.SIZE, 448):
        processor = load(parts[0]).processor.image_processor if side == authors.SIZE else published()
        pixel_values = processor(images=image)["pixel_values"][0]
        assert (pixel_values.double() - pixels(image, side)).abs().max() < 1e-5


def published():
    """The image processor of the published sizes."""
    from transformers import CLIPVisionConfig, LlamaConfig

    from stethoscope.adapters.authors.mplug_owl2 import VISION, make_processor
    from stethoscope.adapters.authors.mplug_owl2_model import MplugOwl2AbstractorConfig, MplugOwl2Config
    from stethoscope.adapters.tiny import llama_tokenizer

    config = MplugOwl2Config(
        text_config=LlamaConfig(),
        vision_config=CLIPVisionConfig(**VISION),
        abstractor_config=MplugOwl2AbstractorConfig(),
    )
    processor = make_processor(llama_tokenizer(), config, tuple(MEAN), tuple(STD))
    assert (processor.image_tokens, processor.image_token_id) == (65, 32000)
    return processor.image_processor


def test_relevancy_reaches_the_patches(adapter):
    for scope in ("row", "token"):
        relevancy = token_relevancy(adapter, IMAGE, QUESTION, "A cat and a dog.", scope=scope)
        assert relevancy.patches.shape[-2:] == (authors.GRID, authors.GRID)
        assert (relevancy.patches >= 0).all()
        assert (relevancy.patches[:, -1].flatten(1).std(-1) > 0).all()


def test_a_saved_model_loads_like_any_of_transformers(adapter, tmp_path):
    checks.check_saved_model(adapter, IMAGE, QUESTION, tmp_path)


def test_layers_on_disk_and_cpu_give_the_same(parts, adapter, tmp_path):
    checks.check_offloaded(adapter, partial(load, parts[0]), 250_000, IMAGE, QUESTION, tmp_path)


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_memory_is_told_without_reading_a_weight(parts, adapter, tmp_path, dtype):
    checks.check_memory(adapter, parts[0], tmp_path, lambda folder: MplugOwl2Adapter(str(folder), dtype=dtype), dtype)


def test_half_precision(parts):
    adapter = load(parts[0], dtype="bfloat16")
    assert {parameter.dtype for parameter in adapter.model.parameters()} == {torch.bfloat16}
    assert adapter.generate([adapter.encode(IMAGE, QUESTION)], Generation(max_new_tokens=2))
    assert torch.isfinite(token_relevancy(adapter, IMAGE, QUESTION, "A cat.").vision).all()


def test_fingerprints_follow_the_files_and_hold_no_path(parts, adapter, tmp_path):
    first = adapter.fingerprint()
    assert str(parts[0].parent) not in json.dumps(first)
    again = load(parts[0])
    assert again.weights_digest() == first["weights"]
    assert again.fingerprint() == first
    folder = copied(parts, tmp_path)
    llama.save_shards(folder, {name: tensor + 1e-3 for name, tensor in parts[1].items()})
    assert load(folder).fingerprint()["weights"] != first["weights"]


def test_sizes_without_a_visual_config_come_from_the_settings(parts, adapter, tmp_path):
    folder = copied(parts, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    seeing = config.pop("visual_config")
    (folder / "config.json").write_text(json.dumps(config))
    vision = {
        name: value for name, value in seeing["visual_model"].items() if name.endswith(("size", "layers", "heads"))
    }
    names = ("size", "layers", "heads", "queries")
    abstractor = {name: value for name, value in seeing["visual_abstractor"].items() if name.endswith(names)}
    loaded = load(folder, vision=vision, abstractor=abstractor)
    inputs = adapter.encode(IMAGE, QUESTION).inputs
    with torch.no_grad():
        assert torch.equal(loaded.model(**inputs).logits, adapter.model(**inputs).logits)


# wrong files and settings


def copied(parts, tmp_path):
    return shutil.copytree(parts[0], tmp_path / "owl")


def refused(error, folder, *words, **settings):
    with pytest.raises(error) as caught:
        load(folder, **settings)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert str(word) in text, text


def changed(parts, tmp_path, **tensors):
    """A folder with other tensors; None takes one out."""
    folder = copied(parts, tmp_path)
    held = {**parts[1], **tensors}
    llama.save_shards(folder, {name: tensor for name, tensor in held.items() if tensor is not None})
    return folder


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [
        ("visual_config", [1], ("visual_config=[1]", "object")),
        ("visual_abstractor", [1], ("model.abstractor", "[1]", "by their names")),
        ("visual_abstractor", {"num_attention_heads": {}}, ("mplug-owl2-7b cannot be built with its sizes",)),
        ("visual_abstractor", {"num_attention_heads": 0}, ("mplug-owl2-7b cannot be built with its sizes",)),
        ("visual_abstractor", {"intermediate_size": "wide"}, ("mplug-owl2-7b cannot be built with its sizes", "str")),
    ],
)
def test_sizes_in_files_that_cannot_be(parts, tmp_path, part, value, words):
    folder = copied(parts, tmp_path)
    settings = json.loads((folder / "config.json").read_text())
    if part == "visual_config":
        settings[part] = value
    else:
        known = settings["visual_config"][part]
        settings["visual_config"][part] = {**known, **value} if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises((ConfigError, DataError)) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_plain_llama(parts, tmp_path):
    folder = copied(parts, tmp_path)
    llama.save_shards(folder, llama.weights(400))
    refused(DataError, folder, "mplug-owl2-7b", "lacks", "model.vision_model.embeddings.class_embedding")


def test_one_way_only(parts, tmp_path):
    name = "model.layers.1.self_attn.v_proj.multiway.1.weight"
    refused(DataError, changed(parts, tmp_path, **{name: None}), "lacks 1 of", "layers.1.self_attn.v_proj.multiway.1")


@pytest.mark.parametrize(
    ("name", "shape", "odd"),
    [
        ("model.visual_abstractor.query_embeds", (1, 7, 32), "(1, 7, 32)"),
        ("model.visual_abstractor.vit_eos", (1, 1, 41), "(1, 1, 41)"),
        ("model.vision_model.embeddings.position_embedding", (1, 18, 32), "(18, 32)"),
        ("model.layers.0.input_layernorm.multiway.1.weight", (41,), "(41,)"),
        ("model.vision_model.encoder.layers.0.self_attn.query_key_value.weight", (97, 32), "97 rows"),
        ("lm_head.weight", (401, 40), "(401, 40)"),
    ],
)
def test_weights_of_another_shape(parts, tmp_path, name, shape, odd):
    refused(DataError, changed(parts, tmp_path, **{name: torch.ones(shape)}), ".bin", name, odd)


def test_a_shard_that_is_missing(parts, tmp_path):
    folder = copied(parts, tmp_path)
    (folder / "pytorch_model-00002-of-00003.bin").unlink()
    refused(DataError, folder, "pytorch_model-00002-of-00003.bin")


def test_a_shard_that_is_cut_short(parts, tmp_path):
    path = copied(parts, tmp_path) / "pytorch_model-00002-of-00003.bin"
    path.write_bytes(path.read_bytes()[:-1000])
    refused(DataError, path.parent, path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prompt": "USER: {question}"}, ("<|image|>",)),
        ({"model_id": "/no/such/model"}, ("/no/such/model",)),
        ({"model_id": "nobody/has-this", "local_files_only": True}, ("nobody/has-this", "not found")),
        ({"abstractor": {"grid_size": 32}}, ("grid_size=32", "4")),
        ({"abstractor": {"hidden_size": 30}}, ("hidden_size=30", "32")),
        ({"abstractor": {"num_attention_heads": 5}}, ("32", "5 heads")),
        ({"abstractor": {"queries": 5}}, ("queries", "num_learnable_queries")),
        ({"vision": {"num_attention_heads": 5}}, ("model.vision", "32", "5")),
        ({"text": {"hidden_size": "wide"}}, ("model.text", "wide")),
    ],
)
def test_wrong_settings(parts, settings, words):
    refused(ConfigError, parts[0], *words, **settings)
