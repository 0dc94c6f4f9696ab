"""The real published files of the shared folder."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real published files; outside the repository, so tests that read them may have to be skipped."""
    folder = Path(os.environ.get("STETHOSCOPE_SHARED") or Path(__file__).parents[3] / "shared") / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is not there (STETHOSCOPE_SHARED names the folder above data/)")
    return folder
