"""Ask a server all questions of a task, several at a time, and write its answers as they come."""

from __future__ import annotations

import asyncio
import threading
import warnings
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

from stethoscope.core.errors import DataError, StethoscopeError
from stethoscope.core.images import portable_bytes
from stethoscope.core.redaction import redact_text
from stethoscope.core.text import one_line
from stethoscope.core.types import Generation, Sample
from stethoscope.evaluation.callbacks import Progress
from stethoscope.evaluation.chat_client import ChatClient, Engine, ServedModel
from stethoscope.evaluation.chat_protocol import Reply
from stethoscope.evaluation.distributed import DistributedState, current_state
from stethoscope.evaluation.selection import load_samples, select_samples
from stethoscope.storage.answer_file import AnswerFile
from stethoscope.storage.run_fingerprint import SAMPLING_ONLY, task_settings
from stethoscope.tasks.base import Task

Result = TypeVar("Result")
MAX_FAILURES = 16
"""A session in which this many samples have failed and none has succeeded stops, because no sample is to blame."""


@dataclass
class AskingState:
    """Counts of the samples of a task; the bar of ``callbacks.Progress`` reads them as it does those of a run.

    Attributes:
        task: that is asked.
        total: number of samples.
        done: number of samples done, failed ones included.
        resumed: number of samples that were done before this session.
        failed: number of samples without an answer.
        truncated: answers of this session that were cut off at the longest length.
        with_ids: answers of this session with token ids.
        with_logprobs: answers of this session with log-probabilities.
        first_failure: sample and reason of the first failure; empty without one.
    """

    task: Task
    total: int
    done: int = 0
    resumed: int = 0
    failed: int = 0
    truncated: int = 0
    with_ids: int = 0
    with_logprobs: int = 0
    first_failure: str = ""
    distributed: DistributedState = field(default_factory=current_state)

    @property
    def answered(self) -> int:
        """Answers of this session."""
        return self.done - self.resumed - self.failed

    def count(self, reply: Reply) -> None:
        """Count an answer."""
        self.done += 1
        self.truncated += reply.finish_reason == "length"
        self.with_ids += reply.token_ids is not None
        self.with_logprobs += reply.logprobs is not None

    def fail(self, sample: Sample, error: Exception) -> None:
        """Count a failed sample."""
        self.done += 1
        self.failed += 1
        self.first_failure = self.first_failure or f"sample {sample.id}: {_message(error)}"


class _ImageFile(NamedTuple):
    data: bytes
    kind: str
    sha256: str


def ask_task(
    engine: Engine,
    generation: Generation,
    task: Task,
    file: AnswerFile,
    limit: int | None = None,
    overwrite: bool = False,
) -> AskingState:
    """Ask a server what a file of answers lacks; samples that come with an answer are not asked.

    Args:
        engine: the server.
        generation: settings of decoding, with the task's length where none is set.
        task: whose samples are asked.
        file: an open file of answers.
        limit: largest number of samples, chosen as ``Evaluator`` chooses them.
        overwrite: throw away what the file holds.

    Raises:
        ConfigError: the server or the settings are wrong, or the file has other settings.
        CapabilityError: the server has gone.
        DataError: the task has no samples to ask, or the first 16 of this session all failed.
    """
    if generation.max_new_tokens is None:
        generation = replace(generation, max_new_tokens=task.max_new_tokens)
    return run_coroutine(_ask_all(ChatClient(engine, generation), task, file, limit, overwrite))


