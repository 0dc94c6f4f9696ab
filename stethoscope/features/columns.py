"""Map the columns of a token table to features, and check that two tables agree on them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stethoscope.core.errors import ArtefactError, ConfigError
from stethoscope.core.text import counted, listed
from stethoscope.core.token_table import KEY_COLUMNS, feature_names
from stethoscope.features import FEATURES

if TYPE_CHECKING:
    import pandas as pd


_LAYER = re.compile(r"_l\d+(h\d+)?")


def feature_of(column: str) -> str:
    """Return the feature that a column belongs to, or the column itself if no feature is known.

    >>> feature_of("attn_image_l00"), feature_of("nll"), feature_of("mine_l3")
    ('attn_image', 'nll', 'mine_l3')
    """
    name = column
    while name and name not in FEATURES:
        name = name.rpartition("_")[0]
    return name or column


def group_of(column: str) -> str:
    """Return the group of the feature that a column belongs to; empty if no feature is known.

    >>> group_of("attn_image_l00"), group_of("mine")
    ('attention', '')
    """
    feature = FEATURES.get(feature_of(column))
    return "" if feature is None else feature.group


def keep_columns(table: pd.DataFrame, names: Iterable[str]) -> pd.DataFrame:
    """Keep the key columns of a table and some feature columns, in their order."""
    kept = {*KEY_COLUMNS, *names}
    return table[[column for column in table.columns if column in kept]]


def select_columns(table: pd.DataFrame, features: Sequence[str], label: str, remedy: str) -> pd.DataFrame:
    """Keep all columns of some features and no other feature columns.

    Args:
        table: a token table.
        features: names in the registry.
        label: name of the table in messages.
        remedy: the command that computes the features, for messages.

    Raises:
        ArtefactError: a feature has no column; the message names it and the command.
    """
    owners = {column: feature_of(column) for column in feature_names(table)}
    lacking = [name for name in features if name not in owners.values()]
    if lacking:
        raise ArtefactError(
            f"{label} has no columns of {len(lacking)} of {len(features)} features ({listed(lacking)}); compute them "
            f"with `{remedy}` (nothing is generated again), or leave them out: features.exclude=[...]"
        )
    return keep_columns(table, [column for column, owner in owners.items() if owner in set(features)])


def matching_columns(table: pd.DataFrame, names: Sequence[str], label: str) -> pd.DataFrame:
    """Keep some feature columns only, after checking that they have the same meaning in the table.

    Layers are numbered: column ``_l03`` of a model of eight layers is not that of a model of thirty-two. A table may
    therefore neither lack one of the layers or heads of a feature nor have more of them.

    Args:
        table: a token table.
        names: of the columns.
        label: name of the table in messages.

    Raises:
        ConfigError: a column is missing, or a feature has other layers or heads; the message names them.
    """
    available = feature_names(table)
    missing = [name for name in names if name not in available]
    layered = {feature_of(name) for name in names if _LAYER.search(name)}
    deeper = [name for name in available if name not in names and feature_of(name) in layered and _LAYER.search(name)]
    if missing or deeper:
        parts = [f"lacks {counted(len(missing), 'column')} ({listed(missing)})"] if missing else []
        parts += [f"has {len(deeper)} layers or heads more ({listed(deeper)})"] if deeper else []
        raise ConfigError(
            f"{label} {' and '.join(parts)}: a column of one layer means the same only in a model of the same depth. "
            "Choose features without layers (features=uncertainty, or detector.exclude=['*_l*']), or compute the "
            "missing ones with `stethoscope extract`"
        )
    return keep_columns(table, names)


def states_of(columns: Iterable[str]) -> list[str]:
    """List the features whose columns, among these, are dimensions of a state.

    >>> states_of(["nll", "attended_embedding_000", "attended_embedding_001"])
    ['attended_embedding']
    """
    vectors = tuple(name for name, feature in FEATURES.items() if feature.vector)
    owners = dict.fromkeys(feature_of(column) for column in columns if column.startswith(vectors))
    return [owner for owner in owners if owner in vectors]


def check_same_model(names: Sequence[str], source: Mapping[str, Any], target: Mapping[str, Any], label: str) -> None:
    """Check that columns that are dimensions of a state come from the model that they were learned from.

    States of different models cannot be compared, even where they have the same width (``attended_embedding`` has 256
    columns in all large models).

    Args:
        names: of the columns.
        source: fingerprint of the model that they were learned from, see ``Adapter.fingerprint``.
        target: fingerprint of the other model, at least its ``weights``; nothing is checked where one of the two has
            none.
        label: name of the other model in messages.

    Raises:
        ConfigError: a column is a dimension of a state, and the weights are not the same.
    """
    states, weights = states_of(names), [model.get("weights") for model in (source, target)]
    if states and None not in weights and weights[0] != weights[1]:
        exclude = ",".join(f"'{name}*'" for name in states)
        raise ConfigError(
            f"{label} has other weights than the model that the detector learns from, {source.get('model_id')}, and "
            f"{listed(states)} are states, which cannot be compared between models. Leave them out when you train: "
            f"detector.exclude=[{exclude}]"
        )
