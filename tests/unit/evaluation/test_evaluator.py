import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from helpers.tiny_world import TinyAdapter, TinyFeatures, TinyTask, picture

from stethoscope.core.errors import CapabilityError, ConfigError, DataError
from stethoscope.core.types import Generation
from stethoscope.evaluation.callbacks import Callback
from stethoscope.evaluation.evaluator import Evaluator
from stethoscope.evaluation.results import TaskResults
from stethoscope.loggers.base import Logger
from stethoscope.storage.run_dir import RunStore


def lines(folder, without=("seconds",)):
    """The content of samples.jsonl, as it stands."""
    records = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in without} for line in records]


@pytest.fixture
def adapter():
    return TinyAdapter()


class Spy(Callback):
    """Writes down which hooks are called, and with what run directory behind them."""

    def __init__(self):
        self.calls = []

    def __getattribute__(self, name):
        if name.startswith("on_"):
            return lambda run, *rest: self.calls.append((name, *rest))
        return super().__getattribute__(name)


def test_hooks_are_called_in_the_documented_order(adapter):
    spy = Spy()
    Evaluator([spy], batch_size=2, limit=3, features=TinyFeatures()).run(adapter, TinyTask())
    assert [name for name, *_ in spy.calls] == [
        "on_run_start",
        "on_task_start",
        *["on_batch_start", "on_trace", "on_trace", "on_batch_end"],
        *["on_batch_start", "on_trace", "on_batch_end"],
        "on_task_end",
        "on_run_end",
    ]
    batch = spy.calls[2][1]
    assert [sample.id for sample in batch] == [record.sample_id for record in spy.calls[5][1]]


def test_metrics_come_from_the_totals_of_the_subsets(adapter):
    results = Evaluator().run(adapter, TinyTask())
    assert (results.value(), results.value("accuracy", "easy"), results.value("accuracy", "hard")) == (0.5, 1.0, 0.0)
    assert results.counts == {"samples": 10, "ok": 10, "unparsed": 0, "failed": 0, "truncated": 0}
    assert results.interval("accuracy", "easy").groups == 5
    assert set(results.seconds) == {"encode", "generate", "score"}
    assert results.flat()["tiny/hard/accuracy"] == 0.0
    assert results.flat()["tiny/count/ok"] == 10.0
    assert TaskResults.from_dict("tiny", json.loads(json.dumps(results.to_dict()))) == results
    assert str(results).splitlines()[:2] == ["tiny", "accuracy (easy): 1.000 –"]  # from five images
    assert str(results).endswith("10 samples: 10 ok, 0 unparsed, 0 failed; 0 truncated")


