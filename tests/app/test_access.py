"""Who may talk to the app: its names, its own page, accounts, its routes, and no file but its own."""

import io
import os

import pytest
from helpers.page_client import API, Client, file

from stethoscope import testbed
from stethoscope.app import access
from stethoscope.app.access import add_to_no_proxy, read_accounts, read_hosts
from stethoscope.app.sessions import NO_PICTURE
from stethoscope.core.errors import ConfigError

CLOSED = [
    "/run/ask",
    "/api/ask",
    "/call/ask",
    "/call/v2/ask",
    "/proxy=http://127.0.0.1:9/",
    "/component_server",
    "/info",
]
CLOSED += [
    "/stream/1",
    "/deep_link",
    "/queue/join/",
    "/queue/status",
    "/process_recording",
    "/runs",
    "/file/etc/passwd",
]


@pytest.fixture
def client(served):
    client = Client(served.address)
    yield client
    client.close()


def png(number=2):
    content = io.BytesIO()
    testbed.scenes(number + 1)[number].image().save(content, "PNG")
    return content.getvalue()


def test_every_foreign_path_gets_one_and_the_same_answer(served, client, tmp_path):
    picture = tmp_path / "picture.png"
    picture.write_bytes(png())
    (served.own / "link.png").symlink_to(picture)
    paths = [str(picture), str(tmp_path), str(served.secret), "/no/such.png", "/proc/self/environ", "picture.png", "\0"]
    paths += [
        "http://127.0.0.1:9/a.png",
        f"file://{picture}",
        f"{served.own}/../{picture.name}",
        str(served.own),
        "x" * 5000,
    ]
    paths += [f"{served.own}/link.png", 5, [str(picture)], {"path": str(picture)}]
    try:
        for path in paths:
            for meta in ({}, {"meta": {"_type": "gradio.FileData"}}, {"url": f"http://127.0.0.1:9{picture}"}):
                answer = client.join({"path": path, **meta})
                assert (answer.status_code, answer.json()) == (403, {"detail": NO_PICTURE}), path
        hidden = client.join(None, event_data={"deep": [{"path": str(picture)}]})
        assert (hidden.status_code, hidden.json()) == (403, {"detail": NO_PICTURE})
    finally:
        (served.own / "link.png").unlink()
    assert "there is no picture yet" in client.ask({"url": "http://127.0.0.1:9/a.png"})["text"]


def test_no_address_is_fetched_and_no_file_told_from_a_folder(served, client):
    for path in (
        "http://127.0.0.1:9/a.png",
        "https://example.org/a.png",
        "/etc/passwd",
        "/etc",
        "/no/such",
        served.own,
    ):
        answer = client.http.get(f"{API}/file={path}")
        assert (answer.status_code, answer.json()) == (403, {"detail": NO_PICTURE})


def test_an_uploaded_picture_is_answered_about(client):
    shown = client.ask(file(client.upload(png()).json()[0]), length=4)
    assert (shown["kind"], shown["photo"][:15]) == ("done", "data:image/png;")


def test_routes_that_the_page_does_not_use_are_closed(client):
    for path in CLOSED:
        for method in ("GET", "POST"):
            assert client.http.request(method, API + path, json={}).status_code == 404, path
    assert client.http.get("/monitoring").status_code == 404


@pytest.mark.parametrize("body", [b"[" * 100_000, b"[]", b'"x"', b"\xff", b"{}", b'{"session_hash": ["x"]}'])
def test_a_body_that_is_no_question_is_refused(client, body):
    assert client.http.post(f"{API}/queue/join", content=body).status_code == 400


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "localhost.evil.example", "me@localhost", "[::2]", ""]
)
def test_another_host_name_is_refused(client, host):
    for path in ("/", "/config", f"{API}/heartbeat/x"):
        assert client.http.get(path, headers={"host": host}).status_code in (400, 403)
    assert client.upload(png(), headers={"host": host}).status_code in (400, 403)


def test_loopback_names_are_answered(client, served):
    port = served.address.rpartition(":")[2]
    for host in ("localhost", "127.0.0.1", "[::1]", "LOCALHOST"):
        assert client.http.get("/config", headers={"host": f"{host}:{port}"}).status_code == 200


