"""Implement ``stethoscope judge``: hallucination probabilities for captions of any model.

Imports no torch.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from stethoscope.commands.common import parse, true_or_false
from stethoscope.core.errors import ConfigError, DataError
from stethoscope.core.files import plain_json, replacing
from stethoscope.core.json_rows import check_line
from stethoscope.core.text import console, one_line

if TYPE_CHECKING:
    from stethoscope.detection.text_only import TextOnlyDetector

USAGE = """usage: stethoscope judge CAPTIONS.jsonl out=JUDGED.jsonl [overwrite=false] [detector=FILE]

Says of every COCO object that a caption names how probable it is that the object is not in the picture. It reads the
caption alone: where the object is named first, how often, what is named before and beside it, how well it fits the
scene, and how often that word was wrong in 4,761 captions of eight model families. It needs no picture, no model and
no GPU, and works on captions of any model; a detector that listens to the model itself should do better than this.

CAPTIONS.jsonl: a JSON object on every line, with a text under `caption`. Every line comes back, in the same order and
with all its other keys, with a list `mentions` (which replaces one that is there). For the line

  {"image_id": 7, "caption": "A man with a dog. There is also a handbag."}

it holds an object for each mention of one of COCO's 80 objects, such as

  {"name": "dog", "start": 13, "end": 16, "probability": 0.0186}

start and end are characters of the caption, from 0. All mentions of one object in a caption have one probability. It is
calibrated on the eight families together: a model that hallucinates far more or less than they do needs its own
threshold (docs/captions.md has the figures). Written names are CHAIR's, so that the colour orange counts as the fruit.

