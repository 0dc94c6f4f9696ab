"""Print the lower bounds of pyproject.toml as constraints, to test them (``make floors``).

torch is left out: every release of it is a gigabyte, and builds for CPUs alone are not in every registry.

    python scripts/floors.py > floors.txt
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

LEFT_OUT = {"torch", "lvlm-stethoscope"}
BOUND = re.compile(r"(?P<name>[\w.-]+)\s*>=\s*(?P<version>[\w.]+)")


def floors(pyproject: Path) -> dict[str, str]:
    """Lower bounds by name, of the package and of everything that its tests need.

    Raises:
        ValueError: a dependency has no lower bound.
    """
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    versions: dict[str, str] = {}
    for requirement in [*project["dependencies"], *(line for lines in extras.values() for line in lines)]:
        if re.split(r"[\[><=; ]", requirement)[0] in LEFT_OUT:
            continue
        bound = BOUND.match(requirement)
        if bound is None:
            raise ValueError(f"{requirement!r} has no lower bound")
        if versions.setdefault(bound["name"], bound["version"]) != bound["version"]:
            raise ValueError(f"{bound['name']} has several lower bounds")
    return versions


if __name__ == "__main__":
    for name, version in sorted(floors(Path(__file__).parents[1] / "pyproject.toml").items()):
        print(f"{name}=={version}")
