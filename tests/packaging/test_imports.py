"""Every module can be imported with the versions of libraries that are installed."""

import importlib
import pkgutil

import stethoscope


def test_every_module_can_be_imported():
    modules = [module.name for module in pkgutil.walk_packages(stethoscope.__path__, "stethoscope.")]
    assert len(modules) > 200
    for name in modules:
        if not name.endswith("__main__"):
            importlib.import_module(name)
