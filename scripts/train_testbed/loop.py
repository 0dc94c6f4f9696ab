"""Run the whole recipe: data, vision, language, align, joint training, measurement.

Muon is the optimiser of the hidden matrices, AdamW of everything else, both in float32. Muon (Jordan et al. 2024)
needs about a third fewer steps here. ``torch.optim.Muon`` orthogonalises in bfloat16, which is slow on processors
without native support; this one stays in float32 and handles all matrices of one shape in one batch.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from scripts.train_testbed.architecture import build_model, build_processor, build_tokenizer
from scripts.train_testbed.data import Encoder, load_split, render_split
from scripts.train_testbed.stages import AlignStage, JointStage, LanguageStage, Stage, Student, VisionStage
from stethoscope.core.files import replacing

SLOW = 1 / 3
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class MuonWithAdam:
    """Optimise with Muon and AdamW, with one learning rate for both halves.

    Args:
        parameters: All parameters; square-ish hidden matrices go to Muon, embeddings, heads, norms and biases to AdamW.
        slow: Those of them that learn at a third of the rate.
        weight_decay: Decoupled decay of the Muon matrices.
        momentum: Momentum of Muon (Nesterov).
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        slow: Iterable[nn.Parameter] = (),
        weight_decay: float = 0.05,
        momentum: float = 0.95,
    ) -> None:
        unique = list({id(p): p for p in parameters}.values())
        self._matrices = [p for p in unique if p.ndim == 2 and min(p.shape) >= 96 and max(p.shape) < 500]
        chosen = {id(p) for p in self._matrices}
        self._slow = {id(p) for p in slow}
        rest = [p for p in unique if id(p) not in chosen]
        groups = [[p for p in rest if id(p) not in self._slow], [p for p in rest if id(p) in self._slow]]
        self._velocity = [torch.zeros_like(p) for p in self._matrices]
        self._adam = torch.optim.AdamW(
            [{"params": group} for group in groups], lr=0.0, weight_decay=0.01, betas=(0.9, 0.98)
        )
        self._weight_decay, self._momentum = weight_decay, momentum
        self._groups: dict[tuple[int, ...], list[int]] = {}
        for i, matrix in enumerate(self._matrices):
            self._groups.setdefault(tuple(sorted(matrix.shape)), []).append(i)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update all parameters from their gradients and clear these."""
        for group, factor in zip(self._adam.param_groups, (1.0, SLOW), strict=True):
            group["lr"] = learning_rate * factor
        self._adam.step()
        for members in self._groups.values():
            self._step_matrices(members, learning_rate)
        self._adam.zero_grad()
        for matrix in self._matrices:
            matrix.grad = None

    def _step_matrices(self, members: list[int], learning_rate: float) -> None:
        updates, owners = [], []
        for i in members:
            matrix = self._matrices[i]
            if matrix.grad is None:
                continue
            velocity = self._velocity[i].lerp_(matrix.grad, 1 - self._momentum)
            update = matrix.grad.lerp(velocity, self._momentum)
            updates.append(update if update.shape[0] <= update.shape[1] else update.T)
            owners.append(matrix)
        if not updates:
            return
        stack = orthogonalise(torch.stack(updates))
        scale = 0.2 * max(stack.shape[1:]) ** 0.5  # the root mean square of an AdamW update
        for matrix, update in zip(owners, stack, strict=True):
            rate = learning_rate * (SLOW if id(matrix) in self._slow else 1.0)
            matrix.mul_(1 - rate * self._weight_decay)
            matrix.add_(update if update.shape == matrix.shape else update.T, alpha=-rate * scale)

    def state_dict(self) -> dict[str, Any]:
        return {"adam": self._adam.state_dict(), "velocity": self._velocity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._adam.load_state_dict(state["adam"])
        for mine, stored in zip(self._velocity, state["velocity"], strict=True):
            mine.copy_(stored)


def orthogonalise(matrices: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """Bring the singular values of wide matrices near 1 by a quintic Newton-Schulz iteration.

    Args:
        matrices: (n, rows, columns) with rows <= columns.
        iterations: Number of iterations.
    """
    a, b, c = _NEWTON_SCHULZ
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ x
    return x


WARM_UP, FLOOR = 50, 0.02  # steps, and the lowest rate as a share of the peak


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


def run(
    stages: Sequence[str],
    *,
    out: pathlib.Path,
    cache: pathlib.Path,
    seed: int,
    scenes: int,
    collages: int,
    vision_steps: int,
    language_steps: int,
    align_steps: int,
    joint_steps: int,
    batch_size: int,
    keep_unseen: float,
    threads: int,
    workers: int,
    measure_scenes: int,
) -> dict[str, Any] | None:
    """Run the given stages in the order of the recipe.

    The arguments are those of ``scripts/train_testbed``, which explains them.

    Returns:
        Held-out figures if "measure" is among the stages.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    if "data" in stages:
        render_split(cache, "collage", collages, seed, workers)
        render_split(cache, "prior", scenes, seed, workers)
    tokenizer = _tokenizer(out / "tokenizer")
    encoder = Encoder(tokenizer)
    student = Student(build_model(tokenizer)).train()
    if "vision" in stages:
        drawn = (
            load_split(cache, "collage", collages, seed),
            load_split(cache, "prior", min(scenes, collages // 2), seed),
        )
        run_stage(VisionStage(student, seed, batch_size, *drawn), vision_steps, out)
    if "language" in stages:
        symbols = load_split(cache, "prior", scenes, seed, pixels=False)
        run_stage(LanguageStage(student, seed, batch_size, encoder, symbols), language_steps, out)
    if "joint" in stages:
        load_student(out / "language.pt", student)
        load_student(out / "vision.pt", student, only=("model.model.vision_tower", "patches"))
        prior = load_split(cache, "prior", scenes, seed)
        run_stage(AlignStage(student, seed, batch_size, prior), align_steps, out)

        def export() -> None:
            student.model.save_pretrained(out / "model")
            build_processor(tokenizer).save_pretrained(out / "model")

        joint = JointStage(student, seed, batch_size, encoder, prior, keep_unseen)
        run_stage(joint, joint_steps, out, on_checkpoint=export)
    if "measure" in stages:
        from scripts.train_testbed.measure import measure

        return measure(out / "model", measure_scenes)
    return None


def _tokenizer(folder: pathlib.Path) -> PreTrainedTokenizerFast:
    """Load the run's tokenizer: training it again after a change of captions would renumber the tokens."""
    if not folder.exists():
        partial = folder.with_name(f"tokenizer-{os.getpid()}")
        build_tokenizer().save_pretrained(partial)
        with contextlib.suppress(OSError):  # a run side by side was faster
            partial.rename(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)
