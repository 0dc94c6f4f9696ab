"""Sweeps: every launcher, jobs that fail, the table at the end, the W&B group, answers that jobs share."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from helpers import wandb_reader
from helpers.made_up_runs import made_up_run
from omegaconf import OmegaConf

from stethoscope import Detector
from stethoscope.cli import main
from stethoscope.commands.sweeps import _folder_name, masked_multirun
from stethoscope.core.component import compose
from stethoscope.core.types import Answer, Score
from stethoscope.detection import leaderboard
from stethoscope.storage.records import FAILED, Record
from stethoscope.storage.reuse import copy_answers
from stethoscope.storage.run_dir import RunStore

ROOT = Path(__file__).parents[2]

QUICK = ("detector.C=0.1", "published=false")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(leaderboard, "SHUFFLES", 1)


@pytest.fixture(autouse=True)
def _own_workers():
    """Ends joblib's workers, which would do the jobs of the next test in the folder of this one."""
    yield
    if "joblib.externals.loky" in sys.modules:
        sys.modules["joblib.externals.loky"].get_reusable_executor().shutdown(wait=True)


@pytest.fixture
def call(tmp_path, monkeypatch, capfd):
    """Runs the command in an empty folder; its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")

    def run(*words):
        with pytest.raises(SystemExit) as end:
            main([str(word) for word in words])
        captured = capfd.readouterr()
        return end.value.code, captured.out, captured.err

    return run


def _jobs(folder):
    return json.loads((folder / "sweep.json").read_text())


@pytest.mark.slow
def test_detectors_and_feature_sets_in_one_table(call, tmp_path):
    source = made_up_run(tmp_path / "made", images=150)
    before = {path.name: path.read_bytes() for path in source.iterdir() if path.is_file()}
    features = "detector.features=[nll],[nll,attn_image_l00]"
    code, out, err = call("--multirun", "train", f"run={source}", "detector=logistic,boosting", features, *QUICK)
    assert code == 0, err
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("sweep-train_detector_features_run-")
    jobs = _jobs(folder)
    assert [job["settings"] for job in jobs] == [
        {"detector": kind, "detector.features": names}
        for kind in ("logistic", "boosting") for names in ("[nll]", "[nll,attn_image_l00]")
    ]  # fmt: skip
    runs = [tmp_path / job["run"] for job in jobs]
    for job, run in zip(jobs, runs, strict=True):
        row = RunStore(run).metrics()["detector"]["leaderboard"]["rows"][0]
        assert job["figures"]["AUROC"] == row["metrics"]["auroc"]
        assert job["status"] == "finished"
        assert Detector.load(run / "detector").settings["estimator"] == job["settings"]["detector"]
    assert jobs[0]["above_first"] == {}
    gap = jobs[1]["above_first"]["AUROC"]
    assert gap["value"] == pytest.approx(jobs[1]["figures"]["AUROC"]["value"] - jobs[0]["figures"]["AUROC"]["value"])
    assert gap["low"] <= gap["value"] <= gap["high"]
    page = (folder / "sweep.md").read_text()
    for word in ("| job | detector | detector.features | AUROC | − first |", "[nll,attn\\_image\\_l00]", "finished"):
        assert word in page.replace("\\[", "[").replace("\\]", "]"), page
    with (folder / "sweep.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert {line["metric"] for line in lines} > {"AUROC", "position-controlled", "Brier"}
    assert "− first" in out
    assert {path.name: path.read_bytes() for path in source.iterdir() if path.is_file()} == before
    _check_group(folder, runs)


def _check_group(folder, runs):
    """One W&B group: a run for every job, and one with the table."""
    jobs = [wandb_reader.read(run / "wandb") for run in runs]
    whole = wandb_reader.read(folder / "wandb")
    assert {job.group for job in [*jobs, whole]} == {folder.name}
    assert {job.job_type for job in jobs} == {"train"}
    assert (whole.job_type, whole.name, whole.exit_code) == ("sweep", folder.name, 0)
    for run, job in zip(runs, jobs, strict=True):
        row = RunStore(run).metrics()["detector"]["leaderboard"]["rows"][0]
        assert job.summary["detector/auroc"] == row["metrics"]["auroc"]["value"]
    table = whole.tables["sweep/comparison"]
    assert table["columns"][:3] == ["job", "detector", "detector.features"]
    assert {row[0] for row in table["data"]} == {0, 1, 2, 3}


def test_feature_sets_are_columns_of_the_run(call, tmp_path):
    source = made_up_run(tmp_path / "made", images=120)
    words = ("features.groups=[uncertainty]", "features.names=[]", "logger=none", *QUICK)
    code, _, err = call("train", f"run={source}", "features=fast", *words)
    assert code == 2
    assert "features=fast` (nothing is generated again)" in err
    assert "has no columns of" in err
    words = ("features.groups=[]", "features.names=[nll,attn_image]", "logger=none", *QUICK)
    code, _, err = call("train", f"run={source}", "features=fast", *words)
    assert code == 0, err
    assert Detector.load(source / "detector").schema.names == ("nll", "attn_image_l00")


def test_a_failed_job_is_told_and_does_not_stop_the_others(call, tmp_path):
    source = made_up_run(tmp_path / "made", images=120)
    words = ("detector.features=[nll],[nil],[nll,position]", "logger=none", *QUICK)
    code, out, err = call("train", "--multirun", f"run={source}", "runs=there", "name=study", *words)
    assert code == 2
    last = err.strip().splitlines()[-1]
    assert last.startswith(
        "stethoscope: 1 of 3 jobs of the sweep did not finish, the first is job 1 (detector.features="
    )
    assert "did you mean 'nll'" in err
    (folder,) = (tmp_path / "there").iterdir()
    assert folder.name == "study"  # of the sweep: a job of train has no name
    jobs = _jobs(folder)
    assert [job["status"] for job in jobs] == ["finished", "failed", "finished"]
    assert "unknown feature 'nil'" in jobs[1]["error"]
    assert "unknown feature 'nil'" in (folder / "sweep.md").read_text()
    assert "job 1 (detector.features=[nil]) failed" in out
    assert jobs[2]["above_first"]["AUROC"]["p"] > 0


def test_a_wrong_choice_is_refused_before_any_job(call, tmp_path):
    code, out, err = call("train", "--multirun", "detector=logistic,bosting")
    assert code == 2
    assert "did you mean 'boosting'" in err
    assert "[job" not in out


def test_a_bug_in_one_job_does_not_stop_the_others(call, tmp_path, monkeypatch):
    from stethoscope.commands import train

    real = train.fit

    def broken(*arguments, **more):
        if arguments[4] == 1:
            raise RuntimeError("boom")
        return real(*arguments, **more)

    monkeypatch.setattr(train, "fit", broken)
    source = made_up_run(tmp_path / "made", images=120)
    code, _, err = call("train", "--multirun", f"run={source}", "seed=0,1", "logger=none", *QUICK)
    assert code == 2
    assert "Traceback" in err
    assert err.strip().splitlines()[-1].endswith("RuntimeError: boom")


LAUNCHERS = {
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "submitit_local": ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["joblib", "submitit_local"])
def test_jobs_in_other_processes(name, call, tmp_path, monkeypatch):
    """Errors come back from other processes: into the table, the exit code and the file of the job."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    source = made_up_run(tmp_path / "made", images=100)
    words = [f"run={source}", "hydra.sweep.dir=runs/study", "detector.features=[nll],[nil]", "logger=none", *QUICK]
    code, out, err = call("train", "--multirun", *LAUNCHERS[name], *words)
    assert code == 2
    jobs = _jobs(tmp_path / "runs" / "study")
    assert [job["status"] for job in jobs] == ["finished", "failed"]
    assert "unknown feature 'nil'; did you mean 'nll'" in jobs[1]["error"]
    assert "1 of 2 jobs of the sweep did not finish, the first is job 1" in err
    assert "unknown feature 'nil'" in out
    section = RunStore(tmp_path / jobs[0]["run"]).metrics()["detector"]
    assert jobs[0]["figures"]["AUROC"] == section["leaderboard"]["rows"][0]["metrics"]["auroc"]


