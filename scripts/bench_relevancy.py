"""How fast is relevancy? One table, measured in one run, on a real LLaVA class with random weights.

    python scripts/bench_relevancy.py                        # 8 layers, 512 wide, 640 prompt and 64 answer tokens
    python scripts/bench_relevancy.py --grow                 # and how every method grows
    python scripts/bench_relevancy.py --preset llava-7b      # the shape of LLaVA-1.5-7B, on a GPU

Compared: a plain SDPA forward pass over prompt and answer; `row` and `token` of stethoscope.relevancy (both with the
vision tower); and the field's way, written here: eager attention with all maps of the language model kept, one
backward pass and one full matrix recursion per token. That one is timed on the first few tokens (--field-tokens) and
scaled to all, and its maps are what the others are checked against.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from stethoscope.relevancy import relevancy_from_inputs

IMAGE_TOKEN, VOCABULARY, PATCH = 5, 2000, 14


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


PRESETS = {
    "small": Shape(),
    "llava-7b": Shape(32, 4096, 32, 24, 1024, 576, 64, 100, "bfloat16"),
}


def build(shape: Shape, device: str) -> tuple[LlavaForConditionalGeneration, dict[str, Tensor], list[int]]:
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
        model = LlavaForConditionalGeneration(config).eval().requires_grad_(False)
        ids = torch.randint(10, VOCABULARY, (1, shape.image + shape.text + shape.answer))
        ids[0, 5 : 5 + shape.image] = IMAGE_TOKEN
        pixels = torch.randn(1, 3, side * PATCH, side * PATCH)
    torch.set_default_dtype(torch.float32)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return model, inputs, ids[0, -shape.answer :].tolist()


@dataclass(frozen=True)
class Cost:
    """Seconds and extra bytes at the peak."""

    seconds: float
    peak: int


def _memory(name: str) -> int:
    """A line of /proc/self/status, in bytes; 0 where there is none."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)


def measure(call: Callable[[], Tensor], device: str, repeats: int) -> tuple[Cost, Tensor]:
    """Best time of some calls, peak memory beyond what was there before, and the last result."""
    seconds, peak, result = float("inf"), 0, torch.empty(0)
    for _ in range(repeats):
        gc.collect()
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        else:
            clear = Path("/proc/self/clear_refs")
            if clear.exists():
                clear.write_text("5")  # resets the peak
            before = _memory("VmRSS")
        start = time.perf_counter()
        result = call()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = min(seconds, time.perf_counter() - start)
        after = torch.cuda.max_memory_allocated() if device == "cuda" else _memory("VmHWM")
        peak = max(peak, after - before)
    return Cost(seconds, peak), result


def plain(model: LlavaForConditionalGeneration, inputs: dict[str, Tensor]) -> Tensor:
    """A forward pass, without gradients, the head on the last position only."""
    with torch.inference_mode():
        return model(**inputs, use_cache=False, logits_to_keep=1).logits


def field(model: LlavaForConditionalGeneration, inputs: dict[str, Tensor], answer: int, tokens: int) -> Tensor:
    """Gradient-weighted maps of the first tokens, (tokens, L, N, N) after head mean, by one backward pass each.

    The matrix recursion that turns them into relevancy is part of the price and is run for each.
    """
    model.set_attn_implementation("eager")
    embedded = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    features = model.get_image_features(inputs["pixel_values"]).pooler_output
    features = torch.cat(list(features)) if isinstance(features, (list, tuple)) else features.flatten(0, 1)
    at = (inputs["input_ids"] == IMAGE_TOKEN).unsqueeze(-1)
    embedded = embedded.masked_scatter(at, features.to(embedded.dtype))
    output = model.model.language_model(inputs_embeds=embedded, output_attentions=True, use_cache=False)
    first = inputs["input_ids"].shape[1] - answer - 1
    kept = []
    for token in range(tokens):
        logits = model.lm_head(output.last_hidden_state[0, first + token])
        logit = logits[inputs["input_ids"][0, first + token + 1]]
        gradients = torch.autograd.grad(logit, output.attentions, retain_graph=True)
        maps = [
            (gradient.float() * attention.detach().float()).clamp(min=0).mean(1)[0]
            for gradient, attention in zip(gradients, output.attentions, strict=True)
        ]
        relevancy = torch.eye(len(maps[0]), device=maps[0].device)
        for one in maps:
            relevancy = relevancy + one @ relevancy
        kept.append(torch.stack(maps).cpu())
    model.set_attn_implementation("sdpa")
    return torch.stack(kept)


