"""A client that speaks to the running app as its page does, or as somebody does who does not keep to the page."""

import json
import uuid

import httpx

API = "/gradio_api"
PATIENCE = 120_000  # ms that a browser waits for the page: a loaded machine may take any time
DESCRIBE = "Please describe this image in detail."


class Client:
    """One session of the page."""

    def __init__(self, address, **options):
        self.session_hash = uuid.uuid4().hex[:12]
        self.http = httpx.Client(base_url=address, timeout=PATIENCE / 1000, trust_env=False, **options)
        self._events = None

    def upload(self, content, name="picture.png", **options):
        return self.http.post(f"{API}/upload", files={"files": (name, content, "image/png")}, **options)

    def event(self, inputs):
        """The number of the page's event with so many inputs and the model's turn."""
        if self._events is None:
            self._events = self.http.get("/config").json()["dependencies"]
        return next(event["id"] for event in self._events if len(event["inputs"]) == inputs)

    def join(self, picture, question=DESCRIBE, length=16, **body):
        """Puts a question into the queue."""
        values = ["testbed", picture, question, 0, 1, 1, length, 0, "none", "auto", "own"]
        sent = {
            "data": values,
            "fn_index": self.event(len(values)),
            "session_hash": self.session_hash,
            "trigger_id": None,
            **body,
        }
        return self.http.post(f"{API}/queue/join", json=sent)

    def read(self):
        """What the page shows of the question that was put into the queue, step by step; failures as they are."""
        shown = []
        with self.http.stream("GET", f"{API}/queue/data", params={"session_hash": self.session_hash}) as answer:
            for line in answer.iter_lines():
                if not line.startswith("data:"):
                    continue
                message = json.loads(line[5:])
                if message["msg"] == "process_completed":
                    if not message["success"]:
                        return message
                    shown.append(message["output"]["data"][0])
                    break
                if message["msg"] == "process_generating" and isinstance(message["output"]["data"][0], str):
                    shown.append(message["output"]["data"][0])
        return json.loads(next(text for text in reversed(shown) if isinstance(text, str)))

    def ask(self, picture, question=DESCRIBE, **options):
        """The last that is shown, or the answer that refuses the question."""
        answer = self.join(picture, question, **options)
        return self.read() if answer.status_code == 200 else answer

    def close(self):
        self.http.close()


def file(path):
    """A picture as the page sends it."""
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}}
