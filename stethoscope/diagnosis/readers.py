"""What finds the objects that a text names. Which function that is, configuration says; no task is named here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Protocol


class Found(Protocol):
    """An object that a text names: canonical name and characters."""

    name: str
    start: int
    end: int


Reader = Callable[[str], Iterable[Found]]


def reader(path: str, plugins: Sequence[str] = ()) -> Reader:
    """The function of a dotted path.

    Raises:
        ConfigError: as ``build.import_name``.
    """
    from stethoscope.core.component import import_name

    return import_name(path, "mentions", plugins)


@lru_cache(maxsize=1)
def default_reader() -> Reader:
    """The function that ``conf/diagnose.yaml`` names."""
    from omegaconf import OmegaConf

    from stethoscope.core.component import conf_folder

    return reader(OmegaConf.load(conf_folder() / "diagnose.yaml").mentions)