def run_coroutine(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine to its end.

    Where an event loop runs already, as in notebooks, it runs on a thread with a loop of its own.
    An interrupt of the waiting thread cancels the coroutine and waits until it has ended.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="stethoscope", daemon=True)
    thread.start()
    try:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result()
    finally:
        asyncio.run_coroutine_threadsafe(_cancel_others(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _cancel_others() -> None:
    """Cancel all other tasks of the event loop and wait until they have ended."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


async def _ask_all(client: ChatClient, task: Task, file: AnswerFile, limit: int | None, overwrite: bool) -> AskingState:
    async with client:
        served = await client.find_model()  # before the task, which may take longer to set up
        samples = _samples_to_ask(task, limit)
        remaining = file.resume(_settings(client, task, served), samples, overwrite)
        if remaining.changed:
            warnings.warn(f"changed since they were asked, so asked again: {remaining.changed} samples", stacklevel=2)
        resumed = len(samples) - len(remaining.samples)
        state = AskingState(task, len(samples), resumed, resumed)
        progress: Any = Progress()  # `state` stands in for that of a run
        queue = iter(remaining.samples)
        progress.on_task_start(state)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(client.engine.concurrency, len(remaining.samples))):
                    group.create_task(_work(queue, client, served, file, state, progress))
        except BaseException as error:
            progress.on_exception(state, error)
            raise _cause(error) from None
        progress.on_task_end(state, None)
        return state


def _samples_to_ask(task: Task, limit: int | None) -> list[Sample]:
    """Set up a task and select its samples, without those that come with an answer.

    Raises:
        DataError: none is left.
    """
    task.setup()
    selected = select_samples(load_samples(task), limit, task.unit)
    samples = [sample for sample in selected if sample.answer is None]
    if not samples:
        raise DataError(f"every sample of task {task.name!r} comes with an answer; there is nothing to ask")
    if len(samples) < len(selected):
        warnings.warn(f"{len(selected) - len(samples)} samples come with an answer and are not asked", stacklevel=2)
    return samples


def _cause(error: BaseException) -> BaseException:
    """Return the error that has ended a group of tasks, ours if there are several."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    ours = error.subgroup(StethoscopeError) or error
    return _cause(ours.exceptions[0])


async def _work(
    queue: Iterator[Sample],
    client: ChatClient,
    served: ServedModel,
    file: AnswerFile,
    state: AskingState,
    progress: Any,
) -> None:
    """Ask one sample after another until none is left."""
    origin = {"model": served.model, "revision": client.engine.revision, "engine": served.engine}
    for sample in queue:
        line = {"id": sample.id, "image": sample.image.name, "question": sample.question, "subset": sample.subset}
        try:
            image = await asyncio.to_thread(_image_file, sample)
            reply = await client.ask(sample.question, image.data, image.kind)
        except DataError as error:
            state.fail(sample, error)
            file.append({**line, **origin, "error": _message(error)})
            if not state.answered and state.failed >= MAX_FAILURES:
                raise DataError(f"all of the first {state.failed} samples failed; {state.first_failure}") from None
        else:
            state.count(reply)
            answer = {
                "answer": reply.whole,
                "answer_token_ids": reply.token_ids,
                "answer_logprobs": reply.logprobs,
                "prompt_token_ids": reply.prompt_token_ids,
                "finish_reason": reply.finish_reason,
            }
            values = {**line, **answer, **origin, "image_sha256": image.sha256}
            file.append({name: value for name, value in values.items() if value is not None})
        progress.on_batch_end(state, ())


def _message(error: Exception) -> str:
    return one_line(redact_text(str(error)))


def _image_file(sample: Sample) -> _ImageFile:
    """Read the image of a sample as the bytes that are sent, with its digest.

    Raises:
        DataError: it cannot be read.
    """
    picture, source = sample.image.load(), sample.image.source
    try:
        data, kind = portable_bytes(picture, None if callable(source) else source)
    except OSError as error:
        raise DataError(f"image {sample.image.name!r} cannot be read: {error}") from None
    return _ImageFile(data, kind, sample.image.sha256)


def _settings(client: ChatClient, task: Task, served: ServedModel) -> dict[str, Any]:
    """Collect what the answers of a file depend on; images and questions are compared line by line."""
    decoding = dict(vars(client.generation))
    if not client.generation.do_sample:
        decoding = {name: value for name, value in decoding.items() if name not in SAMPLING_ONLY}
    own = {name: value for name, value in task_settings(task).items() if name not in task.locations}
    return {
        "model": served.model,
        "revision": client.engine.revision,
        "engine": served.engine,
        "generation": decoding,
        "task": {"name": task.name, "version": task.version, "settings": own},
    }
