"""A finished run of the embedded model, whose mentions a detector has judged."""

import shutil

import pytest

from stethoscope import Evaluator, load
from stethoscope.core.component import build, compose
from stethoscope.detection.lookup import load_detector, mention_warnings, write_warnings
from stethoscope.storage.run_dir import RunStore
from stethoscope.tasks.base import Task
from stethoscope.testbed import DETECTOR_DIR

SECRET = "hf_" + "aBcD1234" * 4


@pytest.fixture(scope="session")
def testbed_run(tmp_path_factory):
    """A run directory with POPE and CHAIR on a few scenes; not to be written to."""
    from stethoscope.features import named_set

    folder = tmp_path_factory.mktemp("runs") / "quick"
    config = compose(["+task@pope=pope", "+task@chair=chair", "+model=testbed"])
    adapter = load("testbed")
    for name, features in (("pope", None), ("chair", named_set("default"))):
        task = build(config[name], Task, name)
        Evaluator(run_dir=folder, limit=6, features=features).run(adapter, task)
    store = RunStore(folder)
    store.write_config(config)
    write_warnings(mention_warnings(store.tokens("chair"), load_detector(DETECTOR_DIR)), folder / "warnings.jsonl")
    return folder


@pytest.fixture
def own_run(testbed_run, tmp_path):
    """A copy of the run that a test may change."""
    return shutil.copytree(testbed_run, tmp_path / "quick")
