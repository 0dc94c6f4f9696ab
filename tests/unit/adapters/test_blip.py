"""BLIP-2 and InstructBLIP from folders: of today, of before image tokens, and with a processor of another name."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from stethoscope.adapters import tiny
from stethoscope.adapters.hf import HfAdapter
from stethoscope.core.errors import CapabilityError, ConfigError, DataError
from stethoscope.core.types import Generation
from stethoscope.tracing.hooks import AttentionRecorder, record
from stethoscope.tracing.trace import REQUIREMENTS

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


def test_a_vocabulary_on_disk_cannot_grow(tmp_path):
    save("instructblip-vicuna", tmp_path)
    make_old(tmp_path)
    with pytest.raises(CapabilityError, match="one more for the image") as error:
        HfAdapter(str(tmp_path), prompt="{question}", device_map={"": "disk"}, offload_folder=str(tmp_path)).setup()
    assert "\n" not in str(error.value)


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
    inputs = loaded.encode(IMAGE, QUESTION).inputs
    assert set(inputs) == set(expected)
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("family", "ends"),
    [("blip-2-opt", {"</s>", "\n"}), ("instructblip-vicuna", {"<s>", "</s>"}), ("blip-2-t5", {"</s>"})],
)
def test_an_answer_ends_where_the_language_model_or_the_tokenizer_says(family, ends):
    adapter = HfAdapter(random_init="tiny", family=family, prompt="{question}", device="cpu")
    tokenizer = adapter.processor.tokenizer
    assert {tokenizer.decode([token]) for token in adapter._tokens.end_ids} == ends


def random(family, **settings):
    settings = {"prompt": "Question: {question} Answer:", "device": "cpu", "dtype": "float32", **settings}
    adapter = HfAdapter(random_init="tiny", family=family, **settings)
    adapter.setup()
    return adapter


def test_a_prompt_with_a_place_for_the_image_is_refused():
    with pytest.raises(ConfigError, match=r"Blip2Processor puts the image before the text by itself; leave \{image\}"):
        random("blip-2-opt", prompt="{image} Question: {question} Answer:")


@pytest.mark.parametrize("family", ["blip-2-opt", "blip-2-t5", "llava"])
def test_the_placeholder_is_no_word_of_an_answer(family):
    prompt = "USER: <image>\n{question} ASSISTANT:" if family == "llava" else "Question: {question} Answer:"
    adapter = random(family, prompt=prompt)
    encoded = adapter.encode(IMAGE, QUESTION)
    with pytest.raises(DataError, match="answer holds the image placeholder"):
        adapter.answer(encoded, "a dog and <image>")
    plain = adapter.generate([encoded], Generation(max_new_tokens=3))[0]
    head, token = adapter.model.get_output_embeddings(), adapter.model.config.image_token_id
    head.weight.data[token] = head.weight.data[plain.token_ids[0]] * 2  # now it is more probable than the first word
    again = adapter.generate([encoded], Generation(max_new_tokens=3))[0]
    assert again.token_ids[0] == plain.token_ids[0]
    assert again.logprobs[0] < plain.logprobs[0] - 0.5
    assert adapter.trace(encoded, again, ()).logits[0].argmax() == token


def test_half_precision_is_told_though_the_queries_stay_exact(tmp_path):
    save("blip-2-t5", tmp_path)
    loaded = HfAdapter(str(tmp_path), prompt="Question: {question} Answer:", dtype="float16", device="cpu")
    assert loaded.fingerprint()["dtype"] == "float16"
    assert loaded.model.query_tokens.dtype == torch.float32
    encoded = loaded.encode(IMAGE, QUESTION)
    answer = loaded.generate([encoded], Generation(max_new_tokens=3))[0]
    trace = loaded.trace(encoded, answer, REQUIREMENTS)
    exact = from_folder(tmp_path).trace(encoded, answer, REQUIREMENTS)
    torch.testing.assert_close(trace.mass, exact.mass, rtol=0, atol=5e-3)
    torch.testing.assert_close(trace.lens_logprob, exact.lens_logprob, rtol=0, atol=5e-2)
    torch.testing.assert_close(trace.relevancy.patches, exact.relevancy.patches, rtol=0.1, atol=1e-3)


class Apart(AttentionRecorder):
    """Keeps patches apart: the attention of the vision tower adds nothing."""

    roles = ("vision",)

    def forward(self, call):
        return torch.zeros_like(call.value.transpose(1, 2)), None


def vision_tokens(adapter, image):
    with record(adapter.model, Apart()), torch.no_grad():
        return adapter.model.vision_model(adapter.encode(image, QUESTION).inputs["pixel_values"]).last_hidden_state[0]


@pytest.mark.parametrize("family", ["blip-2-opt", "instructblip-t5"])
def test_a_painted_patch_is_where_the_map_of_relevancy_has_it(family):
    """Pictures are squashed into a square of 4 x 4 patches; the tower's first token stands for none of them."""
    adapter = random(family)
    before = vision_tokens(adapter, IMAGE)
    encoded = adapter.encode(IMAGE, QUESTION)
    answer = adapter.generate([encoded], Generation(max_new_tokens=2))[0]
    relevancy = adapter.trace(encoded, answer, ["relevancy"]).relevancy
    assert torch.equal(relevancy.patches, relevancy.vision[..., 1:].unflatten(-1, (4, 4)))
    for row in range(4):
        for column in range(4):
            painted = IMAGE.copy()
            x, y = column * 16 + 5, row * 12 + 4  # of 64 x 48 pixels, far enough from the patch's sides for resizing
            painted.paste((255, 0, 0), (x, y, x + 6, y + 4))
            change = (vision_tokens(adapter, painted) - before).norm(dim=-1)
            assert change.nonzero().flatten().tolist() == [1 + row * 4 + column]
