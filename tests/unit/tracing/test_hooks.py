"""The registered attention function against eager attention, for what models pass on: masks, groups, caps, biases."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import sdpa_mask

from stethoscope.core.errors import CaptureError
from stethoscope.tracing.attention_recorder import RowAttentionRecorder
from stethoscope.tracing.hooks import (
    NAME,
    AttentionRecorder,
    additive_mask,
    attention,
    eager_attention,
    eager_rows,
    record,
    take_rows,
)
from stethoscope.tracing.trace import Spans

B, H, S, D = 2, 4, 6, 8


def eager_attention_forward(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """What every model file has: here with soft-capping and a position bias."""
    scores = query @ key.transpose(-1, -2) * (D**-0.5 if scaling is None else scaling)
    if kwargs.get("softcap") is not None:
        scores = torch.tanh(scores / kwargs["softcap"]) * kwargs["softcap"]
    if kwargs.get("position_bias") is not None:
        scores = scores + kwargs["position_bias"]
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1)
    return (weights @ value).transpose(1, 2), weights


class Attention(nn.Module):
    def __init__(self, is_causal=True):
        super().__init__()
        self.is_causal = is_causal


@pytest.fixture
def qkv():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, H, S, D, generator=generator) for _ in range(3)]


def causal():
    return torch.full((S, S), -torch.inf).triu(1)


def test_no_mask_of_a_causal_module_means_causal(qkv):
    _, weights = eager_attention(Attention(), *qkv, None)
    assert (weights.triu(1) == 0).all()
    output, _ = attention(Attention(), *qkv, None)
    assert torch.allclose(output, (weights @ qkv[2]).transpose(1, 2), atol=1e-6)


@pytest.mark.parametrize("flag", [None, False])
def test_no_mask_of_a_module_that_is_not_causal_means_none(qkv, flag):
    module = Attention(is_causal=flag is None and False)
    assert additive_mask(module, *qkv[:2], None, flag) is None
    assert additive_mask(Attention(), *qkv[:2], None, False) is None


def test_one_query_sees_the_whole_cache(qkv):
    assert additive_mask(Attention(), qkv[0][:, :, -1:], qkv[1], None) is None


@pytest.mark.parametrize("form", ["none", "boolean", "additive", "left padding"])
@pytest.mark.parametrize("extra", [{}, {"softcap": 2.0}, {"position_bias": torch.randn(1, H, S, S)}, {"scaling": 1.0}])
def test_sdpa_and_rows_agree_with_eager(qkv, form, extra):
    padding = torch.ones(B, S, dtype=torch.bool)
    padding[0, :2] = form != "left padding"
    mask = {"none": None, "additive": causal().expand(B, 1, S, S).clone()}.get(
        form, sdpa_mask(B, S, S, attention_mask=padding, allow_is_causal_skip=False)
    )
    output, weights = eager_attention(Attention(), *qkv, mask, **extra)
    handed_over, none = attention(Attention(), *qkv, mask, **extra)
    assert none is None or "softcap" in extra
    real = slice(2, None)  # a query that is padding may see anything
    assert torch.allclose(handed_over[:, real], output[:, real], atol=1e-5)
    rows = torch.tensor([[5, 3], [4, 4]])
    assert torch.allclose(eager_rows(Attention(), rows, *qkv, mask, **extra), take_rows(weights, rows), atol=1e-6)


def test_take_rows_spreads_a_batch_of_one():
    mask = torch.arange(S * S).view(1, 1, S, S)
    rows = torch.tensor([[0, 5], [2, 2]])
    assert torch.equal(take_rows(mask, rows)[1, 0], mask[0, 0, [2, 2]])


def tiny(**settings):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, num_key_value_heads=2, **sizes, **settings)).eval()


def test_a_model_gives_the_same_logits_while_it_is_recorded():
    model, ids = tiny(), torch.arange(12).view(2, 6)
    padding = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    rows = RowAttentionRecorder(torch.tensor([[4, 5], [4, 5]]), [Spans(5, (2, 3), (4,)), Spans(5, (0, 1), (4,))], 6)
    with torch.no_grad():
        plain = model(ids, attention_mask=padding).logits
        with record(model, rows):
            recorded = model(ids, attention_mask=padding).logits
        model.set_attn_implementation(NAME)
        assert torch.equal(model(ids, attention_mask=padding).logits, plain)
    assert torch.equal(plain, recorded)
    assert rows.mass().shape == (2, 2, 2, 4, 5)
    assert torch.allclose(rows.mass().sum(-1), torch.ones(()), atol=1e-6)
    assert [image.shape for image in rows.image()] == [(2, 2, 2)] * 2


def test_one_recording_at_a_time_and_one_pass_per_listener():
    model, ids = tiny(), torch.arange(6)[None]

    def nested():
        with record(model, AttentionRecorder()), record(model, AttentionRecorder()):
            pass

    def twice():
        with record(model, RowAttentionRecorder(torch.tensor([[5]]), [Spans(6, (1,), (2,))], 6)):
            model(ids)
            model(ids)

    with pytest.raises(CaptureError, match="already active"):
        nested()
    with pytest.raises(CaptureError, match="called twice"):
        twice()
    assert model.config._attn_implementation == "sdpa"


def test_maps_that_are_none_are_refused(monkeypatch):
    model = tiny()
    file = __import__(type(model).__module__, fromlist=["_"])
    monkeypatch.setattr(
        file, "eager_attention_forward", lambda *arguments, **more: (arguments[1].transpose(1, 2), None)
    )

    def run(listener):
        with record(model, listener):
            model(torch.arange(6)[None])

    for listener in (AttentionRecorder(), RowAttentionRecorder(torch.tensor([[5]]), [Spans(6, (1,), (2,))], 6)):
        with pytest.raises(CaptureError, match=r"layers\.0\.self_attn .*None"):
            run(listener)


def test_gradients_reach_the_maps():
    class Keep(AttentionRecorder):
        def __init__(self):
            self.maps = []

        def on_weights(self, site, weights):
            self.maps.append(weights)

    model = tiny().requires_grad_(False)
    embeds = torch.randn(1, 6, 32, requires_grad=True)
    with record(model, Keep()) as listener:
        logit = model(inputs_embeds=embeds).logits[0, -1, 3]
    grads = torch.autograd.grad(logit, listener.maps)
    assert [grad.shape for grad in grads] == [(1, 4, 6, 6)] * 2
    assert grads[0].abs().sum() > 0
    assert (grads[1][0, :, :-1] == 0).all()  # the last layer's other rows lead nowhere
