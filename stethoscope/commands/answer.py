"""Implement ``stethoscope answer``: a server's answers to the questions of a task, as JSON lines."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from stethoscope.commands.common import overrides
from stethoscope.core.component import build
from stethoscope.core.errors import ConfigError, DataError
from stethoscope.core.types import Generation
from stethoscope.evaluation.chat_client import Engine
from stethoscope.evaluation.server_answers import ask_task
from stethoscope.storage.answer_file import AnswerFile
from stethoscope.tasks.base import Task


def run(config: DictConfig) -> None:
    """Ask what the file lacks, and say where the answers are and how to go on."""
    if not config.out:
        raise ConfigError("out= should name the file of the answers, such as out=answers.jsonl")
    if not isinstance(config.overwrite, bool):
        raise ConfigError(f"overwrite={config.overwrite!r} should be true or false")
    engine = Engine(**{str(name): config.engine[name] for name in config.engine})
    generation = build(config.generation, Generation, "generation", config.plugins)
    task = build(config.task, Task, "task", config.plugins)
    with AnswerFile(Path(str(config.out)).expanduser()) as file:
        state = ask_task(engine, generation, task, file, config.limit, config.overwrite)
    held = state.done - state.failed
    new = f", {state.answered} of them new" if state.resumed else ""
    cut = f", {state.truncated} cut off at the longest length" if state.truncated else ""
    print(f"{held} of {state.total} samples answered{new}{cut}: {file.path}")
    if state.answered:
        print(
            f"with token ids: {state.with_ids} of {state.answered}; "
            f"with log-probabilities: {state.with_logprobs} of {state.answered}"
        )
    same = " ".join(word for word in overrides() if word.partition("=")[0].split(".")[0] in ("task", "limit"))
    print(f"next: stethoscope evaluate {same}{' ' if same else ''}answers.file={file.path} model=... (the same model)")
    if state.failed:
        raise DataError(
            f"{state.failed} of {state.total} samples failed, the first is {state.first_failure}. "
            f"All others are in {file.path}; the same command tries the failed ones again"
        )
