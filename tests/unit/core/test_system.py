"""Errors of models and processors are one line, our own stay what they are; output that nobody reads stops no work."""

import gc
import os
import subprocess
import sys

import jinja2
import numpy as np
import pytest
from PIL import Image

from stethoscope.adapters.hf import HfAdapter
from stethoscope.core.errors import CapabilityError, CaptureError, DataError
from stethoscope.core.system import ModelFaults, raised_here, rare_collections, tolerate_closed_output
from stethoscope.core.types import Generation

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8))
QUESTION = "Is there a dog in the image?"


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
    monkeypatch.setattr("stethoscope.adapters.generation.build_config", None)  # called in our frame
    encoded = adapter.encode(IMAGE, QUESTION)
    with pytest.raises(TypeError) as raised:
        adapter.generate([encoded], Generation(max_new_tokens=2))
    assert raised_here(raised.value)
    with pytest.raises(MemoryError), ModelFaults("the model fails"):
        raise MemoryError


@pytest.fixture
def broken_pipe():
    """A descriptor whose other end is closed."""
    end, start = os.pipe()
    os.close(end)
    yield start
    os.close(start)


@pytest.mark.parametrize("name", ["stdout", "stderr"])
@pytest.mark.parametrize("buffered", [True, False])
def test_work_goes_on(broken_pipe, monkeypatch, name, buffered):
    stream = os.fdopen(os.dup(broken_pipe), "w") if buffered else _unbuffered(os.dup(broken_pipe))
    monkeypatch.setattr(sys, name, stream)
    done = []
    with tolerate_closed_output():
        for number in range(3):
            print("line", file=getattr(sys, name), flush=number == 1)
            done.append(number)
        assert getattr(sys, name).encoding == stream.encoding
    assert getattr(sys, name) is stream
    assert done == [0, 1, 2]
    stream.close()


def _unbuffered(descriptor):
    stream = os.fdopen(descriptor, "w")
    stream.reconfigure(write_through=True)
    return stream


def run(command, **more):
    code = f"import sys; from stethoscope.cli import main; main({command!r})"
    return subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, timeout=300, **more)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(("command", "status"), [(["list"], 0), (["list", "nonsense"], 2)])
def test_the_status_is_that_of_the_work(broken_pipe, unbuffered, command, status):
    done = run(command, stdout=broken_pipe, env={**os.environ, "PYTHONUNBUFFERED": unbuffered})
    assert done.returncode == status
    assert len(done.stderr.splitlines()) == (status == 2)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the machine has no device that is always full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_onto_a_full_disk_is_one_line(unbuffered):
    with open("/dev/full", "w") as full:
        done = run(["list"], stdout=full, env={**os.environ, "PYTHONUNBUFFERED": unbuffered})
    assert done.returncode == 2
    assert "no space left" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_collections_are_as_often_as_before_after_a_block():
    before = gc.get_threshold()
    with rare_collections(5000):
        assert gc.get_threshold() == (5000, *before[1:])
    assert gc.get_threshold() == before
