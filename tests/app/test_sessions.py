"""What a session keeps and when it goes; errors of handlers end on the page; many users at once cost no memory."""

import io
import json
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers.page_client import API, Client, file
from PIL import Image

from stethoscope import testbed
from stethoscope.app import answer, sessions
from stethoscope.app.payload import without_folders
from stethoscope.app.runs import Runs
from stethoscope.app.sessions import NO_PICTURE, Sessions
from stethoscope.core.errors import DataError

DESCRIBE = "Please describe this image in detail."
USERS = 90


def png(image=None, size=None, colour=0):
    content = io.BytesIO()
    image = image or (Image.new("L", size, colour) if size else testbed.scenes(3)[2].image())
    image.save(content, "PNG")
    return content.getvalue()


@pytest.fixture
def client(served):
    client = Client(served.address)
    yield client
    client.close()


@pytest.fixture
def clock():
    """Make a clock that stands still until it is set."""

    class Clock:
        now = 1000.0

        def __call__(self):
            return self.now

    return Clock()


def write(folder, name, size=10, age=0):
    file = folder / name / "picture.png"
    file.parent.mkdir()
    file.write_bytes(b"x" * size)
    os.utime(file, (time.time() - age, time.time() - age))
    return file


def test_pictures_live_as_long_as_their_session(tmp_path, clock):
    example = write(tmp_path, "example", age=1000)
    store = Sessions(tmp_path, grace=60, clock=clock)
    store.share_files()
    mine, shared, orphan = (write(tmp_path, name, age=1000) for name in ("mine", "shared", "orphan"))
    fresh = write(tmp_path, "fresh")
    store.use("a", [mine, shared, example])
    with store.connection("b"):
        store.use("b", [shared])
        assert store.expire() == []
        assert not orphan.parent.exists()
        clock.now += 61
        assert store.expire() == ["a"]
        assert (mine.exists(), shared.exists(), fresh.exists(), example.exists()) == (False, True, True, True)
    clock.now += 59
    assert store.expire() == []
    clock.now += 2
    assert store.expire() == ["b"]
    assert not shared.exists()
    assert example.exists()


def test_an_open_page_that_asks_nothing_is_forgotten_too(tmp_path, clock):
    store = Sessions(tmp_path, idle=3600, clock=clock)
    with store.connection("a"):
        store.set_conversation("a", ["answer"])
        clock.now += 3599
        assert store.expire() == []
        assert store.conversation("a") == ("answer",)
        clock.now += 2
        assert store.expire() == ["a"]
        assert store.conversation("a") == ()
        store.set_conversation("a", ["another"])  # its user is back
        clock.now += 600
        assert store.expire() == []
        assert (store.conversation("a"), store.connections) == (("another",), 1)
    clock.now += 61
    assert (store.expire(), store.connections) == (["a"], 0)


def test_the_oldest_sessions_and_pictures_go_when_there_are_too_many(tmp_path, clock, monkeypatch):
    monkeypatch.setattr(sessions, "MAX_SESSIONS", 3)
    monkeypatch.setattr(sessions, "MAX_SESSION_BYTES", 250)
    store = Sessions(tmp_path, clock=clock)
    for name in "abcde":
        clock.now += 1
        store.use(name)
    with store.connection("a"):
        assert store.expire() == ["b", "c"]
        pictures = [write(tmp_path, name, size=100, age=1000) for name in ("one", "two", "three")]
        store.use("a", pictures)
        store.expire()
        assert [picture.exists() for picture in pictures] == [False, True, True]


def test_uploads_are_refused_when_the_folder_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(sessions, "MAX_UNCLAIMED_BYTES", 300)
    monkeypatch.setattr(sessions, "MAX_TOTAL_BYTES", 400)
    store = Sessions(tmp_path)
    picture = write(tmp_path, "picture", size=200)
    with store.upload(100) as refusal, store.upload(1) as second:
        assert refusal is None
        assert "try again" in second
    store.use("a", [picture])
    with store.upload(200) as refusal:
        assert refusal is None
    with store.upload(201) as refusal:
        assert "try again" in refusal


def test_uploads_have_a_limit(client, monkeypatch):
    monkeypatch.setattr(sessions, "MAX_UPLOAD", 1000)
    assert client.upload(b"x" * 200_000).status_code == 413
    chunks = (part for part in [b"x"])
    assert client.http.post(f"{API}/upload", content=chunks).status_code == 411


def test_a_picture_of_many_pixels_is_refused_when_it_arrives(client):
    """21 KB that would be 750 MB: its pixels are counted before they are decoded."""
    content = png(size=(13_300, 13_300))
    assert len(content) < 200_000
    shown = client.ask(file(client.upload(content).json()[0]))
    assert shown["kind"] == "error"
    assert "176,890,000 pixels" in shown["text"]


def test_a_session_holds_no_pixels(client, served):
    shown = client.ask(file(client.upload(png()).json()[0]), length=4)
    [kept] = served.sessions.conversation(client.session_hash)
    assert kept.id == shown["answer_id"]
    assert isinstance(kept.question.picture, Path)


def test_after_its_session_a_picture_and_what_gradio_kept_are_gone(client, served, monkeypatch):
    path = Path(client.upload(png(colour=7, size=(40, 40))).json()[0])
    client.ask(file(path), length=4)
    assert path.is_file()
    monkeypatch.setattr(served.sessions, "grace", 0.5)  # from the next time that sessions end
    until = time.monotonic() + 60
    while path.is_file() and time.monotonic() < until:
        time.sleep(0.1)
    assert not path.is_file()
    assert served.sessions.conversation(client.session_hash) == ()
    answer = client.join(file(path))
    assert (answer.status_code, answer.json()["detail"]) == (403, NO_PICTURE)


