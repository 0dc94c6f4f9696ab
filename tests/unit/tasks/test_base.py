"""The contract of a task: given answers, figures over several samples, and its configuration file."""

import inspect
import json
from dataclasses import replace

import pytest
import yaml
from helpers.tiny_world import WORDS, TinyAdapter, TinyTask

from stethoscope.core.component import build, choices, conf_folder
from stethoscope.core.errors import ConfigError
from stethoscope.core.types import Answer
from stethoscope.evaluation.evaluator import Evaluator
from stethoscope.tasks.base import Tally, Task
from stethoscope.tasks.chair import Chair
from stethoscope.tasks.custom import Custom
from stethoscope.tasks.pope import Pope


class Reader(TinyAdapter):
    """Reads given answers of known words; counts them."""

    def __init__(self):
        super().__init__()
        self.read = []

    def answer(self, encoded, text):
        words = text.split()
        starts = [len(" ".join(words[:n])) + (n > 0) for n in range(len(words))]
        offsets = tuple((start, start + len(word)) for start, word in zip(starts, words, strict=True))
        self.read.append(text)
        return Answer(" ".join(words), tuple(map(WORDS.index, words)), offsets, (0.0,) * len(words))


class Given(TinyTask):
    """Every second sample brings its answer along."""

    text = "a dog"

    def samples(self):
        return [replace(sample, answer=self.text) if n % 2 else sample for n, sample in enumerate(super().samples())]


class Pairs(TinyTask):
    """Adds a subset for both samples of an image, right if both are."""

    def tally(self, judged):
        groups = {}
        for sample, counts in judged:
            groups.setdefault(sample.group, []).append(counts["right"])
        pairs = [Tally(name, "pairs", {"right": all(outcomes), "judged": 1.0}) for name, outcomes in groups.items()]
        return [*pairs, *super().tally(judged)]


def test_given_answers_are_read_and_others_written(tmp_path):
    adapter = Reader()
    results = Evaluator(run_dir=tmp_path / "run", batch_size=3).run(adapter, Given(count=6))
    assert adapter.read == ["a dog"] * 3
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [row["answer"]["text"] for row in rows if int(row["sample_id"][1:]) % 2] == ["a dog"] * 3
    written = Evaluator().run(Reader(), TinyTask(count=6))
    assert results.value("accuracy", "easy") == written.value("accuracy", "easy")
    assert results.value("accuracy", "hard") == 1.0
    assert written.value("accuracy", "hard") == 0.0


def test_a_given_answer_that_cannot_be_read_fails_its_sample_alone():
    class Foreign(Given):
        text = "un chien"

    results = Evaluator(batch_size=4).run(Reader(), Foreign(count=6))
    assert results.counts == {"samples": 6, "ok": 3, "unparsed": 0, "failed": 3, "truncated": 0}


def test_figures_over_several_samples():
    results = Evaluator().run(Reader(), Pairs(count=6))
    assert results.subsets[0] == "pairs"
    assert results.value("accuracy", "pairs") == 0.0  # of every image the sample of the hard subset is wrong
    assert results.interval("accuracy", "pairs").items == 3
    assert results.value("accuracy", "easy") == 1.0
    assert results.counts["samples"] == 6


def test_failed_samples_are_not_tallied(tmp_path):
    seen = []

    class Watch(Pairs):
        def tally(self, judged):
            seen.extend(sample.id for sample, _ in judged)
            return super().tally(judged)

    (tmp_path / "1.png").write_bytes(b"no image")
    results = Evaluator().run(Reader(), Watch(count=4, broken={1: tmp_path / "1.png"}))
    assert results.counts["failed"] == 1
    assert seen == ["s00", "s02", "s03"]
    assert results.value("accuracy", "pairs") == pytest.approx(0.5)


REQUIRED = {
    "amber": {"folder": "data", "images": "image"},
    "custom": {"file": "questions.jsonl"},
    "dash_b": {"folder": "images"},
    "halloc": {"file": "answers.jsonl", "images": "images"},
    "hub_choice": {"dataset": "owner/name"},
    "hub_yes_no": {"dataset": "owner/name"},
    "hallusion_bench": {"file": "HallusionBench.json", "images": "hallusion_bench"},
    "mme": {"folder": "MME_Benchmark_release_version"},
    "pope_nine": {"questions": "pope", "images": "images"},
    "phd": {"file": "data.json", "images": "images"},
}
"""What a user has to say, because the benchmark's files lie somewhere on his machine."""


