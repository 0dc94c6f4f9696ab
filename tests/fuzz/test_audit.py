"""Hostile strings in runs, detectors, models and data sets: nothing runs, nothing hangs, all errors are one line.

``python tests/slow/fuzz.py --cases 2000`` runs more of them with another seed.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from fuzz import data_sets
from fuzz.audit import CANARY
from fuzz.mutations import MARK
from PIL import Image

from stethoscope.adapters import tiny
from stethoscope.cli import main
from stethoscope.testbed import DETECTOR_DIR

CASES, SEED = int(os.environ.get("STETHOSCOPE_FUZZ_CASES", 2000)), int(os.environ.get("STETHOSCOPE_FUZZ_SEED", 0))
SLOWEST = 10  # seconds of processor time that a case may take
SMALL = (
    "features=uncertainty", "callbacks=none", "detector.C=0.1", "batch_size=64", "limit=20", "pope.scenes=20",
    "chair.scenes=20",
    "+callbacks.maps._target_=stethoscope.evaluation.callbacks.SaveHeatmaps", "logger=none", "published=false",
)  # fmt: skip


class Payload:
    """Unpickled it leaves the mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (Path(self.mark),)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with whole files of every kind, and beside them what hostile strings point at."""
    work = tmp_path_factory.mktemp("audit")
    base, outside = work / "base", work / "outside"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        with pytest.raises(SystemExit) as end:
            main(["benchmark", "name=one", f"runs={base / 'run'}", *SMALL])
    assert end.value.code == 0
    shutil.copytree(DETECTOR_DIR, base / "detector")
    model, processor = tiny.build("llava")
    for folder in (base / "model", outside / "model"):
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    data_sets.write(base / "data")
    make_outside(outside, work / MARK)
    return work


def make_outside(folder, mark):
    """What may not be touched: a picture, a pickle, a pipe that nobody writes to, a package that leaves the mark."""
    package = folder / "path" / CANARY
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"open({str(mark)!r}, 'w').close()\n\nclass Payload: pass\n")
    Image.new("RGB", (8, 8)).save(folder / "secret.png")
    (folder / "pickled.bin").write_bytes(pickle.dumps(Payload(str(mark))))
    os.mkfifo(folder / "fifo")
    described = folder / "model" / "config.json"
    if described.is_file():
        own = {"auto_map": {"AutoConfig": f"{CANARY}.Payload", "AutoModelForImageTextToText": f"{CANARY}.Payload"}}
        described.write_text(json.dumps(json.loads(described.read_text()) | own))
        shutil.copy(package / "__init__.py", folder / "model" / f"{CANARY}.py")


def run_cases(work, seed, count):
    """Reports of the worker, one for each case; a worker that dies or hangs is started again behind that case."""
    reports, first = {}, 0
    log = work / "worker.log"
    words = [sys.executable, str(Path(__file__).with_name("worker.py")), str(work), str(seed)]
    while first < count:
        with log.open("w") as stderr:
            done = subprocess.run([*words, str(first), str(count)], stdout=subprocess.PIPE, stderr=stderr, text=True)
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        reports |= {line["case"]: line for line in lines}
        if not lines or (done.returncode == 0 and len(reports) < count):
            raise AssertionError(f"the worker ended with {done.returncode}: {log.read_text()[-3000:]}")
        last = lines[-1]
        if "seconds" not in last:
            last["faults"] = [f"the process ended with {done.returncode}: {log.read_text()[-3000:]}"]
        first = last["case"] + 1
    return [reports[number] for number in sorted(reports)]


def problems(reports):
    """Lines about all cases that did what they may not."""
    lines = []
    for report in reports:
        wrong = [*report.get("events", ()), *report.get("faults", ())]
        if report.get("cpu", 0) > SLOWEST:
            wrong.append(f"took {report['cpu']} s")
        if wrong:
            lines.append(f"case {report['case']}, {report['kind']}, {report['changed']}:\n  " + "\n  ".join(wrong))
    return lines


def summary(reports, seconds):
    """What was done, in a line."""
    kinds = Counter(report["kind"] for report in reports)
    refused = sum(bool(report.get("refused")) for report in reports)
    slowest = max(report.get("cpu", 0) for report in reports)
    shares = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    return (
        f"{len(reports)} cases ({shares}), {refused} refused in one line, slowest {slowest} s, {seconds:.0f} s in all"
    )


def check(world, seed, count):
    start = time.monotonic()
    reports = run_cases(world, seed, count)
    lines = problems(reports)
    print(summary(reports, time.monotonic() - start))
    folder = os.environ.get("STETHOSCOPE_FUZZ_REPORT")
    if folder:
        Path(folder).write_text("\n".join(map(json.dumps, reports)) + "\n")
    assert not lines, f"{len(lines)} of {count}:\n" + "\n".join(lines[:20])


@pytest.mark.slow
def test_a_hundred_hostile_files(world):
    check(world, 0, 100)


def test_eight_hostile_files(world):
    check(world, 0, 8)


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_two_thousand_hostile_files(world):
    check(world, SEED + 1, CASES)


def test_the_audit_sees_what_it_should(tmp_path):
    """Each in a process of its own, since an audit hook stays for ever."""
    work, outside = tmp_path / "work", tmp_path / "outside"
    work.mkdir()
    make_outside(outside, tmp_path / MARK)
    deeds = {
        f"import {CANARY}": f"import {CANARY}",
        "import os; os.system('true')": "os.system",
        "import subprocess; subprocess.run(['true'])": "subprocess.Popen",
        "import socket; socket.getaddrinfo('127.0.0.1', 9)": "socket.getaddrinfo",
        f"open({str(outside / 'secret.png')!r}).close()": "read ",
        f"open({str(outside / 'new')!r}, 'w').close()": "write ",
        f"import os; os.mkdir({str(outside / 'made')!r})": "os.mkdir",
        f"import pickle; pickle.load(open({str(outside / 'pickled.bin')!r}, 'rb'))": "unpickled ('pathlib'",
        "import csv; open('inside', 'w').close()": "",
    }
    code = (
        "import sys, pathlib, contextlib; sys.path[:0] = [{tests!r}, {path!r}]\nfrom audit import Audit\n"
        "audit = Audit(pathlib.Path({work!r}))\nwith audit.watching() as found, contextlib.suppress(Exception):\n"
        "    exec({deed!r})\nprint('; '.join(found))\n"
    )
    for deed, event in deeds.items():
        text = code.format(tests=str(Path(__file__).parent), path=str(outside / "path"), work=str(work), deed=deed)
        done = subprocess.run([sys.executable, "-c", text], cwd=work, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert event in done.stdout, (deed, done.stdout)
        assert event or not done.stdout.strip(), (deed, done.stdout)
