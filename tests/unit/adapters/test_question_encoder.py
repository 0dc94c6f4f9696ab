"""Padding, the largest number of pixels, system texts and phrases: what the model reads, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.Image import Resampling

import stethoscope
from stethoscope.adapters import tiny
from stethoscope.adapters.hf import HfAdapter
from stethoscope.adapters.prompts import SYSTEMS
from stethoscope.adapters.question_encoder import pad_to_square
from stethoscope.core.errors import CapabilityError, ConfigError
from stethoscope.core.types import Generation
from stethoscope.diagnosis.render import payload
from stethoscope.diagnosis.run_diagnosis import diagnose
from stethoscope.tasks.chair import Chair
from stethoscope.tasks.pope import Pope

QUESTION = "Is there a dog in the image?"
MEAN = (0.48145466, 0.4578275, 0.40821073)


def photograph(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def adapter(family, **settings):
    built = HfAdapter(random_init="tiny", family=family, device="cpu", **settings)
    built.setup()
    return built


def pixels(encoded):
    """Pixels of the picture that the tower reads, the small copy of the whole not counted."""
    values = encoded.inputs["pixel_values"]
    if "image_grid_thw" in encoded.inputs:
        patch = int((values.shape[-1] / 6) ** 0.5)  # two frames of three colours
        return int(encoded.inputs["image_grid_thw"].prod()) * patch**2
    tiles = int(np.prod(values.shape[:-3]))
    return max(tiles - 1, 1) * values.shape[-2] * values.shape[-1]


@pytest.mark.parametrize("size", [(64, 48), (48, 64), (101, 40), (56, 56), (3, 200)])
def test_padded_pixels_are_those_of_a_picture_padded_by_hand(size):
    padded, plain = adapter("llava", pad=True), adapter("llava")
    picture, side = photograph(*size), max(size)
    square = np.empty((side, side, 3), dtype=np.uint8)
    square[:] = [int(part * 255) for part in MEAN]
    left, top = (side - size[0]) // 2, (side - size[1]) // 2
    square[top : top + size[1], left : left + size[0]] = np.asarray(picture)
    encoded = padded.encode(picture, QUESTION)
    by_hand = plain.processor.image_processor(images=Image.fromarray(square), return_tensors="pt")["pixel_values"]
    assert torch.equal(encoded.inputs["pixel_values"], by_hand)
    whole = plain.encode(picture, QUESTION)
    assert encoded.spans == whole.spans
    assert torch.equal(encoded.inputs["input_ids"], whole.inputs["input_ids"])
    assert torch.equal(encoded.inputs["pixel_values"], whole.inputs["pixel_values"]) == (size == (56, 56))


def test_a_padded_picture_is_diagnosed_where_it_is():
    """The picture fills the middle rows of the grid; the page's map and regions show nothing of the padding."""
    padded = stethoscope.load("llava-1.5-7b", random_init="tiny")
    diagnosis = diagnose(padded, photograph(80, 40), QUESTION, "A dog.")
    assert [grid for grid, _ in diagnosis.token_regions.grids] == [(4, 4)]
    assert np.allclose(diagnosis.token_regions.grids[0][1], (0, -20, 80, 60), atol=0.5)
    relevancy = diagnosis.relevancy.image[0, -1].reshape(4, 4).numpy()
    assert diagnosis.heat_map(0, raw=True).sum() == pytest.approx(relevancy[1:3].sum(), rel=0.02)
    own = payload(diagnosis)["maps"]["raw"]
    assert np.allclose(own["box"], (0, -20, 80, 60), atol=0.5)
    assert own["peaks"][0][-1] == pytest.approx(relevancy[1:3].max(), rel=1e-3)
    assert all(0 <= box[1] < box[3] <= 40 for box, _ in diagnosis.regions(0, count=16))


LIMITS = {
    "llava_next": 56 * 28, "llava_onevision": 2 * 56 * 56, "qwen2_vl": 10_000, "qwen2_5_vl": 10_000, "qwen3_vl": 10_000,
    "internvl": 2 * 56 * 56, "idefics3": 56 * 56, "smolvlm": 56 * 56,
}  # fmt: skip


