"""Compute token features: pure functions of a trace, each with one column, or one column per layer or head.

Without a suffix the value belongs to the row that *predicts* the token, so it is known before the token is shown.
Papers differ in the row that they read: where both are offered, ``_q`` is that row and ``_c`` the next one, which
*consumes* the token. T tokens, L layers, H heads, N image tokens.
"""

from __future__ import annotations

import importlib
import pkgutil

from stethoscope.features import (  # the order of the registry  # isort: skip
    distributions as _distributions,  # noqa: F401
    attention as _attention,  # noqa: F401
    hidden_states as _hidden_states,  # noqa: F401
    contrast as _contrast,  # noqa: F401
    relevancy as _relevancy,  # noqa: F401
    verification as _verification,  # noqa: F401
)
from stethoscope.features.registry import (
    COSTS,
    DEFAULT_GROUPS,
    FEATURES,
    Feature,
    FeatureSet,
    feature,
    named_set,
    set_names,
)

for _module in pkgutil.iter_modules(__path__):  # a file that is added here needs no entry in a list
    if _module.name != "columns":  # it defines no feature, and imports pandas, for which `list` would have to wait
        importlib.import_module(f"{__name__}.{_module.name}")

GROUPS = tuple(dict.fromkeys(item.group for item in FEATURES.values()))

__all__ = [
    "COSTS", "DEFAULT_GROUPS", "FEATURES", "GROUPS", "Feature", "FeatureSet", "feature", "named_set", "set_names",
]  # fmt: skip
