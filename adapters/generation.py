"""Generate answers: build the settings, sample independently of the batch, and score what is written."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

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

from stethoscope.adapters import memory
from stethoscope.adapters.answer_tokens import AnswerTokens, TrimmedIds
from stethoscope.adapters.forward import ForwardRunner, Prefix, groups, prompt_columns
from stethoscope.adapters.prefixes import SharedPrefixes
from stethoscope.core.errors import CapabilityError, ConfigError
from stethoscope.core.types import Answer, Generation
from stethoscope.tracing.answer_recorder import AnswerRecorder, RecordedAnswers
from stethoscope.tracing.growing_cache import ROOM, cache_for
from stethoscope.tracing.hooks import uses_sdpa
from stethoscope.tracing.logit_lens import lens_of
from stethoscope.tracing.model_parts import listed_modules
from stethoscope.tracing.step_inputs import RewindableProcessor
from stethoscope.tracing.trace import STREAM_REQUIREMENTS, Encoded, PromptCache

if TYPE_CHECKING:
    from stethoscope.adapters.hf import HfAdapter

_SPECIAL_TOKENS = ("bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id")
_RECORD_BYTES = 2**27  # of a record of the answers of a batch; a pass over them needs as much for its logits
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

    Args:
        kept: where the scores of all steps are kept, (batch, vocabulary) each, if they are.
    """

    def __init__(self, kept: list[Tensor] | None = None) -> None:
        self._kept = kept
        self._scores: Tensor | None = None
        self._steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._take(input_ids)
        self._scores = scores
        if self._kept is not None:
            self._kept.append(scores)
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


class SuppressTokens(LogitsProcessor):
    """Let no token of some be written.

    That of transformers searches the whole vocabulary for them at every step: 2 % of the time of a small model.

    Args:
        ids: of the tokens; those beyond the model's scores are ignored.
    """

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids = list(ids)
        self._columns: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._columns is None:
            own = [token for token in self._ids if token < scores.shape[-1]]
            self._columns = torch.tensor(own, dtype=torch.long, device=scores.device)
        return scores.index_fill(-1, self._columns, -torch.inf)


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

    def row(self, index: int) -> Sampler:
        """Return the sampler of one prompt."""
        own = copy.copy(self)
        own._generators = [self._generators[index]]
        return own

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


def _seed(seed: int, encoded: Encoded) -> int:
    digest = hashlib.sha256(str(seed).encode())
    for name in sorted(encoded.inputs):
        digest.update(encoded.inputs[name].contiguous().cpu().numpy().tobytes())
    return int.from_bytes(digest.digest()[:8], "big") >> 1


def _room(generation: Generation) -> int:
    """Return the number of answer tokens that a KV cache is made for at first."""
    return min(ROOM, generation.max_new_tokens or ROOM)