@pytest.mark.parametrize("family", LIMITS)
@pytest.mark.parametrize("size", [(640, 480), (300, 900)])
def test_pictures_are_scaled_to_the_limit(family, size):
    free, limited = adapter(family), adapter(family, max_pixels=LIMITS[family])
    before, after = free.encode(photograph(*size), QUESTION), limited.encode(photograph(*size), QUESTION)
    assert pixels(after) <= LIMITS[family] < pixels(before)
    assert len(after.spans.image) < len(before.spans.image)
    assert sum(rows * columns for rows, columns in after.spans.grids) + len(after.spans.separators) == len(
        after.spans.image
    )
    answer = limited.generate([after], Generation(max_new_tokens=3))[0]
    assert torch.isfinite(limited.trace(after, answer).logits).all()
    assert limited.fingerprint()["settings"]["image_processor"] != free.fingerprint()["settings"]["image_processor"]


@pytest.mark.parametrize("family", LIMITS)
def test_a_limit_above_the_models_own_changes_nothing(family):
    picture = photograph(640, 480)
    free, limited = (
        adapter(family).encode(picture, QUESTION),
        adapter(family, max_pixels=10**9).encode(picture, QUESTION),
    )
    assert all(torch.equal(free.inputs[name], limited.inputs[name]) for name in free.inputs)


@pytest.mark.parametrize(
    "model",
    ["llava-1.5-7b", "paligemma-3b", "paligemma2-3b", "gemma-3-4b", "blip2-opt-2.7b", "blip2-flan-t5-xl",
     "instructblip-vicuna-7b", "instructblip-flan-t5-xl", "convllava-768", "mplug-owl2-7b", "minigpt4-vicuna-7b",
     "minigpt4-llama2-7b"],
)  # fmt: skip
def test_families_of_one_size_keep_it_or_refuse(model):
    stethoscope.load(model, random_init="tiny", max_pixels=200 * 200).setup()
    with pytest.raises(ConfigError, match=r"model.max_pixels=100 is too few for .*: every picture has [\d,]+ pixels"):
        stethoscope.load(model, random_init="tiny", max_pixels=100).setup()


@pytest.mark.parametrize("family", LIMITS)
def test_a_limit_below_the_smallest_picture_is_refused(family):
    with pytest.raises(ConfigError, match=r"model.max_pixels=100 is too few for .* pixels; give at least that"):
        adapter(family, max_pixels=100)


def test_a_processor_whose_size_is_not_understood_is_refused():
    class Adapter(HfAdapter):
        def _tiny(self):
            model, processor = super()._tiny()
            processor.image_processor.do_center_crop = False  # pictures keep their shape
            return model, processor

    with pytest.raises(CapabilityError, match="it is not known how the CLIPImageProcessorPil of tiny-llava chooses"):
        Adapter(random_init="tiny", max_pixels=10**6).setup()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_pixels": 0}, "model.max_pixels=0 should be a number of pixels"),
        ({"max_pixels": "many"}, "model.max_pixels='many' should be"),
        ({"pad": "white"}, "model.pad='white' should be true or false"),
        ({"phrases": "caption"}, "model.phrases='caption' should be texts"),
        ({"phrases": {"caption": "caption en"}}, "unknown key of model.phrases 'caption'"),
        ({"phrases": {"question": "answer en"}}, "model.phrases.question='answer en' should hold {question} once"),
    ],
)
def test_wrong_settings_are_one_line(settings, message):
    with pytest.raises(ConfigError, match=message.replace("{", r"\{")):
        HfAdapter(random_init="tiny", **settings)


