"""Write a software bill of materials of the package (CycloneDX 1.6, JSON).

It has everything that the package needs to run.

It has the versions that are installed here, which are those that the release was tested with.

    python scripts/sbom.py dist
"""

from __future__ import annotations

import argparse
import hashlib
import json
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

NAME = "lvlm-stethoscope"


def installed_closure(name: str) -> dict[str, list[str]]:
    """Map a distribution, and everything below it, to the names of what each needs.

    Extras of the first are left out.

    Raises:
        PackageNotFoundError: a requirement is not installed.
    """
    edges: dict[str, list[str]] = {}
    pending: list[tuple[str, frozenset[str]]] = [(canonicalize_name(name), frozenset())]
    seen = set()
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        package, extras = current
        needed = edges.setdefault(package, [])
        for line in metadata.requires(package) or []:
            requirement = Requirement(line)
            wanted = [{"extra": extra} for extra in ("", *extras)]
            if requirement.marker is None or any(requirement.marker.evaluate(extra) for extra in wanted):
                child = canonicalize_name(requirement.name)
                needed += [child] if child not in needed else []
                pending.append((child, frozenset(requirement.extras)))
    return edges


def component(name: str) -> dict[str, Any]:
    """Describe a distribution as a component: name, version, package URL and license."""
    details, version = metadata.metadata(name), metadata.version(name).partition("+")[0]  # without the kind of build
    purl = f"pkg:pypi/{name}@{version}"
    entry = {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}
    license_name = details.json.get("license_expression")
    return entry | ({"licenses": [{"expression": license_name}]} if license_name else {})


def bill(files: list[Path]) -> dict[str, Any]:
    """Build the bill of materials as a JSON object, with the SHA-256 of the release's files."""
    edges = installed_closure(NAME)
    components = {name: component(name) for name in sorted(edges)}
    own = components.pop(NAME) | {"type": "application"}
    hashes = [
        {"type": "file", "name": path.name, "hashes": [{"alg": "SHA-256", "content": hashlib.sha256(data).hexdigest()}]}
        for path in files
        for data in [path.read_bytes()]
    ]
    references = {name: entry["bom-ref"] for name, entry in {**components, NAME: own}.items()}
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": own | {"components": hashes}},
        "components": list(components.values()),
        "dependencies": [
            {"ref": references[name], "dependsOn": sorted(references[child] for child in children)}
            for name, children in sorted(edges.items())
        ],
    }


def main() -> None:
    """Write the bill beside the release's files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with the wheel and the source archive")
    folder = parser.parse_args().folder
    files = sorted(path for path in folder.iterdir() if path.suffix in (".whl", ".gz"))
    path = folder / f"{NAME}-{metadata.version(NAME)}.cdx.json"
    path.write_text(json.dumps(bill(files), indent=2) + "\n", encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
