"""The encoder keeps nothing that is wrong for the next image or question; chat templates that fail are one line."""

import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from stethoscope.adapters.hf import HfAdapter
from stethoscope.core.errors import ConfigError
from stethoscope.core.types import Generation

QUESTION = "Is there a dog in the image?"


def picture(seed, width, height):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def internvl():
    adapter = HfAdapter(random_init="tiny", family="internvl", device="cpu")
    adapter.setup()
    return adapter


def test_tiles_that_only_the_whole_processor_asks_for_come_back_for_every_image(internvl):
    """InternVL's image processor alone makes one tile; for a small square picture that is right, for others not."""
    processor, shown = internvl.processor, [picture(0, 50, 50), picture(1, 50, 50)]
    shown += [picture(seed, 200, 60) for seed in range(3)] + [picture(3, 50, 50), picture(4, 200, 60)]
    assert len(processor.image_processor(images=shown[2], return_tensors="pt")["pixel_values"]) == 1
    tiles = []
    for image in shown:
        encoded = internvl.encode(image, QUESTION)
        direct = processor(images=image, text=encoded.text, return_tensors="pt")
        assert torch.equal(encoded.inputs["pixel_values"], direct["pixel_values"])
        assert torch.equal(encoded.inputs["input_ids"], direct["input_ids"])
        assert len(encoded.spans.grids) == len(direct["pixel_values"])
        tiles.append(len(direct["pixel_values"]))
    assert tiles == [1, 1, 4, 4, 4, 1, 4]


def test_an_image_of_a_known_size_is_prepared_without_the_text(internvl, monkeypatch):
    """What is kept saves work: the second image of a size goes through the image processor alone."""
    adapter = HfAdapter(random_init="tiny", family="gemma3", device="cpu")
    adapter.setup()
    for seed in range(2):
        adapter.encode(picture(seed, 60, 40), QUESTION)
    monkeypatch.setattr(type(adapter.processor), "__call__", lambda *arguments, **more: pytest.fail("asked again"))
    third = adapter.encode(picture(2, 60, 40), QUESTION)
    alone = adapter.processor.image_processor(images=picture(2, 60, 40), return_tensors="pt")
    assert torch.equal(third.inputs["pixel_values"], alone["pixel_values"])


def test_what_is_kept_stays_within_its_bounds(monkeypatch):
    """Many questions about many pictures: old ones make room, and what is counted is what is there."""
    monkeypatch.setattr("stethoscope.adapters.prompts._IMAGE_BYTES", 400_000)
    monkeypatch.setattr("stethoscope.adapters.prompts._TEXT_BYTES", 20_000)
    adapter = HfAdapter(random_init="tiny", family="llava", device="cpu")
    adapter.setup()
    for number in range(40):
        adapter.encode(picture(number % 8, 60, 40), f"Is there object {number} in the image?")
    for cache in (adapter._questions.encoder._images, adapter._questions.encoder._texts):
        assert cache.used == sum(cache.size(value) for value in cache.values.values()) <= cache.limit
        assert 1 < len(cache.values) < 40


IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8))
HEAD = "{% for m in messages %}{% for c in m['content'] %}"
PARTS = HEAD + "{% if c['type'] == 'image' %}<|image_pad|>{% else %}TEXT{% endif %}{% endfor %}{% endfor %}"


def with_template(folder, text):
    (folder / "chat_template.jinja").write_text(text)
    return HfAdapter(str(folder), device="cpu")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('It must begin with a system message') }}", "It must begin with a system message"),
        ("{{ messages[0]['content'].pixels.width + 1 }}", "UndefinedError"),
        ("{{ messages[0]['content'] / 2 }}", "TypeError"),
        ("{{ messages[7]['content']['text'] }}", "UndefinedError"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "OverflowError"),
        ("{% if %}", "TemplateSyntaxError"),
        (PARTS.replace("TEXT", "{{ c['text'] }} I repeat: {{ c['text'] }}"), "writes the question 2 times"),
        (PARTS.replace("TEXT", "{{ c['text'] | upper }}"), "writes the question 0 times"),
        ("", "no chat template"),
    ],
)
def test_a_chat_template_that_cannot_be_used_is_one_line_before_weights_are_read(
    saved_qwen, monkeypatch, template, words
):
    if "writes" not in words:
        monkeypatch.setattr("stethoscope.adapters.loading.pretrained", lambda *a, **k: pytest.fail("weights were read"))
    with pytest.raises(ConfigError, match=words) as error:
        with_template(saved_qwen, template).setup()
    assert "\n" not in str(error.value)
    assert "set" in str(error.value)
    assert "prompt" in str(error.value)


def test_a_chat_template_that_joins_texts_is_given_one_with_the_image(saved_qwen):
    joined = "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
    adapter = with_template(saved_qwen, joined)
    encoded = adapter.encode(IMAGE, QUESTION)
    assert encoded.text.startswith("<|im_start|><|vision_start|><|image_pad|><|vision_end|>\n" + QUESTION)
    assert encoded.spans.image
    assert adapter.generate([encoded], Generation(max_new_tokens=2))


RENDER = """
from stethoscope.adapters import processors
from stethoscope.adapters.prompts import check_chat_template
from stethoscope.core.system import ended_by_signal
processor = processors.load({folder!r}, {{}})
with ended_by_signal():
    print("ready", flush=True)
    check_chat_template(processor)
"""


@pytest.mark.slow
def test_a_chat_template_that_never_ends_ends_with_the_signal(saved_qwen):
    """The power is one C function, which a handler of Python waits for; brackets, as Jinja reads from the left."""
    with_template(saved_qwen, "{{ 9 ** (9 ** (9 ** 9)) }}")
    code = RENDER.format(folder=str(saved_qwen))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        time.sleep(1)
        process.terminate()
        assert process.wait(120) == -signal.SIGTERM
    finally:
        process.kill()
        process.stdout.close()
