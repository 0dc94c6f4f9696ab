"""What is installed: exact versions, each with its digests and none of them a beta, and bounds that are all there."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
from floors import floors  # noqa: E402 - a script beside the package
from sbom import bill  # noqa: E402

PIN = re.compile(r"^(?P<name>[\w.-]+)==(?P<version>[\w.+!]+)", re.MULTILINE)


def pins(name):
    """Versions by normalised name."""
    text = (ROOT / name).read_text()
    return {re.sub(r"[-_.]+", "-", pin["name"]).lower(): pin["version"] for pin in PIN.finditer(text)}


def test_the_lock_file_has_the_versions_of_the_constraints():
    constraints, locked = pins("constraints.txt"), pins("constraints-hashes.txt")
    shared = constraints.keys() & locked.keys()
    assert len(shared) > 100
    assert {name: locked[name] for name in shared} == {name: constraints[name] for name in shared}
    assert "torch" not in locked
    assert constraints.keys() - locked.keys() <= {"torch", "bitsandbytes"}


def test_every_pin_has_a_digest():
    blocks = re.split(r"\n(?=\S)", (ROOT / "constraints-hashes.txt").read_text().strip())
    assert all("--hash=sha256:" in block for block in blocks)


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-hashes.txt"])
def test_nothing_is_a_release_before_the_final_one(name):
    early = {package: version for package, version in pins(name).items() if re.search(r"\d(a|b|rc|\.?dev)\d", version)}
    assert early == {}


def test_every_dependency_has_a_lower_bound():
    bounds = floors(ROOT / "pyproject.toml")
    assert bounds["scikit-learn"] == "1.7"
    assert "torch" not in bounds
    assert "skops" not in bounds


def test_the_bill_of_materials_names_all_that_is_needed(tmp_path):
    (tmp_path / "made.whl").write_bytes(b"wheel")
    written = bill([tmp_path / "made.whl"])
    names = {component["name"] for component in written["components"]}
    assert {"torch", "transformers", "numpy", "safetensors", "scipy"} <= names
    assert not {"pytest", "gradio", "lvlm-stethoscope"} & names
    references = {component["bom-ref"] for component in written["components"]}
    needed = {reference for entry in written["dependencies"] for reference in entry["dependsOn"]}
    assert needed == references, "each is needed by another, and none is left out"
    assert str(Path.home()) not in str(written)