overwrite: replace a file that is there. detector: a file of your own, from `TextOnlyDetector.fit(...).save(FILE)`.
Nothing is written if a line is broken; the error names it.

  stethoscope judge captions.jsonl out=judged.jsonl"""

SETTINGS = {"out": "", "overwrite": "false", "detector": ""}
BATCH = 256  # lines
PATIENCE = 1.0  # seconds before the bar is shown
EVERY = 30.0  # seconds between plain lines where the output is no terminal


def main(arguments: Sequence[str]) -> None:
    """Judge the captions of one file and write them to another."""
    files, settings = parse("judge", arguments, SETTINGS)
    if len(files) != 1:
        raise ConfigError(f"stethoscope judge takes one file of captions, not {len(files)}; `--help` explains its form")
    overwrite = true_or_false(settings, "overwrite")
    source, target = Path(files[0]), Path(settings["out"])
    if not settings["out"]:
        raise ConfigError("out must be given: add the file to write, as in out=judged.jsonl")
    if not source.is_file():
        raise DataError(f"{source} is {'no regular file' if source.exists() else 'missing'}; name a file of JSON lines")
    check_target(source, target, overwrite)
    from stethoscope.detection.text_only import TextOnlyDetector

    detector = TextOnlyDetector.load(settings["detector"] or None)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with source.open("rb") as lines, replacing(target) as output:
            counts = judge_lines(lines, output, detector, FileProgress(source))
    except OSError as error:
        raise ConfigError(f"{source} cannot be read or out={target} cannot be written to: {error}") from None
    print(target)
    captions, mentions, expected = counts
    share = f"; {expected:.0f} of these, {expected / mentions:.0%}, are expected to be invented" if mentions else ""
    print(f"note: {captions} captions name {mentions} COCO objects{share}", file=sys.stderr)


def check_target(source: Path, target: Path, overwrite: bool) -> None:
    """Check that the output file may be written.

    Raises:
        ConfigError: it is the input file, a folder or device, or is there and ``overwrite`` is false.
    """
    if not os.path.lexists(target):
        return
    if target.exists() and not target.is_file():  # a device would be replaced by a file
        raise ConfigError(
            f"out={target} is {'a folder' if target.is_dir() else 'no regular file'}; it should be a file"
        )
    if target.exists() and target.samefile(source):
        raise ConfigError(f"out={target} is the file of captions itself; it should be another one")
    if not overwrite:
        raise ConfigError(f"out={target} exists; choose another file, or add overwrite=true")


def judge_lines(
    lines: BinaryIO, output: BinaryIO, detector: TextOnlyDetector, progress: FileProgress
) -> tuple[int, int, float]:
    """Judge all lines of a file.

    Args:
        lines: of JSON.
        output: to write them to.
        detector: fitted.
        progress: to tell about bytes read.

    Returns:
        Numbers of captions and of mentions, and the sum of the mentions' probabilities.

    Raises:
        DataError: a line is broken or has no caption; the message names it.
    """
    captions, mentions, expected = 0, 0, 0.0
    rows = read_rows(lines, progress.name)
    with progress:
        while batch := list(islice(rows, BATCH)):
            judged = detector.predict(row["caption"] for row in batch)
            for row, named in zip(batch, judged, strict=True):
                row["mentions"] = [
                    {**mention._asdict(), "probability": round(mention.probability, 4)} for mention in named
                ]
                # halves of surrogate pairs, which JSON can hold and UTF-8 cannot, are written as escapes
                output.write((json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))
                mentions += len(named)
                expected += math.fsum(mention.probability for mention in named)
            captions += len(batch)
            progress.update(lines.tell(), captions)
    return captions, mentions, expected


def read_rows(lines: Iterable[bytes], name: str) -> Iterator[dict[str, Any]]:
    """Read the objects of JSON lines; blank lines are skipped.

    Args:
        lines: of a file, as bytes.
        name: of the file, for messages.

    Raises:
        DataError: a line is not UTF-8, not JSON or not an object, or its caption is missing or not text.
    """
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            row = plain_json(text)
        except UnicodeDecodeError as error:
            raise DataError(f"{name}:{number} is not UTF-8 text: {error.reason} at byte {error.start}") from None
        except (ValueError, RecursionError) as error:
            reason = "it is nested too deeply" if isinstance(error, RecursionError) else one_line(error)
            raise DataError(f"{name}:{number} is not a line of JSON ({reason}); it should be an object") from None
        if not isinstance(row, dict):
            raise DataError(f"{name}:{number} is {type(row).__name__}; it should be an object with a caption")
        if "caption" not in row:
            keys = ", ".join(map(str, list(row)[:8])) or "none"
            raise DataError(f"{name}:{number} has no caption; its keys are: {one_line(keys)[:200]}")
        check_line("captions", row, f"{name}:{number}")
        yield row


class FileProgress:
    """Progress through a file: a bar in a terminal, plain lines elsewhere.

    Nothing is shown for a file that is read quickly.
    """

    def __init__(self, source: Path) -> None:
        """Measure the file; nothing is shown in the first second."""
        self.name = str(source)
        self.size = source.stat().st_size
        self._started = self._printed = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> FileProgress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, captions: int) -> None:
        """Show how far the file has been read.

        Args:
            done: bytes.
            captions: judged so far.
        """
        now = time.monotonic()
        seconds = now - self._started
        if seconds < PATIENCE:
            return
        rate = f"{captions} captions, {captions / seconds:.0f}/s"
        if sys.stderr is not None and sys.stderr.isatty():
            if self._bar is None:
                self._start()
            self._bar.update(self._task, completed=done, rate=rate)
        elif now - self._printed >= EVERY and done < self.size:
            self._printed = now
            left = seconds * (self.size - done) / max(done, 1)
            print(f"{self.name}: {done / self.size:.0%}, {rate}, {left:.0f} s left", file=sys.stderr)

    def _start(self) -> None:
        from rich import progress

        self._bar = progress.Progress(
            progress.TextColumn("judge"),
            progress.BarColumn(),
            progress.TaskProgressColumn(),
            progress.TextColumn("{task.fields[rate]}", markup=False),
            progress.TimeRemainingColumn(),
            console=console(stderr=True),
        )
        self._task = self._bar.add_task("judge", total=self.size, rate="")
        self._bar.start()
