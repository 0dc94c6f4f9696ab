"""Define the contract of a model family: encode a prompt with measured spans, generate answers, trace them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from stethoscope.core.errors import CapabilityError, ConfigError, DataError, check_list, wrong_type
from stethoscope.core.types import Answer, Generation, Memory, Picture
from stethoscope.tracing.trace import FORWARD_REQUIREMENTS, Encoded, Trace

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def check_text(question: Any) -> None:
    """Check that a question is a text.

    Raises:
        ConfigError: it is something else.
    """
    if not isinstance(question, str):
        raise wrong_type("the question", "a text", question)


def check_asked(adapter: Any, question: Any) -> None:
    """Check the first arguments of the functions that ask one question.

    Raises:
        ConfigError: the first is no adapter, or the question is no text or empty.
    """
    if not callable(getattr(adapter, "encode_as", None)):
        raise wrong_type("adapter", "a model as stethoscope.load('testbed') returns it", adapter)
    check_text(question)
    if not question.strip():
        raise ConfigError("the question is empty; the usual one is 'Please describe this image in detail.'")


def check_history(history: Any) -> tuple[tuple[str, str], ...]:
    """Return earlier questions and their answers as pairs of texts, the oldest first.

    Args:
        history: pairs (question, answer), in any sequence.

    Raises:
        ConfigError: it is something else, or a text is empty.

    >>> check_history([("Is there a dog?", "Yes.")])
    (('Is there a dog?', 'Yes.'),)
    """
    if isinstance(history, tuple) and not history:
        return ()
    check_list("history", "a list of earlier turns, [(question, answer), ...]", history, Sequence)
    turns = []
    for number, turn in enumerate(history, 1):
        if isinstance(turn, str) or not isinstance(turn, Sequence) or len(turn) != 2:
            raise ConfigError(f"turn {number} of the history should be a pair (question, answer), got {turn!r:.80}")
        for part, text in zip(("question", "answer"), turn, strict=True):
            if not isinstance(text, str):
                raise wrong_type(f"the {part} of turn {number} of the history", "a text", text)
            if not text.strip():
                raise ConfigError(f"the {part} of turn {number} of the history is empty; leave the turn out")
        turns.append((turn[0], turn[1]))
    return tuple(turns)


History = Sequence[tuple[str, str]]
"""Earlier questions about a picture with their answers, the oldest first."""


def check_turns(question: Any, history: Any) -> tuple[tuple[str, str], ...]:
    """Check a question, and return the earlier ones with their answers; see ``check_text`` and ``check_history``."""
    check_text(question)
    return check_history(history)


class ForeignTokens(DataError):
    """The token ids of a given answer are not those of its text by the model's tokenizer."""


