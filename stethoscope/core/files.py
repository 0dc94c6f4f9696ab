"""Write files atomically, and read them with one-line errors that say what is damaged."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from stethoscope.core.errors import ArtefactError, ConfigError, wrong_type

LARGEST_JSON, LARGEST_YAML = 2**28, 2**20
"""Largest files (bytes) that are read at once; a run's largest, the detector's metrics, has some 100 kB."""

DEEPEST_YAML = 50  # levels; PyYAML needs a second for a thousand levels
_REQUIRED = object()
_TEMPORARY = "tmp"
_KINDS: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "text",
    int: "a whole number",
    float: "a number",
    type(None): "null",
}


def as_path(path: object, name: str) -> Path:
    """Return a path that a caller of Python gives.

    Args:
        path: text or a ``Path``.
        name: of the argument, for the message.

    Raises:
        ConfigError: it is of another type.
    """
    if isinstance(path, (str, os.PathLike)):
        text = os.fspath(path)
        if isinstance(text, str):
            return Path(text)
    raise wrong_type(name, "a path (text or Path)", path)


# --- writing ----------------------------------------------------------------------------------------------------------


@contextmanager
def writing_out(out: str | os.PathLike) -> Iterator[None]:
    """Turn disk errors within the block into one line about the setting ``out``.

    Raises:
        ConfigError: nothing can be written there.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(f"out={out} cannot be written to: {error.strerror or error}") from None


