"""The example notebook, run afresh: what its cells show is what the library says."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from stethoscope.diagnosis.render import MEANING

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
TOUR = ROOT / "examples" / "tour.ipynb"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the cells worked."""
    return tmp_path_factory.mktemp("notebook")


@pytest.fixture(scope="module")
def cells(folder):
    """Its code cells with their outputs."""
    spec = importlib.util.spec_from_file_location("run_notebook", ROOT / "tests" / "slow" / "run_notebook.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return [cell for cell in script.run(TOUR, folder).cells if cell.cell_type == "code"]


def outputs(cells, words):
    """Outputs of the cells whose source has these words."""
    return [output for cell in cells if words in cell.source for output in cell.outputs]


def printed(cells, words):
    return "".join(output.text for output in outputs(cells, words) if output.output_type == "stream")


def test_every_cell_shows_something(cells):
    assert len(cells) > 10
    for cell in cells:
        assert cell.outputs, cell.source
        assert not [output for output in cell.outputs if output.get("name") == "stderr"]


def test_pictures_are_shown(cells):
    (picture,) = outputs(cells, "image.resize")
    assert "image/jpeg" in picture.data
    (figure,) = outputs(cells, "diagnosis.plot")
    assert "image/png" in figure.data
    first, second = outputs(cells, "diagnosis = stethoscope.diagnose")
    assert "blue: how improbable" in first.data["text/html"]
    assert f"red: {MEANING['unknown']}" in second.data["text/html"]
    assert second.data["text/html"].count("<img ") > 1
    assert "<script" not in second.data["text/html"]


def test_what_is_printed_is_what_the_run_holds(cells, folder):
    metrics = json.loads((folder / "runs" / "tour" / "metrics.json").read_text())
    (row,) = [row for row in metrics["chair"]["metrics"] if row["metric"] == "chair_i"]
    assert f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]" in printed(cells, "Evaluator(")
    boards = re.findall(r"^(\S.*?) +AUROC (\d\.\d\d)", printed(cells, "train_detector(table"), re.MULTILINE)
    board = dict(boards)
    assert float(board["detector"]) > float(board["constant"]) == 0.5
    assert (folder / "runs" / "tour" / "detector" / "manifest.json").is_file()
    assert "<!DOCTYPE html>" in (folder / "runs" / "tour" / "diagnosis.html").read_text()


def test_streamed_warnings_are_those_of_the_diagnosis(cells):
    answer = printed(cells, "adapter.generate").splitlines()[0]
    streamed, _, named = printed(cells, "stethoscope.stream").partition("\n\n")
    assert streamed.strip() == answer.strip()
    match = re.search(r"(.*): (\d+%) hallucinated", printed(cells, "doubtful ="))
    most = max(int(share) for share in re.findall(r"^ *(\d+)% ", named, re.MULTILINE))
    assert abs(most - int(match[2][:-1])) <= 1
    assert match[1] in named


def test_the_notebook_in_the_repository_was_run(cells):
    """Its outputs are of this notebook: every cell ran, in order, and none failed."""
    stored = [cell for cell in nbformat.read(TOUR, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in stored] == list(range(1, len(stored) + 1))
    assert [len(cell.outputs) for cell in stored] == [len(cell.outputs) for cell in cells]
    assert not [output for cell in stored for output in cell.outputs if output.output_type == "error"]
