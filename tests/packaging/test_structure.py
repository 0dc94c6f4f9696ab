"""The dependency rule of the design, and that the light commands stay light."""

import ast
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# who may import whom inside the package: a module may import modules of its own or of an earlier layer
LAYERS = [
    {"errors", "background", "faults", "images", "markup", "media", "records", "trace", "digests", "lock", "processes"},
    {"metrics", "stats", "table", "features", "offsets", "fingerprint"},
    {"adapter", "task", "capture", "knockout", "lens", "loop", "noise", "rows", "spans", "states", "steps", "testbed"},
    {"relevancy", "pictures"},
    {
        "masking",
        "verification",
        "per_mention",
        "estimators",
        "factor",
        "conformal",
        "explain",
        "artefact",
        "hub",
        "lines",
        "tokens",
    },
    {"baselines", "detector", "judging", "leaderboard", "methods", "training", "warn", "columns", "transfer"},
    {"loggers", "store", "jobs"},
    {"run", "batch", "results", "callbacks", "maps", "evaluator", "sharing"},
    {"report"},
    {"build", "overrides"},
    {"diagnosis"},
    {"scoring", "streaming"},
    {"commands", "sweeps", "app", "cli", "__main__"},
]


def _layer(module: str) -> int:
    found = [index for index, names in enumerate(LAYERS) if module in names]
    assert found, f"stethoscope/{module} has no layer; put it into LAYERS"
    return found[0]


def _imports(path: Path) -> set[str]:
    """First name below ``stethoscope`` of everything a file imports, also inside functions."""
    names = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):  # what is imported for annotations only is no dependency
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {
                f"{node.module}.{alias.name}" if node.module == "stethoscope" else node.module for alias in node.names
            }
    return {name.split(".")[1] for name in names if name.startswith("stethoscope.")}


@pytest.mark.parametrize("path", sorted((ROOT / "stethoscope").rglob("*.py")), ids=lambda path: path.name)
def test_imports_point_downwards(path):
    module = path.relative_to(ROOT / "stethoscope").parts[0].removesuffix(".py")
    if module == "__init__":
        return
    for name in _imports(path) - {"__version__", "conf"}:
        assert name not in ("adapters", "tasks"), f"{path.name} names an adapter or a task; only configuration may"
        assert _layer(name) <= _layer(module), f"{path.name} imports stethoscope.{name} of a later layer"


@pytest.mark.parametrize("arguments", [["--help"], ["list"], ["list", "features"]], ids=" ".join)
def test_light_commands_import_no_torch_and_answer_at_once(arguments):
    script = (
        "import sys\nfrom stethoscope.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n"
        "    heavy = {'torch', 'transformers', 'datasets', 'sklearn'} & set(sys.modules)\n"
        "    sys.exit(f'imported {heavy}' if heavy or end.code else 0)"
    )
    before = _seconds_of_children()  # CPU time, since other processes share the machine
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert _seconds_of_children() - before < 0.5


def _seconds_of_children():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
