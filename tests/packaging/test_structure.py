"""The order of the packages, on every import of the code, and that the light commands stay light."""

import ast
import re
import resource
import subprocess
import sys
from collections import Counter, defaultdict
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# a package imports only itself and what stands before it, in functions too
ORDER = [
    "core", "testbed", "tracing", "metrics", "tasks", "features", "relevancy", "adapters", "detection", "mitigation",
    "loggers", "storage", "evaluation", "diagnosis", "streaming", "report", "app", "commands",
]  # fmt: skip
ENTRY = {"__init__", "__main__", "cli"}  # modules of the package itself: the public names and the command
FAMILIES = {"adapters", "tasks"}  # their modules are named by configuration; the rest may import these:
SHARED = {"adapters.base", "tasks.base", "tasks.object_extraction", "tasks.extraction", "tasks.yes_no"}
SEVERAL = {"__init__", "__main__", "base"}  # names of modules that several packages have
FILES = [
    *sorted((ROOT / "stethoscope").rglob("*.py")),
    *sorted((ROOT / "adapters").rglob("*.py")),
    *sorted((ROOT / "tasks").rglob("*.py")),
]


def module_name(path: Path) -> str:
    """Without ``stethoscope``: ``core.types`` of stethoscope/core/types.py, ``tasks.pope`` of tasks/pope.py."""
    relative = path.relative_to(ROOT).with_suffix("")
    return ".".join(relative.parts[1:] if relative.parts[0] == "stethoscope" else relative.parts)


@cache
def imports(path: Path) -> list[str]:
    """Names of all that a file imports from ``stethoscope``, but for annotations alone; without ``stethoscope``."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return [name.removeprefix("stethoscope.") for name in names if name.startswith("stethoscope.")]


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_follow_the_order(path):
    module = module_name(path)
    package = module.split(".")[0]
    if module in ENTRY:
        return
    assert package in ORDER
    for name in imports(path):
        other = name.split(".")[0]
        if other in ("conf", "__version__"):
            continue
        assert other in ORDER, f"{module} imports stethoscope.{name}, which is in no package of the order"
        assert ORDER.index(other) <= ORDER.index(package), f"{module} imports stethoscope.{name} of a later package"
        if other in FAMILIES and package not in FAMILIES:
            shared = {".".join(name.split(".")[:2]), ".".join(name.split(".")[:3])} & SHARED
            assert shared, f"{module} imports stethoscope.{name}; only configuration names a model or a task"


def test_modules_do_not_import_each_other_in_a_circle():
    """Nor in functions: who reads one of the modules would have to read all of them."""
    modules, sorter = {module_name(path) for path in FILES}, TopologicalSorter()
    for path in FILES:
        for name in imports(path):
            parts = name.split(".")
            prefixes = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
            imported = next((module for prefix in prefixes for module in (prefix, f"{prefix}.__init__")
                             if module in modules), None)  # fmt: skip
            if imported not in (None, module_name(path)):
                sorter.add(module_name(path), imported)
    try:
        sorter.prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other: {' <- '.join(error.args[1])}")


def test_no_two_modules_have_one_name():
    counts = Counter(module_name(path).split(".")[-1] for path in FILES if "commands" not in path.parts)
    assert {name for name, count in counts.items() if count > 1} <= SEVERAL


COMMON_BASES = {
    "ABC",
    "Protocol",
    "NamedTuple",
    "TypedDict",
    "Enum",
    "Exception",
    "ValueError",
    "Module",
    "BaseEstimator",
}
HOOKS = {"_repr_html_", "_repr_png_", "_init_weights"}  # private methods that IPython and transformers call


def test_every_private_method_is_called():
    """A method that is renamed leaves overrides behind that nothing calls, and what they changed is silently lost."""
    folders = (ROOT / name for name in ("stethoscope", "adapters", "tasks", "scripts", "examples"))
    trees = {path: ast.parse(path.read_text()) for folder in folders for path in sorted(folder.rglob("*.py"))}
    reads = {path: _reads(tree) for path, tree in trees.items()}
    classes = [
        (path, node) for path, tree in trees.items() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
    ]
    methods = [(path, cls, method) for path, cls in classes for method in cls.body if _is_private_method(method)]
    related = defaultdict(set)  # by name of a class, its bases and its subclasses
    for _, cls in classes:
        for base in (node for expression in cls.bases for node in ast.walk(expression)):
            name = getattr(base, "id", getattr(base, "attr", cls.name))
            related[cls.name].add(name)
            related[name].add(cls.name)
    dead = []
    for path, cls, method in methods:
        family = _family(cls.name, related)
        files = {path} | {other for other, relative in classes if relative.name in family}
        calls = sum(reads[file][method.name] for file in files)
        for _, relative, other in methods:  # an override that alone calls ``super()._join`` is dead as well
            if other.name == method.name and relative.name in family:
                calls -= _reads(other)[method.name]
        if calls <= 0 and method.name not in HOOKS:
            dead.append(f"{path.relative_to(ROOT)}: {cls.name}.{method.name}")
    assert dead == []


def _is_private_method(node):
    return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and re.match("_[^_]", node.name)


def _reads(tree):
    """Count the names that are read as attributes, or stand as texts, as for ``getattr``."""
    nodes = (node for node in ast.walk(tree) if isinstance(node, (ast.Attribute, ast.Constant)))
    return Counter(node.attr if isinstance(node, ast.Attribute) else node.value for node in nodes)


def _family(name, related):
    """Names of a class's bases and subclasses, and of theirs, but for the bases that all kinds of classes have."""
    family, pending = {name}, [name]
    while pending:
        new = related[pending.pop()] - family - COMMON_BASES
        family |= new
        pending += new
    return family


def test_no_two_files_of_tests_have_one_name():
    """Pytest imports them by name, and refuses the second."""
    counts = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in counts.items() if count > 1] == []


FIRST_LINE = """
import sys

class Watch:
    def write(self, text):
        if text.strip():
            heavy = [name for name in ("torch", "pandas", "sklearn", "transformers", "hydra") if name in sys.modules]
            sys.__stdout__.write(f"{text.strip()} {heavy}\\n")
            sys.__stdout__.flush()
            sys.__stdout__ = open("/dev/null", "w")
    def flush(self): pass
    def isatty(self): return False

sys.stderr = Watch()
from stethoscope.cli import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize("arguments", [["train", "run=nowhere"], ["compare", "nowhere"]])
def test_the_first_line_comes_before_any_library_is_loaded(arguments):
    done = subprocess.run([sys.executable, "-c", FIRST_LINE, *arguments], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[0] == f"{arguments[0]}: loading libraries ... []"


def test_what_evaluate_loads_before_the_model_is_light():
    """Neither tables nor statistics are needed for an answer."""
    script = (
        "import sys, stethoscope.commands.evaluate, stethoscope.mitigation.base, stethoscope.evaluation.session\n"
        "sys.exit(' '.join({'pandas', 'scipy', 'sklearn', 'matplotlib', 'wandb'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("script", ["relevancy.py", "field.py"])
def test_a_benchmark_that_also_measures_old_checkouts_imports_what_all_of_them_have(script):
    """``against.py`` runs these files with the package of another commit."""
    assert set(imports(ROOT / "scripts" / "bench" / script)) <= {"relevancy.relevancy_from_inputs"}


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
