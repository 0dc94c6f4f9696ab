"""How fast is relevancy? One table, measured in one run, on a real LLaVA class with random weights.

    python scripts/bench/relevancy.py                        # 8 layers, 512 wide, 640 prompt and 64 answer tokens
    python scripts/bench/relevancy.py --grow                 # and how every method grows
    python scripts/bench/relevancy.py --preset llava-7b      # the shape of LLaVA-1.5-7B, on a GPU

The methods, each in a process of its own (memory that one frees would hide what the next takes), warmed up on a tiny
model:

    forward               plain SDPA over prompt and answer, without gradients, the head on the last position only
    row, token            stethoscope.relevancy, after the last layer, with the vision tower
    row, graphs kept      the same with recompute=False
    published             the field's way, after the public tool (LVLM-Interpret, arXiv 2404.03118): the answer is
                          generated with gradients and a cache; the weights ask for gradients, as from_pretrained
                          leaves them; eager attention keeps all maps of language model and vision tower and their
                          gradients; for every token one backward pass, the matrix recursion of the language model
                          and three of the vision tower. Unlike the tool it clears the maps' gradients between tokens,
                          without which its maps would be wrong, and keeps no matrices of earlier tokens.
    one pass              the same on one forward pass over prompt and answer instead of a generation
    frozen                the most favourable form: one pass, frozen weights, gradients of maps alone

The fast methods are run --repeats times (`token` once) and the best counts. The field's methods are timed on
--field-tokens tokens, whose mean counts for all. "x forward" is against forward passes that alternate with the method
in its own process. Extra memory is the peak of the first call beyond what the process had before, in another process
whose allocator gives freed tensors back at once (the field's methods: on two tokens). Errors are of the first tokens,
against maps from plain autograd and the matrix recursion.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from field import Clock, Inputs, Model, expected, frozen, one_pass, published
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from stethoscope.relevancy import relevancy_from_inputs

IMAGE_TOKEN, VOCABULARY, PATCH = 5, 2000, 14
FIELD = {"published": published, "one pass": one_pass, "frozen": frozen}
OURS: dict[str, dict[str, Any]] = {
    "row": {"scope": "row"},
    "row, graphs kept": {"scope": "row", "recompute": False},
    "token": {"scope": "token"},
}
HEADER = ("method", "seconds", "x forward", "x faster than field", "extra MiB", "of field's", "rel. error")


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
    cpu_time: bool


PRESETS = {
    "small": Shape(),
    "llava-7b": Shape(32, 4096, 32, 24, 1024, 576, 64, 100, "bfloat16"),
}
_MMAP_THRESHOLD = -3  # of malloc.h
TINY = Shape(2, 64, 2, 2, 64, 16, 8, 4)


def build(shape: Shape, device: str) -> tuple[Model, Inputs, list[int]]:
    """Build a random model, the inputs of its pass over prompt and answer, and the answer's ids."""
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
    """Run a forward pass without gradients, with the head on the last position only."""
    with torch.inference_mode():
        return model(**inputs, use_cache=False, logits_to_keep=1).logits


def ours(model: Model, inputs: Inputs, answer: list[int], tokens: int, **options: Any) -> Tensor:
    """Compute (tokens, N) relevancy of the first tokens after the last layer."""
    chosen = range(tokens) if tokens < len(answer) else None
    rows = relevancy_from_inputs(model, inputs, answer, layers="final", tokens=chosen, **options).llm
    assert rows is not None  # of a decoder-only model
    return rows[:, 0]


# --- measuring ------------------------------------------------------------------------------------------------------


def _memory(name: str) -> int:
    """Read a line of /proc/self/status, in bytes; 0 where there is none."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)


def peak(call: Callable[[], Any], device: str) -> int:
    """Measure the bytes at the peak of a call beyond those before it.

    Nothing of the package is imported for it: ``against.py`` measures old checkouts with this file.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")  # resets the peak
    before = _memory("VmRSS")
    call()
    return _memory("VmHWM") - before


@dataclass(frozen=True)
class Cost:
    """What a method needs: its seconds, those of a forward pass, and extra bytes at the peak.

    ``timed`` is the number of tokens that were run, ``rows`` (timed, N) what was found for them.
    """

    seconds: float
    forward: float
    timed: int
    rows: np.ndarray | None
    peak: int = 0


def measure(method: str, shape: Shape, options: Options, memory: bool) -> Any:
    """Measure one method on one shape, in this process: its ``Cost``, or the bytes at its peak."""
    Clock.cpu_time = options.cpu_time
    if memory and hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 2**16)  # freed tensors go back to the system at once
    if options.threads:
        torch.set_num_threads(options.threads)
    result: Cost | int
    for size in (TINY, shape):  # the first warms up
        model, inputs, answer = build(replace(size, dtype=shape.dtype), options.device)
        model.requires_grad_(method in ("published", "one pass"))
        if memory:
            result = peak(lambda: _call(method, model, inputs, answer, options), options.device)  # noqa: B023
        elif method in FIELD:
            few = min(options.field_tokens, len(answer))
            start, seconds = FIELD[method](model, inputs, answer, few)
            result = Cost(start + float(np.mean(seconds)) * len(answer), start, few, None)
        else:
            result = _fast(method, model, inputs, answer, options)
    return result


