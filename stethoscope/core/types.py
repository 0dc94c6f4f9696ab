"""The frozen records that cross borders: what a task asks, what a model answers, what is known of it.

Indices of tokens are positions in the *expanded* sequence that the language model reads (image placeholders
counted one by one); character spans are half-open ``(start, end)`` offsets into ``Answer.text``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stethoscope.core.errors import ConfigError, DataError
from stethoscope.core.images import file_digest, pixel_digest, read_image, rgb

if TYPE_CHECKING:
    from PIL.Image import Image


UNKNOWN = "unknown"
"""The object of a mention that names none, such as a yes to a question that asks about no single object."""


@dataclass(frozen=True)
class ImageRef:
    """An image that is read when it is needed.

    Attributes:
        name: what to call the image in messages and tables, usually its file name.
        source: a file path, or a function that makes the PIL image (rendered scenes, rows of a data set).
    """

    name: str
    source: Path | Callable[[], Image] = field(repr=False)

    @property
    def group(self) -> str:
        """Id of the image among all tasks: its name without the suffix, folders included.

        >>> ImageRef("val2014/a.b.jpg", Path("x.jpg")).group
        'val2014/a.b'
        """
        return Path(self.name).with_suffix("").as_posix()

    def load(self) -> Image:
        """The whole image as RGB, see ``images.rgb``.

        Raises:
            DataError: the file is missing, is not an image, is cut short or too large.
        """
        if isinstance(self.source, Path):
            name = self.source if self.source.is_file() else repr(self.name)
            return read_image(self.source, f"image {name}")
        try:
            made = rgb(self.source(), f"image {self.name!r}")
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"image {self.name!r} cannot be read: {error}") from None
        if "sha256" not in self.__dict__:
            self.__dict__["sha256"] = pixel_digest(made)  # it is not made again for its digest alone
        return made

    @cached_property
    def sha256(self) -> str:
        """Digest of the file's bytes, or of size and pixels for an image that is made."""
        if not isinstance(self.source, Path):
            return pixel_digest(self.load())
        try:
            return file_digest(self.source)
        except OSError as error:
            raise DataError(f"image {self.name!r} cannot be read: {error}") from None

    def differs(self, sha256: str) -> bool:
        """Whether this is known to be another picture than the one with a digest.

        A file is read for that. A picture that is made is compared only once it has been loaded, and one that is gone
        is not known to differ.
        """
        try:
            known = self.sha256 if isinstance(self.source, Path) else self.__dict__.get("sha256", sha256)
        except DataError:
            return False
        return known != sha256


def load_picture(image: Image | ImageRef | Path | str) -> Image:
    """A picture as RGB, from what a user gives: a PIL image, a path, or a reference.

    Raises:
        DataError: the file is missing or cannot be read.
    """
    if isinstance(image, (str, Path)):
        path = Path(image).expanduser()
        image = ImageRef(path.name, path)
    return image.load() if isinstance(image, ImageRef) else rgb(image)


@dataclass(frozen=True)
class Sample:
    """One question about one image.

    Attributes:
        id: stable and unique within the task; resume, sharding and pairing of runs go by it.
        image: the picture.
        question: what the user asks; the adapter puts it into the model's own prompt.
        group: unit of data splits and of the bootstrap, the image's id.
        subset: part of the benchmark that is reported on its own (POPE: ``random``, ``popular``, ``adversarial``).
        reference: ground truth, JSON-able, opaque to everyone but the task.
        answer: an answer written elsewhere, which the model reads (teacher forcing) instead of writing its own; None to
            ask the model. A task that gives answers keeps them in ``reference`` too, so that records know of a change.
    """

    id: str
    image: ImageRef
    question: str
    group: str
    subset: str = "all"
    reference: Mapping[str, Any] = field(default_factory=dict)
    answer: str | None = None


