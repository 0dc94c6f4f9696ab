"""Where things sit in the exact inputs of a forward pass over prompt and answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stethoscope.errors import CapabilityError, DataError
from stethoscope.tracing.rows import logits_to_keep


@dataclass(frozen=True)
class Layout:
    """Positions in the sequences of one sample, or of B samples where they are the same.

    Attributes:
        answer: (B, A) int64, the answers' ids, followed by zeros.
        counts: number of tokens of every answer, A at most.
        first: row that predicts answer token 0; token k is predicted by row ``first + k``.
        length: length of the sequence that these rows are in (the decoder's, for an encoder-decoder model).
        image: (N,) positions of the image tokens in ``input_ids``.
        encoder_decoder: the language model has an encoder, which reads ``input_ids``.
    """

    answer: Tensor
    counts: tuple[int, ...]
    first: int
    length: int
    image: Tensor
    encoder_decoder: bool


def layout(model: PreTrainedModel, inputs: Mapping[str, Tensor], answer_ids: Sequence[int]) -> Layout:
    """Reads the layout off the inputs.

    Raises:
        DataError: the inputs do not hold the answer or the image tokens.
        CapabilityError: more than one sample, or videos.
    """
    ids = inputs.get("input_ids")
    if ids is None or ids.shape[0] != 1:
        shape = None if ids is None else tuple(ids.shape)
        raise CapabilityError(f"relevancy takes one sample at a time with input_ids (1, length); got {shape}")
    if "pixel_values_videos" in inputs:
        raise CapabilityError("relevancy of videos is not supported; give an image")
    answer = torch.as_tensor(answer_ids, dtype=torch.long).reshape(-1).cpu()
    if not len(answer):
        raise DataError("the answer has no tokens; relevancy needs at least one")
    ids = ids[0].cpu()
    both = model.config.is_encoder_decoder or model.config.get_text_config().is_encoder_decoder
    if both:
        decoder = inputs.get("decoder_input_ids")
        if decoder is None:
            raise DataError("an encoder-decoder model needs decoder_input_ids: its start token and the answer")
        decoder = decoder[0].cpu()
        first, length = 0, len(decoder)
        found = length >= len(answer) and torch.equal(decoder[1 : len(answer)], answer[:-1])
    else:
        length = len(ids)
        first = length - len(answer) - 1
        found = first >= 0 and torch.equal(ids[first + 1 :], answer)
    if not found:
        raise DataError(f"the inputs do not end with the {len(answer)} tokens of the answer")
    image_id = getattr(model.config, "image_token_id", None)
    image = (ids[: len(ids) if both else first + 1] == image_id).nonzero()[:, 0] if image_id is not None else None
    if image is None or not len(image):
        raise DataError(f"the inputs hold no image token (id {image_id})")
    return Layout(answer[None], (len(answer),), first, length, image, bool(both))


def shared_layout(model: PreTrainedModel, inputs: Mapping[str, Tensor], answers: Sequence[Sequence[int]]) -> Layout:
    """The layout of several samples of a decoder-only model, padded on the right.

    Raises:
        DataError: their prompts are not alike, or the inputs do not hold them and the answers.
    """
    ids, counts = inputs["input_ids"].cpu(), tuple(map(len, answers))
    first = ids.shape[1] - max(counts) - 1
    answer = torch.zeros(len(answers), max(counts), dtype=torch.long)
    for index, one in enumerate(answers):
        answer[index, : len(one)] = torch.as_tensor(one)
    there = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    image = ids[:, : first + 1] == model.config.image_token_id
    if min(counts) < 1 or not torch.equal(ids[:, first + 1 :][there], answer[there]):
        raise DataError(f"the inputs do not hold answers of {counts} tokens behind prompts of {first + 1}")
    if not image[0].any() or not (image == image[0]).all():
        raise DataError("the image tokens of the prompts are not at the same places")
    return Layout(answer, counts, first, ids.shape[1], image[0].nonzero()[:, 0], False)


def answer_logits(model: PreTrainedModel, inputs: Mapping[str, Tensor], place: Layout) -> Tensor:
    """Logits (B, A) of the answers' tokens, each at the row that predicts it; padding's mean nothing."""
    rows = range(place.first, place.first + place.answer.shape[1])
    options = logits_to_keep(model, rows)
    logits = model(**inputs, **options, use_cache=False).logits
    kept = logits if options else logits[:, rows.start : rows.stop]
    return kept.gather(-1, place.answer[..., None].to(logits.device))[..., 0]
