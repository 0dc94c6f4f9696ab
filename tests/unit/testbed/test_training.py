"""The training loop: it resumes exactly, and its parts do what they say."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest
import torch

from scripts.train_testbed.architecture import build_model
from scripts.train_testbed.data import Encoder, Rendered, load_split, patch_labels, render_split
from scripts.train_testbed.loop import MuonWithAdam, orthogonalise, run_stage
from scripts.train_testbed.stages import AlignStage, JointStage, LanguageStage, Student, VisionStage, thin_noise
from stethoscope import testbed
from stethoscope.testbed.scene import scene_at
from stethoscope.testbed.vocabulary import INDEX

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def rendered() -> Rendered:
    scenes = [scene_at(i, "prior", 9, 0.3) for i in range(12)]
    images = np.stack([np.asarray(scene.image()) for scene in scenes])
    return Rendered(scenes, images, np.stack([patch_labels(s.mask()) for s in scenes]).astype(np.int64))


@pytest.fixture(scope="module")
def tokenizer() -> transformers.PreTrainedTokenizerBase:
    return transformers.AutoProcessor.from_pretrained(testbed.MODEL_DIR).tokenizer


def new_student(tokenizer: transformers.PreTrainedTokenizerBase) -> Student:
    torch.manual_seed(0)
    return Student(build_model(tokenizer)).train()


def test_interrupted_run_continues_as_if_nothing_had_happened(
    tmp_path: pathlib.Path, rendered: Rendered, tokenizer: transformers.PreTrainedTokenizerBase
) -> None:
    def stage() -> VisionStage:
        return VisionStage(new_student(tokenizer), 3, 4, rendered, rendered)

    through, cut = stage(), stage()
    (tmp_path / "through").mkdir()
    (tmp_path / "cut").mkdir()
    run_stage(through, 4, tmp_path / "through")
    left = 2

    def interrupt() -> None:
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(cut, 4, tmp_path / "cut", every_minutes=0, on_checkpoint=interrupt)
    resumed = stage()
    run_stage(resumed, 4, tmp_path / "cut")
    for name, value in through.student.state_dict().items():
        torch.testing.assert_close(resumed.student.state_dict()[name], value, msg=name)


@pytest.mark.parametrize("name", ["language", "align", "joint"])
def test_every_stage_takes_a_step(
    name: str, tmp_path: pathlib.Path, rendered: Rendered, tokenizer: transformers.PreTrainedTokenizerBase
) -> None:
    student, encoder = new_student(tokenizer), Encoder(tokenizer)
    stage = {
        "language": lambda: LanguageStage(student, 3, 4, encoder, rendered),
        "align": lambda: AlignStage(student, 3, 4, rendered),
        "joint": lambda: JointStage(student, 3, 4, encoder, rendered, 0.5),
    }[name]()
    before = [p.detach().clone() for p in stage.parameters()]
    run_stage(stage, 2, tmp_path)
    assert any(not torch.equal(a, b) for a, b in zip(before, stage.parameters(), strict=True))
    assert (tmp_path / "log.jsonl").read_text().count(f'"stage": "{name}"') == 1


def test_shards_read_back_as_rendered(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scripts.train_testbed import data

    monkeypatch.setattr(data, "SHARD", 4)
    for shard in range(2):
        data._render_shard((tmp_path, "prior", 9, shard))
    render_split(tmp_path, "prior", 6, 9)  # nothing is missing
    read = load_split(tmp_path, "prior", 6, 9)
    assert read.scenes == [scene_at(i, "prior", 9, data.UNSEEN_RATE) for i in range(6)]
    assert np.array_equal(read.images[5], read.scenes[5].image())
    assert np.array_equal(read.labels[5], patch_labels(read.scenes[5].mask()))


def test_patch_labels_name_the_majority() -> None:
    mask = np.zeros((96, 96), np.uint8)
    mask[:12, :12] = 1 + INDEX["dog"]
    mask[12:15, 12:24] = 1 + INDEX["cat"]  # a quarter of its patch
    mask[24, 24:36] = 1 + INDEX["car"]  # too little
    labels = patch_labels(mask)
    assert labels[0] == 1 + INDEX["dog"]
    assert labels[9] == 1 + INDEX["cat"]
    assert labels.astype(bool).sum() == 2


def test_noise_dial(rendered: Rendered) -> None:
    def undrawn(keep: float) -> int:
        thinned = [thin_noise(scene, keep) for scene in rendered.scenes]
        assert all(thin.visible == scene.visible for thin, scene in zip(thinned, rendered.scenes, strict=True))
        return sum(len(scene.annotated) - len(scene.visible) for scene in thinned)

    assert undrawn(0.0) == 0 < undrawn(0.5) < undrawn(1.0)


def test_orthogonalise_brings_singular_values_near_one() -> None:
    matrices = torch.randn(3, 16, 40, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrices))
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_optimiser_moves_everything_and_slow_ones_less() -> None:
    torch.manual_seed(0)
    fast, slow = torch.nn.Linear(128, 128), torch.nn.Linear(128, 128)
    slow.load_state_dict(fast.state_dict())
    start = fast.weight.detach().clone()
    optimiser = MuonWithAdam([*fast.parameters(), *slow.parameters()], slow.parameters(), weight_decay=0.0)
    x = torch.randn(4, 128)
    (fast(x).square().sum() + slow(x).square().sum()).backward()
    optimiser.step(0.01)
    moved = [(layer.weight - start).norm() for layer in (fast, slow)]
    torch.testing.assert_close(moved[0], 3 * moved[1])
    assert fast.weight.grad is None
