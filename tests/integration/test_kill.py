"""The quick form of ``tests/slow/kill_runs.py``: the tiny world in processes of its own, killed and started again."""

import importlib.util
import json
import sys
from pathlib import Path

import pandas as pd
import pytest
from helpers.tiny_world import TinyAdapter, TinyFeatures, TinyTask

from stethoscope.evaluation.evaluator import Evaluator

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def kill_runs():
    spec = importlib.util.spec_from_file_location("kill_runs", ROOT / "tests/slow/kill_runs.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["kill_runs"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_run_killed_three_times_ends_as_if_nothing_had_happened(kill_runs, tmp_path):
    def steps(folder, pause):
        words = [str(ROOT / "tests/helpers/tiny_run.py"), str(folder), json.dumps({"count": 99, "pause": pause})]
        return [kill_runs.Step("tiny", words, lambda run: (run / "metrics.json").exists())]

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    kill_runs.finish(steps(whole, 0), whole, 1)
    hit = kill_runs.disturb(steps(cut, 0.2), cut, kills=3, seed=2, spread=16, start=1.0, quiet=True)
    assert hit.total() == 3
    assert not (cut / "metrics.json").exists()
    kill_runs.finish(steps(cut, 0), cut, 2)
    assert kill_runs.differences(whole, cut) == []
    assert json.loads((cut / "status.json").read_text()) == {"tiny": "finished"}


def test_the_comparison_finds_what_it_should(kill_runs, tmp_path):
    """A driver that finds nothing would prove nothing."""
    undisturbed, other = tmp_path / "one", tmp_path / "other"
    for run in (undisturbed, other):
        Evaluator(run_dir=run, features=TinyFeatures()).run(TinyAdapter(), TinyTask(count=4))
    assert kill_runs.differences(undisturbed, other) == []
    file, table = other / "samples.jsonl", other / "tokens.parquet"
    lines, rows = file.read_text().splitlines(keepends=True), pd.read_parquet(table)

    def found(text, frame=rows):
        file.write_text(text)
        frame.to_parquet(table)
        return kill_runs.differences(undisturbed, other)

    assert found("".join(lines[1:])) == ["1 samples are lost, such as ('tiny', 's00')"]
    assert found("".join([*lines, lines[0]])) == ["1 records of other are double"]
    assert found("".join(lines).replace("-0.1,", "-0.10002,", 1)) == ["1 records differ, such as ('tiny', 's00')"]
    assert found("".join(lines).replace("-0.1,", "-0.100001,")) == []
    assert found("".join(lines), rows.assign(level=rows["level"] + 1)) == ["column level of the token tables differs"]
    assert found("".join(lines), rows[1:]) == [f"token tables of {rows.shape} and {rows[1:].shape}"]
    (other / "metrics.json").write_text("{}")
    assert found("".join(lines)) == ["metrics.json differs"]
