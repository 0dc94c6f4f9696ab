"""Other tools in environments of their own: their dependencies exclude ours (or our Python), so tests call them."""

import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "build" / "other-tools"


def run_with(tool: str, script: str, *arguments: object) -> str:
    """Run a script with the Python of another tool's environment and return what it prints.

    Args:
        tool: folder in ``build/other-tools``, which ``make other-tools`` fills.
        script: Python code.
        arguments: of the script.
    """
    python = FOLDER / tool / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{tool} is not installed: `make other-tools` puts it into {FOLDER.name}/{tool}")
    command = [str(python), "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=FOLDER)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
