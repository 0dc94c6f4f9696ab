"""Results are named by what they are."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("stethoscope", "adapters", "tasks", "scripts", "examples", "tests")
EMPTY_NAMES = {"found", "one", "some", "told", "said", "made", "place", "where", "at"}


def bindings(tree):
    """Names that a file binds, with their lines: variables, loop variables, arguments, caught errors."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.ExceptHandler) and node.name:
            yield node.name, node.lineno


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_variable_has_a_name_that_says_nothing(folder):
    unclear = [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for name, line in bindings(ast.parse(path.read_text()))
        if name.strip("_") in EMPTY_NAMES
    ]
    assert unclear == []
