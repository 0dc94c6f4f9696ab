"""Graphs that keep less than whole ones, and go when nothing needs them any more."""

import gc

import pytest
import torch
from helpers import zoo
from transformers.modeling_layers import GradientCheckpointingLayer

from stethoscope.core.errors import CaptureError
from stethoscope.relevancy import checkpointing, relevancies_from_passes
from stethoscope.relevancy.checkpointing import SparseGraphs
from stethoscope.relevancy.shared_passes import AnswerPass, PromptPass
from stethoscope.tracing.hooks import selected
from stethoscope.tracing.model_parts import frozen


class Layer(GradientCheckpointingLayer):
    def __init__(self, change=None, width=8):
        super().__init__()
        self.norm, self.up, self.gate = torch.nn.LayerNorm(width), *(torch.nn.Linear(width, 4 * width) for _ in "ab")
        self.act, self.down, self.change = torch.nn.SiLU(), torch.nn.Linear(4 * width, width), change

    def forward(self, states):
        normed = self.norm(states)
        up = self.up(normed)
        if self.change == "output":
            up.mul_(2)  # of which the recipe knows nothing
        result = states + self.down(self.act(self.gate(normed)) * up)
        if self.change == "argument":
            with torch.no_grad():
                states.mul_(2)
        return result


def gradients(change, sparse):
    """The gradient of a layer's input, and the numbers that its graph keeps."""
    torch.manual_seed(0)
    model, graphs, sizes = torch.nn.Sequential(Layer(change)), SparseGraphs(), {}
    states = torch.randn(1, 5, 8, requires_grad=True)
    pack = graphs._pack

    def count(tensor):
        kept = pack(tensor) if sparse else tensor.detach()
        if isinstance(kept, torch.Tensor):
            sizes[kept.untyped_storage().data_ptr()] = kept.numel()
        return kept

    graphs._pack = count
    with frozen(model), graphs.route(model), graphs.layer():
        result = model(states.clone())
    return torch.autograd.grad(result.sum(), states)[0], sum(sizes.values()) - sum(map(torch.numel, model.parameters()))


def test_a_sparse_graph_gives_the_same_gradient_and_keeps_less(monkeypatch):
    monkeypatch.setattr("stethoscope.relevancy.checkpointing._KEPT_PRODUCTS", 0.0)
    whole, sizes = gradients(None, sparse=False)
    gradient, fewer = gradients(None, sparse=True)
    assert torch.equal(gradient, whole)
    assert fewer < sizes / 3


def test_an_output_that_is_changed_in_place_is_kept(monkeypatch):
    monkeypatch.setattr("stethoscope.relevancy.checkpointing._KEPT_PRODUCTS", 0.0)
    assert torch.equal(gradients("output", sparse=True)[0], gradients("output", sparse=False)[0])


def test_an_argument_that_is_changed_in_place_is_an_error(monkeypatch):
    monkeypatch.setattr("stethoscope.relevancy.checkpointing._KEPT_PRODUCTS", 0.0)
    with pytest.raises(CaptureError, match="changes in place"):
        gradients("argument", sparse=True)


def prompt_pass(case, **options):
    ids, count = case.inputs["input_ids"], len(zoo.ANSWER)
    inputs = {name: value for name, value in case.inputs.items() if value.shape != ids.shape}
    return PromptPass(case.model, {**inputs, "input_ids": ids[:, :-count]}, **options)


def relevancy(case, **options):
    ids, count = case.inputs["input_ids"], len(zoo.ANSWER)
    with selected(case.model):
        answer_pass = AnswerPass(prompt_pass(case, **options))
        with answer_pass.recorded():
            logits = case.model(**answer_pass.inputs(ids[:, -count - 1 : -1])).logits
        return relevancies_from_passes(answer_pass, logits, [zoo.ANSWER])[0]


@pytest.mark.parametrize("many", [2**20, 4], ids=["whole", "halves"])
def test_relevancy_by_sparse_graphs(monkeypatch, many):
    monkeypatch.setattr(checkpointing, "_MANY", many)
    case = zoo.llava()
    sparse, whole = relevancy(case, recompute=False, sparse=True), relevancy(case, recompute=False)
    for name in ("llm", "vision", "saliency"):
        torch.testing.assert_close(getattr(sparse, name), getattr(whole, name), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "options", [{"recompute": True}, {"recompute": False}, {"recompute": False, "sparse": True}],
    ids=["inputs", "whole", "sparse"],
)  # fmt: skip
def test_the_graph_of_a_prompt_goes_with_the_prompt(options):
    """A graph that refers to itself would stay: no collector of Python sees through its nodes."""
    case = zoo.llava()
    prompt_pass(case, **options)
    gc.collect()
    before = sum(isinstance(part, torch.Tensor) for part in gc.get_objects())
    prompt_pass(case, **options)
    assert sum(isinstance(part, torch.Tensor) for part in gc.get_objects()) == before


def test_layers_whose_output_nobody_reads_are_dropped():
    case = zoo.llava()
    graph = prompt_pass(case, recompute=False)
    layers = len(graph.recorder.layers["language"]) + len(graph.recorder.layers["vision"])
    read = (
        layers if case.model.config.vision_feature_layer == -1 else layers + 1 + case.model.config.vision_feature_layer
    )
    assert len(graph.recorder.checkpointer.calls) == read


class Norm(torch.nn.Module):
    def __init__(self, shift):
        super().__init__()
        self.weight, self.variance_epsilon, self.shift = torch.nn.Parameter(torch.rand(8)), 1e-2, shift

    def forward(self, states):
        scale = (states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()
        return (self.weight + self.shift) * (states * scale)


class Normed(GradientCheckpointingLayer):
    def __init__(self, shift):
        super().__init__()
        self.norm = Norm(shift)

    def forward(self, states):
        return self.norm(states).square()


@pytest.mark.parametrize("shift", [0, 1])
def test_the_gradient_of_a_norm(shift):
    torch.manual_seed(0)
    model, graphs, states = torch.nn.Sequential(Normed(shift)), SparseGraphs(), torch.randn(2, 5, 8, requires_grad=True)
    with frozen(model):
        expected = torch.autograd.grad(model(states).sum(), states)[0]
        with graphs.route(model), graphs.layer():
            result = model(states)
    is_rms_norm = checkpointing._epsilons[model[0].norm] is not None
    assert is_rms_norm == (shift == 0)  # the other is of Gemma, not torch's RMS norm
    torch.testing.assert_close(torch.autograd.grad(result.sum(), states)[0], expected, rtol=1e-5, atol=1e-6)
