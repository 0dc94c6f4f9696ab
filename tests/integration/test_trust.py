"""A file of a run names no code: classes only of a contract, packages and remote code only by the present command."""

import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from stethoscope.adapters import tiny
from stethoscope.app.runs import Runs
from stethoscope.commands.sweeps import Sweep
from stethoscope.core.errors import StethoscopeError
from stethoscope.report.run_source import RunReader
from stethoscope.storage.run_dir import saved_task
from stethoscope.storage.sweep_jobs import FINISHED, Job
from stethoscope.tasks.chair import Chair
from stethoscope.tasks.pope import Pope

HARMLESS = "stethoscope.tasks.chair.Chair"


class Payload:
    """Unpickled it leaves a mark in the current folder."""

    def __reduce__(self):
        return Path.touch, (Path("pwned"),)


@pytest.fixture
def hostile(copy, tmp_path):
    """Rewrites the files of a copied run that say what its task is; gives the copy."""
    (copy / "maps.jsonl").unlink()
    (tmp_path / "pickled.bin").write_bytes(pickle.dumps(Payload()))

    def rewrite(path, settings):
        described = json.loads((copy / "fingerprint.json").read_text())
        described["chair"]["task"] |= {"class": path, "settings": settings}
        (copy / "fingerprint.json").write_text(json.dumps(described))
        config = yaml.safe_load((copy / "config.yaml").read_text())
        config["chair"] = {"_target_": path, **settings}
        config["plugins"] = [path.split(".")[0], "pandas"]
        (copy / "config.yaml").write_text(yaml.safe_dump(config))
        return copy

    return rewrite


PICKLED = {"filepath_or_buffer": "pickled.bin", "compression": None}
GADGETS = {
    "through an import of ours": ("stethoscope.core.token_table.pd.read_pickle", PICKLED, "module"),
    "a name that a module of ours imports": ("stethoscope.core.component.Path", {}, "class or function"),
    "a module of ours": ("stethoscope.core.files.os", {}, "class or function"),
    "a function of ours": ("stethoscope.adapters.load", {"model": "a/b"}, "Task"),
    "a class of another contract": ("stethoscope.adapters.testbed.TestbedAdapter", {}, "Task"),
    "a plug-in of its own": ("pandas.read_pickle", PICKLED, "plugins=[pandas]"),
    "a class in its settings": (HARMLESS, {"scenes": {"_target_": "os.getcwd"}}, "class"),
    "a class in a list": (HARMLESS, {"image_ids": [{"_target_": "os.getcwd"}]}, "chair.image_ids[0]._target_"),
    "arguments by position": (HARMLESS, {"_args_": ["files"]}, "chair._args_"),
    "a call put off": (HARMLESS, {"_partial_": True}, "chair._partial_"),
    "no name": ("stethoscope.tasks.chair.Chair()", {}, "dotted name"),
    "a name above": ("..stethoscope.tasks.chair.Chair", {}, "dotted name"),
}
"""What a run's files name: (class path, settings, the key noun of the message)."""


@pytest.mark.parametrize("kind", GADGETS)
def test_no_class_of_a_run_but_a_task(hostile, stethoscope, messages, tmp_path, kind):
    path, settings, noun = GADGETS[kind]
    run = hostile(path, settings)
    with pytest.raises(StethoscopeError) as error:
        saved_task(RunReader.read(run).store, "chair")
    assert noun in str(error.value)
    assert "\n" not in str(error.value)
    messages.record(kind, str(error.value), tmp_path)
    assert not Path("pwned").exists()


OFTEN = ("through an import of ours", "a class in its settings")


@pytest.mark.parametrize(
    "kind", [kind if kind in OFTEN else pytest.param(kind, marks=pytest.mark.slow) for kind in GADGETS]
)
def test_the_report_shows_a_run_of_no_task_without_pictures(hostile, stethoscope, capsys, kind):
    from stethoscope.cli import main

    run = hostile(*GADGETS[kind][:2])
    with pytest.raises(SystemExit) as end:
        main(["report", str(run)])
    assert end.value.code == 0
    assert "note: the gallery has no pictures" in capsys.readouterr().err
    assert not Path("pwned").exists()


def test_whole_messages_are_those_of_the_snapshot(messages, request):
    if request.config.getoption("--update-messages"):
        pytest.skip("the snapshot is written anew")
    assert messages.differences(GADGETS) == {}


def test_a_package_counts_that_this_command_names_and_still_gives_tasks_only(hostile, stethoscope, tmp_path):
    run = hostile("pandas.read_pickle", PICKLED)
    same = shutil.copytree(run, tmp_path / "same")
    assert "add plugins=[pandas] if you trust it" in stethoscope("compare", run, same)
    for plugins in ("plugins=pandas", "plugins=[pandas]"):
        assert "is no Task" in stethoscope("compare", run, same, plugins)
        stethoscope("report", run, plugins, code=0)
    assert not Path("pwned").exists()


def test_the_app_shows_a_hostile_run_without_running_it(hostile, stethoscope, tmp_path):
    run = hostile("stethoscope.core.token_table.pd.read_pickle", PICKLED)
    runs = Runs(run.parent, run, tmp_path)
    assert not json.loads(runs.listing("copy"))["note"]
    record = next(iter(RunReader.read(run).store.records("chair")))
    with pytest.raises(StethoscopeError, match="picture of sample"):
        runs._read_picture(RunReader.read(run), record, [])
    assert not Path("pwned").exists()


