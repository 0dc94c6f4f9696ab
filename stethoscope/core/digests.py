"""Compute digests of weight files, cached between runs, and of the source code of classes."""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

from stethoscope.core.errors import ArtefactError
from stethoscope.core.files import read_json, write_json

MIN_CACHED_BYTES = 2**26
"""Size of files from which a digest is cached; smaller ones are read again in a few hundredths of a second."""

_MAX_ENTRIES = 500
_INSTALLED = {"site-packages", "dist-packages"}


def cached_digest(paths: Sequence[Path], compute: Callable[[], str]) -> str:
    """Return a digest of large files from the user's cache, or compute it where one of them has changed.

    A file has changed when its path, size, inode, modification time or state change time has. The usual tools cannot
    reset the last one, so a checkpoint that was overwritten with its old times is noticed.

    Args:
        paths: files that the digest depends on.
        compute: reads the files and returns the digest.
    """
    states: list[tuple[str, int, int, int, int]] = []
    for path in paths:
        stat = path.stat()
        states.append((str(path.resolve()), stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns))
    if sum(size for _, size, *_ in states) < MIN_CACHED_BYTES:
        return compute()
    try:
        folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # a user without a home, as in a container
        return compute()
    file = Path(folder) / "stethoscope" / "digests.json"
    known = _read(file)
    key = json.dumps(states)
    if key not in known:
        known[key] = compute()
        _write(file, dict(list(known.items())[-_MAX_ENTRIES:]))
    return known[key]


def _read(file: Path) -> dict[str, str]:
    try:
        return read_json(file, default={})
    except ArtefactError:  # damaged: the digests are computed again
        return {}


def _write(file: Path, known: dict[str, str]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, known, indent=None)
    except OSError:  # the folder is read-only: the digest is computed again the next time
        return


def source_digest(*classes: type) -> str:
    """Compute a digest of the source files of classes.

    It is 16 hexadecimal digits of a SHA-256 over names and bytes.

    These are the modules of every class and its bases, and the modules of the same package that those import at their
    top: for ``stethoscope.tasks.pope`` the modules of ``stethoscope.tasks`` that it uses, but not those of
    ``stethoscope.metrics``; for a package of your own all of it that is used. Imports within functions are left out:
    they load model families and data formats, of which a run uses few. A class typed into a notebook counts by its
    own source.
    """
    digest = hashlib.sha256()
    for name, text in sorted(_sources(classes).items()):
        digest.update(name.encode() + b"\0" + hashlib.sha256(text).digest())
    return digest.hexdigest()[:16]


def _sources(classes: Sequence[type]) -> dict[str, bytes]:
    """Read source files by module name, and classes without a file by class name."""
    sources: dict[str, bytes] = {}
    for cls in classes:
        own = {"stethoscope", cls.__module__.partition(".")[0]}
        for base in cls.__mro__:
            top = base.__module__.partition(".")[0]
            file = getattr(sys.modules.get(base.__module__), "__file__", None)
            if top in sys.stdlib_module_names or (top not in own and _INSTALLED & set(Path(file or "").parts)):
                continue  # the environment records versions of other projects
            if file is None:
                sources[f"{base.__module__}.{base.__qualname__}"] = _interactive_source(base)
            else:
                name = Path(file).stem if base.__module__ == "__main__" else base.__module__
                _add_module(name, Path(file), sources)
    return sources


def _interactive_source(cls: type) -> bytes:
    """Return the source of a class typed into a notebook or interpreter; empty if not kept."""
    try:
        return inspect.getsource(cls).encode()
    except (OSError, TypeError):
        return b""


def _add_module(module: str, file: Path, sources: dict[str, bytes]) -> None:
    """Add a module and those that it imports from its package, recursively."""
    if module in sources:
        return
    sources[module] = file.read_bytes()
    parts = module.split(".")
    package = ".".join(parts[:2]) if parts[0] == "stethoscope" else parts[0]
    for name in _imported_names(sources[module], module, file.name == "__init__.py"):
        if name.startswith(f"{package}.") and (path := _module_file(name, package)) is not None:
            _add_module(name, path, sources)


@lru_cache(1024)  # every run of a sweep reads the same files, and parsing them takes a tenth of a second
def _imported_names(text: bytes, module: str, is_package: bool) -> tuple[str, ...]:
    """Return the dotted names in a source file's top-level imports: modules, and names in modules."""
    names: list[str] = []
    parts = module.split(".")
    package = parts if is_package else parts[:-1]
    for node in _parse(text).body:
        if isinstance(node, ast.Import):
            names.extend(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []  # one dot is the package itself
            base = ".".join([*above, *([node.module] if node.module else [])])
            names.extend([base, *(f"{base}.{alias.name}" for alias in node.names)])
    return tuple(names)


def _parse(text: bytes, tries: int = 3) -> ast.Module:
    """Parse source code, again where Python loses count of its depth.

    Up to 3.11.8 and 3.12.2 it does, and raises a SystemError, where other code parses in between (issue gh-106905).
    """
    try:
        return ast.parse(text)
    except SystemError:
        if tries <= 1:
            raise
        return _parse(text, tries - 1)


def _module_file(name: str, package: str) -> Path | None:
    """Return the file of a module in a package, without importing it; None where the name is no module."""
    within = name.removeprefix(f"{package}.").split(".")
    for folder in getattr(importlib.import_module(package), "__path__", ()):
        path = Path(folder, *within)
        for file in (path.with_name(path.name + ".py"), path / "__init__.py"):
            if file.is_file():
                return file
    return None
