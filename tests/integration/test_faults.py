"""What befalls long runs: no memory, a full disk, signals, numbers that are none, a hub that hangs. Nothing is lost."""

import json
import math
import resource
import signal
import socket
import threading
import warnings
from dataclasses import replace

import pytest
import torch
from helpers.tiny_world import TinyAdapter, TinyFeatures, TinyTask

from stethoscope.core.errors import CapabilityError
from stethoscope.core.system import Terminated, disk_faults, ended_by_signal, out_of_memory
from stethoscope.core.types import Answer
from stethoscope.evaluation.callbacks import Callback
from stethoscope.evaluation.evaluator import Evaluator
from stethoscope.storage.run_dir import RunStore

RUN = [
    "evaluate", "task=pope", "task.scenes=2", "batch_size=4", "generation.max_new_tokens=4", "model.threads=1",
    "logger=none", "name=one",
]  # fmt: skip


class Narrow(TinyAdapter):
    """A model whose memory holds so many samples, and no more: beyond, it asks for what no machine has."""

    def __init__(self, writes: int, traces: int = 100, never: int | None = None) -> None:
        super().__init__()
        self.writes, self.traces, self.never = writes, traces, never
        self.together: list[int] = []

    def generate(self, encoded, generation):
        numbers = [int(prompt.inputs["input_ids"]) for prompt in encoded]
        if len(encoded) > self.writes or self.never in numbers:
            torch.empty(1 << 60, dtype=torch.uint8)
        return super().generate(encoded, generation)

    def trace_batch(self, encoded, answers, requires=()):
        if len(encoded) > self.traces:
            torch.empty(1 << 60, dtype=torch.uint8)
        self.together.append(len(encoded))
        return [self.trace(*pair, requires) for pair in zip(encoded, answers, strict=True)]


def test_a_batch_that_does_not_fit_is_halved_for_good_and_said_once():
    adapter = Narrow(writes=3)
    with pytest.warns(
        UserWarning, match=r"generate: 16 samples together do not fit into memory; .* 2 at a time"
    ) as warned:
        results = Evaluator(batch_size=16).run(adapter, TinyTask(40))
    assert len([warning for warning in warned if "do not fit" in str(warning.message)]) == 1
    assert [len(numbers) for numbers in adapter.generated] == [2] * 20  # what did not fit was never written
    assert results.counts == {"samples": 40, "ok": 40, "unparsed": 0, "failed": 0, "truncated": 0}
    assert results.flat() == {
        **results.flat(),
        **{k: v for k, v in Evaluator().run(TinyAdapter(), TinyTask(40)).flat().items() if "seconds" not in k},
    }


def test_generating_and_tracing_have_each_their_own_size(tmp_path):
    adapter = Narrow(writes=4, traces=2)
    with pytest.warns(UserWarning, match="do not fit") as warned:
        Evaluator(batch_size=8, features=TinyFeatures(), run_dir=tmp_path).run(adapter, TinyTask(16))
    assert [str(warning.message).partition(":")[0] for warning in warned] == ["generate", "trace"]
    assert [len(numbers) for numbers in adapter.generated] == [4] * 4
    assert adapter.together == [2] * 8
    assert sum(record.tokens > 0 for record in RunStore(tmp_path).records("tiny")) == 16


def test_a_sample_that_does_not_fit_by_itself_fails_alone(tmp_path):
    adapter = Narrow(writes=100, never=5)
    with pytest.warns(UserWarning, match="1 at a time"):
        results = Evaluator(batch_size=8, run_dir=tmp_path).run(adapter, TinyTask(10))
    assert (results.counts["ok"], results.counts["failed"]) == (9, 1)
    [failed] = [record for record in RunStore(tmp_path).records("tiny") if record.status == "failed"]
    assert failed.sample_id == "s05"
    assert failed.error.startswith("does not fit into memory, even by itself: ")


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
        (KeyError("out of memory"), False),
    ],
    ids=str,
)
def test_what_counts_as_memory(error, memory):
    assert out_of_memory(error) is memory


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_an_answer_without_numbers_is_a_failed_sample(tmp_path, value):
    class Broken(TinyAdapter):
        broken: int | None = 3

        def _say(self, number, generation):
            answer = super()._say(number, generation)
            return replace(answer, logprobs=(*answer.logprobs[:-1], value)) if number == self.broken else answer

    results = Evaluator(run_dir=tmp_path).run(adapter := Broken(), TinyTask())
    assert (results.counts["ok"], results.counts["failed"]) == (9, 1)
    [failed] = [record for record in RunStore(tmp_path).records("tiny") if record.status == "failed"]
    assert failed.sample_id == "s03"
    assert f"token 4 of its answer the log-probability {value}" in failed.error
    adapter.broken, adapter.generated = None, []
    Evaluator(run_dir=tmp_path).run(adapter, TinyTask())
    assert adapter.generated == [[3]]


