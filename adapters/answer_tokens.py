"""Turn the token ids of answers into texts and texts into ids: trim, decode, tokenise, and check ids that are given."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from stethoscope.adapters.base import ForeignTokens
from stethoscope.core.errors import DataError
from stethoscope.core.types import Answer
from stethoscope.tracing.token_spans import decode_with_offsets, decoder_of
from stethoscope.tracing.trace import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def special_ids(model: PreTrainedModel, tokenizer: Any) -> tuple[tuple[int, ...], int]:
    """Collect the ids that end an answer, from model and tokenizer, and the id to pad with.

    Where the tokenizer has none to pad with, or one that was added to it and not to the model, an end token pads.

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
    if pad_id is None or pad_id >= model.get_input_embeddings().num_embeddings:
        pad_id = min(end_ids, default=0)
    return tuple(sorted(end_ids)), pad_id


def continuation_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokenise a text that begins with a blank as the continuation of an answer.

    Tokenizers that add a blank of their own to the start of every text would double it, so it follows a sentence.
    """
    before = "A cat."
    start, whole = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, before + text))
    return list(whole[len(start) :]) if whole[: len(start)] == start else list(tokenizer(text.strip())["input_ids"])


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
            return _ids_before(stop_start, ids, offsets)
    return TrimmedIds(ids, end is not None)


def _ids_before(end: int, ids: list[int], offsets: Sequence[tuple[int, int]]) -> TrimmedIds:
    """Trim ids to those that begin before the character ``end``, at which the answer ends."""
    count = sum(start < end for start, _ in offsets)
    return TrimmedIds(ids[:count], True, max(offsets[count - 1][1] - end, 0) if count else 0)


class AnswerTokens:
    """Read and write the ids of the answers of one loaded model.

    Args:
        name: of the model, for messages.
        model: whose tokens they are.
        tokenizer: of the model.
        stops: strings that end an answer of this family.
        follows_prompt: answers stand behind their prompts in one sequence, as in decoder-only models.

    Attributes:
        decode: decodes ids as a whole, special tokens too.
        decode_text: decodes ids as a whole, without special tokens.
        end_ids: ids that end an answer.
        pad_id: id to pad with.
        placeholder_ids: ids of images and videos, which an answer must not hold: they would stand for a second one.

    Raises:
        DataError: see ``special_ids``.
    """

    def __init__(
        self, name: str, model: PreTrainedModel, tokenizer: Any, stops: Sequence[str], follows_prompt: bool
    ) -> None:
        self._name, self._model, self._tokenizer = name, model, tokenizer
        self._stops, self._follows_prompt = tuple(stops), follows_prompt
        decode = decoder_of(tokenizer)
        self.decode, self.decode_text = (partial(decode, skip_special_tokens=skip) for skip in (False, True))
        self.end_ids, self.pad_id = special_ids(model, tokenizer)
        placeholders = (getattr(model.config, f"{kind}_token_id", None) for kind in ("image", "video"))
        self.placeholder_ids = [token for token in placeholders if token is not None]

    def all_stops(self, stops: Sequence[str]) -> tuple[str, ...]:
        """Return the strings that end an answer: the family's, then those of ``Generation.stop``."""
        return (*self._stops, *stops)

    def trim(self, ids: Sequence[int], stops: Sequence[str] = ()) -> TrimmedIds:
        """Trim generated ids to the answer, see ``trim_ids``.

        Args:
            ids: generated token ids.
            stops: strings that end an answer besides the family's.
        """
        return trim_ids(ids, self.end_ids, self.all_stops(stops), self.decode)

    def read(self, ids: Sequence[int], logprobs: Sequence[float], stops: Sequence[str]) -> Answer:
        """Trim and decode generated ids, see ``trim`` and ``answer``."""
        return self.answer(self.trim(ids, stops), logprobs)

    def answer(self, trimmed: TrimmedIds, logprobs: Sequence[float]) -> Answer:
        """Decode trimmed ids.

        Args:
            trimmed: of an answer.
            logprobs: of its ids, in nats; further ones are left out.
        """
        ids = tuple(trimmed.ids)
        text, offsets = decode_with_offsets(ids, self.decode_text)
        text = text[: len(text) - trimmed.surplus]
        offsets = tuple((min(start, len(text)), min(end, len(text))) for start, end in offsets)
        return Answer(text, ids, offsets, tuple(logprobs[: len(ids)]), trimmed.finished)

    def check(self, text: str, token_ids: Sequence[int]) -> TrimmedIds:
        """Trim given ids to the tokens of a text, which may end within the last of them, as at a stop string.

        White space is not compared, as engines strip and join it in their own ways, nor are halves of characters.

        Args:
            text: of an answer.
            token_ids: with or without an end token.

        Raises:
            ForeignTokens: the ids do not decode to the text.
        """
        known = self._model.get_input_embeddings().num_embeddings
        unknown_id = next((token for token in token_ids if not 0 <= token < known), None)
        if unknown_id is not None:
            raise ForeignTokens(f"token id {unknown_id} is none of the {known:,} of {self._name}: another tokenizer's")
        trimmed = self.trim(token_ids)
        decoded, offsets = decode_with_offsets(trimmed.ids, self.decode_text)
        letters = [index for index, letter in enumerate(decoded) if not (letter.isspace() or letter == "\ufffd")]
        wanted = [letter for letter in text if not (letter.isspace() or letter == "\ufffd")]
        if [decoded[index] for index in letters[: len(wanted)]] != wanted:
            raise ForeignTokens(
                f"the token ids decode to {decoded[:60]!r} with {self._name}, not to {text.strip()[:60]!r}: they are "
                "another tokenizer's"
            )
        if len(letters) == len(wanted):
            return trimmed._replace(finished=True)
        return _ids_before(letters[len(wanted) - 1] + 1 if wanted else 0, trimmed.ids, offsets)

    def tokenise(self, encoded: Encoded, text: str) -> list[int]:
        """Tokenise a text as the continuation of the prompt, after a space where the prompt ends in a word."""
        if not text:
            return []
        tokenizer, prompt = self._tokenizer, encoded.text if self._follows_prompt else ""
        last_id = int(encoded.inputs["input_ids"][0, -1])
        space = "" if not prompt or prompt[-1].isspace() or last_id in tokenizer.all_special_ids else " "
        tokens = tokenizer(prompt + space + text, return_offsets_mapping=True, add_special_tokens=False)
        pairs = zip(tokens["input_ids"], tokens["offset_mapping"], strict=True)
        ids = [token for token, (_, end) in pairs if end > len(prompt)]
        if tokenizer.decode(ids).strip() == text:
            return ids
        return tokenizer(space + text, add_special_tokens=False)["input_ids"]  # a token straddles the border
