"""An OpenAI-compatible server on loopback: scripted replies, made-up answers, or the embedded model's.

``python tests/helpers/chat_server.py PORT [SECONDS]`` serves made-up answers, each after some seconds, until it is
killed. ``serving(app)`` runs one within this process.
"""

import base64
import hashlib
import json
import socket
import sys
import threading
import time
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

MODEL = "made-up/model"


def completion(text, ids=None, logprobs=None, prompt_ids=None, reason="stop", model=MODEL):
    """A chat completion with what vLLM adds to it."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
    if logprobs is not None:
        choice["logprobs"] = {"content": [{"token": "?", "logprob": value, "top_logprobs": []} for value in logprobs]}
    if ids is not None:
        choice["token_ids"] = ids
    return {"object": "chat.completion", "model": model, "choices": [choice], "prompt_token_ids": prompt_ids}


def parts(body):
    """Question and image file of a request."""
    image, text = body["messages"][0]["content"]
    head, _, data = image["image_url"]["url"].partition(",")
    assert head in ("data:image/png;base64", "data:image/jpeg;base64")
    return text["text"], base64.b64decode(data)


def made_up(body):
    """Yes or no by a digest of question and image, so that the same question gets the same answer."""
    question, image = parts(body)
    digest = hashlib.sha256(question.encode() + image).digest()
    return completion("Yes" if digest[0] % 2 else "No", [digest[1], 2], [-0.25, -0.5], [1, 7, 7, digest[2]])


class Scripted:
    """An application that gives the replies of a list one after another, and the last one for ever.

    A reply is a status, or a status and a body, or these and headers; None stands for a made-up answer.
    """

    def __init__(self, *replies, models=((MODEL, "vllm"),), delay=0.0):
        self.replies, self.delay = list(replies) or [None], delay
        self.requests, self.times, self.headers = [], [], []
        self.models = [{"id": name, "object": "model", "owned_by": owner} for name, owner in models]

    def app(self):
        app = FastAPI()

        @app.get("/v1/models")
        def models():
            return {"object": "list", "data": self.models}

        @app.post("/v1/chat/completions")
        async def complete(request: Request):
            body = json.loads(await request.body())
            return await self.reply(body, dict(request.headers))

        return app

    async def reply(self, body, headers):
        import asyncio

        self.requests.append(body)
        self.times.append(time.monotonic())
        self.headers.append(headers)
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        await asyncio.sleep(self.delay)
        if callable(reply):
            reply = reply(body, headers)
        if reply is None:
            return JSONResponse(made_up(body))
        status, content, more = [*(reply if isinstance(reply, tuple) else (reply,)), "", {}][:3]
        if isinstance(content, str):
            return Response(content, status, more or {})
        return JSONResponse(content, status, more or {})


class ModelServer(Scripted):
    """The embedded model, as vLLM serves one: token ids with the end of sequence, log-probabilities, prompt ids."""

    def __init__(self, adapter):
        super().__init__(models=(("stethoscope/testbed", "vllm"),))
        self.adapter, self.lock = adapter, threading.Lock()
        adapter.setup()

    async def reply(self, body, headers):
        from stethoscope.core.images import read_image
        from stethoscope.core.types import Generation

        self.requests.append(body)
        question, image = parts(body)
        assert body["temperature"] == 0
        with self.lock:
            encoded = self.adapter.encode(read_image(image, "the image of a request"), question)
            generation = Generation(max_new_tokens=body["max_tokens"], stop=tuple(body.get("stop", ())))
            answer = self.adapter.generate([encoded], generation)[0]
        ids, logprobs = list(answer.token_ids), list(answer.logprobs)
        if answer.finished:
            ids, logprobs = [*ids, 2], [*logprobs, -0.01]
        prompt = encoded.inputs["input_ids"][0].tolist()
        reason = "stop" if answer.finished else "length"
        return JSONResponse(completion(f" {answer.text}", ids, logprobs, prompt, reason, body["model"]))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serving(scripted):
    """Serve on a free port of this machine within the block; gives the address of the API."""
    listener = socket.create_server(("127.0.0.1", 0))  # held from here on: a port that is only free may be taken
    port = listener.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(scripted.app(), log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.force_exit = server.should_exit = True
        thread.join(10)
        listener.close()


if __name__ == "__main__":
    wait = float(sys.argv[2]) if len(sys.argv) > 2 else 0.0
    uvicorn.run(Scripted(delay=wait).app(), host="127.0.0.1", port=int(sys.argv[1]), log_level="error")
