"""Define the frozen records that packages exchange: samples, answers, mentions, scores.

Token indices are positions in the *expanded* sequence that the language model reads (image placeholders counted one
by one); character spans are half-open ``(start, end)`` offsets into ``Answer.text``.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias, TypeVar

from stethoscope.core.errors import ConfigError, DataError, wrong_type
from stethoscope.core.images import file_digest, pixel_digest, read_image, rgb
from stethoscope.core.text import counted

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T")

UNKNOWN = "unknown"
"""Object of a mention that names none, such as a yes to a question about no single object."""


def required(value: T | None) -> T:
    """Return a value that an earlier step of our own code has set; None would be a fault of ours."""
    assert value is not None, "an earlier step should have set this"
    return value


@lru_cache(maxsize=1 << 14)  # benchmarks ask about the same pictures again and again
def _without_suffix(name: str) -> str:
    return Path(name).with_suffix("").as_posix()


@dataclass(frozen=True)
class ImageRef:
    """A reference to an image, which is read when it is needed.

    Attributes:
        name: of the image in messages and tables, usually its file name.
        source: a file path, or a function that returns the PIL image (rendered scenes, rows of a data set).
        row: number, from 0, of the row of a data set that it belongs to; None if it comes from elsewhere.
    """

    name: str
    source: Path | Callable[[], Image] = field(repr=False)
    row: int | None = None

    @property
    def group(self) -> str:
        """Id of the image in all tasks: its name without the suffix, folders included.

        >>> ImageRef("val2014/a.b.jpg", Path("x.jpg")).group
        'val2014/a.b'
        """
        return _without_suffix(self.name)

    def load(self) -> Image:
        """Load the image as RGB, see ``images.rgb``.

        Raises:
            DataError: the file is missing, is not an image, is cut short or too large.
        """
        if isinstance(self.source, Path):
            name = self.source if os.path.isfile(self.source) else repr(self.name)
            return read_image(self.source, f"image {name}")
        try:
            image = rgb(self.source(), f"image {self.name!r}")
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"image {self.name!r} cannot be read: {error}") from None
        if "sha256" not in self.__dict__:
            self.__dict__["sha256"] = pixel_digest(image)  # so that it is not rendered again for its digest
        return image

    @cached_property
    def sha256(self) -> str:
        """Digest of the file's bytes, or of size and pixels for a rendered image."""
        if not isinstance(self.source, Path):
            return pixel_digest(self.load())
        try:
            return file_digest(self.source)
        except OSError as error:
            raise DataError(f"image {self.name!r} cannot be read: {error}") from None

    def differs(self, sha256: str) -> bool:
        """Return whether this is known to be another image than the one with a digest.

        A file is read for this. A rendered image is compared only once it has been loaded, and a missing one is not
        known to differ.
        """
        try:
            known = self.sha256 if isinstance(self.source, Path) else self.__dict__.get("sha256", sha256)
        except DataError:
            return False
        return known != sha256


Picture: TypeAlias = "Image | ImageRef | Path | str | bytes"
"""An image as people have it at hand: a PIL image, a reference, the path of a file, or the bytes of one."""


def load_picture(image: Picture) -> Image:
    """Load an image as RGB.

    Raises:
        DataError: it is none of ``Picture``, an address (nothing is fetched), a data URI, missing, or cannot be read.
    """
    if isinstance(image, bytes):
        return read_image(image, "image")
    if isinstance(image, str) and image.startswith(("http://", "https://")):
        raise DataError(f"image {image!r:.80} is a web address, and nothing is fetched: download it, and give its path")
    if isinstance(image, str) and image.startswith("data:"):
        raise DataError(f"image {image!r:.80} is a data URI: decode it, and give the bytes of the file")
    if isinstance(image, str) and len(image) > 4096:
        raise DataError(f"image {image!r:.80} is no path, it has {len(image):,} characters; give the bytes of the file")
    if isinstance(image, (str, Path)):
        path = Path(image).expanduser()
        image = ImageRef(path.name, path)
    return image.load() if isinstance(image, ImageRef) else rgb(image)


@dataclass(frozen=True)
class Sample:
    """One question about one image.

    Attributes:
        id: stable and unique within the task; used for resuming, sharding and pairing of runs.
        image: that the question is about.
        question: of the user; the adapter puts it into the model's chat format.
        group: unit of data splits and of the bootstrap: the image's id.
        subset: part of the benchmark that is reported on its own (POPE: ``random``, ``popular``, ``adversarial``).
        reference: ground truth, JSON-able, read by the task only.
        answer: a given answer, which the model reads (teacher forcing) instead of generating its own; None to generate.
            A task that gives answers also puts them into ``reference``, so that a change is noticed when resuming.
        asks: what for, ``question`` or ``description``; some models have a prompt for each.
    """

    id: str
    image: ImageRef
    question: str
    group: str
    subset: str = "all"
    reference: Mapping[str, Any] = field(default_factory=dict)
    answer: str | None = None
    asks: str = "question"


