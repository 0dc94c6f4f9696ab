"""Answers that are only traced stay as they are, and data that lies elsewhere is known by its samples."""

from dataclasses import replace

import pytest
from helpers.tiny_world import TinyAdapter, TinyFeatures, TinyTask, picture

from stethoscope.core.errors import ArtefactError, ConfigError, DataError
from stethoscope.evaluation.evaluator import Evaluator
from stethoscope.evaluation.pipeline import CHANGED
from stethoscope.evaluation.selection import select_samples
from stethoscope.storage.run_dir import RunStore


class Files(TinyTask):
    """The tiny task with pictures in a folder, and samples that a test may change."""

    def __init__(self, images, count=4):
        super().__init__(count=count, broken={number: images / f"{number}.png" for number in range(count)})
        self.images, self._changed = str(images), {}

    def change(self, number, **fields):
        self._changed[number] = fields
        return self

    def samples(self):
        samples = super().samples()
        for number, fields in self._changed.items():
            samples[number] = replace(samples[number], **fields)
        return samples


def dated():
    """Make the tiny model read another prompt, as a template that writes the date does."""
    adapter = TinyAdapter()
    plain = adapter.encode

    def encode(image, question):
        encoded = plain(image, question)
        return replace(encoded, inputs={"input_ids": encoded.inputs["input_ids"] + 2}, text=f"NOW: {question}")

    adapter.encode = encode
    return adapter


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(4):
        picture(number).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def run(tmp_path, images):
    Evaluator(run_dir=tmp_path / "run").run(TinyAdapter(), Files(images))
    return tmp_path / "run"


def extract(run, adapter, task, features=None):
    return Evaluator(run_dir=run, features=features or TinyFeatures(), overwrite="features").run(adapter, task)


def state(run):
    """Records without what tracing may add, and the bytes of the figures."""
    plain = [replace(record, seconds={}, tokens=0, part="", untraced="") for record in RunStore(run).records()]
    return plain, (run / "metrics.json").read_bytes()


def untraced(run):
    return {record.sample_id: record.untraced for record in RunStore(run).records() if record.untraced}


def test_changed_samples_are_named_and_left_alone(run, images):
    before = state(run)
    picture(0).resize((3, 3)).save(images / "0.png")
    task = Files(images).change(1, question="Another one?").change(2, reference={"objects": ["cat"]})
    adapter = TinyAdapter()
    extract(run, adapter, task)
    assert state(run) == before
    assert adapter.generated == []
    assert adapter.traced == [3]
    assert untraced(run) == {"s00": CHANGED + "picture", "s01": CHANGED + "question", "s02": CHANGED + "label"}
    assert RunStore(run).status() == {"tiny": "finished"}
    picture(0).save(images / "0.png")
    extract(run, adapter, Files(images))  # the data is as it was
    assert state(run) == before
    assert untraced(run) == {}
    assert len(RunStore(run).tokens()) == 20
    extract(run, adapter, task)  # rows of the recorded answers are right, whatever the data says now
    assert len(RunStore(run).tokens()) == 20


def test_another_prompt_is_a_change(run, images):
    before = state(run)
    adapter = dated()
    extract(run, adapter, Files(images))
    assert (adapter.generated, adapter.traced) == ([], [])
    assert state(run) == before
    assert set(untraced(run).values()) == {CHANGED + "prompt"}


def test_a_prompt_that_has_changed_is_asked_again_before_its_answer_is_traced(run, images):
    adapter = dated()
    Evaluator(run_dir=run, features=TinyFeatures()).run(adapter, Files(images))
    assert adapter.generated
    assert {record.prompt[:4] for record in RunStore(run).records()} == {"NOW:"}
    assert len(RunStore(run).tokens()) == 20


def test_failed_and_unasked_samples_are_not_asked(tmp_path, images):
    adapter = TinyAdapter()
    first, second = (sample.id for sample in select_samples(Files(images).samples(), 2))
    adapter.fails = {int(second[1:])}
    Evaluator(run_dir=tmp_path, limit=2).run(adapter, Files(images))
    before = state(tmp_path)
    adapter.fails, adapter.generated = set(), []
    results = Evaluator(run_dir=tmp_path, features=TinyFeatures(), overwrite="features").run(adapter, Files(images))
    assert results.counts["samples"] == 2
    assert results.counts["failed"] == 1
    assert state(tmp_path) == before
    assert (adapter.generated, adapter.traced) == ([], [int(first[1:])])


def test_a_trace_that_fails_keeps_answer_and_score(run, images):
    before = state(run)
    features = TinyFeatures()
    features.compute = lambda trace: TinyFeatures().compute(trace) if trace.logits[0, 0] else {}["broken"]
    extract(run, TinyAdapter(), Files(images), features)
    assert state(run) == before
    assert untraced(run) == {"s00": "KeyError: 'broken'"}
    extract(run, TinyAdapter(), Files(images))
    assert untraced(run) == {}


def test_samples_that_are_gone_are_refused_before_anything_changes(run, images):
    before = state(run)
    with pytest.raises(DataError, match=r"1 of 4 samples .* are not in the data .*s03"):
        extract(run, TinyAdapter(), Files(images, count=3))
    assert state(run) == before
    with pytest.raises(ArtefactError, match="has no answer to tiny"):
        extract(run.parent / "empty", TinyAdapter(), Files(images))


def test_a_run_goes_on_with_data_that_lies_elsewhere(run, images, tmp_path):
    there = images.rename(tmp_path / "another-disk")
    adapter = TinyAdapter()
    for task in (Files(there), Files(tmp_path / "images" / ".." / "another-disk")):
        results = Evaluator(run_dir=run).run(adapter, task)
        assert (results.counts["ok"], adapter.generated) == (4, [])
    with pytest.raises(ConfigError, match=r"task\.settings\.images"):
        Evaluator(run_dir=run).run(adapter, Files(images.parent / "another-disk").change(1, question="Another?"))
    extract(run, adapter, Files(there))
    assert adapter.traced == [0, 1, 2, 3]


def test_changed_samples_of_the_same_data_are_asked_again_with_a_word(run, images):
    adapter = TinyAdapter()
    with pytest.warns(UserWarning, match=r"asked again: 1 samples of tiny \(question\)"):
        Evaluator(run_dir=run).run(adapter, Files(images).change(1, question="Another?"))
    assert adapter.generated == [[1]]
