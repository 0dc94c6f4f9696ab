import inspect
import io
import re

import pytest
from helpers.tiny_world import TinyAdapter, TinyFeatures, TinyTask
from rich.console import Console

from stethoscope.core.errors import ConfigError
from stethoscope.evaluation import callbacks
from stethoscope.evaluation.callbacks import Callback, Progress, SampleTable, SaveHeatmaps, Timing
from stethoscope.evaluation.evaluator import Evaluator
from stethoscope.loggers.base import Logger


class Memory(Logger):
    """Keeps what is logged."""

    def __init__(self):
        self.metrics, self.tables = [], {}

    def log_metrics(self, metrics, step=None):
        self.metrics.append((step, dict(metrics)))

    def log_table(self, name, columns, rows):
        self.tables[name] = [dict(zip(columns, row, strict=True)) for row in rows]


def test_every_hook_is_empty_explained_and_mentioned_in_the_order():
    hooks = {name: function for name, function in inspect.getmembers(Callback, inspect.isfunction) if name[:3] == "on_"}
    for name, function in hooks.items():
        assert function.__doc__.startswith("Act "), name
        assert name in callbacks.__doc__
        arguments = [None] * (len(inspect.signature(function).parameters) - 1)
        assert function(Callback(), *arguments) is None


def test_progress_writes_plain_lines_where_there_is_no_terminal(capsys, tmp_path):
    adapter = TinyAdapter()
    adapter.fails = {3}
    Evaluator([Progress(every=0)], batch_size=4, run_dir=tmp_path).run(adapter, TinyTask())
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["tiny: reading the questions, loading tiny ...", "tiny: 10 samples"]
    assert lines[2].startswith("tiny: 4/10, ")
    assert lines[2].endswith(" left, 1 failed")
    assert re.match(r"tiny: 10/10 in \d+ s, ", lines[-1])
    Evaluator([Progress()], run_dir=tmp_path).run(TinyAdapter(), TinyTask())
    assert capsys.readouterr().err.splitlines()[1] == "tiny: 10 samples, 9 of them need nothing more"
    Evaluator([Progress()], run_dir=tmp_path).run(TinyAdapter(), TinyTask())
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"tiny: 10/10 in \d+ s", last)  # no rate of nothing


@pytest.mark.parametrize("interrupt", [None, 5])
def test_progress_draws_a_bar_on_a_terminal_and_clears_up(monkeypatch, interrupt):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    monkeypatch.setattr("stethoscope.evaluation.callbacks.console", lambda **settings: console)
    progress, adapter = Progress(), TinyAdapter()
    adapter.interrupt_at = interrupt
    if interrupt is None:
        Evaluator([progress], batch_size=2).run(adapter, TinyTask())
        assert "10/10" in screen.getvalue()
    else:
        with pytest.raises(KeyboardInterrupt):
            Evaluator([progress], batch_size=2).run(adapter, TinyTask())
    assert progress._bar is None
    assert "samples/s" in screen.getvalue()
    assert screen.getvalue().rstrip("\n").endswith("\x1b[?25h")  # the cursor is back


def test_timing_logs_stages_and_rates():
    memory = Memory()
    Evaluator([Timing(every=0)], [memory], batch_size=5, features=TinyFeatures()).run(TinyAdapter(), TinyTask())
    assert [step for step, _ in memory.metrics] == [5, 10, None, None]
    assert set(memory.metrics[-1][1]) == {
        f"tiny/seconds/{name}" for name in ("encode", "generate", "score", "trace", "samples_per_second")
    }


def test_sample_table_logs_the_first_answers_also_of_a_resumed_run(tmp_path):
    adapter = TinyAdapter()
    adapter.fails = {1}
    for settings in ({}, {"run_dir": tmp_path}):
        memory = Memory()
        Evaluator([SampleTable(3)], [memory], batch_size=2, **settings).run(adapter, TinyTask())
        table = memory.tables["tiny/samples"]
        assert [row["sample"] for row in table] == ["s00", "s01", "s02"]
        assert table[0]["answer"] == "a dog and a dog"
        assert table[1]["answer"] == "RuntimeError: the model broke"
        assert [row["status"] for row in table] == ["ok", "failed", "ok"]
    memory, adapter.fails = Memory(), set()
    Evaluator([SampleTable(3)], [memory], run_dir=tmp_path).run(adapter, TinyTask())
    assert [row["status"] for row in memory.tables["tiny/samples"]] == ["ok", "ok", "ok"]


@pytest.mark.parametrize("settings", [{"side": 0}, {"cells": 1.5}, {"side": "large"}])
def test_sizes_of_heat_maps_are_whole_numbers(settings):
    with pytest.raises(ConfigError, match=f"callbacks.maps.{next(iter(settings))}="):
        SaveHeatmaps(**settings)
