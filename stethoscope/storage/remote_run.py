"""Copy a run from an address, such as ``s3://bucket/runs/one``, for as long as a command needs it."""

from __future__ import annotations

import atexit
import re
import shutil
import sys
import tempfile
from pathlib import Path

from stethoscope.core.errors import ConfigError
from stethoscope.core.text import one_line

FILES = (
    "samples.jsonl", "status.json", "planned.json", "metrics.json", "fingerprint.json", "environment.json",
    "config.yaml", "overrides.yaml", "warnings.jsonl", "notes.jsonl", "maps.jsonl", "tokens.parquet",
    "detector/manifest.json", "detector/detector.safetensors",
)  # fmt: skip
"""Files of a run that are copied where they are there: no others, whatever the address holds."""


def is_address(path: str) -> bool:
    """Return whether a run is named by an address, and not by a folder of this machine.

    >>> is_address("s3://bucket/runs/one"), is_address("runs/one")
    (True, False)
    """
    return re.match(r"[a-z][a-z0-9+.-]*://", path) is not None


def local_run(path: str) -> Path:
    """Return the folder of a run; one at an address is copied to a temporary folder, which goes with the process.

    Args:
        path: of a folder, or an address of a file system that fsspec knows, such as ``s3://`` with s3fs installed.

    Raises:
        ConfigError: there is no run at the address, or it cannot be read.
    """
    if not is_address(path):
        return Path(path).expanduser()
    from fsspec.core import url_to_fs  # comes with datasets; few commands need it

    copied = Path(tempfile.mkdtemp(prefix="stethoscope-run-"))
    atexit.register(shutil.rmtree, copied, ignore_errors=True)
    try:
        files, root = url_to_fs(path.rstrip("/"))
        folder = copied / (re.sub(r"[^\w.=+-]", "-", root.rpartition("/")[2]).lstrip(".") or "run")
        sizes = {name: files.size(f"{root}/{name}") for name in FILES if files.isfile(f"{root}/{name}")}
        if "samples.jsonl" not in sizes:
            raise ConfigError(f"{path} is no run: it has no samples.jsonl")
        print(f"copying {path}, {sum(size or 0 for size in sizes.values()) / 1e6:.1f} MB ...", file=sys.stderr)
        (folder / "detector").mkdir(parents=True)
        for name in sizes:
            files.get_file(f"{root}/{name}", str(folder / name))
    except ConfigError:
        raise
    except Exception as error:  # every kind of storage has its own
        raise ConfigError(f"{path} cannot be read: {one_line(error) or type(error).__name__}") from error
    if not any((folder / "detector").iterdir()):
        (folder / "detector").rmdir()
    return folder
