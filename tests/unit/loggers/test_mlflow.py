import importlib.util
import json

import pandas as pd
import pytest
from helpers.logged_run import FINALS, TEXT, log_everything
from PIL import Image

from stethoscope.core.errors import ConfigError
from stethoscope.loggers import base
from stethoscope.loggers.mlflow import MlflowLogger

pytestmark = pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="needs the extra mlflow")


@pytest.fixture(autouse=True)
def _no_server(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


def runs(folder):
    import mlflow  # which takes seconds

    client = mlflow.MlflowClient((folder / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("tests")
    return client, client.search_runs([experiment.experiment_id])


def logger(folder, **settings):
    return MlflowLogger(folder=str(folder / "mlruns"), project="tests", **settings)


def test_mlflows_own_client_gives_back_what_was_logged(tmp_path):
    log_everything(logger(tmp_path, group="study", job_type="evaluate", tags=["pope", "tiny"]), tmp_path)
    client, (run,) = runs(tmp_path)
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")
    assert {name: run.data.tags[name] for name in ("group", "job_type", "tags")} == {
        "group": "study", "job_type": "evaluate", "tags": "pope, tiny",
    }  # fmt: skip
    assert run.data.metrics == {**FINALS, "pope/progress/share": 1.0}
    history = client.get_metric_history(run.info.run_id, "pope/progress/share")
    assert [(point.step, point.value) for point in history] == [(16, 0.5), (32, 1.0)]
    params = {
        "seed": "3", "choices.detector": "logistic", "hub_token": "***", "sets": "['fast', 'full']",
        "pope.task.version": "1", "pope.limit": "8",
    }  # fmt: skip
    assert run.data.params == params
    files = {
        name: client.download_artifacts(run.info.run_id, name, str(tmp_path))
        for name in ("tables/pope/samples.json", "tables/pope/samples/0000-picture.png", "tables/detector/roc.json",
                     "curves/detector/roc.png", "settings/pope.json", "detector/manifest.json", "detector-notes.json")
    }  # fmt: skip
    samples = pd.read_json(files["tables/pope/samples.json"], orient="split")
    assert samples.to_dict("list") == {"sample": ["s0", "s1"], "answer": [TEXT, "yes"]}
    picture = Image.open(files["tables/pope/samples/0000-picture.png"]).convert("RGB")
    assert (picture.size, picture.getpixel((0, 0))) == ((4, 2), (255, 0, 0))
    assert Image.open(files["curves/detector/roc.png"]).size == (640, 480)
    with open(files["detector-notes.json"]) as file:
        assert json.load(file) == {"version": 2, "api_key": "***"}
    with open(files["settings/pope.json"]) as file:
        assert json.load(file) == {"pope": {"task": {"version": "1"}, "limit": 8}}


def test_a_resumed_run_goes_on(tmp_path):
    for status in ("interrupted", "finished"):
        log_everything(logger(tmp_path), tmp_path, status)
        _, (run,) = runs(tmp_path)
        assert run.info.status == {"interrupted": "KILLED", "finished": "FINISHED"}[status]


def test_settings_are_checked(monkeypatch):
    with pytest.raises(ConfigError, match=r"logger\.pictures=-1 should be at least 0"):
        MlflowLogger(pictures=-1)
    with pytest.raises(ConfigError, match=r"logger\.patience=0 should be above 0"):
        MlflowLogger(patience=0)
    monkeypatch.setattr(base.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'needs the package mlflow: pip install "lvlm-stethoscope\[mlflow\]"'):
        MlflowLogger()
