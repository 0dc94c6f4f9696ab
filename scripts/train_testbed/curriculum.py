"""The whole recipe: data, vision, language, align and joint training, and the measurement at the end."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from scripts.train_testbed.data import Encoder, load_split, render_split
from scripts.train_testbed.loop import load_student, run_stage
from scripts.train_testbed.stages import AlignStage, JointStage, LanguageStage, Student, VisionStage
from stethoscope.testbed.architecture import build_model, build_processor, build_tokenizer


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
        drawn = load_split(cache, "prior", scenes, seed)
        run_stage(AlignStage(student, seed, batch_size, drawn), align_steps, out)

        def export() -> None:
            student.model.save_pretrained(out / "model")
            build_processor(tokenizer).save_pretrained(out / "model")

        joint = JointStage(student, seed, batch_size, encoder, drawn, keep_unseen)
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
