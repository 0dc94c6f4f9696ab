"""What models of 7B shapes cost on a GPU: generation, relevancy, diagnosis, stream, precision.

    bash scripts/bench/gpu.sh                         # at most 8 minutes; the figures so far if it is stopped
    python scripts/bench/gpu.py --table               # the table of the figures so far

Models are random, of the sizes of LLaVA-1.5-7B and Qwen2.5-VL-7B in bfloat16; pictures fill 576 and 2,304 image tokens,
answers have 100 tokens, batches 1 and 8 prompts, each with a picture of its own. Every figure is one JSON line in
--out, written as soon as it is reached; a second call goes on with those that are missing. Every part has a time
budget: it is repeated until that is used up, five times at most, and the best time counts. A part that fails, for want
of memory for instance, leaves a line with its error.

Without a GPU the models are narrow and have two layers, so that the script is known to work. It needs torch,
transformers, numpy, pandas, scipy, scikit-learn, pillow, pyarrow, PyYAML and safetensors (accelerate for several
GPUs), no installation and no network.

    forward       a plain forward pass over prompt and answer
    generation    greedy, 100 tokens
    relevancy     generation and relevancy as in a run: the pass over the prompts, generation behind it, the trace;
                  beside_generation is how much longer this takes than generation alone
    full          the same with everything that features=full reads, and its features
    diagnose      stethoscope.diagnose of a finished answer, without a detector (batch 1)
    stream        the answer with a probability of every token, of a detector on features=fast (batch 1)
    precision     bfloat16 against float32, the same weights: relative error of relevancy's maps, and the largest
                  difference of a token's probability
    compile       torch.compile of the chain from scores to Abar and the gradient of the scores, and of a feed-forward
                  layer forward and backward, at the model's sizes
    devices       generation and relevancy with the layers spread over all GPUs
"""

from __future__ import annotations

import argparse
import gc
import resource
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from shapes import NARROW, PUBLISHED, QUESTION, Figures, Shape, ShapedAdapter, encode, made_up_detector, pictures

import stethoscope
from stethoscope.core.types import Answer, Generation
from stethoscope.features import FeatureSet, named_set
from stethoscope.tracing.trace import Encoded

REPEATS = 5
PARTS = ("forward", "generation", "relevancy", "full", "diagnose", "stream", "precision", "compile", "devices")


@dataclass(frozen=True)
class Case:
    """A model, its pictures and the size of a batch."""

    shape: Shape
    batch: int

    def key(self, part: str) -> str:
        """Return the name of a figure."""
        return f"{self.shape.family} {self.shape.image} x{self.batch} {part}"


