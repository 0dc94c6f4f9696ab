"""Relevancy by the definitions and nothing else: every map kept whole, one plain backward per token, full matrices.

Shares no code with the package. Slow and hungry, for tiny models only.
"""

import copy
import re
import sys
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

_tape = None


def _attention(module, query, key, value, attention_mask, **kwargs):
    if not query.requires_grad:
        query = query.detach().requires_grad_()
    eager = next(
        f for c in type(module).__mro__ if (f := getattr(sys.modules[c.__module__], "eager_attention_forward", 0))
    )
    output, weights = eager(module, query, key, value, attention_mask, **kwargs)
    _tape.append((module, weights))
    return output, weights


AttentionInterface.register("brute", _attention)
AttentionMaskInterface.register("brute", eager_mask)


def _part(name):
    if "qformer" in name:
        return "crossing" if "crossattention" in name else "own"
    if "visual_abstractor" in name:
        return "joint"
    if "EncDecAttention" in name:
        return "cross"
    if re.search(r"language_model\.encoder\.", name):
        return "encoder"
    return "vision" if re.search(r"vision_tower|vision_model|visual", name) else "language"


@dataclass
class Cams:
    """Abar of every token, by part: a list of (path, (n, n) matrix) in order; crops and windows on the diagonal."""

    parts: dict = field(default_factory=dict)
    saliency: list = field(default_factory=list)  # of the language model's own attention: |A dA| summed over heads

    def __getitem__(self, part):
        return [cam for _, cam in self.parts.get(part, [])]

    def layers(self, part):
        return [int(re.search(r"layer\.(\d+)", name).group(1)) for name, _ in self.parts[part]]


def cams(model, inputs, rows, ids):
    """Abar of every token's own logit: ``rows`` are the predicting rows, ``ids`` the tokens."""
    global _tape
    model, _tape = copy.deepcopy(model).requires_grad_(False), []
    names = {id(module): name for name, module in model.named_modules()}
    model.set_attn_implementation("brute")
    try:
        logits = model(**inputs, use_cache=False).logits[0]
        maps = [weights for _, weights in _tape]
        recorded = []
        for row, token in zip(rows, ids, strict=True):
            grads = torch.autograd.grad(logits[row, token], maps, retain_graph=True, allow_unused=True)
            blocks, token_cams = {}, Cams()
            for (module, weights), grad in zip(_tape, grads, strict=True):
                if grad is not None:
                    product = weights.detach().double() * grad.double()
                    blocks.setdefault(names[id(module)], []).extend(product.clamp(min=0).mean(1))
                    if _part(names[id(module)]) == "language":
                        token_cams.saliency.append(product[0].abs().sum(0))
            for name, cam in blocks.items():
                token_cams.parts.setdefault(_part(name), []).append(
                    (name, torch.block_diag(*cam) if len(cam) > 1 else cam[0])
                )
            recorded.append(token_cams)
    finally:
        _tape = None
    return recorded


def mixed(tokens, part, first):
    """Scope ``row``: row ``first + k`` of token k, rows before of token 0, rows after the last token zero."""
    layers = []
    for layer, base in enumerate(tokens[0][part]):
        cam = base.clone()
        cam[first + 1 :] = 0
        for number, token in enumerate(tokens[1:], 1):
            cam[first + number] = token[part][layer][first + number]
        layers.append(cam)
    return layers


def recursion(layers, size):
    """R after every layer, R_0 = I first."""
    states = [torch.eye(size, dtype=torch.float64)]
    for cam in layers:
        states.append(states[-1] + cam @ states[-1])
    return states


def normal(matrix):
    eye = torch.eye(len(matrix), dtype=matrix.dtype)
    total = (matrix - eye).sum(-1, keepdim=True)
    return eye + torch.where(total > 0, (matrix - eye) / total.clamp(min=1e-300), torch.zeros_like(matrix))


def cross_term(rule, own, cam, other):
    if rule == "plain":
        return cam @ other
    return (own.T if rule == "eq10" else own) @ cam @ normal(other)