def test_another_origin_is_refused(client, served):
    netloc = served.address.removeprefix("http://")
    foreign = [
        "http://evil.example",
        "null",
        "http://localhost:1",
        f"http://{netloc}.evil.example",
        f"ftp://{netloc}",
        "http://[",
    ]
    for origin in foreign:
        headers = {"origin": origin}
        assert client.upload(png(), headers=headers).status_code == 403
        for path in (f"{API}/queue/data?session_hash=x", f"{API}/heartbeat/x", "/config"):
            assert client.http.get(path, headers=headers).status_code == 403
    headers = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}
    assert client.http.get("/config", headers=headers).status_code == 403
    assert client.upload(png(), headers={"origin": served.address}).status_code == 200
    preflight = client.http.options(
        f"{API}/queue/join", headers={"origin": "http://evil.example", "access-control-request-method": "POST"}
    )
    assert "access-control-allow-origin" not in preflight.headers


def answer(middleware, path="/", client_headers=(), kind="http", server=("127.0.0.1", 1)):
    """Return the status of the middleware's response; 200 if it hands the request on."""
    import asyncio

    sent = []

    async def call():
        headers = [(name.encode(), value.encode()) for name, value in client_headers]

        async def send(message):
            sent.append(message.get("status", message["type"]))

        await middleware({"type": kind, "path": path, "headers": headers, "server": server}, None, send)

    asyncio.run(call())
    return sent[0]


async def application(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})


def test_further_names_and_the_address_of_the_connection_are_known():
    middleware = access.AccessMiddleware(application, "0.0.0.0", ["lab.example"])
    for host in ("lab.example:7860", "LAB.example", "192.168.0.7:7860", "0.0.0.0:7860"):
        assert answer(middleware, client_headers=[("host", host)], server=("192.168.0.7", 7860)) == 200
    assert answer(middleware, client_headers=[("host", "192.168.0.8")], server=("192.168.0.7", 7860)) == 403
    both = [("host", "localhost"), ("origin", "https://lab.example")]
    assert answer(middleware, client_headers=both) == 200
    assert answer(middleware, client_headers=[("host", "localhost"), ("host", "lab.example")]) == 403
    assert answer(middleware, kind="websocket", client_headers=[("host", "localhost")]) == "websocket.close"


@pytest.mark.parametrize(
    ("hosts", "known", "refused"),
    [
        (["lab.example:7860"], ["lab.example:7860", "LAB.example:7860"], ["lab.example", "lab.example:80"]),
        (["Lab:80", "proxy:443"], ["lab", "lab:80", "proxy"], ["lab:8080", "proxy:80"]),
        (["fd00::7", "[fd00::8]:7860"], ["[fd00::7]:1", "[fd00::7]", "[fd00::8]:7860"], ["[fd00::8]", "[fd00::9]"]),
    ],
)
def test_a_further_name_may_have_a_port(hosts, known, refused):
    middleware = access.AccessMiddleware(application, "127.0.0.1", read_hosts(hosts))
    for names, status in ((known, 200), (refused, 403)):
        assert [answer(middleware, client_headers=[("host", name)]) for name in names] == [status] * len(names)
        origins = [[("host", "localhost"), ("origin", f"http://{name}")] for name in names if "proxy" not in name]
        assert [answer(middleware, client_headers=headers) for headers in origins] == [status] * len(origins)


def test_the_port_of_an_origin_is_that_of_its_scheme():
    middleware = access.AccessMiddleware(application, "127.0.0.1", read_hosts(["proxy:443"]))
    for origin, status in (("https://proxy", 200), ("https://proxy:443", 200), ("http://proxy", 403)):
        assert answer(middleware, client_headers=[("host", "localhost"), ("origin", origin)]) == status


def test_what_is_no_host_name_is_refused():
    for wrong in ("http://lab", "lab:port", "me@lab", "lab/page", "", "lab:7860:1x"):
        with pytest.raises(ConfigError, match="should be a host name"):
            read_hosts([wrong])


