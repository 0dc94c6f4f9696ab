"""Runs a notebook from top to bottom in an empty folder and writes it back with its outputs.

    python tests/slow/run_notebook.py                     # examples/tour.ipynb
    python tests/slow/run_notebook.py mine.ipynb --out other.ipynb

Needs ``pip install "lvlm-stethoscope[notebook]"``. When a cell ran, and what it wrote to stderr, is left out.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

TOUR = Path(__file__).parents[2] / "examples" / "tour.ipynb"


def run(path: Path, folder: Path, timeout: int = 300):
    """Runs all cells of a notebook.

    Args:
        path: the notebook; it is only read.
        folder: working directory of the cells.
        timeout: seconds that one cell may take.

    Returns:
        The notebook (``nbformat.NotebookNode``) with its outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raises an error.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=timeout, resources={"metadata": {"path": str(folder)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = list(_tidy(cell.outputs))
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def _tidy(outputs: list) -> Iterator:
    """Outputs without what was written to stderr, texts that follow each other as one, pictures in one format."""
    last = None
    for output in outputs:
        if output.get("name") == "stderr":
            continue
        if output.output_type == "stream" and last is not None and last.output_type == "stream":
            last.text += output.text
            continue
        if "image/jpeg" in output.get("data", {}):
            output.data.pop("image/png", None)
        if last is not None:
            yield last
        last = output
    if last is not None:
        yield last


def main() -> None:
    """Runs the notebook named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", nargs="?", type=Path, default=TOUR)
    parser.add_argument("--out", type=Path, help="where to write it; by default where it was")
    arguments = parser.parse_args()
    try:
        import nbclient
        import nbformat
    except ImportError:
        sys.exit('nbclient is not installed; pip install "lvlm-stethoscope[notebook]"')
    with tempfile.TemporaryDirectory() as folder:
        try:
            notebook = run(arguments.notebook, Path(folder))
        except nbclient.exceptions.CellExecutionError as error:
            sys.exit(f"{arguments.notebook}: a cell failed: {error.ename}: {error.evalue}")
    out = arguments.out or arguments.notebook
    nbformat.write(notebook, out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
