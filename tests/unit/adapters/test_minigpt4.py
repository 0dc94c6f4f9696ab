"""MiniGPT-4: checkpoints in the authors' names give the model that the authors' formulas give."""

import json
import shutil
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from helpers import authors_checks as checks
from helpers import authors_minigpt4 as authors
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    T5Config,
)

import stethoscope
from stethoscope.adapters.authors import checkpoints, processor
from stethoscope.adapters.authors.minigpt4 import MiniGpt4Adapter
from stethoscope.adapters.base import Adapter
from stethoscope.core.component import build, conf_folder
from stethoscope.core.errors import CapabilityError, ConfigError, DataError
from stethoscope.core.types import Generation
from stethoscope.relevancy import token_relevancy

QUESTION = "Is there a dog in the image?"
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 90, 3), dtype=np.uint8))
SIDE = {"vicuna": 56, "llama2": 112}
VERSIONS = list(SIDE)
SYSTEM = (
    "Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I provide it to you. "
    "Please answer my questions."
)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The files of both versions, and what is in them."""
    folder = tmp_path_factory.mktemp("authors")
    held = {"llm": authors.language_model(folder / "llm"), "qformer": authors.blip2()}
    torch.save({"model": held["qformer"]}, folder / "blip2_pretrained.pth")
    for version, side in SIDE.items():
        held[version] = authors.eva_vit(side)
        torch.save(held[version], folder / f"eva-{version}.pth")
        inputs = authors.Q_WIDTH if version == "vicuna" else 4 * authors.WIDTH
        torch.save(held.setdefault(f"{version} projector", authors.projector(inputs)), folder / f"{version}.pth")
    return folder, held


def load(model, folder, **settings):
    chosen = {
        "llm": str(folder / "llm"),
        "vision": str(folder / f"eva-{model}.pth"),
        "projector": str(folder / f"{model}.pth"),
        "vision_layers": authors.LAYERS,
        "vision_heads": authors.HEADS,
        "device": "cpu",
    }
    if model == "vicuna":
        chosen |= {"qformer": str(folder / "blip2_pretrained.pth"), "qformer_heads": authors.Q_HEADS}
    return stethoscope.load(f"minigpt4-{model}-7b", **{**chosen, **settings})


@pytest.fixture(scope="module", params=VERSIONS)
def version(request):
    return request.param


@pytest.fixture(scope="module")
def adapter(parts, version):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing in the published files is a surprise
        return load(version, parts[0])


def prompt_ids(folder, version, question):
    """Ids before and behind the image: SentencePiece's, a chunk at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "llm")

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    if version == "vicuna":
        return [1, *ids(f"{SYSTEM}###Human: <Img>")], ids(f"</Img> {question}###Assistant: ")
    return [1, *ids(SYSTEM), 1, *ids("[INST] <Img>")], ids(f"</Img> {question} [/INST] ")


def written_out(parts, version, answer=()):
    """The authors' logits (S, words) over prompt and answer."""
    folder, held = parts
    pixels = np.asarray(IMAGE.resize((SIDE[version],) * 2, Image.Resampling.BICUBIC), dtype=np.float64) / 255
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    patches = authors.tower(held[version], torch.tensor((pixels - mean) / std).float().permute(2, 0, 1)[None])
    if version == "vicuna":
        seen = authors.queried(held["qformer"], authors.norm(held["qformer"], "ln_vision", patches, 1e-5))
    else:
        seen = F.layer_norm(patches, (authors.WIDTH,), eps=1e-5)[1:].reshape(-1, 4 * authors.WIDTH)
    image = authors.dense(held[f"{version} projector"]["model"], "llama_proj", seen)
    before, behind = prompt_ids(folder, version, QUESTION)
    words = held["llm"]["model.embed_tokens.weight"]
    return authors.llama(held["llm"], torch.cat([words[before], image, words[[*behind, *answer]]]))


def test_logits_are_those_of_the_authors_formulas(parts, version, adapter):
    encoded = adapter.encode(IMAGE, QUESTION)
    with torch.no_grad():
        logits = adapter.model(**encoded.inputs).logits[0]
    expected = written_out(parts, version)
    assert logits.shape == expected.shape
    assert expected.std() > 0.5
    assert (logits - expected).abs().max() < 1e-4


def test_answers_are_those_of_the_authors_formulas(parts, version, adapter):
    answer = adapter.generate([adapter.encode(IMAGE, QUESTION)], Generation(max_new_tokens=5))[0]
    ids = []
    for _ in range(5):
        ids.append(int(written_out(parts, version, ids)[-1].argmax()))
    assert list(answer.token_ids) == ids
    logprobs = written_out(parts, version, ids)[-6:-1].log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]
    assert answer.logprobs == pytest.approx(logprobs.tolist(), abs=1e-4)


