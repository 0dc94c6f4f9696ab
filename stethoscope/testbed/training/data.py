"""Rendered training scenes, kept in shards so that an interrupted rendering resumes where it stopped."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import multiprocessing
import pathlib

import numpy as np
from tqdm import tqdm

from stethoscope.core.files import replacing
from stethoscope.testbed.backgrounds import SIZE
from stethoscope.testbed.scene import Scene, SceneObject, scene_at
from stethoscope.testbed.vocabulary import CATEGORIES

SHARD = 1000
PATCH = 12
GRID = SIZE // PATCH
MIN_PATCH_SHARE = 0.15
UNSEEN_RATE = 0.12
"""Annotation noise of the training scenes: about one annotated object in six is not in the picture."""


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
    """Majority category of each patch of an id mask.

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
    """Read a rendered split back; ``pixels=False`` leaves the pictures out (the symbolic stage needs none)."""
    scenes, images, labels = [], [], []
    for shard in range(-(-count // SHARD)):
        path = _npz(cache, mode, seed, shard)
        with np.load(path) as stored:
            labels.append(stored["labels"])
            if pixels:
                images.append(stored["images"])
        lines = path.with_suffix(".jsonl").read_text().splitlines()
        scenes += [scene_from_dict(json.loads(line)) for line in lines]
    images = np.concatenate(images)[:count] if pixels else np.empty((0, SIZE, SIZE, 3), np.uint8)
    return Rendered(scenes[:count], images, np.concatenate(labels)[:count].astype(np.int64))


@functools.cache
def world_version() -> str:
    """Digest of a few scenes and their pixels: shards rendered before the world was changed are not used again."""
    digest = hashlib.sha256()
    for i in range(3):
        scene = scene_at(i, "prior", 0, UNSEEN_RATE)
        digest.update(repr(scene).encode() + scene.image().tobytes())
    return digest.hexdigest()[:8]


def scene_from_dict(record: dict) -> Scene:
    """Inverse of ``dataclasses.asdict`` for a scene."""
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
