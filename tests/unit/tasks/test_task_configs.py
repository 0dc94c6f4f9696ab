"""The configuration files say what the classes take, and nothing else."""

import inspect

import pytest
import yaml

from stethoscope.build import build, conf_folder
from stethoscope.task import Task


@pytest.mark.parametrize("name", ["pope", "chair"])
def test_every_argument_is_in_the_file_with_its_default(name):
    config = yaml.safe_load((conf_folder() / "task" / f"{name}.yaml").read_text())
    task = build(config, Task, "task")
    assert task.name == name
    parameters = inspect.signature(type(task).__init__).parameters
    defaults = {key: value.default for key, value in parameters.items() if key != "self"}
    del config["_target_"]
    assert {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()} == defaults
