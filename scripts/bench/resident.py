"""How much memory a long run takes: its size after 100 samples and at its end.

    python scripts/bench/resident.py                    # 5,000 scenes, captions and token rows of all features

Every scene is described by the embedded model, scored by CHAIR and traced with `features=default`, with records, token
rows, heat maps and pictures kept, as `stethoscope evaluate` and `extract` do it. The limit is 200 MB.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import stethoscope
from stethoscope.core.component import build, compose
from stethoscope.core.types import Generation
from stethoscope.evaluation.callbacks import Callback, SampleTable, SaveHeatmaps, Timing
from stethoscope.evaluation.state import RunState
from stethoscope.features import FeatureSet
from stethoscope.tasks.chair import Chair

FIRST, LIMIT = 100, 200.0


class Resident(Callback):
    """Records the resident size, in MB, after 100 samples and after every tenth of the run."""

    def on_task_start(self, run: RunState) -> None:
        """Start the clock."""
        self.sizes: dict[int, float] = {}
        self.start = time.monotonic()

    def on_batch_end(self, run: RunState, records: Sequence) -> None:
        """Record and print the size when it is due."""
        due = FIRST if not self.sizes else max(self.sizes) + max(run.total // 10, 1)
        if run.done >= due or run.done == run.total:
            self.sizes[run.done] = resident()
            print(
                f"{run.done:6} samples {self.sizes[run.done]:6.0f} MB {time.monotonic() - self.start:6.0f} s",
                flush=True,
            )


def resident() -> float:
    """Return the resident size of this process in MB (10^6 bytes)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise SystemExit("the resident size is read from /proc, which only Linux has")


def main() -> None:
    """Run, print the sizes, and exit with 1 when the growth is above the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=5000)
    parser.add_argument("--tokens", type=int, default=32, help="longest answer")
    parser.add_argument("--features", default="default", help="a name of conf/features")
    options = parser.parse_args()
    torch.set_num_threads(1)
    features = build(compose([f"+features={options.features}"]).features, FeatureSet, "features")
    size = Resident()
    with tempfile.TemporaryDirectory() as folder:
        callbacks = [Timing(), SampleTable(), SaveHeatmaps(), size]
        generation = Generation(max_new_tokens=options.tokens)
        evaluator = stethoscope.Evaluator(callbacks, generation=generation, features=features, run_dir=folder)
        evaluator.run(stethoscope.load("testbed"), Chair(scenes=options.scenes))
        run_size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()) / 1e6
    growth = max(size.sizes.values()) - size.sizes[min(size.sizes)]
    print(
        f"grew by {growth:.0f} MB after the first {min(size.sizes)} samples; the run directory holds {run_size:.0f} MB"
    )
    if growth > LIMIT:
        sys.exit(f"the limit is {LIMIT:.0f} MB")


if __name__ == "__main__":
    main()
