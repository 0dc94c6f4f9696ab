"""Serve answers as server-sent events: every token, and a warning as soon as a doubtful object is named.

pip install "lvlm-stethoscope[app]"  # brings FastAPI and uvicorn
DETECTOR=runs/my-run uvicorn --app-dir examples serve:app  # a run with a detector of its descriptions
curl -N --data-binary @photo.jpg "http://127.0.0.1:8000/?question=Please+describe+this+image+in+detail."
"""

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.sse import EventSourceResponse, ServerSentEvent
from PIL import Image

import stethoscope
from stethoscope.core.errors import DataError
from stethoscope.core.types import load_picture
from stethoscope.streaming import Final, MentionCompleted, Token

app, turn = FastAPI(), asyncio.Lock()  # one answer at a time
adapter = stethoscope.load(os.environ.get("MODEL", "testbed"))


async def picture(request: Request) -> Image.Image:
    try:
        return load_picture(await request.body())  # format and size are checked before it is decoded
    except DataError as error:
        raise HTTPException(422, str(error)) from error


@app.post("/", response_class=EventSourceResponse)
async def answer(
    image: Annotated[Image.Image, Depends(picture)], question: Annotated[str, Query(pattern=r"\S")]
) -> AsyncIterator[ServerSentEvent]:
    async with turn:
        events = stethoscope.stream(adapter, image, question, detector=os.environ.get("DETECTOR"))
        try:  # the model takes a step when the next event is asked for
            while event := await run_in_threadpool(next, events, None):
                match event:
                    case Token(text=text):
                        yield ServerSentEvent(event="token", data=text)
                    case MentionCompleted(warned=True):
                        yield ServerSentEvent(event="warning", data=vars(event))
                    case Final(answer=whole):
                        if shift := await run_in_threadpool(getattr, event, "shift"):  # no percentage is calibrated
                            yield ServerSentEvent(event="shift", data=shift)
                        yield ServerSentEvent(event="end", data=whole.text)
        finally:  # also when the client has hung up
            events.close()
