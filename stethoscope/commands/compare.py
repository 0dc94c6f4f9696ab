"""Implement ``stethoscope compare``: compare runs on the same samples."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from stethoscope.commands.common import parse, true_or_false
from stethoscope.core.component import package_names
from stethoscope.core.errors import ConfigError, unknown
from stethoscope.core.files import check_out, writing_out
from stethoscope.report.tables import FORMATS, render_tables
from stethoscope.storage.reuse import local_run
from stethoscope.storage.run_dir import saved_task

USAGE = """usage: stethoscope compare RUN RUN [RUN ...] [format=text] [out=FILE] [common=true] [plugins=PACKAGE,...]

Sets finished runs against the first of them, if they answered the same samples of the same version of a task; runs that
did not are refused, and the message names what differs. common=true compares the samples that both have. Of several
seeds with several runs each, a run is set against the first of its own seed. Prints

  runs                  one row each: primary metrics and what the detector is worth
  settings that differ  model, generation, features, detector
  TASK: B against A     every metric, and the difference with its 95 % interval and p-value, paired over images
  detectors: B against A  the same for their detectors, on images that neither has learned from
  leader boards         detectors, baselines and the best single feature of every run

A folder that holds runs stands for all of them, so that a sweep's folder gives more than the one table of its sweep.md.
format: text, markdown, latex (booktabs) or html (a page that needs no network). out: a file instead of the terminal.
plugins: your own packages, if the task of the runs is one of theirs.

  stethoscope compare runs/llava runs/qwen
  stethoscope benchmark --multirun generation=greedy,sample name=study
  stethoscope compare runs/study
  stethoscope compare runs/a runs/b format=latex out=paper/compare.tex"""

SETTINGS = {"format": "text", "out": "", "common": "false", "plugins": ""}


def main(arguments: Sequence[str]) -> None:
    """Print or write the tables of a comparison; remarks go to stderr."""
    from stethoscope.report.compare import compare
    from stethoscope.report.run_report import table_page
    from stethoscope.report.run_source import RunReader, readable

    words, settings = parse("compare", arguments, SETTINGS)
    if settings["format"] not in FORMATS:  # before the runs are read
        raise ConfigError(unknown("format", settings["format"], FORMATS))
    common = true_or_false(settings, "common")
    folders = list(dict.fromkeys(folder for word in words for folder in _run_folders(local_run(word))))
    if len(folders) < 2:
        given = f"; {folders[0]} is one" if folders else ""
        raise ConfigError(f"stethoscope compare takes two runs or more, or a folder of runs{given}")
    if settings["out"]:
        check_out(settings["out"], is_file=True)
    plugins = package_names(settings["plugins"])
    sources = [RunReader.read(folder) for folder in folders]
    with readable(" or ".join(map(str, folders[:4]))):
        tables, remarks = compare(
            sources,
            lambda source, task: saved_task(source.store, task, plugins),
            common,
        )
        if settings["format"] == "html":
            text = table_page(" and ".join(source.name for source in sources[:4]), tables)
        else:
            text = render_tables(tables, settings["format"])
    if settings["out"]:
        with writing_out(settings["out"]):
            Path(settings["out"]).write_text(text, encoding="utf-8", errors="backslashreplace")
        print(settings["out"])
    else:
        print(text, end="")
    for remark in remarks:
        print(f"note: {remark}", file=sys.stderr)


def _run_folders(path: Path) -> list[Path]:
    """List the run folders that a path stands for: itself, or those inside; none for a sweep's own files."""
    if path.name == "multirun.yaml":
        return []
    if path.is_dir() and not (path / "samples.jsonl").is_file():
        inside = sorted(file.parent for file in path.glob("*/samples.jsonl"))
        return inside or [path]
    return [path]