class MitigationMethod(Protocol):
    """What settings of generation read of a mitigation (``mitigation.base.Mitigation``)."""

    name: ClassVar[str]
    changes_scores: ClassVar[bool]
    samples: ClassVar[bool]
    writes: ClassVar[bool]

    def check(self, generation: Generation) -> None:
        """Check that the method goes with other settings of generation."""

    def processors(self, adapter: Any, encoded: Any, generation: Generation) -> list[Any]:
        """Create the processors for one call of ``generate``."""

    def write(self, adapter: Any, encoded: Any, generation: Generation, extractors: Any = None) -> list[Any]:
        """Write answers instead of ``generate``, where the method does so."""

    def identity(self, adapter: Any) -> dict[str, Any]:
        """Return settings that identify the method otherwise than by their values."""


@dataclass(frozen=True)
class Generation:
    """Settings of decoding.

    Attributes:
        max_new_tokens: longest answer, in tokens, at least 1; None for the task's default.
        do_sample: sample tokens instead of taking the most probable one.
        temperature: divides the logits when sampling, above 0.
        top_p: probability mass of nucleus sampling, in (0, 1].
        num_beams: beams of beam search, 1 for none.
        seed: seed of the sampling.
        stop: strings that end an answer, which is cut before the first of them. White space at the very start of an
            answer is not part of it and ends nothing. A model may have further stop strings of its own.
        mitigation: method that is to leave fewer hallucinated objects in the answer; None for none.

    Raises:
        ConfigError: a value is out of range, sampling is combined with beam search, or the mitigation does not go with
            the other settings.
    """

    max_new_tokens: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    num_beams: int = 1
    seed: int = 0
    stop: tuple[str, ...] = ()
    mitigation: MitigationMethod | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop or ()):
            raise ConfigError(f"generation.stop={self.stop!r} should be a list of texts, as ['###']")
        object.__setattr__(self, "stop", tuple(self.stop or ()))
        limits: tuple[tuple[str, type, Callable[[Any], bool], str], ...] = (
            ("max_new_tokens", Integral, lambda value: value >= 1, "a whole number, at least 1"),
            ("temperature", Real, lambda value: value > 0, "above 0; for the most probable token, do_sample=false"),
            ("top_p", Real, lambda value: 0 < value <= 1, "above 0 and at most 1"),
            ("num_beams", Integral, lambda value: value >= 1, "a whole number, at least 1"),
            ("seed", Integral, lambda value: value >= 0, "a whole number, 0 or more"),
        )
        for name, kind, is_valid, requirement in limits:
            value = getattr(self, name)
            if value is None and name == "max_new_tokens":
                continue
            if isinstance(value, bool) or not isinstance(value, kind) or not is_valid(value):
                raise ConfigError(f"generation.{name}={value} must be {requirement}")
        if not isinstance(self.do_sample, bool):
            raise ConfigError(f"generation.do_sample={self.do_sample} must be true or false")
        if self.do_sample and self.num_beams > 1:
            raise ConfigError(f"generation.do_sample=true and num_beams={self.num_beams} exclude each other")
        if self.mitigation is not None:
            self.mitigation.check(self)


def with_limit(generation: Generation | None = None) -> Generation:
    """Fill in what a single question leaves open: greedy decoding, and at most 128 tokens.

    >>> with_limit().max_new_tokens, with_limit(Generation(max_new_tokens=8)).max_new_tokens
    (128, 8)

    Raises:
        ConfigError: it is no ``Generation``.
    """
    if generation is not None and not isinstance(generation, Generation):
        raise wrong_type("generation", "a Generation(max_new_tokens=...)", generation)
    generation = generation or Generation()
    return replace(generation, max_new_tokens=128) if generation.max_new_tokens is None else generation


