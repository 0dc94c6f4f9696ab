"""Render training scenes into shards, and pack conversations about them.

An interrupted rendering goes on with the next shard.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import pathlib
import random
import re
from collections.abc import Sequence

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from scripts.train_testbed.architecture import IMAGE_TOKENS, PATCH, PIXEL_MEAN, PIXEL_STD
from stethoscope.core.files import replacing
from stethoscope.testbed import language
from stethoscope.testbed.drawing import SIZE
from stethoscope.testbed.scene import Scene, SceneObject, scene_at
from stethoscope.testbed.vocabulary import CATEGORIES, INDEX

SHARD = 1000
"""Scenes in a file."""
GRID = SIZE // PATCH
MIN_PATCH_SHARE = 0.15
"""Share of a patch that an object fills at least to be its label."""
UNSEEN_RATE = 0.12
"""Annotation noise of the training scenes: about one annotated object in six is not in the picture."""
NAMES = re.compile(rf"\b({'|'.join(sorted(CATEGORIES, key=len, reverse=True))})\b", re.IGNORECASE)
"""Names of objects in captions."""
CAPTION, ANSWER = 1, 2
"""Kinds of target tokens; 0 is not a target."""
MAX_QUESTIONS = 8
PADDING, PREFIX = -1, 0
"""Owners of tokens that belong to no branch; branches count from 1."""

# --- scenes ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Rendered:
    """Scenes with their pictures and patch labels.

    Attributes:
        scenes: n scenes.
        images: uint8, (n, 96, 96, 3).
        labels: Category of each 12-pixel patch, int64, (n, 64); 0 is background, 1 + index a category.
    """

    scenes: list[Scene]
    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.scenes)


def patch_labels(mask: np.ndarray) -> np.ndarray:
    """Find the majority category of each patch of an id mask.

    Args:
        mask: uint8, (96, 96).

    Returns:
        uint8, (64,), row by row; a patch counts as background if no object fills at least 15 % of it.
    """
    patches = mask.reshape(GRID, PATCH, GRID, PATCH).swapaxes(1, 2).reshape(GRID * GRID, PATCH * PATCH)
    counts = np.stack([np.bincount(p, minlength=len(CATEGORIES) + 1)[1:] for p in patches])
    enough = counts.max(1) >= MIN_PATCH_SHARE * PATCH * PATCH
    return np.where(enough, 1 + counts.argmax(1), 0).astype(np.uint8)


def render_split(cache: pathlib.Path, mode: str, count: int, seed: int, workers: int = 1) -> None:
    """Render the missing shards of a split into ``cache``."""
    cache.mkdir(parents=True, exist_ok=True)
    jobs = [
        (cache, mode, seed, shard) for shard in range(-(-count // SHARD)) if not _npz(cache, mode, seed, shard).exists()
    ]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for _ in tqdm(pool.imap(_render_shard, jobs), total=len(jobs), desc=f"rendering {mode}", disable=not jobs):
            pass


def load_split(cache: pathlib.Path, mode: str, count: int, seed: int, pixels: bool = True) -> Rendered:
    """Read a rendered split back; ``pixels=False`` leaves the pictures out.

    The symbolic stage needs none.
    """
    scenes, images, labels = [], [], []
    for shard in range(-(-count // SHARD)):
        path = _npz(cache, mode, seed, shard)
        with np.load(path) as stored:
            labels.append(stored["labels"])
            if pixels:
                images.append(stored["images"])
        lines = path.with_suffix(".jsonl").read_text().splitlines()
        scenes += [scene_from_dict(json.loads(line)) for line in lines]
    pictures = np.concatenate(images)[:count] if pixels else np.empty((0, SIZE, SIZE, 3), np.uint8)
    return Rendered(scenes[:count], pictures, np.concatenate(labels)[:count].astype(np.int64))


@functools.cache
def world_version() -> str:
    """Digest a few scenes and their pixels.

    Shards that were rendered before the world was changed are not used again.
    """
    digest = hashlib.sha256()
    for i in range(3):
        scene = scene_at(i, "prior", 0, UNSEEN_RATE)
        digest.update(repr(scene).encode() + scene.image().tobytes())
    return digest.hexdigest()[:8]


def scene_from_dict(record: dict) -> Scene:
    """Build a scene from what ``dataclasses.asdict`` made of it."""
    return Scene(**{**record, "objects": tuple(SceneObject(**o) for o in record["objects"])})


def _npz(cache: pathlib.Path, mode: str, seed: int, shard: int) -> pathlib.Path:
    return cache / f"{mode}-{seed}-{world_version()}-{shard:03d}.npz"


def _render_shard(job: tuple[pathlib.Path, str, int, int]) -> None:
    cache, mode, seed, shard = job
    path = _npz(cache, mode, seed, shard)
    rate = UNSEEN_RATE if mode == "prior" else 0.0
    scenes = [scene_at(i, mode, seed, rate) for i in range(shard * SHARD, (shard + 1) * SHARD)]
    path.with_suffix(".jsonl").write_text("".join(json.dumps(dataclasses.asdict(s)) + "\n" for s in scenes))
    with replacing(path) as file:
        np.savez(
            file,
            images=np.stack([np.asarray(s.image()) for s in scenes]),
            labels=np.stack([patch_labels(s.mask()) for s in scenes]),
        )


# --- conversations --------------------------------------------------------------------------------------------------


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
    """Turn scenes into token sequences identical to what the processor makes of the same text."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._cache: dict[str, list[int]] = {}
        self.image = tokenizer.convert_tokens_to_ids("<image>")
        self.pad = tokenizer.pad_token_id

    def encode(self, text: str) -> list[int]:
        """Tokenise a text without special tokens, cached (prompts repeat)."""
        if text not in self._cache:
            self._cache[text] = self._tokenizer.encode(text, add_special_tokens=False)
        return self._cache[text]

    def prefix(self, image: list[int] | None = None) -> list[int]:
        """Return the beginning of every conversation with its image; ``image`` replaces the 64 image tokens."""
        return [
            self._tokenizer.bos_token_id,
            *self.encode("USER: "),
            *([self.image] * IMAGE_TOKENS if image is None else image),
        ]

    def caption(self, prompt: str, text: str, annotated: Sequence[str]) -> Branch:
        """Encode a description of ``annotated`` objects."""
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
        """Encode a yes/no question."""
        named = self.encode(f"\n{question.before} {question.object}")
        start = [*named, *self.encode(f"{question.after} ASSISTANT:")]
        answer = [*self.encode(f" {question.answer}"), self._tokenizer.eos_token_id]
        return Branch([*start, *answer], len(start), ANSWER, len(named) - 1, question.answer == "Yes")


def conversations(
    encoder: Encoder, scene: Scene, rng: random.Random, room: int, mirrored: bool = False
) -> list[Branch]:
    """Encode a description of one scene and as many questions as fit.

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
        start = len(prefix)
        ids[row, :start], positions[row, :start], owner[row, :start] = prefix, np.arange(start), PREFIX
        for number, branch in enumerate(own, start=1):
            end = start + len(branch.ids)
            ids[row, start:end], owner[row, start:end] = branch.ids, number
            positions[row, start:end] = len(prefix) + np.arange(len(branch.ids))
            kinds[row, start + branch.prompt : end] = branch.kind
            if branch.object_at is not None:
                probes.append((row, start + branch.object_at))
                present.append(float(branch.present))
            for name in branch.objects:
                count = branch.new_names.get(name, len(branch.ids))
                untold[row, start : start + count, INDEX[name]] = 1
            names += [(row, start + index) for index in branch.new_names.values()]
            start = end
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