def test_a_session_cannot_fill_the_queue(client):
    picture = file(client.upload(png()).json()[0])
    answers = [client.join(picture, length=1).status_code for _ in range(sessions.MAX_PENDING + 3)]
    assert set(answers) <= {200, 429}
    assert answers.count(429) >= 1
    client.read()


@pytest.mark.parametrize(
    ("words", "kind", "reason"), [(90, "done", ""), (110, "error", "100 are answered"), (20_000, "error", "tokens")]
)
def test_long_questions_are_refused_before_the_model_runs(
    picture_file, pool, reader, adapter, monkeypatch, words, kind, reason
):
    monkeypatch.setattr(answer, "MAX_QUESTION", 100)
    with pool.use("testbed"):
        pass  # a detector may be tried when the model is loaded
    passes = []
    hook = adapter.model.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        question = answer.Question("testbed", picture_file(0), "dog " * words, answer.generation(length=1))
        shown = json.loads(list(answer.ask(pool, question, reader))[-1][0])
    finally:
        hook.remove()
    assert shown["kind"] == kind
    assert reason in shown.get("text", "")
    assert bool(passes) == (kind == "done")


def test_an_unexpected_error_ends_on_the_page_and_its_traceback_in_the_log(client, served, monkeypatch, caplog):
    def fail(*_, **__):
        raise AttributeError("'SimpleImputer' object has no attribute '_fill_dtype' in /secret/folder")

    monkeypatch.setattr(answer, "_diagnose", fail)
    shown = client.ask(file(client.upload(png()).json()[0]), length=4)
    assert (shown["kind"], shown["text"]) == ("error", "the server failed: AttributeError; its log says more")
    assert "_fill_dtype" in caplog.text
    monkeypatch.undo()
    assert client.ask(file(client.upload(png()).json()[0]), length=4)["kind"] == "done"


def test_messages_name_no_folder(picture_file, pool, reader, monkeypatch, tmp_path):
    def fail(*_, **__):
        raise DataError(f"{tmp_path}/some run/metrics.json is no JSON; run={tmp_path}/b, '{Path.home()}/c'")

    monkeypatch.setattr(answer, "_diagnose", fail)
    question = answer.Question("testbed", picture_file(0), DESCRIBE, answer.generation(length=2))
    shown = json.loads(list(answer.ask(pool, question, reader))[-1][0])
    assert shown["text"] == "metrics.json is no JSON; run=b, 'c'"
    assert without_folders("GET https://example.org/a/b of runs/c") == "GET https://example.org/a/b of runs/c"


def test_a_damaged_run_never_stops_the_app(folder, tmp_path, monkeypatch, caplog):
    from stethoscope.app import runs

    for name in ("good", "bad", "worse"):
        shutil.copytree(folder / "small", tmp_path / "runs" / name)
    (tmp_path / "runs" / "bad" / "metrics.json").write_text("[[")
    read = runs.RunReader.read

    def fail(folder, **options):
        if folder.name == "worse":
            raise RecursionError("in a reader")
        return read(folder, **options)

    monkeypatch.setattr(runs.RunReader, "read", fail)
    shown = Runs(tmp_path / "runs", None, tmp_path)
    assert shown.names == ["good"]
    assert "worse" in caplog.text
    shown._named.append(tmp_path / "runs" / "worse")
    for text in (shown.listing("worse"), shown.figures("worse")):
        assert json.loads(text)["note"] == "the server failed: RecursionError; its log says more"


def memory():
    """Bytes of this process that are in memory."""
    status = Path("/proc/self/status")
    if not status.is_file():
        pytest.skip("no /proc to read the memory from")
    return int(status.read_text().split("VmRSS:")[1].split()[0]) * 1024


def ask_once(address, number):
    client = Client(address)
    try:
        picture = file(client.upload(png(testbed.scenes(8)[number % 8].image())).json()[0])
        shown = client.ask(picture, "Is there a dog in the image?", length=4)
        return shown["kind"] if isinstance(shown, dict) and "kind" in shown else str(shown)
    finally:
        client.close()


def upload_hostile(address, number):
    """Upload a picture that is too large, no picture, or just small enough, and check the response."""
    client = Client(address)
    contents = [
        lambda: png(size=(13_300, 13_300)),
        lambda: b"\0" * 2**20,
        lambda: png(size=(8000, 8000), colour=number),
        lambda: png(size=(200_000, 1)),
        lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    ]
    try:
        answer = client.upload(contents[number % 5](), f"../{number}.png")
        return client.ask(file(answer.json()[0]), length=1).get("kind")
    finally:
        client.close()


@pytest.mark.slow
def test_ninety_users_and_twenty_hostile_uploads_leave_no_memory_behind(served, monkeypatch):
    assert ask_once(served.address, 0) == "done"  # everything is imported
    before = memory()
    with ThreadPoolExecutor(USERS) as users:
        kinds = list(users.map(lambda number: ask_once(served.address, number), range(USERS)))
    assert kinds == ["done"] * USERS
    with ThreadPoolExecutor(4) as users:
        kinds = list(users.map(lambda number: upload_hostile(served.address, number), range(25)))
    assert [kind for number, kind in enumerate(kinds) if number % 5 != 2] == ["error"] * 20
    monkeypatch.setattr(served.sessions, "grace", 0.5)
    until = time.monotonic() + 60
    while (len(served.sessions) or memory() - before > 100 * 2**20) and time.monotonic() < until:
        time.sleep(0.5)
    assert len(served.sessions) == 0
    assert memory() - before < 100 * 2**20
    assert threading.active_count() < 200
