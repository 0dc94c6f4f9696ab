"""Output that nobody reads any more, or that cannot be written: the work is done all the same, or the error is said."""

import os
import subprocess
import sys

import pytest

from stethoscope.core.system import tolerate_closed_output


@pytest.fixture
def broken_pipe():
    """A descriptor whose other end is closed."""
    end, start = os.pipe()
    os.close(end)
    yield start
    os.close(start)


@pytest.mark.parametrize("name", ["stdout", "stderr"])
@pytest.mark.parametrize("buffered", [True, False])
def test_work_goes_on(broken_pipe, monkeypatch, name, buffered):
    stream = os.fdopen(os.dup(broken_pipe), "w") if buffered else _unbuffered(os.dup(broken_pipe))
    monkeypatch.setattr(sys, name, stream)
    done = []
    with tolerate_closed_output():
        for number in range(3):
            print("line", file=getattr(sys, name), flush=number == 1)
            done.append(number)
        assert getattr(sys, name).encoding == stream.encoding
    assert getattr(sys, name) is stream
    assert done == [0, 1, 2]
    stream.close()


def _unbuffered(descriptor):
    stream = os.fdopen(descriptor, "w")
    stream.reconfigure(write_through=True)
    return stream


def run(command, **more):
    code = f"import sys; from stethoscope.cli import main; main({command!r})"
    return subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, timeout=60, **more)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(("command", "status"), [(["list"], 0), (["list", "nonsense"], 2)])
def test_the_status_is_that_of_the_work(broken_pipe, unbuffered, command, status):
    done = run(command, stdout=broken_pipe, env={**os.environ, "PYTHONUNBUFFERED": unbuffered})
    assert done.returncode == status
    assert len(done.stderr.splitlines()) == (status == 2)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the machine has no device that is always full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_onto_a_full_disk_is_one_line(unbuffered):
    with open("/dev/full", "w") as full:
        done = run(["list"], stdout=full, env={**os.environ, "PYTHONUNBUFFERED": unbuffered})
    assert done.returncode == 2
    assert "no space left" in done.stderr
    assert len(done.stderr.splitlines()) == 1
