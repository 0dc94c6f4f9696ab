"""Settings of ``generate``, and sampling that does not depend on the batch that a prompt is in."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    PreTrainedModel,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from stethoscope.core.errors import ConfigError
from stethoscope.core.offsets import decode_with_offsets
from stethoscope.core.types import Generation
from stethoscope.tracing.trace import Encoded

_SPECIAL_TOKENS = ("bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id")
_OUTPUTS = ("output_logits", "return_dict_in_generate", "transformers_version")


def drop_defaults(model: PreTrainedModel) -> None:
    """Clear the model's own generation settings, all but the ids of special tokens.

    ``generate`` fills every setting that is None with the one of the repository's ``generation_config.json``; no list
    of fields could name those that later versions of transformers add.
    """
    for module in _generating(model):
        kept = {name: getattr(module.generation_config, name) for name in _SPECIAL_TOKENS}
        module.generation_config = GenerationConfig(**kept)


def effective(model: PreTrainedModel, settings: GenerationConfig) -> dict[str, Any]:
    """List the settings that ``generate`` applies: those given, filled with the model's where they are None.

    Args:
        settings: of one call; left as it is.

    Returns:
        By name, those that are not None and change what is generated.
    """
    filled = copy.deepcopy(settings)
    for module in _generating(model):
        filled.update(**module.generation_config.to_dict(), defaults_only=True, allow_custom_entries=True)
    return {
        name: value
        for name, value in filled.to_dict().items()
        if value is not None and name not in _OUTPUTS and not name.startswith("_")
    }


def _generating(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Modules with generation settings: the model, and in BLIP-2 the language model inside it."""
    return (m for m in model.modules() if isinstance(getattr(m, "generation_config", None), GenerationConfig))


def config(generation: Generation, ends: Sequence[int], pad_id: int) -> GenerationConfig:
    """Build the settings for transformers; of the model's own, ``drop_defaults`` leaves nothing to fill them with.

    Sampling is done by ``Sampler``, so transformers always takes the highest score.

    Raises:
        ConfigError: there is no longest answer.
    """
    if generation.max_new_tokens is None:
        raise ConfigError("generation.max_new_tokens must be given: the longest answer, in tokens")
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


class Stop(StoppingCriteria):
    """Ends generation of a prompt, or a beam, once its answer holds a stop string.

    Args:
        stops: the strings.
        decode: decodes a list of ids as a whole.
        start: length of the prompt in the sequences that ``generate`` works on.
    """

    def __init__(self, stops: Sequence[str], decode: Callable[[Sequence[int]], str], start: int) -> None:
        self._stops, self._decode, self._start = tuple(stops), decode, start

    def __call__(self, input_ids: Tensor, scores: Tensor, **more: object) -> Tensor:
        found = [
            _first(self._decode(ids).lstrip(), self._stops) is not None for ids in input_ids[:, self._start :].tolist()
        ]
        return torch.tensor(found, device=input_ids.device)


class Cut(NamedTuple):
    """What of the generated ids is the answer.

    Attributes:
        ids: the first of the generated ids, as they came.
        finished: the answer ended by itself, before ``max_new_tokens``.
        surplus: so many characters at the end of the last token belong to a stop string, not to the answer.
    """

    ids: list[int]
    finished: bool
    surplus: int = 0


def cut(
    ids: Sequence[int],
    ends: Collection[int],
    stops: Sequence[str] = (),
    decode: Callable[[Sequence[int]], str] = lambda ids: "",
) -> Cut:
    """The answer within generated ids: what stands before the first id that ends it, and before the first stop string.

    Args:
        ends: ids that end an answer.
        decode: decodes a list of ids as a whole, special tokens too.

    >>> cut([5, 6, 2, 0], ends=(2,))
    Cut(ids=[5, 6], finished=True, surplus=0)
    >>> words = {1: "yes", 2: ".#", 3: "##", 4: " Human"}
    >>> cut([1, 2, 3, 4], (), ("###",), lambda ids: "".join(words[i] for i in ids))
    Cut(ids=[1, 2], finished=True, surplus=1)
    """
    ids = list(ids)
    end = next((position for position, token in enumerate(ids) if token in ends), None)
    ids = ids[:end]
    if stops:
        text, offsets = decode_with_offsets(ids, decode)
        at = _first(text, stops)
        if at is not None:
            kept = sum(start < at for start, _ in offsets)
            return Cut(ids[:kept], True, max(offsets[kept - 1][1] - at, 0) if kept else 0)
    return Cut(ids, end is not None)


def _first(text: str, stops: Sequence[str]) -> int | None:
    """Where the first stop string starts."""
    return min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)


def _seed(seed: int, encoded: Encoded) -> int:
    digest = hashlib.sha256(str(seed).encode())
    for name in sorted(encoded.inputs):
        digest.update(encoded.inputs[name].contiguous().cpu().numpy().tobytes())
    return int.from_bytes(digest.digest()[:8], "big") >> 1