@dataclass(frozen=True)
class Answer:
    """An answer, token by token, without the end-of-sequence token.

    Attributes:
        text: the decoded answer.
        token_ids: the T generated ids (never re-tokenised).
        offsets: T character spans in ``text``; a token that completes no character has an empty span.
        logprobs: T log-probabilities (nats) of the tokens under the model's own, unprocessed distribution.
        finished: whether the model ended the answer; False means cut off at ``max_new_tokens``.
        argmax: of a given answer, for each of the T tokens whether no other one is more probable to the model that
            reads it; None where that was not computed.
        reasoning: character spans of ``text`` in which the model thinks before it answers; tasks never see them.
    """

    text: str
    token_ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]
    logprobs: tuple[float, ...]
    finished: bool = True
    argmax: tuple[bool, ...] | None = None
    reasoning: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if not len(self.token_ids) == len(self.offsets) == len(self.logprobs):
            raise ValueError(
                f"token_ids, offsets and logprobs differ in length: "
                f"{len(self.token_ids)}, {len(self.offsets)}, {len(self.logprobs)}"
            )
        if self.argmax is not None and len(self.argmax) != len(self.token_ids):
            raise ValueError(f"argmax and token_ids differ in length: {len(self.argmax)}, {len(self.token_ids)}")

    def __repr__(self) -> str:
        """Return the text and the number of tokens, not the tokens themselves."""
        return f"Answer({self.text!r}, {counted(len(self.token_ids), 'token')}{'' if self.finished else ', cut off'})"

    @property
    def tokens(self) -> tuple[str, ...]:
        """Text of every token."""
        return tuple(self.text[start:end] for start, end in self.offsets)

    def covering(self, start: int, end: int) -> list[int]:
        """List the indices of the tokens that share a character with ``text[start:end]``.

        >>> answer = Answer("a red car", (5, 6, 7), ((0, 1), (1, 5), (5, 9)), (0.0, 0.0, 0.0))
        >>> answer.covering(6, 9)
        [2]
        """
        return [index for index, (first, last) in enumerate(self.offsets) if first < end and last > start]

    def owners(self, mentions: Sequence[Mention]) -> list[Mention | None]:
        """Return the mention that each token belongs to: the first with which it shares a character."""
        owners: list[Mention | None] = [None] * len(self.token_ids)
        for mention in mentions:
            for index in self.covering(mention.start, mention.end):
                owners[index] = owners[index] or mention
        return owners

    def until(self, count: int) -> Answer:
        """Return the answer cut off after ``count`` tokens."""
        end = self.offsets[count - 1][1] if count else 0
        parts = self.token_ids[:count], self.offsets[:count], self.logprobs[:count]
        argmax = None if self.argmax is None else self.argmax[:count]
        reasoning = tuple((first, min(last, end)) for first, last in self.reasoning if first < end)
        return Answer(self.text[:end], *parts, False, argmax, reasoning)

    def without_reasoning(self) -> tuple[Answer, Sequence[int]]:
        """Return the answer without its reasoning and the white space after it, as tasks score it.

        Tokens all of whose characters are gone are left out; offsets are those in the new text.

        Returns:
            The answer, and for each character of its text the index in the whole text.

        >>> answer = Answer("<think>a?</think> a cat", (5, 6, 7), ((0, 17), (17, 19), (19, 23)), (-1.0, -2.0, -3.0),
        ...                 reasoning=((0, 17),))
        >>> scored, kept = answer.without_reasoning()
        >>> scored.text, scored.token_ids, scored.offsets, kept[2]
        ('a cat', (6, 7), ((0, 1), (1, 5)), 20)
        """
        if not self.reasoning:
            return self, range(len(self.text))
        hidden = {index for start, end in self.reasoning for index in range(start, end)}
        kept = [index for index in range(len(self.text)) if index not in hidden]
        text = "".join(self.text[index] for index in kept)
        kept = kept[len(text) - len(text.lstrip()) :]
        spans = [(bisect_left(kept, start), bisect_left(kept, end)) for start, end in self.offsets]
        tokens = [index for index, (start, end) in enumerate(spans) if start < end]
        scored = Answer(
            text.lstrip(),
            tuple(self.token_ids[index] for index in tokens),
            tuple(spans[index] for index in tokens),
            tuple(self.logprobs[index] for index in tokens),
            self.finished,
            None if self.argmax is None else tuple(self.argmax[index] for index in tokens),
        )
        return scored, kept


@dataclass(frozen=True)
class Memory:
    """Memory that a model needs, in bytes, estimated before it is loaded.

    Attributes:
        parameters: number of weights.
        dtype: of the computation.
        weights: of all weights, as they would be stored.
        cache: of the KV cache and the logits of a step during generation.
        relevancy: of the backward pass of one answer's relevancy, roughly.
        shipped: counted from sizes that come with this package, not from the model's own configuration.
    """

    parameters: int
    dtype: str
    weights: int
    cache: int
    relevancy: int
    shipped: bool = False

    @property
    def total(self) -> int:
        """Weights and the larger of generation and relevancy, which run one after the other."""
        return self.weights + max(self.cache, self.relevancy)


@dataclass(frozen=True)
class Mention:
    """An object that an answer names, labelled by the task.

    Attributes:
        start, end: character span in the answer's text.
        object: canonical name.
        label: 1 hallucinated, 0 grounded, -1 not judged.
        mention_index: index of the mention in the answer, from 0.
        repeat_index: index among the mentions of the same object in the answer, from 0.
    """

    start: int
    end: int
    object: str
    label: int
    mention_index: int = 0
    repeat_index: int = 0


@dataclass(frozen=True)
class Score:
    """A task's score of one answer.

    Attributes:
        status: ``ok``, or ``unparsed`` when the task cannot read the answer.
        counts: numbers that are summed over samples; the task's metrics are functions of the sums.
        detail: JSON-able details for readers of the record (parsed reply, named objects, ...).
    """

    status: str
    counts: Mapping[str, float] = field(default_factory=dict)
    detail: Mapping[str, Any] = field(default_factory=dict)
