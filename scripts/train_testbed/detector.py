"""Train the detector that comes with the embedded model again: stethoscope/testbed/detector.

It has to be done whenever the embedded model changes, since a detector is taken for exactly the model that it was
trained on; `tests/unit/testbed/test_shipped_detector.py` tells. Ten minutes on one core; the same code and seed give
the same detector.

    python -m scripts.train_testbed.detector
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from stethoscope import testbed

WORDS = [
    "name=ship",
    "pope.scenes=20",
    "chair.scenes=3000",
    "features=default_verified",  # the probe of hidden states learns from the verification, which nothing else reads
    "detector=logistic",
    "detector.exclude=[verify_*]",
    "logger=none",
]


def main() -> None:
    """Run the benchmark in a temporary folder and copy its detector."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "stethoscope", "benchmark", *WORDS, f"runs={folder}"]
        subprocess.run(command, check=True)
        shutil.copytree(Path(folder) / "ship" / "detector", testbed.DETECTOR_DIR, dirs_exist_ok=True)
    print(f"wrote {testbed.DETECTOR_DIR}")


if __name__ == "__main__":
    main()