def test_a_sweep_believes_the_plugins_of_its_jobs_command_lines(finished, copy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace("plugins: []", "plugins: [pandas]"))
    believed = []

    def made(store, name, plugins):
        believed.append(plugins)
        return {"chair": Chair, "pope": Pope}[name]()

    monkeypatch.setattr("stethoscope.storage.run_dir.saved_task", made)
    sweep = Sweep("benchmark", tmp_path / "sweep", (), "key")
    for number, folder in enumerate((finished / "sampled", copy)):
        job = Job("key", number, (f"generation={number}",), str(folder), FINISHED, plugins=("mine",) if number else ())
        job.write(sweep.folder)
    sweep.end()
    assert believed
    assert all(plugins == ["mine"] for plugins in believed)


@pytest.fixture
def answered(finished, tmp_path):
    """A copy of a run of ``evaluate``, whose ``config.yaml`` may be changed."""
    folder = shutil.copytree(finished / "alone", tmp_path / "answered")

    def rewrite(**changes):
        config = yaml.safe_load((folder / "config.yaml").read_text())
        (folder / "config.yaml").write_text(yaml.safe_dump(config | changes))
        return folder

    return rewrite


def test_extract_takes_no_package_from_the_run(answered, stethoscope, tmp_path):
    (tmp_path / "weights.bin").write_bytes(pickle.dumps(Payload()))
    model = {"_target_": "pandas.read_pickle", "filepath_or_buffer": "weights.bin"}
    run = answered(model=model, plugins=["pandas"])
    assert "add plugins=[pandas] if you trust it" in stethoscope("extract", f"run={run}")
    assert "is no Adapter" in stethoscope("extract", f"run={run}", "plugins=[pandas]")
    assert not Path("pwned").exists()


def test_extract_takes_no_trust_in_remote_code_from_the_run(answered, stethoscope, tmp_path):
    model, processor = tiny.build("llava")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    described = json.loads((tmp_path / "model" / "config.json").read_text())
    own = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig", "AutoModelForImageTextToText": "evil.E"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(described | own))
    (tmp_path / "model" / "evil.py").write_text("import pathlib; pathlib.Path('pwned').touch()\n")
    node = {"_target_": "stethoscope.adapters.hf.HfAdapter", "model_id": str(tmp_path / "model")}
    run = answered(model={**node, "trust_remote_code": True})
    assert "add model.trust_remote_code=true if you trust the run" in stethoscope("extract", f"run={run}")
    for quietly in ({}, {"trust_remote_code": None}, {"trust_remote_code": False}):
        line = stethoscope("extract", f"run={answered(model={**node, **quietly})}")
        assert "brings its own code; set trust_remote_code=true to run it" in line
    assert not Path("pwned").exists()
    run = answered(model={**node, "trust_remote_code": True})
    stethoscope("extract", f"run={run}", "model.trust_remote_code=true")
    assert Path("pwned").exists()  # of this command line, it does count


def test_extract_writes_layers_where_this_command_says(answered, stethoscope, tmp_path):
    node = yaml.safe_load((answered() / "config.yaml").read_text())["model"]
    run = answered(model={**node, "offload_folder": str(tmp_path / "elsewhere")})
    assert "add model.offload_folder=" in stethoscope("extract", f"run={run}")
    assert not (tmp_path / "elsewhere").exists()


def test_nothing_in_a_runs_configuration_is_resolved(answered, stethoscope, monkeypatch):
    monkeypatch.setenv("MY_SECRET", "hf_secret")
    node = yaml.safe_load((answered() / "config.yaml").read_text())["model"]
    line = stethoscope("extract", f"run={answered(model={**node, 'dtype': '${oc.env:MY_SECRET}'})}")
    assert "${oc.env:MY_SECRET}" in line
    assert "hf_secret" not in line


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n",
        "model: &m {x: *m}\n",
        "[" * 3000,
        "model: !!python/object/apply:os.getcwd []\n",
        "- a list\n",
        "a: \x00\n",
        "? [1]\n: 2\n",
        "\xff",
    ],
)
def test_a_damaged_configuration_is_one_line(answered, stethoscope, text):
    run = answered()
    (run / "config.yaml").write_bytes(text.encode("latin-1"))
    line = stethoscope("extract", f"run={run}")
    assert "config.yaml is damaged" in line
    assert len(line) < 500


def test_a_setting_that_is_missing_is_named(answered, stethoscope):
    run = answered()
    config = yaml.safe_load((run / "config.yaml").read_text())
    del config["batch_size"]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert "its config.yaml has no batch_size" in stethoscope("extract", f"run={run}")


def test_a_report_stays_offline_whatever_the_run_leaves_out(copy):
    """A file without ``local_files_only`` does not make a report fetch data."""
    described = json.loads((copy / "fingerprint.json").read_text())
    described["chair"]["task"]["settings"] = {"source": "hub", "dataset": "owner/name"}
    (copy / "fingerprint.json").write_text(json.dumps(described))
    (copy / "config.yaml").unlink()
    task = saved_task(RunReader.read(copy).store, "chair")
    assert isinstance(task, Chair)
    assert task.hub.local_files_only


def test_the_command_as_a_module_is_no_trap():
    """A run that names it has it imported, and no command runs."""
    sys.modules.pop("stethoscope.__main__", None)
    from stethoscope.core.component import import_name
    from stethoscope.core.errors import ConfigError

    with pytest.raises(ConfigError, match="cannot be imported"):
        import_name("stethoscope.__main__.Task", "task._target_")
