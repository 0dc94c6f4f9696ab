"""Feature sets by the names of their files in ``conf/features``, without Hydra."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from stethoscope.errors import ConfigError, unknown
from stethoscope.features.selection import FeatureSet


def folder() -> Path:
    """Where the files lie."""
    import stethoscope.conf

    return Path(stethoscope.conf.__file__).parent / "features"


@cache
def set_names() -> tuple[str, ...]:
    """Names of all sets, such as ``fast`` or ``paper/svar``."""
    return tuple(path.relative_to(folder()).with_suffix("").as_posix() for path in sorted(folder().rglob("*.yaml")))


def named_set(name: str) -> FeatureSet:
    """The feature set of a name.

    Raises:
        ConfigError: there is none of that name.

    >>> named_set("paper/glsim").score
    'glsim_q'
    """
    import yaml

    if name not in set_names():
        raise ConfigError(unknown("feature set", name, set_names()))
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where PyYAML was built with it
    config = yaml.load((folder() / f"{name}.yaml").read_text(encoding="utf-8"), loader)
    return FeatureSet(**{key: value for key, value in config.items() if key != "_target_"})
