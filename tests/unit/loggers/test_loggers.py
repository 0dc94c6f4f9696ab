import json
import math
import threading

import pytest
from helpers.tiny_world import TinyAdapter, TinyFeatures, TinyTask
from helpers.wandb_reader import read

from stethoscope.core.errors import ConfigError
from stethoscope.evaluation.callbacks import SampleTable, Timing
from stethoscope.evaluation.evaluator import Evaluator
from stethoscope.loggers.base import Logger
from stethoscope.loggers.combined import Loggers
from stethoscope.loggers.file_loggers import JsonLogger
from stethoscope.loggers.wandb import WandbLogger


def events(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_events_are_written_in_every_run_directory(tmp_path):
    Evaluator([Timing(every=0)], run_dir=tmp_path, batch_size=5).run(TinyAdapter(), TinyTask())
    written = events(tmp_path / "events.jsonl")
    assert [event["event"] for event in written] == ["config", "metrics", "metrics", "metrics", "table", "metrics"]
    assert written[0]["config"]["tiny"]["adapter"]["revision"] == "1"
    assert written[1]["step"] == 5
    assert written[3]["metrics"]["tiny/easy/accuracy"] == 1.0
    assert written[4]["name"] == "tiny/metrics"
    assert written[5]["metrics"]["tiny/seconds/samples_per_second"] > 0


def test_loggers_pass_on_and_leave_out_what_is_not_defined(tmp_path):
    loggers = Loggers([JsonLogger(tmp_path / "a.jsonl"), JsonLogger()])
    loggers.setup(tmp_path / "run")
    loggers.log_config({"key": "value", "api_key": "secret", "nested": [{"password": "x"}]})
    loggers.log_metrics({"good": 1, "bad": math.nan})
    loggers.finalize("finished")
    written = events(tmp_path / "a.jsonl")
    assert written[0]["config"] == {"key": "value", "api_key": "***", "nested": [{"password": "***"}]}
    assert written[1]["metrics"] == {"good": 1.0}
    assert written[2]["status"] == "finished"
    assert len(events(tmp_path / "run/events.jsonl")) == 3
    assert len(loggers.loggers) == 2


def test_a_logger_without_a_run_directory_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loggers = Loggers([JsonLogger()])
    loggers.setup(None)
    loggers.log_metrics({"a": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_the_failure_of_one_logger_does_not_reach_the_others(tmp_path):
    class Down(Logger):
        def setup(self, run_dir):
            raise ConnectionError

    loggers = Loggers([Down(), JsonLogger()])
    with pytest.warns(UserWarning, match=r"Down\.setup failed, the run goes on without it: ConnectionError"):
        loggers.setup(tmp_path)
    loggers.log_metrics({"a": 1.0})
    assert len(events(tmp_path / "events.jsonl")) == 1


class Slow(Logger):
    """A logger that does nothing, or never comes back."""

    def __init__(self, patience, forever=False):
        self.patience, self.calls, self.let_go = patience, [], threading.Event()
        if not forever:
            self.let_go.set()

    def setup(self, run_dir):
        self.let_go.wait()

    def log_metrics(self, metrics, step=None):
        self.calls.append(("metrics", threading.current_thread() is threading.main_thread()))
        if "bad" in metrics:
            raise ConnectionError("no route")

    def finalize(self, status):
        self.calls.append((status, threading.current_thread() is threading.main_thread()))


def test_a_logger_that_hangs_does_not_hold_up_a_run(tmp_path):
    slow = Slow(patience=0.1, forever=True)
    loggers = Loggers([slow])
    results = Evaluator([Timing(every=0)], loggers, run_dir=tmp_path).run(TinyAdapter(), TinyTask())
    with pytest.warns(UserWarning, match=r"Slow\.finalize failed, the run goes on without it: not done within 0\.1 s"):
        loggers.finalize("finished")
    loggers.log_metrics({"late": 1.0})
    assert slow.calls == []
    assert results.counts["ok"] == 10
    assert events(tmp_path / "events.jsonl")[-1]["metrics"] == {"late": 1.0}
    slow.let_go.set()


def test_a_slow_logger_works_in_a_thread_of_its_own_and_is_waited_for():
    slow = Slow(patience=30)
    loggers = Loggers([slow])
    loggers.setup(None)
    loggers.log_metrics({"bad": 1.0})
    loggers.log_metrics({"good": 1.0})
    with pytest.warns(UserWarning, match=r"Slow\.log_metrics failed, the run goes on without it: no route"):
        loggers.finalize("finished")
    assert slow.calls == [("metrics", False), ("metrics", False), ("finished", False)]
    loggers.finalize("again")
    assert slow.calls[-1] == ("again", False)


def test_an_offline_wandb_run_holds_the_same_figures(tmp_path):
    wandb = pytest.importorskip("wandb")
    loggers = Loggers([WandbLogger(project="tests", tags=["tiny"])])
    evaluator = Evaluator([Timing(), SampleTable(4)], loggers, run_dir=tmp_path / "first", features=TinyFeatures())
    results = evaluator.run(TinyAdapter(), TinyTask())
    loggers.log_config({"hub_token": "hf_secret"})
    loggers.log_metrics({"detector/auroc": 0.875})
    loggers.finalize("finished")
    assert wandb.run is None
    run = read(tmp_path / "first")
    assert run.name == "first"
    for name, value in {**results.flat(), "detector/auroc": 0.875}.items():
        assert run.summary[name] == pytest.approx(value, abs=1e-12)
    assert run.summary["status"] == "finished"
    assert run.exit_code == 0
    assert run.config["tiny"]["task"]["version"] == "1"
    assert run.config["hub_token"] == "***"
    curve = [row for row in run.history if "tiny/progress/samples_per_second" in row]
    assert [row["samples"] for row in curve] == [10]
    assert curve[0]["tiny/progress/share"] == 1.0
    assert (curve[0]["tiny/progress/failed"], curve[0]["tiny/progress/minutes_left"]) == (0, 0)
    assert run.summary["tiny/accuracy"] == results.value()
    assert run.tags == ["tiny"]
    assert any(len(table["data"]) == 4 for table in run.tables.values())
    assert any("accuracy" in table["data"][0] for table in run.tables.values())


def test_settings_of_the_whole_run_are_logged_once_and_completed(tmp_path):
    loggers = Loggers([JsonLogger()], {"seed": 1, "tiny": {"source": "x", "key": {"a": 1}}})
    for _ in range(2):
        loggers.setup(tmp_path)
    loggers.log_config({"tiny": {"key": {"b": 2}, "source": "y"}})
    configs = [event["config"] for event in events(tmp_path / "events.jsonl")]
    assert configs == [
        {"seed": 1, "tiny": {"source": "x", "key": {"a": 1}}},
        {"tiny": {"source": "y", "key": {"a": 1, "b": 2}}},
    ]


def test_secrets_in_errors_of_a_logger_are_masked(tmp_path):
    class Down(Logger):
        def setup(self, run_dir):
            raise ConnectionError("no answer from https://me:password1@host/api")

    with pytest.warns(UserWarning, match=r"Down\.setup failed.*https://\*\*\*@host/api"):
        Loggers([Down()]).setup(tmp_path)


def test_a_resumed_run_goes_on_under_the_same_wandb_id_and_silently(tmp_path, capfd):
    pytest.importorskip("wandb")
    ids = []
    for value in (0.25, 0.5):
        logger = WandbLogger()
        logger.setup(tmp_path)
        logger.setup(tmp_path)
        ids.append(logger.run.id)
        logger.log_metrics({"pope/all/f1": value})
        logger.finalize("failed" if value < 0.5 else "finished")
    assert ids[0] == ids[1]
    assert capfd.readouterr().err == ""
    assert read(tmp_path).summary["pope/all/f1"] == 0.5


def test_wandb_settings(tmp_path):
    with pytest.raises(ConfigError, match=r"unknown logger\.mode 'onlin'; did you mean 'online'"):
        WandbLogger(mode="onlin")
    logger = WandbLogger(mode="disabled")
    logger.log_metrics({"before": 1.0})  # nothing is set up, nothing happens
    logger.setup(tmp_path)
    logger.log_metrics({"a": 1.0})
    logger.finalize("finished")
    assert list(tmp_path.iterdir()) == []
