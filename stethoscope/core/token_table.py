"""Define the token table: one row per answer token, with key columns and feature columns."""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Literal, TypedDict

import numpy as np

from stethoscope.core.errors import ConfigError, DataError, unknown, wrong_type
from stethoscope.core.text import listed

if TYPE_CHECKING:
    import pandas as pd

TABLE = "a token table (pandas.DataFrame), such as RunStore(...).tokens() reads"
KEY_COLUMNS: dict[str, str] = {
    "task": "name of the task",
    "subset": "part of the task that is reported on its own",
    "sample_id": "id of the sample, unique within its task",
    "group": "id of the image: the unit of data splits and of the bootstrap",
    "token": "index of the token in the answer, from 0",
    "token_id": "id of the token in the model's vocabulary",
    "text": "text of the token",
    "start": "character of the answer at which the token starts",
    "end": "character of the answer at which the token ends (exclusive)",
    "label": "1 hallucinated, 0 grounded, -1 not judged (the token names no object)",
    "object": "canonical name of the object that the token names, empty if none",
    "mention_index": "how many object mentions came before in this answer, -1 if the token is part of none",
    "repeat_index": "how many mentions of the same object came before in this answer, -1 if none",
    "is_first_subtoken": "the token is the first sub-token of its mention",
    "prompt_hash": "first 16 hexadecimal digits of the SHA-256 of the prompt's text, as the model read it",
    "labeller": "what labelled the mentions: name and version of the task, such as chair/1",
    "picture": "statistics of the picture's pixels (``core.picture_profile``) as text; empty in older tables",
    "image_tokens": "vectors of the picture at the input of the language model as text (``unpack_vectors``), with "
    "hidden states or ``attended_embedding`` in the table; empty otherwise. A file has them in the first row of an "
    "answer only",
}
"""Meaning of every key column. All other columns of a token table are features (float32)."""

IMAGE_TOKENS = "image_tokens"
"""Key column that a detector reads beside the features."""

_SUFFIX = re.compile(r"_(l\d+(h\d+|_d\d+)?|d\d+)$")  # a column per layer, head or dimension of it, or dimension
_DIMENSION = re.compile(r"_d\d+$")

SUBTOKENS = ("first", "mean", "max", "min", "all")
Subtokens = Literal["first", "mean", "max", "min", "all"]
Repeats = Literal["first", "all"]


class MentionSelection(TypedDict, total=False):
    """Arguments of ``mention_rows`` that detectors which are compared must share."""

    subtokens: Subtokens
    repeats: Repeats


def check_table(table: object) -> None:
    """Check that an argument is a table; raise a ConfigError otherwise."""
    if not hasattr(table, "columns"):
        raise wrong_type("table", TABLE, table)


def feature_names(table: pd.DataFrame) -> tuple[str, ...]:
    """List the feature columns, in the table's order.

    >>> import pandas as pd
    >>> feature_names(pd.DataFrame({"token": [0], "entropy": [0.1], "label": [1]}))
    ('entropy',)

    Raises:
        ConfigError: it is no table.
    """
    check_table(table)
    return tuple(str(name) for name in table.columns if name not in KEY_COLUMNS)


