"""Every family does everything with its layers on two devices: the same numbers, and nothing that mixes devices.

The devices are pretend ones, see ``pretend_devices``. Two cuts of every model: what ``device_map=auto`` makes of two
equal GPUs, and every other layer on the other device, which is all cuts between two layers at once.
"""

import warnings
from dataclasses import fields, is_dataclass, replace
from functools import cache
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from accelerate.utils import find_tied_parameters
from helpers.contract_helpers import CONFIGS, QUESTIONS, has_encoder, language, load, others_slow, picture, settings
from helpers.pretend_devices import CPU, one_device, place_of, pretend_devices, split
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from stethoscope.adapters import loading
from stethoscope.core.types import Generation
from stethoscope.diagnosis import diagnose
from stethoscope.diagnosis.layers_pass import read_layers
from stethoscope.relevancy import token_relevancy
from stethoscope.relevancy.rules import RULES
from stethoscope.streaming import stream
from stethoscope.streaming.recorded_steps import STEP_REQUIREMENTS, RecordedSteps
from stethoscope.streaming.step_recorder import StepRecorder
from stethoscope.tracing.logit_lens import lens_of
from stethoscope.tracing.trace import EXTRA_REQUIREMENTS, FORWARD_REQUIREMENTS, REQUIREMENTS

GENERATION = Generation(max_new_tokens=4)


def families():
    """One configuration of each adapter and family."""
    first = {}
    for name in sorted({*CONFIGS} - {"hf", "testbed"}):  # a LLaVA too
        config = settings(name)
        first.setdefault((config["_target_"], config.get("family"), config.get("version")), name)
    return list(first.values())


FAMILIES = families()


def halves(model):
    """The map that transformers makes of ``device_map=auto`` where the first device is full amid the language model."""
    from transformers.integrations.accelerate import compute_module_sizes, infer_auto_device_map

    sizes, _ = compute_module_sizes(model)
    names = {id(module): name for name, module in model.named_modules()}
    layers = [names[id(layer)] for layer in language(SimpleNamespace(model=model)).layers]
    for share in range(30, 130, 4):
        rooms = {0: sizes[""] * share // 100, 1: sizes[""]}
        placed = infer_auto_device_map(model, max_memory=rooms, no_split_module_classes=model._no_split_modules)
        if len({place_of(placed, layer) for layer in layers}) == 2:
            return placed
    raise AssertionError(f"{type(model).__name__}: no cut between two layers of the language model")


def alternating(model):
    """Every other layer on the other device; what is no layer follows the one before it."""
    placed, turn = {}, 0

    def walk(module, name):
        nonlocal turn
        whole = isinstance(module, GradientCheckpointingLayer) or type(module).__name__ in model._no_split_modules
        if whole or not any(True for _ in module.children()):
            turn += whole
            placed[name] = turn % 2
            return
        for own, _ in module.named_parameters(prefix=name, recurse=False):
            placed[own] = turn % 2
        for own, _ in module.named_buffers(prefix=name, recurse=False):
            placed[own] = turn % 2
        for child, part in module.named_children():
            walk(part, f"{name}.{child}" if name else child)

    walk(model, "")
    for names in find_tied_parameters(model):  # accelerate ties them again, on one device
        for name in names[1:]:
            placed[place_of(placed, name, key=True)] = place_of(placed, names[0])
    return placed


@cache
def plain(name):
    return load(name, "model.random_init=tiny")


def spread(name, cut):
    """The adapter with its model split; to be used within ``pretend_devices``."""
    with mock.patch.object(loading, "dispatch_model", lambda model, _: split(model, cut(model))):
        adapter = load(name, "model.random_init=tiny", "model.device=auto", "+model.device_map=cuda:0")
    assert set(adapter.model.hf_device_map.values()) == {0, 1}
    return adapter


CUTS = [pytest.param(alternating, id="alternating"), pytest.param(halves, id="halves", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=others_slow(FAMILIES))
def family(request):
    return request.param


@pytest.fixture(scope="module", params=CUTS)
def adapter(request, family):
    """The adapter of a family with its model split."""
    with warnings.catch_warnings(), pretend_devices():
        warnings.filterwarnings("ignore", "The following device_map keys")
        yield spread(family, request.param)


@pytest.fixture(scope="module")
def encoded(adapter, family):
    with one_device():
        return [plain(family).encode(picture(seed), question) for seed, question in enumerate(QUESTIONS[:2])]


@pytest.fixture(scope="module")
def answers(encoded, family):
    with one_device():
        return plain(family).generate(encoded, GENERATION)


@pytest.fixture
def both(adapter, family):
    """Calls a function with the split adapter and with the same on one device, and compares what they return."""

    def compare(function):
        with one_device():
            expected = function(plain(family))
        same(function(adapter), expected)

    return compare


def same(value, other, name=""):
    """The same values in tensors, all on the CPU, and in records that hold some."""
    if isinstance(value, Tensor):
        assert value.device == CPU, name
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5, msg=lambda text: f"{name}: {text}")
    elif is_dataclass(value):
        for part in fields(value):
            if part.compare:
                same(getattr(value, part.name), getattr(other, part.name), part.name)
    elif isinstance(value, (list, tuple)):
        assert len(value) == len(other), name
        for pair in zip(value, other, strict=True):
            same(*pair, name)
    elif isinstance(value, (float, np.ndarray)):
        assert value == pytest.approx(other, rel=1e-4, abs=1e-4), name
    elif isinstance(value, (int, str)):
        assert value == other, name


def possible(adapter, requires):
    """Without what models with an encoder have not."""
    return set(requires) - ({"states", "image_lens"} if has_encoder(adapter) else set())


@torch.inference_mode()
def steps_trace(adapter, encoded, answer):
    """A trace that is put together from the decoding steps themselves."""
    model, arguments = adapter.prepare_generate([encoded], GENERATION)
    steps = RecordedSteps(lens_of(model), encoded.spans, has_encoder(adapter), STEP_REQUIREMENTS)
    recorder = StepRecorder(model, [steps])
    recorder.start()
    try:
        model.generate(**arguments)
    finally:
        recorder.stop()
    return steps.trace(0, answer, STEP_REQUIREMENTS)


def test_generates(both, encoded):
    both(lambda adapter: adapter.generate(encoded, GENERATION))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"num_beams": 2}, {"do_sample": True, "temperature": 1.5}])
