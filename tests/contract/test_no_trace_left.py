"""A traced pass leaves the model as it was, also when it fails half-way."""

import pytest
import torch
from helpers.contract_helpers import attention, extended, has_encoder, language, queries
from torch import nn

from stethoscope.core.errors import CaptureError
from stethoscope.tracing.hooks import NAME, AttentionRecorder, record

OWN = r"(layers\.1\.self_attn|decoder\.block\.1\.layer\.0\.SelfAttention)"  # self-attention of the decoder's layer 1
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def state(model):
    """Everything about a model that a tool could leave its mark on."""
    modules = dict(model.named_modules())
    configs = [model.config, *(getattr(model.config, key) for key in model.config.sub_configs)]
    return {
        "attention": [config._attn_implementation for config in configs],
        "of modules": {name: m.config._attn_implementation for name, m in modules.items() if hasattr(m, "config")},
        "hooks": {name: [list(getattr(module, hook).values()) for hook in HOOKS] for name, module in modules.items()},
        "training": {name: module.training for name, module in modules.items()},
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "methods": {name: module.forward.__func__ for name, module in modules.items()},
        "parameters": {name: (p.requires_grad, p.grad, p.dtype, p.data_ptr()) for name, p in model.named_parameters()},
        "weights": [p.sum().item() for p in model.parameters()],
    }


def test_after_a_trace(adapter, encoded, answers):
    before, grad = state(adapter.model), torch.is_grad_enabled()
    adapter.trace(encoded[0], answers[0])
    assert state(adapter.model) == before
    assert torch.is_grad_enabled() == grad


def test_after_a_listener_that_fails_half_way(adapter, encoded):
    class Failing(AttentionRecorder):
        def on_weights(self, site, weights):
            if (site.role, site.layer) == ("language", 1):
                raise CaptureError(f"{site.name} fails")

    before = state(adapter.model)

    def run():
        with record(adapter.model, Failing()):
            assert adapter.model.config._attn_implementation == NAME
            adapter.model(**extended(adapter, encoded[0], [5]))

    with pytest.raises(CaptureError, match=rf"{OWN} fails"):
        run()
    assert state(adapter.model) == before
    with record(adapter.model, AttentionRecorder()):  # the next recording is free to start
        pass


def test_values_that_are_not_finite_name_the_first_layer(adapter, encoded, answers):
    before = state(adapter.model)
    weight = queries(adapter, 1)
    kept = weight.data.clone()
    weight.data.fill_(float("nan"))
    try:
        with pytest.raises(CaptureError, match=rf"{OWN} .*not finite"):
            adapter.trace(encoded[0], answers[0])
        with pytest.raises(CaptureError, match="not numbers"):
            adapter.trace(encoded[0], answers[0], ())
    finally:
        weight.data.copy_(kept)
    assert state(adapter.model) == before


def test_a_model_whose_attention_is_not_seen(adapter, encoded, answers, monkeypatch):
    class Silent(nn.Module):
        def forward(self, hidden_states, **kwargs):
            return hidden_states, *[None] * (2 if has_encoder(adapter) else 1)

    for holder, name in language(adapter).holders:
        monkeypatch.setitem(holder._modules, name, Silent())
    with pytest.raises(CaptureError, match="no attention"):
        adapter.trace(encoded[0], answers[0], ("attention",))


def test_an_implementation_that_was_chosen_part_by_part_comes_back(adapter, encoded, answers):
    with attention(adapter.model, {"vision_config": "eager"}):
        before = state(adapter.model)
        adapter.trace(encoded[0], answers[0])
        assert state(adapter.model) == before
        assert adapter.model.config.vision_config._attn_implementation == "eager"
