"""Compute relevancy as other tools do, with one backward pass per token.

For ``scripts/bench/relevancy.py``.

Reimplemented after the public tool (LVLM-Interpret, arXiv 2404.03118); its definitions are those of scope `row`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, LlavaForConditionalGeneration

Model: TypeAlias = LlavaForConditionalGeneration
Inputs = dict[str, Tensor]
Maps = tuple[list[Tensor], list[Tensor]]
"""Maps of the language model and of the vision tower in the order of their calls, (1, heads, rows, columns) each."""


class Clock:
    """Clock in seconds: wall time, or CPU time where the machine is shared."""

    cpu_time = False

    @classmethod
    def now(cls, device: str) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.process_time() if cls.cpu_time else time.perf_counter()


@contextmanager
def recorded_maps(model: Model, keep: bool) -> Iterator[Maps]:
    """Record the maps of every eager attention call, and retain their gradients on request."""
    maps: Maps = ([], [])

    def hook(maps_of_part: list[Tensor], output: tuple[Tensor, Tensor]) -> None:
        if keep:
            output[1].retain_grad()
        maps_of_part.append(output[1])

    hooks = [
        module.register_forward_hook(lambda _, __, output, to=maps["vision_tower" in name]: hook(to, output))
        for name, module in model.named_modules()
        if name.endswith("self_attn")
    ]
    model.set_attn_implementation("eager")
    try:
        yield maps
    finally:
        for handle in hooks:
            handle.remove()
        model.set_attn_implementation("sdpa")


def weighted(attention: Tensor, gradient: Tensor | None) -> Tensor:
    """Compute equation 5, (rows, columns)."""
    assert gradient is not None
    return (gradient.float() * attention.detach().float()).clamp(min=0).mean(1)[0]


def recursion(maps: Sequence[Tensor], start: Tensor) -> Tensor:
    """Compute equation 6 by full matrices."""
    for abar in maps:
        start = start + abar @ start
    return start


def normalised(relevancy: Tensor) -> Tensor:
    """Compute equations 8 and 9."""
    mass = relevancy - torch.eye(len(relevancy), device=relevancy.device)
    total = mass.sum(-1, keepdim=True)
    return mass / torch.where(total == 0, 1.0, total) + torch.eye(len(relevancy), device=relevancy.device)


def published(model: Model, inputs: Inputs, answer: list[int], tokens: int) -> tuple[float, list[float]]:
    """Generate the forced answer with gradients and a cache, then run backward for every token.

    The weights require gradients, as ``from_pretrained`` leaves them, and get them in every backward pass. Rows of
    earlier tokens come from those tokens' own gradients; token 0 is done first, the others spread over the answer.

    Returns:
        Seconds of the generation, and of some tokens.
    """
    device, ids = model.device, inputs["input_ids"]
    prompt = ids.shape[1] - len(answer)
    clock = [Clock.now(device.type)]
    cache, logits, steps = DynamicCache(config=model.config.text_config), [], []
    with recorded_maps(model, keep=True) as (language, vision):
        given: dict[str, Any] = {"input_ids": ids[:, :prompt], "pixel_values": inputs["pixel_values"]}
        for token in answer:
            logits.append(model(**given, past_key_values=cache, use_cache=True).logits[0, -1])
            steps.append(language.copy())
            language.clear()
            given = {"input_ids": torch.tensor([[token]], device=device)}
    clock.append(Clock.now(device.type))
    image = _image(model, inputs)
    before: list[Tensor] = []
    for token in np.linspace(0, len(answer) - 1, tokens).round().astype(int).tolist():
        model.zero_grad()
        for attention in (*(attention for step in steps for attention in step), *vision):
            attention.grad = None
        logits[token][answer[token]].backward(retain_graph=True)
        abar = [weighted(attention, attention.grad) for attention in steps[token]]
        if token:  # rows of tokens that are not timed stay zero: as large, and as slow
            size = prompt + token
            grown = [torch.zeros(size, size, device=device) for _ in abar]
            for whole, rows, row in zip(grown, before, abar, strict=True):
                whole[: len(rows), : len(rows)], whole[-1:] = rows, row
            abar = grown
        before = abar
        relevancy = recursion(abar, torch.eye(len(abar[0]), device=device))
        _through_tower(relevancy, image, [attention for attention in vision if attention.grad is not None])
        normalised(relevancy)
        clock.append(Clock.now(device.type))
    model.zero_grad()
    seconds = np.diff(clock).tolist()
    return seconds[0], seconds[1:]


def _image(model: Model, inputs: Inputs) -> Tensor:
    """Return the positions of the image tokens."""
    return (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]


def _through_tower(relevancy: Tensor, image: Tensor, vision: list[Tensor]) -> None:
    """Run three recursions through the tower, as the tool does.

    They start from all image tokens, from the token's row, and from the tower alone.
    """
    size = vision[0].shape[-1]
    block, row, alone = (torch.eye(size, device=relevancy.device) for _ in range(3))
    block[1:, 1:] = relevancy[image][:, image]
    row[0, 1:] += relevancy[-1, image]
    row[1:, 0] += relevancy[-1, image]
    for start in (block, row, alone):
        normalised(recursion([weighted(attention, attention.grad) for attention in vision], start))


def one_pass(model: Model, inputs: Inputs, answer: list[int], tokens: int) -> tuple[float, list[float]]:
    """Do the same on one forward pass over prompt and answer, with all rows from the token's own gradient."""
    clock = [Clock.now(model.device.type)]
    with recorded_maps(model, keep=True) as (language, vision):
        logits = model(**inputs, use_cache=False).logits[0]
    clock.append(Clock.now(model.device.type))
    first, image = len(logits) - len(answer) - 1, _image(model, inputs)
    for token in range(tokens):
        model.zero_grad()
        for attention in (*language, *vision):
            attention.grad = None
        logits[first + token, answer[token]].backward(retain_graph=True)
        relevancy = recursion(
            [weighted(attention, attention.grad) for attention in language],
            torch.eye(len(logits), device=logits.device),
        )
        _through_tower(
            relevancy[: first + token + 1], image, [attention for attention in vision if attention.grad is not None]
        )
        normalised(relevancy)
        clock.append(Clock.now(model.device.type))
    model.zero_grad()
    seconds = np.diff(clock).tolist()
    return seconds[0], seconds[1:]