def test_every_tensor_of_the_model_comes_from_the_files(adapter):
    assert adapter.report.loaded == len(adapter.model.state_dict())
    assert adapter.report.unexpected == ()


def test_relevancy_reaches_the_patches(adapter, version):
    relevancy = token_relevancy(adapter, IMAGE, QUESTION, "A cat and a dog.")
    side = SIDE[version] // authors.PATCH
    assert relevancy.patches.shape[-2:] == (side, side)
    assert (relevancy.patches >= 0).all()
    assert (relevancy.patches.flatten(2).std(-1)[:, -1] > 0).all()


def test_the_inner_instruction_begins_as_a_sentence_does(parts, adapter, version):
    tokenizer = adapter.processor.tokenizer
    ids = adapter.encode(IMAGE, QUESTION).inputs["input_ids"][0].tolist()
    if version == "llama2":
        assert ids.count(1) == 2
        assert tokenizer.convert_ids_to_tokens(ids[ids.index(1, 1) + 1]).startswith("▁")
    behind = ids[len(ids) - ids[::-1].index(adapter.model.config.image_token_id) :]
    assert tokenizer.convert_ids_to_tokens(behind[0]).startswith("▁")


def test_grids(adapter, version):
    spans = adapter.encode(IMAGE, QUESTION).spans
    assert spans.grids == (() if version == "vicuna" else ((8, 2),))
    assert len(spans.image) == (authors.QUERIES if version == "vicuna" else 16)


def test_an_answer_ends_before_the_next_turn(adapter):
    tokenizer = adapter.processor.tokenizer
    words, marks = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("Yes", "####"))
    script = iter([*words, *marks[1:], *marks[1:]])

    def scripted(head, inputs, logits):
        logits[:, -1] = -9.0
        logits[:, -1, next(script)] = 9.0

    handle = adapter.model.get_output_embeddings().register_forward_hook(scripted)
    try:
        answer = adapter.generate([adapter.encode(IMAGE, QUESTION)], Generation(max_new_tokens=20))[0]
    finally:
        handle.remove()
    assert answer.text == "Yes"
    assert answer.finished


def test_the_model_cannot_say_an_image_token(adapter):
    assert adapter.model.get_output_embeddings().out_features == adapter.model.config.image_token_id


def test_memory_is_counted_before_loading(parts, version, adapter):
    config = OmegaConf.load(conf_folder() / "model" / f"minigpt4-{version}-7b.yaml")
    same = {key: config[key] for key in ("_target_", "version")} | adapter.sources
    heads = {"vision_layers": authors.LAYERS, "vision_heads": authors.HEADS, "qformer_heads": authors.Q_HEADS}
    counted = build(OmegaConf.create({**same, **heads}), Adapter, "model").memory(context=100)
    parameters = list(adapter.model.parameters())
    assert counted.parameters == sum(parameter.numel() for parameter in parameters)
    assert counted.weights == sum(parameter.nbytes for parameter in parameters)


def test_memory_of_the_published_sizes(parts, version, tmp_path):
    """Counted by hand: a tower of 39 layers, a Q-Former of 12, the projection; the language model here is tiny."""
    width, inner, queries, words = 1408, 6144, 768, authors.L_WIDTH
    tower = (
        39 * (4 * width**2 + 2 * width * inner + inner + 9 * width)
        + (3 * 14 * 14 + 1) * width
        + 258 * width
        + 2 * width
    )
    own, crossing = 4 * queries * (queries + 1) + 2 * queries, 2 * queries * (queries + width + 2) + 2 * queries
    bridge = 12 * (own + 2 * queries * 3072 + 3072 + 3 * queries) + 6 * crossing + 34 * queries
    language = sum(tensor.numel() for tensor in parts[1]["llm"].values())
    settings = {"projector": "later.pth", "llm": str(parts[0] / "llm")}
    counted = MiniGpt4Adapter(version=version, **settings).memory(context=100)
    if version == "vicuna":
        assert counted.parameters == tower + bridge + (queries + 1) * words + language
    else:
        assert counted.parameters == tower + (4 * width + 1) * words + language


@pytest.mark.parametrize("dtype", ["bfloat16", "auto"])
def test_dtype(parts, version, dtype, tmp_path):
    authors.language_model(tmp_path / "llm")
    weights = {key: value.half() for key, value in load_file(tmp_path / "llm" / "model.safetensors").items()}
    save_file(weights, tmp_path / "llm" / "model.safetensors", metadata={"format": "pt"})
    torch.save({key: value.half() for key, value in parts[1]["qformer"].items()}, tmp_path / "qformer.pth")
    queries = {"qformer": str(tmp_path / "qformer.pth")} if version == "vicuna" else {}
    loaded = load(version, parts[0], llm=str(tmp_path / "llm"), dtype=dtype, **queries)
    wanted = torch.bfloat16 if dtype == "bfloat16" else torch.float16  # what most of the weights are
    assert loaded.model.get_input_embeddings().weight.dtype == wanted
    assert loaded.model.get_output_embeddings().weight.dtype == wanted


