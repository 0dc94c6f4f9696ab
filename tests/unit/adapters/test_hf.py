"""Loading: from a folder, what goes wrong in one line each, and what identifies a model."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import stethoscope
from stethoscope.adapters import load_settings
from stethoscope.adapters.forward import collate, extend, groups
from stethoscope.adapters.hf import HfAdapter
from stethoscope.core.errors import CapabilityError, ConfigError, DataError, StethoscopeError
from stethoscope.core.types import Generation

PROMPT = "USER: <image>\n{question} ASSISTANT:"
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8))


def tiny(**settings):
    adapter = HfAdapter(random_init="tiny", prompt=PROMPT, **settings)
    adapter.setup()
    return adapter


@pytest.fixture
def folder(tmp_path):
    adapter = tiny()
    adapter.model.save_pretrained(tmp_path)
    adapter.processor.save_pretrained(tmp_path)
    return tmp_path


def from_folder(folder, **settings):
    adapter = HfAdapter(str(folder), prompt=PROMPT, dtype="float32", **settings)
    adapter.setup()
    return adapter


def one_line(error, *words):
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert str(word) in text


def test_a_folder_gives_the_model_that_was_saved(folder):
    saved, loaded = tiny(), from_folder(folder)
    generation = Generation(max_new_tokens=4)
    in_memory, other = (a.generate([a.encode(IMAGE, "What is it?")], generation)[0] for a in (saved, loaded))
    assert in_memory.token_ids == other.token_ids
    assert in_memory.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    assert loaded.name == folder.name
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_fingerprints_tell_weights_apart_and_hold_no_path(folder):
    first = from_folder(folder).fingerprint()
    again = from_folder(folder)
    assert again.weights_digest() == first["weights"]
    assert again.fingerprint() == first
    assert str(folder.parent) not in json.dumps(first)
    weights = load_file(folder / "model.safetensors")
    name = next(iter(weights))
    weights[name] = weights[name] + 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    second = from_folder(folder).fingerprint()
    assert second["weights"] != first["weights"]
    assert {key: value for key, value in second.items() if key != "weights"} == {
        key: value for key, value in first.items() if key != "weights"
    }
    loaded = from_folder(folder)
    loaded.setup()
    with torch.no_grad():
        next(loaded.model.parameters()).add_(1)
    changed = loaded.fingerprint()
    assert changed["weights"].startswith("state:")
    assert changed["model_id"] == second["model_id"]


def test_a_prompt_that_ends_with_its_image_is_read_as_a_whole():
    adapter = HfAdapter(random_init="tiny", prompt="USER: {question} ASSISTANT: <image>")
    encoded = [adapter.encode(IMAGE.resize(size), "What?") for size in ((40, 40), (60, 60))]
    answers, kept = adapter.generate_with_cache(encoded, Generation(max_new_tokens=5))
    assert [prompt.cache for prompt in kept] == [None, None]
    traces = adapter.trace_batch(kept, answers, ("blank", "no_image"))
    for prompt, answer, trace in zip(encoded, answers, traces, strict=True):
        model, inputs = adapter.forward_inputs(prompt, answer.token_ids)
        rows = slice(prompt.spans.length - 1, -1)
        with torch.no_grad():
            blank = model(**{**inputs, "pixel_values": torch.zeros_like(inputs["pixel_values"])}).logits[0, rows]
            seen = model(**inputs).logits[0, rows]
        assert torch.allclose(trace.logits, seen, atol=1e-4)
        assert torch.allclose(trace.blank_logits, blank, atol=1e-4)
        assert (trace.no_image_logits - seen).abs().max() > 1e-3


def test_fingerprints_of_random_models():
    first, other = tiny(), tiny()
    assert first.fingerprint() == other.fingerprint()
    with torch.no_grad():
        next(other.model.parameters()).add_(1)
    assert first.fingerprint()["weights"] != other.fingerprint()["weights"]
    assert HfAdapter(random_init="tiny", prompt="{image}{question}").fingerprint()["prompt"] == "<image>{question}"


@pytest.mark.parametrize("model_id", ["/no/such/folder", "./nor/here", "one/two/three"])
def test_a_folder_that_is_not_there(model_id):
    with pytest.raises(ConfigError) as error:
        from_folder(model_id)
    one_line(error, model_id)


def test_a_hub_model_that_is_not_there():
    with pytest.raises(ConfigError) as error:
        from_folder("nobody/has-this-model", local_files_only=True)
    one_line(error, "nobody/has-this-model")


def test_without_a_network_the_hub_is_not_asked_again_and_again(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    load_settings._hub_reachable.cache_clear()
    with pytest.raises(ConfigError) as error:
        from_folder("nobody/has-this-model")
    one_line(error, "nobody/has-this-model")


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(StethoscopeError) as error:
        from_folder(tmp_path)
    one_line(error, tmp_path)


def test_weights_that_are_cut_short(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(DataError) as error:
        from_folder(folder)
    one_line(error, folder)


def test_weights_that_are_missing(folder):
    weights = load_file(folder / "model.safetensors")
    gone = next(name for name in weights if "q_proj" in name)
    del weights[gone]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match="lacks 1 weights") as error:
        from_folder(folder)
    one_line(error, "q_proj")


def test_a_model_of_another_kind(folder):
    config = {"model_type": "bert", "architectures": ["BertModel"]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(StethoscopeError) as error:
        from_folder(folder)
    one_line(error, folder)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, ["model_id"]),
        ({"random_init": "tiny1"}, ["tiny1", "did you mean 'tiny'"]),
        ({"model_id": "a/b", "dtype": "float23"}, ["float23", "float32"]),
        ({"model_id": "a/b", "device": "cpu", "device_map": "auto"}, ["device"]),
        ({"model_id": "a/b", "prompt": "USER: ASSISTANT:"}, ["{question}"]),
        ({"model_id": "a/b", "prompt": "{question} {question}"}, ["{question}"]),
        ({"model_id": "a/b", "prompt": 5}, ["prompt 5", "{question}"]),
        ({"model_id": "a/b", "system": 5}, ["model.system=5", "vicuna_v1"]),
        ({"model_id": "a/b", "threads": 1.5}, ["model.threads=1.5"]),
        ({"model_id": "a/b", "threads": True}, ["model.threads=True"]),
        ({"model_id": "a/b", "max_pixels": True}, ["model.max_pixels=True"]),
    ],
)
def test_wrong_settings(settings, words):
    with pytest.raises(ConfigError) as error:
        HfAdapter(**settings)
    one_line(error, *words)


def test_wrong_settings_that_only_loading_finds():
    with pytest.raises(CapabilityError) as error:
        tiny(family="llavas")
    one_line(error, "llavas", "did you mean 'llava'")
    with pytest.raises(CapabilityError) as error:
        tiny(device="cuda:99")
    one_line(error, "cuda:99")


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3", "idefics3"])
@pytest.mark.parametrize(("placeholders", "words"), [("", "holds it 0 times"), ("{image}{image}", "holds it 2 times")])
def test_a_prompt_without_a_place_for_the_image(family, placeholders, words):
    adapter = HfAdapter(random_init="tiny", family=family, prompt=f"USER: {placeholders}{{question}} ASSISTANT:")
    with pytest.raises(ConfigError) as error:
        adapter.encode(IMAGE, "What is it?")
    one_line(error, "should hold {image} once", words)


@pytest.mark.parametrize("pad_token", [None, "[PAD]"])
def test_a_tokenizer_without_a_padding_token_that_the_model_knows(pad_token, monkeypatch):
    """None at all, or one that was added to the tokenizer and not to the embeddings."""
    adapter = HfAdapter(random_init="tiny")
    model, processor = adapter._tiny()
    processor.tokenizer.pad_token = None
    if pad_token:
        processor.tokenizer.add_special_tokens({"pad_token": pad_token})
        assert processor.tokenizer.pad_token_id >= model.get_input_embeddings().num_embeddings
    monkeypatch.setattr(adapter, "_tiny", lambda: (model, processor))
    prompts = [adapter.encode(IMAGE, question) for question in ("What is it?", "Is there a red car in the photo?", "b")]
    generation = Generation(max_new_tokens=6)
    together = adapter.generate(prompts, generation)
    alone = [adapter.generate([prompt], generation)[0] for prompt in prompts]
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    traces = adapter.trace_batch(prompts, together)
    for prompt, answer, trace in zip(prompts, together, traces, strict=True):
        assert torch.allclose(trace.logits, adapter.trace(prompt, answer).logits, atol=1e-4)


def test_a_model_in_the_working_directory_has_its_folders_name(folder, monkeypatch):
    monkeypatch.chdir(folder)
    adapter = HfAdapter(".", prompt="USER: {image} {question}")
    assert adapter.name == folder.name
    assert adapter.fingerprint()["model_id"] == folder.name


def test_settings_that_are_no_plain_values():
    for key, value in (("dtype", torch.float16), ("device", torch.device("cpu"))):
        with pytest.raises(ConfigError) as error:
            stethoscope.load("testbed", **{key: value})
        one_line(error, f"model.{key}={value!r} should be a plain value")


def test_the_chat_template_is_the_prompt_when_none_is_given():
    adapter = HfAdapter(random_init="tiny")
    assert adapter.encode(IMAGE, "What is it?").text == "USER: <image>\nWhat is it? ASSISTANT:"
    assert HfAdapter(random_init="tiny", prompt="A: {image} {question}").encode(IMAGE, "b").text == "A: <image> b"


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (3000, 40)])
def test_odd_images_are_read(size):
    adapter = tiny()
    encoded = adapter.encode(Image.new("RGB", size), "What is it?")
    assert adapter.generate([encoded], Generation(max_new_tokens=2))


def test_half_precision_traces_are_float32():
    adapter = tiny(dtype="bfloat16")
    encoded = adapter.encode(IMAGE, "What is it?")
    answer = adapter.generate([encoded], Generation(max_new_tokens=3))[0]
    trace = adapter.trace(encoded, answer)
    assert adapter.fingerprint()["dtype"] == "bfloat16"
    assert trace.logits.dtype == trace.mass.dtype == trace.lens_logprob.dtype == torch.float32
    assert torch.allclose(trace.mass.sum(-1), torch.ones(()), atol=1e-2)


def test_nothing_is_loaded_before_setup():
    adapter = HfAdapter("/no/such/folder", prompt=PROMPT)
    assert adapter.name == "folder"


def test_collate_pads_and_groups_by_image_tiles():
    long = {
        "input_ids": torch.tensor([[5, 6, 7]]),
        "attention_mask": torch.ones(1, 3).long(),
        "pixel_values": torch.zeros(1, 2),
    }
    two = {
        "input_ids": torch.tensor([[8]]),
        "attention_mask": torch.ones(1, 1).long(),
        "pixel_values": torch.ones(1, 2),
    }
    other = {**two, "pixel_values": torch.ones(1, 3)}
    assert groups([long, other, two]) == [[0, 2], [1]]
    left, right = collate([long, two], 9, "left"), collate([long, two], 9, "right")
    assert left["input_ids"].tolist() == [[5, 6, 7], [9, 9, 8]]
    assert left["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert right["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert right["pixel_values"].tolist() == [[0, 0], [1, 1]]


def test_extend_marks_answer_tokens_as_the_family_does():
    inputs = {name: torch.zeros(1, 2).long() for name in ("input_ids", "token_type_ids", "mm_token_type_ids")}
    assert extend(inputs, [4], "gemma3")["token_type_ids"].tolist() == [[0, 0, 0]]
    extended = extend(inputs, [4], "paligemma")
    assert extended["token_type_ids"].tolist() == [[0, 0, 1]]
    assert extended["mm_token_type_ids"].tolist() == [[0, 0, 0]]
    assert extended["input_ids"].tolist() == [[0, 0, 4]]
    assert extend(inputs, [], "paligemma")["input_ids"].tolist() == [[0, 0]]


def test_logits_are_those_of_the_rows_in_whatever_order():
    adapter = tiny()
    encoded = [adapter.encode(IMAGE, question) for question in ("what", "what is it")]
    forward = adapter._forward.full_forward(encoded, [[5, 6, 7], [8]])
    with torch.inference_mode():
        whole = adapter.model(**forward.inputs).logits
        first = forward.rows[0, 0]
        for rows in (
            forward.rows,
            torch.tensor([[0, 1, 2], [0, 1, 1]]),  # the first rows, where a shorter answer repeats its last
            torch.tensor([[2, 1, 0], [0, 1, 2]]),
            torch.stack([torch.stack([first, first + 2]), torch.stack([first + 2, first])]),
        ):
            logits = adapter._forward.logits(forward, rows)
            expected = torch.stack([sample[row] for sample, row in zip(whole, rows, strict=True)])
            distinct = torch.ones_like(rows, dtype=torch.bool)
            distinct[:, 1:] = rows[:, 1:] != rows[:, :-1]
            torch.testing.assert_close(logits[distinct], expected[distinct], rtol=1e-4, atol=1e-5)
