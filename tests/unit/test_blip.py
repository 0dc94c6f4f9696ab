"""BLIP-2 and InstructBLIP from folders: of today, of before image tokens, and with a processor of another name."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from stethoscope.adapters import tiny
from stethoscope.adapters.hf import HfAdapter
from stethoscope.records import Generation

FAMILIES = ("blip-2-opt", "blip-2-t5", "instructblip-vicuna", "instructblip-t5")
IMAGE = Image.effect_noise((64, 48), 80).convert("RGB")
QUESTION = "Is there a dog in the image?"


def save(family, folder):
    model, processor = tiny.build(family)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def make_old(folder):
    """What repositories looked like before the image tokens were part of the prompt, ``<image>`` not among the words.

    The embeddings lose the row of ``<image>`` where it is the last one.
    """
    config = json.loads((folder / "config.json").read_text())
    token, words = config["image_token_index"], config["text_config"]["vocab_size"]
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    assert tokenizer["added_tokens"][-1]["content"] == "<image>"
    del tokenizer["added_tokens"][-1]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    if token == words - 1:
        weights = load_file(folder / "model.safetensors")
        cut = {name: w[:-1].clone() if w.shape[0] == words else w for name, w in weights.items()}
        save_file(cut, folder / "model.safetensors", metadata={"format": "pt"})
        config["text_config"]["vocab_size"] = words - 1
    del config["image_token_index"]
    (folder / "config.json").write_text(json.dumps(config))
    processor = json.loads((folder / "processor_config.json").read_text())
    images = {**processor["image_processor"], "processor_class": processor["processor_class"]}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    (folder / "processor_config.json").unlink()
    return token, words


def from_folder(folder, **settings):
    adapter = HfAdapter(str(folder), prompt="Question: {question} Answer:", dtype="float32", device="cpu", **settings)
    adapter.setup()
    return adapter


def logits(model, processor):
    """A plain pass over a prompt as the processor gives it."""
    inputs = processor(images=IMAGE, text=f"Question: {QUESTION} Answer:", return_tensors="pt")
    if model.config.get_text_config().is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.tensor([[0, 5, 6]])
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_gives_the_model_that_was_saved(family, tmp_path):
    saved = save(family, tmp_path)
    loaded = from_folder(tmp_path)
    assert type(loaded.processor) is type(saved[1])
    torch.testing.assert_close(logits(loaded.model, loaded.processor), logits(*saved))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_of_before_image_tokens_is_completed(family, tmp_path):
    saved = save(family, tmp_path)
    token, words = make_old(tmp_path)
    loaded = from_folder(tmp_path)
    assert loaded.model.config.image_token_id == token
    assert len(loaded.processor.tokenizer) == len(saved[1].tokenizer)
    known = [word for word in range(words) if word != token]
    torch.testing.assert_close(
        logits(loaded.model, loaded.processor)[..., known], logits(*saved)[..., known], rtol=1e-4, atol=1e-5
    )
    encoded = loaded.encode(IMAGE, QUESTION)
    assert encoded.spans.image == tuple(range(saved[0].config.num_query_tokens))
    answer = loaded.generate([encoded], Generation(max_new_tokens=4))[0]
    assert loaded.trace(encoded, answer, ["relevancy"]).relevancy.patches.shape[2:] == (4, 4)


def test_the_head_that_a_checkpoint_brings_is_kept(tmp_path):
    """Flan-T5's head is not its embeddings, though transformers' configuration of T5 always says that they are tied."""
    save("blip-2-t5", tmp_path)
    make_old(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    language = from_folder(tmp_path).model.language_model
    assert torch.equal(language.lm_head.weight, weights["language_model.lm_head.weight"])
    assert torch.equal(language.shared.weight, weights["language_model.shared.weight"])
    assert not torch.equal(language.shared.weight, language.lm_head.weight)


@pytest.mark.parametrize("images", ["BlipImageProcessor", "InstructBlipVideoImageProcessor"])
def test_the_processor_of_the_video_model_is_not_believed(images, tmp_path):
    saved = save("instructblip-vicuna", tmp_path)
    make_old(tmp_path)
    video = {"processor_class": "InstructBlipVideoProcessor"}
    (tmp_path / "processor_config.json").write_text(json.dumps({**video, "num_query_tokens": 6}))
    edit(tmp_path / "preprocessor_config.json", lambda c: c.update({**video, "image_processor_type": images}))
    edit(tmp_path / "tokenizer_config.json", lambda c: c.update(video))
    loaded = from_folder(tmp_path)
    assert type(loaded.processor).__name__ == "InstructBlipProcessor"
    prompt = f"Question: {QUESTION} Answer:"
    expected = saved[1](images=IMAGE, text=prompt, return_tensors="pt")
    found = loaded.encode(IMAGE, QUESTION).inputs
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("family", "ends"),
    [("blip-2-opt", {"</s>", "\n"}), ("instructblip-vicuna", {"<s>", "</s>"}), ("blip-2-t5", {"</s>"})],
)
def test_an_answer_ends_where_the_language_model_or_the_tokenizer_says(family, ends):
    adapter = HfAdapter(random_init="tiny", family=family, prompt="{question}", device="cpu")
    tokenizer = adapter.processor.tokenizer
    assert {tokenizer.decode([token]) for token in adapter._ends} == ends