def timed(function: Callable[[], Any], budget: float, prepare: Callable[[], Any] = lambda: None) -> dict[str, Any]:
    """Time a function after a first call, until the budget is used up.

    Returns:
        Seconds of the first call and of the best, the number of calls, and MiB at the peak (on the CPU those of the
        process, at its highest so far).
    """
    cuda = torch.cuda.is_available()
    seconds: list[float] = []
    start = time.monotonic()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    while not seconds or (len(seconds) < REPEATS and time.monotonic() - start + seconds[-1] < budget):
        prepare()
        _wait()
        before = time.perf_counter()
        function()
        _wait()
        seconds.append(time.perf_counter() - before)
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": round(min(seconds), 4), "first": round(seconds[0], 4), "calls": len(seconds),
            "peak_mib": peak >> 20}  # fmt: skip


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# --- parts ------------------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """The parts on one model and batch; prompts and answers are made once."""

    adapter: ShapedAdapter
    case: Case
    tokens: int
    budget: float
    features: FeatureSet
    prompts: list[Encoded] | None = None
    answers: list[Answer] | None = None

    def ready(self) -> tuple[list[Encoded], list[Answer]]:
        """Return the prompts and their answers, without caches."""
        if self.prompts is None or self.answers is None:
            self.prompts = encode(self.adapter, self.case.batch)
            self.answers = self.adapter.generate(self.prompts, Generation(max_new_tokens=self.tokens))
        return self.prompts, self.answers

    def forward(self) -> dict[str, Any]:
        """Run plain forward passes over prompt and answer."""
        prompts, answers = self.ready()
        model, inputs = self.adapter.forward_inputs(prompts[0], answers[0].token_ids)
        inputs = {name: torch.cat([value] * self.case.batch) for name, value in inputs.items()}

        @torch.inference_mode()
        def run() -> None:
            model(**inputs, use_cache=False, logits_to_keep=1)

        return timed(run, self.budget)

    def generation(self) -> dict[str, Any]:
        """Generate."""
        prompts, answers = self.ready()
        figures = timed(lambda: self.adapter.generate(prompts, Generation(max_new_tokens=self.tokens)), self.budget)
        return {**figures, "tokens": sum(len(answer.token_ids) for answer in answers)}

    def trace(self, requires: Collection[str], features: FeatureSet | None = None) -> dict[str, Any]:
        """Generate and trace answers as a run does, and generate them alone."""
        prompts, _ = self.ready()
        generation = Generation(max_new_tokens=self.tokens)

        def run() -> list[Any]:
            read = self.adapter.prefill(prompts, requires)
            answers, read = self.adapter.generate_with_cache(read, generation)
            traces = self.adapter.trace_batch(read, answers, requires)
            return [features.compute(trace) for trace in traces] if features else traces

        alone = timed(lambda: self.adapter.generate(prompts, generation), self.budget / 2)
        figures = timed(run, self.budget / 2)
        return {**figures, "beside_generation": round(figures["seconds"] - alone["seconds"], 4)}

    def relevancy(self) -> dict[str, Any]:
        """Generate, and trace with relevancy alone."""
        return self.trace(["relevancy"])

    def full(self) -> dict[str, Any]:
        """Generate, trace with everything that ``features=full`` reads, and compute its features."""
        return self.trace(self.features.requires, self.features)

    def diagnose(self) -> dict[str, Any]:
        """Diagnose a finished answer."""
        _, answers = self.ready()
        picture = pictures(self.case.shape, 1)[0]
        return timed(lambda: stethoscope.diagnose(self.adapter, picture, QUESTION, answers[0]), self.budget)

    def stream(self) -> dict[str, Any]:
        """Stream the answer with the probabilities of a detector on ``features=fast``."""
        prompts, answers = self.ready()
        features = named_set("fast")
        columns = features.compute(self.adapter.trace(prompts[0], answers[0], features.requires))
        detector = made_up_detector(columns)
        picture, generation = pictures(self.case.shape, 1)[0], Generation(max_new_tokens=self.tokens)

        def run(**options: Any) -> list[Any]:
            return list(stethoscope.stream(self.adapter, picture, QUESTION, generation=generation, **options))

        without = timed(run, self.budget / 2)
        return {**timed(lambda: run(detector=detector), self.budget / 2), "without_detector": without["seconds"]}

    def precision(self) -> dict[str, Any]:
        """Compare maps and probabilities of the model with those of the same weights in float32."""
        prompts, answers = self.ready()
        half = self.adapter.trace(prompts[0], answers[0], ["relevancy"])
        self.adapter.model.float()
        try:
            full = self.adapter.trace(prompts[0], answers[0], ["relevancy"])
        finally:
            self.adapter.model.to(getattr(torch, self.adapter.loading.dtype))
        ids = torch.tensor(answers[0].token_ids)[:, None]
        probabilities = [trace.logits.float().softmax(-1).gather(-1, ids) for trace in (half, full)]
        errors = {"probability": (probabilities[0] - probabilities[1]).abs().max().item()}
        for name in ("image", "vision", "saliency"):
            ours, true = (getattr(trace.relevancy, name)[:, -1].double() for trace in (half, full))
            errors[name] = ((ours - true).norm() / true.norm()).item()
            errors[f"{name}_correlation"] = torch.corrcoef(torch.stack([ours.flatten(), true.flatten()]))[0, 1].item()
        return {name: round(value, 6) for name, value in errors.items()}

    def compile(self) -> dict[str, Any]:
        """Time the chain of a block of maps, and a feed-forward layer, with torch.compile and without."""
        shape, model = self.case.shape, self.adapter.model
        device, dtype, length = model.device, model.dtype, shape.image + 150
        rows = min(64, length)
        scores, by_map = (torch.randn(shape.heads, rows, length, device=device, dtype=dtype) for _ in range(2))
        hidden = torch.randn(1, length, shape.width, device=device, dtype=dtype, requires_grad=True)
        feed_forward = model.model.language_model.layers[0].mlp

        def feed(layer: Callable[[torch.Tensor], torch.Tensor]) -> None:
            torch.autograd.grad(layer(hidden).sum(), hidden)

        figures = {}
        parts: tuple[tuple[str, Callable[..., Any], Callable[[Callable[..., Any]], Any]], ...] = (
            ("chain", chain, lambda chosen: chosen(scores, by_map)),
            ("feed_forward", feed_forward.forward, feed),
        )
        for name, function, call in parts:
            for way, chosen in (("eager", function), ("compiled", torch.compile(function, dynamic=True))):
                start = time.monotonic()
                call(chosen)  # compiles
                figures[f"{name}_{way}_first_s"] = round(time.monotonic() - start, 2)
                times = timed(partial(call, chosen), self.budget / 4)
                figures[f"{name}_{way}_ms"] = round(times["seconds"] * 1e3, 4)
        return figures


