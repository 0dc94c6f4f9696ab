"""Every file of conf/model runs a task with ``model.random_init=tiny``: no weights, no network."""

import functools
from pathlib import Path

import pytest

import stethoscope.conf
from stethoscope import testbed
from stethoscope.storage.run_dir import RunStore

pytestmark = pytest.mark.slow

FOLDER = Path(stethoscope.conf.__file__).parent / "model"
FILES = [path for path in sorted(FOLDER.glob("*.yaml")) if path.stem != "none"]


@pytest.fixture(scope="module", autouse=True)
def scenes_drawn_once():
    """The scenes, which are the same in every run, take longer than a tiny model does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(testbed, "scenes", functools.cache(testbed.scenes))
        yield


@pytest.mark.parametrize("name", [path.stem for path in FILES])
def test_a_tiny_model_of_the_same_kind_is_evaluated(name, stethoscope, tmp_path):
    printed = stethoscope(
        "evaluate", f"model={name}", "model.random_init=tiny", "task=pope", "task.source=testbed", "limit=4",
        "generation.max_new_tokens=4", "callbacks=none", "logger=none", "name=run", code=0,
    )  # fmt: skip
    assert "4 samples" in printed
    store = RunStore(tmp_path / "runs" / "run")
    records = list(store.records("pope"))
    assert len(records) == 4
    assert not any(record.error for record in records)
    assert store.fingerprints()["pope"]["adapter"]["random_init"] == "tiny"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_first_line_says_what_is_loaded(path):
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ")
    assert path.stem in ("hf", "testbed") or "GB in" in first
