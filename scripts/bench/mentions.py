"""How many captions of exactly 80 words does CHAIR's extraction read in a second, on one core?

    python scripts/bench/mentions.py [captions.jsonl ...]

Without files, captions are made of the vocabulary and common words; with files, of the words of their captions
(JSON lines with a key ``caption``). Prints the first reading, when no word is known yet, and the median of the others.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path

from stethoscope.core.errors import StethoscopeError
from stethoscope.core.json_rows import read_rows
from stethoscope.tasks.object_extraction import NAMES, mentions

WORDS = 80
COMMON = (
    "the a an of in on with and is are there two several large small red wooden near next to sitting standing image "
    "scene features background left right side various other visible placed some while it they appears adding also"
)


def built_in(count: int, seed: int = 0) -> list[str]:
    """Create captions of common words with one word in six from the vocabulary, which is what LVLMs write.

    Args:
        count: number of captions.
        seed: of the choice of words.
    """
    rng, names, common = random.Random(seed), sorted(NAMES), COMMON.split()
    words: list[str] = []
    while len(words) < count * WORDS:
        words += rng.choice(names).split() if rng.random() < 1 / 6 else [rng.choice(common)]
        if rng.random() < 1 / 12:
            words[-1] += rng.choice((".", ",", ".\n\n", "'s", "s."))
    return _of_80(words)


def real(paths: list[Path]) -> list[str]:
    """Read the captions of files, joined and split into pieces of 80 words."""
    rows = (row for path in paths for _, _, row in read_rows(path, ["caption"]))
    return _of_80([word for row in rows for word in str(row["caption"]).split()])


def _of_80(words: list[str]) -> list[str]:
    return [" ".join(words[start : start + WORDS]) for start in range(0, len(words) - WORDS + 1, WORDS)]


def rate(captions: list[str]) -> float:
    """Return the captions per second of processor time."""
    start = time.process_time()
    for caption in captions:
        mentions(caption)
    return len(captions) / (time.process_time() - start)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("captions", nargs="*", type=Path, help="JSON lines with a key 'caption'")
    parser.add_argument("--rounds", type=int, default=7, help="readings after the first")
    arguments = parser.parse_args()
    try:
        captions = real(arguments.captions) if arguments.captions else built_in(2000)
    except StethoscopeError as error:
        parser.error(str(error))
    if not captions:
        parser.error(f"the files hold fewer than {WORDS} words")
    first, *others = [rate(captions) for _ in range(1 + arguments.rounds)]
    count = sum(len(mentions(caption)) for caption in captions)
    print(f"{len(captions)} captions of {WORDS} words, {count / len(captions):.1f} mentions each")
    print(f"first reading   {first:10,.0f} captions per second of one core")
    print(f"median of {arguments.rounds:<4d}  {statistics.median(others or [first]):10,.0f}")


if __name__ == "__main__":
    main()