def test_a_launcher_that_cannot_start_is_one_line(call, tmp_path):
    code, _, err = call("train", "--multirun", "experiment=sweep_slurm", "logger=none")
    assert code == 2
    assert "the launcher gave up" in err
    assert "srun" in err


def test_a_launcher_that_is_not_installed_names_the_extra():
    script = (
        "import sys\nsys.modules['hydra_plugins.hydra_joblib_launcher.config'] = None\n"
        "from stethoscope.cli import main\nmain(['train', '--multirun', 'hydra/launcher=joblib', 'seed=0,1'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == (
        'stethoscope: hydra/launcher=joblib is not installed: pip install "lvlm-stethoscope[sweeps]"'
    )


def test_what_an_agent_of_wandb_would_call(monkeypatch):
    """W&B's own code makes the command line of the sweep file; Hydra composes it."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    plan = yaml.safe_load((ROOT / "scripts" / "wandb_sweep.yaml").read_text())
    drawn = {name: {"value": choice["values"][-1]} for name, choice in plan["parameters"].items()}
    known = {**create_sweep_command_args({"args": drawn}), "program": [plan["program"]]}
    words = []
    for part in create_sweep_command(plan["command"]):
        words += known[part[2:-1]] if part.startswith("${") and part.endswith("}") else [part]
    assert words[:2] == ["stethoscope", "benchmark"]
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    config = compose(words[2:], "benchmark")
    assert (config.name, config.seed, config.detector.factored) == ("abc123", 2, True)
    assert config.logger.wandb.mode == "online"
    name = plan["metric"]["name"].split("/")
    assert name[0] == "detector"
    assert name[1] in leaderboard.METRICS


AGENT = """
import sys, yaml
from wandb.wandb_agent import Agent
import queue

