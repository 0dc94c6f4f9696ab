"""The doctor sees what is there and what is missing, and changes nothing."""

import json
import os
import subprocess
import sys

import pytest

from stethoscope.cli import main
from stethoscope.commands import doctor


def findings(check):
    return {finding.what: (finding.state, finding.text) for finding in check()}


def test_the_whole_report(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["doctor"])
    report = capsys.readouterr().out
    assert end.value.code == 0, report
    checks = {line[6:22].strip(): line[:5].strip() for line in report.splitlines()}
    assert checks["python"] == checks["torch"] == checks["embedded model"] == checks["run directory"] == "ok"
    assert {"hub", "wandb", "memory", "disk", "extra app", "extra sweeps"} <= checks.keys()
    assert "extra dev" not in checks
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def installed(monkeypatch):
    """A made-up distribution: one package of another version, one that is not there, two extras."""
    lines = [
        "torch<1", "nowhere-to-be-found>=2", 'numpy; extra == "good"', 'nowhere-either>=3; extra == "bad"',
        'numpy; python_version < "3"',
    ]  # fmt: skip
    metadata = {"Provides-Extra": ["good", "bad", "dev"]}

    class Metadata:
        get_all = staticmethod(metadata.get)

    monkeypatch.setattr("importlib.metadata.requires", lambda name: lines)
    monkeypatch.setattr("importlib.metadata.metadata", lambda name: Metadata)


def test_packages_and_extras_that_are_missing(installed):
    checks = findings(doctor._installation)
    assert checks["torch"][0] == checks["nowhere-to-be-found"][0] == "FAIL"
    assert checks["torch"][1].endswith('does not fit; pip install "torch<1"')
    assert checks["nowhere-to-be-found"][1] == 'missing; pip install "nowhere-to-be-found>=2"'
    assert "numpy" not in checks
    assert {name: check for name, check in checks.items() if name.startswith("extra ")} == {
        "extra good": ("ok", "installed"),
        "extra bad": ("note", 'without nowhere-either; pip install "lvlm-stethoscope[bad]"'),
    }


@pytest.mark.parametrize(("value", "words"), [("1", "offline (HF_HUB_OFFLINE)"), ("0", "may download models")])
def test_offline(monkeypatch, value, words):
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert words in findings(doctor._network)["hub"][1]


def test_wandb_without_telling_the_key(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert findings(doctor._network)["wandb"][0] == "note"
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password verysecret\n")
    assert findings(doctor._network)["wandb"] == ("ok", "signed in")


def test_a_run_that_is_under_way_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = (
        "import sys; from pathlib import Path; from stethoscope.storage.lock import RunLock; "
        "lock = RunLock(Path('runs/mine')); "
        "lock.acquire(); print('held', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": tmp_path}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        assert process.stdout.readline() == "held\n"
        checks = findings(doctor._locks)
        process.stdin.close()
    assert checks["run directory"][0] == "ok"
    state, text = checks["mine"]
    assert state == "note"
    assert str(process.pid) in text
    assert set(findings(doctor._locks)) == {"run directory"}  # the lock went with its process


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    tmp_path.chmod(0o500)
    monkeypatch.chdir(tmp_path)
    assert findings(doctor._locks)["run directory"][0] == "FAIL"


def test_secrets_are_in_no_file_of_a_run(tmp_path, monkeypatch):
    """A token in the environment and in the settings: neither the run directory nor the events hold it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    monkeypatch.setenv("WANDB_API_KEY", "verysecretkey" * 3)
    words = [
        "evaluate",
        "model.random_init=tiny",
        "task=pope",
        "task.scenes=1",
        "limit=2",
        "generation.max_new_tokens=2",
    ]
    with pytest.raises(SystemExit) as end:
        main([*words, "name=one", "+task_token=hf_verysecret", "+api_key=verysecret"])
    assert end.value.code == 0
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert json.loads((tmp_path / "runs" / "one" / "metrics.json").read_text())
    held = [path for path in files if b"verysecret" in path.read_bytes()]
    assert held == []
