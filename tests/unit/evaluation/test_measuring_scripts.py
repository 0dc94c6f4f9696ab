"""The scripts that measure, where what they print depends on more than the clock."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from stethoscope.core.errors import ArtefactError

SCRIPTS = Path(__file__).parents[3] / "scripts"


@pytest.fixture
def script(monkeypatch):
    """Return a function that imports a script by its folder and name, with those beside it."""

    def load(folder, name):
        monkeypatch.syspath_prepend(SCRIPTS / folder)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    return load


def test_every_batch_whose_time_is_divided_by_its_size_is_full(script):
    sizes = []
    script("bench", "mitigation").measure({"way": lambda prompts: sizes.append(len(prompts))}, range(24), 16, 4)
    assert sizes == [16] * 5


CHATTY = """
import sys
for line in sys.stdin:
    sys.stderr.write("a warning\\n" * 50_000)  # more than a pipe holds
    if "end" in line:
        sys.exit("the last word")
    print("[1, 2]", flush=True)
"""


def test_a_worker_may_write_as_many_warnings_as_it_likes(script, monkeypatch, tmp_path):
    against = script("bench", "against")
    (tmp_path / "worker.py").write_text(CHATTY)
    monkeypatch.setattr(against, "WORKER", str(tmp_path / "worker.py"))
    checkout = against.Checkout(tmp_path, tmp_path / "runs", 1)
    assert checkout.ask("speak") == checkout.ask("speak") == [1, 2]
    with pytest.raises(SystemExit, match="end failed") as failure:
        checkout.ask("end")
    assert str(failure.value).endswith("the last word\n")
    checkout.close()


def test_sizes_of_processes_are_in_megabytes(script):
    unit = 1 if sys.platform == "darwin" else 1024  # bytes or KiB
    assert script("bench", "harness").largest_size(SimpleNamespace(ru_maxrss=2_000_000_000 // unit)) == 2000


def test_shifts_without_home_still_learn_from_it(script, monkeypatch, tmp_path):
    shift, runs = script("check", "shift"), []
    monkeypatch.setattr(shift, "make_run", lambda out, name, *_: runs.append(name) or tmp_path / name)
    monkeypatch.setattr(sys, "argv", ["shift.py", str(tmp_path), "--only", "noise"])
    with pytest.raises(ArtefactError, match="home"):  # nothing was made here
        shift.main()
    assert runs == ["home", "noise"]