def check_out(out: str | os.PathLike, is_file: bool = False) -> None:
    """Check that something can be written to ``out`` before time is spent on it; missing folders are made.

    Args:
        out: folder to write files to, or a file.
        is_file: whether it is a file.

    Raises:
        ConfigError: nothing can be written there.
    """
    path = Path(out)
    folder = path.parent if is_file else path
    with writing_out(out):
        folder.mkdir(parents=True, exist_ok=True)
        if not (is_file and path.exists()):  # the folder of a file that is there need not be writable: /dev/stdout
            tempfile.TemporaryFile(dir=folder).close()
        elif path.is_dir() or not os.access(path, os.W_OK):
            raise OSError("it is a folder" if path.is_dir() else "no permission")


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open a new binary file that replaces ``path`` when the block ends without an error.

    Readers see the old content or the new, never a part, however the process ends. The content is synced before the
    rename, so a power cut leaves a whole file too. A symbolic link at ``path`` is replaced, not followed.

    Args:
        path: of the file; its folder must exist.
    """
    path = Path(path)
    temporary = _temporary_path(path)
    try:
        with temporary.open("x+b") as file:
            yield file
            sync(file)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def atomic_write(path: str | os.PathLike, content: str | bytes) -> None:
    """Write a whole file, text as UTF-8 with escaped halves of surrogate pairs; see ``replacing``."""
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    with replacing(path) as file:
        file.write(data)


def write_json(path: str | os.PathLike, value: Any, indent: int | None = 1) -> None:
    """Write a value of plain JSON types as a whole file; see ``replacing``.

    Raises:
        ValueError: a number is not finite.
    """
    atomic_write(path, json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + "\n")


def jsonable(value: Any) -> Any:
    """Convert a value to plain JSON types.

    Sets are sorted, paths become their last part, and other objects are written by ``str``.

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


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where there are no hard links.

    The target appears whole.

    Only for files that are replaced and never written into: see ``unshare``.
    """
    temporary = _temporary_path(target)
    try:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def unshare(path: Path) -> None:
    """Copy a file that has hard links, so that appending changes it under this name only."""
    if path.is_file() and path.stat().st_nlink > 1:
        with path.open("rb") as source, replacing(path) as target:
            shutil.copyfileobj(source, target)


def replace_folder(folder: Path, new: Path) -> None:
    """Replace a folder by a new one and delete its content.

    Args:
        folder: to replace; may be missing.
        new: the folder to rename, on the same file system.
    """
    for path in new.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    old = _temporary_path(folder)
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def remove_temporaries(folder: Path) -> None:
    """Delete unfinished files of killed processes; call it only where no other process writes."""
    for path in folder.glob(f".*.{_TEMPORARY}"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def append(path: Path, data: bytes, durable: bool = False) -> None:
    """Append bytes to a file in one write.

    Args:
        path: of the file; created if missing.
        data: to append.
        durable: return only when the bytes would survive a power cut.
    """
    with path.open("ab") as file:
        file.write(data)
        if durable:
            sync(file)


def sync(file: BinaryIO) -> None:
    """Wait until the content of a file would survive a power cut."""
    file.flush()
    os.fsync(file.fileno())


def _temporary_path(path: Path) -> Path:
    """Return a new name in the same folder, so that renaming it is atomic."""
    return path.with_name(f".{path.name[:60]}.{secrets.token_hex(4)}.{_TEMPORARY}")


# --- reading ----------------------------------------------------------------------------------------------------------


def read_bytes(path: str | os.PathLike, remedy: str = "", largest: int = LARGEST_JSON) -> bytes:
    """Read a file of a run or a detector.

    Args:
        path: of the file.
        remedy: advice to the user, at the end of error messages.
        largest: maximum size in bytes.

    Raises:
        ArtefactError: it is missing, not a regular file, too large, or cannot be read.
    """
    try:
        with open_regular(path, remedy) as file:
            data = file.read(largest + 1)
    except OSError as error:
        raise _unreadable(Path(path), error, remedy) from None
    if len(data) > largest:
        raise damaged(path, f"it has more than {largest} bytes", remedy)
    return data


def open_regular(path: str | os.PathLike, remedy: str = "") -> BinaryIO:
    """Open a file of a run to read it in parts; arguments and errors as in ``read_bytes``."""
    path = Path(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its other end
            raise damaged(path, "it is not a regular file", remedy)
        return path.open("rb")
    except OSError as error:
        raise _unreadable(path, error, remedy) from None


def read_text(path: str | os.PathLike, remedy: str = "", largest: int = LARGEST_JSON) -> str:
    """Read a UTF-8 text; arguments and errors as in ``read_bytes``."""
    try:
        return read_bytes(path, remedy, largest).decode("utf-8")
    except UnicodeDecodeError as error:
        raise damaged(path, f"it is not UTF-8 text: {error.reason} at byte {error.start}", remedy) from None


def read_json(path: str | os.PathLike, remedy: str = "", kind: type = dict, default: Any = _REQUIRED) -> Any:
    """Read a JSON file whose outermost value is an object.

    Args:
        path: of the file.
        remedy: advice to the user, at the end of error messages.
        kind: type of the outermost value.
        default: returned where the file is missing; without it that is an error.

    Raises:
        ArtefactError: the file is missing or damaged; the message is one line and ends with the remedy.
    """
    if default is not _REQUIRED and not os.path.lexists(path):
        return default
    text = read_text(path, remedy)
    try:
        value = plain_json(text)
    except (ValueError, RecursionError) as error:
        raise damaged(path, _reason(error), remedy) from None
    return _of_kind(path, value, kind, remedy)


def read_jsonl(path: str | os.PathLike, remedy: str = "", default: Any = _REQUIRED) -> list[dict[str, Any]]:
    """Read a file with a JSON object on every line; arguments and errors as in ``read_json``."""
    if default is not _REQUIRED and not os.path.lexists(path):
        return default
    rows = []
    for number, line in enumerate(read_text(path, remedy).split("\n"), 1):
        if line.strip():
            try:
                row = plain_json(line)
            except (ValueError, RecursionError) as error:
                raise damaged(f"{path}:{number}", _reason(error), remedy) from None
            rows.append(_of_kind(f"{path}:{number}", row, dict, remedy))
    return rows


def read_yaml(path: str | os.PathLike, remedy: str = "", kind: type = dict, default: Any = _REQUIRED) -> Any:
    """Read a YAML file of plain values without anchors; arguments and errors as in ``read_json``."""
    if default is not _REQUIRED and not os.path.lexists(path):
        return default
    import yaml

    text = read_text(path, remedy, LARGEST_YAML)
    try:
        value = yaml.load(text, Loader=_plain_loader())
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f" in line {error.problem_mark.line + 1}"
        raise damaged(path, f"{error.problem or 'no YAML'}{line}", remedy) from None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(path, _reason(error), remedy) from None
    return _of_kind(path, value, kind, remedy)


def check_shape(path: object, value: Any, shape: Any, remedy: str = "", name: str = "") -> None:
    """Check that content has the shape that its reader relies on; further keys are allowed.

    Args:
        path: of the file.
        value: the content.
        shape: a type or tuple of types; for an object its keys with their shapes, ``*`` for any key; for a list a
            list of its items' shape.
        remedy: as in ``read_json``.
        name: of the content within the file.

    Raises:
        ArtefactError: it has another shape.

    >>> check_shape("a.json", {"rows": [{"name": "x"}, {"name": 1}]}, {"rows": [{"name": str}]}, "start again")
    Traceback (most recent call last):
        ...
    stethoscope.core.errors.ArtefactError: a.json is damaged (rows[1].name should be text, not int); start again
    """
    kind = type(shape) if isinstance(shape, (dict, list)) else shape
    allowed = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        expected = " or ".join(_KINDS.get(cls, cls.__name__) for cls in allowed)
        raise damaged(path, f"{name or 'it'} should be {expected}, not {type(value).__name__}", remedy)
    if isinstance(shape, list):
        for index, item in enumerate(value):
            check_shape(path, item, shape[0], remedy, f"{name}[{index}]")
    if isinstance(shape, dict):
        for key in (*(key for key in shape if key != "*"), *(value if "*" in shape else ())):
            inner = f"{name}.{key}" if name else str(key)[:40]
            if key not in value:
                raise damaged(path, f"{inner} is missing", remedy)
            check_shape(path, value[key], shape.get(key, shape.get("*")), remedy, inner)


def files_state(paths: Iterable[Path]) -> str:
    """Describe files, so that two descriptions are equal while none has changed.

    Missing files are left out.
    """
    states = []
    for path in paths:
        with suppress(FileNotFoundError, NotADirectoryError):  # those of a run in progress come and go
            status = path.stat()
            states.append(f"{path.name}-{status.st_mtime_ns:x}-{status.st_size:x}")
    return " ".join(states)


def damaged(path: object, reason: str, remedy: str = "") -> ArtefactError:
    """Create the error for a damaged file, one line: what is wrong, and advice to the user."""
    line = " ".join(reason.split())  # libraries raise messages of several lines
    shown = line if len(line) <= 200 else line[:197] + "..."
    return ArtefactError(f"{path} is damaged ({shown})" + (f"; {remedy}" if remedy else ""))


def _unreadable(path: Path, error: OSError, remedy: str) -> ArtefactError:
    if isinstance(error, FileNotFoundError):
        return ArtefactError(f"{path} is missing" + (f"; {remedy}" if remedy else ""))
    why = error.strerror or str(error)
    return ArtefactError(f"{path} cannot be read ({why})" + (f"; {remedy}" if remedy else ""))


def plain_json(text: str) -> Any:
    """Read JSON as it is defined: without NaN, Infinity and numbers that are too large.

    Raises:
        ValueError: it is none.
        RecursionError: it is nested too deeply.
    """
    return json.loads(text, parse_constant=_finite, parse_float=_finite)


def _finite(text: str) -> float:
    """Convert a number of a JSON file; refuse NaN, Infinity and numbers that are too large."""
    if text.endswith(("NaN", "Infinity")):
        raise ValueError(f"{text} is not a JSON value")
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:20]} is too large for a number")
    return number


@cache
def _plain_loader() -> type:
    """Define PyYAML's safe loader without aliases and deep nesting.

    It is defined in a function, as yaml is imported late.
    """
    import yaml

    class PlainLoader(yaml.SafeLoader):
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise ValueError("it has aliases (*name)")
            self.depth += 1
            if self.depth > DEEPEST_YAML:
                raise RecursionError
            try:
                return super().compose_node(parent, index)
            finally:
                self.depth -= 1

    return PlainLoader


def _of_kind(path: object, value: Any, kind: type, remedy: str) -> Any:
    if not isinstance(value, kind):
        raise damaged(path, f"{_KINDS[kind]} was expected, not {type(value).__name__}", remedy)
    return value


def _reason(error: BaseException) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error) or type(error).__name__
