"""Relevancy behind an adapter: image, question and answer as people have them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from stethoscope.relevancy.engine import relevancy_from_inputs
from stethoscope.relevancy.result import Relevancy

if TYPE_CHECKING:
    from PIL.Image import Image

    from stethoscope.adapter import Adapter
    from stethoscope.records import Answer
    from stethoscope.trace import Encoded


def token_relevancy(
    adapter: Adapter, image: Image, question: str, answer: Answer | str, *, scope: str = "row", **options: Any
) -> Relevancy:
    """Relevancy of an answer's tokens to image, question, earlier answer tokens and everything else.

    Args:
        adapter: the model.
        image: the picture. ``question``: what was asked.
        answer: what the model answered, with its ids; or a text, which the adapter tokenises.
        scope: ``row`` or ``token``; this and ``options`` (rule, layers, tokens, budget, recompute) as for
            ``relevancy_from_inputs``.

    Returns:
        With ``question_at``, so that ``image``, ``question``, ``answer`` and ``rest`` add up to the whole row.

    Raises:
        CapabilityError: the adapter has no transformers model, or its kind is not supported.
        ConfigError, DataError, CaptureError: as ``relevancy_from_inputs``.
    """
    encoded = adapter.encode(image, question)
    written = adapter.answer(encoded, answer) if isinstance(answer, str) else answer
    return answer_relevancy(adapter, encoded, written, scope=scope, **options)


def answer_relevancy(adapter: Adapter, encoded: Encoded, answer: Answer, **options: Any) -> Relevancy:
    """``token_relevancy`` of a prompt that is encoded already."""
    model, inputs = adapter.forward_inputs(encoded, answer.token_ids)
    found = relevancy_from_inputs(model, inputs, answer.token_ids, **options)
    return replace(found, question_at=encoded.spans.question)
