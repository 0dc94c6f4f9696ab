"""Snapshot of whole error messages: tests of single cases check a key noun, one test per file checks the sentences."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import yaml

SNAPSHOT = Path(__file__).parents[1] / "integration" / "messages.yaml"
ANYTHING = "[...]"
"""Stands in the snapshot for the words of another library, or for the rest of a catalogue of ours."""
LONG_LIST = re.compile(r"(There are: (?:[^,]+, ){2})(?:[^,]+, ){10,}.*")
HEADER = f"""\
# Whole error messages by case, for each test file. Written by `pytest --update-messages FILE` (without xdist).
# <folder> is the test's own folder; {ANYTHING} matches anything: words of another library, the rest of a long list.
# Entries that still match are kept as they are.
"""


def read_snapshot() -> dict[str, dict[str, str]]:
    """Read all sections of the snapshot file; none if it does not exist."""
    return yaml.safe_load(SNAPSHOT.read_text()) if SNAPSHOT.exists() else {}


def matches(expected: str, message: str) -> bool:
    """Compare a whole message with an entry of the snapshot."""
    return re.fullmatch(".*".join(map(re.escape, expected.split(ANYTHING))), message) is not None


class MessageSnapshot:
    """Messages of the cases of one test file, beside those of the snapshot.

    Args:
        section: name of the test file, without ``.py``.
    """

    def __init__(self, section: str) -> None:
        self.section = section
        self.messages: dict[str, str] = {}

    def record(self, case: str, message: str, folder: Path) -> None:
        """Remember the message of a case, without the name of the test's folder."""
        self.messages[case] = message.replace(str(folder), "<folder>")

    def differences(self, cases: Iterable[str]) -> dict[str, tuple[str | None, str | None]]:
        """Return (expected, actual) of the cases whose message is another one, or that one side lacks.

        Args:
            cases: all cases of the file; the snapshot has these and no others.
        """
        expected, cases = read_snapshot().get(self.section, {}), set(cases)
        differing = {case: (expected.get(case), self.messages.get(case)) for case in cases ^ expected.keys()}
        for case, message in self.messages.items():
            if not matches(expected.get(case, ""), message):
                differing[case] = expected.get(case), message
        return differing

    def write(self) -> None:
        """Put this file's messages into the snapshot; entries that match stay as they are written."""
        sections = read_snapshot()
        kept = sections.get(self.section, {})
        sections[self.section] = {
            case: kept[case] if matches(kept.get(case, ""), message) else LONG_LIST.sub(rf"\1{ANYTHING}", message)
            for case, message in self.messages.items()
        }
        text = yaml.safe_dump(dict(sorted(sections.items())), sort_keys=False, allow_unicode=True, width=10_000)
        SNAPSHOT.write_text(HEADER + text)


def error_lines(text):
    """Return the lines of stderr but for those that say what is being done, which end in three dots."""
    return [line for line in text.splitlines() if not line.endswith(" ...")]
