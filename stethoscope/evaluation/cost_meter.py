"""Measure what a run's answers cost: forward passes of the language model for every token, and memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stethoscope.core.files import append, check_shape, read_jsonl, unshare
from stethoscope.core.system import peak_memory, reset_peak_memory
from stethoscope.evaluation.callbacks import Callback

if TYPE_CHECKING:
    from stethoscope.core.types import Sample
    from stethoscope.evaluation.state import RunState
    from stethoscope.storage.records import Record

COSTS = "costs.jsonl"
"""File of a run directory with a line for every batch."""
_SHAPE: dict[str, Any] = {"task": str, "sample": str, "tokens": int}
_REMEDY = "delete it; what the run's answers cost is then not known"


class AnswerCost(NamedTuple):
    """What the answers of a task cost.

    Attributes:
        passes: forward passes of the language model for every token of an answer; None where they were not counted.
        peak_memory: largest memory of the process while it answered, in bytes; None where it is not known.
    """

    passes: float | None
    peak_memory: int | None


class CostMeter(Callback):
    """Counts the forward passes of every batch and writes them into the run directory, with the memory so far.

    A pass over B rows counts as B, and a batch of B answers has B times as many tokens as its longest answer, so that
    plain decoding has exactly 1; answers that leave their batch when they end have their own tokens, as have answers
    that were written one by one. All that happens before an answer is final counts: second passes, further candidates,
    a detector's passes. Nothing is counted of a model that transformers does not know.

    Args:
        leaving: whether an answer leaves its batch when it ends, see ``Mitigation.writes``.
    """

    first_only = True

    def __init__(self, leaving: bool = False) -> None:
        """Store the setting; the counter is attached when the model is set up."""
        self._leaving = leaving
        self._hook: Any = None
        self._rows: int | None = None
        self._largest = 0  # rows of a pass

    def on_task_start(self, run: RunState) -> None:
        """Attach the counter to the language model, and start to watch the memory."""
        decoder = _decoder(run.adapter)
        if decoder is not None:
            self._rows = 0
            self._hook = decoder.register_forward_pre_hook(self._count, with_kwargs=True)
        if run.store is not None:
            unshare(run.store.run_dir / COSTS)
        reset_peak_memory()

    def on_batch_start(self, run: RunState, samples: Sequence[Sample]) -> None:
        """Count from nothing."""
        self._rows, self._largest = None if self._rows is None else 0, 0

    def on_batch_end(self, run: RunState, records: Sequence[Record]) -> None:
        """Write the batch's line."""
        lengths = [
            len(record.answer.token_ids) + record.answer.finished for record in records if record.answer is not None
        ]
        if run.store is None or not lengths:
            return
        line = {
            "task": run.task.name,
            "sample": records[0].sample_id,
            "passes": self._rows,
            "tokens": sum(lengths) if self._leaving or self._largest == 1 else len(records) * max(lengths),
            "peak_memory": peak_memory(),
        }
        append(run.store.run_dir / COSTS, (json.dumps(line) + "\n").encode())

    def on_task_end(self, run: RunState, results: Any) -> None:
        """Detach the counter."""
        self._detach()

    def on_exception(self, run: RunState, error: BaseException) -> None:
        """Detach the counter."""
        self._detach()

    def _detach(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._rows = None

    def _count(self, module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Add the rows of a forward pass."""
        inputs = [*arguments, named.get("input_ids"), named.get("inputs_embeds")]
        if self._rows is not None:
            rows = next((len(values) for values in inputs if values is not None), 1)
            self._rows, self._largest = self._rows + rows, max(self._largest, rows)


def _decoder(adapter: Any) -> Any:
    """Return the part of an adapter's model that reads token by token; None where transformers knows of none."""
    from transformers import PreTrainedModel

    model = getattr(adapter, "model", None)
    return model.get_decoder() if isinstance(model, PreTrainedModel) else None


def read_costs(run_dir: Path, task: str) -> AnswerCost:
    """Read what the answers of a task cost; of a batch that was answered twice the last time counts.

    Raises:
        ArtefactError: a line is damaged.
    """
    lines = read_jsonl(run_dir / COSTS, _REMEDY, default=[])
    for line in lines:
        check_shape(run_dir / COSTS, line, _SHAPE, _REMEDY)
    batches = {line["sample"]: line for line in lines if line["task"] == task}.values()
    known = [line for line in batches if isinstance(line.get("passes"), int)]
    tokens = sum(line["tokens"] for line in known)
    memory = [line["peak_memory"] for line in batches if isinstance(line.get("peak_memory"), int)]
    return AnswerCost(sum(line["passes"] for line in known) / tokens if tokens else None, max(memory, default=None))
