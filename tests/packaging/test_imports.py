"""Every module can be imported with the versions of libraries that are installed."""

import importlib
import pkgutil

import stethoscope
import stethoscope.adapters
import stethoscope.tasks


def test_every_module_can_be_imported():
    packages = (stethoscope, stethoscope.adapters, stethoscope.tasks)  # folders of their own in a checkout
    names = {module.name for package in packages
             for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")}  # fmt: skip
    assert len(names) > 150
    for name in sorted(names):
        if not name.endswith("__main__"):
            importlib.import_module(name)