def test_only_a_verified_author_is_handed_on(monkeypatch):
    monkeypatch.setattr(access, "LOGIN_DELAY", 0)
    seen = []

    async def page(scope, receive, send):
        seen.append([value for name, value in scope["headers"] if name == b"authorization"])
        await application(scope, receive, send)

    mine, forged = "Basic bWU6c2VjcmV0", "Basic Ym9zczp3cm9uZw=="  # me:secret, boss:wrong
    for accounts, sent, status, handed_on in (
        (None, [forged], 200, [[]]),
        ({"me": "secret"}, [mine], 200, [[mine.encode()]]),
        ({"me": "secret"}, [forged, mine], 200, [[mine.encode()]]),
        ({"me": "secret"}, [mine, forged], 401, []),
    ):
        seen.clear()
        headers = [("host", "localhost"), *(("authorization", value) for value in sent)]
        middleware = access.AccessMiddleware(page, "127.0.0.1", (), accounts)
        assert (answer(middleware, client_headers=headers), seen) == (status, handed_on)
    seen.clear()
    headers = [("host", "localhost"), ("authorization", forged)]
    middleware = access.AccessMiddleware(page, "127.0.0.1", (), {"me": "secret"})
    assert (answer(middleware, access.STARTUP, headers), seen) == (200, [[]])


def test_accounts_guard_every_route(monkeypatch):
    import base64

    monkeypatch.setattr(access, "LOGIN_DELAY", 0)
    middleware = access.AccessMiddleware(application, "127.0.0.1", (), {"me": "a:b", "you": "ü"})

    def tried(credentials, path="/", kind="Basic"):
        header = f"{kind} {base64.b64encode(credentials.encode()).decode()}"
        return answer(middleware, path, [("host", "localhost"), ("authorization", header)])

    assert [tried("me:a:b"), tried("you:ü"), tried("me:a:b", kind="basic")] == [200] * 3
    assert [
        tried("me:a"),
        tried("you:a:b"),
        tried("me:"),
        tried("she:"),
        tried("me"),
        tried("me:a:b", kind="Digest"),
    ] == [401] * 6
    for path in ("/", "/config", f"{API}/file=x", f"{API}/upload", f"{API}/heartbeat/x", f"{API}/cancel"):
        assert answer(middleware, path, [("host", "localhost")]) == 401
        assert answer(middleware, path, [("host", "localhost"), ("authorization", "Basic %")]) == 401


def test_accounts_are_read_from_the_setting_or_a_file(tmp_path):
    for password in ("~nobody", "x" * 300, "a\0b"):  # no path of a file
        assert read_accounts(f"~me:{password}", False) == {"~me": password}
    kept = tmp_path / "accounts"
    kept.write_text("me:a:b\n\nyou: c\n")
    assert read_accounts("me:secret", public=True) == {"me": "secret"}
    assert read_accounts(str(kept), public=True) == {"me": "a:b", "you": " c"}
    assert read_accounts("none", public=True) is read_accounts(None, public=False) is None
    with pytest.raises(ConfigError, match="auth=none lets everybody in"):
        read_accounts(None, public=True)
    kept.write_text("me:secret\nyou\n")
    for wrong in ("secret", "me:", ":secret", "", str(kept), "no/such/file"):
        with pytest.raises(ConfigError, match="should be user:password") as error:
            read_accounts(wrong, public=True)
        assert "secret" not in str(error.value)


@pytest.mark.parametrize("words", [["host=0.0.0.0"], ["share=true"], ["host=::"]])
def test_listening_beyond_this_machine_needs_accounts(stethoscope, words):
    assert "auth=USER:PASSWORD" in stethoscope("app", *words)


def test_its_own_address_is_asked_without_a_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "example.org, localhost")
    monkeypatch.delenv("NO_PROXY", raising=False)
    add_to_no_proxy("0.0.0.0")
    assert os.environ["no_proxy"] == "example.org,localhost,127.0.0.1,::1,0.0.0.0"
    assert os.environ["NO_PROXY"] == "localhost,127.0.0.1,::1,0.0.0.0"
    monkeypatch.setenv("no_proxy", "*")
    add_to_no_proxy("0.0.0.0")
    assert os.environ["no_proxy"] == "*"
