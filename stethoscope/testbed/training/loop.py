"""The training loop: schedule, log, checkpoints. It can be killed at any time and started again."""

from __future__ import annotations

import json
import math
import pathlib
import time
from collections.abc import Callable

import torch
from torch import nn
from tqdm import tqdm

from stethoscope.core.files import replacing
from stethoscope.testbed.training.optimiser import MuonWithAdam
from stethoscope.testbed.training.stages import Stage

WARM_UP = 50
FLOOR = 0.02


def learning_rate(step: int, steps: int, peak: float, decay: float = 0.4) -> float:
    """Warm up, stay, and fall linearly over the last ``decay`` of the steps.

    A plateau (rather than a cosine) lets the number of steps be changed when a run is resumed.

    >>> [round(learning_rate(s, 1000, 1.0), 2) for s in (0, 49, 500, 800, 1000)]
    [0.02, 1.0, 1.0, 0.51, 0.02]
    """
    left = (steps - step) / (decay * steps)
    return peak * min(1.0, (step + 1) / WARM_UP) * max(FLOOR, min(1.0, FLOOR + (1 - FLOOR) * left))


def run_stage(
    stage: Stage,
    steps: int,
    out: pathlib.Path,
    *,
    every_minutes: float = 4.0,
    on_checkpoint: Callable[[], None] | None = None,
) -> None:
    """Train one stage, resuming from ``out/<stage>.pt`` if it is there.

    Args:
        stage: The stage.
        steps: Total number of steps (those done before count).
        out: Folder of checkpoints and ``log.jsonl``.
        every_minutes: Time between checkpoints.
        on_checkpoint: Called after each checkpoint, to export the model.
    """
    path, optimiser = out / f"{stage.name}.pt", MuonWithAdam(stage.parameters(), stage.slow())
    done = _resume(path, stage, optimiser)
    recent: dict[str, float] = {}
    saved = time.monotonic()
    with (out / "log.jsonl").open("a") as log, tqdm(total=steps, initial=done, desc=stage.name, mininterval=5) as bar:
        for step in range(done, steps):
            loss, metrics = stage.loss(step, steps)
            if not math.isfinite(loss.item()):
                raise FloatingPointError(f"stage {stage.name}: the loss of step {step} is {loss.item()}")
            loss.backward()
            nn.utils.clip_grad_norm_(stage.parameters(), 1.0)
            optimiser.step(learning_rate(step, steps, stage.peak, stage.decay))
            recent = {k: v + 0.95 * (recent.get(k, v) - v) for k, v in metrics.items()}
            bar.update()
            last = step + 1 == steps
            if last or (step + 1) % 25 == 0:
                bar.set_postfix({k: f"{v:.3f}" for k, v in recent.items()}, refresh=False)
                record = {"stage": stage.name, "step": step + 1, "seconds": round(bar.format_dict["elapsed"], 1)}
                log.write(json.dumps({**record, **{k: round(v, 4) for k, v in recent.items()}}) + "\n")
                log.flush()
            if last or time.monotonic() - saved > 60 * every_minutes:
                _save(path, stage, optimiser, step + 1)
                saved = time.monotonic()
                if on_checkpoint:
                    on_checkpoint()


def load_student(path: pathlib.Path, student: nn.Module, only: tuple[str, ...] = ("",)) -> None:
    """Copy the parameters whose names start with one of ``only`` out of a stage's checkpoint."""
    stored = torch.load(path, weights_only=True)["student"]
    student.load_state_dict({k: v for k, v in stored.items() if k.startswith(only)}, strict=False)


def _save(path: pathlib.Path, stage: Stage, optimiser: MuonWithAdam, step: int) -> None:
    state = {"student": stage.student.state_dict(), "optimiser": optimiser.state_dict(), "step": step}
    with replacing(path) as file:
        torch.save(state, file)


def _resume(path: pathlib.Path, stage: Stage, optimiser: MuonWithAdam) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    stage.student.load_state_dict(state["student"])
    optimiser.load_state_dict(state["optimiser"])
    return state["step"]
