"""How fast is relevancy? One table, measured in one run, on a real LLaVA class with random weights.

    python scripts/bench_relevancy.py                        # 8 layers, 512 wide, 640 prompt and 64 answer tokens
    python scripts/bench_relevancy.py --grow                 # and how every method grows
    python scripts/bench_relevancy.py --preset llava-7b      # the shape of LLaVA-1.5-7B, on a GPU

The methods, each in a process of its own (memory that one frees would hide what the next takes), warmed up on a tiny
model:

    forward               plain SDPA over prompt and answer, without gradients, the head on the last position only
    row, token            stethoscope.relevancy, after the last layer, with the vision tower
    row, graphs kept      the same with recompute=False
    per token, published  the field's way, after the public tool (LVLM-Interpret, arXiv 2404.03118), written anew: the
                          weights ask for gradients, as from_pretrained leaves them; eager attention keeps all maps
                          of language model and vision tower and their gradients; for every token one backward pass,
                          the matrix recursion of the language model and three of the vision tower. Unlike the tool
                          it clears the maps' gradients between tokens, without which its maps would be wrong, keeps
                          no matrices of earlier tokens, and reads one forward pass over prompt and answer instead
                          of generating with gradients.
    per token, frozen     its most favourable form: weights frozen, gradients of maps alone, one recursion each

The fast methods are run --repeats times (`token` once) and the best counts. The field's methods are timed on the first --field-tokens
tokens, and their fastest token counts for all. "x forward" is against forward passes that alternate with the method in
its own process. Extra memory is the peak of the first call beyond what the process had before, with freed memory given
back to the system. Errors are of the first tokens, against maps from plain autograd and the matrix recursion.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from stethoscope.relevancy import relevancy_from_inputs

IMAGE_TOKEN, VOCABULARY, PATCH = 5, 2000, 14
FIELD = ("per token, published", "per token, frozen")
OURS: dict[str, dict[str, Any]] = {
    "row": {"scope": "row"},
    "row, graphs kept": {"scope": "row", "recompute": False},
    "token": {"scope": "token"},
}
HEADER = (
    "method", "seconds", "x forward", "x faster than published", "than frozen", "extra MiB", "of published",
    "of frozen", "rel. error",
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """Sizes of a model and of what it reads."""

    layers: int = 8
    width: int = 512
    heads: int = 8
    vision_layers: int = 4
    vision_width: int = 256
    image: int = 576
    text: int = 64
    answer: int = 64
    dtype: str = "float32"


@dataclass(frozen=True)
class Options:
    """How to measure."""

    device: str
    threads: int | None
    field_tokens: int
    repeats: int
    sample: int


PRESETS = {
    "small": Shape(),
    "llava-7b": Shape(32, 4096, 32, 24, 1024, 576, 64, 100, "bfloat16"),
}
TINY = Shape(2, 64, 2, 2, 64, 16, 4, 4)

Model = LlavaForConditionalGeneration
Inputs = dict[str, Tensor]


def build(shape: Shape, device: str) -> tuple[Model, Inputs, list[int]]:
    """A random model, the inputs of its pass over prompt and answer, and the answer's ids."""
    side = round(shape.image**0.5)
    if side * side != shape.image:
        raise SystemExit(f"--image {shape.image}: image tokens fill a square, for example {side * side}")
    vision = CLIPVisionConfig(
        hidden_size=shape.vision_width, intermediate_size=4 * shape.vision_width, image_size=side * PATCH,
        patch_size=PATCH, num_hidden_layers=shape.vision_layers, num_attention_heads=max(shape.vision_width // 64, 1),
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=shape.width, intermediate_size=round(2.6875 * shape.width),
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.heads,
        max_position_embeddings=8192,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN)
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, shape.dtype))
    with torch.device(device):
        model = LlavaForConditionalGeneration(config).eval()
        ids = torch.randint(10, VOCABULARY, (1, shape.image + shape.text + shape.answer))
        ids[0, 5 : 5 + shape.image] = IMAGE_TOKEN
        pixels = torch.randn(1, 3, side * PATCH, side * PATCH)
    torch.set_default_dtype(torch.float32)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return model, inputs, ids[0, -shape.answer :].tolist()


