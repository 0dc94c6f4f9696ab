"""The backward pass of attention in blocks of rows, samples and heads against autograd on whole maps."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention

from stethoscope.relevancy import attention_backward
from stethoscope.relevancy.attention_backward import TracedCall
from stethoscope.relevancy.gradient_recorder import TracedAttention, visible_ends
from stethoscope.tracing.hooks import is_causal
from stethoscope.tracing.model_parts import Site

SAMPLES, HEADS, GROUPS, QUERIES, WIDTH = 3, 6, 2, 11, 4


@pytest.fixture
def module():
    config = LlamaConfig(
        hidden_size=HEADS * WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        num_hidden_layers=1,
        attn_implementation="eager",
    )
    return LlamaAttention(config, 0)


def tensors():
    generator = torch.Generator().manual_seed(0)

    def draw(heads):
        return torch.randn(SAMPLES, heads, QUERIES, WIDTH, generator=generator, dtype=torch.float64)

    padded = torch.arange(QUERIES) < torch.tensor([0, 2, 4])[:, None]  # columns to the left of each sample
    seen = ~torch.ones(QUERIES, QUERIES).triu(1).bool() & ~padded[:, None, None]
    mask = torch.zeros(SAMPLES, 1, QUERIES, QUERIES, dtype=torch.float64).masked_fill(~seen, -1e300)
    return [draw(HEADS).requires_grad_(), *(draw(GROUPS).requires_grad_() for _ in range(2))], draw(HEADS), mask


def by_autograd(query, key, value, gradient, mask):
    """Abar, saliency and the gradients of query, key and value from whole maps."""
    shared = HEADS // GROUPS
    scores = query @ key.repeat_interleave(shared, 1).transpose(-1, -2) * WIDTH**-0.5
    weights = (scores + mask).softmax(-1)
    output = weights @ value.repeat_interleave(shared, 1)
    *grads, by_map = torch.autograd.grad(output, (query, key, value, weights), gradient)
    product = weights * by_map
    return product.clamp(min=0).mean(1), product.abs().sum(1), grads


# bytes of maps at once and rows at least: all at once, samples in turn, heads in turn, one row of one head
@pytest.mark.parametrize(("cache", "rows"), [(2**20, 64), (7000, 4), (1500, 4), (1, 4), (1, 1)])
def test_blocks_of_any_shape_give_the_gradients_of_autograd(monkeypatch, module, cache, rows):
    monkeypatch.setattr(attention_backward, "_CACHE", cache)
    monkeypatch.setattr(attention_backward, "_ROWS", rows)
    inputs, gradient, mask = tensors()
    abar, saliency = torch.zeros(2, SAMPLES, QUERIES, QUERIES, dtype=torch.float64)
    shapes = set()

    def receive(call, blocks):
        for block in blocks:
            shapes.add(block.abar.shape[1])
            stop, end = block.start + block.abar.shape[1], block.abar.shape[2]
            abar[:, block.start : stop, :end] = block.abar
            if block.saliency is not None:
                saliency[:, stop - block.saliency.shape[1] : stop, :end] = block.saliency

    ends = visible_ends(QUERIES, QUERIES, mask, is_causal(module, QUERIES, None))
    call = TracedCall(Site("", "language", 0), module, mask, {"scaling": WIDTH**-0.5}, receive, ends, salient=5)
    output = TracedAttention.apply(*inputs, call)
    grads = torch.autograd.grad(output, inputs, gradient.transpose(1, 2))
    expected_abar, expected_saliency, expected_grads = by_autograd(*inputs, gradient, mask)
    torch.testing.assert_close(abar, expected_abar, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(saliency[:, 5:], expected_saliency[:, 5:], rtol=1e-10, atol=1e-12)
    assert not saliency[:, :5].any()
    for grad, expected in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-12)
    assert max(shapes) >= min(rows, QUERIES)


@pytest.mark.parametrize(
    ("samples", "heads", "groups", "keys", "causal", "expected"),
    [
        (1, 8, 8, 704, False, (93, 1, 8)),
        (8, 8, 8, 704, False, (93, 1, 8)),
        (8, 8, 8, 40, False, (204, 8, 8)),
        (64, 8, 8, 128, False, (64, 8, 8)),
        (1, 8, 8, 3044, False, (86, 1, 2)),  # 8 heads of 64 rows do not fit 2 MiB, 2 do
        (1, 28, 4, 700, False, (106, 1, 7)),  # 7 heads share a key, so 11 of them at once would mix groups
        (1, 32, 32, 12000, False, (64, 1, 1)),  # even where a head of 64 rows does not fit
        (1, 8, 8, 704, True, (70, 1, 8)),  # of smaller blocks less is masked
        (1, 8, 8, 480, True, (136, 1, 8)),
    ],
)
def test_a_block_has_64_rows_or_more(module, samples, heads, groups, keys, causal, expected):
    query, key = torch.empty(samples, heads, 1, 1).expand(-1, -1, keys, -1), torch.empty(samples, groups, keys, 1)
    call = TracedCall(Site("", "language", 0), module, None, {}, None, [], causal=causal)
    assert attention_backward._block_shape(call, query, key) == expected
    call.budget = 5 * 4 * keys * 3  # a budget of three rows
    assert attention_backward._block_shape(call, query, key) == (3, 1, 1)


def test_half_precision_adds_up_blocks_in_float32(monkeypatch, module):
    monkeypatch.setattr(attention_backward, "_CACHE", 1)
    inputs, gradient, mask = tensors()
    expected = by_autograd(*inputs, gradient, mask)[2]
    errors = []
    for rows in (QUERIES, 1):
        monkeypatch.setattr(attention_backward, "_ROWS", rows)
        half = [tensor.detach().bfloat16().requires_grad_() for tensor in inputs]
        options = {"scaling": WIDTH**-0.5}
        call = TracedCall(
            Site("", "language", 0), module, mask.clamp(min=-1e38).bfloat16(), options,
            lambda _, blocks: list(blocks),
            [QUERIES] * QUERIES,
        )  # fmt: skip
        grads = torch.autograd.grad(TracedAttention.apply(*half, call), half, gradient.transpose(1, 2).bfloat16())
        errors.append(max((a.double() - b).norm() / b.norm() for a, b in zip(grads, expected, strict=True)))
    assert errors[1] < 1.2 * errors[0] < 0.03


def test_the_default_budget_follows_free_memory_on_a_gpu(monkeypatch):
    assert attention_backward.default_budget(torch.device("cpu")) == attention_backward.BUDGET == 2**26
    # stands in for a device that the machine of the tests lacks
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 6 * 2**20)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 * 2**20)
    for free, budget in ((2**20, 2**26), (2**30 - 2**22, 2**27), (2**40, 2**31)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 2**40))
        assert attention_backward.default_budget(torch.device("cuda")) == budget
