"""Feature sets by the names of their files in ``conf/features``, without Hydra."""

from __future__ import annotations

from pathlib import Path

from stethoscope.errors import ConfigError, unknown
from stethoscope.features.selection import FeatureSet


def folder() -> Path:
    """Where the files lie."""
    import stethoscope.conf

    return Path(stethoscope.conf.__file__).parent / "features"


def set_names() -> list[str]:
    """Names of all sets, such as ``fast`` or ``paper/svar``."""
    return [path.relative_to(folder()).with_suffix("").as_posix() for path in sorted(folder().rglob("*.yaml"))]


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
    config = yaml.safe_load((folder() / f"{name}.yaml").read_text(encoding="utf-8"))
    return FeatureSet(**{key: value for key, value in config.items() if key != "_target_"})
