"""What ``generate`` is told, and sampling that does not depend on the batch that a prompt is in."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper

from stethoscope.errors import ConfigError
from stethoscope.records import Generation
from stethoscope.trace import Encoded


def check(generation: Generation) -> None:
    """Raises ConfigError for values out of range and for settings that exclude each other."""
    for right, field, wanted in (
        (generation.max_new_tokens >= 1, "max_new_tokens", "at least 1"),
        (generation.temperature > 0, "temperature", "above 0; for the most probable token set do_sample=false"),
        (0 < generation.top_p <= 1, "top_p", "above 0 and at most 1"),
        (generation.num_beams >= 1, "num_beams", "at least 1"),
    ):
        if not right:
            raise ConfigError(f"generation.{field}={getattr(generation, field)} must be {wanted}")
    if generation.do_sample and generation.num_beams > 1:
        raise ConfigError(f"generation.do_sample=true and num_beams={generation.num_beams} exclude each other")


def config(generation: Generation, ends: Sequence[int], pad_id: int) -> GenerationConfig:
    """Settings for transformers that leave nothing to the defaults that a model repository may carry.

    Sampling is done by ``Sampler``, so transformers always takes the highest score.
    """
    return GenerationConfig(
        max_new_tokens=generation.max_new_tokens,
        num_beams=generation.num_beams,
        do_sample=False,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        length_penalty=1.0,
        no_repeat_ngram_size=0,
        min_length=0,
        eos_token_id=list(ends) or None,
        pad_token_id=pad_id,
        use_cache=True,
        return_dict_in_generate=True,
        output_logits=generation.num_beams == 1,
    )


class Sampler(LogitsProcessor):
    """Draws by the Gumbel-max trick: the highest of log-probabilities plus Gumbel noise is a sample.

    Every prompt has its own generator, seeded by the seed and the prompt, so an answer depends on nothing else: not
    on the batch, the order, the device or what was drawn before.
    """

    def __init__(self, generation: Generation, encoded: Sequence[Encoded]) -> None:
        self._warpers = [TemperatureLogitsWarper(float(generation.temperature))]
        if generation.top_p < 1:
            self._warpers.append(TopPLogitsWarper(float(generation.top_p)))
        self._generators = [torch.Generator().manual_seed(_seed(generation.seed, one)) for one in encoded]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for warper in self._warpers:
            scores = warper(input_ids, scores)
        words = scores.shape[-1]
        uniform = torch.stack([torch.rand(words, generator=one, dtype=torch.float64) for one in self._generators])
        return scores - (-uniform.clamp_min(1e-300).log()).log().to(scores)


def _seed(seed: int, encoded: Encoded) -> int:
    digest = hashlib.sha256(str(seed).encode())
    for name in sorted(encoded.inputs):
        digest.update(encoded.inputs[name].contiguous().cpu().numpy().tobytes())
    return int.from_bytes(digest.digest()[:8], "big") >> 1