def test_system_texts_stand_before_the_prompt():
    own = stethoscope.load("llava-1.5-7b", random_init="tiny", system="llava_v1").encode(photograph(40, 40), QUESTION)
    assert own.text == f"{SYSTEMS['llava_v1']} USER: <image>\n{QUESTION} ASSISTANT:"
    assert "a curious human" in own.text
    next_vicuna = stethoscope.load("llava-1.6-vicuna-7b", random_init="tiny").encode(photograph(40, 40), QUESTION)
    assert next_vicuna.text == f"{SYSTEMS['vicuna_v1']} USER: <image>\n{QUESTION} ASSISTANT:"
    convllava = stethoscope.load("convllava-768", random_init="tiny").encode(photograph(40, 40), QUESTION)
    assert convllava.text == next_vicuna.text


def test_chat_templates_write_the_system_turn_or_it_is_refused():
    qwen = adapter("qwen2_vl", system="Be brief.").encode(photograph(60, 60), QUESTION)
    assert qwen.text.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    family = HfAdapter(random_init="tiny", family="llava_next", system="Be brief.")
    model, processor = tiny.build("llava_next")
    processor.chat_template = "{{ messages[-1]['content'][1]['text'] }}<image>"
    family._tiny = lambda: (model, processor)
    with pytest.raises(ConfigError, match=r"leaves model\.system='Be brief.' out"):
        family.setup()


@pytest.mark.parametrize("model", ["paligemma-3b", "paligemma2-3b"])
def test_tasks_say_what_they_ask_for(model):
    paligemma, picture = stethoscope.load(model, random_init="tiny"), photograph(40, 40)
    chair, pope = Chair(scenes=1), Pope(scenes=1)
    for task in (chair, pope):
        task.setup()
    described, asked = chair.samples()[0], pope.samples()[0]
    assert (described.asks, asked.asks) == ("description", "question")
    encoded = paligemma.encode_as(described.asks, picture, described.question)
    assert encoded.text == "<image>caption en"
    assert (encoded.question, encoded.asks) == (described.question, "description")
    decode = paligemma.processor.tokenizer.decode
    ids = encoded.inputs["input_ids"][0]
    assert decode(ids[list(encoded.spans.question)]).strip() == "caption en"
    for encoded in (
        paligemma.encode_as(asked.asks, picture, asked.question),
        paligemma.encode(picture, asked.question),
    ):
        assert encoded.text == f"<image>answer en {asked.question}"
        assert encoded.question == asked.question
    assert paligemma.fingerprint()["phrases"]["description"] == "caption en"
    assert diagnose(paligemma, picture, "What is it?", "A dog.", asks="description").question == "What is it?"


def test_settings_are_part_of_the_fingerprint():
    prints = [
        adapter("llava", prompt="USER: <image>\n{question} ASSISTANT:", **settings).fingerprint()
        for settings in (
            {},
            {"pad": True},
            {"max_pixels": 10**6},
            {"system": "vicuna_v1"},
            {"phrases": {"question": "Q: {question}"}},
        )
    ]
    assert all(first != second for index, first in enumerate(prints) for second in prints[:index])


def test_the_same_model_takes_pictures_in_another_way():
    """Of tiny LLaVA, with the pixels of a picture that was changed by hand."""
    own, wide = adapter("llava"), photograph(90, 60)
    ways = {name: own.with_square(name) for name in ("none", "pad", "crop", "stretch")}
    by_hand = {
        "none": wide,
        "pad": pad_to_square(wide),
        "crop": wide.crop((15, 0, 75, 60)),
        "stretch": wide.resize((90, 90), Resampling.BICUBIC),
    }
    for name, other in ways.items():
        assert other.model is own.model
        pixels = other.encode(wide, QUESTION).inputs["pixel_values"]
        assert torch.equal(pixels, own.encode(by_hand[name], QUESTION).inputs["pixel_values"]), name
    assert own.fingerprint() == ways["none"].fingerprint()
    prints = [{name: other.fingerprint().get(name) for name in ("pad", "square")} for other in ways.values()]
    assert prints == [
        {"pad": None, "square": None}, {"pad": True, "square": None},
        {"pad": None, "square": "crop"}, {"pad": None, "square": "stretch"},
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="unknown way to make a picture square 'round'"):
        own.with_square("round")