def test_weights_that_are_none_fail_every_sample(stethoscope, monkeypatch):
    """Real NaN weights: the run stops and says so, instead of scoring what argmax makes of NaN."""
    from stethoscope.adapters.testbed import TestbedAdapter

    tiny = TestbedAdapter._tiny

    def broken(self):
        model, processor = tiny(self)
        next(model.parameters()).data.fill_(math.nan)
        model.lm_head.weight.data.fill_(math.nan)
        return model, processor

    monkeypatch.setattr(TestbedAdapter, "_tiny", broken)
    line = stethoscope(*RUN, "model.random_init=tiny")
    assert "all of the first 20 samples failed" in line  # of three pictures
    assert "log-probability nan" in line


def test_an_empty_answer_is_data(tmp_path):
    adapter = TinyAdapter()
    adapter.silent = {2}
    results = Evaluator(run_dir=tmp_path, features=TinyFeatures(), trace="all").run(adapter, TinyTask())
    assert (results.counts["ok"], results.counts["unparsed"]) == (9, 1)
    [empty] = [record for record in RunStore(tmp_path).records("tiny") if record.status == "unparsed"]
    assert empty.answer == Answer("", (), (), ())
    assert empty.tokens == 0


class Ends(Callback):
    """Ends the process from outside, as it were, when two batches are done."""

    def __init__(self, signal: str) -> None:
        self.signal = signal
        self.batches = 0

    def on_batch_start(self, run, samples):
        self.batches += 1
        if self.batches == 3:
            signal.raise_signal(getattr(signal, self.signal))


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_flushes_marks_and_says_how_to_go_on(stethoscope, tmp_path, monkeypatch, name, code, capsys):
    from stethoscope import cli

    before = signal.getsignal(signal.SIGTERM)
    words = [*RUN, "plugins=[test_faults]", "+callbacks.ends._target_=test_faults.Ends"]
    with pytest.raises(SystemExit) as end:
        cli.main([*words, f"+callbacks.ends.signal={name}"])
    assert end.value.code == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1] == "stethoscope: interrupted; the same command goes on from here"
    assert not any("Traceback" in line for line in lines)
    assert signal.getsignal(signal.SIGTERM) is before
    store = RunStore(tmp_path / "runs" / "one")
    assert store.status() == {"pope": "interrupted"}
    assert len(list(store.records("pope"))) == 8
    stethoscope(*RUN, code=0)
    assert store.status() == {"pope": "finished"}
    assert (
        len(list(RunStore(tmp_path / "runs" / "one").records("pope"))) == store.metrics()["pope"]["counts"]["samples"]
    )


def test_a_signal_is_caught_only_where_it_can_be():
    from stethoscope.core.system import ended_by_signal

    def elsewhere():
        with ended_by_signal():
            done.append(True)

    done = []
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert done == [True]
    with pytest.raises(Terminated), ended_by_signal():
        signal.raise_signal(signal.SIGTERM)


def test_a_full_disk_costs_one_line_and_nothing_that_was_done(stethoscope, tmp_path):
    """No file may grow beyond a limit, by the system's own word; once it is lifted, the same command ends the run."""
    stethoscope(*RUN[:-1], "name=whole", code=0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            line = stethoscope(*RUN)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "the file exceeds the allowed size" in line
    assert "the same command again" in line
    kept = RunStore(tmp_path / "runs" / "one")
    assert kept.status() == {"pope": "failed"}
    before = [record.sample_id for record in kept.records("pope")]
    assert before
    stethoscope(*RUN, code=0)

    def records(name):
        stored = map(json.loads, (tmp_path / "runs" / name / "samples.jsonl").read_text().splitlines())
        changing = {"seconds": 0, "answer": 0}  # log-probabilities of other batches differ in their last digits
        return [{**record, **changing, "ids": record["answer"]["token_ids"]} for record in stored]

    assert records("one") == records("whole")


@pytest.mark.parametrize("number", [28, 122, 30, 13])
def test_disk_errors_name_the_file_and_what_to_do(number, tmp_path):
    words = r"samples\.jsonl cannot be written or read: "
    with pytest.raises(CapabilityError, match=words) as raised, disk_faults(tmp_path):
        raise OSError(number, "whatever", "samples.jsonl")
    assert "\n" not in str(raised.value)
    with pytest.raises(FileNotFoundError), disk_faults():
        raise FileNotFoundError(2, "a bug of ours")


def test_a_run_directory_that_cannot_be_made(stethoscope, tmp_path):
    (tmp_path / "runs").write_text("a file, not a folder")
    assert "runs" in stethoscope(*RUN)


@pytest.fixture
def silent_hub(monkeypatch):
    """A server that takes every connection and never says a word."""
    from huggingface_hub import constants

    from stethoscope.adapters import load_settings

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.3)
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        load_settings._hub_reachable.cache_clear()
        yield
        load_settings._hub_reachable.cache_clear()


def test_a_hub_that_hangs_is_one_line(stethoscope, silent_hub):
    line = stethoscope("evaluate", "model=hf", "model.model_id=nobody/nothing", "task.scenes=1", "logger=none")
    assert "nobody/nothing" in line


def test_ctrl_c_is_heard_where_a_shell_had_it_ignored():
    """As it does to what a script starts with ``&``."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt), ended_by_signal():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
