"""Records what a process does while it reads files that it should not trust: Python's audit events, judged.

Allowed are: modules that are loaded already, of the standard library, of our own packages and of what they depend on;
reading inside the folder of a case, Python's own folders and the system's; writing inside the folder of a case.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CANARY = "hostile_canary"
"""A package that stands on the path and that nothing but a hostile string names."""
STRANGE = {CANARY, "antigravity", "this", "idlelib", "turtle", "turtledemo", "webbrowser"}
COMPILED = ("cython_runtime", "_cyutility")  # what modules made by Cython register
PROCESSES = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty")
NETWORK = (
    "socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "urllib.Request",
    "http.client.connect", "ftplib.connect", "webbrowser.open",
)  # fmt: skip
CHANGES = (
    "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "os.chown", "os.link", "os.symlink",
    "shutil.rmtree", "shutil.move", "shutil.copyfile", "shutil.copytree", "os.utime", "os.mkfifo", "os.mknod",
)  # fmt: skip
UNPICKLED = ("builtins", "copyreg", "collections", "numpy", "torch", "pandas", "pyarrow", "datasets")


def dependencies(name: str = "lvlm-stethoscope") -> set[str]:
    """Top-level modules of a distribution and of everything that it depends on, extras too where they are installed."""
    modules: dict[str, set[str]] = {}
    for module, owners in importlib.metadata.packages_distributions().items():
        for owner in owners:
            modules.setdefault(_plain(owner), set()).add(module)
    seen, queue = set(), [_plain(name)]
    while queue:
        owner = queue.pop()
        if owner in seen:
            continue
        seen.add(owner)
        try:
            queue += [_plain(re.match(r"[\w.-]+", line)[0]) for line in importlib.metadata.requires(owner) or ()]
        except importlib.metadata.PackageNotFoundError:
            continue
    return {module for owner in seen for module in modules.get(owner, ())}


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


class Audit:
    """Collects forbidden events between ``start`` and ``stop``.

    Attributes:
        found: descriptions of what was not allowed, in order.
    """

    def __init__(self, work: Path) -> None:
        """Installs the hook, which cannot be removed.

        Args:
            work: folder in which a case may read and write.
        """
        self.found: list[str] = []
        self.named: set[str] = set()  # files that a case may read although they are elsewhere
        self._on, self._work = False, os.path.realpath(work)
        places = [sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), *sys.path]
        places += [str(Path(__file__).parents[2]), "/proc", "/sys", "/etc", "/usr", "/lib", "/dev/null", "/dev/urandom"]
        places += [
            str(Path(module.__file__).parent) for module in map(sys.modules.get, ("transformers", "torch")) if module
        ]
        self._readable = tuple(os.path.realpath(folder) for folder in places if folder and CANARY not in folder)
        self._modules = {*sys.stdlib_module_names, *dependencies(), "stethoscope", "hydra_plugins", *COMPILED} - STRANGE
        self._before: set[str] = set()
        sys.addaudithook(self._hook)

    @contextmanager
    def watching(self) -> Iterator[list[str]]:
        """Records in this block; gives the list that forbidden events are added to."""
        self.found, self._before, self._on = [], _tops(), True
        try:
            yield self.found
        finally:
            self._on = False
            self.found += [
                f"module {name}"
                for name in _tops() - self._before
                if name not in self._modules and not name.startswith("_cython_")
            ]

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._on:
            return
        self._on = False  # what follows has events of its own
        try:
            what = self._judge(event, arguments)
        finally:
            self._on = True
        if what:
            self.found.append(what)

    def _judge(self, event: str, arguments: tuple[Any, ...]) -> str | None:
        if event == "import":
            name = str(arguments[0])
            return f"import {name}" if name.split(".")[0] in STRANGE else None
        if event == "open":
            return self._judge_open(*arguments)
        if event in PROCESSES or event in NETWORK:
            if event == "socket.connect" and isinstance(arguments[1], str):  # a socket of this machine's system
                return None
            return f"{event} {arguments!r}"[:300]
        if event in CHANGES:
            paths = [path for path in arguments if isinstance(path, (str, bytes, os.PathLike))]
            away = [path for path in paths[:2] if not self._inside(path)]
            return f"{event} {away!r}"[:300] if away and "copy" not in event else None
        if event == "pickle.find_class":
            return None if str(arguments[0]).split(".")[0] in UNPICKLED else f"unpickled {arguments!r}"[:300]
        if event == "exec":
            file = str(getattr(arguments[0], "co_filename", ""))
            return f"exec {file}" if CANARY in file or (os.path.isabs(file) and self._inside(file)) else None
        if event == "ctypes.dlopen":
            name = str(arguments[0])
            return f"dlopen {name}" if os.path.isabs(name) and self._inside(name) else None
        return None

    def _judge_open(self, path: Any, mode: Any, flags: Any) -> str | None:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return None  # a descriptor that is open already
        path = os.fspath(path)
        path = os.path.realpath(os.fsdecode(path).split("\x00")[0] or ".")
        if path.startswith(self._work + os.sep):
            return None
        writes = bool(flags and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)) or (
            isinstance(mode, str) and any(letter in mode for letter in "wax+")
        )
        if writes:
            return None if path == "/dev/null" or "__pycache__" in path else f"write {path}"
        if path in self.named or any(path == folder or path.startswith(folder + os.sep) for folder in self._readable):
            return None
        return f"read {path}"

    def _inside(self, path: Any) -> bool:
        path = os.path.realpath(os.fsdecode(os.fspath(path)).split("\x00")[0] or ".")
        return path == self._work or path.startswith(self._work + os.sep)


def _tops() -> set[str]:
    return {name.split(".")[0] for name in tuple(sys.modules)}
