"""The configuration files say what the classes take, and nothing else."""

import inspect

import pytest
import yaml

from stethoscope.core.component import build, choices, conf_folder
from stethoscope.core.errors import ConfigError
from stethoscope.tasks.base import Task

REQUIRED = {
    "amber": {"folder": "data", "images": "image"},
    "custom": {"file": "questions.jsonl"},
    "halloc": {"file": "answers.jsonl", "images": "images"},
    "hallusion_bench": {"file": "HallusionBench.json", "images": "hallusion_bench"},
    "mme": {"folder": "MME_Benchmark_release_version"},
}
"""What a user has to say, because the benchmark's files lie somewhere on his machine."""


@pytest.mark.parametrize("name", sorted(choices("task")))
def test_every_argument_is_in_the_file_with_its_default(name):
    config = yaml.safe_load((conf_folder() / "task" / f"{name}.yaml").read_text())
    task = build({**config, **REQUIRED.get(name, {})}, Task, "task")
    assert task.name == name
    parameters = inspect.signature(type(task).__init__).parameters
    defaults = {key: value.default for key, value in parameters.items() if key != "self"}
    del config["_target_"]
    assert {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()} == defaults


@pytest.mark.parametrize("name", sorted(REQUIRED))
def test_what_is_required_is_asked_for(name):
    config = yaml.safe_load((conf_folder() / "task" / f"{name}.yaml").read_text())
    for key in REQUIRED[name]:
        with pytest.raises(ConfigError, match=f"task.{key}"):
            build({**config, **REQUIRED[name], key: None}, Task, "task")
