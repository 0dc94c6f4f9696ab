"""Every example in a docstring is run, found through the installed package (never as a top-level ``tasks``)."""

import doctest
import importlib
import pkgutil

import pytest

import stethoscope

MODULES = [module.name for module in pkgutil.walk_packages(stethoscope.__path__, "stethoscope.")]


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_examples_in_docstrings(name):
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert failed == 0
