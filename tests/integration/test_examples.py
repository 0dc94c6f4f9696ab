"""The files of ``examples/``: each runs as its docstring says, and adding a part is one file and one YAML."""

import csv
import importlib
import io
import json
import re
import runpy
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from helpers.chat_server import serving

from stethoscope import diagnose, testbed
from stethoscope.detection.detector import Detector
from stethoscope.features import FEATURES
from stethoscope.storage.run_dir import RunStore

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
FILES = sorted(EXAMPLES.glob("*.py"))
CONF = ("--config-dir", EXAMPLES / "conf")


@pytest.fixture
def examples(monkeypatch):
    """Put ``examples/`` on the path; forget its modules and features afterwards."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    torch.set_num_threads(1)
    features = dict(FEATURES)
    yield EXAMPLES
    FEATURES.clear()
    FEATURES.update(features)
    for name in {path.stem for path in FILES} & set(sys.modules):
        del sys.modules[name]


def run_example(name, capsys):
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_example_is_short(path):
    assert len(path.read_text().splitlines()) <= 60


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_example_is_run_by_a_test_of_this_file(path):
    assert re.search(rf"def test_{path.stem}\b", Path(__file__).read_text())


def test_evaluate(examples, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    output = run_example("evaluate", capsys)
    assert re.search(r"adversarial F1: 0\.\d{3} \[0\.\d{3}, 0\.\d{3}\]", output)
    assert "0 failed" in output


@pytest.mark.slow
def test_train_detector(examples, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    output = run_example("train_detector", capsys)
    assert float(re.search(r"AUROC (0\.\d+)", output)[1]) > 0.7
    assert Detector.load("runs/example-chair").fitted


@pytest.mark.slow
def test_stream(examples, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    output = run_example("stream", capsys)
    assert output.startswith("The ")
    assert re.search(r"^ *\d+% \w+", output, re.MULTILINE)


def test_serve(examples, finished, monkeypatch):
    """Two clients at once, while a third hangs up in the middle."""
    monkeypatch.setenv("DETECTOR", str(finished / "sampled"))
    serve = importlib.import_module("serve")
    files, question = [], {"question": "Please describe this image in detail."}
    for scene in testbed.scenes(9):
        file = io.BytesIO()
        scene.image().save(file, "PNG")
        files.append(file.getvalue())

    def ask(address, file, lines=None):
        """Events of one answer, as (kind, data); after some lines the client hangs up."""
        with (
            httpx.Client(trust_env=False, timeout=120) as client,
            client.stream("POST", address, params=question, content=file) as response,
        ):
            assert response.status_code == 200
            assert response.headers["content-type"].startswith("text/event-stream")
            received = "\n".join(islice(response.iter_lines(), lines))
        pairs = [event.split("\ndata: ") for event in received.split("\n\n") if "\ndata: " in event]
        return [(kind.removeprefix("event: "), json.loads(data)) for kind, data in pairs]

    with serving(SimpleNamespace(app=lambda: serve.app)) as address, ThreadPoolExecutor(3) as clients:
        address = address.removesuffix("v1")
        for file, words, detail in ((b"no picture", "Is it?", "not an intact file"), (files[0], " ", "question")):
            refused = httpx.post(address, params={"question": words}, content=file, trust_env=False)
            assert refused.status_code == 422
            assert detail in str(refused.json()["detail"])
        assert [kind for kind, _ in ask(address, files[0], lines=9)] == ["token"] * 3
        answers = list(clients.map(partial(ask, address), files))
    warned = 0
    for scene, events in zip(testbed.scenes(9), answers, strict=True):
        tokens = "".join(data for kind, data in events if kind == "token")
        assert events[-1] == ("end", tokens)
        expected = diagnose(serve.adapter, scene.image(), **question, detector=finished / "sampled")
        assert expected.answer.text == tokens
        warnings = [(data["object"], data["start"]) for kind, data in events if kind == "warning"]
        assert warnings == [(mention.object, mention.start) for mention in expected.mentions if mention.warned]
        warned += len(warnings)
    assert warned


@pytest.mark.slow
def test_diagnose(examples, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    output = run_example("diagnose", capsys)
    assert "warned" in output
    assert "most relevant region" in output
    assert Path("runs/example-diagnosis.html").read_text().startswith("<!")


@pytest.mark.slow
def test_custom_model(examples, stethoscope):
    words = ("model=pooled", "model.random_init=tiny", "task=pope", "task.scenes=2", "logger=none", "callbacks=none")
    output = stethoscope("evaluate", *CONF, "plugins=[custom_model]", *words, "name=one", code=0)
    assert "0 failed" in output
    assert "custom_model.PooledAdapter" in Path("runs/one/config.yaml").read_text()


def test_custom_task(examples, stethoscope):
    words = ("task=both_right", "task.scenes=10", "logger=none", "callbacks=none", "name=one")
    stethoscope("evaluate", *CONF, "plugins=[custom_task]", *words, code=0)
    metrics = json.loads(Path("runs/one/metrics.json").read_text())["both_right"]["metrics"]
    values = {(row["metric"], row["subset"]): row["value"] for row in metrics}
    assert values["pairs", "all"] <= min(values["accuracy", "yes"], values["accuracy", "no"]) <= 1
    line = stethoscope("evaluate", *CONF, "plugins=[custom_task]", "task=both_right", "task.scene=3")
    assert "'scene'; did you mean 'scenes'? There are: scenes" in line


def test_custom_feature(examples, finished, stethoscope, tmp_path):
    run = shutil.copytree(finished / "alone", tmp_path / "run")
    words = (f"run={run}", "features=surprise", "callbacks=none")
    stethoscope("extract", *CONF, "plugins=[custom_feature]", *words, code=0)
    table = pd.read_parquet(run / "tokens.parquet")
    assert {"running_nll", "token_length", "attn_image_gain"} <= set(table.columns)
    assert (table["token_length"] == table["end"] - table["start"]).all()
    layers = table.filter(regex=r"^attn_image_l\d+$")
    np.testing.assert_allclose(table["attn_image_gain"], layers.iloc[:, -1] - layers.iloc[:, 0], atol=1e-6)


@pytest.mark.slow
def test_custom_detector(examples, finished, stethoscope, tmp_path):
    words = ("detector=few_columns", "detector.count=3", "logger=none", "published=false")
    words = (*words, f"run={finished / 'greedy'}", f"run_dir={tmp_path / 'trained'}")
    output = stethoscope("train", *CONF, "plugins=[custom_detector]", *words, code=0)
    assert "detector" in output
    detector = Detector.load(tmp_path / "trained")  # without the example's module
    assert type(detector) is Detector
    assert len(detector.features) == 3


def test_custom_estimator(examples, finished, stethoscope, tmp_path):
    """Trained, used and reported on by the command line; without its plug-in every command says what to add."""
    plugins, run = "plugins=[custom_estimator]", finished / "greedy"
    own = ("detector.estimator._target_=custom_estimator.NearestMentions", "detector.estimator.neighbours=30")
    words = (f"run={run}", f"run_dir={tmp_path / 'trained'}", "logger=none", "published=false", *own)
    stethoscope("train", plugins, *words, code=0)
    detector = Detector.load(tmp_path / "trained")
    assert detector.settings["estimator"] == {"_target_": "custom_estimator.NearestMentions", "neighbours": 30}
    probabilities = detector.predict(RunStore(run).tokens("chair")).round(9)
    assert 1 < len(np.unique(probabilities)) <= 31  # shares of 30 neighbours, calibrated
    for command in (
        ("diagnose", f"detector={tmp_path / 'trained'}", f"out={tmp_path / 'page.html'}"),
        ("evaluate", "task=chair", "task.scenes=2", "mitigation=drop", f"mitigation.detector={tmp_path / 'trained'}"),
        ("report", str(tmp_path / "trained"), "pictures=false"),
    ):
        sys.modules.pop("custom_estimator")
        line = stethoscope(*command, code=2)
        assert "needs the estimator custom_estimator.NearestMentions, which is not imported; add plugins=[cust" in line
        stethoscope(*command, plugins, code=0)


def test_custom_callback(examples, stethoscope):
    words = ("callbacks=lengths", "task=chair", "task.scenes=7", "logger=none", "name=one")
    stethoscope("evaluate", *CONF, "plugins=[custom_callback]", *words, code=0)
    events = [json.loads(line) for line in Path("runs/one/events.jsonl").read_text().splitlines()]
    tables = {event["name"]: event["rows"] for event in events if event["event"] == "table"}
    lengths = [length for _, length in tables["chair/longest"]]
    assert len(lengths) == 5
    assert lengths == sorted(lengths, reverse=True)


def test_custom_logger(examples, stethoscope):
    words = ("logger=[prometheus,csv]", "logger.file=now.prom", "task=pope", "task.scenes=2", "name=one")
    stethoscope("evaluate", *CONF, "plugins=[custom_logger]", *words, code=0)
    values = dict(line.rsplit(" ", 1) for line in Path("runs/one/now.prom").read_text().splitlines())
    assert values['stethoscope_running{run="one"}'] == "0"
    assert float(values['stethoscope_figure{run="one",name="pope/progress/share"}']) == 1.0
    with Path("runs/one/csv/metrics.csv").open() as file:  # beside it, the same figures
        figures = {row["name"]: float(row["value"]) for row in csv.DictReader(file)}
    for name in ("pope/random/accuracy", "pope/f1"):
        assert float(values[f'stethoscope_figure{{run="one",name="{name}"}}']) == figures[name]


@pytest.mark.parametrize("path", sorted((EXAMPLES / "conf").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_has_a_title_and_names_its_module(path):
    text = path.read_text()
    assert text.startswith("# ")
    node = yaml.safe_load(text)
    targets = [value["_target_"] for value in node.values() if isinstance(value, dict)] or [node["_target_"]]
    assert all((EXAMPLES / f"{target.split('.')[0]}.py").is_file() for target in targets)
