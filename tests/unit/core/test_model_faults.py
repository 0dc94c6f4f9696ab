"""Errors of processors, templates and models are one line; those of our own code stay what they are."""

import signal
import subprocess
import sys
import time

import jinja2
import numpy as np
import pytest
from PIL import Image

from stethoscope.adapters.hf import HfAdapter
from stethoscope.core.errors import CapabilityError, CaptureError, ConfigError, DataError
from stethoscope.core.system import model_faults, raised_here
from stethoscope.core.types import Generation

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8))
QUESTION = "Is there a dog in the image?"
HEAD = "{% for m in messages %}{% for c in m['content'] %}"
PARTS = HEAD + "{% if c['type'] == 'image' %}<|image_pad|>{% else %}TEXT{% endif %}{% endfor %}{% endfor %}"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    adapter = HfAdapter(random_init="tiny", family="qwen2_vl", device="cpu")
    adapter.model.save_pretrained(folder)
    adapter.processor.save_pretrained(folder)
    return folder


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
def test_a_chat_template_that_cannot_be_used_is_one_line_before_weights_are_read(saved, monkeypatch, template, words):
    if "writes" not in words:
        monkeypatch.setattr("stethoscope.adapters.loading.pretrained", lambda *a, **k: pytest.fail("weights were read"))
    with pytest.raises(ConfigError, match=words) as error:
        with_template(saved, template).setup()
    assert "\n" not in str(error.value)
    assert "set" in str(error.value)
    assert "prompt" in str(error.value)


def test_a_chat_template_that_joins_texts_is_given_one_with_the_image(saved):
    joined = "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
    adapter = with_template(saved, joined)
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
def test_a_chat_template_that_never_ends_ends_with_the_signal(saved):
    """This power is one C function, for which a handler of Python would wait for ever."""
    with_template(saved, "{{ 9 ** 9 ** 9 ** 9 }}")
    code = RENDER.format(folder=str(saved))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        time.sleep(1)
        process.terminate()
        assert process.wait(20) == -signal.SIGTERM
    finally:
        process.kill()
        process.stdout.close()


def fail(error):
    """A function of a foreign module that raises."""
    names = {"__name__": "foreign", "error": error}
    exec("def call(*arguments, **more):\n    raise error", names)
    return names["call"]


@pytest.fixture
def adapter():
    adapter = HfAdapter(random_init="tiny", prompt="USER: <image>\n{question} ASSISTANT:", device="cpu")
    adapter.setup()
    return adapter


ERRORS = [TypeError("a\nb"), KeyError("x"), AttributeError("y"), RuntimeError(""), NotImplementedError()]
ERRORS += [jinja2.UndefinedError("u"), AssertionError("z")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_what_a_model_or_processor_raises_is_one_line(adapter, monkeypatch, error):
    encoded = adapter.encode(IMAGE, QUESTION)
    answer = adapter.generate([encoded], Generation(max_new_tokens=2))[0]
    adapter.model.model.language_model.layers[0].register_forward_pre_hook(fail(error))
    monkeypatch.setattr(type(adapter.processor), "__call__", fail(error))
    calls = [
        (DataError, lambda: adapter.encode(IMAGE.resize((50, 50)), QUESTION)),
        (DataError, lambda: adapter.generate([encoded], Generation(max_new_tokens=2))),
        (DataError, lambda: adapter.answer(encoded, "A dog.")),
        (CaptureError, lambda: adapter.trace(encoded, answer)),
    ]
    for kind, call in calls:
        with pytest.raises(kind, match=type(error).__name__) as raised:
            call()
        assert "\n" not in str(raised.value)


def test_a_processor_that_cannot_work_is_one_line_at_the_set_up(monkeypatch):
    adapter = HfAdapter(random_init="tiny", device="cpu")
    model, processor = adapter._tiny()
    adapter._tiny = lambda: (model, processor)
    monkeypatch.setattr(type(processor), "__call__", fail(TypeError("unexpected keyword")))
    for _ in range(2):
        with pytest.raises(CapabilityError, match=r"tiny-llava.*TypeError: unexpected keyword"):
            adapter.setup()


def test_our_own_faults_stay_visible(adapter, monkeypatch):
    monkeypatch.setattr("stethoscope.adapters.hf.build_config", None)  # called by our code: an error in its frame
    encoded = adapter.encode(IMAGE, QUESTION)
    with pytest.raises(TypeError) as raised:
        adapter.generate([encoded], Generation(max_new_tokens=2))
    assert raised_here(raised.value)
    with pytest.raises(MemoryError), model_faults("the model fails"):
        raise MemoryError
