"""Check lines and files against their JSON Schemas, which are published as they are, and describe what is wrong.

A schema may carry two keywords of ours, which other validators ignore. ``x-message`` is what to say of a wrong value:
``{value}`` stands for it, ``{type}`` for its Python type, and any key for its neighbour of that name. ``x-kind`` says
what the values of an ``enum`` choose, so that close ones are suggested.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from stethoscope.core.errors import DataError, unknown
from stethoscope.core.files import damaged
from stethoscope.core.json_rows import clipped, shown

FOLDER = Path(__file__).with_name("schemas")
KINDS = {
    "object": "an object",
    "array": "a list",
    "string": "text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "null": "null",
}


@dataclass(frozen=True)
class Violation:
    """What is wrong with a value.

    Attributes:
        path: dotted name of the part that is wrong, such as ``spans[0].type``; empty for the whole value.
        reason: what is wrong with it, naming the part.
        message: the schema's own sentence, which is clear without the path but for list indices; empty without one.
    """

    path: str
    reason: str
    message: str = ""


@cache
def read_schema(name: str) -> dict[str, Any]:
    """Read a schema (JSON Schema, draft 2020-12) by its name, such as ``custom``."""
    return json.loads((FOLDER / f"{name}.schema.json").read_text(encoding="utf-8"))


@cache
def _validator(name: str) -> Callable[[Any], Any]:
    """Compile a schema to a function that raises an error: 2 us for a line of ten keys, where jsonschema needs 37."""
    import fastjsonschema  # here, so that light commands do not import it

    return fastjsonschema.compile(read_schema(name), use_default=False, use_formats=False)


def violation(name: str, value: Any) -> Violation | None:
    """Return the first way in which a value does not follow a schema; None if it does.

    Args:
        name: of the schema, such as ``custom``.
        value: plain JSON values.

    >>> violation("halloc", {"image": "1.jpg", "question": "?", "answer": "A bus.", "spans": 3}).message
    'spans should be a list, not 3'
    """
    from fastjsonschema import JsonSchemaValueException

    try:
        _validator(name)(value)
    except JsonSchemaValueException as error:
        return _describe(error, value)
    return None


def check_line(name: str, row: Mapping[str, Any], origin: str, ignored: Collection[str] = ()) -> None:
    """Check a line that users write.

    Args:
        name: of the schema.
        row: the line's object.
        origin: file and line, for the message.
        ignored: keys that are not read this time and may hold anything.

    Raises:
        DataError: it does not follow the schema.
    """
    broken = violation(name, {key: value for key, value in row.items() if key not in ignored} if ignored else row)
    if broken is None:
        return
    inside = broken.path.rpartition("]")[0]
    raise DataError(f"{origin}{f', {inside}]' if inside and broken.message else ''}: {broken.message or broken.reason}")


def check_content(name: str, value: Any, path: object, remedy: str = "") -> None:
    """Check a file that a run has written.

    Args:
        name: of the schema.
        value: the content.
        path: of the file, for the message.
        remedy: advice to the user, at the end of the message.

    Raises:
        ArtefactError: it does not follow the schema.
    """
    broken = violation(name, value)
    if broken is not None:
        raise damaged(path, broken.message or broken.reason, remedy) from None


def _describe(error: Any, whole: Any) -> Violation:
    """Turn an error of the validator into the words of the house."""
    path = "".join(f"[{part}]" if part.isdecimal() else f".{part}" for part in error.path[1:]).lstrip(".")
    value, definition = error.value, error.definition
    name, message = path or "it", ""
    if error.rule == "required" and isinstance(value, Mapping):
        key = next(key for key in error.rule_definition if key not in value)
        there = clipped(", ".join(map(str, value))) or "none"
        reason = f"{path}.{key} is missing" if path else f"key {key!r} is missing; there are: {there}"
    elif error.rule == "type":
        kinds = [error.rule_definition] if isinstance(error.rule_definition, str) else error.rule_definition
        reason = f"{name} should be {' or '.join(KINDS[kind] for kind in kinds)}, not {type(value).__name__}"
    elif error.rule == "enum" and "x-kind" in definition:
        message = reason = unknown(definition["x-kind"], clipped(value), definition["enum"])
    else:
        reason = f"{name} is {shown(value)}, which breaks the rule {error.rule}: {clipped(error.rule_definition)}"
    if "x-message" in definition:
        neighbours = {key: shown(item) for key, item in _container(whole, error.path[1:-1]).items()}
        message = definition["x-message"].format_map(
            {**neighbours, "value": shown(value), "type": type(value).__name__}
        )
    return Violation(path, reason, message)


def _container(whole: Any, path: list[str]) -> Mapping[str, Any]:
    """Return the object at a path of keys and indices; an empty one where it is none."""
    for part in path:
        try:
            whole = whole[int(part)] if isinstance(whole, list) else whole[part]
        except (KeyError, IndexError, TypeError, ValueError):
            return {}
    return whole if isinstance(whole, Mapping) else {}
