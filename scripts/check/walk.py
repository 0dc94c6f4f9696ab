"""Count the walk of one warm sample: calls, files, depth, and crossings of file borders.

A sample of CHAIR goes through ``SamplePipeline`` on the embedded model with a named set of features. The first samples
warm caches; then one more is counted with ``sys.setprofile``. Only functions of the package count; a call crosses a
border if the nearest frame of the package above it is in another file (library frames in between are looked through).

    python scripts/check/walk.py                               # features=default
    python scripts/check/walk.py --features default_relevancy  # with a backward pass
    python scripts/check/walk.py --pairs                       # and which files call which, most first
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import stethoscope
import stethoscope.adapters
import stethoscope.tasks
from stethoscope.evaluation.callbacks import Callback
from stethoscope.evaluation.evaluator import Evaluator
from stethoscope.features.registry import named_set
from stethoscope.tasks.chair import Chair

WARM = 4  # samples before the one that counts
MOST = 250  # border crossings that are allowed
FOLDERS = tuple(
    str(Path(path).resolve())
    for part in (stethoscope, stethoscope.adapters, stethoscope.tasks)
    for path in part.__path__
)


class Walk(Callback):
    """Counts the calls of the last batch of a run, from before its encoding to behind its records."""

    def __init__(self) -> None:
        self.calls: Counter[tuple[str, str, int]] = Counter()
        self.pairs: Counter[tuple[str, str]] = Counter()
        self.depth = 0
        self._batches = 0

    def on_batch_start(self, run: Any, samples: Any) -> None:
        """Start to count at the last sample."""
        self._batches += 1
        if self._batches == WARM + 1:
            sys.setprofile(self._profile)

    def on_batch_end(self, run: Any, records: Any) -> None:
        """Stop counting."""
        sys.setprofile(None)

    @property
    def crossings(self) -> int:
        """Number of calls across a file border."""
        return self.pairs.total()

    def _profile(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(FOLDERS) or code.co_filename == __file__:
            return
        self.calls[code.co_filename, code.co_qualname, code.co_firstlineno] += 1
        depth, above = 1, frame.f_back
        caller = ""
        while above is not None:
            if above.f_code.co_filename.startswith(FOLDERS):
                depth += 1
                caller = caller or above.f_code.co_filename
            above = above.f_back
        self.depth = max(self.depth, depth)
        if caller and caller != code.co_filename:
            self.pairs[caller, code.co_filename] += 1


def count_calls(features: str) -> Walk:
    """Count the calls of a warm sample.

    Args:
        features: name of the set.
    """
    walk = Walk()
    evaluator = Evaluator([walk], batch_size=1, features=named_set(features))
    evaluator.run(stethoscope.load("testbed"), Chair(scenes=WARM + 1))
    return walk


def main() -> None:
    """Print the table; exit with 1 if more borders are crossed than are allowed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", default="default", help="named set of features")
    parser.add_argument("--pairs", action="store_true", help="print which files call which")
    options = parser.parse_args()
    walk = count_calls(options.features)
    files = {file for file, _, _ in walk.calls}
    print(f"calls {walk.calls.total()}, functions {len(walk.calls)}, files {len(files)}, depth {walk.depth}")
    print(f"calls across a file border {walk.crossings} (at most {MOST})")
    if options.pairs:
        for (caller, callee), count in walk.pairs.most_common():
            print(f"{count:5d}  {_short(caller)} -> {_short(callee)}")
    sys.exit(walk.crossings > MOST)


def _short(file: str) -> str:
    folder = next(folder for folder in FOLDERS if file.startswith(folder))
    return f"{Path(folder).name}/{Path(file).relative_to(folder)}"


if __name__ == "__main__":
    main()