class AnswerGenerator:
    """Generate and score the answers of one loaded model.

    Args:
        forward: prepares inputs and runs passes of the model.
        tokens: reads and writes ids.
        decoder_start: first id of an encoder-decoder model's decoder; None for a decoder-only model.
        name: of the model, for messages.

    Attributes:
        prefixes: what prompts about one picture share.
    """

    def __init__(self, forward: ForwardRunner, tokens: AnswerTokens, decoder_start: int | None, name: str) -> None:
        self._model, self._forward, self._tokens = forward.model, forward, tokens
        self._decoder_start, self._name = decoder_start, name
        self.prefixes = SharedPrefixes(forward)

    def generate(
        self, adapter: HfAdapter, encoded: Sequence[Encoded], generation: Generation, return_cache: bool
    ) -> tuple[list[Answer], list[Encoded]]:
        """Answer prompts in as few batches as their inputs allow.

        Args:
            adapter: of the model, to which mitigations speak.
            encoded: the prompts.
            generation: settings of decoding.
            return_cache: also record answers and return the KV caches of the prompts.

        Returns:
            The answers, and the prompts with what generation leaves for a trace.
        """
        answers: dict[int, Answer] = {}
        prompts = dict(enumerate(encoded))
        for group in groups([prompt.inputs for prompt in encoded]):
            batch = [encoded[index] for index in group]
            generated, caches, record = self._generate_batch(adapter, batch, generation, return_cache)
            for position, (index, answer, cache) in enumerate(zip(group, generated, caches, strict=True)):
                answers[index] = answer
                if record is not None:
                    prompts[index] = replace(encoded[index], recorded=(record, position))
                if return_cache and encoded[index].cache is None:
                    prompts[index] = replace(prompts[index], cache=cache)
        return [answers[index] for index in range(len(encoded))], list(prompts.values())

    def _generate_batch(
        self, adapter: HfAdapter, encoded: list[Encoded], generation: Generation, return_cache: bool
    ) -> tuple[list[Answer], list[PromptCache | None], RecordedAnswers | None]:
        """Answer prompts of one of ``forward.groups`` in one batch.

        Args:
            adapter: of the model, to which mitigations speak.
            encoded: B prompts.
            generation: settings of decoding.
            return_cache: also return the KV caches of the prompts.

        Returns:
            B answers; B caches, None where there is none, or the prompt has one already for all of them; and with the
            caches a record of the answers, where the prompts plan one and it fits.
        """
        no_caches: list[PromptCache | None] = [None] * len(encoded)
        if generation.num_beams > 1:  # the cache then belongs to beams, not to prompts
            arguments = self.arguments(adapter, encoded, generation)
            start = arguments["input_ids"].shape[1] if self._decoder_start is None else 1
            beams = self._model.generate(**arguments).sequences[:, start:].tolist()
            scored = self.score(encoded, [self._tokens.trim(beam, generation.stop) for beam in beams])
            return [replace(answer, argmax=None) for answer in scored], no_caches, None
        prefixes = self.prefixes.compute(encoded)
        lengths = None if prefixes is None else [prefix.length for prefix in prefixes]
        columns = prompt_columns(encoded, lengths)
        # what can be recorded reads no image tokens
        captures = return_cache and prefixes is None and self._forward.causal and encoded[0].planned is None
        known = None if prefixes is None else [prefix.cache.embeds for prefix in prefixes]
        recorder = self._recorder(encoded, generation) if return_cache else None
        arguments = self.arguments(adapter, encoded, generation, prefixes)
        if prefixes is None and self._decoder_start is None:
            arguments["past_key_values"] = cache_for(self._model, arguments["input_ids"], _room(generation))
        logprobs = TokenLogprobs(None if recorder is None else recorder.scores)
        del prefixes  # the copies in the arguments are all that generation needs
        arguments["logits_processor"].insert(0, logprobs)
        start = arguments["input_ids"].shape[1] if self._decoder_start is None else 1
        with (
            nullcontext() if not return_cache else listed_modules(self._model),
            nullcontext() if recorder is None else recorder.recorded(self._model),
            self._forward.captured_embeds(encoded, [parts[-1].start for parts in columns])
            if captures
            else nullcontext(known) as embeds,
        ):
            output = self._model.generate(**arguments)
        ids, values = output.sequences[:, start:].tolist(), logprobs.finish(output.sequences).tolist()
        answers = [self._tokens.read(*pair, generation.stop) for pair in zip(ids, values, strict=True)]
        self.prefixes.store(encoded, lengths, output.past_key_values, embeds[-1] if embeds else None)
        record = None
        if recorder is not None:
            keys = [layer.keys for layer in output.past_key_values.layers]
            record = RecordedAnswers([part.token_ids for part in answers], columns, keys, recorder)
        if not return_cache or all(prompt.cache is not None for prompt in encoded):
            return answers, no_caches, record
        return answers, self._forward.prompt_caches(output.past_key_values, encoded, columns, embeds), record

    def _recorder(self, encoded: Sequence[Encoded], generation: Generation) -> AnswerRecorder | None:
        """Return a recorder of what the prompts plan, where it changes no answer and its record fits into memory."""
        [planned, *others] = {prompt.planned for prompt in encoded}
        if planned is None or others:
            return None
        if generation.mitigation is not None or not uses_sdpa(self._model):
            return None
        tokens = len(encoded) * (generation.max_new_tokens or 0)
        if tokens * memory.step_bytes(self._model) > _RECORD_BYTES:
            return None
        return AnswerRecorder(planned, lens_of(self._model) if planned & STREAM_REQUIREMENTS else None)

    def arguments(
        self,
        adapter: HfAdapter,
        encoded: Sequence[Encoded],
        generation: Generation,
        prefixes: Sequence[Prefix] | None = None,
    ) -> dict[str, Any]:
        """Prepare the arguments of the model's ``generate``.

        Args:
            adapter: of the model, to which mitigations speak.
            encoded: B prompts.
            generation: settings of decoding.
            prefixes: of the prompts, from which ``generate`` goes on; None to read whole prompts.
        """
        decoder_only = self._decoder_start is None
        if prefixes is None:
            inputs = self._forward.collate(encoded, "left" if decoder_only else "right")
        else:
            inputs = self._forward.generate_from_prefixes(encoded, prefixes, _room(generation))
        stops, start = self._tokens.all_stops(generation.stop), inputs["input_ids"].shape[1] if decoder_only else 1
        method = generation.mitigation
        if method is not None and method.writes:
            check_rewinds(self._model.config, method.name, self._name, start + (generation.max_new_tokens or 0))
        processors = [] if method is None else method.processors(adapter, encoded, generation)
        settings = self.config(generation)
        if settings.suppress_tokens:  # by a processor of ours, so that one before it sees the model's own scores
            processors = [SuppressTokens(settings.suppress_tokens), *processors]
            settings.suppress_tokens = None
        return {
            **inputs,
            "generation_config": settings,
            "logits_processor": [*processors, *([Sampler(generation, encoded)] if generation.do_sample else [])],
            "stopping_criteria": [StopStrings(stops, self._tokens.decode, start)] if stops else [],
        }

    def config(self, generation: Generation) -> GenerationConfig:
        """Build the settings of ``generate``, see ``build_config``; no placeholder is written."""
        settings = build_config(generation, self._tokens.end_ids, self._tokens.pad_id)
        settings.decoder_start_token_id = self._decoder_start
        settings.suppress_tokens = self._tokens.placeholder_ids or None
        return settings

    def score(self, encoded: Sequence[Encoded], trimmed: Sequence[TrimmedIds]) -> list[Answer]:
        """Compute log-probabilities and first choices of given answers in teacher-forced passes, one per answer."""
        answers = []
        for prompt, part in zip(encoded, trimmed, strict=True):
            logits = self._forward.logits(self._forward.full_forward([prompt], [part.ids]))[0, : len(part.ids)]
            ids = torch.tensor(part.ids, device=logits.device).long()[:, None]
            logprobs = logits.log_softmax(-1).gather(-1, ids)[:, 0].tolist()
            never_written = [token for token in self._tokens.placeholder_ids if token < logits.shape[-1]]
            logits[:, never_written] = -torch.inf
            is_top = logits.gather(-1, ids) >= logits.amax(-1, keepdim=True)  # of several equal ones, each
            answers.append(replace(self._tokens.answer(part, logprobs), argmax=tuple(is_top[:, 0].tolist())))
        return answers
