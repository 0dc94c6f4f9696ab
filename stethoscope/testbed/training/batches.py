"""Packing: one picture, many conversations.

Vision and image tokens are most of the cost of a training sequence, so each sequence holds one image prefix and
several independent branches (a description and some yes/no questions). The attention mask lets a branch see the
prefix and itself only,
and its positions continue those of the prefix: each branch is exactly the single-turn conversation seen at inference.
"""

from __future__ import annotations

import bisect
import dataclasses
import random
import re
from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from stethoscope.testbed import language
from stethoscope.testbed.architecture import IMAGE_TOKENS, PIXEL_MEAN, PIXEL_STD
from stethoscope.testbed.scene import Scene
from stethoscope.testbed.vocabulary import CATEGORIES, INDEX

NAMES = re.compile(rf"\b({'|'.join(sorted(CATEGORIES, key=len, reverse=True))})\b", re.IGNORECASE)
CAPTION, ANSWER = 1, 2
"""Kinds of target tokens; 0 is not a target."""

MAX_QUESTIONS = 8
PADDING = -1
PREFIX = 0


@dataclasses.dataclass
class Branch:
    """One conversation without its prefix.

    Attributes:
        ids: Token ids.
        prompt: How many of them are the prompt.
        kind: CAPTION or ANSWER.
        object_at: Index of the last token of the object asked about, or None.
        present: Whether the answer is Yes.
        objects: Objects to be told in a description.
        new_names: Index of the first token of each of them where it is named for the first time.
    """

    ids: list[int]
    prompt: int
    kind: int
    object_at: int | None = None
    present: bool = False
    objects: Sequence[str] = ()
    new_names: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Batch:
    """Packed sequences.

    Attributes:
        ids: (b, t) token ids.
        positions: (b, t) position ids.
        kinds: (b, t) kind of target of each token.
        mask: (b, 1, t, t) float, 0 where attention is allowed and -inf elsewhere.
        probes: (k, 2) rows and columns of object words in questions.
        present: (k,) float, 1 where the object is there.
        names: (m, 2) rows and columns of the first tokens of objects named for the first time in descriptions.
        untold: (b, t, categories) float, 1 for the objects still to be told after each token of a description.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    kinds: torch.Tensor
    mask: torch.Tensor
    probes: torch.Tensor
    present: torch.Tensor
    names: torch.Tensor
    untold: torch.Tensor


class Encoder:
    """Turns scenes into token sequences identical to what the processor makes of the same text."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._cache: dict[str, list[int]] = {}
        self.image = tokenizer.convert_tokens_to_ids("<image>")
        self.pad = tokenizer.pad_token_id

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens, cached (prompts repeat)."""
        if text not in self._cache:
            self._cache[text] = self._tokenizer.encode(text, add_special_tokens=False)
        return self._cache[text]

    def prefix(self, image: list[int] | None = None) -> list[int]:
        """Beginning of every conversation up to the image; ``image`` replaces the 64 image tokens."""
        return [
            self._tokenizer.bos_token_id,
            *self.encode("USER: "),
            *([self.image] * IMAGE_TOKENS if image is None else image),
        ]

    def caption(self, prompt: str, text: str, annotated: Sequence[str]) -> Branch:
        """Branch of a description of ``annotated`` objects."""
        start = self.encode(f"\n{prompt} ASSISTANT:")
        answer = self._tokenizer(f" {text}", add_special_tokens=False, return_offsets_mapping=True)
        starts = [begin for begin, _ in answer["offset_mapping"]]
        new_names: dict[str, int] = {}
        for match in NAMES.finditer(f" {text}"):
            name = match.group().lower()
            new_names.setdefault(name, len(start) + bisect.bisect_right(starts, match.start()) - 1)
        ids = [*start, *answer["input_ids"], self._tokenizer.eos_token_id]
        return Branch(ids, len(start), CAPTION, objects=annotated, new_names=new_names)

    def question(self, question: language.Question) -> Branch:
        """Branch of a yes/no question."""
        named = self.encode(f"\n{question.before} {question.object}")
        start = [*named, *self.encode(f"{question.after} ASSISTANT:")]
        answer = [*self.encode(f" {question.answer}"), self._tokenizer.eos_token_id]
        return Branch([*start, *answer], len(start), ANSWER, len(named) - 1, question.answer == "Yes")


def conversations(
    encoder: Encoder, scene: Scene, rng: random.Random, room: int, mirrored: bool = False
) -> list[Branch]:
    """A description of one scene and as many questions as fit.

    Args:
        encoder: Makes the tokens.
        scene: What they are about.
        rng: Chooses the words.
        room: Most tokens of all branches together: rows of one length waste nothing on padding.
        mirrored: The picture is shown mirrored.
    """
    if rng.random() < 0.13:
        branches = [
            encoder.caption(rng.choice(language.BRIEF_PROMPTS), language.brief_caption(scene, rng), scene.annotated)
        ]
    else:
        text = language.detailed_caption(scene, rng, mirrored=mirrored)
        branches = [encoder.caption(rng.choice(language.DETAIL_PROMPTS), text, scene.annotated)]
    used = len(branches[0].ids)
    while used < room and len(branches) <= MAX_QUESTIONS:
        branches.append(encoder.question(language.yes_no_questions(scene, rng, 1)[0]))
        used += len(branches[-1].ids)
    return branches if used <= room or len(branches) <= 2 else branches[:-1]


def pack(prefixes: list[list[int]], branches: list[list[Branch]], pad: int) -> Batch:
    """Pack a batch of conversations, padding on the right."""
    width = max(len(p) + sum(len(b.ids) for b in bs) for p, bs in zip(prefixes, branches, strict=True))
    shape = (len(prefixes), width)
    ids, positions = np.full(shape, pad), np.zeros(shape, np.int64)
    kinds, owner = np.zeros(shape, np.int64), np.full(shape, PADDING)
    untold = np.zeros((*shape, len(CATEGORIES)), np.float32)
    probes, present, names = [], [], []
    for row, (prefix, own) in enumerate(zip(prefixes, branches, strict=True)):
        at = len(prefix)
        ids[row, :at], positions[row, :at], owner[row, :at] = prefix, np.arange(at), PREFIX
        for number, branch in enumerate(own, start=1):
            end = at + len(branch.ids)
            ids[row, at:end], owner[row, at:end] = branch.ids, number
            positions[row, at:end] = len(prefix) + np.arange(len(branch.ids))
            kinds[row, at + branch.prompt : end] = branch.kind
            if branch.object_at is not None:
                probes.append((row, at + branch.object_at))
                present.append(float(branch.present))
            for name in branch.objects:
                told = branch.new_names.get(name, len(branch.ids))
                untold[row, at : at + told, INDEX[name]] = 1
            names += [(row, at + index) for index in branch.new_names.values()]
            at = end
    who = torch.from_numpy(owner)
    same = (who[:, :, None] == who[:, None, :]) | (who[:, None, :] == PREFIX)
    allowed = same & torch.ones(width, width, dtype=torch.bool).tril()
    mask = torch.zeros(allowed.shape).masked_fill_(~allowed, -torch.inf)  # padding still sees itself: no row is empty
    return Batch(
        torch.from_numpy(ids),
        torch.from_numpy(positions),
        torch.from_numpy(kinds),
        mask[:, None],
        torch.tensor(probes, dtype=torch.long).reshape(-1, 2),
        torch.tensor(present),
        torch.tensor(names, dtype=torch.long).reshape(-1, 2),
        torch.from_numpy(untold),
    )


def pixels(images: np.ndarray, generator: torch.Generator | None = None, mirrored: bool = False) -> torch.Tensor:
    """Normalise pictures as the processor does; with a generator, also vary colour and contrast a little.

    Args:
        images: uint8, (b, 96, 96, 3).
        generator: Source of the augmentation.
        mirrored: Flip left and right.

    Returns:
        float32, (b, 3, 96, 96).
    """
    x = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float()
    x = x.div_(255).sub_(PIXEL_MEAN).div_(PIXEL_STD)
    if generator is not None:
        shape = (len(x), 3, 1, 1)
        x.mul_(1 + 0.1 * torch.randn(shape, generator=generator)).add_(0.12 * torch.randn(shape, generator=generator))
    return x.flip(-1) if mirrored else x