def language(model, inputs, answer, scope, tokens=None):
    """(T, L, S) of a decoder-only model, and the cams of every token."""
    tokens = cams(model, inputs, *_predicting(inputs, answer)) if tokens is None else tokens
    first, size = inputs["input_ids"].shape[1] - len(answer) - 1, inputs["input_ids"].shape[1]
    rows = []
    for number, token in enumerate(tokens):
        layers = mixed(tokens, "language", first) if scope == "row" else token["language"]
        steps = recursion(layers, size)[1:]
        rows.append(torch.stack([step[first + number] - torch.eye(size)[first + number] for step in steps]))
    return torch.stack(rows), tokens


def _predicting(inputs, answer):
    first = inputs["input_ids"].shape[1] - len(answer) - 1
    return list(range(first, first + len(answer))), answer


def towers(tokens, scope, layers="vision"):
    """R_v of every token: of its own gradient, or of token 0's."""
    return [
        recursion(token[layers], len(token[layers][0]))[-1]
        for token in (tokens if scope == "token" else tokens[:1] * len(tokens))
    ]


def through_tower(image, merge, tokens, scope, order=None):
    """(T, L, M): image tokens (T, L, N) spread by ``merge`` (N, M, rows sum to 1) and multiplied with R_v.

    ``order``: the tower's token for every row of ``pixel_values``, when the tower permutes them.
    """
    products = []
    for rows, matrix in zip(image, towers(tokens, scope), strict=True):
        if order is not None:
            matrix = matrix[order][:, order]
        products.append(rows @ merge.double() @ matrix)
    return torch.stack(products)


def queries(tokens, scope, rule, count):
    """Of every token, R_si and R_ss of the query rows of a Q-Former."""
    results = []
    for token, vision in zip(
        tokens if scope == "token" else tokens[:1] * len(tokens), towers(tokens, scope), strict=True
    ):
        size = len(token["own"][0])
        same, other = torch.eye(size, dtype=torch.float64), torch.zeros(size, len(vision), dtype=torch.float64)
        crossing = dict(zip(token.layers("crossing"), token["crossing"], strict=True))
        for layer, cam in zip(token.layers("own"), token["own"], strict=True):
            other = other + cam @ other
            same = same + cam @ same
            if layer in crossing:
                other[:count] = other[:count] + cross_term(rule, normal(same)[:count, :count], crossing[layer], vision)
        results.append((other[:count], same[:count, count:]))
    return results


def seq2seq(model, inputs, answer, scope, rule):
    """(T, L, D), (T, L, E) of an encoder-decoder model, and the cams of every token."""
    tokens = cams(model, inputs, range(len(answer)), answer)
    decoder, encoder = [], []
    for number, token in enumerate(tokens):
        end = number + 1
        own = mixed(tokens, "language", 0) if scope == "row" else token["language"]
        crossing = mixed(tokens, "cross", 0) if scope == "row" else token["cross"]
        read = (tokens[0] if scope == "row" else token)["encoder"]
        read = recursion(read, len(read[0]))[-1]
        same, other = torch.eye(end, dtype=torch.float64), torch.zeros(end, len(read), dtype=torch.float64)
        steps = []
        for cam, cross in zip(own, crossing, strict=True):
            other = other + cam[:end, :end] @ other
            same = same + cam[:end, :end] @ same
            other = other + cross_term(rule, normal(same), cross[:end], read)
            row = torch.zeros(len(own[0]), dtype=torch.float64)
            row[:end] = same[number] - torch.eye(end)[number]
            steps.append((row, other[number]))
        decoder.append(torch.stack([row for row, _ in steps]))
        encoder.append(torch.stack([row for _, row in steps]))
    return torch.stack(decoder), torch.stack(encoder), tokens


def saliency(tokens, first):
    """(T, L, S) of the rows that predict."""
    return torch.stack(
        [torch.stack([layer[first + number] for layer in token.saliency]) for number, token in enumerate(tokens)]
    )


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference of any row, relative to the largest entry of that row."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    scale = expected.abs().amax(-1).clamp(min=1e-12)
    return float(((actual.double() - expected).abs().amax(-1) / scale).max())