def chain(scores: torch.Tensor, by_map: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute Abar and the gradient of the scores, as ``relevancy.attention_backward`` does.

    Scores are (heads, rows, columns).
    """
    weights = scores.softmax(-1, dtype=torch.float32)
    product = by_map.float() * weights
    abar = product.clamp(min=0).mean(0)
    return abar, (product - product.sum(-1, keepdim=True) * weights).to(scores.dtype)


# --- all cases --------------------------------------------------------------------------------------------------------


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Yield the cases, the most telling first."""
    shapes = PUBLISHED if torch.cuda.is_available() and not options.narrow else NARROW
    for image in options.image:
        for family in options.families:
            for batch in options.batch:
                yield Case(replace(shapes[family], image=image), batch)


def measure(options: argparse.Namespace, figures: Figures) -> None:
    """Measure what is missing, model by model."""
    features, adapter, budget = named_set("full"), None, options.budget
    device = "cuda" if torch.cuda.is_available() else "cpu"
    single = {"diagnose", "stream", "precision", "compile"}
    early = [part for part in options.parts if part not in ("compile", "devices")]
    runs = [(case, early) for case in cases(options)]
    if "compile" in options.parts:  # last, because compilers can take minutes
        runs += [(case, ["compile"]) for case in cases(options) if case.shape.image == options.image[0]]
    for case, wanted in runs:
        parts = [part for part in wanted if case.batch == 1 or part not in single]
        parts = [part for part in parts if figures.missing(case.key(part))]
        if not parts:
            continue
        if adapter is None or adapter.shape != case.shape:
            adapter = None
            gc.collect()
            adapter = ShapedAdapter(case.shape, options.dtype, device)
            start = time.monotonic()
            adapter.setup()
            size = sum(parameter.nbytes for parameter in adapter.model.parameters()) >> 20
            figures.add(case.key("build"), seconds=round(time.monotonic() - start, 2), weights_mib=size)
        bench = Bench(adapter, case, options.tokens, budget, features)
        for part in parts:
            figures.attempt(case.key(part), getattr(bench, part))
    if "devices" in options.parts and torch.cuda.device_count() > 1:
        case = next(cases(options))
        bench = Bench(ShapedAdapter(case.shape, options.dtype, "auto"), case, options.tokens, budget, features)
        for part in ("generation", "relevancy"):
            figures.attempt(case.key(f"{part} on {torch.cuda.device_count()} devices"), getattr(bench, part))


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Format the figures as Markdown; times also in forward passes of the same case."""
    forwards = {
        line["key"][: -len(" forward")]: line.get("seconds") for line in lines if line["key"].endswith(" forward")
    }
    rows = ["| figure | seconds | forwards | first call | peak MiB | other |", "|---|---|---|---|---|---|"]
    for line in lines:
        values = {name: value for name, value in line.items() if name != "key"}
        seconds, first, peak = (values.pop(name, None) for name in ("seconds", "first", "peak_mib"))
        forward = next((value for key, value in forwards.items() if line["key"].startswith(f"{key} ")), None)
        ratio = f"{seconds / forward:.2f}" if seconds and forward and not line["key"].endswith(" build") else ""
        other = ", ".join(f"{name} {value}" for name, value in values.items())
        cells = ["" if value is None else str(value) for value in (seconds, ratio, first, peak)]
        rows.append(f"| {line['key']} | {' | '.join(cells)} | {other} |")
    return "\n".join(rows)


def main() -> None:
    """Measure, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/gpu.jsonl"))
    parser.add_argument("--table", action="store_true", help="print the figures so far as a table and measure nothing")
    parser.add_argument("--seconds", type=float, default=440, help="time for all figures")
    parser.add_argument("--budget", type=float, default=6, help="time for the repetitions of one figure")
    parser.add_argument("--families", nargs="+", choices=sorted(PUBLISHED), default=list(PUBLISHED))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--image", type=int, nargs="+", default=[576, 2304], help="image tokens")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=100, help="of an answer")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--narrow", action="store_true", help="narrow models on a GPU too")
    options = parser.parse_args()
    figures = Figures(options.out, options.seconds)
    if not options.table:
        machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
        if figures.missing("machine"):
            figures.add("machine", device=machine, torch=torch.__version__, devices=torch.cuda.device_count())
        measure(options, figures)
    print(table(figures.lines))


if __name__ == "__main__":
    main()
