"""Change the scores of every next token: a plausibility cut, First Logit Boosting, contrasts with a changed image.

z are the logits of the model at a step, p their softmax, z' the logits of a second pass that sees no image or a noised
one. The plausibility cut keeps the tokens with p >= beta max p and gives all others minus infinity. It makes sampling
nearly greedy by itself, which is why ``cut`` is the control of all methods that use one (Yin et al., "The Mirage of
Performance Gains", arXiv 2504.10020).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from transformers import LogitsProcessor

from stethoscope.core.errors import CapabilityError
from stethoscope.core.types import Generation
from stethoscope.mitigation.base import DecodingMitigation, check_range, check_whole
from stethoscope.mitigation.contrastive import (
    ContrastProcessor,
    cut_scores,
    hide_image,
    noise_image,
    read_tokens,
    unsure_contrast,
    weighted_contrast,
)
from stethoscope.tracing.interventions import STEP, STEPS
from stethoscope.tracing.step_inputs import StepInputs
from stethoscope.tracing.trace import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stethoscope.adapters.hf import HfAdapter


class CutProcessor(LogitsProcessor):
    """Cut implausible tokens; see ``cut_scores``."""

    def __init__(self, beta: float) -> None:
        self._beta = beta

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return cut_scores(scores, scores, self._beta)


class FirstLogitProcessor(LogitsProcessor):
    """Add the logits of the first answer token to those of every later one: z_t + gamma (1 - e^(-rate t)) z_0."""

    def __init__(self, gamma: float, rate: float, beta: float) -> None:
        self._gamma, self._rate, self._beta, self._step = gamma, rate, beta, 0
        self._first: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._first is None:
            # tokens that generate forbids stay forbidden: 0 of minus infinity would be no number
            self._first = scores.masked_fill(scores.isinf(), 0.0)
        weight = self._gamma * (1 - math.exp(-self._rate * self._step))
        self._step += 1
        return cut_scores(torch.add(scores, self._first, alpha=weight), scores, self._beta)


# --- methods ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut(DecodingMitigation):
    """The plausibility cut alone, the control of all methods that use it.

    Attributes:
        beta: tokens with p < beta max p are never chosen; from 0 to 1.
    """

    name: ClassVar[str] = "cut"
    source: ClassVar[str] = "control"
    beta: float = 0.1

    def __post_init__(self) -> None:
        check_range("beta", self.beta, 0, 1)

    def processors(
        self, adapter: HfAdapter, encoded: Sequence[Encoded], generation: Generation
    ) -> list[LogitsProcessor]:
        """See ``DecodingMitigation.processors``."""
        return [CutProcessor(self.beta)]


@dataclass(frozen=True)
class FirstLogitBoosting(DecodingMitigation):
    """First Logit Boosting (CVPR 2026): what the first token saw of the image is added to all others.

    Attributes:
        gamma: largest weight of the first logits, 0 or more.
        rate: how fast the weight grows with the tokens (lambda of the paper), 0 or more.
        beta: of the plausibility cut, from 0 to 1.
    """

    name: ClassVar[str] = "flb"
    source: ClassVar[str] = "First Logit Boosting, CVPR 2026"
    gamma: float = 0.3
    rate: float = 0.05
    beta: float = 0.1

    def __post_init__(self) -> None:
        check_range("gamma", self.gamma, 0)
        check_range("rate", self.rate, 0)
        check_range("beta", self.beta, 0, 1)

    def processors(
        self, adapter: HfAdapter, encoded: Sequence[Encoded], generation: Generation
    ) -> list[LogitsProcessor]:
        """See ``DecodingMitigation.processors``."""
        return [FirstLogitProcessor(self.gamma, self.rate, self.beta)]


class ContrastMitigation(DecodingMitigation):
    """A method that compares with a second pass over a changed prompt.

    Attributes:
        beta: of the plausibility cut, from 0 to 1.
    """

    passes: ClassVar[float] = 2.0
    beta: float

    @abstractmethod
    def change(self, prompt: Encoded, model: PreTrainedModel) -> Encoded:
        """Return the prompt of the second pass of a model.

        Raises:
            CapabilityError: the prompt cannot be changed so.
        """

    @abstractmethod
    def combine(self, scores: Tensor, other: Tensor, step: int) -> Tensor:
        """Combine (B, V) logits z and z' of a step, counted from 0, to new scores."""

    def processors(
        self, adapter: HfAdapter, encoded: Sequence[Encoded], generation: Generation
    ) -> list[LogitsProcessor]:
        """See ``DecodingMitigation.processors``."""
        changed = [self.change(prompt, adapter.model) for prompt in encoded]
        model, arguments = adapter.prepare_generate(changed, replace(generation, do_sample=False, mitigation=None))
        read = partial(read_tokens, make_steps=StepInputs)
        second = partial(model.generate, **arguments, custom_generate=read)
        return [ContrastProcessor(second, self.combine, self.beta)]