def frozen(model: Model, inputs: Inputs, answer: list[int], tokens: int) -> tuple[float, list[float]]:
    """Run the most favourable form: frozen weights, gradients of the maps only, one recursion each."""
    clock = [Clock.now(model.device.type)]
    logits, language, vision = _frozen_pass(model, inputs)
    maps = [*language, *vision]
    clock.append(Clock.now(model.device.type))
    first = len(logits) - len(answer) - 1
    for token in range(tokens):
        root = logits[first + token, answer[token]]
        grads = torch.autograd.grad(root, maps, retain_graph=True, allow_unused=True)
        abar = [weighted(attention, grad) for attention, grad in zip(maps, grads, strict=True) if grad is not None]
        for part in (abar[: len(language)], abar[len(language) :]):
            recursion(part, torch.eye(len(part[0]), device=logits.device))
        clock.append(Clock.now(model.device.type))
    seconds = np.diff(clock).tolist()
    return seconds[0], seconds[1:]


def _frozen_pass(model: Model, inputs: Inputs) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    model.requires_grad_(False)
    pixels = inputs["pixel_values"].clone().requires_grad_()
    with recorded_maps(model, keep=False) as (language, vision):
        logits = model(**{**inputs, "pixel_values": pixels}, use_cache=False).logits[0]
    return logits, language, vision


def expected(model: Model, inputs: Inputs, answer: list[int], tokens: int) -> dict[str, np.ndarray]:
    """Compute (tokens, N) relevancy of the first tokens after the last layer, by scope."""
    logits, language, _ = _frozen_pass(model, inputs)
    first = len(logits) - len(answer) - 1
    maps = []
    for token in range(tokens):
        grads = torch.autograd.grad(logits[first + token, answer[token]], language, retain_graph=True)
        maps.append([weighted(attention, grad) for attention, grad in zip(language, grads, strict=True)])
    relevancy: dict[str, list[Tensor]] = {"row": [], "token": []}
    for scope, rows in relevancy.items():
        for token in range(tokens):
            vector = torch.zeros(len(logits), device=logits.device)
            vector[first + token] = 1
            for layer in reversed(range(len(language))):
                used = maps[token][layer].clone()
                if scope == "row":  # the prompt's rows are token 0's, every later row is that of the token it predicts
                    used[: first + 1] = maps[0][layer][: first + 1]
                    for earlier in range(1, token + 1):
                        used[first + earlier] = maps[earlier][layer][first + earlier]
                vector = vector + vector @ used
            vector[first + token] -= 1
            rows.append(vector.cpu())
    return {scope: torch.stack(rows).numpy() for scope, rows in relevancy.items()}