def read_config(name):
    return yaml.safe_load((conf_folder() / "task" / f"{name}.yaml").read_text())


def whole_config(name):
    """Settings of a file together with those of the file that it builds on."""
    config = read_config(name)
    base = config.pop("defaults", [None])[0]
    return {**(read_config(base) if base else {}), **config}


DERIVED = [name for name in sorted(choices("task")) if "defaults" in read_config(name)]
"""Files that are another one with settings changed."""


@pytest.mark.parametrize("name", DERIVED)
def test_a_file_that_builds_on_another_changes_settings_of_that_alone(name):
    base, own = read_config(name)["defaults"]
    assert own == "_self_"
    assert whole_config(name).keys() == read_config(base).keys()
    assert build({**whole_config(name), **REQUIRED.get(name, {})}, Task, "task").name == name


@pytest.mark.parametrize("name", sorted({*choices("task")} - {*DERIVED}))
def test_every_argument_is_in_the_file_with_its_default(name):
    config = read_config(name)
    task = build({**config, **REQUIRED.get(name, {})}, Task, "task")
    assert task.name == name
    parameters = inspect.signature(type(task).__init__).parameters
    defaults = {key: value.default for key, value in parameters.items() if key != "self"}
    del config["_target_"]
    assert {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()} == defaults


@pytest.mark.parametrize("name", sorted(REQUIRED))
def test_what_is_required_is_asked_for(name):
    config = whole_config(name)
    for key in REQUIRED[name]:
        with pytest.raises(ConfigError, match=f"task.{key}"):
            build({**config, **REQUIRED[name], key: None}, Task, "task")


@pytest.mark.parametrize(
    ("name", "settings", "parser"),
    [
        ("amber", {}, "first_word"),
        ("hallusion_bench", {}, "either"),
        ("mme", {}, "prefix"),
        ("custom", {"kind": "yes_no"}, "first_word"),
        ("pope", {}, "official"),
        ("hub_choice", {}, "lone_letter"),
    ],
)
def test_the_parser_stands_below_the_figures(name, settings, parser):
    task = build({**whole_config(name), **REQUIRED.get(name, {}), **settings}, Task, "task")
    assert f"by the parser {parser!r}" in task.notes([])[0]


def test_a_task_without_a_parser_has_no_note():
    assert build({**whole_config("custom"), **REQUIRED["custom"]}, Task, "task").notes([]) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scene_seed": "one"}, "task.scene_seed='one' should be a whole number"),
        ({"scene_seed": True}, "task.scene_seed=True should be a whole number"),
        ({"source": ["hub"]}, r"task.source=\['hub'\] should be a text"),
        ({"suffix": 3}, "task.suffix=3 should be a text"),
        ({"subsets": 2.5}, "task.subsets=2.5 should be a list"),
        ({"filename": None}, "task.filename=None should be a text"),
    ],
)
def test_wrong_kinds_are_refused_in_python_as_in_a_configuration(settings, message):
    cls = Chair if "scene_seed" in settings else Pope
    node = {"_target_": f"{cls.__module__}.{cls.__name__}", **settings}
    for make in (lambda: cls(**settings), lambda: build(node, Task, "task")):
        with pytest.raises(ConfigError, match=message):
            make()


def test_arguments_by_position_and_of_a_base_class_are_checked_too():
    class Base(TinyTask):
        def __init__(self, title: str, limit: int | None = None) -> None:
            self.title, self.limit = title, limit

    class Derived(Base):
        def __init__(self, title: str | int, *, limit: "Annotation" = 1) -> None:  # noqa: F821  (for type checkers alone)
            super().__init__(str(title), limit)

    assert (Derived(7).title, Base("a").limit, Base(title="a", limit=2).limit) == ("7", None, 2)
    for make in (lambda: Base("a", 1.5), lambda: Derived("a", limit="1.5")):
        with pytest.raises(ConfigError, match=r"task.limit='?1.5'? should be a whole number"):
            make()
    with pytest.raises(TypeError, match="unexpected keyword argument 'no_such'"):
        Derived("a", no_such=1)


def test_a_task_still_takes_paths_and_numbers_as_names(tmp_path):
    task = Custom(file=tmp_path / "rows.jsonl", name=2024)
    assert (task.name, str(task.file)) == ("2024", str(tmp_path / "rows.jsonl"))
