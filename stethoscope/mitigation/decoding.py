"""Change the scores of every next token: a plausibility cut, First Logit Boosting, contrasts with a changed image.

z are the logits of the model at a step, p their softmax, z' the logits of a second pass that sees no image or a noised
one. The plausibility cut keeps the tokens with p >= beta max p and gives all others minus infinity. It makes sampling
nearly greedy by itself, which is why ``cut`` is the control of all methods that use one (Yin et al., "The Mirage of
Performance Gains", arXiv 2504.10020).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from transformers import LogitsProcessor

from stethoscope.core.errors import CapabilityError
from stethoscope.core.types import Generation
from stethoscope.mitigation.base import DecodingMitigation, check_range
from stethoscope.tracing.interventions import STEP, STEPS, noised
from stethoscope.tracing.step_inputs import StepInputs
from stethoscope.tracing.trace import Encoded

if TYPE_CHECKING:
    from stethoscope.adapters.hf import HfAdapter

Combine = Callable[[Tensor, Tensor, int], Tensor]


def cut_scores(scores: Tensor, original: Tensor, beta: float) -> Tensor:
    """Give minus infinity to tokens that are implausible by the original distribution.

    Args:
        scores: (B, V) scores to cut.
        original: (B, V) logits z of the model.
        beta: tokens with p < beta max p are cut, from 0 (none) to 1 (all but the most probable).

    Returns:
        (B, V) scores.

    >>> cut_scores(torch.zeros(1, 3), torch.tensor([[0.5, 0.3, 0.2]]).log(), 0.5)
    tensor([[0., 0., -inf]])
    """
    if not beta:
        return scores
    lowest = original.max(-1, keepdim=True).values + math.log(beta)
    return scores.masked_fill(original < lowest, -torch.inf)


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
        return cut_scores(scores + weight * self._first, scores, self._beta)


class ContrastProcessor(LogitsProcessor):
    """Combine the scores of every step with those of a second pass over a changed prompt.

    Args:
        second: the second pass.
        combine: makes new (B, V) scores of z, z' and the step, from 0.
        beta: of the plausibility cut by z; 0 for none.
    """

    def __init__(self, second: SecondPass, combine: Combine, beta: float) -> None:
        self._second, self._combine, self._beta, self._step = second, combine, beta, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        other = self._second.logits(input_ids[:, -1] if self._step else None).to(scores)
        combined = self._combine(scores, other, self._step).masked_fill(scores == -torch.inf, -torch.inf)
        self._step += 1
        return cut_scores(combined, scores, self._beta)


class SecondPass:
    """Read an answer behind another prompt, token by token, with a cache of its own.

    ``generate`` prepares the inputs, as for the answer itself, and hands over to a loop that waits for every token.

    Args:
        adapter: the model.
        encoded: B changed prompts.
        generation: settings of decoding.
    """

    def __init__(self, adapter: HfAdapter, encoded: Sequence[Encoded], generation: Generation) -> None:
        model, arguments = adapter.prepare_generate(encoded, replace(generation, do_sample=False, mitigation=None))
        self._start = lambda: model.generate(**arguments, custom_generate=_read_tokens)
        self._reader: Generator[Tensor, Tensor, None] | None = None

    def logits(self, tokens: Tensor | None) -> Tensor:
        """Return the (B, V) logits after the prompts (``tokens`` None), or after B more tokens of their answers."""
        if self._reader is None or tokens is None:
            self._reader = self._start()
            return next(self._reader)
        return self._reader.send(tokens)


def _read_tokens(model: Any, input_ids: Tensor, **inputs: Any) -> Generator[Tensor, Tensor, None]:
    """Yield logits after every token that is sent; a loop in the form of ``custom_generate`` of ``generate``."""
    for name in ("logits_processor", "stopping_criteria", "generation_config", "synced_gpus"):
        inputs.pop(name, None)
    steps = StepInputs(model, inputs)
    while True:
        output = model(**steps.prepare(input_ids), return_dict=True)
        steps.update(output)
        tokens = yield output.logits[:, -1].float()
        input_ids = torch.cat([input_ids, tokens[:, None]], -1)


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
    def change(self, prompt: Encoded) -> Encoded:
        """Return the prompt of the second pass.

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
        second = SecondPass(adapter, [self.change(prompt) for prompt in encoded], generation)
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
            return scores + self.weight * (scores - other)
        own, without = scores.log_softmax(-1), other.log_softmax(-1)
        unsure = own.max(-1, keepdim=True).values < math.log(self.alpha) if self.alpha else False
        return torch.where(torch.as_tensor(unsure), own + math.expm1(self.rate * step) * (own - without), own)

    def change(self, prompt: Encoded) -> Encoded:
        """See ``ContrastMitigation.change``."""
        return without_image(prompt)


@dataclass(frozen=True)
class NoiseContrast(ContrastMitigation):
    """Visual Contrastive Decoding (Leng et al., CVPR 2024): (1 + alpha) z - alpha z', z' with a noised image.

    Attributes:
        alpha: weight of the contrast, 0 or more.
        beta: of the plausibility cut, from 0 to 1.
        step: of the diffusion that makes the noise, from 0 to 999.
        seed: of the noise.
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
        check_range("step", self.step, 0, STEPS - 1)

    def combine(self, scores: Tensor, other: Tensor, step: int) -> Tensor:
        """Combine (B, V) logits z and z'."""
        return scores + self.alpha * (scores - other)

    def change(self, prompt: Encoded) -> Encoded:
        """Noise the image of one prompt, by itself, so that it does not depend on the batch."""
        pixels = noised(prompt.inputs["pixel_values"], self.step, self.seed)
        return replace(prompt, inputs={**prompt.inputs, "pixel_values": pixels}, cache=None)


def without_image(prompt: Encoded) -> Encoded:
    """Mask the image tokens of a prompt, which then reads as the text alone, positions included.

    Raises:
        CapabilityError: the prompt has no image tokens that could be masked.
    """
    if not prompt.spans.image:
        raise CapabilityError(
            "mitigation=no_image hides the image tokens of a prompt, and this model's prompt has none"
        )
    ids = prompt.inputs["input_ids"]
    mask = prompt.inputs.get("attention_mask", torch.ones_like(ids)).clone()
    mask[:, list(prompt.spans.image)] = 0
    return replace(prompt, inputs={**prompt.inputs, "attention_mask": mask}, cache=None)
