"""Tell which columns of a token table hold which features, and whether two tables mean the same by them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from stethoscope.core.errors import ArtefactError, ConfigError
from stethoscope.core.token_table import KEY_COLUMNS, feature_names
from stethoscope.features import FEATURES

if TYPE_CHECKING:
    import pandas as pd


MOST = 6  # names in a message


_LAYER = re.compile(r"_l\d+(h\d+)?")


def feature_of(column: str) -> str:
    """Name of the feature that a column holds, or one layer or head of; a column of no known feature stands for itself.

    >>> feature_of("attn_image_l00"), feature_of("nll"), feature_of("mine_l3")
    ('attn_image', 'nll', 'mine_l3')
    """
    fits = [name for name in FEATURES if column == name or column.startswith(f"{name}_")]
    return max(fits, key=len) if fits else column


def only(table: pd.DataFrame, names: Iterable[str]) -> pd.DataFrame:
    """The table with the key columns that it has and these features."""
    wanted = {*KEY_COLUMNS, *names}
    return table[[column for column in table.columns if column in wanted]]


def select_columns(table: pd.DataFrame, features: Sequence[str], where: str, remedy: str) -> pd.DataFrame:
    """The table with all columns of some features and no others.

    Args:
        table: a token table.
        features: names, of the catalogue.
        where: what the table is called in messages.
        remedy: the command that computes the features, for messages.

    Raises:
        ArtefactError: a feature has no column; the message names it and the command.
    """
    owners = {column: feature_of(column) for column in feature_names(table)}
    lacking = [name for name in features if name not in owners.values()]
    if lacking:
        raise ArtefactError(
            f"{where} has no columns of {len(lacking)} of {len(features)} features ({shorten(lacking)}); `{remedy}` "
            "computes them, nothing is generated again; or leave them out: features.exclude=[...]"
        )
    return only(table, [column for column, owner in owners.items() if owner in set(features)])


def fitting(table: pd.DataFrame, names: Sequence[str], where: str) -> pd.DataFrame:
    """The table with these feature columns and no others, if they mean there what they meant where they come from.

    Layers are numbered: column ``_l03`` of a model of eight layers is not that of a model of thirty-two. A table may
    therefore neither lack one of the layers or heads of a feature nor have more of them.

    Args:
        table: a token table.
        names: of columns.
        where: what the table is called in messages.

    Raises:
        ConfigError: a column is missing, or a feature has other layers or heads; the message names them.
    """
    theirs = feature_names(table)
    missing = [name for name in names if name not in theirs]
    layered = {feature_of(name) for name in names if _LAYER.search(name)}
    deeper = [name for name in theirs if name not in names and feature_of(name) in layered and _LAYER.search(name)]
    if missing or deeper:
        parts = [f"lacks {len(missing)} columns ({shorten(missing)})"] if missing else []
        parts += [f"has {len(deeper)} layers or heads more ({shorten(deeper)})"] if deeper else []
        raise ConfigError(
            f"{where} {' and '.join(parts)}: a column of one layer means the same only in a model of the same depth. "
            "Choose features without layers (features=uncertainty, or detector.exclude=['*_l*']), or compute the "
            "missing ones with `stethoscope extract`"
        )
    return only(table, names)


def states_of(columns: Iterable[str]) -> list[str]:
    """The features among columns of which these are dimensions of a state.

    >>> states_of(["nll", "looked_at_000", "looked_at_001"])
    ['looked_at']
    """
    vectors = tuple(name for name, feature in FEATURES.items() if feature.vector)
    owners = dict.fromkeys(feature_of(column) for column in columns if column.startswith(vectors))
    return [owner for owner in owners if owner in vectors]


def one_space(names: Sequence[str], home: Mapping[str, Any], there: Mapping[str, Any], where: str) -> None:
    """Checks that dimensions of states are those of the model that they were learned from.

    States of all models may have one width (``looked_at`` has 256 columns in all large ones), and mean nothing to each
    other.

    Args:
        names: of columns.
        home, there: fingerprints of both models, see ``Adapter.fingerprint``; without ``weights`` nothing is known.
        where: what the second one is called in messages.

    Raises:
        ConfigError: a column is a dimension of a state, and the weights are not the same.
    """
    states, weights = states_of(names), [model.get("weights") for model in (home, there)]
    if states and None not in weights and weights[0] != weights[1]:
        without = ",".join(f"'{name}*'" for name in states)
        raise ConfigError(
            f"{where} has other weights than the model that the detector learns from, {home.get('model_id')}, and "
            f"{shorten(states)} are states, which mean nothing in another model. Leave them out when you train: "
            f"detector.exclude=[{without}]"
        )


def shorten(names: Sequence[str]) -> str:
    """The first few of many names."""
    more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    return ", ".join(names[:MOST]) + more