def expected(maps: Tensor, first: int, scope: str) -> Tensor:
    """(tokens, N) relevancy after the last layer by the matrix recursion, from the maps of the first tokens."""
    rows = []
    for token in range(len(maps)):
        used = maps[token].clone()
        if scope == "row":  # the prompt's rows are token 0's, every later row is that of the token it predicts
            used[:, : first + 1] = maps[0][:, : first + 1]
            for earlier in range(1, token + 1):
                used[:, first + earlier] = maps[earlier][:, first + earlier]
        relevancy = torch.eye(used.shape[-1])
        for one in used:
            relevancy = relevancy + one @ relevancy
        row = relevancy[first + token].clone()
        row[first + token] -= 1
        rows.append(row)
    return torch.stack(rows)


def compare(shape: Shape, device: str, field_tokens: int, repeats: int) -> list[list[str]]:
    """All methods on one shape, as rows of the table."""
    model, inputs, answer = build(shape, device)
    first = inputs["input_ids"].shape[1] - len(answer) - 1
    few = min(field_tokens, len(answer))
    forward, _ = measure(lambda: plain(model, inputs), device, repeats + 1)
    found: dict[str, tuple[Cost, Tensor]] = {}
    for scope in ("row", "token"):
        call = lambda scope=scope: relevancy_from_inputs(model, inputs, answer, scope=scope, layers="final").llm[:, 0]  # noqa: E731
        found[scope] = measure(call, device, repeats if scope == "row" else 1)
    one, _ = measure(lambda: field(model, inputs, len(answer), 1), device, 1)
    several, maps = measure(lambda: field(model, inputs, len(answer), few), device, 1)
    each = (several.seconds - one.seconds) / max(few - 1, 1)
    whole = Cost(several.seconds + each * (len(answer) - few), several.peak)
    lines = [["plain forward", *_cells(forward, forward, whole), ""]]
    for scope, (cost, values) in found.items():
        truth = expected(maps, first, scope)
        error = (values[:few] - truth).norm() / truth.norm()
        lines.append([scope, *_cells(cost, forward, whole), f"{error:.1e} ({few} tokens)"])
    lines.append([f"per token ({few} timed)", *_cells(whole, forward, whole), ""])
    return lines


def _cells(cost: Cost, forward: Cost, whole: Cost) -> list[str]:
    return [
        f"{cost.seconds:.3f}",
        f"{cost.seconds / forward.seconds:.1f}",
        f"{whole.seconds / cost.seconds:.1f}",
        f"{cost.peak / 2**20:.0f}",
        f"{cost.peak / max(whole.peak, 1):.2f}",
    ]


def show(title: str, lines: Sequence[Sequence[str]]) -> None:
    """Prints an aligned table."""
    header = ["method", "seconds", "x forward", "x faster than per token", "extra MiB", "of per token's", "rel. error"]
    rows = [header, *lines]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    print(f"\n{title}")
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), flush=True)


def main() -> None:
    """Reads the options and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="small", help="sizes (default: %(default)s)")
    for name in ("layers", "width", "heads", "image", "text", "answer"):
        parser.add_argument(f"--{name}", type=int, help=f"instead of the preset's {name}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--field-tokens", type=int, default=4, help="tokens that the field's way is timed on")
    parser.add_argument("--repeats", type=int, default=3, help="runs of the fast methods; the best counts")
    parser.add_argument("--grow", action="store_true", help="also grow the answer to 256 and the image to 2,916 tokens")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    sizes = ("layers", "width", "heads", "image", "text", "answer")
    chosen = {name: getattr(options, name) for name in sizes if getattr(options, name) is not None}
    shape = replace(PRESETS[options.preset], **chosen)
    settings = options.device, options.field_tokens, options.repeats
    show(f"{shape}", compare(shape, *settings))
    if options.grow:
        for answer in (16, 64, 256):
            show(f"{answer} answer tokens", compare(replace(shape, answer=answer), *settings))
        for image in (64, 576, 1296, 2916):
            show(f"{image} image tokens", compare(replace(shape, image=image), *settings))


if __name__ == "__main__":
    main()