@dataclass(frozen=True)
class Generation:
    """How to write an answer.

    Attributes:
        max_new_tokens: longest answer, in tokens, at least 1; None for what the task asks for.
        do_sample: draw tokens instead of taking the most probable one.
        temperature: divides the logits when sampling, above 0.
        top_p: nucleus of the distribution to sample from, in (0, 1].
        num_beams: beams of beam search, 1 for none.
        seed: seed of the sampling.
        stop: strings that end an answer; it holds what stands before the first of them. White space at the very start
            of an answer is no part of it and so ends nothing. A model may have stop strings of its own besides.

    Raises:
        ConfigError: a value is out of range, or sampling and beams are asked for at once.
    """

    max_new_tokens: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    num_beams: int = 1
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop or ()):
            raise ConfigError(f"generation.stop={self.stop!r} should be a list of texts, as ['###']")
        object.__setattr__(self, "stop", tuple(self.stop or ()))
        limits: tuple[tuple[str, type, Callable[[float], bool], str], ...] = (
            ("max_new_tokens", Integral, lambda value: value >= 1, "a whole number, at least 1"),
            ("temperature", Real, lambda value: value > 0, "above 0; for the most probable token, do_sample=false"),
            ("top_p", Real, lambda value: 0 < value <= 1, "above 0 and at most 1"),
            ("num_beams", Integral, lambda value: value >= 1, "a whole number, at least 1"),
            ("seed", Integral, lambda value: value >= 0, "a whole number, 0 or more"),
        )
        for name, kind, right, wanted in limits:
            value = getattr(self, name)
            if value is None and name == "max_new_tokens":
                continue
            if isinstance(value, bool) or not isinstance(value, kind) or not right(value):
                raise ConfigError(f"generation.{name}={value} must be {wanted}")
        if not isinstance(self.do_sample, bool):
            raise ConfigError(f"generation.do_sample={self.do_sample} must be true or false")
        if self.do_sample and self.num_beams > 1:
            raise ConfigError(f"generation.do_sample=true and num_beams={self.num_beams} exclude each other")


@dataclass(frozen=True)
class Answer:
    """What a model wrote, token by token. An end-of-sequence token is not part of it.

    Attributes:
        text: the decoded answer.
        token_ids: the generated ids, exactly as they came (never re-tokenised), T of them.
        offsets: T character spans in ``text``; a token that adds no whole character has an empty span.
        logprobs: T natural-log probabilities of the tokens under the model's own (unprocessed) distribution.
        finished: the model ended by itself; False means cut off at ``max_new_tokens``.
    """

    text: str
    token_ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]
    logprobs: tuple[float, ...]
    finished: bool = True

    def __post_init__(self) -> None:
        if not len(self.token_ids) == len(self.offsets) == len(self.logprobs):
            raise ValueError(
                f"token_ids, offsets and logprobs differ in length: "
                f"{len(self.token_ids)}, {len(self.offsets)}, {len(self.logprobs)}"
            )

    @property
    def tokens(self) -> tuple[str, ...]:
        """The text of every token."""
        return tuple(self.text[start:end] for start, end in self.offsets)

    def covering(self, start: int, end: int) -> list[int]:
        """Indices of the tokens that share a character with ``text[start:end]``.

        >>> answer = Answer("a red car", (5, 6, 7), ((0, 1), (1, 5), (5, 9)), (0.0, 0.0, 0.0))
        >>> answer.covering(6, 9)
        [2]
        """
        return [index for index, (first, last) in enumerate(self.offsets) if first < end and last > start]

    def owners(self, mentions: Sequence[Mention]) -> list[Mention | None]:
        """The mention that every token is part of: the first of those with which it shares a character."""
        found: list[Mention | None] = [None] * len(self.token_ids)
        for mention in mentions:
            for index in self.covering(mention.start, mention.end):
                found[index] = found[index] or mention
        return found

    def until(self, count: int) -> Answer:
        """The first tokens of the answer."""
        end = self.offsets[count - 1][1] if count else 0
        return Answer(self.text[:end], self.token_ids[:count], self.offsets[:count], self.logprobs[:count], False)


@dataclass(frozen=True)
class Memory:
    """What a model needs, in bytes, before anything of it is loaded.

    Attributes:
        parameters: number of weights.
        dtype: what they are computed in.
        weights: bytes of all weights as they would be stored.
        cache: keys and values of a context and the logits of all steps while answers are generated.
        relevancy: about what the backward pass of one answer's relevancy keeps.
    """

    parameters: int
    dtype: str
    weights: int
    cache: int
    relevancy: int

    @property
    def total(self) -> int:
        """Weights and the larger of generating and explaining, which follow each other."""
        return self.weights + max(self.cache, self.relevancy)


@dataclass(frozen=True)
class Mention:
    """An object that an answer names, labelled by the task.

    Attributes:
        start, end: character span in the answer's text.
        object: canonical name.
        label: 1 hallucinated, 0 grounded, -1 not to be judged.
        number: how many mentions of any object came before in this answer, from 0.
        repeat: how many mentions of this same object came before, from 0.
    """

    start: int
    end: int
    object: str
    label: int
    number: int = 0
    repeat: int = 0


@dataclass(frozen=True)
class Score:
    """What a task makes of one answer.

    Attributes:
        status: ``ok``, or ``unparsed`` when the answer is not of the form that the task can judge.
        counts: numbers that add up over samples; the task's metrics are functions of their totals.
        detail: JSON-able facts for people who read the record (parsed reply, objects named, ...).
    """

    status: str
    counts: Mapping[str, float] = field(default_factory=dict)
    detail: Mapping[str, Any] = field(default_factory=dict)
