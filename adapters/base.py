"""What a model family must supply: a prompt with measured spans, answers with their ids, one traced pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stethoscope.core.errors import CapabilityError
from stethoscope.core.types import Answer, Generation, Memory
from stethoscope.tracing.trace import FORWARD_NEEDS, Encoded, Trace

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor
    from transformers import PreTrainedModel


class Adapter(ABC):
    """A model behind the one contract. Constructors only store and check; ``setup`` loads weights.

    Attributes:
        name: how the model is called in tables and run directories.
    """

    name: str

    @abstractmethod
    def setup(self) -> None:
        """Loads weights and processor; does nothing the second time."""

    @abstractmethod
    def encode(self, image: Image, question: str) -> Encoded:
        """The model's own prompt around image and question, with measured token positions."""

    @abstractmethod
    def generate(self, encoded: Sequence[Encoded], generation: Generation) -> list[Answer]:
        """Answers for a batch of prompts; in float32 the same as one by one."""

    def generate_with_cache(
        self, encoded: Sequence[Encoded], generation: Generation
    ) -> tuple[list[Answer], list[Encoded]]:
        """Answer a batch of prompts, and return the prompts with their KV caches (``Encoded.cache``) for a trace.

        The caches take as much memory as that of ``generate``, for as long as the returned prompts live. By default
        none is returned; traces are the same either way, as long as nobody changes the model in between.
        """
        return self.generate(encoded, generation), list(encoded)

    def generation_settings(self, generation: Generation) -> dict[str, Any]:
        """List the settings that the model really generates with, beyond those of ``generation``; JSON-able.

        They are part of what identifies answers. Nothing by default: an adapter that passes ``generation`` on and
        fills it with defaults of the model lists these here.
        """
        return {}

    def prepare_generate(
        self, encoded: Sequence[Encoded], generation: Generation
    ) -> tuple[PreTrainedModel, dict[str, Any]]:
        """The transformers model, and the arguments of its ``generate`` for which ``generate`` here gives its answers.

        Raises:
            CapabilityError: there is no such model behind this adapter.
        """
        raise CapabilityError(f"{self.name} gives no access to its model, which streaming needs")

    def decode_answer(self, ids: Sequence[int], logprobs: Sequence[float], generation: Generation) -> Answer:
        """The answer in the ids that the model wrote: what stands before the first that ends it, or a stop string.

        Raises:
            CapabilityError: as ``prepare_generate``.
        """
        raise CapabilityError(f"{self.name} gives no access to its model, which streaming needs")

    @abstractmethod
    def answer(self, encoded: Encoded, text: str) -> Answer:
        """An answer that was written elsewhere, tokenised and given the model's log-probabilities."""

    @abstractmethod
    def trace(self, encoded: Encoded, answer: Answer, needs: Collection[str] = FORWARD_NEEDS) -> Trace:
        """One teacher-forced pass over the prompt and exactly the answer's ids (two with ``blank`` in ``needs``).

        Raises:
            CaptureError: a layer gave no attention, or a value that is not finite; the message names the layer.
        """

    def trace_batch(
        self, encoded: Sequence[Encoded], answers: Sequence[Answer], needs: Collection[str] = FORWARD_NEEDS
    ) -> list[Trace]:
        """Traces of several answers, the same as one by one; an adapter that can do it in fewer passes does.

        Raises:
            DataError: relevancy is needed, and an answer has no token.
        """
        return [self.trace(one, answer, needs) for one, answer in zip(encoded, answers, strict=True)]

    def forward_inputs(
        self, encoded: Encoded, answer_ids: Sequence[int]
    ) -> tuple[PreTrainedModel, Mapping[str, Tensor]]:
        """The transformers model, and the exact inputs of its forward pass over the prompt and the whole answer.

        Raises:
            CapabilityError: there is no such model behind this adapter.
        """
        raise CapabilityError(f"{self.name} gives no access to its model, which relevancy needs")

    def memory(self, context: int, batch_size: int = 1, new_tokens: int = 512) -> Memory:
        """What the model needs, told from its configuration; nothing is loaded.

        Args:
            context: prompt and answer in tokens, image tokens too.
            batch_size: prompts that generate together.
            new_tokens: the longest answer in tokens.

        Raises:
            CapabilityError: this adapter cannot tell.
        """
        raise CapabilityError(f"{self.name} cannot tell how much memory it needs")

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """Identify the model behind the answers: class, id, revision, weights digest, processor, dtype, prompt.

        What reached the model counts, not what files say: the ``prompt`` as rendered, with ``{question}`` in it, and
        the weights as loaded.
        """
