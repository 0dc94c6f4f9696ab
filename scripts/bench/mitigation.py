"""What mitigations cost beside greedy decoding, for the embedded model: one table from one run.

    python scripts/bench/mitigation.py                # answers one at a time and in batches of 8; one thread

CPU time of one thread, as a ratio to greedy decoding. Decoding methods write answers of the same number of tokens as
greedy decoding does, as their own would be longer or shorter. All ways alternate batch by batch, forwards and backwards
in turn, so that other work on the machine falls on all of them; the table has the ratio of medians over all batches.
Going back while the model talks (``backtrack``) writes answers of their own lengths, and stands beside greedy answers
of their own lengths; its detector is that of ``scripts/bench/backtrack.py``, which also measures what it
gains. Exits with 1 where a limit is missed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from backtrack import train

import stethoscope
from stethoscope import testbed
from stethoscope.adapters.hf import HfAdapter
from stethoscope.core.types import Generation
from stethoscope.mitigation.base import Mitigation
from stethoscope.mitigation.decoding import Cut, FirstLogitBoosting, NoImageContrast, NoiseContrast
from stethoscope.streaming.backtrack import Backtrack
from stethoscope.tracing.trace import Encoded

QUESTION = "Please describe this image in detail."
GREEDY, OWN_LENGTH = "greedy", "greedy, own length"
METHODS: dict[str, Mitigation] = {
    "cut": Cut(), "flb": FirstLogitBoosting(), "no_image": NoImageContrast(), "vcd": NoiseContrast(),
}  # fmt: skip
LIMITS = {"cut": 1.05, "flb": 1.05, "no_image": 2.1, "vcd": 2.1, "backtrack": 3.0}
THRESHOLD, SEED = 0.65, 7


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=24, help="batches of every size and way")
    parser.add_argument("--tokens", type=int, default=44, help="of every answer; greedy ones have 44 in the mean")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--train", type=int, default=1000, help="captions that backtrack's detector learns from")
    source.add_argument("--detector", help="folder of another detector for backtrack, or of a run that has one")
    options = parser.parse_args()
    torch.set_num_threads(1)
    adapter = stethoscope.load("testbed")
    assert isinstance(adapter, HfAdapter)
    pictures = [scene.image() for scene in testbed.scenes(options.pictures, seed=SEED)]
    encoded = [adapter.encode_as("description", picture, QUESTION) for picture in pictures]
    with tempfile.TemporaryDirectory() as folder:
        detector = options.detector or train(adapter, options.train, Path(folder))
        ways = make_ways(adapter, options.tokens, Backtrack(detector=detector, threshold=THRESHOLD))
        spent = {size: measure(ways, encoded, size, options.repeats) for size in options.batches}
    print("| CPU time | " + " | ".join(f"batch {size}" for size in options.batches) + " | limit |")
    print("|---|" + "---|" * (len(options.batches) + 1))
    milliseconds = (f"{spent[size][GREEDY] * 1e3:.1f} ms an answer" for size in options.batches)
    print(f"| greedy | {' | '.join(milliseconds)} | |")
    missed = []
    for name, limit in LIMITS.items():
        reference = OWN_LENGTH if name == "backtrack" else GREEDY
        ratios = [spent[size][name] / spent[size][reference] for size in options.batches]
        if max(ratios) > limit:
            missed.append(name)
        print(f"| `{name}` | {' | '.join(f'{value:.2f}' for value in ratios)} | {limit:.2f} |")
    if missed:
        sys.exit(f"above the limit: {', '.join(missed)}")


def make_ways(
    adapter: HfAdapter, tokens: int, backtrack: Backtrack
) -> dict[str, Callable[[Sequence[Encoded]], object]]:
    """Return by name what answers a batch of prompts in every way, decoding methods with so many tokens."""

    def decode(method: Mitigation | None) -> Callable[[Sequence[Encoded]], object]:
        def run(prompts: Sequence[Encoded]) -> None:
            generation = Generation(max_new_tokens=tokens, mitigation=method)
            with torch.inference_mode():
                model, arguments = adapter.prepare_generate(prompts, generation)
                arguments["generation_config"].eos_token_id = None
                model.generate(**arguments)

        return run

    ways = {GREEDY: decode(None)} | {name: decode(method) for name, method in METHODS.items()}
    own = Generation(max_new_tokens=512)
    ways[OWN_LENGTH] = lambda prompts: adapter.generate(prompts, own)
    ways["backtrack"] = lambda prompts: backtrack.write(adapter, prompts, own)
    return ways


def measure(
    ways: dict[str, Callable[[Sequence[Encoded]], object]], encoded: Sequence[Encoded], size: int, repeats: int
) -> dict[str, float]:
    """Return CPU seconds per answer of every way, the median over batches of ``size``."""
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(-1, repeats):  # the first round warms up
        prompts = [encoded[(max(number, 0) * size + index) % len(encoded)] for index in range(size)]
        for name in ways if number % 2 else reversed(ways):
            before = time.process_time()
            ways[name](prompts)
            if number >= 0:
                spent[name].append((time.process_time() - before) / size)
    return {name: statistics.median(seconds) for name, seconds in spent.items()}


if __name__ == "__main__":
    main()