def test_layers_on_disk_and_cpu_give_the_same(parts, version, adapter, tmp_path):
    checks.check_offloaded(adapter, partial(load, version, parts[0]), 350_000, IMAGE, QUESTION, tmp_path)


@pytest.mark.parametrize(
    ("quantize", "kind", "alike"), [("4bit", "Linear4bit", 0.5), ("8bit", "Linear8bitLt", 0.95)]
)  # random weights suffer more from four bits than trained ones
def test_the_language_model_is_quantised_as_it_is_read(parts, version, adapter, quantize, kind, alike):
    pytest.importorskip("bitsandbytes", minversion="0.46.1")
    small = load(version, parts[0], quantize=quantize, dtype="float32")
    kinds = {name: type(module).__name__ for name, module in small.model.named_modules()}
    changed = {name for name, class_name in kinds.items() if class_name == kind}
    assert changed == {name for name in kinds if "language_model." in name and name.endswith("_proj")}
    assert len(changed) == 2 * 7
    encoded = adapter.encode(IMAGE, QUESTION)
    answer = adapter.generate([encoded], Generation(max_new_tokens=4))[0]
    exact, near = (model.trace(encoded, answer, ("relevancy",)) for model in (adapter, small))
    assert 0 < (near.logits - exact.logits).abs().mean() < 0.5 * exact.logits.std()
    maps = torch.stack([trace.relevancy.image.flatten() for trace in (exact, near)])
    assert torch.corrcoef(maps)[0, 1] > alike


def test_the_language_model_in_shards_of_pickles(parts, version, adapter, tmp_path):
    shutil.copytree(parts[0] / "llm", tmp_path / "llm")
    weights = load_file(tmp_path / "llm" / "model.safetensors")
    (tmp_path / "llm" / "model.safetensors").unlink()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(5)  # old files have it
    names, places = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"], {}
    for number, name in enumerate(names):
        shard = dict(list(weights.items())[number::2])
        torch.save(shard, tmp_path / "llm" / name)
        places |= dict.fromkeys(shard, name)
    (tmp_path / "llm" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    same(adapter, load(version, parts[0], llm=str(tmp_path / "llm")))


def same(loaded, other):
    ours, theirs = loaded.model.state_dict(), other.model.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_tower_out_of_a_whole_minigpt4(parts, version, adapter, tmp_path):
    """All in one file, as training saves it, the language model's weights excepted."""
    held = parts[1]
    used = {key: value for key, value in held[version].items() if not key.startswith(("norm", "head"))}
    whole = {f"visual_encoder.{key}": value for key, value in used.items()}
    whole |= held[f"{version} projector"]["model"] | (held["qformer"] if version == "vicuna" else {})
    whole = {key: value for key, value in whole.items() if not key.startswith("t5_proj")}
    torch.save({"model": whole}, tmp_path / "all.pth")
    path = str(tmp_path / "all.pth")
    settings = {"vision": path, "projector": path, **({"qformer": None} if version == "vicuna" else {})}
    same(adapter, load(version, parts[0], **settings))


def test_the_tower_out_of_transformers_blip2(parts, version, adapter, tmp_path):
    """The default source: BLIP-2 with Flan-T5 in transformers' names, of which T5 is not read."""
    config = Blip2Config(
        vision_config=Blip2VisionConfig(
            hidden_size=authors.WIDTH, intermediate_size=authors.INNER, num_hidden_layers=authors.LAYERS,
            num_attention_heads=authors.HEADS, image_size=SIDE[version], patch_size=authors.PATCH,
        ),
        qformer_config=Blip2QFormerConfig(
            hidden_size=authors.Q_WIDTH, intermediate_size=authors.Q_INNER, num_hidden_layers=authors.Q_LAYERS,
            num_attention_heads=authors.Q_HEADS, encoder_hidden_size=authors.WIDTH,
        ),
        text_config=T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2),
        num_query_tokens=authors.QUERIES, image_token_index=49,
    )  # fmt: skip
    blip = Blip2ForConditionalGeneration(config)
    ours = adapter.model.state_dict()
    for name, tensor in blip.state_dict().items():
        inner = name.replace("vision_model.", "model.vision_tower.") if version == "llama2" else name
        if inner in ours and not name.startswith("language"):
            tensor.copy_(ours[inner])
    if version == "llama2":
        torch.nn.init.normal_(blip.vision_model.post_layernorm.weight)  # must not be taken
    blip.save_pretrained(tmp_path / "blip2")
    assert len(load_file(tmp_path / "blip2" / "model.safetensors")) > 60
    settings = {"vision": str(tmp_path / "blip2"), **({"qformer": None} if version == "vicuna" else {})}
    same(adapter, load(version, parts[0], **settings))


