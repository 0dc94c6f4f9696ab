"""Every command and snippet of the README and the documentation: run, or at least composed and compiled.

A block is run unless ``<!-- snippet: parse (REASON) -->`` stands before it; it is then parsed, compiled, and composed
with Hydra. Blocks of a page run one after another in a folder of the page's own, which has ``examples/``. A block of
text after ``<!-- output -->`` is what the blocks before it print.
"""

import ast
import importlib
import re
import shlex
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml

from stethoscope.cli import main
from stethoscope.features import FEATURES

ROOT = Path(__file__).parents[2]
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(
    r"^(?:<!-- (?P<mark>snippet: parse \([^\n]+\)|output) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
INLINE = re.compile(r"(?<!`)`((?:stethoscope|python|make) [^`\n]+)`(?!`)")
PLACEHOLDER = re.compile(r"\.\.\.|\b[A-Z]{3,}\b|<")
LINE_COMMANDS = {
    "list": ["--help"],
    "report": ["--help"],
    "compare": ["--help"],
    "judge": ["--help"],
}  # no Hydra applications
OTHER_PROGRAMS = {"git", "cd", "export", "wandb", "pre-commit"}
SLOW = {"README", "quickstart", "detectors", "looking", "mitigation", "runs", "streaming", "features"}
SLOW |= {"own/feature", "own/detector", "own/estimator", "shift"}
"""Pages that train a detector, stream, or compare methods; what they show is tested on fewer scenes elsewhere."""
NUMBER = re.compile(r"\d*\.?\d+")


class Block(NamedTuple):
    """A fenced block: its language, its text, and the mark before it."""

    language: str
    code: str
    mark: str


def blocks(path):
    return [Block(match["language"], match["code"], match["mark"] or "") for match in FENCE.finditer(path.read_text())]


def page(path):
    return path.relative_to(ROOT).with_suffix("").as_posix().removeprefix("docs/")


def commands(code):
    """Command lines of a block as lists of words, comments left out."""
    for line in code.replace("\\\n", " ").splitlines():
        words, command = shlex.split(line, comments=True), []
        for word in [*words, "&&"]:
            if word != "&&":
                command.append(word)
            elif command:
                yield command
                command = []


def split_environment(words):
    """Assignments before a command, and the command."""
    count = next(index for index, word in enumerate(words) if not re.match(r"[A-Z_]+=", word))
    return dict(word.split("=", 1) for word in words[:count]), words[count:]


def call(words):
    """Call the command line in this process; return its exit code."""
    with pytest.raises(SystemExit) as end:
        main(words)
    return end.value.code or 0


def compose(words):
    """Let a command of ours compose its configuration, and print its help instead of doing anything."""
    multirun, words = "--multirun" in words, [word for word in words if word != "--multirun"]
    if not words or words[0] in LINE_COMMANDS or words == ["doctor"]:
        assert call([*words[:1], "--help"]) == 0
        return
    if multirun:  # the first job of the grid
        words = [word.split(",")[0] if "[" not in word else word for word in words]
    assert call([*words, "--help"] if "--help" not in words else words) == 0, words


def check_other(program, rest):
    """Check a command that is none of ours: its files, targets and extras exist."""
    if program == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), rest
    elif program in ("python", "sbatch"):
        module = rest[1].replace(".", "/") if rest[0] == "-m" else ""
        assert module == "pytest" or any((ROOT / word).exists() for word in [*rest, module] if word), rest
    elif program == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        extras = re.findall(r"\[([\w,]+)\]", " ".join(rest))
        assert {name for part in extras for name in part.split(",")} <= project["optional-dependencies"].keys(), rest
    elif program == "uvicorn":
        assert (ROOT / rest[rest.index("--app-dir") + 1] / f"{rest[-1].partition(':')[0]}.py").is_file(), rest
    elif program in ("torchrun", "accelerate"):
        compose(rest[rest.index("stethoscope") + 1 :])
    else:
        assert program in OTHER_PROGRAMS, f"{program} is not known here: teach the test what it should check"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder with ``examples/``; modules and features of the examples are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.setattr("stethoscope.detection.leaderboard.SHUFFLES", 1)
    torch.set_num_threads(1)
    features, modules = dict(FEATURES), set(sys.modules)
    yield tmp_path
    FEATURES.clear()
    FEATURES.update(features)
    for name in {file.stem for file in (ROOT / "examples").glob("*.py")} & (set(sys.modules) - modules):
        del sys.modules[name]