def plain(model: Model, inputs: Inputs) -> Tensor:
    """A forward pass, without gradients, the head on the last position only."""
    with torch.inference_mode():
        return model(**inputs, use_cache=False, logits_to_keep=1).logits


def ours(model: Model, inputs: Inputs, answer: list[int], tokens: int, **options: Any) -> Tensor:
    """(tokens, N) relevancy of the first tokens after the last layer."""
    chosen = range(tokens) if tokens < len(answer) else None
    return relevancy_from_inputs(model, inputs, answer, layers="final", tokens=chosen, **options).llm[:, 0]


# --- the field's way ------------------------------------------------------------------------------------------------


def heard(model: Model, inputs: Inputs) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Logits of an eager pass with a graph, and the maps of language model and vision tower, (1, heads, N, N) each."""
    maps: dict[bool, list[Tensor]] = {True: [], False: []}
    hooks = [
        module.register_forward_hook(lambda _, __, output, where=maps["vision_tower" in name]: where.append(output[1]))
        for name, module in model.named_modules()
        if name.endswith("self_attn")
    ]
    model.set_attn_implementation("eager")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        inputs = {**inputs, "pixel_values": inputs["pixel_values"].clone().requires_grad_()}
    logits = model(**inputs, use_cache=False).logits[0]
    for hook in hooks:
        hook.remove()
    model.set_attn_implementation("sdpa")
    return logits, maps[False], maps[True]


def weighted(attention: Tensor, gradient: Tensor) -> Tensor:
    """Equation 5: (N, N)."""
    return (gradient.float() * attention.detach().float()).clamp(min=0).mean(1)[0]


def recursion(maps: Sequence[tuple[Tensor, Tensor]], start: Tensor | None = None) -> Tensor:
    """Equation 6 on pairs of a map and its gradient, as full matrices."""
    relevancy = torch.eye(maps[0][0].shape[-1], device=maps[0][0].device) if start is None else start
    for attention, gradient in maps:
        relevancy = relevancy + weighted(attention, gradient) @ relevancy
    return relevancy


def published(model: Model, inputs: Inputs, answer: list[int], tokens: int) -> list[float]:
    """Seconds of the forward pass and then of every token."""
    clock = [time.perf_counter()]
    logits, language, vision = heard(model, inputs)
    for one in (*language, *vision):
        one.retain_grad()
    clock.append(_now(model))
    first, image = len(logits) - len(answer) - 1, (inputs["input_ids"][0] == IMAGE_TOKEN).nonzero()[:, 0]
    for token in range(tokens):
        model.zero_grad()
        for one in (*language, *vision):
            one.grad = None
        logits[first + token, answer[token]].backward(retain_graph=True)
        relevancy = recursion([(one, one.grad) for one in language])
        used = [(one, one.grad) for one in vision if one.grad is not None]
        size = vision[0].shape[-1]
        block, row = torch.eye(size, device=relevancy.device), torch.eye(size, device=relevancy.device)
        block[1:, 1:] = relevancy[image][:, image]
        row[0, 1:] += relevancy[first + token, image]
        row[1:, 0] += relevancy[first + token, image]
        for start in (block, row, None):
            recursion(used, start)
        clock.append(_now(model))
    model.zero_grad()
    return [after - before for before, after in pairwise(clock)]


def frozen(model: Model, inputs: Inputs, answer: list[int], tokens: int) -> list[float]:
    """The same with frozen weights and gradients of nothing but maps."""
    clock = [time.perf_counter()]
    logits, language, vision = heard(model.requires_grad_(False), inputs)
    maps = [*language, *vision]
    clock.append(_now(model))
    first = len(logits) - len(answer) - 1
    for token in range(tokens):
        grads = torch.autograd.grad(logits[first + token, answer[token]], maps, retain_graph=True, allow_unused=True)
        pairs = [(one, grad) for one, grad in zip(maps, grads, strict=True) if grad is not None]
        recursion(pairs[: len(language)])
        recursion(pairs[len(language) :])
        clock.append(_now(model))
    return [after - before for before, after in pairwise(clock)]


def expected(model: Model, inputs: Inputs, answer: list[int], tokens: int) -> dict[str, np.ndarray]:
    """(tokens, N) relevancy of the first tokens after the last layer, by scope."""
    logits, language, _ = heard(model.requires_grad_(False), inputs)
    first = len(logits) - len(answer) - 1
    maps = []
    for token in range(tokens):
        grads = torch.autograd.grad(logits[first + token, answer[token]], language, retain_graph=True)
        maps.append([weighted(one, grad) for one, grad in zip(language, grads, strict=True)])
    found: dict[str, list[Tensor]] = {"row": [], "token": []}
    for scope, rows in found.items():
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
    return {scope: torch.stack(rows).numpy() for scope, rows in found.items()}


# --- measuring ------------------------------------------------------------------------------------------------------


def _now(model: Model) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _memory(name: str) -> int:
    """A line of /proc/self/status, in bytes; 0 where there is none."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)