@dataclass(frozen=True)
class FeatureSchema:
    """The names of a set of features.

    Two schemas are equal in ``hash`` if they have the same names, in any order.

    >>> FeatureSchema(("a", "b")).hash == FeatureSchema(("b", "a")).hash
    True
    """

    names: tuple[str, ...]

    @classmethod
    def of(cls, table: pd.DataFrame) -> FeatureSchema:
        """Build the schema of a token table's feature columns."""
        return cls(feature_names(table))

    @cached_property
    def hash(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of the sorted names."""
        return hashlib.sha256(json.dumps(sorted(self.names)).encode()).hexdigest()[:16]

    def difference(self, other: FeatureSchema) -> str:
        """Describe in one line the names that ``other`` lacks or adds; empty if there are none.

        >>> FeatureSchema(("a", "b")).difference(FeatureSchema(("b", "c")))
        'missing: a; not expected: c'
        """
        parts = (
            ("missing", sorted(set(self.names) - set(other.names))),
            ("not expected", sorted(set(other.names) - set(self.names))),
        )
        return "; ".join(f"{kind}: {listed(names)}" for kind, names in parts if names)


def object_index(rows: pd.DataFrame, objects: tuple[str, ...]) -> np.ndarray:
    """Return the index in ``objects`` of every row's object, (rows,) int, -1 for any other."""
    import pandas as pd  # light commands read the names of columns alone

    return pd.Index(objects).get_indexer(pd.Index(rows["object"].to_numpy(dtype=str)))


def require(table: pd.DataFrame, columns: Iterable[str]) -> None:
    """Check that a table has the columns.

    Raises:
        ConfigError: it is no table.
        DataError: one is missing; the message names it.
    """
    check_table(table)
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise DataError(f"the token table has no column {', '.join(missing)}; create it with `stethoscope extract`")


def pack_vectors(vectors: np.ndarray) -> str:
    """Write (N, D) vectors as text, in half precision.

    >>> unpack_vectors(pack_vectors(np.array([[0.5, -2.0]]))).tolist()
    [[0.5, -2.0]]
    """
    halves = in_half_precision(vectors)
    return f"{halves.shape[1]} {base64.b64encode(halves.tobytes()).decode()}"


def in_half_precision(vectors: np.ndarray) -> np.ndarray:
    """Round numbers to half precision, as ``pack_vectors`` stores them; little-endian float16."""
    limit = float(np.finfo(np.float16).max)
    return np.clip(vectors, -limit, limit).astype("<f2")


def unpack_vectors(text: str) -> np.ndarray:
    """Read what ``pack_vectors`` wrote, (N, D) float32.

    Raises:
        DataError: the text is something else.
    """
    size, _, packed = text.partition(" ")
    try:
        values = np.frombuffer(base64.b64decode(packed, validate=True), "<f2").astype(np.float32)
        vectors = values.reshape(-1, int(size))
    except ValueError:
        vectors = np.zeros((0, 0), np.float32)
    if not vectors.size or not np.isfinite(vectors).all():
        raise DataError(f"the token table's image_tokens hold no vectors: {text[:40]!r}; compute its features again")
    return vectors


def mention_rows(
    table: pd.DataFrame,
    subtokens: Subtokens = "first",
    repeats: Repeats = "first",
    judged: bool = True,
) -> pd.DataFrame:
    """Select the object mentions of a token table, on which detectors are trained and evaluated.

    Args:
        table: a token table.
        subtokens: row of a mention of several sub-tokens: the ``first`` (as published: the decision is made when the
            name begins), the ``mean``, ``max`` or ``min`` of every feature over all of them (for a state, which is a
            vector, always the mean), or ``all`` of them, a row each. Key columns are always those of the first.
        repeats: ``first`` for only the first mention of every object in an answer (the field's protocol: later ones
            carry almost no information), or ``all``.
        judged: select only mentions with a label of 0 or 1.

    Returns:
        The rows, indexed from 0. Applied to its own result the function changes nothing.

    Raises:
        DataError: a key column is missing, or a setting has another value.
    """
    require(table, ("label", "is_first_subtoken", "repeat_index"))
    if subtokens not in SUBTOKENS:
        raise DataError(f"subtokens={subtokens!r} should be one of {', '.join(SUBTOKENS)}")
    if repeats not in ("first", "all"):
        raise DataError(f"repeats={repeats!r} should be first or all")
    keep = table["label"].to_numpy() >= 0 if judged else table["repeat_index"].to_numpy() >= 0
    if repeats == "first":
        keep &= table["repeat_index"].to_numpy() == 0
    first = table["is_first_subtoken"].to_numpy(dtype=bool)
    if subtokens in ("first", "all"):
        return table[keep & first if subtokens == "first" else keep].reset_index(drop=True)
    import pandas as pd  # not for those who need the names of columns only

    require(table, ("task", "sample_id", "mention_index"))
    names = list(feature_names(table))
    rows = table[keep & first].reset_index(drop=True)
    states = [name for name in names if _DIMENSION.search(name)]
    plain = [name for name in names if name not in set(states)]
    grouped = table[keep].groupby(["task", "sample_id", "mention_index"], sort=False)
    whole = pd.concat([grouped[plain].agg(subtokens), grouped[states].mean()], axis=1)[names]
    keys = pd.MultiIndex.from_frame(rows[["task", "sample_id", "mention_index"]])
    rows[names] = whole.loc[keys].to_numpy(dtype=np.float32)
    return rows


def reduce_subtokens(rows: np.ndarray, names: Sequence[str], subtokens: Subtokens) -> np.ndarray:
    """Reduce the features of a mention's sub-tokens to one row, (1, features), as ``mention_rows`` does.

    Args:
        rows: (sub-tokens, features) without missing values.
        names: of the features.
        subtokens: see ``mention_rows``; with ``all``, as with ``first``, the first one's.
    """
    if len(rows) == 1 or subtokens in ("first", "all"):
        return rows[:1]
    states = np.array([_DIMENSION.search(name) is not None for name in names])
    reduced = getattr(rows, subtokens)(0)
    return np.where(states, rows.mean(0), reduced)[None]


def feature_matrix(table: pd.DataFrame, names: Iterable[str]) -> np.ndarray:
    """Convert feature columns to a float64 array (rows, features); NaN marks an undefined value.

    Raises:
        DataError: a column is missing or holds something else than numbers, or a value is infinite.
    """
    names = list(names)
    require(table, names)
    try:
        matrix = table[names].to_numpy(dtype=np.float64)
    except (TypeError, ValueError) as error:
        others = ", ".join(name for name in names if table[name].dtype.kind not in "fiub")
        raise DataError(f"columns of features should hold numbers; {others} does not: {error}") from None
    infinite = np.isinf(matrix).any(axis=0)
    if infinite.any():
        affected = ", ".join(name for name, flag in zip(names, infinite, strict=True) if flag)
        raise DataError(f"features with infinite values: {affected}; they should be finite, or NaN where undefined")
    return matrix


@lru_cache(2**14)
def stem(column: str) -> str:
    """Return the feature of a column: its name without layer, head or dimension.

    >>> [stem(column) for column in ("nll", "attn_image_l00", "head_image_l00h03", "hidden_d0012", "state_l01_d0012")]
    ['nll', 'attn_image', 'head_image', 'hidden', 'state']
    """
    return _SUFFIX.sub("", column)


def check_patterns(patterns: Sequence[str], features: Sequence[str], kind: str = "feature") -> None:
    """Check, before anything is computed, that patterns can match columns of some features.

    Args:
        patterns: to check.
        features: names of the features.
        kind: what a pattern stands for, in messages.

    Raises:
        ConfigError: a pattern cannot match.

    >>> check_patterns(["nll", "attn_*_l0?", "attn_image_l01"], ["nll", "attn_image"])
    """
    for pattern in patterns:
        start = re.split(r"[*?[]", pattern)[0]
        open_end = start != pattern
        if not any(
            name == pattern or start.startswith(f"{name}_") or (open_end and name.startswith(start))
            for name in features
        ):
            raise ConfigError(unknown(kind, pattern, features))


def select_features(
    names: Sequence[str], include: Sequence[str] | None = None, exclude: Sequence[str] = ()
) -> tuple[str, ...]:
    """Select the names that match an included pattern and no excluded one, in their order.

    Raises:
        ConfigError: a name or pattern matches nothing, or no name is left.

    >>> select_features(["nll", "entropy", "svar_l00", "svar_l01"], ["svar_*", "nll"], ["*_l01"])
    ('nll', 'svar_l00')
    """
    known = set(names)

    def matching(patterns: Sequence[str], kind: str = "feature") -> set[str]:
        matches: set[str] = set()
        for pattern in patterns:
            plain = not set(pattern) & set("*?[")  # a name, of which a learner may have hundreds
            fits = known & {pattern} if plain else {name for name in names if fnmatch.fnmatchcase(name, pattern)}
            if not fits:
                raise ConfigError(unknown(kind, pattern, {stem(name) for name in names}))
            matches |= fits
        return matches

    included = known if include is None else matching(include)
    excluded = matching(exclude, "feature to exclude")
    selected = tuple(name for name in names if name in included and name not in excluded)
    if not selected:
        raise ConfigError(f"features={include} without exclude={list(exclude)} leaves no feature of {len(names)}")
    return selected
