"""What finds the objects that a text names. Which function that is, configuration says; no task is named here."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Protocol

from stethoscope.errors import ConfigError


class Found(Protocol):
    """An object that a text names: canonical name and characters."""

    name: str
    start: int
    end: int


Reader = Callable[[str], Iterable[Found]]


def reader(path: str, plugins: Sequence[str] = ()) -> Reader:
    """The function of a dotted path.

    Raises:
        ConfigError: it is outside the packages that may be used, or there is no such function.
    """
    module, _, name = str(path).rpartition(".")
    allowed = ("stethoscope", *plugins)
    if module.split(".")[0] not in allowed:
        raise ConfigError(
            f"mentions={path!r} is outside the packages that may be used ({', '.join(allowed)}); "
            f"add plugins=[{module.split('.')[0] or '<package>'}] if you trust it"
        )
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"mentions={path!r} cannot be imported: {error}") from None
    if not callable(function):
        raise ConfigError(f"mentions={path!r} is no function of a text")
    return function


@lru_cache(maxsize=1)
def default_reader() -> Reader:
    """The function that ``conf/diagnose.yaml`` names."""
    from omegaconf import OmegaConf

    from stethoscope.build import conf_folder

    return reader(OmegaConf.load(conf_folder() / "diagnose.yaml").mentions)
