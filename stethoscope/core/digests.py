"""Digests of what lies in files: of weights, remembered between runs, and of the code that a class is made of."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stethoscope.core.errors import ArtefactError
from stethoscope.core.files import read_json, write_json

if TYPE_CHECKING:
    pass

REMEMBERED_FROM = 2**26


"""Bytes of files from which a digest is worth remembering: less is read again in a few hundredths of a second."""


_REMEMBERED_FILES = 500


_INSTALLED = {"site-packages", "dist-packages"}


def remembered(paths: Sequence[Path], compute: Callable[[], str]) -> str:
    """A digest of large files that is computed once, and again when one of them has changed.

    A file has changed when its path, size, inode, or the time of its last modification or change of state has. The last
    cannot be set back by the usual tools, so that a checkpoint is found out that was written over with its old times.
    What is remembered lies in the user's cache folder; nothing depends on it but time.

    Args:
        paths: what the digest depends on.
        compute: reads the files.
    """
    states = []
    for path in paths:
        stat = path.stat()
        states.append([str(path.resolve()), stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns])
    if sum(size for _, size, *_ in states) < REMEMBERED_FROM:
        return compute()
    file = _cache_file()
    known = _read(file)
    key = json.dumps(states)
    if key not in known:
        known[key] = compute()
        _write(file, dict(list(known.items())[-_REMEMBERED_FILES:]))
    return known[key]


def _cache_file() -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "stethoscope" / "digests.json"


def _read(file: Path) -> dict[str, str]:
    try:
        return read_json(file, default={})
    except ArtefactError:  # damaged: the files are read again
        return {}


def _write(file: Path, known: dict[str, str]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, known, indent=None)
    except OSError:  # a home that cannot be written to: the files are read again the next time
        return


def code_of(*classes: type) -> str:
    """The first 16 digits of the SHA-256 of the source files that classes are made of, over their names and bytes.

    These are the modules of every class and its bases, and what those import at their top from the package they are
    in: of ``stethoscope.tasks.pope`` the modules of ``stethoscope.tasks`` that it uses, but not those of
    ``stethoscope.metrics``, and of a package of your own all that is used of it. Imports within functions are left
    out: there stand model families and data formats of which a run uses few. A class that was typed in, in a notebook,
    counts by itself.
    """
    digest = hashlib.sha256()
    for name, text in sorted(_sources(classes).items()):
        digest.update(name.encode() + b"\0" + hashlib.sha256(text).digest())
    return digest.hexdigest()[:16]


def _sources(classes: Sequence[type]) -> dict[str, bytes]:
    """Source files by the names of their modules; what has none, by the class."""
    found: dict[str, bytes] = {}
    for cls in classes:
        own = {"stethoscope", cls.__module__.partition(".")[0]}
        for base in cls.__mro__:
            top = base.__module__.partition(".")[0]
            file = getattr(sys.modules.get(base.__module__), "__file__", None)
            if top in sys.stdlib_module_names or (top not in own and _INSTALLED & set(Path(file or "").parts)):
                continue  # of other projects the version is noted
            if file is None:
                found[f"{base.__module__}.{base.__qualname__}"] = _typed(base)
            else:
                name = Path(file).stem if base.__module__ == "__main__" else base.__module__
                _follow(name, Path(file), found)
    return found


def _typed(cls: type) -> bytes:
    """The source of a class whose module is no file."""
    try:
        return inspect.getsource(cls).encode()
    except (OSError, TypeError):  # typed into an interpreter that keeps no history
        return b""


def _follow(module: str, file: Path, found: dict[str, bytes]) -> None:
    """Adds a module and what it imports from its package."""
    if module in found:
        return
    found[module] = file.read_bytes()
    parts = module.split(".")
    package = ".".join(parts[:2]) if parts[0] == "stethoscope" else parts[0]
    for name in _imported(found[module], module, file.name == "__init__.py"):
        if name.startswith(f"{package}.") and (path := _file_of(name, package)) is not None:
            _follow(name, path, found)


def _imported(text: bytes, module: str, is_package: bool) -> Iterator[str]:
    """Names of modules that a source file may mean by its imports, and of things in modules."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: (1 if is_package else 0) - node.level or None] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _file_of(name: str, package: str) -> Path | None:
    """The file of a module in a package, without importing the module; None for a name that is none."""
    within = name.removeprefix(f"{package}.").split(".")
    for folder in getattr(importlib.import_module(package), "__path__", ()):
        path = Path(folder, *within)
        for file in (path.with_name(path.name + ".py"), path / "__init__.py"):
            if file.is_file():
                return file
    return None


def jsonable(value: Any) -> Any:
    """The value as plain JSON types: sequences as lists, sets sorted, paths by their last part, others by ``str``.

    >>> jsonable({"needs": {"lens", "blank"}, "file": Path("/data/coco/val2014"), "tau": (0.5, None)})
    {'needs': ['blank', 'lens'], 'file': 'val2014', 'tau': [0.5, None]}
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: jsonable(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((jsonable(item) for item in value), key=str)
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, os.PathLike):
        return Path(value).name  # a moved folder holds the same data
    if hasattr(value, "tolist"):  # NumPy scalars and arrays
        return jsonable(value.tolist())
    return str(value)