def peak(call: Callable[[], Any], device: str) -> tuple[int, Any]:
    """Bytes at the peak of a call beyond what there was before, and its result."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, result
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")  # resets the peak
    before = _memory("VmRSS")
    result = call()
    return _memory("VmHWM") - before, result


@dataclass(frozen=True)
class Cost:
    """What a method needs: seconds for all tokens, those of a forward pass beside it, extra bytes at the peak.

    ``timed`` is the number of tokens that were run, ``rows`` (timed, N) what was found for them.
    """

    seconds: float
    forward: float
    peak: int
    timed: int
    rows: np.ndarray | None = None


def measure(method: str, shape: Shape, options: Options) -> Cost:
    """One method on one shape, in this process."""
    if options.threads:
        torch.set_num_threads(options.threads)
    for warm, size in ((True, TINY), (False, shape)):
        model, inputs, answer = build(replace(size, dtype=shape.dtype), options.device)
        if method in FIELD:
            cost = _field(method, model, inputs, answer, options)
        else:
            cost = _fast(method, model, inputs, answer, replace(options, repeats=1) if warm else options)
    return cost


def _field(method: str, model: Model, inputs: Inputs, answer: list[int], options: Options) -> Cost:
    function, few = published if method == FIELD[0] else frozen, min(options.field_tokens, len(answer))
    most, seconds = peak(lambda: function(model, inputs, answer, few), options.device)
    return Cost(seconds[0] + min(seconds[1:]) * len(answer), seconds[0], most, few)


def _fast(method: str, model: Model, inputs: Inputs, answer: list[int], options: Options) -> Cost:
    model.requires_grad_(False)
    few = min(options.sample, len(answer)) if method == "token" else len(answer)
    if method == "forward":
        call: Callable[[int], Any] = lambda tokens: plain(model, inputs)  # noqa: E731
    else:
        call = lambda tokens: ours(model, inputs, answer, tokens, **OURS[method])  # noqa: E731
    start = _now(model)
    most, rows = peak(lambda: call(few), options.device)
    best, forward = _now(model) - start, float("inf")
    for _ in range(options.repeats):
        forward = min(forward, _seconds(model, lambda: plain(model, inputs)))
        if method != "token":
            best = min(best, _seconds(model, lambda: call(few)))
    if few < len(answer):
        one = _seconds(model, lambda: call(1))
        best = one + (best - one) / max(few - 1, 1) * (len(answer) - 1)
    return Cost(best, forward, most, few, None if method == "forward" else rows.numpy())


def _seconds(model: Model, call: Callable[[], Any]) -> float:
    start = _now(model)
    call()
    return _now(model) - start


def _truth(shape: Shape, options: Options) -> dict[str, np.ndarray]:
    model, inputs, answer = build(shape, options.device)
    return expected(model, inputs, answer, min(options.field_tokens, shape.answer))


def _send(pipe: Any, function: Callable[..., Any], *arguments: Any) -> None:
    pipe.send(function(*arguments))


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function gives, from a fresh process; None when that was killed."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, function, *arguments))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return None
    finally:
        process.join()


# --- the table ------------------------------------------------------------------------------------------------------


def map_bytes(shape: Shape) -> int:
    """About what the field's methods hold: all maps, their gradients and as much again while they are made."""
    length, size = shape.image + shape.text + shape.answer, 2 if shape.dtype == "bfloat16" else 4
    language = shape.layers * shape.heads * length**2
    vision = shape.vision_layers * max(shape.vision_width // 64, 1) * (shape.image + 1) ** 2
    return 3 * size * (language + vision)


def room(device: str) -> int:
    """Free bytes."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 2**33)


def compare(shape: Shape, options: Options) -> list[list[str]]:
    """All methods on one shape, as rows of the table."""
    fits = map_bytes(shape) < 0.8 * room(options.device)
    found = {name: apart(measure, name, shape, options) for name in ("forward", *OURS)}
    field = {name: apart(measure, name, shape, options) if fits else None for name in FIELD}
    truth = apart(_truth, shape, options) if fits else None
    lines = []
    for name, cost in {**found, **field}.items():
        if cost is None:
            lines.append([name, "its maps do not fit in memory"])
            continue
        error = ""
        if cost.rows is not None and truth is not None:
            right = truth[OURS[name]["scope"]]
            count = min(len(right), len(cost.rows))
            off = np.linalg.norm(cost.rows[:count] - right[:count]) / np.linalg.norm(right[:count])
            error = f"{off:.1e} ({count} tokens)"
        timed = f" ({cost.timed} timed)" if cost.timed < shape.answer else ""
        lines.append([
            name + timed, f"{cost.seconds:.3f}", "" if name in FIELD else f"{cost.seconds / cost.forward:.1f}",
            *(f"{other.seconds / cost.seconds:.1f}" if other else "-" for other in field.values()),
            f"{cost.peak / 2**20:.0f}",
            *(f"{cost.peak / other.peak:.2f}" if other else "-" for other in field.values()), error,
        ])  # fmt: skip
    return lines


def show(title: str, lines: Sequence[Sequence[str]]) -> None:
    """Prints an aligned table."""
    rows = [list(HEADER), *lines]
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(len(HEADER))]
    widths[1] = max(len(row[1]) for row in rows if len(row) > 2)
    print(f"\n{title}")
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip(), flush=True)


def main() -> None:
    """Reads the options and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="small", help="sizes (default: %(default)s)")
    for name in ("layers", "width", "heads", "image", "text", "answer"):
        parser.add_argument(f"--{name}", type=int, help=f"instead of the preset's {name}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--field-tokens", type=int, default=4, help="tokens that the field's ways are timed on")
    parser.add_argument("--repeats", type=int, default=5, help="runs of the fast methods; the best counts")
    parser.add_argument("--sample", type=int, default=10**6, help="tokens that `token` is timed on (default: all)")
    parser.add_argument("--grow", action="store_true", help="also grow the answer to 256 and the image to 2,916 tokens")
    given = parser.parse_args()
    sizes = ("layers", "width", "heads", "image", "text", "answer")
    chosen = {name: getattr(given, name) for name in sizes if getattr(given, name) is not None}
    shape = replace(PRESETS[given.preset], **chosen)
    options = Options(given.device, given.threads, given.field_tokens, given.repeats, given.sample)
    print('Targets refer to "per token, published"; "frozen" is its most favourable form.')
    show(f"{shape}", compare(shape, options))
    if given.grow:
        few = replace(options, sample=min(options.sample, 12), field_tokens=min(options.field_tokens, 2), repeats=2)
        for answer in (16, 64, 256):
            show(f"{answer} answer tokens", compare(replace(shape, answer=answer), few))
        for image in (64, 576, 1296, 2916):
            show(f"{image} image tokens", compare(replace(shape, image=image), few))


if __name__ == "__main__":
    main()
