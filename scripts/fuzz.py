"""Fuzzes all readers and parsers for some minutes: any input gives a result or one of our one-line errors.

    python scripts/fuzz.py --minutes 2

The tests of ``tests/fuzz`` again and again, every time with another seed and more examples than the suite has time for.
A failure prints its seed; ``--seed`` begins there.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).parents[1] / "tests" / "fuzz"


def main() -> None:
    """Goes on until the time is over or something is found; exits with 1 then."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--examples", type=int, default=200, help="inputs for each test and seed")
    options = parser.parse_args()
    environment = {**os.environ, "STETHOSCOPE_FUZZ_EXAMPLES": str(options.examples)}
    end, seed = time.monotonic() + 60 * options.minutes, options.seed
    while seed == options.seed or time.monotonic() < end:
        words = [sys.executable, "-m", "pytest", "-q", "-x", f"--hypothesis-seed={seed}", str(TESTS)]
        if subprocess.run(words, env=environment, cwd=TESTS.parents[1]).returncode:
            raise SystemExit(f"seed {seed} found something")
        seed += 1
    print(f"nothing found with seeds {options.seed} to {seed - 1}, {options.examples} inputs for each test and seed")


if __name__ == "__main__":
    main()
