"""Adapt any image-text-to-text model of transformers to the ``Adapter`` contract."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor

from stethoscope.adapters import fingerprint as digests
from stethoscope.adapters import loading, memory, tiny
from stethoscope.adapters.answer_tokens import AnswerTokens, TrimmedIds, continuation_ids
from stethoscope.adapters.base import Adapter, History, check_turns
from stethoscope.adapters.forward import ForwardRunner, continues, groups
from stethoscope.adapters.generation import (
    AnswerGenerator,
    check_rewinds,
    decoder_start_id,
    drop_defaults,
    effective_settings,
)
from stethoscope.adapters.load_settings import Loading, check_device
from stethoscope.adapters.loading import model_name
from stethoscope.adapters.prompts import SYSTEMS, PromptEncoder, check_chat_template, check_follow_up, check_prompt
from stethoscope.adapters.question_encoder import QuestionEncoder, check_phrases, limit_pixels
from stethoscope.adapters.tracer import Tracer
from stethoscope.core.errors import (
    CapabilityError,
    CaptureError,
    ConfigError,
    DataError,
    check_list,
    unknown,
    wrong_type,
)
from stethoscope.core.system import ModelFaults
from stethoscope.core.types import Answer, Generation, Memory, Picture, with_limit
from stethoscope.tracing.trace import (
    CONTINUATION,
    EXTRA_REQUIREMENTS,
    FORWARD_REQUIREMENTS,
    REQUIREMENTS,
    Encoded,
    Trace,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin


class HfAdapter(Adapter):
    """Adapt a model folder or hub id that ``AutoModelForImageTextToText`` loads.

    Args:
        model_id: folder or hub id; may be missing only with ``random_init``.
        revision: branch, tag or commit of a hub model.
        name: name of the model in tables; the last part of ``model_id`` by default.
        prompt: the model's own prompt with ``{question}`` and its image placeholder (or ``{image}``); None for the
            processor's chat template.
        system: system text before the prompt, or the system turn of the chat template: a name in ``prompts.SYSTEMS``
            or a text; None for none.
        follow_up: with a ``prompt``, what comes behind its answer, with the next ``{question}``, as
            ``</s>USER: {question} ASSISTANT:``; None for one question at a time. A chat template writes its own turns.
        phrases: by what a task asks for (``question_encoder.ASKS``), the text in place of ``{question}``, which may be
            part of it: ``{"question": "answer en {question}", "description": "caption en"}``; None for the question.
        pad: pad pictures to a square with the mean colour of the image processor, before it sees them.
        max_pixels: most pixels to which the image processor may scale a picture, see
            ``question_encoder.limit_pixels``; None for the model's own limit.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto`` for that of the checkpoint.
        device: ``auto`` takes a GPU when there is one; else a torch device.
        loading: ``device_map``, ``max_memory``, ``offload_folder``, ``quantize``, ``attention``, ``local_files_only``,
            ``trust_remote_code``: see ``load_settings.Loading``.
        threads: CPU threads of torch, set for the whole process when the model loads; None does not set them.
        random_init: ``tiny`` builds a tiny random model of the same classes, without files or network.
        family: transformers' ``model_type``; used with ``random_init`` only.

    Attributes:
        report: how files and model fit together, once loaded; None where transformers reads them.
        stop: strings that end an answer of this family, besides those of ``Generation.stop``.

    Raises:
        ConfigError: a setting is wrong.
    """

    mitigates: ClassVar[bool] = True
    stop: tuple[str, ...] = ()
    report: loading.LoadReport | None = None

    def __init__(
        self,
        model_id: str | None = None,
        *,
        revision: str | None = None,
        name: str | None = None,
        prompt: str | None = None,
        system: str | None = None,
        follow_up: str | None = None,
        phrases: Mapping[str, str] | None = None,
        pad: bool = False,
        max_pixels: int | None = None,
        dtype: str = "auto",
        device: str = "auto",
        threads: int | None = None,
        random_init: str | None = None,
        family: str = "llava",
        **loading: Any,
    ) -> None:
        if random_init not in (None, "tiny"):
            raise ConfigError(unknown("random_init", str(random_init), ["tiny", "null"]))
        if not model_id and random_init is None:
            raise ConfigError("model.model_id is missing; give a folder or a hub id, e.g. llava-hf/llava-1.5-7b-hf")
        self.loading = Loading(dtype=dtype, revision=revision, **loading)
        if self.loading.device_map is not None and device != "auto":
            raise ConfigError(
                f"device={device} and device_map={self.loading.device_map} exclude each other; leave device at auto"
            )
        if threads is not None and (type(threads) is not int or threads < 1):
            raise ConfigError(f"model.threads={threads!r} should be at least 1, or null to leave it to torch")
        if not isinstance(system, (str, type(None))):
            raise ConfigError(f"model.system={system!r} should be a text, {', '.join(SYSTEMS)} or null")
        if max_pixels is not None and (type(max_pixels) is not int or max_pixels < 1):
            raise ConfigError(f"model.max_pixels={max_pixels!r} should be a number of pixels, at least 1, or null")
        if not isinstance(pad, bool):
            raise ConfigError(f"model.pad={pad!r} should be true or false")
        self.system = SYSTEMS.get(system or "", system or "")
        if prompt is not None and self.system:
            prompt = f"{self.system} {prompt}"
        check_prompt(prompt)
        check_follow_up(prompt, follow_up)
        self.follow_up = follow_up
        self.phrases, self.pad, self.max_pixels = check_phrases(phrases), pad, max_pixels
        self.square = "pad" if pad else "none"
        self.name = name or (model_name(model_id) if model_id else f"tiny-{family}")
        self.model_id, self.prompt, self.device = model_id, prompt, device
        self.threads, self.random_init, self.family = threads, random_init, family
        self._model: PreTrainedModel | None = None
        self._digest: str | None = None
        self._loaded_versions: tuple[int, ...] | None = None  # of the weights as loaded

    def setup(self) -> None:
        """Load weights and processor; do nothing the second time.

        Raises:
            ConfigError, CapabilityError, DataError: see ``loading.load``; one line each.
        """
        if self._model is not None:
            return
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        self.loading.check_machine()
        device = self.loading.default_device() if self.device == "auto" else self.device
        check_device(device)
        from_files = not self.random_init and type(self)._load is HfAdapter._load
        if self.loading.device_map is None and (self.loading.quantize or (from_files and device != "cpu")):
            # quantised weights cannot be moved afterwards; others would first take their size of host memory
            self.loading = replace(self.loading, device_map={"": device})
        model, processor = self._seeded_tiny() if self.random_init else self._load()
        if self.random_init and self.loading.dtype != "auto":
            model = model.to(getattr(torch, self.loading.dtype))
        if self.random_init and self.loading.device_map is not None:
            model = loading.dispatch_model(model, self.loading)
        if self.loading.device_map is None:
            model = model.to(device)
        with ModelFaults(f"the processor of {self.name} does not work with its model", CapabilityError):
            if self.max_pixels is not None:
                limit_pixels(model, processor, self.max_pixels, self.name)
            encoder = self._make_encoder(model, processor)
            questions = QuestionEncoder(self.name, model, processor, encoder, self.phrases, self.square)
            start = decoder_start_id(model)
            self._tokens = AnswerTokens(self.name, model, processor.tokenizer, self.stop, start is None)
        self._questions, self._processor = questions, processor
        self._model = model.eval().requires_grad_(False)
        self._loaded_versions = digests.versions(model)
        drop_defaults(model)
        self._forward = ForwardRunner(model, self._tokens.pad_id, start)
        self._generator = AnswerGenerator(self._forward, self._tokens, start, self.name)
        suffix = continuation_ids(processor.tokenizer, CONTINUATION)
        self._tracer = Tracer(self.name, self._forward, suffix, self._tokens.placeholder_ids)

    @property
    def _source(self) -> str:
        """Return the folder or hub id of a model that is not random."""
        return cast("str", self.model_id)  # the constructor refuses None without random_init

    def _load(self) -> tuple[PreTrainedModel, ProcessorMixin]:
        """Load model and processor from their files; families that transformers lacks override this."""
        check = {} if self.prompt is not None else {"check": check_chat_template}
        return loading.load(self._source, self.loading, **check)

    def memory(self, context: int, batch_size: int = 1, new_tokens: int = 512) -> Memory:
        """See ``Adapter.memory``.

        Raises:
            ConfigError, CapabilityError: there is no configuration to read, as in ``loading.load``.
        """
        return memory.estimate(self._meta_model, self.loading, context, batch_size, new_tokens)

    def can_share_prefixes(self) -> bool:
        """See ``Adapter.can_share_prefixes``; the models of ``trace.CAUSAL`` can."""
        return continues(self._meta_model if self._model is None else self._model)

    @cached_property
    def _meta_model(self) -> PreTrainedModel:
        """Build the model without weights once for all that is asked of its configuration."""
        return self._skeleton()

    def _skeleton(self) -> PreTrainedModel:
        """Build the model on the meta device, to count parameters; families that transformers lacks override this."""
        if not self.random_init:
            if type(self)._load is not HfAdapter._load:
                raise CapabilityError(f"{self.name}: its adapter loads its own files and does not know their sizes")
            return memory.skeleton(self._source, self.loading)
        model = self._seeded_tiny()[0]
        return model if self.loading.dtype == "auto" else model.to(getattr(torch, self.loading.dtype))

    def _seeded_tiny(self) -> tuple[PreTrainedModel, ProcessorMixin]:
        """Build the tiny random model with the same weights every time, whatever ``_tiny`` draws and how."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self._tiny()

    def _tiny(self) -> tuple[PreTrainedModel, ProcessorMixin]:
        """Build a tiny random model of the same classes, and its processor."""
        return tiny.build(self.family)

    def _make_encoder(self, model: PreTrainedModel, processor: ProcessorMixin) -> Callable[..., Encoded]:
        """Build the encoder that ``encode`` calls with image, question and, where there is one, a history."""
        return PromptEncoder(model, processor, self.prompt, self.system, self.follow_up)

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model, loaded."""
        self.setup()
        return self._model

    @property
    def processor(self) -> ProcessorMixin:
        """The transformers processor, loaded."""
        self.setup()
        return self._processor

    def encode(self, image: Picture, question: str, history: History = ()) -> Encoded:
        """See ``Adapter.encode``.

        Raises:
            ConfigError: the question is no text, or the history is no list of pairs of texts.
            CapabilityError: there is a history, and the prompt is for one question alone.
            DataError: the picture cannot be read, the processor refuses it or fails, a text holds the image
                placeholder, or the prompt fills the model's context, so that generating would take minutes or fail.
                Models with relative positions (T5) have no such limit.
        """
        self.setup()
        return self._encode("question", image, question, history)

    def encode_as(self, asks: str, image: Picture, question: str, history: History = ()) -> Encoded:
        """See ``Adapter.encode_as``; errors are those of ``encode``."""
        self.setup()
        if asks == "question":
            return super().encode_as(asks, image, question, history)
        return self._encode(asks, image, question, history)

    def _encode(self, asks: str, image: Picture, question: str, history: History) -> Encoded:
        turns = check_turns(question, history)
        if turns:
            self.check_conversation()
        return self._questions(asks, image, question, turns)

    def check_conversation(self) -> None:
        """See ``Adapter.check_conversation``; chat templates write earlier turns, and so does ``follow_up``."""
        self.setup()
        if not self._questions.has_turns:
            why = "its chat template writes no earlier turns"
            if self.prompt is not None:
                why = f"its prompt {self.prompt!r} has no second turn, which model.follow_up would write"
            raise CapabilityError(f"{self.name} is asked one question at a time: {why}")

    def with_square(self, square: str) -> HfAdapter:
        """See ``Adapter.with_square``; weights and processor are shared."""
        self.setup()
        other = copy(self)
        other._questions = self._questions.with_square(square)
        other.square, other.pad = square, square == "pad"
        return other

    def check_mitigation(self, generation: Generation) -> None:
        """See ``Adapter.check_mitigation``; text can be taken back where a model keeps every token's state.

        Raises:
            ConfigError, CapabilityError: see there; or there is no configuration to read, as in ``loading.load``.
        """
        super().check_mitigation(generation)
        method = generation.mitigation
        if method is None or not method.writes or self.random_init or type(self)._load is not HfAdapter._load:
            return
        config = memory.read_config(self._source, self.loading) if self._model is None else self._model.config
        check_rewinds(config, method.name, self.name, generation.max_new_tokens or 1)

    def generate(self, encoded: Sequence[Encoded], generation: Generation | None = None) -> list[Answer]:
        """See ``Adapter.generate``. All prompts run as one batch where their inputs allow it.

        What several prompts about one picture begin with is read once, see ``prefixes.SharedPrefixes``; where all have
        KV caches, only their last tokens are read.

        Raises:
            ConfigError: the first argument is no list of prompts, or the second no ``Generation``.
        """
        check_list("the first argument of generate", "a list of prompts, [prompt]", encoded, Sequence)
        for prompt in encoded:
            if not isinstance(prompt, Encoded):
                raise wrong_type("each prompt of generate", "one as encode returns it", prompt)
        generation = with_limit(generation)
        return self._answers(encoded, generation, return_cache=False)[0]

    def batches(self, encoded: Sequence[Encoded]) -> list[list[int]]:
        """List the indices of prompts that can share a batch: with the same inputs, and pictures of as many tiles."""
        return groups([prompt.inputs for prompt in encoded])

    def generate_with_cache(
        self, encoded: Sequence[Encoded], generation: Generation
    ) -> tuple[list[Answer], list[Encoded]]:
        """See ``Adapter.generate_with_cache``; the models in ``trace.CAUSAL`` return KV caches."""
        return self._answers(encoded, generation, return_cache=True)

    def prefill(self, encoded: Sequence[Encoded], requires: Collection[str] = ("relevancy",)) -> list[Encoded]:
        """See ``Adapter.prefill``; the models in ``trace.CAUSAL`` go on from such passes."""
        self.setup()
        with ModelFaults(f"{self.name} fails to read the prompt"):
            return self._tracer.prefill.run(encoded, requires)

    @contextmanager
    def sharing_prefixes(self) -> Iterator[None]:
        """See ``Adapter.sharing_prefixes``; the memory of one prompt's KV cache stays taken between calls."""
        self.setup()
        with self._generator.prefixes.stored():
            yield

    @torch.inference_mode()
    def _answers(
        self, encoded: Sequence[Encoded], generation: Generation, return_cache: bool
    ) -> tuple[list[Answer], list[Encoded]]:
        self.setup()
        if (method := generation.mitigation) is not None and method.writes:
            return [written.answer for written in method.write(self, encoded, generation)], list(encoded)
        with ModelFaults(f"{self.name} fails to answer"):
            return self._generator.generate(self, encoded, generation, return_cache)

    def prepare_generate(
        self, encoded: Sequence[Encoded], generation: Generation
    ) -> tuple[PreTrainedModel, dict[str, Any]]:
        """See ``Adapter.prepare_generate``."""
        self.setup()
        return self._model, self._generator.arguments(self, encoded, generation)

    def generation_settings(self, generation: Generation) -> dict[str, Any]:
        """See ``Adapter.generation_settings``."""
        self.setup()
        return effective_settings(self._model, self._generator.config(generation))

    def decode_answer(self, ids: Sequence[int], logprobs: Sequence[float], generation: Generation) -> Answer:
        """See ``Adapter.decode_answer``."""
        return self._tokens.read(ids, logprobs, generation.stop)

    @torch.inference_mode()
    def answer(self, encoded: Encoded, text: str, token_ids: Sequence[int] | None = None) -> Answer:
        """See ``Adapter.answer``. White space around the text is not part of the answer.

        Raises:
            ForeignTokens: the ids do not decode to the text.
            DataError: the answer holds a placeholder, which would stand for a second image.
        """
        self.setup()
        with ModelFaults(f"{self.name} fails to read the answer"):
            trimmed = (
                TrimmedIds(self._tokens.tokenise(encoded, text.strip()), True)
                if token_ids is None
                else self._tokens.check(text, token_ids)
            )
            if not set(self._tokens.placeholder_ids).isdisjoint(trimmed.ids):
                raise DataError(f"the answer holds the image placeholder: {text!r}")
            return self._generator.score([encoded], [trimmed])[0]

    def trace(self, encoded: Encoded, answer: Answer, requires: Collection[str] = FORWARD_REQUIREMENTS) -> Trace:
        """See ``Adapter.trace``."""
        return self.trace_batch([encoded], [answer], requires)[0]

    @torch.inference_mode()
    def trace_batch(
        self, encoded: Sequence[Encoded], answers: Sequence[Answer], requires: Collection[str] = FORWARD_REQUIREMENTS
    ) -> list[Trace]:
        """Trace several answers in one pass, padded on the right, where causal rows never attend.

        Raises:
            ConfigError: ``requires`` holds an unknown name.
            CapabilityError: it holds a requirement that this kind of model cannot meet.
            CaptureError: see ``Adapter.trace``; or the model fails.
        """
        self.setup()
        for requirement in requires:
            if requirement not in (*REQUIREMENTS, *EXTRA_REQUIREMENTS):
                raise ConfigError(unknown("requirement", requirement, [*REQUIREMENTS, *EXTRA_REQUIREMENTS]))
        with ModelFaults(f"{self.name} fails while its answer is traced", CaptureError):
            return self._tracer.trace(encoded, answers, frozenset(requires))

    def forward_inputs(self, encoded: Encoded, answer_ids: Sequence[int]) -> tuple[PreTrainedModel, dict[str, Tensor]]:
        """See ``Adapter.forward_inputs``."""
        self.setup()
        return self._model, self._forward.extended(encoded, answer_ids)

    def weights_digest(self) -> str | None:
        """See ``Adapter.weights_digest``."""
        folder = not self.random_init and loading.is_folder(self._source)
        changed = digests.versions(self.model) != self._loaded_versions  # in place, so they differ from the files
        if self._digest is None or changed:
            model_id = None if self.random_init or changed else self.model_id
            files = () if changed or self.report is None else self.report.files
            self._digest = digests.weights(self.model, model_id, folder and not changed, files)
        return self._digest

    def fingerprint(self) -> dict[str, Any]:
        """See ``Adapter.fingerprint``; it holds no path of this machine."""
        import transformers

        folder = not self.random_init and loading.is_folder(self._source)
        return {
            "adapter": f"{type(self).__module__}.{type(self).__qualname__}",
            "model_class": type(self.model).__name__,
            "model_id": model_name(self._source) if folder else self.model_id,
            "random_init": self.random_init,
            "revision": self.loading.revision,
            "weights": self.weights_digest(),
            "processor": type(self.processor).__name__,
            "image_processor": type(self.processor.image_processor).__name__,
            "dtype": str(loading.head_dtype(self.model)).removeprefix("torch."),
            "quantize": self.loading.quantize,
            "prompt": self._questions.template or self.prompt,
            **{name: getattr(self, name) for name in ("phrases", "pad", "max_pixels") if getattr(self, name)},
            **({"square": self.square} if self.square in ("crop", "stretch") else {}),
            "ends": list(self._tokens.end_ids),
            "settings": digests.settings(self.model, self.processor),
            "transformers": transformers.__version__,
        }
