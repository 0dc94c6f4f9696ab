"""Stand in for a model where given texts are only scored: nothing is loaded, and no picture is opened."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, ClassVar, NoReturn

from stethoscope.adapters.base import Adapter, History
from stethoscope.core.errors import CapabilityError
from stethoscope.core.types import Answer, Generation, Picture
from stethoscope.tracing.trace import FORWARD_REQUIREMENTS, Encoded, Trace


class NoModel(Adapter):
    """No model: answers come from a file, and their texts are scored.

    Args:
        name: how it is called in tables; the name of the model that wrote the answers, for example.
    """

    has_model: ClassVar[bool] = False

    def __init__(self, name: str = "none") -> None:
        self.name = name

    def setup(self) -> None:
        """Do nothing."""

    def fingerprint(self) -> dict[str, Any]:
        """Return facts that say there is no model."""
        return {
            "adapter": f"{type(self).__module__}.{type(self).__qualname__}",
            "model_id": self.name,
            "has_model": False,
        }

    def encode(self, image: Picture, question: str, history: History = ()) -> Encoded:
        """Raise a CapabilityError: there is no model."""
        self._refuse("reads no picture")

    def generate(self, encoded: Sequence[Encoded], generation: Generation | None = None) -> list[Answer]:
        """Raise a CapabilityError: there is no model."""
        self._refuse("writes no answer")

    def answer(self, encoded: Encoded, text: str, token_ids: Sequence[int] | None = None) -> Answer:
        """Raise a CapabilityError: there is no model."""
        self._refuse("has no tokens")

    def trace(self, encoded: Encoded, answer: Answer, requires: Collection[str] = FORWARD_REQUIREMENTS) -> Trace:
        """Raise a CapabilityError: there is no model."""
        self._refuse("cannot be traced")

    def _refuse(self, reason: str) -> NoReturn:
        raise CapabilityError(
            f"model={self.name} {reason}: it only scores the answers of a file (stethoscope evaluate "
            "answers.file=log.jsonl); choose a model"
        )
