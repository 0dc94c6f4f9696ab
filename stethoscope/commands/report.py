"""Implement ``stethoscope report``: tables, plots and examples of a run, without a model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from stethoscope.commands.common import parse, picture_loader, true_or_false
from stethoscope.core.component import import_plugins, package_names
from stethoscope.core.errors import ConfigError
from stethoscope.core.files import atomic_write, check_out, writing_out
from stethoscope.storage.reuse import is_address, local_run

USAGE = """usage: stethoscope report RUN [out=FOLDER] [cases=6] [pictures=true] [plugins=PACKAGE,...]

Writes what a finished run has found, into its own directory or into out=FOLDER:

  report.html   one page that needs no network: metrics of every task with 95 % intervals and the counts of samples that
                were ok, unparsed or failed; the leader board; ROC, precision and recall, reliability, AUROC by token
                position, feature importance; caught, missed and falsely warned mentions in their answers and pictures
  report.md     the same tables as Markdown
  report.tex    the same tables as LaTeX (booktabs)

No model is loaded. Pictures and heat maps are those that the run has kept (callbacks.maps); other pictures come from
where the run took them, if that is still there. pictures=false leaves them out.
A run without a detector gives a report of its tasks; `stethoscope train run=RUN` adds the rest.
cases: mentions of every kind in the gallery. plugins: your own packages, if the run's task is one of theirs.

  stethoscope benchmark limit=300 name=quick
  stethoscope report runs/quick
  stethoscope report runs/quick out=paper/tables pictures=false"""

SETTINGS = {"out": "", "cases": "6", "pictures": "true", "plugins": ""}


def main(arguments: Sequence[str]) -> None:
    """Write the report of one run and print its files."""
    from stethoscope.report.run_report import collect_report
    from stethoscope.report.run_source import RunReader, readable

    runs, settings = parse("report", arguments, SETTINGS)
    if len(runs) != 1:
        raise ConfigError(f"stethoscope report takes one run, not {len(runs)}; `stethoscope compare` takes several")
    if not settings["cases"].isdecimal():
        raise ConfigError(f"cases={settings['cases']} should be a number, 0 or more")
    with_pictures = true_or_false(settings, "pictures")
    if is_address(runs[0]) and not settings["out"]:
        raise ConfigError(f"the report of {runs[0]} needs a folder of this machine: out=FOLDER")
    source = RunReader.read(local_run(runs[0]))
    folder = Path(settings["out"]) if settings["out"] else source.folder
    check_out(folder)
    plugins = package_names(settings["plugins"])
    import_plugins(plugins)
    missing = "the gallery has no pictures"
    picture = picture_loader(source.store, plugins, missing) if with_pictures else None
    with readable(source.folder):
        report = collect_report(source, int(settings["cases"]), picture)
        written = {"report.html": report.html(), "report.md": report.markdown(), "report.tex": report.latex()}
    with writing_out(folder):
        for name, text in written.items():
            atomic_write(folder / name, text)
    if source.no_detector():
        print(f"note: {source.no_detector()}", file=sys.stderr)
    print("\n".join(str(folder / name) for name in written))
