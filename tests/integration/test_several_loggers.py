"""Several loggers at once, chosen on the command line: each one's own reader gives back the same figures."""

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.wandb_reader import read

OWN_READERS = """
import json, sys
import mlflow, trackio
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trackio.sqlite_storage import SQLiteStorage
client = mlflow.MlflowClient(f"file://{sys.argv[1]}/runs/mlruns")
(run,) = client.search_runs([client.get_experiment_by_name("stethoscope").experiment_id])
events = EventAccumulator(f"{sys.argv[1]}/runs/all/tensorboard").Reload()
json.dump({
    "mlflow": run.data.metrics, "mlflow choices": run.data.params["choices.task"],
    "mlflow secret": run.data.params["api_key"],
    "tensorboard": {name: events.Scalars(name)[-1].value for name in events.Tags()["scalars"]},
    "trackio": {name: value for row in SQLiteStorage.get_logs("stethoscope", "all") for name, value in row.items()},
    "trackio secret": SQLiteStorage.get_run_config("stethoscope", "all")["api_key"],
}, sys.stdout)
"""
TINY = ["model.random_init=tiny", "+api_key=verysecret1", "task=pope", "task.scenes=3", "limit=6"]


def run(*words, folder, **env):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **env}
    ended = subprocess.run([sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return ended


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("tensorboard", "mlflow", "trackio")),
    reason="needs the extras tensorboard, mlflow and trackio",
)
def test_five_loggers_at_once(tmp_path):
    words = ["evaluate", *TINY, "name=all", "logger=[wandb,tensorboard,mlflow,trackio,csv]", "logger.mode=offline"]
    store = {"TRACKIO_DIR": str(tmp_path / "trackio"), "MLFLOW_ALLOW_FILE_STORE": "true"}
    ended = run("-m", "stethoscope", *words, folder=tmp_path, **store)
    for link in (
        "W&B run, offline: wandb sync ",
        "tensorboard --logdir runs/all/tensorboard",
        "mlflow ui ",
        "trackio show",
    ):
        assert link in ended.stderr, ended.stderr
    read_back = json.loads(run("-c", OWN_READERS, str(tmp_path), folder=tmp_path, **store).stdout)
    assert read_back["mlflow choices"] == "pope"
    assert {read_back["mlflow secret"], read_back["trackio secret"]} == {"***"}
    wandb = read(tmp_path / "runs" / "all")
    assert wandb.config["api_key"] == "***"
    with (tmp_path / "runs/all/csv/metrics.csv").open() as file:
        figures = {row["name"]: float(row["value"]) for row in csv.DictReader(file) if "/seconds/" not in row["name"]}
    metrics = json.loads((tmp_path / "runs/all/metrics.json").read_text())["pope"]["metrics"]
    for row in metrics:
        if row["value"] is not None:
            assert figures[f"pope/{row['subset']}/{row['metric']}"] == row["value"]
    for name, value in figures.items():
        for logger in ("mlflow", "trackio"):
            assert read_back[logger][name] == pytest.approx(value, abs=1e-12), (logger, name)
        assert read_back["tensorboard"][name] == pytest.approx(value, rel=1e-6), name  # in 32 bits
        assert wandb.summary.get(name, wandb.history[-1].get(name, value)) == pytest.approx(value, abs=1e-12)
    secret = b"verysecret1"
    written = [path for path in Path(tmp_path).rglob("*") if path.is_file()]
    assert not [path for path in written if secret in path.read_bytes()]


def test_no_logger(tmp_path, stethoscope):
    stethoscope("evaluate", *TINY, "logger=[]", "callbacks=none", "name=alone", code=0)
    files = {path.name for path in Path("runs/alone").iterdir()}
    assert "events.jsonl" in files
    assert not files & {"wandb", "csv", "tensorboard"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["logger=[wandb,cvs]"], "unknown logger 'cvs'; did you mean 'csv'"),
        (["logger=[{a: 1}]"], "should name a choice, as in logger=csv"),
        (["logger=wandb,csv"], "'logger=[wandb,csv]' is one list"),
        (["logger=[csv,none]", "logger.mode=online"], "unknown setting of logger=[csv,none] 'mode'"),
    ],
)
def test_what_is_no_choice_of_loggers(stethoscope, words, message):
    assert message in stethoscope("evaluate", *words)
