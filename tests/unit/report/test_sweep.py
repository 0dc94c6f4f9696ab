"""The table of a sweep: jobs of several seeds are averaged, and compared within a seed only."""

from pathlib import Path

import numpy as np
import pytest

from stethoscope.core.types import Answer, Score
from stethoscope.report.sweep import compare_jobs
from stethoscope.storage.records import Record
from stethoscope.storage.run_dir import RunStore
from stethoscope.storage.sweep_jobs import FINISHED, Job
from stethoscope.tasks.chair import Chair

HALLUCINATED = {("greedy", 0): 2.0, ("greedy", 1): 4.0, ("sample", 0): 6.0, ("sample", 1): 9.0}
MENTIONS = 10.0


@pytest.fixture
def jobs(tmp_path):
    """Four finished jobs, two settings with two seeds each, of whose mentions so many of 10 are hallucinated."""
    finished = []
    for number, ((generation, seed), wrong) in enumerate(HALLUCINATED.items()):
        folder = tmp_path / f"{generation}-{seed}"
        store = RunStore(folder)
        task = {"class": "stethoscope.tasks.chair.Chair", "name": "chair", "version": "1", "settings": {}}
        store.open_task("chair", {"adapter": {"model_id": "m"}, "task": task, "generation": generation, "seed": seed})
        ids = [f"s{index}" for index in range(12)]
        counts = {"mentions": MENTIONS, "hallucinated": wrong, "captions": 1.0, "hallucinated_captions": 1.0}
        score = Score("ok", {**counts, "truth": 2.0, "found": 1.0, "words": 9.0})
        answer = Answer("a dog", (1, 2), ((0, 1), (2, 5)), (-0.1, -0.2), True)
        store.append([Record("chair", name, name, "all", "x.png", "What?", answer=answer, score=score) for name in ids])
        store.finish("chair", ids)
        share = wrong / MENTIONS
        interval = {"value": share, "low": share, "high": share, "items": 12, "groups": 12}
        counted = {"samples": 12, "ok": 12, "unparsed": 0, "failed": 0, "truncated": 0}
        metrics = [{"metric": "chair_i", "subset": "all", **interval}]
        store.write_metrics("chair", {"primary": "chair_i", "counts": counted, "metrics": metrics})
        own = (f"generation={generation}", f"seed={seed}")
        finished.append(Job("key", number, own, str(folder), FINISHED))
    return finished


def test_jobs_of_several_seeds(jobs):
    comparison = compare_jobs(jobs, lambda source, task: Chair())
    assert [result.differences for result in comparison.results[:2]] == [{}, {}]  # the first of each seed
    for result in comparison.results[2:]:
        seed = int(result.job.settings["seed"])
        assert result.remark == ""
        gap = (HALLUCINATED["sample", seed] - HALLUCINATED["greedy", seed]) / MENTIONS
        assert result.differences["chair chair_i"].interval.value == pytest.approx(gap)
    assert comparison.seed_table.columns == ("generation", "seeds", "CHAIR_i")
    rows = [("greedy", 2, [0.2, 0.4]), ("sample", 2, [0.6, 0.9])]
    assert comparison.seed_table.rows == tuple(
        (name, count, f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}") for name, count, values in rows
    )
    assert "the first job of the same seed" in comparison.table.note


def test_without_several_seeds_there_is_one_table(jobs):
    assert compare_jobs([jobs[0], jobs[2]], lambda source, task: Chair()).seed_table is None


@pytest.mark.parametrize("content", [b"{", b'{"chair": {"primary": "chair_i"}}'])
def test_a_damaged_run_does_not_hide_the_others(jobs, content):
    broken = Path(jobs[1].folder, "metrics.json")
    broken.write_bytes(content)
    results = compare_jobs(jobs, lambda source, task: Chair()).results
    assert [bool(result.figures) for result in results] == [True, False, True, True]
    assert results[1].remark.startswith(f"{broken} is damaged")
    assert "chair chair_i" in results[2].differences
