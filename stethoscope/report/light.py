"""Reading a saved detector without torch, which scikit-learn would otherwise load on the way."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

_BRIDGE = "sklearn.externals.array_api_compat.torch"


@contextmanager
def without_torch() -> Iterator[None]:
    """While it lasts, scikit-learn's bridge to torch cannot be imported.

    ``skops`` looks through all of scikit-learn's modules for estimators; the bridge, which holds none, imports torch:
    two seconds and some hundred megabytes for nothing. Not being there, it is passed over.
    """
    if _BRIDGE in sys.modules:
        yield
        return
    sys.modules[_BRIDGE] = None  # type: ignore[assignment]  # how Python marks a module that is not to be found
    try:
        yield
    finally:
        del sys.modules[_BRIDGE]