class Adapter(ABC):
    """A model behind the one contract. Constructors only store and check; ``setup`` loads weights.

    Attributes:
        name: how the model is called in tables and run directories.
        mitigates: whether ``generate`` applies mitigations that change how an answer is written.
        has_model: whether there is a model that reads pictures and answers; without one, given texts are only scored.
    """

    name: str
    mitigates: ClassVar[bool] = False
    has_model: ClassVar[bool] = True

    @abstractmethod
    def setup(self) -> None:
        """Load weights and processor; do nothing the second time."""

    @abstractmethod
    def encode(self, image: Picture, question: str, history: History = ()) -> Encoded:
        """Build the model's own prompt around image and question, with measured token positions.

        Args:
            image: that is asked about.
            question: the text.
            history: earlier questions about the image and their answers, the oldest first. Adapters whose
                ``check_conversation`` raises are never given any, and need not take the argument.
        """

    def encode_as(self, asks: str, image: Picture, question: str, history: History = ()) -> Encoded:
        """Build the prompt for what a task asks for; by default that of ``encode``, whatever it is.

        Args:
            asks: ``question`` or ``description``, see ``Sample.asks``.
            image: that is asked about.
            question: the task's own words, in place of which a model may have others (PaliGemma's "caption en").
            history: see ``encode``.

        Raises:
            ConfigError: the history is no list of pairs of texts.
            CapabilityError: there is a history, and ``check_conversation`` raises.
        """
        turns = check_history(history)
        if not turns:
            return self.encode(image, question)
        self.check_conversation()
        return self.encode(image, question, turns)

    def with_square(self, square: str) -> Adapter:
        """Return the same model with another way to bring pictures to a square before it sees them.

        Args:
            square: ``none`` (as they are), ``pad``, ``crop`` or ``stretch``.

        Raises:
            ConfigError: there is no such way.
            CapabilityError: the adapter offers no choice, as by default.
        """
        raise CapabilityError(f"{self.name} takes pictures in one way: its adapter offers no other")

    def check_conversation(self) -> None:
        """Check that the model's prompt has room for earlier questions and answers; loads the model if need be.

        Raises:
            CapabilityError: it asks one question at a time, as by default.
        """
        raise CapabilityError(f"{self.name} is asked one question at a time: its adapter writes no earlier turns")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    @abstractmethod
    def generate(self, encoded: Sequence[Encoded], generation: Generation | None = None) -> list[Answer]:
        """Answer a batch of prompts; in float32 the answers are the same as one by one.

        Args:
            encoded: the prompts.
            generation: settings of decoding; what is left open is as in ``core.types.with_limit``.
        """

    def prefill(self, encoded: Sequence[Encoded], requires: Collection[str] = ("relevancy",)) -> list[Encoded]:
        """Run prompts before they are answered, and return them with KV caches and the graph for relevancy.

        ``generate`` and ``trace_batch`` continue from there (``Encoded.cache``), so that an answer and its relevancy
        share the pass over the prompt. The graph serves one trace with relevancy, of all prompts that shared a pass;
        other traces run the prompt again. By default nothing is run; answers and traces are the same either way.

        Args:
            encoded: the prompts.
            requires: of the trace that follows. Without ``relevancy`` nothing is run; with ``states`` or ``image_lens``
                the hidden states of the prompts are kept too.
        """
        return list(encoded)

    def generate_with_cache(
        self, encoded: Sequence[Encoded], generation: Generation
    ) -> tuple[list[Answer], list[Encoded]]:
        """Answer a batch of prompts, and return the prompts with their KV caches (``Encoded.cache``) for a trace.

        The caches take as much memory as that of ``generate``, for as long as the returned prompts live. By default
        no cache is returned; traces are the same either way, as long as the model does not change in between.
        """
        return self.generate(encoded, generation), list(encoded)

    @contextmanager
    def sharing_prefixes(self) -> Iterator[None]:
        """Let calls of ``generate`` in this block go on from what the previous call has read of the same picture.

        Answers stay the same, log-probabilities up to rounding. By default calls share nothing.
        """
        yield

    def can_share_prefixes(self) -> bool:
        """Tell from the configuration whether ``generate`` reads a picture once for all prompts about it.

        Raises:
            ConfigError, CapabilityError: as ``memory``.
        """
        return False

    def check_mitigation(self, generation: Generation) -> None:
        """Check that the adapter can apply the mitigation of some settings, before weights are loaded.

        Raises:
            CapabilityError: it cannot.
        """
        method = generation.mitigation  # the others need no access to decoding
        if method is not None and (method.changes_scores or method.writes) and not self.mitigates:
            raise CapabilityError(
                f"mitigation={method.name} changes how {self.name} writes its answers, to which its "
                "adapter gives no access; set mitigation=none"
            )

    def generation_settings(self, generation: Generation) -> dict[str, Any]:
        """List the generation settings in effect beyond those of ``generation``, as JSON values.

        They are part of what identifies answers. Empty by default; an adapter that fills ``generation`` with defaults
        of the model lists these defaults here.
        """
        return {}

    def prepare_generate(
        self, encoded: Sequence[Encoded], generation: Generation
    ) -> tuple[PreTrainedModel, dict[str, Any]]:
        """Return the transformers model and the arguments of its ``generate`` that lead to the same answers.

        Raises:
            CapabilityError: there is no transformers model behind this adapter.
        """
        raise CapabilityError(f"{self.name} gives no access to its model, which streaming needs")

    def decode_answer(self, ids: Sequence[int], logprobs: Sequence[float], generation: Generation) -> Answer:
        """Decode generated ids up to the first end token or stop string.

        Args:
            ids: generated token ids.
            logprobs: log-probability of each id, in nats.
            generation: settings that the ids were generated with.

        Raises:
            CapabilityError: as ``prepare_generate``.
        """
        raise CapabilityError(f"{self.name} gives no access to its model, which streaming needs")

    @abstractmethod
    def answer(self, encoded: Encoded, text: str, token_ids: Sequence[int] | None = None) -> Answer:
        """Score a given answer with the model's log-probabilities, and tell which tokens are its first choice.

        Args:
            encoded: the prompt.
            text: of the answer.
            token_ids: of the answer, with or without an end token; None to tokenise the text.

        Returns:
            The answer as the model's tokenizer writes it, with ``Answer.argmax``.

        Raises:
            ForeignTokens: the ids do not decode to the text.
        """

    @abstractmethod
    def trace(self, encoded: Encoded, answer: Answer, requires: Collection[str] = FORWARD_REQUIREMENTS) -> Trace:
        """Run one teacher-forced pass over the prompt and exactly the answer's ids; ``blank`` costs a second one.

        Raises:
            CaptureError: a layer returned no attention, or a value that is not finite; the message names the layer.
        """

    def trace_batch(
        self, encoded: Sequence[Encoded], answers: Sequence[Answer], requires: Collection[str] = FORWARD_REQUIREMENTS
    ) -> list[Trace]:
        """Trace several answers, with the same result as one by one; adapters may use fewer passes.

        Raises:
            DataError: relevancy is needed, and an answer has no token.
        """
        return [self.trace(prompt, answer, requires) for prompt, answer in zip(encoded, answers, strict=True)]

    def forward_inputs(
        self, encoded: Encoded, answer_ids: Sequence[int]
    ) -> tuple[PreTrainedModel, Mapping[str, Tensor]]:
        """Return the transformers model and the exact inputs of its forward pass over prompt and whole answer.

        Raises:
            CapabilityError: there is no transformers model behind this adapter.
        """
        raise CapabilityError(f"{self.name} gives no access to its model, which relevancy needs")

    def memory(self, context: int, batch_size: int = 1, new_tokens: int = 512) -> Memory:
        """Estimate the model's memory from its configuration, without loading weights.

        Args:
            context: length of prompt and answer in tokens, image tokens included.
            batch_size: number of prompts that generate together.
            new_tokens: the longest answer in tokens.

        Raises:
            CapabilityError: this adapter cannot estimate its memory.
        """
        raise CapabilityError(f"{self.name} cannot estimate how much memory it needs")

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """Identify the model behind the answers: class, id, revision, weights digest, processor, dtype, prompt.

        Values are those in effect, not those in files: the ``prompt`` as rendered, with ``{question}`` in it, and the
        weights as loaded.
        """

    def weights_digest(self) -> str | None:
        """Return the digest of the weights in ``fingerprint``, which a stream asks for before every answer."""
        return self.fingerprint().get("weights")
