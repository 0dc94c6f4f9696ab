"""Define the errors a user can cause.

Each message is one line: what is wrong, the value, what would be right.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class StethoscopeError(Exception):
    """Base of all errors that the user can fix; the command line prints the message and exits with 2."""


class ConfigError(StethoscopeError):
    """A setting is wrong: an unknown name, a value out of range, two settings that exclude each other."""


class CapabilityError(StethoscopeError):
    """The model or the machine cannot do what was asked."""


class DataError(StethoscopeError):
    """A data file, an image or a record is missing, broken or of the wrong form."""


class CaptureError(StethoscopeError):
    """The traced pass did not record what it should have: no attention, or a value that is not finite."""


class ArtefactError(StethoscopeError):
    """A saved detector or run directory is missing, damaged, or belongs to another model or data set."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or else the name of its type.

    It is cut after 300 characters.

    >>> first_line(ValueError("bad magic\\nsee the log")), first_line(KeyboardInterrupt())
    ('bad magic', 'KeyboardInterrupt')
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def wrong_type(name: str, expected: str, value: object) -> ConfigError:
    """Build the error about a value of a wrong type.

    >>> str(wrong_type("folder", "a path", 4))
    'folder should be a path, got int'
    """
    return ConfigError(f"{name} should be {expected}, got {type(value).__name__}")


def check_list(name: str, expected: str, items: object, kind: type = Iterable) -> None:
    """Check that a value is a list or the like: of ``kind``, and no text, whose letters nobody means.

    Raises:
        ConfigError: it is something else.
    """
    if isinstance(items, (str, bytes)) or not isinstance(items, kind):
        raise wrong_type(name, expected, items)


MOST_LISTED = 60
"""Known names that a message lists; of more it lists the first few."""


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """Write the message for an unknown name, with close matches and the known names.

    Of more than ``MOST_LISTED`` known names only the first ten are listed.

    >>> unknown("task", "popee", ["pope", "chair"])
    "unknown task 'popee'; did you mean 'pope'? There are: chair, pope"
    >>> unknown("model", "llava", ["llava-onevision-7b", "testbed"])
    "unknown model 'llava'; did you mean 'llava-onevision-7b'? There are: llava-onevision-7b, testbed"
    >>> unknown("digit", "z", map(str, range(100, 200)))
    "unknown digit 'z'. There are: 100, 101, 102, 103, 104, 105, 106, 107, 108, 109, and 90 more"
    """
    known = sorted(known)
    longer = [item for item in known if name and item.startswith(name)][:3]
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6) or longer
    hint = f"; did you mean {' or '.join(repr(match) for match in close)}?" if close else "."
    listed = known if len(known) <= MOST_LISTED else [*known[:10], f"and {len(known) - 10} more"]
    return f"unknown {kind} {name!r}{hint} There are: {', '.join(listed) or 'none'}"
