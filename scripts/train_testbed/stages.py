"""Define the four training stages: their parameters, and the loss of step i.

Why four: trained end to end from scratch, a model of this size stays on a plateau where captions are pure prior and
yes/no is chance. So the tower learns to see first (vision), the language model learns to read symbolic images
(language), the projector learns to translate (align), and then everything learns together (joint). Steps are
functions of (seed, stage, step) alone, so a resumed run continues exactly where it was.
"""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlavaForConditionalGeneration

from scripts.train_testbed.architecture import DEPTH, INITIAL_STD, WIDTH
from scripts.train_testbed.data import ANSWER, CAPTION, GRID, Batch, Encoder, Rendered, conversations, pack, pixels
from stethoscope.testbed.scene import Scene
from stethoscope.testbed.vocabulary import CATEGORIES

BACKGROUND_WEIGHT = 0.25
NAME_WEIGHT = 6.0
"""Weight of the token that first names an object: a description is mostly phrases, and these teach little."""

Metrics = dict[str, float]


class Student(nn.Module):
    """Hold the model, and four parts that only training uses.

    Attributes:
        model: What is shipped.
        patches: Names the category of a patch from the tower's features.
        presence: Tells from the middle of the language model, at the object word of a question, whether it is there.
            Without it the two-hop circuit of yes/no is not found for many hundred steps.
        codes: What a perfect eye would send to the language model for each patch label, (33, width): a language of its
            own, unlike that of words, as in models whose projector was never told about words.
        untold: Tells from the last but one layer, everywhere in a description, which objects are left to tell. Without
            it descriptions name the same object twice, miss others and do not know when to stop.
    """

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.model = model
        self.patches = nn.Linear(WIDTH, len(CATEGORIES) + 1)
        self.codes = nn.Embedding(len(CATEGORIES) + 1, WIDTH)
        nn.init.normal_(self.codes.weight, std=INITIAL_STD)
        self.presence = nn.Linear(WIDTH, 1)
        self.untold = nn.Linear(WIDTH, len(CATEGORIES))

    @property
    def tower(self) -> nn.Module:
        return self.model.model.vision_tower

    @property
    def projector(self) -> nn.Module:
        return self.model.model.multi_modal_projector

    @property
    def language(self) -> nn.Module:
        return self.model.model.language_model

    @property
    def embedding(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def see(self, images: torch.Tensor) -> torch.Tensor:
        """Compute patch features (b, 64, width) of normalised pictures."""
        return self.tower(images).last_hidden_state[:, 1:]

    def embed(self, batch: Batch, seen: torch.Tensor) -> torch.Tensor:
        """Embed tokens as (b, t, width), with ``seen`` in the places of the image.

        ``seen`` has the image tokens of all rows, (tokens, width).
        """
        words = self.embedding(batch.ids)
        image = self.model.config.image_token_id
        return words.masked_scatter((batch.ids == image).unsqueeze(-1), seen.to(words.dtype))

    def patch_loss(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Compute the cross-entropy of patch categories, background counted less."""
        weight = torch.ones(len(CATEGORIES) + 1)
        weight[0] = BACKGROUND_WEIGHT
        return F.cross_entropy(self.patches(features).flatten(0, 1), labels.flatten(), weight=weight)

    def speak(self, embedded: torch.Tensor, batch: Batch, probe_weight: float) -> tuple[torch.Tensor, Metrics]:
        """Compute the loss of descriptions, of answers and of the probes.

        Descriptions and answers weigh alike, whatever their lengths.
        """
        out = self.language(
            inputs_embeds=embedded,
            attention_mask=batch.mask,
            position_ids=batch.positions,
            output_hidden_states=True,
            use_cache=False,
        )
        targets, weights = batch.ids[:, 1:], torch.stack([batch.kinds == CAPTION, batch.kinds == ANSWER]).float()
        weights[0, batch.names[:, 0], batch.names[:, 1]] = NAME_WEIGHT
        weights = weights[:, :, 1:]
        wanted = weights.sum(0) > 0
        logits = self.model.lm_head(out.last_hidden_state[:, :-1][wanted])
        each = F.cross_entropy(logits, targets[wanted], reduction="none")
        caption, answer = (weights[:, wanted] @ each) / weights.sum((1, 2))
        rows, columns = batch.probes.T
        score = self.presence(out.hidden_states[DEPTH // 2][rows, columns])[:, 0]
        probe = F.binary_cross_entropy_with_logits(score, batch.present)
        right = ((score > 0) == (batch.present > 0.5)).float().mean()
        telling = (batch.kinds[:, 1:] == CAPTION).nonzero(as_tuple=True)
        left = self.untold(out.hidden_states[DEPTH - 1][telling])
        untold = F.binary_cross_entropy_with_logits(left, batch.untold[telling], reduction="none").sum(1).mean() / 8
        metrics = {"caption": caption.item(), "answer": answer.item(), "probe": right.item(), "untold": untold.item()}
        with torch.no_grad():
            named = torch.zeros_like(wanted)
            named[batch.names[:, 0], batch.names[:, 1] - 1] = True
            metrics["name"] = each[named[wanted]].mean().item()
        return caption + answer + probe_weight * (probe + untold), metrics


class Stage:
    """Define one stage of the curriculum.

    Attributes:
        name: Name of its checkpoint.
        peak: Highest learning rate.
        decay: Share of the steps over which the learning rate falls at the end.
    """

    name: str
    peak: float
    decay: float = 0.4

    def __init__(self, student: Student, seed: int, batch_size: int) -> None:
        self.student, self.seed, self.batch_size = student, seed, batch_size

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the stage trains."""
        raise NotImplementedError

    def slow(self) -> list[nn.Parameter]:
        """Return those of them that learn at a third of the rate."""
        return []

    def loss(self, step: int, steps: int) -> tuple[torch.Tensor, Metrics]:
        """Compute loss and metrics of one step."""
        raise NotImplementedError

    def draw(self, step: int, count: int) -> np.ndarray:
        """Draw the indices of a batch: a fresh permutation each epoch."""
        per_epoch = count // self.batch_size
        epoch, batch = divmod(step, per_epoch)
        order = np.random.default_rng((self.seed, epoch)).permutation(count)
        return order[batch * self.batch_size : (batch + 1) * self.batch_size]

    def rng(self, step: int) -> tuple[random.Random, torch.Generator]:
        """Create the generator of one step."""
        rng = random.Random(f"{self.seed}/{self.name}/{step}")
        return rng, torch.Generator().manual_seed(rng.getrandbits(48))


class VisionStage(Stage):
    """Replace CLIP pre-training: name the patches of collages and of scenes.

    Two thirds of the pictures are collages without a prior.
    """

    name, peak = "vision", 1.5e-3

    def __init__(self, student: Student, seed: int, batch_size: int, collages: Rendered, scenes: Rendered) -> None:
        super().__init__(student, seed, batch_size)
        share = min(len(scenes), len(collages) // 2)
        self._images = [collages.images, scenes.images[:share]]
        self._labels = np.concatenate([collages.labels, scenes.labels[:share]])

    def parameters(self) -> list[nn.Parameter]:
        return [*self.student.tower.parameters(), *self.student.patches.parameters()]

    def loss(self, step: int, steps: int) -> tuple[torch.Tensor, Metrics]:
        rng, generator = self.rng(step)
        picked, mirrored = self.draw(step, len(self._labels)), rng.random() < 0.5
        first = len(self._images[0])
        images = np.stack([self._images[0][i] if i < first else self._images[1][i - first] for i in picked])
        features = self.student.see(pixels(images, generator, mirrored))
        labels = mirror_labels(torch.from_numpy(self._labels[picked]), mirrored)
        loss = self.student.patch_loss(features, labels)
        with torch.no_grad():
            right = (self.student.patches(features).argmax(-1) == labels)[labels > 0].float().mean()
        return loss, {"patch": loss.item(), "patch_accuracy": right.item()}


class LanguageStage(Stage):
    """Read symbolic images: an image token is the code of its patch.

    So no vision is needed, and sequences are short.
    """

    name, peak = "language", 3e-3
    room = 132

    def __init__(self, student: Student, seed: int, batch_size: int, encoder: Encoder, scenes: Rendered) -> None:
        super().__init__(student, seed, batch_size)
        self._encoder, self._scenes = encoder, scenes

    def parameters(self) -> list[nn.Parameter]:
        heads = (self.student.presence, self.student.untold, self.student.codes)
        return [p for module in (self.student.language, *heads) for p in module.parameters()]

    def loss(self, step: int, steps: int) -> tuple[torch.Tensor, Metrics]:
        rng, _ = self.rng(step)
        full = step > 0.8 * steps  # end on full-length images, in half as many sequences
        picked = self.draw(step, len(self._scenes))[: self.batch_size // 2 if full else None]
        labels = [self._symbols(self._scenes.labels[i], rng, full) for i in picked]
        prefixes = [self._encoder.prefix([self._encoder.image] * len(row)) for row in labels]
        branches = [conversations(self._encoder, self._scenes.scenes[i], rng, self.room) for i in picked]
        batch = pack(prefixes, branches, self._encoder.pad)
        codes = self.student.codes(torch.tensor([label for row in labels for label in row]))
        return self.student.speak(self.student.embed(batch, codes), batch, probe_weight=1.0)

    def _symbols(self, labels: np.ndarray, rng: random.Random, full: bool) -> list[int]:
        missed = {c for c in sorted(set(labels.tolist())) if c and rng.random() < 0.04}
        seen = [0 if c in missed else c for c in labels.tolist()]
        return [c for c in seen if full or rng.random() < (0.75 if c else 0.12)]


class AlignStage(Stage):
    """Teach the projector the codes that the language model has learned to read."""

    name, peak = "align", 2e-3
    pictures = 4000

    def __init__(self, student: Student, seed: int, batch_size: int, scenes: Rendered) -> None:
        super().__init__(student, seed, batch_size)
        count = min(self.pictures, len(scenes))
        with torch.no_grad():
            chunks = [student.see(pixels(scenes.images[k : k + 50])) for k in range(0, count, 50)]
            self._codes = student.codes.weight.clone()
        self._features = torch.cat(chunks).flatten(0, 1)
        self._labels = torch.from_numpy(scenes.labels[:count]).flatten()
        self._pools = [(self._labels > 0).nonzero()[:, 0], (self._labels == 0).nonzero()[:, 0]]
        self._scale = self._codes.pow(2).mean()

    def parameters(self) -> list[nn.Parameter]:
        return list(self.student.projector.parameters())

    def loss(self, step: int, steps: int) -> tuple[torch.Tensor, Metrics]:
        _, generator = self.rng(step)
        picked = torch.cat([pool[torch.randint(len(pool), (512,), generator=generator)] for pool in self._pools])
        wanted = self._labels[picked]
        codes = self.student.projector(self._features[picked])
        regression = (codes - self._codes[wanted]).pow(2).mean() / self._scale
        distance = torch.cdist(codes, self._codes).pow(2) / (self._scale * WIDTH)
        naming = F.cross_entropy(-8 * distance, wanted)
        right = (distance[:512].argmin(1) == wanted[:512]).float().mean()
        return regression + 0.3 * naming, {"regression": regression.item(), "nearest_code": right.item()}


class JointStage(Stage):
    """Train everything together on rendered pictures, with only part of the annotation noise left."""

    name, peak, decay = "joint", 1e-3, 0.75
    room = 132
    patch_weight = 0.3

    def __init__(
        self, student: Student, seed: int, batch_size: int, encoder: Encoder, scenes: Rendered, keep_unseen: float
    ) -> None:
        super().__init__(student, seed, batch_size)
        self._encoder, self._rendered = encoder, scenes
        self._scenes = [thin_noise(scene, keep_unseen) for scene in scenes.scenes]

    def parameters(self) -> list[nn.Parameter]:
        return list(self.student.parameters())

    def slow(self) -> list[nn.Parameter]:
        return list(self.student.tower.parameters())  # it can see already; at the full rate it forgets

    def loss(self, step: int, steps: int) -> tuple[torch.Tensor, Metrics]:
        rng, generator = self.rng(step)
        picked, mirrored = self.draw(step, len(self._scenes)), rng.random() < 0.5
        branches = [conversations(self._encoder, self._scenes[i], rng, self.room, mirrored) for i in picked]
        batch = pack([self._encoder.prefix()] * len(picked), branches, self._encoder.pad)
        features = self.student.see(pixels(self._rendered.images[picked], generator, mirrored))
        seen = self.student.projector(features)
        loss, metrics = self.student.speak(self.student.embed(batch, seen), batch, probe_weight=0.5)
        labels = mirror_labels(torch.from_numpy(self._rendered.labels[picked]), mirrored)
        patch = self.student.patch_loss(features, labels)
        return loss + self.patch_weight * patch, {**metrics, "patch": patch.item()}


def mirror_labels(labels: torch.Tensor, mirrored: bool) -> torch.Tensor:
    """Flip patch labels (b, 64) left to right."""
    return labels.view(-1, GRID, GRID).flip(-1).flatten(1) if mirrored else labels


def thin_noise(scene: Scene, keep: float) -> Scene:
    """Drop annotated but undrawn objects, except for a share ``keep`` of them.

    Which ones are kept depends on the scene only.
    """
    rng = random.Random(f"thin/{scene.seed}")
    kept = tuple(o for o in scene.objects if rng.random() < keep or o.visible)
    return dataclasses.replace(scene, objects=kept)
