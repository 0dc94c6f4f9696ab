"""The ``._`` files that macOS leaves beside every file on other disks and in archives are read as nothing."""

from stethoscope.adapters.fingerprint import _weight_files
from stethoscope.storage.sweep_jobs import FOLDER, Job, read_jobs

MAC = b"\0\5\26\7\0\2\0\0Mac OS X        \xb0\xff"


def test_jobs_of_a_sweep(tmp_path):
    job = Job("sweep", 0, ("limit=1",))
    job.write(tmp_path)
    (tmp_path / FOLDER / "._0000.json").write_bytes(MAC)
    assert [(read.index, read.overrides) for read in read_jobs(tmp_path, "sweep")] == [(0, job.overrides)]


def test_weights_of_a_model(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = _weight_files(tmp_path)
    for name in ("._model.safetensors", "._model.safetensors.index.json", "._pytorch_model.bin"):
        (tmp_path / name).write_bytes(MAC)
    assert _weight_files(tmp_path) == before
    assert [path.name for path in before] == ["model.safetensors"]
