"""A small server that keeps files as the hub does, for the real client."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from huggingface_hub import constants


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
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            self.send({"files": modes})
        elif "/commit/" in path:
            lines = [json.loads(line) for line in body.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            commit = f"{len(self.server.commits) + 1:040x}"
            self.server.commits[commit] = {file["path"]: base64.b64decode(file["content"]) for file in files}
            self.server.branches[path.rsplit("/", 1)[1]] = commit
            answer = {"commitUrl": f"{self.server.address}/me/detector/commit/{commit}", "commitOid": commit}
            if "create_pr=1" in self.path:
                answer["pullRequestUrl"] = f"{self.server.address}/me/detector/discussions/1"
            self.send(answer)
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
        branch = self.server.branches.get(revision, revision)
        return branch if branch in self.server.commits else None


@contextmanager
def local_hub(monkeypatch, tmp_path):
    """Serve a hub of one's own on this machine, empty, with an empty cache."""
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
