"""The smallest task and model that the evaluator can run: exact, quick, without weights. For tests of the loop only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from stethoscope.adapters.base import Adapter
from stethoscope.core.types import Answer, Generation, ImageRef, Mention, Sample, Score
from stethoscope.tasks.base import Task
from stethoscope.tracing.trace import Encoded, Spans, Trace

WORDS = ("a", "dog", "cat", "and", "tree", "yes", "no")


class TinyTask(Task):
    """Samples ``s00`` ...; each picture's grey level is its number, and it shows a dog and nothing else."""

    name, version, primary = "tiny", "1", "accuracy"
    macro = ("accuracy",)

    def __init__(self, count: int = 10, subsets: tuple[str, ...] = ("easy", "hard"), broken: Mapping[int, Path] = {}):
        self.count, self.subsets, self.broken = count, tuple(subsets), dict(broken)

    def samples(self) -> list[Sample]:
        return [
            Sample(
                id=f"s{number:02d}",
                image=ImageRef(f"{number}.png", self.broken.get(number) or (lambda level=number: picture(level))),
                question=f"What is in picture {number}?",
                group=f"image{number // 2}",
                subset=self.subsets[number % len(self.subsets)],
                reference={"objects": ["dog"]},
            )
            for number in range(self.count)
        ]

    def score(self, sample: Sample, answer: Answer) -> Score:
        if not answer.text:
            return Score("unparsed", {"samples": 1.0})
        named = answer.text.split()
        return Score("ok", {"samples": 1.0, "judged": 1.0, "right": float("cat" not in named)}, {"named": named})

    def mentions(self, sample: Sample, answer: Answer) -> tuple[Mention, ...]:
        mentions, start = [], 0
        for word in answer.text.split():
            if word in ("dog", "cat"):
                same = sum(mention.object == word for mention in mentions)
                mentions.append(Mention(start, start + len(word), word, int(word == "cat"), len(mentions), same))
            start += len(word) + 1
        return tuple(mentions)

    def metrics(self):
        return {
            "accuracy": lambda totals: totals["right"] / totals["judged"],
            "judged": lambda totals: totals["judged"] / totals["samples"],
        }


def picture(level: int) -> Image.Image:
    """A grey image of one brightness."""
    return Image.new("RGB", (2, 2), (level, level, level))


class TinyAdapter(Adapter):
    """Says "a dog and a dog" to even pictures, "a dog and a cat" to odd ones; faults can be set by picture number."""

    name = "tiny"

    def __init__(self, revision: str = "1") -> None:
        self.revision = revision
        self.silent: set[int] = set()
        self.fails: set[int] = set()
        self.interrupt_at: int | None = None
        self.generated: list[list[int]] = []
        self.traced: list[int] = []

    def setup(self) -> None:
        pass

    def encode(self, image: Image.Image, question: str) -> Encoded:
        level = image.getpixel((0, 0))[0]
        spans = Spans(length=4, image=(0,), question=(2, 3))
        return Encoded({"input_ids": torch.tensor([[level]])}, spans, f"USER: {question}", question)

    def generate(self, encoded, generation: Generation) -> list[Answer]:
        numbers = [int(prompt.inputs["input_ids"]) for prompt in encoded]
        self.generated.append(numbers)
        if self.interrupt_at in numbers:
            raise KeyboardInterrupt
        if self.fails & set(numbers):
            raise RuntimeError("the model broke")
        return [self._say(number, generation) for number in numbers]

    def _say(self, number: int, generation: Generation) -> Answer:
        if number in self.silent:
            return Answer("", (), (), ())
        words = ["a", "dog", "and", "a", "cat" if number % 2 else "dog"]
        kept = words[: generation.max_new_tokens]
        text = " ".join(kept)
        ends = [len(" ".join(kept[: index + 1])) for index in range(len(kept))]
        offsets = tuple(pairwise([0, *ends]))
        ids = tuple(WORDS.index(word) for word in kept)
        return Answer(text, ids, offsets, tuple(-0.1 * (k + 1) for k in range(len(kept))), len(kept) == len(words))

    def answer(self, encoded: Encoded, text: str) -> Answer:
        raise NotImplementedError

    def trace(self, encoded: Encoded, answer: Answer, requires=()) -> Trace:
        number = int(encoded.inputs["input_ids"])
        self.traced.append(number)
        logits = torch.full((len(answer.token_ids), len(WORDS)), float(number))
        return Trace(answer, encoded.spans, logits)

    def fingerprint(self) -> dict:
        return {"class": "TinyAdapter", "revision": self.revision}


class TinyFeatures:
    """Two columns: the token's index, and the number of the picture."""

    requires: frozenset[str] = frozenset()

    def __init__(self, names: tuple[str, ...] = ("position", "level")) -> None:
        self.names = tuple(names)

    def compute(self, trace: Trace) -> dict[str, np.ndarray]:
        columns = {"position": np.arange(len(trace.logits)), "level": trace.logits[:, 0].numpy()}
        return {name: columns[name].astype(np.float32) for name in self.names}

    def compute_batch(self, traces: Sequence[Trace]) -> list[dict[str, np.ndarray]]:
        return [self.compute(trace) for trace in traces]
