"""What the server hands out, to whom, and what it says when it cannot start."""

import http.client
import http.server
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
from urllib.parse import urlsplit

import pytest

from stethoscope.app.access import loopback
from stethoscope.app.server import POLICY, start
from stethoscope.app.sessions import Sessions
from stethoscope.core.errors import ConfigError

TRICKS = [
    "/gradio_api/file={path}",
    "/file={path}",
    "/gradio_api/file={own}/../../..{path}",
    "/gradio_api/file={own}/..%2f..%2f..{path}",
    "/gradio_api/file=%2e%2e/%2e%2e/%2e%2e{path}",
    "/gradio_api/file=//{path}",
    "/gradio_api/file=file://{path}",
    "/gradio_api/file={path}%00.png",
    "/static/../../../..{path}",
    "/assets/..%2f..%2f..%2f..{path}",
    "/gradio_api/stream/../..{path}",
    "/gradio_api/proxy=file://{path}",
]


def get(address, path, method="GET", body=None, headers=None):
    """Send a request with its path unchanged, and return the response."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=120)
    connection.request(method, path, body, headers or {})
    answer = connection.getresponse()
    return answer.status, dict(answer.getheaders()), answer.read()


@pytest.mark.parametrize("trick", TRICKS)
def test_no_file_outside_its_own_folder_is_handed_out(served, trick):
    for path in (str(served.secret), "/etc/passwd", __file__):
        status, _, body = get(served.address, trick.format(path=path, own=served.own))
        assert status >= 400 or b"<gradio-app" in body or b"window.gradio_config" in body  # its own page, at most
        assert served.secret.read_bytes() not in body
        assert b"root:" not in body
        assert b"TRICKS" not in body


def test_its_own_pictures_are_handed_out(served):
    file = next(served.own.glob("counter-*.png"))
    status, _, body = get(served.address, f"/gradio_api/file={file}")
    assert (status, body) == (200, file.read_bytes())


def test_every_answer_forbids_other_servers(served):
    for path in ("/", "/config", "/gradio_api/file=/etc/passwd"):
        _, headers, _ = get(served.address, path)
        assert headers["content-security-policy"] == POLICY
        assert headers["x-content-type-options"] == "nosniff"
    assert "http" not in POLICY


def test_it_listens_on_this_machine_alone(served):
    assert urlsplit(served.address).hostname == "127.0.0.1"
    assert [loopback(host) for host in ("127.0.0.2", "::1", "localhost", "192.168.0.7", "::", "example.org")] == [
        True, True, True, False, False, False,
    ]  # fmt: skip


def test_a_port_that_is_taken_is_one_line(served):
    import gradio

    with gradio.Blocks() as other, pytest.raises(ConfigError, match="choose another with port="):
        start(other, "127.0.0.1", urlsplit(served.address).port, Sessions(served.own))


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _without_gradio(find):
    return lambda name, *more: None if name == "gradio" else find(name, *more)


def test_without_gradio_the_command_says_what_to_install(stethoscope, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", _without_gradio(real))
    assert 'gradio is not installed; pip install "lvlm-stethoscope[app]"' in stethoscope("app")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model=testbad"], "did you mean 'testbed'"),
        (["run=nothing"], "nothing is no directory"),
        (["detector=nothing"], "detector=nothing is no directory"),
        (["prot=1"], "did you mean 'port'"),
        (["hosts=[lab:7860,lab:port]"], "hosts=lab:port should be a host name"),
        (["notes=maybe"], "notes=maybe should be true, false or null"),
        (["beside=nothing"], "nothing is no directory"),
        (["beside=memory://no/run"], "memory://no/run is no run: it has no samples.jsonl"),
        (["run=s3://a/b", "notes=true"], "notes on s3://a/b would be lost with its copy"),
    ],
)
def test_what_is_wrong_is_said_before_the_page_is_served(stethoscope, words, message):
    assert message in stethoscope("app", *words)


class Refusing(http.server.BaseHTTPRequestHandler):
    """A proxy that lets nothing through."""

    def refuse(self):
        self.send_error(403)

    do_GET = do_HEAD = do_POST = do_CONNECT = refuse

    def log_message(self, *_):
        pass


@pytest.fixture
def proxy(monkeypatch):
    """All requests of this process would go through a proxy that refuses them."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name in ("http_proxy", "https_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{server.server_port}")
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.setenv(name, "")  # and back afterwards
        yield
        server.shutdown()


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_its_own_address_is_asked_without_a_proxy(proxy, host, tmp_path):
    import gradio

    with gradio.Blocks() as screen:
        gradio.Markdown("a page")
    address = start(screen, host, free_port(), Sessions(tmp_path), accounts={"me": "secret"})
    try:
        assert get(address, "/")[0] == 401
        assert get(address, "/", headers={"authorization": "Basic bWU6c2VjcmV0"})[0] == 200
    finally:
        screen.close(verbose=False)


def test_whatever_launch_raises_is_one_line(monkeypatch, tmp_path):
    import gradio

    def fail(*_, **__):
        raise RuntimeError("Unknown scheme for proxy URL\nand more")

    monkeypatch.setattr(gradio.Blocks, "launch", fail)
    with gradio.Blocks() as screen, pytest.raises(ConfigError, match="Unknown scheme for proxy URL") as error:
        start(screen, "127.0.0.1", free_port(), Sessions(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_the_command_serves_until_it_is_ended_and_leaves_nothing(folder, tmp_path):
    words = [sys.executable, "-m", "stethoscope", "app", f"run={folder / 'small'}", f"port={free_port()}"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    for ending in (signal.SIGTERM, signal.SIGINT):
        running = subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
        line = next(line for line in running.stdout if line.startswith("open http://127.0.0.1:"))
        assert get(line.split()[1], "/")[0] == 200
        assert list(tmp_path.glob("stethoscope-app-*"))
        running.send_signal(ending)
        assert running.wait(120) == 0
        assert not list(tmp_path.glob("stethoscope-app-*"))