def test_generates_with_beams_and_sampling(both, encoded, settings):
    both(lambda adapter: adapter.generate(encoded, Generation(max_new_tokens=3, **settings)))


@pytest.mark.slow
def test_reads_an_answer(both, encoded):
    both(lambda adapter: adapter.answer(encoded[0], "A cat."))


def test_traces(both, encoded, answers):
    requires = {*FORWARD_REQUIREMENTS, *EXTRA_REQUIREMENTS}
    both(lambda adapter: adapter.trace(encoded[0], answers[0], possible(adapter, requires)))


@pytest.mark.slow
@pytest.mark.parametrize("need", [*REQUIREMENTS, *EXTRA_REQUIREMENTS])
def test_traces_a_batch_for_every_need(both, encoded, answers, need):
    both(lambda adapter: adapter.trace_batch(encoded, answers, possible(adapter, {need})))


@pytest.mark.slow
def test_traces_behind_what_generation_has_kept(both, encoded):
    requires = {*REQUIREMENTS, *EXTRA_REQUIREMENTS} - {"states", "image_lens", "relevancy"}
    both(lambda adapter: adapter.trace_batch(*adapter.generate_with_cache(encoded, GENERATION)[::-1], requires))


@pytest.mark.parametrize("scope", ["row", pytest.param("token", marks=pytest.mark.slow)])
def test_relevancy(both, answers, scope):
    options = {"scope": scope, "tokens": [0, 2]} if scope == "token" else {}
    both(lambda adapter: token_relevancy(adapter, picture(0), QUESTIONS[0], answers[0], **options))


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_relevancy_that_keeps_its_graph_by_other_rules(both, answers, rule):
    options = {"rule": rule, "layers": "final", "recompute": False}
    both(lambda adapter: token_relevancy(adapter, picture(0), QUESTIONS[0], answers[0], **options))


def test_streams(both, encoded, answers):
    both(lambda adapter: steps_trace(adapter, encoded[0], answers[0]))


@pytest.mark.slow
def test_streams_tokens(both):
    both(lambda adapter: list(stream(adapter, picture(0), QUESTIONS[0], generation=GENERATION))[:-1])


def test_reads_layers_for_a_diagnosis(both, encoded, answers):
    both(lambda adapter: read_layers(adapter, encoded[0], answers[0], (), []))


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["row", "token"])
def test_diagnoses(both, answers, scope):
    both(lambda adapter: replace(diagnose(adapter, picture(0), QUESTIONS[0], answers[0], scope=scope), seconds=None))