class Service:  # in the place of W&B's: one sweep, one job
    def __init__(self, plan, drawn):
        self.plan, self.drawn = plan, drawn
    def sweep(self, name, specs):
        return {"config": yaml.safe_dump(self.plan)}
    def register_agent(self, host, sweep_id):
        return {"id": "agent"}
    def agent_heartbeat(self, agent, metrics, status):
        given = {name: {"value": value} for name, value in self.drawn.items()}
        return [] if status else [{"type": "run", "run_id": "abc12345", "program": sys.argv[2], "args": given}]

plan = yaml.safe_load(open(sys.argv[1]))
drawn = {"detector": "boosting", "features": "fast", "seed": 1}
Agent(Service(plan, drawn), queue.Queue(), sweep_id="study", count=1).run()
"""


@pytest.mark.slow
def test_an_agent_of_wandb_runs_the_sweep_file(tmp_path):
    """W&B's own agent starts the job, whose W&B run has the drawn settings and the figure that the sweep maximises."""
    plan = yaml.safe_load((ROOT / "scripts" / "wandb_sweep.yaml").read_text())
    assert plan["command"][-1] == "${args_no_hyphens}"
    small = ["logger.wandb.mode=offline", "~task@pope", "limit=60", "published=false"]
    plan["command"] = [word for word in plan["command"][:-1] if "mode=" not in word] + small + plan["command"][-1:]
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    program = Path(sys.executable).parent / plan["program"]
    env = {**os.environ, "WANDB_SWEEP_ID": "study", "WANDB_DIR": str(tmp_path)}
    words = [sys.executable, "-c", AGENT, str(tmp_path / "plan.yaml"), str(program)]
    ended = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900)
    assert (tmp_path / "runs" / "abc12345").is_dir(), ended.stdout + ended.stderr
    run = wandb_reader.read(tmp_path / "runs" / "abc12345")
    assert run.run_id == "abc12345"
    assert (run.config["seed"], run.config["detector"], run.config["features"]) == (1, "boosting", "fast")
    assert run.config["choices"]["detector"] == "boosting"
    assert run.config["split"] == {"train": 0.5, "calibration": 0.2}
    assert plan["metric"]["name"] in run.summary
    assert run.exit_code == 0


@pytest.mark.parametrize("name", ["sweep_joblib", "sweep_slurm"])
def test_example_sweeps_compose(name, monkeypatch):
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with hydra.initialize_config_module("stethoscope.conf", version_base="1.3"):
        config = hydra.compose("benchmark", [f"experiment={name}"], return_hydra_config=True)
    assert set(config.hydra.sweeper.params) == {"detector", "features"}
    assert "auncher" in config.hydra.launcher._target_


def _told(store, task):
    return {record.sample_id: record.answer for record in store.records(task)}


