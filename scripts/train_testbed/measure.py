"""Measure a trained model on held-out scenes: POPE, CHAIR and the shape of its captions.

This is the trainer's own yardstick, with its own small reader of captions; the benchmarks of the package measure the
same independently.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from scripts.train_testbed.data import NAMES
from stethoscope.testbed import language
from stethoscope.testbed.dataset import EVALUATION_SEED, POPE_SPLITS, pope_questions, scenes
from stethoscope.testbed.scene import Scene

MAX_NEW_TOKENS = 150


def mentioned(text: str) -> list[str]:
    """List the categories named in a caption, in the order of their first mention.

    >>> mentioned("A dog next to a potted plant. The dog is brown.")
    ['dog', 'potted plant']
    """
    return list(dict.fromkeys(match.group(1).lower() for match in NAMES.finditer(text)))


class Speaker:
    """Answer questions greedily in batches, with a saved model and its processor.

    Args:
        folder: A saved model.
        batch_size: Pictures at a time.
    """

    def __init__(self, folder: pathlib.Path, batch_size: int = 50) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(folder).eval()
        self.processor = AutoProcessor.from_pretrained(folder)
        self.batch_size = batch_size

    @torch.no_grad()
    def answer(self, asked: Sequence[tuple[Scene, str]], max_new_tokens: int, desc: str) -> Iterator[tuple[str, int]]:
        """Yield the answer to each question and its length in tokens (``max_new_tokens`` if it was cut off)."""
        end = self.processor.tokenizer.eos_token_id
        for start in tqdm(range(0, len(asked), self.batch_size), desc=desc, mininterval=5):
            chunk = asked[start : start + self.batch_size]
            inputs = self.processor(
                images=[scene.image() for scene, _ in chunk],
                text=[language.TEMPLATE.format(question=question) for _, question in chunk],
                padding=True,
                return_tensors="pt",
            )
            out = self.model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
            for row in out[:, inputs["input_ids"].shape[1] :].tolist():
                length = row.index(end) if end in row else max_new_tokens
                yield self.processor.decode(row[:length], skip_special_tokens=True).strip(), length


def measure(folder: pathlib.Path, count: int, mode: str = "counter", seed: int = EVALUATION_SEED) -> dict[str, Any]:
    """Measure a saved model on held-out scenes.

    Args:
        folder: A saved model.
        count: Number of scenes.
        mode: ``counter`` or ``prior``.
        seed: Stream of scenes; use another one than the default for decisions during development.

    Returns:
        Figures of captions and of each POPE split.
    """
    held_out, speaker = scenes(count, mode, seed=seed), Speaker(folder)
    asked = [(scene, language.DETAIL_PROMPTS[0]) for scene in held_out]
    spoken = list(speaker.answer(asked, MAX_NEW_TOKENS, "captions"))
    figures: dict[str, Any] = {
        "scenes": count,
        "mode": mode,
        "seed": seed,
        "captions": score_captions(held_out, spoken),
    }
    for split in POPE_SPLITS:
        figures[split] = _measure_pope(speaker, held_out, split)
    return figures


def score_captions(held_out: Sequence[Scene], spoken: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """Score CHAIR over first mentions, object recall, and how captions end and repeat.

    Source: Rohrbach et al. 2018.
    """
    named = [mentioned(text) for text, _ in spoken]
    wrong = [[name not in scene.visible for name in names] for scene, names in zip(held_out, named, strict=True)]
    recalled = sum(name in names for scene, names in zip(held_out, named, strict=True) for name in scene.visible)
    by_order = [[row[k] for row in wrong if len(row) > k] for k in range(5)]
    lengths = np.array([length for _, length in spoken])
    return {
        "chair_i": _mean([flag for row in wrong for flag in row]),
        "chair_s": _mean([any(row) for row in wrong]),
        "recall": round(recalled / sum(len(scene.visible) for scene in held_out), 4),
        "objects_per_caption": _mean([len(names) for names in named]),
        "wrong_by_order": [(_mean(flags), len(flags)) for flags in by_order if flags],
        "tokens": {"mean": _mean(lengths), "p90": float(np.quantile(lengths, 0.9)), "max": int(lengths.max())},
        "unfinished": int((lengths >= MAX_NEW_TOKENS).sum()),
        "repeated_sentence": _mean([_repeats(text) for text, _ in spoken]),
    }


def _measure_pope(speaker: Speaker, held_out: list[Scene], split: str) -> dict[str, Any]:
    by_name = {f"{scene.id}.png": scene for scene in held_out}
    questions = pope_questions(held_out, split)
    asked = [(by_name[question["image"]], question["text"]) for question in questions]
    spoken = [text.lower() for text, _ in speaker.answer(asked, 4, f"POPE {split}")]
    predicted = np.array([text.startswith("yes") for text in spoken])
    truth = np.array([question["label"] == "yes" for question in questions])
    hits = (predicted & truth).sum()
    return {
        "accuracy": _mean(predicted == truth),
        "precision": round(float(hits / max(predicted.sum(), 1)), 4),
        "recall": round(float(hits / truth.sum()), 4),
        "yes_rate": _mean(predicted),
        "unparsed": sum(not text.startswith(("yes", "no")) for text in spoken),
        "questions": len(questions),
    }


def _repeats(text: str) -> bool:
    sentences = [part.strip().lower() for part in text.split(".") if part.strip()]
    return len(set(sentences)) < len(sentences)


def _mean(values: Any) -> float:
    return round(float(np.mean(values)), 4) if len(values) else float("nan")
