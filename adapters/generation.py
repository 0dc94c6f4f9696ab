"""Build settings for ``generate``, sample independently of the batch, and trim generated ids to the answer."""

from __future__ import annotations

import copy
import hashlib
import reprlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicSlidingWindowLayer

from stethoscope.core.errors import CapabilityError, ConfigError, DataError
from stethoscope.core.types import Generation
from stethoscope.tracing.step_inputs import RewindableProcessor
from stethoscope.tracing.token_spans import decode_with_offsets
from stethoscope.tracing.trace import Encoded

_SPECIAL_TOKENS = ("bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id")
_OUTPUTS = ("return_dict_in_generate", "transformers_version")


def drop_defaults(model: PreTrainedModel) -> None:
    """Clear the model's own generation settings, all but the ids of special tokens.

    ``generate`` fills every setting that is None from the repository's ``generation_config.json``. A new configuration
    also clears fields that later versions of transformers may add, which a list of names would miss.
    """
    for module in _modules_that_generate(model):
        special = {name: getattr(module.generation_config, name) for name in _SPECIAL_TOKENS}
        module.generation_config = GenerationConfig(**special)


def effective_settings(model: PreTrainedModel, settings: GenerationConfig) -> dict[str, Any]:
    """List the settings that ``generate`` applies: those given, filled with the model's where they are None.

    Args:
        model: whose generation settings fill the gaps.
        settings: of one call; not changed.

    Returns:
        By name, the settings that are not None and change what is generated.
    """
    filled = copy.deepcopy(settings)
    for module in _modules_that_generate(model):
        filled.update(**module.generation_config.to_dict(), defaults_only=True, allow_custom_entries=True)
    return {
        name: value
        for name, value in filled.to_dict().items()
        if value is not None and name not in _OUTPUTS and not name.startswith("_")
    }


def _modules_that_generate(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Iterate over modules with generation settings: the model, and in BLIP-2 the language model inside it."""
    return (
        module for module in model.modules() if isinstance(getattr(module, "generation_config", None), GenerationConfig)
    )


def special_ids(model: PreTrainedModel, tokenizer: Any) -> tuple[tuple[int, ...], int]:
    """Collect the ids that end an answer, from model and tokenizer, and the id to pad with.

    Raises:
        DataError: the model's ``generation_config.json`` names an end that is no token id.
    """
    end_ids: set[int] = set()
    for part in (model, getattr(model, "language_model", None)):  # in BLIP-2 the language model generates by itself
        setting = getattr(getattr(part, "generation_config", None), "eos_token_id", None)
        ids = setting if isinstance(setting, (list, tuple)) else [] if setting is None else [setting]
        if not all(isinstance(token, int) and token >= 0 for token in ids):
            raise DataError(
                f"eos_token_id={reprlib.repr(setting)} in the model's generation_config.json should be a token's id "
                "or a list of them"
            )
        end_ids.update(ids)
    if tokenizer.eos_token_id is not None:
        end_ids.add(tokenizer.eos_token_id)
    pad_id = tokenizer.pad_token_id
    return tuple(sorted(end_ids)), pad_id if pad_id is not None else min(end_ids, default=0)


def continuation_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokenise a text that begins with a blank as the continuation of an answer.

    Tokenizers that add a blank of their own to the start of every text would double it, so it follows a sentence.
    """
    before = "A cat."
    start, whole = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, before + text))
    return list(whole[len(start) :]) if whole[: len(start)] == start else list(tokenizer(text.strip())["input_ids"])


def decoder_start_id(model: PreTrainedModel) -> int | None:
    """Return the id that an encoder-decoder language model's decoder begins with; None without an encoder."""
    text = model.config.get_text_config()
    if not (model.config.is_encoder_decoder or text.is_encoder_decoder):
        return None
    start = getattr(text, "decoder_start_token_id", None)
    return text.pad_token_id if start is None else start


