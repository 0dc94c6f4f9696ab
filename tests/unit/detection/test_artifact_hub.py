"""Pushing to and fetching from the hub: the real client against a small server that keeps files as the hub does."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from helpers.token_tables import halves, token_table
from huggingface_hub import constants

from stethoscope.core.errors import ArtefactError
from stethoscope.core.token_table import mention_rows
from stethoscope.detection.detector import Detector
from stethoscope.detection.training import describe_label

TRAIN, CALIBRATION = halves(token_table(300))
TEST = mention_rows(token_table(50, seed=9))


class Hub(BaseHTTPRequestHandler):
    """The few addresses of the hub's API that a small upload and a snapshot need; every commit is kept."""

    def log_message(self, *arguments):
        """Says nothing."""

    def send(self, body, code=200, **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in {"Content-Length": len(data), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        path = self.path.split("?")[0]
        if path.endswith("/repos/create"):
            self.server.made = json.loads(body)
            self.send({"url": f"{self.server.address}/me/detector"})
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            made = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            self.send({"files": made})
        elif "/commit/" in path:
            lines = [json.loads(line) for line in body.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            commit = f"{len(self.server.commits) + 1:040x}"
            self.server.commits[commit] = {file["path"]: base64.b64decode(file["content"]) for file in files}
            self.server.branches[path.rsplit("/", 1)[1]] = commit
            self.send({"commitUrl": f"{self.server.address}/me/detector/commit/{commit}", "commitOid": commit})
        elif path.endswith("validate-yaml"):
            self.send({"errors": [], "warnings": []})
        else:
            self.send({"error": f"unexpected {path}"}, 404)

    def do_GET(self):
        path = self.path.split("?")[0].strip("/").split("/")
        if path[:4] == ["api", "models", "me", "detector"] and path[4:5] != ["tree"]:
            commit = self.commit(path[5] if len(path) == 6 else "main")
            if commit is None:
                self.send({"error": "Revision Not Found"}, 404, X_Error_Code="RevisionNotFound")
            else:
                siblings = [{"rfilename": name} for name in self.server.commits[commit]]
                self.send({"id": "me/detector", "sha": commit, "siblings": siblings, "tags": [], "private": False})
        elif path[:5] == ["api", "models", "me", "detector", "tree"]:
            files = self.server.commits[self.commit(path[5])]
            self.send([{"type": "file", "path": n, "size": len(d), "oid": "0" * 40} for n, d in files.items()])
        elif path[:3] == ["me", "detector", "resolve"]:
            commit = self.commit(path[3])
            data = self.server.commits[commit][path[4]]
            self.send(data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=commit)
        else:
            self.send({"error": "Repository Not Found"}, 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def commit(self, revision):
        """The commit of a branch, or of itself."""
        found = self.server.branches.get(revision, revision)
        return found if found in self.server.commits else None


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub of one's own on this machine, empty, and an empty cache."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.commits, server.branches, server.asked, server.made = {}, {}, [], None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def fitted():
    detector = Detector(threshold={"max_missed": 0.4}).fit(TRAIN, CALIBRATION)
    detector.notes = {
        "model": {"model_id": "llava-1.5-7b"},
        "task": {"name": "chair", "version": "1"},
        "label": describe_label(detector),
        "figures": {"auroc": {"value": 0.91234, "low": 0.9, "high": 0.92, "items": 100, "groups": 30}},
    }
    return detector


def test_a_detector_goes_to_the_hub_and_comes_back(hub, fitted):
    address = fitted.push_to_hub("me/detector", private=True, token="hf_secret")
    assert address.endswith(f"/commit/{1:040x}")
    assert hub.made.get("private") or hub.made.get("visibility") == "private"
    assert all(authorization == "Bearer hf_secret" for _, authorization in hub.asked)
    assert set(hub.commits[f"{1:040x}"]) == {"README.md", "detector.safetensors", "manifest.json"}
    again = Detector.from_pretrained("me/detector", token="hf_secret")
    assert (again.predict(TEST) == fitted.predict(TEST)).all()
    assert again.certificate == fitted.certificate
    assert again.notes == fitted.notes


def test_a_revision_is_that_revision(hub, fitted):
    other = Detector(features=["nll"]).fit(TRAIN, CALIBRATION)
    fitted.push_to_hub("me/detector", token="t")
    other.push_to_hub("me/detector", token="t")
    assert Detector.from_pretrained("me/detector").features == ("nll",)
    assert Detector.from_pretrained("me/detector", revision=f"{1:040x}").features == fitted.features


def test_what_is_not_there_is_said_in_one_line(hub, fitted, tmp_path):
    with pytest.raises(ArtefactError, match="no detector at 'you/nothing', which is no folder; on the hub: ") as error:
        Detector.from_pretrained("you/nothing")
    assert "\n" not in str(error.value)
    fitted.push_to_hub("me/detector", token="t")
    with pytest.raises(ArtefactError, match="RevisionNotFound"):
        Detector.from_pretrained("me/detector", revision="v9")
    with pytest.raises(ArtefactError, match="no/such/name"):
        Detector.from_pretrained("no/such/name")
    with pytest.raises(ArtefactError, match="not fitted"):
        Detector().push_to_hub("me/detector", token="t")
    hub.shutdown()
    hub.server_close()
    with pytest.raises(ArtefactError, match="cannot be pushed to 'me/detector'"):
        fitted.push_to_hub("me/detector", token="t")


def test_a_local_folder_needs_no_hub(fitted, tmp_path):
    fitted.save(tmp_path / "detector")
    again = Detector.from_pretrained(tmp_path / "detector")
    assert (again.predict(TEST) == fitted.predict(TEST)).all()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtefactError, match=r"no manifest\.json"):
        Detector.from_pretrained(tmp_path / "empty")


def test_the_card_says_what_it_is(fitted, tmp_path):
    fitted.save(tmp_path / "detector")
    card = (tmp_path / "detector" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: lvlm-stethoscope\n")
    assert "listens to: llava-1.5-7b" in card
    assert "learned from: chair" in card
    assert "label: first sub-token of the first mention" in card
    assert "(the task's ground truth, labels=repope), else 0" in describe_label(fitted, "repope")
    assert "| AUROC | 0.912 | 0.900 to 0.920 |" in card
    assert "at most 0.4 of the hallucinated mentions get none, at confidence 0.95" in card
    Detector().fit(TRAIN, CALIBRATION).save(tmp_path / "plain")
    assert "listens to: not known" in (tmp_path / "plain" / "README.md").read_text()
