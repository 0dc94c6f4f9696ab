"""Runs of several real processes, over gloo on this machine, with the tiny world; and what each of them may do."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from helpers.messages import error_lines
from helpers.tiny_run import SlowAdapter
from helpers.tiny_world import TinyFeatures, TinyTask

from stethoscope.adapters.load_settings import Loading
from stethoscope.cli import main
from stethoscope.core.errors import CapabilityError, ConfigError
from stethoscope.evaluation.distributed import DistributedState
from stethoscope.evaluation.evaluator import Evaluator
from stethoscope.storage.run_dir import RunStore

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "tests/helpers/tiny_run.py")


@pytest.fixture(scope="module")
def kill_runs():
    spec = importlib.util.spec_from_file_location("kill_runs", ROOT / "tests/slow/kill_runs.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["kill_runs"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


class Launch:
    """A run of the tiny world in some processes."""

    def __init__(self, kill_runs, folder, processes, **options):
        self.workers = kill_runs.launch([TINY, str(folder), json.dumps(options)], processes, listen=True)

    def end(self):
        """Exit codes, and what every process has said on stderr."""
        errors = [worker.communicate(timeout=300)[1].decode() for worker in self.workers]
        return [worker.returncode for worker in self.workers], errors


def alone_in(folder, count, **settings):
    """The same run in this process."""
    evaluator = Evaluator(batch_size=2, features=TinyFeatures(), run_dir=folder)
    return evaluator.run(SlowAdapter(**settings), TinyTask(count=count))


def told(folder, processes):
    return [json.loads((folder / f"results-{rank}.json").read_text()) for rank in range(processes)]


def test_two_processes_do_what_one_does_and_each_its_share(kill_runs, tmp_path):
    single, two = tmp_path / "one", tmp_path / "two"
    alone = alone_in(single, 23, fails=[7])
    codes, errors = Launch(kill_runs, two, 2, count=23, fails=[7]).end()
    assert codes == [0, 0]
    assert kill_runs.differences(single, two) == []
    shares = told(tmp_path, 2)
    assert shares[0]["results"]["metrics"] == alone.to_dict()["metrics"]
    assert shares[0]["results"] == shares[1]["results"]
    answered = [set(share["answered"]) for share in shares]
    assert all(answered)
    assert sum(map(len, answered)) == len(set.union(*answered)) == 23
    assert "tiny: 23/23" in errors[0]
    assert errors[1] == ""


@pytest.mark.slow
def test_another_number_of_processes_goes_on_and_does_nothing_twice(kill_runs, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    alone_in(whole, 40)
    killed = Launch(kill_runs, cut, 2, count=40, pause=0.1)
    while len(kill_runs._records(cut)) < 8:
        time.sleep(0.02)
    for worker in killed.workers:
        worker.kill()
    killed.end()
    kept = [line["sample_id"] for line in kill_runs._records(cut)]
    assert max(Counter(kept).values()) == 1
    assert Launch(kill_runs, cut, 3, count=40).end()[0] == [0, 0, 0]
    again = {f"s{number:02d}" for share in told(tmp_path, 3) for number in share["answered"]}
    assert again == {f"s{number:02d}" for number in range(40)} - set(kept)
    assert kill_runs.differences(whole, cut) == []


def test_an_error_of_one_process_ends_all_with_its_own_line(kill_runs, tmp_path):
    number = next(number for number in range(200) if DistributedState(1, 2).owns(f"image{number // 2}"))
    run = Launch(kill_runs, tmp_path / "run", 2, count=200, pause=0.05, fails=[number], on_error="raise")
    begun = time.monotonic()
    codes, errors = run.end()
    assert codes == [2, 2]
    assert errors[1].splitlines()[-1] == "tiny: the model broke"
    assert "broke" not in errors[0]
    assert "Traceback" not in errors[0] + errors[1]
    assert time.monotonic() - begun < 300  # a process whose partner has gone waits ten minutes
    assert RunStore(tmp_path / "run").status() == {"tiny": "failed"}


@pytest.mark.slow
def test_samples_that_all_fail_are_an_error_however_few_each_process_has(kill_runs, tmp_path):
    codes, errors = Launch(kill_runs, tmp_path / "run", 2, count=10, fails=list(range(10))).end()
    assert codes == [2, 2]
    assert errors[0].splitlines()[-1] == "tiny: all 10 samples failed; sample s00: RuntimeError: the model broke"
    assert errors[1] == ""


@pytest.mark.slow
def test_a_small_share_that_fails_does_not_end_the_run(kill_runs, tmp_path):
    alone = [number for number in range(10) if DistributedState(1, 2).owns(f"image{number // 2}")]
    assert len(alone) < 5
    codes, _ = Launch(kill_runs, tmp_path / "run", 2, count=10, fails=alone).end()
    assert codes == [0, 0]
    assert told(tmp_path, 2)[0]["results"]["counts"]["failed"] == len(alone)


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_others(kill_runs, tmp_path):
    run = Launch(kill_runs, tmp_path / "run", 2, count=60, pause=0.2)
    while len(kill_runs._records(tmp_path / "run")) < 4:
        time.sleep(0.02)
    run.workers[1].kill()
    codes, errors = run.end()
    assert codes == [2, -signal.SIGKILL]
    assert errors[0].splitlines()[-1].startswith("tiny: a process of the run has gone")
    assert RunStore(tmp_path / "run").status() == {"tiny": "failed"}


@pytest.mark.slow
def test_processes_with_different_models_are_refused(kill_runs, tmp_path):
    codes, errors = Launch(kill_runs, tmp_path / "run", 2, count=4, revisions={"1": "2"}).end()
    assert codes == [2, 2]
    assert "process 1 has another fingerprint than the first" in errors[0]
    assert errors[1] == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_directory_in_use_is_refused_until_its_process_is_gone(kill_runs, tmp_path):
    holders = Launch(kill_runs, tmp_path / "run", 2, count=50, pause=0.5)
    while not kill_runs._records(tmp_path / "run"):
        time.sleep(0.02)
    for holder in holders.workers:  # as long as any is left
        assert holder.poll() is None
        with pytest.raises(ConfigError, match=f"run is in use by process {holder.pid} since 2"):
            alone_in(tmp_path / "run", 50)
        holder.kill()
        holder.wait()
    holders.end()
    assert alone_in(tmp_path / "run", 50).counts["samples"] == 50


@pytest.fixture
def alone(kill_runs, tmp_path):
    """Starts one process of two, whose partner never comes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    started = []

    def start(rank, **options):
        words = [sys.executable, TINY, str(tmp_path / "run"), json.dumps({"count": 2, **options})]
        variables = {**environment, "RANK": str(rank), "MASTER_PORT": str(kill_runs.free_port())}
        started.append(subprocess.Popen(words, env=variables, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for worker in started:
        worker.kill()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_process_without_a_partner_says_so_and_hears_signals(alone, rank, number):
    worker = alone(rank)
    line = worker.stderr.readline()
    assert line.startswith(f"process {rank} waits for process {1 - rank} of 2 (numbered from 0) at 127.0.0.1:")
    assert line.endswith(", up to 10 minutes ...\n")
    worker.send_signal(number)
    rest = worker.communicate(timeout=120)[1]
    assert worker.returncode == (143 if number == signal.SIGTERM else -signal.SIGINT)
    assert number == signal.SIGINT or rest == ""


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_partner_that_does_not_come_is_one_line(alone, rank, tmp_path):
    worker = alone(rank, meeting_minutes=0.01)
    lines = worker.communicate(timeout=120)[1].splitlines()
    assert worker.returncode == 2
    assert f"process {1 - rank} of 2 (numbered from 0) has not " in lines[-1]
    assert lines[-1].endswith("or wait longer with meeting_minutes=")
    assert len(lines) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_process_that_waits_at_the_end_hears_signals(kill_runs, tmp_path, number):
    run = Launch(kill_runs, tmp_path / "run", 2, count=8, pause=0.5)
    slow, waiting = run.workers[1], run.workers[0]
    while not (tmp_path / "run/shards").exists():
        time.sleep(0.005)
    slow.send_signal(signal.SIGSTOP)
    while sum(line["sample_id"] in _share(0, 8) for line in kill_runs._records(tmp_path / "run")) < len(_share(0, 8)):
        time.sleep(0.02)
    time.sleep(0.5)
    assert waiting.poll() is None
    waiting.send_signal(number)
    waiting.wait(timeout=300)  # it would wait ten minutes for the other
    assert waiting.returncode == (143 if number == signal.SIGTERM else -signal.SIGINT)
    slow.send_signal(signal.SIGCONT)
    run.end()
    assert slow.returncode == 2
    assert alone_in(tmp_path / "run", 8).counts["samples"] == 8


def _share(rank, count):
    return {f"s{number:02d}" for number in range(count) if DistributedState(rank, 2).owns(f"image{number // 2}")}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "auto"}, "WORLD_SIZE='auto' should be a whole number; start the processes with torchrun"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE='-2' should be a whole number"),
        ({"WORLD_SIZE": "2"}, "RANK=None should be 0 to 1, as WORLD_SIZE=2"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK=2 should be 0 to 1"),
        ({"WORLD_SIZE": "2", "RANK": "x"}, "RANK='x' should be a whole number"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE=2 without MASTER_ADDR"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}, "without MASTER_PORT from 1 to 65535"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "99999"}, "MASTER_PORT from 1"),
    ],
)
def test_junk_of_a_launcher_is_one_line(monkeypatch, capsys, tmp_path, variables, message):
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # the command line silences it
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "model.random_init=tiny", "logger=none", f"runs={tmp_path}"])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error_lines(error)) == 1


