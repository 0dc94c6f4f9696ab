"""A run of the tiny world as a process of its own: ``python tests/helpers/tiny_run.py RUN_DIR '{"count": 10, ...}'``.

Leaves ``results-<rank>.json`` beside the run directory: the results, and which pictures this process has answered.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, it would find only what lies beside it

from helpers.tiny_world import TinyAdapter, TinyFeatures, TinyTask
from stethoscope.cli import TERMINATED
from stethoscope.core.errors import StethoscopeError
from stethoscope.core.system import Terminated, ended_by_signal, rank
from stethoscope.evaluation.callbacks import Progress
from stethoscope.evaluation.evaluator import Evaluator


class SlowAdapter(TinyAdapter):
    """Takes its time over every batch."""

    def __init__(self, pause: float = 0.0, fails: tuple[int, ...] = (), revision: str = "1") -> None:
        super().__init__(revision)
        self.pause, self.fails = pause, set(fails)

    def generate(self, encoded, generation):
        time.sleep(self.pause)
        return super().generate(encoded, generation)


def main(folder: str, options: str) -> None:
    """Runs once."""
    given = json.loads(options)
    revision = given.get("revisions", {}).get(str(rank()), "1")
    adapter = SlowAdapter(given.get("pause", 0.0), given.get("fails", ()), revision)
    evaluator = Evaluator(
        callbacks=[Progress()],
        batch_size=given.get("batch_size", 2),
        features=TinyFeatures() if given.get("features", True) else None,
        run_dir=folder,
        on_error=given.get("on_error", "record"),
        meeting_minutes=given.get("meeting_minutes", 10),
    )
    try:
        with ended_by_signal():
            results = evaluator.run(adapter, TinyTask(count=given["count"]))
    except Terminated:
        sys.exit(TERMINATED)
    except (StethoscopeError, RuntimeError) as error:
        print(f"tiny: {error}", file=sys.stderr)
        sys.exit(2)
    outcome = {"results": results.to_dict(), "answered": [number for batch in adapter.generated for number in batch]}
    Path(folder).with_name(f"results-{rank()}.json").write_text(json.dumps(outcome))


if __name__ == "__main__":
    from helpers.tiny_run import main as run  # so that classes have the module's name, here and where it is imported

    run(*sys.argv[1:])
