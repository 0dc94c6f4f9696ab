"""Run the slow tests file by file, and keep a table of what passed at which commit.

All slow tests take more than two hours; this goes through them in as many sittings as one likes. A file is run unless
it has passed at the present commit: first those that failed, then those that never ran, then those whose last run is
the oldest. What is printed by a file that fails is in ``build/slow/``, beside the table.

    python scripts/check/slow_tests.py                 # all; stopped by Ctrl-C, it goes on from there
    python scripts/check/slow_tests.py --minutes 30    # begins no further file after half an hour
    python scripts/check/slow_tests.py tests/app       # only these files and folders
    python scripts/check/slow_tests.py --table         # runs nothing

Exits with 1 if the last run of any file that is asked for has failed, also with ``--table``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "slow"
RECORDS = FOLDER / "records.json"
PYTEST = [sys.executable, "-m", "pytest", "-m", "slow", "-q"]
ENDED = {0: "passed", 5: "passed"}
"""Exit codes of pytest; 5: a file without slow tests."""


def slow_files(paths: Sequence[str]) -> list[str]:
    """List the files that have slow tests.

    Args:
        paths: files and folders to look in; none for all.

    Raises:
        SystemExit: pytest cannot collect them.
    """
    listing = subprocess.run([*PYTEST, "--collect-only", *paths], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode not in ENDED:
        raise SystemExit(listing.stdout + listing.stderr)
    return sorted({line.partition("::")[0] for line in listing.stdout.splitlines() if "::" in line})


def commit() -> str:
    """Name the present commit, with ``+`` if files differ from it."""
    options: dict[str, Any] = {"cwd": ROOT, "capture_output": True, "text": True, "check": True}
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **options).stdout.strip()
    changed = subprocess.run(["git", "status", "--porcelain"], **options).stdout
    return f"{head}+" if changed else head


def order(files: Sequence[str], records: dict[str, Any], now: str) -> list[str]:
    """Order the files that have not passed at this commit by what is the most urgent."""
    due = [file for file in files if now.endswith("+") or records.get(file, {}).get("passed") != now]
    return sorted(due, key=lambda file: (not records.get(file, {}).get("failed"), records.get(file, {}).get("day", "")))


def run(file: str, record: dict[str, Any], now: str) -> dict[str, Any]:
    """Run the slow tests of a file.

    Args:
        file: of tests.
        record: of its runs before; empty for none.
        now: name of the commit.

    Returns:
        ``passed``, the last commit at which all passed; ``failed``, the present one if it failed, else None; ``day``,
        ``seconds`` and pytest's ``summary`` of this run.
    """
    begun = time.monotonic()
    done = subprocess.run([*PYTEST, file], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    good = done.returncode in ENDED
    log = FOLDER / (file.replace("/", "-") + ".txt")
    log.unlink(missing_ok=True)
    if not good:
        log.write_text(done.stdout, encoding="utf-8")
    return {
        "passed": now if good else record.get("passed"),
        "failed": None if good else now,
        "day": time.strftime("%Y-%m-%d %H:%M"),
        "seconds": round(time.monotonic() - begun),
        "summary": done.stdout.strip().rpartition("\n")[2].strip("= "),
    }


def line(file: str, record: dict[str, Any]) -> str:
    """Write a row of the table."""
    if not record:
        return f"never run         {file}"
    state = f"FAILED {record['failed']}" if record["failed"] else f"passed {record['passed']}"
    return f"{state:<17} {file}  {record['day']}, {record['seconds']} s: {record['summary']}"


def main() -> None:
    """Run what is due, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", help="files and folders; all if none is given")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no further file after so long")
    parser.add_argument("--table", action="store_true", help="print what has passed when, and run nothing")
    options = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    records = json.loads(RECORDS.read_text(encoding="utf-8")) if RECORDS.is_file() else {}
    files, now, end = slow_files(options.paths), commit(), time.monotonic() + 60 * options.minutes
    for file in [] if options.table else order(files, records, now):
        if time.monotonic() >= end:
            break
        records[file] = run(file, records.get(file, {}), now)
        RECORDS.write_text(json.dumps(records, indent=1), encoding="utf-8")
        print(line(file, records[file]), flush=True)
    failed = [file for file in files if records.get(file, {}).get("failed")]
    due = order(files, records, now)
    if options.table:
        print(*(line(file, records.get(file, {})) for file in files), sep="\n")
    print(f"{len(files) - len(due)} of {len(files)} files have passed at {now}, {len(failed)} failed when last run")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