def _call(method: str, model: Model, inputs: Inputs, answer: list[int], options: Options, most: int = 10**6) -> Any:
    """Run a method on the number of tokens that the options give."""
    if method in FIELD:
        return FIELD[method](model, inputs, answer, min(2, len(answer)))
    if method == "forward":
        return plain(model, inputs)
    few = min(len(answer), most, options.sample if method == "token" else most)
    return ours(model, inputs, answer, few, **OURS[method])


def _fast(method: str, model: Model, inputs: Inputs, answer: list[int], options: Options) -> Cost:
    best, forward, rows = float("inf"), float("inf"), None
    for _ in range(1 if method == "token" else options.repeats + 1):
        forward = min(forward, *(_seconds(model, lambda: plain(model, inputs)) for _ in range(2)))
        start = Clock.now(model.device.type)
        rows = _call(method, model, inputs, answer, options)
        best = min(best, Clock.now(model.device.type) - start)
    few = min(options.sample, len(answer)) if method == "token" else len(answer)
    if few < len(answer):
        first = _seconds(model, lambda: _call(method, model, inputs, answer, options, 1))
        best = first + (best - first) / max(few - 1, 1) * (len(answer) - 1)
    return Cost(best, forward, few, None if method == "forward" or rows is None else rows.numpy())


def _seconds(model: Model, call: Callable[[], Any]) -> float:
    start = Clock.now(model.device.type)
    call()
    return Clock.now(model.device.type) - start


def _truth(shape: Shape, options: Options) -> dict[str, np.ndarray]:
    model, inputs, answer = build(shape, options.device)
    return expected(model, inputs, answer, min(options.field_tokens, shape.answer))


def _send(pipe: Any, function: Callable[..., Any], *arguments: Any) -> None:
    pipe.send(function(*arguments))


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return the result of a function in a fresh process; None when that was killed."""
    context = multiprocessing.get_context("forkserver")  # which has imported everything and computed nothing
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
    """Estimate the bytes of the field's methods: maps, gradients, and as much again meanwhile."""
    length, size = shape.image + shape.text + shape.answer, 2 if shape.dtype == "bfloat16" else 4
    language = shape.layers * shape.heads * length**2
    vision = shape.vision_layers * max(shape.vision_width // 64, 1) * (shape.image + 1) ** 2
    return 3 * size * (language + vision)


def room(device: str) -> int:
    """Return the number of free bytes."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 2**33)


def compare(shape: Shape, options: Options) -> list[list[str]]:
    """Measure all methods on one shape, as rows of the table."""
    fits = map_bytes(shape) < 0.8 * room(options.device)
    costs: dict[str, Cost | None] = {}
    for name in ("forward", *OURS, *FIELD):
        measured: Cost | None = apart(measure, name, shape, options, False) if fits or name not in FIELD else None
        if measured is not None:
            measured = replace(measured, peak=apart(measure, name, shape, options, True))
        costs[name] = measured
    truth = apart(_truth, shape, options) if fits else None
    field = [costs[name] for name in FIELD]
    lines = []
    for name, cost in costs.items():
        if cost is None:
            lines.append([name, "failed, see above" if fits else "its maps do not fit in memory"])
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
            " / ".join(f"{other.seconds / cost.seconds:.1f}" if other else "-" for other in field),
            f"{cost.peak / 2**20:.0f}",
            " / ".join(f"{cost.peak / other.peak:.2f}" if other else "-" for other in field), error,
        ])  # fmt: skip
    return lines


def show(title: str, lines: Sequence[Sequence[str]]) -> None:
    """Print an aligned table."""
    rows = [list(HEADER), *lines]
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(len(HEADER))]
    widths[1] = max(len(row[1]) for row in rows if len(row) > 2)
    print(f"\n{title}")
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip(), flush=True)


def main() -> None:
    """Read the options and print the tables."""
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
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="seconds of the processor, where others use it too; best with --threads 1",
    )
    given = parser.parse_args()
    sizes = ("layers", "width", "heads", "image", "text", "answer")
    chosen = {name: getattr(given, name) for name in sizes if getattr(given, name) is not None}
    shape = replace(PRESETS[given.preset], **chosen)
    options = Options(given.device, given.threads, given.field_tokens, given.repeats, given.sample, given.cpu_time)
    print("Ratios are to the field's published way / one pass / frozen; targets refer to the first.")
    show(f"{shape}", compare(shape, options))
    if given.grow:
        few = replace(options, sample=min(options.sample, 12), field_tokens=min(options.field_tokens, 2), repeats=2)
        for answer in (16, 64, 256):
            show(f"{answer} answer tokens", compare(replace(shape, answer=answer), few))
        for image in (64, 576, 1296, 2916):
            show(f"{image} image tokens", compare(replace(shape, image=image), few))


if __name__ == "__main__":
    main()
