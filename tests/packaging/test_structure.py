"""The dependency rule of the design, and that the light commands stay light."""

import ast
import resource
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# who may import whom inside the package: a module may import modules of its own or of an earlier layer
LAYERS = [
    {"errors", "core"},
    {
        "background",
        "faults",
        "images",
        "markup",
        "media",
        "records",
        "redaction",
        "terminal",
        "trace",
        "runs.digests",
        "runs.lock",
        "runs.processes",
    },
    {"metrics", "stats", "table", "features", "offsets", "runs.fingerprint"},
    {
        "adapter",
        "task",
        "tracing.capture",
        "tracing.knockout",
        "tracing.lens",
        "streaming.loop",
        "tracing.noise",
        "tracing.rows",
        "tracing.spans",
        "tracing.states",
        "streaming.steps",
        "testbed",
    },
    {"relevancy", "pictures"},
    {
        "tracing.masking",
        "tracing.verification",
        "tracing.per_mention",
        "detection.arrays",
        "detection.inference",
        "detection.estimators",
        "detection.factor",
        "detection.conformal",
        "detection.explain",
        "detection.sight",
        "detection.artefact",
        "detection.hub",
        "runs.lines",
        "runs.tokens",
    },
    {
        "detection.baselines",
        "detector",
        "detection.judging",
        "detection.leaderboard",
        "detection.methods",
        "detection.training",
        "detection.warn",
        "detection.columns",
        "detection.finding",
        "detection.inputs",
        "detection.settings",
        "detection.transfer",
    },
    {"loggers", "runs.store", "runs.jobs"},
    {"runs.run", "batch", "runs.results", "callbacks", "runs.maps", "evaluator", "runs.selection", "runs.sharing"},
    {"report"},
    {"build", "commands.overrides", "commands.words"},
    {"diagnosis"},
    {"streaming.scoring", "streaming"},
    {"commands", "commands.sweeps", "app", "cli", "__main__"},
]


def _layer(module: str) -> int:
    """Of ``package.module``, or else of the whole package."""
    parts = module.split(".")
    for name in (".".join(parts[:2]), parts[0]):
        for index, names in enumerate(LAYERS):
            if name in names:
                return index
    raise AssertionError(f"stethoscope.{module} has no layer; put it into LAYERS")


def _imports(path: Path) -> set[str]:
    """Names of everything a file imports from ``stethoscope``, without that, also inside functions."""
    names = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):  # what is imported for annotations only is no dependency
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("stethoscope.") for name in names if name.startswith("stethoscope.")}


@pytest.mark.parametrize("path", sorted((ROOT / "stethoscope").rglob("*.py")), ids=lambda path: path.name)
def test_imports_point_downwards(path):
    module = ".".join(path.relative_to(ROOT / "stethoscope").with_suffix("").parts)
    if path.name == "__init__.py":
        return  # names for its users
    for name in _imports(path) - {"__version__", "conf"}:
        assert name.split(".")[0] not in ("adapters", "tasks"), f"{path.name} names one; only configuration may"
        assert _layer(name) <= _layer(module), f"{path.name} imports stethoscope.{name} of a later layer"


@pytest.mark.parametrize("arguments", [["--help"], ["list"], ["list", "features"]], ids=" ".join)
def test_light_commands_import_no_torch_and_answer_at_once(arguments):
    script = (
        "import sys\nfrom stethoscope.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n"
        "    heavy = {'torch', 'transformers', 'datasets', 'sklearn'} & set(sys.modules)\n"
        "    sys.exit(f'imported {heavy}' if heavy or end.code else 0)"
    )
    # CPU time and a ratio: machines differ, and other processes share them
    assert min(_seconds_of(["-c", script, *arguments]) for _ in range(3)) < _seconds_of_torch() / 3


@cache
def _seconds_of_torch():
    return min(_seconds_of(["-c", "import torch"]) for _ in range(3))


def _seconds_of(arguments):
    """CPU time of a Python process that must not fail."""
    before = _seconds_of_children()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return _seconds_of_children() - before


def _seconds_of_children():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