def test_fingerprints_follow_the_files_and_hold_no_path(parts, version, adapter, tmp_path):
    first = adapter.fingerprint()
    assert str(parts[0]) not in str(first)
    assert first["weights"].startswith("sha256:")
    again = load(version, parts[0])
    assert again.weights_digest() == first["weights"]
    assert again.fingerprint() == first
    path = tmp_path / f"{version}.pth"
    torch.save({"model": {k: v + 1e-3 for k, v in parts[1][f"{version} projector"]["model"].items()}}, path)
    assert load(version, parts[0], projector=str(path)).fingerprint()["weights"] != first["weights"]


# wrong files and settings


def refused(error, model, parts, *words, **settings):
    with pytest.raises(error) as caught:
        load(model, parts[0], **settings)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert str(word) in text, text


def test_a_projector_of_the_other_version(parts):
    path = parts[0] / "llama2.pth"
    refused(DataError, "vicuna", parts, path, "llama_proj.weight", "(40, 128)", "(40, 24)", projector=str(path))


def test_a_projector_that_is_none(parts, version, tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"model": {"mm_projector.0.weight": torch.ones(2, 2)}}, path)
    refused(DataError, version, parts, path, "llama_proj.weight", "mm_projector.0.weight", projector=str(path))


def test_a_tower_with_too_few_blocks(parts, version):
    refused(DataError, version, parts, "vision", "layers.4", vision_layers=5)


def test_a_tower_with_more_blocks_than_are_used(parts, version):
    layers = authors.LAYERS + 1  # the published file has one too many
    refused(ConfigError, version, parts, f"vision_layers={layers - 2}", f"{layers} layers", vision_layers=layers - 2)


def test_small_files_are_read_before_large_ones(parts, version, tmp_path, monkeypatch):
    def read(source, loading, prefixes=(), setting=""):
        assert setting == "projector", f"{setting} was read before the projector"
        return original(source, loading, prefixes, setting)

    original = checkpoints.read_weights
    monkeypatch.setattr(checkpoints, "read_weights", read)
    torch.save({"model": {"mm_projector.0.weight": torch.ones(2, 2)}}, tmp_path / "other.pth")
    refused(DataError, version, parts, "llama_proj.weight", projector=str(tmp_path / "other.pth"))
    monkeypatch.setattr(processor, "find_spec", lambda name: None)
    shutil.copytree(parts[0] / "llm", tmp_path / "llm")
    (tmp_path / "llm" / "tokenizer.json").unlink()
    (tmp_path / "llm" / "tokenizer.model").touch()
    refused(CapabilityError, version, parts, "sentencepiece", llm=str(tmp_path / "llm"))


def test_a_vision_file_without_a_tower(parts, version):
    refused(DataError, version, parts, "vision", vision=str(parts[0] / f"{version}.pth"))


def test_a_vision_file_without_a_qformer(parts):
    refused(DataError, "vicuna", parts, "vision", "Qformer", qformer=None)


def test_heads_that_do_not_divide(parts, version):
    refused(DataError, version, parts, "vision_heads=5", "32", vision_heads=5)


def test_a_language_model_that_is_cut_short(parts, version, tmp_path):
    shutil.copytree(parts[0] / "llm", tmp_path / "llm")
    path = tmp_path / "llm" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(DataError, version, parts, path, llm=str(tmp_path / "llm"))


def test_a_language_model_that_is_no_llama(parts, version, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "opt"}')
    refused(ConfigError, version, parts, "opt", "llama", llm=str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"projector": None}, ("projector", ".pth")),
        ({"llm": None}, ("llm",)),
        ({"vision": None}, ("vision",)),
        ({"model_id": "a/b"}, ("model_id", "projector")),
        ({"projector": "/no/such.pth"}, ("projector", "/no/such.pth")),
        ({"llm": "/no/such/folder"}, ("/no/such/folder",)),
        ({"version": "vicuna1"}, ("vicuna1", "llama2")),
        ({"prompt": "{question}"}, ("<ImageHere>",)),
        ({"projector": 5}, ("model.projector=5", "path")),
        ({"vision_heads": 0}, ("model.vision_heads=0", "at least 1")),
        ({"vision_layers": "all"}, ("model.vision_layers='all'",)),
    ],
)
def test_settings(parts, version, settings, words):
    refused(ConfigError, version, parts, *words, **settings)