@dataclass(frozen=True)
class NoImageContrast(ContrastMitigation):
    """Contrast with the same prompt without its image: M3ID (Favero et al., CVPR 2024), or PAI's text branch.

    M3ID adds (e^(rate t) - 1) (log p - log p') where max p < alpha, more the longer the answer. With ``weight`` the
    contrast is constant, as in PAI (Liu et al., ECCV 2024) with gamma = 1 + weight: z + weight (z - z').

    Attributes:
        alpha: M3ID contrasts where the most probable token has less than this, from 0 to 1.
        rate: how fast M3ID's weight grows with the tokens (lambda of the paper), 0 or more.
        weight: constant weight instead of M3ID's; None for M3ID.
        beta: of the plausibility cut, from 0 (none, as M3ID) to 1; PAI has 0.1.
    """

    name: ClassVar[str] = "no_image"
    source: ClassVar[str] = "M3ID, CVPR 2024"
    alpha: float = 0.3
    rate: float = 0.02
    weight: float | None = None
    beta: float = 0.0

    def __post_init__(self) -> None:
        check_range("alpha", self.alpha, 0, 1)
        check_range("rate", self.rate, 0)
        check_range("beta", self.beta, 0, 1)
        if self.weight is not None:
            check_range("weight", self.weight, 0)

    def combine(self, scores: Tensor, other: Tensor, step: int) -> Tensor:
        """Combine (B, V) logits z and z' of a step, counted from 0."""
        if self.weight is not None:
            return weighted_contrast(scores, other, self.weight)
        return unsure_contrast(scores, other, step, self.alpha, self.rate)

    def change(self, prompt: Encoded, model: PreTrainedModel) -> Encoded:
        """See ``ContrastMitigation.change``."""
        return without_image(prompt, model)


@dataclass(frozen=True)
class NoiseContrast(ContrastMitigation):
    """Visual Contrastive Decoding (Leng et al., CVPR 2024): (1 + alpha) z - alpha z', z' with a noised image.

    Attributes:
        alpha: weight of the contrast, 0 or more.
        beta: of the plausibility cut, from 0 to 1.
        step: of the diffusion that makes the noise, from 0 to 999.
        seed: of the noise, 0 or more.
    """

    name: ClassVar[str] = "vcd"
    source: ClassVar[str] = "VCD, CVPR 2024"
    alpha: float = 1.0
    beta: float = 0.1
    step: int = STEP
    seed: int = 0

    def __post_init__(self) -> None:
        check_range("alpha", self.alpha, 0)
        check_range("beta", self.beta, 0, 1)
        check_whole("step", self.step, 0, STEPS - 1)
        check_whole("seed", self.seed, 0)

    def combine(self, scores: Tensor, other: Tensor, step: int) -> Tensor:
        """Combine (B, V) logits z and z'."""
        return weighted_contrast(scores, other, self.alpha)

    def change(self, prompt: Encoded, model: PreTrainedModel) -> Encoded:
        """See ``ContrastMitigation.change``."""
        return replace(prompt, inputs=noise_image(prompt.inputs, self.step, self.seed), cache=None)


def without_image(prompt: Encoded, model: PreTrainedModel) -> Encoded:
    """Hide the image of a prompt, which a model then reads as the text alone, positions included; see ``hide_image``.

    Raises:
        CapabilityError: the prompt has no image tokens that could be hidden.
    """
    if not prompt.spans.image:
        raise CapabilityError(
            "mitigation=no_image hides the image tokens of a prompt, and this model's prompt has none"
        )
    image = torch.zeros_like(prompt.inputs["input_ids"], dtype=torch.bool)
    image[:, list(prompt.spans.image)] = True
    return replace(prompt, inputs=hide_image(model, prompt.inputs, image), cache=None)
