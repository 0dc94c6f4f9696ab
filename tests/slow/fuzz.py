"""Fuzzes all readers and parsers for some minutes: any input gives a result or one of our one-line errors.

    python tests/slow/fuzz.py --minutes 2
    python tests/slow/fuzz.py --cases 2000 --seed 7 --report cases.jsonl

The tests of ``tests/fuzz`` again and again, every time with another seed and more examples than the suite has time for.
A failure prints its seed; ``--seed`` begins there. With ``--cases``, instead, so many hostile runs, detectors, models
and data sets are read once under an audit hook (``tests/fuzz/test_audit.py``).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).parents[1] / "fuzz"


def read_hostile_files(cases: int, seed: int, report: Path | None) -> None:
    """Run the audited cases; exits with 1 where one of them does what it may not."""
    environment = {**os.environ, "STETHOSCOPE_FUZZ_CASES": str(cases), "STETHOSCOPE_FUZZ_SEED": str(seed)}
    if report is not None:
        environment["STETHOSCOPE_FUZZ_REPORT"] = str(report.resolve())
    words = [sys.executable, "-m", "pytest", "-q", "-s", "-m", "slow", str(TESTS / "test_audit.py")]
    if subprocess.run(words, env=environment, cwd=TESTS.parents[1]).returncode:
        raise SystemExit(f"seed {seed} found something")


def main() -> None:
    """Goes on until the time is over or something is found; exits with 1 then."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--examples", type=int, default=200, help="inputs for each test and seed")
    parser.add_argument("--cases", type=int, help="read so many hostile files under an audit hook instead")
    parser.add_argument("--report", type=Path, help="with --cases: a JSON line about every case goes there")
    options = parser.parse_args()
    if options.cases:
        read_hostile_files(options.cases, options.seed, options.report)
        return
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
