"""Jobs of a sweep are read from its folder; the ``._`` files that macOS leaves beside others are read as nothing."""

from stethoscope.storage.sweep_jobs import FOLDER, Job, read_jobs

MAC = b"\0\5\26\7\0\2\0\0Mac OS X        \xb0\xff"


def test_jobs_of_a_sweep(tmp_path):
    job = Job("sweep", 0, ("limit=1",))
    job.write(tmp_path)
    (tmp_path / FOLDER / "._0000.json").write_bytes(MAC)
    assert [(read.index, read.overrides) for read in read_jobs(tmp_path, "sweep")] == [(0, job.overrides)]