def test_answers_are_generated_once(call, tmp_path, monkeypatch):
    """The second job of a sweep asks nothing; a third, of another kind of generation, asks anew."""
    from stethoscope.adapters.hf import HfAdapter

    asked, real = [], HfAdapter.generate

    def counted(self, encoded, generation=None):
        asked.append(len(encoded))
        return real(self, encoded, generation)

    monkeypatch.setattr(HfAdapter, "generate", counted)
    words = ("task=chair", "task.scenes=10", "callbacks=none", "logger=none", "name=study")
    code, _, err = call("evaluate", "--multirun", "seed=0,1", *words)
    assert code == 0, err
    assert sum(asked) == 10
    assert "10 answers to chair are those of another job" in err
    jobs = [RunStore(tmp_path / "runs" / "study" / f"seed-{seed}") for seed in (0, 1)]
    assert _told(jobs[0], "chair") == _told(jobs[1], "chair")
    assert jobs[0].metrics()["chair"]["counts"] == jobs[1].metrics()["chair"]["counts"]
    code, _, err = call("evaluate", "--multirun", "generation=greedy,sample", *words)
    assert code == 0, err
    assert sum(asked) == 20  # greedy ones are there, sampled ones are not
    (gap,) = _jobs(tmp_path / "runs" / "study")[1]["above_first"].values()
    assert gap["low"] <= gap["value"] <= gap["high"]


def test_what_a_killed_job_left_is_taken_over(tmp_path):
    """Half of the answers are there, one of them failed, the last line is cut off."""
    source, target = RunStore(tmp_path / "a"), RunStore(tmp_path / "b")
    fingerprint = {"adapter": {"model_id": "m"}, "task": {"name": "chair"}}
    answer = Answer("a dog", (1, 2), ((0, 1), (2, 5)), (-0.1, -0.2), True)
    records = [
        Record("chair", f"{index}", "g", "all", "x.png", "What?", answer=answer, score=Score("ok", {}))
        for index in range(4)
    ]
    source.open_task("chair", fingerprint, {"names": ["nll"]})
    source.append([*records[:2], replace(records[2], status=FAILED, score=None, error="no")])
    with source.samples_file.open("ab") as file:
        file.write(b'{"task": "chair", "sample_id": "3"')
    other = RunStore(tmp_path / "c")
    other.open_task("chair", {**fingerprint, "adapter": {"model_id": "another"}})
    other.append(records)
    broken = RunStore(tmp_path / "d")  # the longest, but damaged: the next one is copied
    broken.open_task("chair", fingerprint)
    broken.append(records * 20)
    broken.samples_file.write_bytes(broken.samples_file.read_bytes().replace(b"chair", b"ch\xffir", 1))
    with pytest.warns(UserWarning, match=r"no answers are copied from .*d: .*samples.jsonl:1 is damaged"):
        assert copy_answers(tmp_path, target, "chair", fingerprint) == 2
    assert _told(target, "chair") == {"0": answer, "1": answer}
    assert copy_answers(tmp_path, target, "chair", fingerprint) == 0


def test_jobs_whose_settings_begin_alike_have_folders_of_their_own():
    names = {_folder_name([f"model.model_id={'/checkpoints' * 20}/{step}"]) for step in (100, 200)}
    assert len(names) == 2
    assert max(map(len, names)) == 120
    assert _folder_name(["seed=1"]) == "seed-1"


@pytest.mark.slow
def test_a_worker_that_is_killed_is_told(call, tmp_path, monkeypatch):
    """The system may kill a job for its memory: no word is left by it, and the launcher may give up."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "deadly.py").write_text(
        "import os, signal\nfrom stethoscope import Detector\n\nclass Deadly(Detector):\n"
        "    def fit(self, *arguments):\n        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    source = made_up_run(tmp_path / "made", images=100)
    words = [f"run={source}", "hydra.sweep.dir=runs/study", "plugins=[deadly]", "logger=none", *QUICK]
    targets = "detector._target_=stethoscope.detection.detector.Detector,deadly.Deadly"
    for launcher in LAUNCHERS.values():
        code, out, err = call("train", "--multirun", *launcher, targets, *words)
        assert code == 2
        assert "the launcher gave up" in err
        (lost,) = [job for job in _jobs(tmp_path / "runs" / "study") if job["job"] == 1]
        assert (lost["status"], lost["figures"]) == ("running", {})
        assert "running: it left no message" in out


def test_multirun_yaml_is_masked_though_hydra_looks_for_plugins_later(monkeypatch, tmp_path):
    from hydra._internal.core_plugins import basic_sweeper
    from hydra.core.plugins import Plugins
    from hydra.core.singleton import Singleton

    monkeypatch.delitem(Singleton._instances, Plugins, raising=False)  # as in a process that begins
    config = {"api_key": "abc", "hydra": {"overrides": {"task": ["+api_key=abc"]}, "job": {"override_dirname": "abc"}}}
    with masked_multirun():
        Plugins.instance()
        basic_sweeper.OmegaConf.save(OmegaConf.create(config), tmp_path / "multirun.yaml")
    assert "abc" not in (tmp_path / "multirun.yaml").read_text()
