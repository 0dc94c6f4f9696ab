"""Runs at an address: the files that make a run are copied, no others, and they read like the run itself."""

import os
from pathlib import Path

import fsspec
import pytest

from stethoscope.core.errors import ConfigError
from stethoscope.storage.reuse import FILES, local_run


@pytest.fixture
def bucket():
    files = fsspec.filesystem("memory")
    yield files
    files.rm("/bucket", recursive=True)


def test_the_files_of_a_run_are_copied_and_no_others(bucket):
    for name in (*FILES, "other.txt", "detector/../../evil.txt", "wandb/secret"):
        bucket.pipe(f"/bucket/runs/odd name/{name}", name.encode())
    folder = local_run("memory://bucket/runs/odd name/")
    assert folder.name == "odd-name"
    copied = {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert copied == {name: name for name in FILES}
    assert [path.name for path in folder.parent.iterdir()] == ["odd-name"]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("memory://bucket/none", "has no samples.jsonl"),
        ("nope://bucket/one", "Protocol not known: nope"),
    ],
)
def test_what_is_no_run_is_one_line(bucket, address, message):
    bucket.pipe("/bucket/none/metrics.json", b"{}")
    with pytest.raises(ConfigError, match=message) as error:
        local_run(address)
    assert "\n" not in str(error.value)


def test_a_folder_stays_where_it_is(tmp_path):
    assert local_run(str(tmp_path)) == tmp_path
    assert local_run("~/x") == Path(os.path.expanduser("~/x"))
