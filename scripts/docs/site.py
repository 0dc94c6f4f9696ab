"""MkDocs hooks: tables from the registry, the package for the API reference, ``llms.txt``.

A page names a table by a comment, ``<!-- table: features -->``; the function ``features_table`` writes it.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from stethoscope.core.component import choices, conf_folder

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "build" / "docs-package" / "stethoscope"
MARK = re.compile(r"^<!-- table: ([a-z_]+)(?: ([a-z_]+))? -->$", re.MULTILINE)


def on_startup(command: str, dirty: bool) -> None:
    """Put the package together as it is installed.

    `adapters`, `tasks` and `conf` are folders of their own here.

    It is done before the configuration is read, since Griffe drops search paths that do not exist yet.
    """
    shutil.rmtree(PACKAGE.parent, ignore_errors=True)
    PACKAGE.mkdir(parents=True)
    for path in (ROOT / "stethoscope").iterdir():
        if path.is_file():  # a copy: Griffe would look for the other modules beside the target of a linked __init__.py
            shutil.copy(path, PACKAGE)
        elif path.name != "__pycache__":
            (PACKAGE / path.name).symlink_to(path)
    for name in ("adapters", "tasks"):
        (PACKAGE / name).symlink_to(ROOT / name)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Replace the marks of a page by their tables."""
    return MARK.sub(lambda mark: TABLES[mark[1]](*filter(None, [mark[2]])), markdown)


def on_post_build(config: Any) -> None:
    """Write ``llms.txt`` and, beside every page, its Markdown."""
    site, docs = Path(config["site_dir"]), Path(config["docs_dir"])
    lines = [f"# {config['site_name']}", "", f"> {config['site_description']}", ""]
    for section, title, name in _pages(config["nav"]):
        if section is not None and f"## {section}" not in lines:
            lines += ["", f"## {section}", ""]
        text = MARK.sub(lambda mark: TABLES[mark[1]](*filter(None, [mark[2]])), (docs / name).read_text("utf-8"))
        (site / name).write_text(_with_snippets(text), "utf-8")
        lines.append(f"- [{title}]({name}): {config['extra']['descriptions'][name]}")
    (site / "llms.txt").write_text("\n".join(lines) + "\n", "utf-8")


def _pages(nav: Iterable[Any], section: str | None = None) -> Iterable[tuple[str | None, str, str]]:
    """Yield section, title and file of every page, in the order of the navigation."""
    for entry in nav:
        for title, target in entry.items():
            if isinstance(target, str):
                yield section, title, target
            else:
                yield from _pages(target, title)


def _with_snippets(text: str) -> str:
    return re.sub(r'^--8<-- "(.+)"$', lambda mark: (ROOT / mark[1]).read_text("utf-8"), text, flags=re.MULTILINE)


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Write a Markdown table.

    >>> print(table(["a", "b"], [["1|2", 3]]))
    | a | b |
    | --- | --- |
    | 1\\|2 | 3 |
    """
    lines = [header, ["---"] * len(header), *([str(cell).replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def choices_table(group: str) -> str:
    """List the choices of a configuration group with their explanations."""
    return table([f"`{group}=`", "what"], ((f"`{name}`", title) for name, title in choices(group).items()))


def settings_table(group: str) -> str:
    """Show every configuration file of a group: its comments explain the settings."""
    parts = []
    for name in choices(group):
        text = (conf_folder() / group / f"{name}.yaml").read_text("utf-8")
        parts += [f"### {name}", f"```yaml\n{text.strip()}\n```"]
    return "\n\n".join(parts)


def features_table() -> str:
    """List every feature by its group."""
    from stethoscope.features import FEATURES, GROUPS

    parts = []
    for group in GROUPS:
        members = [item for item in FEATURES.values() if item.group == group]
        rows = ((f"`{item.name}`", item.summary.replace("``", "`"), item.higher_means, item.cost) for item in members)
        parts += [f"### {group}", table(["feature", "what", "high values mean", "cost"], rows)]
    return "\n\n".join(parts)


def feature_sets_table() -> str:
    """List the sets that are no published detector, with their size and cost."""
    from stethoscope.features import named_set

    sets = {name: title for name, title in choices("features").items() if not name.startswith("paper/")}
    rows = [(f"`{name}`", title, len(named_set(name).features), named_set(name).cost) for name, title in sets.items()]
    return table(["`features=`", "what", "features", "cost"], rows)


def published_table() -> str:
    """List published detectors: what is read of them, and what their values were compared with."""
    from stethoscope.features import FEATURES, named_set

    status = yaml.safe_load((ROOT / "docs" / "reproduction.yaml").read_text("utf-8"))
    rows = []
    for name, title in choices("features").items():
        if not name.startswith("paper/"):
            continue
        features = named_set(name)
        learner = (features.learner or {"kind": "logistic"})["kind"].replace("_", " ")
        learned = f"{learner}, learned from {len(features.features)} features"
        kind = f"score `{features.score}`" if features.score else learned
        if features.score:
            kind += f", high values mean {FEATURES[features.score].higher_means}"
        facts = status[name.removeprefix("paper/")]
        known = (facts.get("paper", "not stated"), facts["ours"], facts["checked"], facts["differs"])
        rows.append((f"`{name}`", title, kind, features.cost, *known))
    head = [
        "set",
        "method",
        "used as",
        "cost",
        "the paper's own figure",
        "embedded model",
        "compared with",
        "what differs from the paper",
    ]
    return table(head, rows)


def public_names() -> str:
    """Link to the public names of the top level, or document those that no package's page has."""
    import stethoscope

    documented = {path.stem for path in (ROOT / "docs" / "api").glob("*.md")}
    parts = []
    for name in stethoscope.__all__:
        thing = getattr(stethoscope, name)
        if name == "__version__":
            continue
        path = f"{thing.__module__}.{thing.__qualname__}"
        known = path.count(".") > 2 and path.split(".")[1] in documented  # not what a package's __init__ defines
        parts.append(f"- [`stethoscope.{name}`][{path}]" if known else f"\n::: {path}\n")
    return "\n".join(sorted(parts))


def modules_of(package: str) -> str:
    """Document every public module of a package."""
    folder = ROOT / package if package in ("adapters", "tasks") else ROOT / "stethoscope" / package
    names = sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))
    return "\n\n".join(f"::: stethoscope.{package}.{name}" for name in names)


TABLES: dict[str, Callable[..., str]] = {
    "api": modules_of,
    "choices": choices_table,
    "settings": settings_table,
    "features": features_table,
    "feature_sets": feature_sets_table,
    "public_names": public_names,
    "published": published_table,
}