def test_unparsed_failed_and_truncated_are_counted_apart_and_are_not_wrong_answers(adapter, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    adapter.silent, adapter.fails = {2}, {4}
    task = TinyTask(broken={6: tmp_path / "text.png", 8: tmp_path / "gone.png"})
    results = Evaluator(run_dir=tmp_path / "run").run(adapter, task)
    assert results.counts == {"samples": 10, "ok": 6, "unparsed": 1, "failed": 3, "truncated": 0}
    assert results.value("accuracy", "easy") == 1.0
    assert results.value("judged", "easy") == 0.5
    errors = {record.sample_id: record.error for record in RunStore(tmp_path / "run").records() if record.error}
    assert errors["s04"] == "RuntimeError: the model broke"
    assert "text.png cannot be read" in errors["s06"]
    assert "'8.png' is missing" in errors["s08"]
    short = Evaluator(generation=Generation(max_new_tokens=2)).run(adapter, TinyTask(count=2))
    assert short.counts["truncated"] == 2


def test_a_batch_that_fails_loses_only_the_sample_at_fault(adapter):
    adapter.fails = {4}
    results = Evaluator(batch_size=8).run(adapter, TinyTask(count=8))
    assert results.counts["failed"] == 1
    assert [4] in adapter.generated
    assert [0, 1, 2, 3] in adapter.generated


@pytest.mark.parametrize("broken", ["image", "model"])
def test_raise_stops_at_the_first_error(adapter, tmp_path, broken):
    adapter.fails = {1} if broken == "model" else set()
    task = TinyTask(broken={1: tmp_path / "gone.png"} if broken == "image" else {})
    with pytest.raises(DataError if broken == "image" else RuntimeError):
        Evaluator(on_error="raise").run(adapter, task)


def test_a_run_in_which_everything_fails_is_an_error(adapter, tmp_path):
    task = TinyTask(count=40, broken={number: tmp_path / "gone.png" for number in range(40)})
    with pytest.raises(DataError, match=r"all of the first 16 samples failed; sample s00: image '0.png' is missing"):
        Evaluator(run_dir=tmp_path / "run").run(adapter, task)
    assert RunStore(tmp_path / "run").status() == {"tiny": "failed"}
    adapter.fails = set(range(40))
    with pytest.raises(RuntimeError, match="the model broke"):
        Evaluator(batch_size=4).run(adapter, TinyTask(count=3))


class FewPictures(TinyTask):
    """Asks about three pictures in turn."""

    def samples(self):
        images = [sample.image for sample in super().samples()[:3]]
        return [
            replace(sample, image=images[index % 3], group=f"image{index % 3}")
            for index, sample in enumerate(super().samples())
        ]


def test_questions_about_one_picture_follow_each_other_and_are_stored_in_the_order_of_the_task(adapter, tmp_path):
    asked = []

    class Record(Callback):
        def on_batch_start(self, run, samples):
            asked.append([int(sample.id[1:]) for sample in samples])

    Evaluator([Record()], batch_size=4, run_dir=tmp_path).run(adapter, FewPictures())
    assert asked == [[0, 3, 6, 9], [1, 4, 7, 2], [5, 8]]
    assert [record.sample_id for record in RunStore(tmp_path).records()] == [f"s{number:02d}" for number in range(10)]


def test_a_picture_that_is_missing_fails_its_questions_and_no_more(adapter, tmp_path):
    task = FewPictures(count=60, broken={0: tmp_path / "gone.png"})
    counts = Evaluator(batch_size=20, run_dir=tmp_path / "run").run(adapter, task).counts
    assert (counts["failed"], counts["samples"]) == (20, 60)


def test_an_error_that_concerns_the_whole_run_is_not_a_failed_sample(adapter):
    adapter.generate = lambda encoded, generation: (_ for _ in ()).throw(CapabilityError("no beams here"))
    with pytest.raises(CapabilityError, match="no beams"):
        Evaluator().run(adapter, TinyTask())


def test_a_limit_draws_samples(adapter):
    assert Evaluator(limit=3).run(adapter, TinyTask()).counts["samples"] == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limit": 0}, "limit=0"),
        ({"batch_size": -1}, "batch_size=-1"),
        ({"limit": True}, "limit=True should be a whole number"),
        ({"seed": -1}, "seed=-1 should be at least 0"),
        ({"on_error": "rise"}, "did you mean 'raise'"),
        ({"trace": "mention"}, "did you mean 'mentions'"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Evaluator(**settings)


def test_what_is_no_adapter_and_no_task_is_said(adapter):
    with pytest.raises(ConfigError, match="adapter='testbed' should be an object of class Adapter"):
        Evaluator().run("testbed", TinyTask())
    with pytest.raises(ConfigError, match="task='pope' should be an object of class Task"):
        Evaluator().run(adapter, "pope")


def test_a_task_without_samples_or_with_double_ids_is_refused(adapter):
    with pytest.raises(DataError, match="no samples"):
        Evaluator().run(adapter, TinyTask(count=0))
    task = TinyTask(count=2)
    task.samples = lambda: TinyTask(count=2).samples() * 2
    with pytest.raises(DataError, match="two samples with the id 's00'"):
        Evaluator().run(adapter, task)


def test_fast_dev_run_is_two_samples_kept_apart_from_real_runs(adapter, tmp_path):
    trial = Evaluator(fast_dev_run=True, run_dir=tmp_path)
    assert trial.run(adapter, TinyTask()).counts["samples"] == 2
    first, _ = adapter.generated[-1], adapter.generated.clear()
    trial.run(adapter, TinyTask())
    assert adapter.generated == [first]  # nothing resumed
    assert Evaluator(run_dir=tmp_path).run(adapter, TinyTask()).counts["samples"] == 10
    with pytest.raises(ConfigError, match="fast_dev_run: None before, True now"):
        trial.run(adapter, TinyTask())


def test_an_interrupted_run_goes_on_and_ends_as_if_nothing_had_happened(adapter, tmp_path):
    def evaluator(name):
        return Evaluator(run_dir=tmp_path / name, batch_size=3, features=TinyFeatures())

    whole = evaluator("whole").run(TinyAdapter(), TinyTask())
    adapter.interrupt_at = 7
    spy = Spy()
    interrupted = evaluator("cut")
    interrupted.callbacks = (spy,)
    with pytest.raises(KeyboardInterrupt):
        interrupted.run(adapter, TinyTask())
    store = RunStore(tmp_path / "cut")
    assert len(list(store.records("tiny"))) == 6
    assert len(store.tokens()) == 30
    assert store.status() == {"tiny": "interrupted"}
    assert spy.calls[-1][0] == "on_exception"
    assert json.loads((tmp_path / "cut/events.jsonl").read_text().splitlines()[-1])["status"] == "interrupted"
    with (tmp_path / "cut/samples.jsonl").open("a") as file:
        file.write('{"task": "tiny", "sample_id": "s06", "gro')  # as a kill leaves it
    adapter.interrupt_at = None
    adapter.generated.clear()
    results = evaluator("cut").run(adapter, TinyTask())
    assert adapter.generated == [[6, 7, 8], [9]]
    assert results == whole
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    for name in ("metrics.json", "fingerprint.json", "status.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert RunStore(tmp_path / "cut").tokens().equals(RunStore(tmp_path / "whole").tokens())
    adapter.generated.clear()
    assert evaluator("cut").run(adapter, TinyTask()) == whole
    assert adapter.generated == []


def test_ctrl_c_between_traces_keeps_what_is_finished_of_the_batch(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr("stethoscope.evaluation.pipeline.TRACE_BATCH", 2)

    class Stop(Callback):
        def on_trace(self, run, sample, trace):
            if sample.id == "s02":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Evaluator([Stop()], run_dir=tmp_path, features=TinyFeatures()).run(adapter, TinyTask())
    assert [record.sample_id for record in RunStore(tmp_path).records()] == ["s00", "s01"]
    assert len(RunStore(tmp_path).tokens()) == 10


def test_failed_samples_are_tried_again_and_changed_samples_asked_again(adapter, tmp_path):
    adapter.fails = {3}
    assert Evaluator(run_dir=tmp_path).run(adapter, TinyTask()).counts["failed"] == 1
    adapter.fails = set()
    adapter.generated.clear()
    changed = TinyTask()
    samples = changed.samples()
    object.__setattr__(samples[5], "question", "Another question?")
    changed.samples = lambda: samples
    assert Evaluator(run_dir=tmp_path).run(adapter, changed).counts["failed"] == 0
    assert adapter.generated == [[3, 5]]
    assert [line["sample_id"] for line in lines(tmp_path)] == [sample.id for sample in samples]


def test_a_larger_limit_goes_on_and_a_smaller_one_counts_only_its_samples(adapter, tmp_path):
    Evaluator(run_dir=tmp_path, limit=4).run(adapter, TinyTask())
    assert Evaluator(run_dir=tmp_path, limit=6).run(adapter, TinyTask()).counts["samples"] == 6
    first, more = adapter.generated
    assert (len(first), len(more), len({*first, *more})) == (4, 2, 6)
    with pytest.warns(UserWarning, match="holds 4 more answers of tiny than are asked for"):
        assert Evaluator(run_dir=tmp_path, limit=2).run(adapter, TinyTask()).counts["samples"] == 2


def test_another_model_or_generation_is_refused_by_name_of_the_difference(adapter, tmp_path):
    Evaluator(run_dir=tmp_path).run(adapter, TinyTask())
    with pytest.raises(ConfigError, match=r"adapter\.revision: '1' before, '2' now.*overwrite=true.*another name"):
        Evaluator(run_dir=tmp_path).run(TinyAdapter("2"), TinyTask())
    with pytest.raises(ConfigError, match=r"generation\.max_new_tokens: 128 before, 5 now"):
        Evaluator(run_dir=tmp_path, generation=Generation(max_new_tokens=5)).run(adapter, TinyTask())
    assert RunStore(tmp_path).status() == {"tiny": "finished"}  # the refused runs have left no trace
    Evaluator(run_dir=tmp_path, batch_size=1, seed=3, generation=Generation(seed=7)).run(adapter, TinyTask())
    results = Evaluator(run_dir=tmp_path, overwrite=True, limit=2).run(TinyAdapter("2"), TinyTask())
    assert len(lines(tmp_path)) == results.counts["samples"] == 2


def test_features_are_added_to_a_finished_run_without_generating_again(adapter, tmp_path):
    Evaluator(run_dir=tmp_path).run(adapter, TinyTask())
    before = lines(tmp_path, without=("seconds", "tokens"))
    adapter.generated.clear()
    Evaluator(run_dir=tmp_path, features=TinyFeatures()).run(adapter, TinyTask())
    assert adapter.generated == []
    assert adapter.traced == list(range(10))
    assert lines(tmp_path, without=("seconds", "tokens")) == before
    assert len(RunStore(tmp_path).tokens()) == 50
    other = TinyFeatures(("level",))
    with pytest.raises(ConfigError, match=r"features\.names"):
        Evaluator(run_dir=tmp_path, features=other).run(adapter, TinyTask())
    Evaluator(run_dir=tmp_path, features=other, overwrite="features").run(adapter, TinyTask())
    assert adapter.generated == []
    assert "position" not in RunStore(tmp_path).tokens().columns
    Evaluator(run_dir=tmp_path).run(adapter, TinyTask())  # without features, those that are there stay
    assert len(RunStore(tmp_path).tokens()) == 50


def test_only_answers_with_mentions_are_traced_unless_all_are_wanted(adapter):
    answers = Generation(max_new_tokens=1)  # "a": names nothing
    Evaluator(features=TinyFeatures(), generation=answers).run(adapter, TinyTask(count=2))
    assert adapter.traced == []
    Evaluator(features=TinyFeatures(), generation=answers, trace="all").run(adapter, TinyTask(count=2))
    assert adapter.traced == [0, 1]


def test_a_trace_that_fails_makes_the_sample_fail_with_its_answer_kept(adapter, tmp_path):
    features = TinyFeatures()
    features.compute = lambda trace: 1 / int(trace.logits[0, 0])  # picture 0 divides by zero, the others give no dict
    with pytest.raises(ZeroDivisionError):
        Evaluator(features=features, on_error="raise").run(adapter, TinyTask())
    features.compute = lambda trace: TinyFeatures().compute(trace) if trace.logits[0, 0] else {}["broken"]
    results = Evaluator(features=features, run_dir=tmp_path).run(adapter, TinyTask())
    assert results.counts["failed"] == 1
    record = RunStore(tmp_path).find("tiny", "s00")
    assert record.error == "KeyError: 'broken'"
    assert record.answer.text == "a dog and a dog"


def test_a_callbacks_error_stops_the_run_and_everyone_is_told(adapter, tmp_path):
    class Bad(Callback):
        def on_batch_end(self, run, records):
            raise ValueError("my mistake")

        def on_exception(self, run, error):
            raise OSError("and another")

    spy, log = Spy(), []
    logger = Logger()
    logger.finalize = log.append
    with pytest.raises(ValueError, match="my mistake"), pytest.warns(UserWarning, match="and another"):
        Evaluator([Bad(), spy], [logger], run_dir=tmp_path, batch_size=4).run(adapter, TinyTask())
    assert spy.calls[-1][0] == "on_exception"
    assert log == ["failed"]
    assert RunStore(tmp_path).status() == {"tiny": "failed"}
    assert len(lines(tmp_path)) == 4


def test_a_logger_that_fails_is_warned_of_once(adapter, recwarn):
    class Down(Logger):
        def log_metrics(self, metrics, step=None):
            raise ConnectionError("W&B is down")

    evaluator = Evaluator(loggers=[Down()])
    evaluator.run(adapter, TinyTask())
    evaluator.run(adapter, TinyTask())
    messages = [str(item.message) for item in recwarn]
    assert messages == ["Down.log_metrics failed, the run goes on without it: W&B is down"]


def test_several_tasks_share_a_run_directory(adapter, tmp_path):
    class Other(TinyTask):
        name = "other"

    for task in (TinyTask(), Other(count=4)):
        Evaluator(run_dir=tmp_path, features=TinyFeatures()).run(adapter, task)
    store = RunStore(tmp_path)
    assert list(store.metrics()) == ["tiny", "other"]
    assert (len(store.tokens("tiny")), len(store.tokens("other")), len(store.tokens())) == (50, 20, 70)
    Evaluator(run_dir=tmp_path, overwrite=True).run(adapter, Other(count=4))
    assert len(store.tokens()) == 50
    with pytest.raises(ConfigError, match="holds a run of"):
        Evaluator(run_dir=tmp_path).run(TinyAdapter("2"), Other(count=4, subsets=("x",)))


def test_a_changed_picture_under_the_same_name_is_asked_about_again(adapter, tmp_path):
    files = {number: tmp_path / f"{number}.png" for number in range(6)}
    for number, file in files.items():
        picture(number).save(file)
    Evaluator(run_dir=tmp_path / "run").run(adapter, TinyTask(count=6, broken=files))
    adapter.generated.clear()
    picture(4).resize((3, 3)).save(files[4])
    files[2].unlink()  # what is gone is not known to have changed
    Evaluator(run_dir=tmp_path / "run").run(adapter, TinyTask(count=6, broken=files))
    assert adapter.generated == [[4]]
    records = {record.sample_id: record for record in RunStore(tmp_path / "run").records()}
    assert records["s04"].image_sha256 == hashlib.sha256(files[4].read_bytes()).hexdigest()
    assert records["s02"].status == "ok"


def test_a_picture_that_is_made_and_has_changed_is_asked_about_again_when_it_is_seen(adapter, tmp_path):
    Evaluator(run_dir=tmp_path).run(adapter, TinyTask(count=4))
    adapter.generated.clear()
    changed = TinyTask(count=4)
    samples = changed.samples()
    object.__setattr__(samples[1].image, "source", lambda: picture(1).resize((5, 5)))
    changed.samples = lambda: samples
    Evaluator(run_dir=tmp_path, features=TinyFeatures()).run(adapter, changed)
    assert adapter.generated == [[1]]


OTHER = """import sys, pathlib
from stethoscope.storage.lock import RunLock
try:
    RunLock(pathlib.Path(sys.argv[1])).acquire()
except Exception as error:
    print(error)
"""


def test_a_run_directory_is_locked_while_a_run_goes_on_and_free_after_any_end(adapter, tmp_path):
    class Look(Callback):
        def on_task_start(self, run):
            words = [sys.executable, "-c", OTHER, str(tmp_path)]
            self.said = subprocess.run(words, capture_output=True, text=True).stdout

    look = Look()
    for ending in (None, 3):
        adapter.interrupt_at = ending
        try:
            Evaluator([look], run_dir=tmp_path, overwrite=True).run(adapter, TinyTask())
        except KeyboardInterrupt:
            assert ending == 3
        assert look.said.startswith(f"{tmp_path} is in use by process {os.getpid()} since 2")
    look.on_task_start(None)
    assert look.said == ""


def test_a_run_directory_that_cannot_be_written_to_is_named(adapter, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run directory .*file/run cannot be written to: .*Not a directory"):
        Evaluator(run_dir=tmp_path / "file/run").run(adapter, TinyTask())


def test_the_code_of_adapter_and_task_is_part_of_the_key(adapter, tmp_path, monkeypatch):
    Evaluator(run_dir=tmp_path).run(adapter, TinyTask())
    fingerprint = RunStore(tmp_path).fingerprints()["tiny"]
    assert len(fingerprint["adapter"]["code"]) == len(fingerprint["task"]["code"]) == 16
    monkeypatch.setattr("stethoscope.storage.run_fingerprint.source_digest", lambda cls: cls.__name__)
    with pytest.raises(ConfigError, match=r"adapter\.code: .*, 'TinyAdapter' now; task\.code: .*, 'TinyTask' now"):
        Evaluator(run_dir=tmp_path).run(adapter, TinyTask())
