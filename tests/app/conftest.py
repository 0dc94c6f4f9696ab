"""One finished run, one server and one browser for all tests of the page."""

import json
import os
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

import stethoscope as package
from stethoscope import testbed
from stethoscope.app.model_pool import ModelPool
from stethoscope.app.pictures import write_examples
from stethoscope.app.runs import Runs
from stethoscope.cli import main
from stethoscope.detection import leaderboard
from stethoscope.tasks.extraction import load_extraction

SCENES = 60
SMALL = ["features=fast", "callbacks=none", "logger=none", "detector.C=0.1", "batch_size=32"]
SMALL += [f"limit={SCENES}", f"pope.scenes={SCENES}", f"chair.scenes={SCENES}"]
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
EVIL = "<script>window.pwned = 1</script> **bold** "


@pytest.fixture(scope="session")
def adapter():
    return package.load("testbed")


@pytest.fixture(scope="session")
def reader():
    return load_extraction("coco")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Make a folder of runs, one of them with a detector that can score during generation."""
    folder = tmp_path_factory.mktemp("app")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(leaderboard, "SHUFFLES", 1)
        with pytest.raises(SystemExit) as end:
            main(["benchmark", "name=small", *SMALL])
        assert end.value.code == 0
    return folder / "runs"


@pytest.fixture
def picture_file(tmp_path):
    """Return a function that writes a rendered scene to a file and returns its path."""

    def write(number):
        file = tmp_path / f"scene-{number}.png"
        testbed.scenes(number + 1)[number].image().save(file)
        return file

    return write


@pytest.fixture
def pool(adapter, folder):
    return ModelPool(adapter, "testbed", runs=folder)


@pytest.fixture(scope="session")
def served(adapter, folder, reader, tmp_path_factory):
    """Serve the page; give its address, pool and folder, and a file that it must not send."""
    pytest.importorskip("gradio", reason='no gradio; pip install "lvlm-stethoscope[app]"')
    from stethoscope.app.server import own_folder, start
    from stethoscope.app.sessions import Sessions
    from stethoscope.app.ui import build_page

    runs = shutil.copytree(folder, tmp_path_factory.mktemp("shown") / "runs")
    hostile(runs / "small" / "samples.jsonl")
    secret = tmp_path_factory.mktemp("outside") / "secret.txt"
    secret.write_text("the server must not hand this out")
    pool = ModelPool(adapter, "testbed", runs=runs)
    with own_folder() as own:
        with pool.use("testbed"):
            sessions = Sessions(own, grace=3600)  # none ends while a test is slow
            shown = Runs(runs, None, own, writable=True)
            screen = build_page(pool, shown, reader, write_examples(own, 1, 3), sessions)
        address = start(screen, "127.0.0.1", free_port(), sessions).rstrip("/")
        yield SimpleNamespace(
            address=address, pool=pool, secret=secret, own=own, evil=EVIL, sessions=sessions, runs=runs
        )
        screen.close(verbose=False)


def hostile(file):
    """Replace the beginning of every stored answer with a script of the same length."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        if len(line["answer"]["text"]) > len(EVIL):
            line["answer"]["text"] = EVIL + line["answer"]["text"][len(EVIL) :]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def browser():
    """Start the installed Chromium, for one file of tests: its event loop would be in the way of other files."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = os.environ.get("STETHOSCOPE_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    with playwright.sync_playwright() as running:
        if path is None and Path(running.chromium.executable_path).is_file():
            path = running.chromium.executable_path
        if path is None:
            pytest.skip("no Chromium is installed")
        chromium = running.chromium.launch(executable_path=path, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def stethoscope(tmp_path, monkeypatch, capsys):
    """Return a function that runs a failing command in an empty folder and returns its last line on stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        with pytest.raises(SystemExit) as end:
            main([str(word) for word in words])
        assert end.value.code == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    return call
