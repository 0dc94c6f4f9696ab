"""Implement ``stethoscope list``: print the configuration choices with a line each. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from stethoscope.core.component import choices, groups
from stethoscope.core.errors import ConfigError, unknown

USAGE = """usage: stethoscope list [GROUP]

Prints the names that can follow `group=` on the command line, a line each; without GROUP, all of them.
`stethoscope list features` also explains every single feature."""


def main(arguments: Sequence[str]) -> None:
    """Print the choices of one configuration group, or of all."""
    if any(word in ("-h", "--help") for word in arguments):
        print(USAGE)
        return
    known = {**{group: group for group in groups()}, **{f"{group}s": group for group in groups()}}
    for word in arguments:
        if word not in known:
            raise ConfigError(unknown("group", word, groups()))
    for group in [known[word] for word in arguments] or groups():
        print(f"{group}=")
        for name, text in choices(group).items():
            print(f"  {name:<26} {text}")
            if group == "features":
                print(f"  {'':<26} {_cost(name)}")
    if "features" in arguments:
        _print_features()


def _cost(name: str) -> str:
    """Describe how many features a configuration of the group ``features`` chooses, and their cost."""
    from stethoscope.features import named_set

    chosen = named_set(name)
    count = len(chosen.features)
    return f"{count} feature{'s' * (count != 1)}, {chosen.cost}"


def _print_features() -> None:
    """Print the registry: group, name, meaning of high values, cost, summary."""
    from stethoscope.features import FEATURES

    print("\nfeatures (columns of tokens.parquet; high values speak for ...)")
    for item in FEATURES.values():
        print(f"  {item.group:<12} {item.name:<26} {item.higher_means:<13} {item.cost:<30} {item.summary}")