def test_pictures_fall_to_processes_by_their_ids_alone():
    ids = [f"image {number}" for number in range(3000)]
    for count in (1, 2, 3, 7):
        takers = [[rank for rank in range(count) if DistributedState(rank, count).owns(name)] for name in ids]
        assert all(len(ranks) == 1 for ranks in takers)
        shares = Counter(ranks[0] for ranks in takers)
        assert max(shares.values()) - min(shares.values()) < 0.1 * len(ids)
    # the last bits of the first 8 bytes of `printf a | sha256sum`: ca978112ca1bbdca, and so on
    assert [DistributedState(0, 2).owns(name) for name in "abcd"] == [True, True, True, False]


def test_only_the_first_process_does_commands_that_are_done_once(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # the command line silences it
    with pytest.raises(SystemExit) as ended:
        main(["list", "model"])
    assert ended.value.code == 0
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "--multirun", "task=pope,chair"])
    assert ended.value.code == 2
    assert "stethoscope: process 1: --multirun and 2 processes exclude each other" in capsys.readouterr().err


def test_processes_of_a_machine_take_a_gpu_each_and_none_takes_all(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert Loading().default_device() == "cuda"
    Loading(device_map="auto").check_machine()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    devices = []
    for local in range(3):
        monkeypatch.setenv("LOCAL_RANK", str(local))
        devices.append(Loading().default_device())
    assert devices == ["cuda:0", "cuda:1", "cuda:0"]
    with pytest.raises(CapabilityError, match="takes all GPUs of a machine, and 3 processes run on this one"):
        Loading(device_map="auto").check_machine()
    Loading(device_map="cpu").check_machine()


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [["torchrun", "--nproc-per-node=2"], ["accelerate", "launch", "--multi_gpu", "--num_processes=2"]]
)
def test_the_real_model_under_the_real_launchers(kill_runs, tmp_path, launcher):
    """1 process and 2 processes: the same metrics and records."""
    settings = ["task=chair", "task.scenes=40", "logger.mode=disabled", f"runs={tmp_path}"]
    bin_folder = Path(sys.executable).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    port = [f"--{'main_process_port' if launcher[0] == 'accelerate' else 'master-port'}={kill_runs.free_port()}"]
    two = [str(bin_folder / launcher[0]), *launcher[1:], *port, "-m", "stethoscope"]
    for name, start in (("one", [sys.executable, "-m", "stethoscope"]), ("two", two)):
        for words in (["evaluate", *settings, f"name={name}"], ["extract", f"run={tmp_path / name}", "features=fast"]):
            subprocess.run(
                [*start, *words], check=True, env=environment, cwd=tmp_path, capture_output=True, timeout=300
            )
    assert kill_runs.differences(tmp_path / "one", tmp_path / "two") == []
