"""What mitigations cost beside greedy decoding, for the embedded model: one table from one run.

    python scripts/bench/mitigation.py                # answers one at a time and in batches of 8; one thread

CPU time of one thread, as a ratio to greedy decoding. Decoding methods write answers of the same number of tokens as
greedy decoding does, as their own would be longer or shorter. All ways alternate batch by batch, forwards and backwards
in turn, so that other work on the machine falls on all of them; the table has the ratio of medians over all batches.
Exits with 1 where a limit is missed. Going back while the model talks is measured by ``scripts/bench/backtrack.py``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch

import stethoscope
from stethoscope import testbed
from stethoscope.adapters.base import Adapter
from stethoscope.core.types import Generation
from stethoscope.mitigation.base import Mitigation
from stethoscope.mitigation.decoding import Cut, FirstLogitBoosting, NoImageContrast, NoiseContrast
from stethoscope.tracing.trace import Encoded

QUESTION = "Please describe this image in detail."
GREEDY = "greedy"
METHODS: dict[str, Mitigation] = {
    "cut": Cut(), "flb": FirstLogitBoosting(), "no_image": NoImageContrast(), "vcd": NoiseContrast(),
}  # fmt: skip
LIMITS = {"cut": 1.05, "flb": 1.05, "no_image": 2.1, "vcd": 2.1}


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=24, help="batches of every size and way")
    parser.add_argument("--tokens", type=int, default=44, help="of every answer; greedy ones have 44 in the mean")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    options = parser.parse_args()
    torch.set_num_threads(1)
    adapter = stethoscope.load("testbed")
    pictures = [scene.image() for scene in testbed.scenes(options.pictures)]
    encoded = [adapter.encode_as("description", picture, QUESTION) for picture in pictures]
    spent = {size: measure(adapter, encoded, options.tokens, size, options.repeats) for size in options.batches}
    print("| CPU time | " + " | ".join(f"batch {size}" for size in options.batches) + " | limit |")
    print("|---|" + "---|" * (len(options.batches) + 1))
    milliseconds = (f"{spent[size][GREEDY] * 1e3:.1f} ms an answer" for size in options.batches)
    print(f"| greedy | {' | '.join(milliseconds)} | |")
    missed = []
    for name, limit in LIMITS.items():
        ratios = [spent[size][name] / spent[size][GREEDY] for size in options.batches]
        missed += [name] * (max(ratios) > limit)
        print(f"| `{name}` | {' | '.join(f'{value:.2f}' for value in ratios)} | {limit:.2f} |")
    if missed:
        sys.exit(f"above the limit: {', '.join(missed)}")


def measure(adapter: Adapter, encoded: Sequence[Encoded], tokens: int, size: int, repeats: int) -> dict[str, float]:
    """CPU seconds per answer of every method, the median over batches of ``size``."""

    def decode(method: Mitigation | None) -> Callable[[Sequence[Encoded]], None]:
        def run(prompts: Sequence[Encoded]) -> None:
            generation = Generation(max_new_tokens=tokens, mitigation=method)
            with torch.inference_mode():
                model, arguments = adapter.prepare_generate(prompts, generation)
                arguments["generation_config"].eos_token_id = None
                model.generate(**arguments)

        return run

    ways = {GREEDY: decode(None)} | {name: decode(method) for name, method in METHODS.items()}
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(-1, repeats):  # the first round warms up
        start = max(number, 0) * size % len(encoded)
        for name in list(ways)[:: 1 if number % 2 else -1]:
            before = time.process_time()
            ways[name](encoded[start : start + size])
            spent[name] += [(time.process_time() - before) / size] * (number >= 0)
    return {name: statistics.median(seconds) for name, seconds in spent.items()}


if __name__ == "__main__":
    main()