def build_config(generation: Generation, end_ids: Sequence[int], pad_id: int) -> GenerationConfig:
    """Build the settings for transformers, to be used after ``drop_defaults``.

    Sampling is done by ``Sampler``, so transformers always takes the highest score.

    Raises:
        ConfigError: ``max_new_tokens`` is not given.
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
        eos_token_id=list(end_ids) or None,
        pad_token_id=pad_id,
        use_cache=True,
        return_dict_in_generate=True,
    )


class TokenLogprobs(LogitsProcessor):
    """Take the log-probability of every token as it is written: the first processor, which sees the model's own scores.

    ``generate`` would keep the scores of all steps: 17 GB for 32 answers of 512 tokens and a vocabulary of 262,144.
    """

    def __init__(self) -> None:
        self._scores: Tensor | None = None
        self._steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._take(input_ids)
        self._scores = scores
        return scores

    def finish(self, sequences: Tensor) -> Tensor:
        """Return the log-probabilities, (batch, new tokens) in nats, of finished sequences, (batch, tokens)."""
        self._take(sequences)
        self._scores = None
        return torch.stack(self._steps, 1)

    def _take(self, ids: Tensor) -> None:
        """Take the log-probabilities of the newest tokens from the scores that they were chosen by."""
        if self._scores is not None:
            self._steps.append(self._scores.log_softmax(-1).gather(-1, ids[:, -1:])[:, 0])


def check_rewinds(config: PreTrainedConfig, mitigation: str, model: str, length: int) -> None:
    """Check that text can be taken back: the cache must keep a state of its own for every token.

    Args:
        config: of the model.
        mitigation: its name, for messages.
        model: its name, for messages.
        length: of prompt and answer at most, in tokens.

    Raises:
        CapabilityError: layers keep a running state, or a window that is shorter.
    """
    for layer in DynamicCache(config=config).layers:
        if isinstance(layer, DynamicSlidingWindowLayer) and layer.sliding_window <= length:
            raise CapabilityError(
                f"mitigation={mitigation} takes text back, but layers of {model} keep the last {layer.sliding_window} "
                f"tokens only, and prompt and answer may have {length}; lower generation.max_new_tokens"
            )
        if not layer.is_croppable:
            raise CapabilityError(
                f"mitigation={mitigation} takes text back, but layers of {model} keep a running state "
                f"({type(layer).__name__}) from which no token can be taken"
            )


class Sampler(RewindableProcessor):
    """Sample by the Gumbel-max trick: the highest of log-probabilities plus Gumbel noise is a sample.

    Every prompt has its own random generator, seeded by the seed and the prompt, so an answer does not depend on the
    batch, the order, the device or earlier draws.
    """

    def __init__(self, generation: Generation, encoded: Sequence[Encoded]) -> None:
        self._warpers = [TemperatureLogitsWarper(float(generation.temperature))]
        if generation.top_p < 1:
            self._warpers.append(TopPLogitsWarper(float(generation.top_p)))
        self._generators = [torch.Generator().manual_seed(_seed(generation.seed, prompt)) for prompt in encoded]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for warper in self._warpers:
            scores = warper(input_ids, scores)
        vocab_size = scores.shape[-1]
        uniform = torch.stack(
            [torch.rand(vocab_size, generator=generator, dtype=torch.float64) for generator in self._generators]
        )
        return scores - (-uniform.clamp_min(1e-300).log()).log().to(scores)

    def state(self) -> list[Tensor]:
        """Return the states of the random generators."""
        return [generator.get_state() for generator in self._generators]

    def restore(self, state: list[Tensor]) -> None:
        """Go back to states of the random generators."""
        for generator, own in zip(self._generators, state, strict=True):
            generator.set_state(own)


class StopStrings(StoppingCriteria):
    """End generation of a prompt, or a beam, once its answer holds a stop string.

    Args:
        stops: the strings.
        decode: decodes a list of ids as a whole.
        start: length of the prompt in the sequences that ``generate`` works on.
    """

    def __init__(self, stops: Sequence[str], decode: Callable[[Sequence[int]], str], start: int) -> None:
        self._stops, self._decode, self._start = tuple(stops), decode, start

    def __call__(self, input_ids: Tensor, scores: Tensor, **more: object) -> Tensor:
        texts = [self._decode(ids).lstrip() for ids in input_ids[:, self._start :].tolist()]
        return torch.tensor([any(stop in text for stop in self._stops) for text in texts], device=input_ids.device)


class TrimmedIds(NamedTuple):
    """Hold the part of the generated ids that is the answer.

    Attributes:
        ids: the leading generated ids, unchanged.
        finished: the answer ended by itself, before ``max_new_tokens``.
        surplus: number of characters at the end of the last token that belong to a stop string, not to the answer.
    """

    ids: list[int]
    finished: bool
    surplus: int = 0


def trim_ids(
    ids: Sequence[int],
    end_ids: Collection[int],
    stops: Sequence[str] = (),
    decode: Callable[[Sequence[int]], str] = lambda ids: "",
) -> TrimmedIds:
    """Trim generated ids to those before the first end token and before the first stop string.

    Args:
        ids: generated token ids.
        end_ids: ids that end an answer.
        stops: strings that end an answer.
        decode: decodes a list of ids as a whole, special tokens too.

    >>> trim_ids([5, 6, 2, 0], end_ids=(2,))
    TrimmedIds(ids=[5, 6], finished=True, surplus=0)
    >>> tokens = {1: "yes", 2: ".#", 3: "##", 4: " Human"}
    >>> trim_ids([1, 2, 3, 4], (), ("###",), lambda ids: "".join(tokens[i] for i in ids))
    TrimmedIds(ids=[1, 2], finished=True, surplus=1)
    """
    ids = list(ids)
    end = next((position for position, token in enumerate(ids) if token in end_ids), None)
    ids = ids[:end]
    if stops:
        text, offsets = decode_with_offsets(ids, decode)
        stop_start = min((text.index(stop) for stop in stops if stop in text), default=None)
        if stop_start is not None:
            count = sum(start < stop_start for start, _ in offsets)
            return TrimmedIds(ids[:count], True, max(offsets[count - 1][1] - stop_start, 0) if count else 0)
    return TrimmedIds(ids, end is not None)


def _seed(seed: int, encoded: Encoded) -> int:
    digest = hashlib.sha256(str(seed).encode())
    for name in sorted(encoded.inputs):
        digest.update(encoded.inputs[name].contiguous().cpu().numpy().tobytes())
    return int.from_bytes(digest.digest()[:8], "big") >> 1