@pytest.mark.parametrize("path", FILES, ids=page)
def test_blocks_can_be_parsed(path, here, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    for block in blocks(path):
        if block.code.startswith("--8<--"):
            assert (ROOT / shlex.split(block.code)[1]).is_file()
        elif block.language == "python":
            imports_exist(ast.parse(block.code))
        elif block.language == "yaml":
            yaml.safe_load(block.code)
        elif block.language == "bash":
            for words in commands(block.code):
                _, (program, *rest) = split_environment(words)
                compose(rest) if program == "stethoscope" else check_other(program, rest)
        else:
            assert block.language == "text", f"no test for blocks of {block.language}"


def imports_exist(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name) or importlib.import_module(f"{node.module}.{alias.name}")


@pytest.mark.parametrize("path", FILES, ids=page)
def test_commands_in_the_text(path, here):
    text = FENCE.sub("", path.read_text())
    for code in INLINE.findall(text):
        program, *rest = shlex.split(code)
        if program == "stethoscope":
            unclear = PLACEHOLDER.search(code)
            compose(rest[:1] if unclear else rest)
        elif not PLACEHOLDER.search(code):
            check_other(program, rest)


RUN = [path for path in FILES if any(block.language in ("bash", "python") and not block.mark for block in blocks(path))]


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=[pytest.mark.slow] * (page(path) in SLOW), id=page(path)) for path in RUN]
)
def test_blocks_run(path, here, monkeypatch, capsys):
    namespace, printed = {"__name__": "__main__"}, ""
    for block in blocks(path):
        if block.mark == "output":
            check_output(block.code, printed)
        elif block.mark or block.code.startswith("--8<--"):
            continue
        elif block.language == "python":
            exec(compile(block.code, str(path), "exec"), namespace)
        elif block.language == "bash":
            for words in commands(block.code):
                environment, (program, *rest) = split_environment(words)
                for folder in filter(None, [environment.get("PYTHONPATH")]):
                    monkeypatch.syspath_prepend(folder)
                if program == "stethoscope":
                    code = call(rest)
                    printed += capsys.readouterr().out
                    assert code == 0, (rest, printed[-2000:])
        printed += capsys.readouterr().out


def check_output(expected, printed):
    """Every line that a page shows is printed, its numbers within 5 % or 0.05, or 3 of a percentage."""
    for line in filter(None, map(str.rstrip, expected.splitlines())):
        same = [other for other in map(str.rstrip, printed.splitlines()) if shape(other) == shape(line)]
        assert same, f"not printed: {line}"
        assert any(near(line, other) for other in same), (line, same)


def shape(line):
    return re.sub(r"\s+", " ", NUMBER.sub("#", line))


def near(line, other):
    slack = 3 if "%" in line else 0.05
    pairs = zip(NUMBER.findall(line), NUMBER.findall(other), strict=True)
    return all(float(first) == pytest.approx(float(two), rel=0.05, abs=slack) for first, two in pairs)


def test_the_readme_is_short_and_begins_with_two_commands():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 900
    first = next(block for block in blocks(ROOT / "README.md") if block.language == "bash")
    assert [words[:2] for words in commands(first.code)] == [["make", "demo"], ["make", "test"]]


def test_the_picture_of_the_app_is_small():
    assert (ROOT / "docs" / "assets" / "app.png").stat().st_size <= 150_000
