"""Implement ``stethoscope list``: print the configuration choices with a line each. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import cleandoc
from textwrap import indent

from stethoscope.core.component import choices, groups, import_plugins, package_names
from stethoscope.core.errors import ConfigError, unknown
from stethoscope.core.text import counted

USAGE = """usage: stethoscope list [GROUP [NAME ...]] [plugins=PACKAGE,...]

Prints the names that can follow `group=` on the command line, a line each; without GROUP, all of them.
`stethoscope list features` also explains every single feature, `stethoscope list features NAME` those of a name: a
single feature (with its documentation), a group of features, or a choice that can follow `features=`.
plugins: your own packages, whose features are listed too."""


def main(arguments: Sequence[str]) -> None:
    """Print the choices of configuration groups, all of them or those named."""
    given = [word for word in arguments if word.startswith("plugins=")]
    import_plugins([name for word in given for name in package_names(word.partition("=")[2])])
    arguments = [word for word in arguments if word not in given]
    for group, names in _names_by_group(arguments).items():
        if group == "features" and arguments:
            _print_features(names)
        else:
            _print_choices(group, names)


def _names_by_group(arguments: Sequence[str]) -> dict[str, list[str]]:
    """Read the command line: names by the group that they follow; all groups if there are none.

    Raises:
        ConfigError: a word is an option, or neither a group nor, after one, a name in it.
    """
    if not arguments:
        return {group: [] for group in groups()}
    known = {**{group: group for group in groups()}, **{f"{group}s": group for group in groups()}}
    named: dict[str, list[str]] = {}
    group = ""
    for word in arguments:
        if word.startswith("-"):
            raise ConfigError(f"{word} is no option of list, which takes GROUP, NAME and plugins=PACKAGE")
        if word in known:
            group = known[word]
            named.setdefault(group, [])
        elif not group:
            raise ConfigError(unknown("group", word, groups()))
        else:
            named[group].append(word)
    return named


def _print_choices(group: str, names: Sequence[str]) -> None:
    available = choices(group)
    for name in names:
        if name not in available:
            raise ConfigError(unknown(f"choice of {group}", name, available))
    print(f"{group}=")
    for name in names or available:
        print(f"  {name:<26} {available[name]}")
        if group == "features":
            from stethoscope.features import named_set  # the other groups need none of its modules

            chosen = named_set(name)
            print(f"  {'':<26} {counted(len(chosen.features), 'feature')}, {chosen.cost}")


def _print_features(names: Sequence[str]) -> None:
    """Print named sets and single features, or explain those that are named."""
    from stethoscope.features import FEATURES

    sets, own = choices("features"), {item.group for item in FEATURES.values()}
    for name in names:
        if name not in {*sets, *own, *FEATURES}:
            raise ConfigError(
                unknown("feature, group of features or choice of features", name, sorted({*FEATURES, *own, *sets}))
            )
    if not names or not sets.keys().isdisjoint(names):
        _print_choices("features", [name for name in names if name in sets])
    rows = FEATURES if not names else {k: item for k, item in FEATURES.items() if {k, item.group} & {*names}}
    if rows:
        print("\nfeatures (columns of tokens.parquet; high values speak for ...)")
    for name, item in rows.items():
        print(f"  {item.group:<12} {item.name:<26} {item.higher_means:<13} {item.cost:<30} {item.summary}")
        if name in names:
            details = cleandoc(item.document).partition("\n")[2].strip()
            reads = f"Reads of a trace, beyond the logits: {', '.join(sorted(item.requires)) or 'nothing'}."
            print(indent("\n\n".join(filter(None, (details, reads))), " " * 15))
