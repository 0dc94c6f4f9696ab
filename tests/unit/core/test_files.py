"""Files that appear whole or not at all, and one-line errors about damaged ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stethoscope.core import files
from stethoscope.core.errors import ArtefactError, ConfigError
from stethoscope.core.types import Generation


def test_a_file_that_goes_while_files_are_described_is_left_out(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("a")
    monkeypatch.setattr(Path, "exists", lambda path: True)  # as it was a moment ago
    assert files.files_state([tmp_path / "a", tmp_path / "b"]) == files.files_state([tmp_path / "a"])


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    files.atomic_write(path, "old")

    def fail():
        with files.replacing(path) as file:
            file.write(b"new")
            assert path.read_text() == "old"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert os.listdir(tmp_path) == ["a.json"]
    assert path.read_text() == "old"
    files.atomic_write(path, "new \ud800")
    assert path.read_bytes() == b"new \\ud800"
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(path, float("nan"))
    assert path.read_bytes() == b"new \\ud800"


def test_where_files_may_go(tmp_path):
    (tmp_path / "file").write_text("kept")
    files.check_out(tmp_path / "new" / "folder")
    files.check_out(tmp_path / "other" / "a.md", is_file=True)
    files.check_out(str(tmp_path / "file"), is_file=True)
    files.check_out("/dev/null", is_file=True)
    assert (tmp_path / "file").read_text() == "kept"
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["file", "new", "folder", "other"]
    for out, is_file in (("file", False), ("file/a", False), ("file/a", True), ("new", True)):
        with pytest.raises(ConfigError, match=f"out=.*{out} cannot be written to: "):
            files.check_out(tmp_path / out, is_file)


def test_leftovers_of_a_killed_process_do_no_harm_and_are_removed(tmp_path):
    path = tmp_path / "a.json"
    script = (
        "import os, sys; from stethoscope.core.files import replacing\n"
        "with replacing(sys.argv[1]) as file: os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", script, str(path)])
    assert not path.exists()
    assert len(os.listdir(tmp_path)) == 1
    files.atomic_write(path, "whole")
    files.remove_temporaries(tmp_path)
    assert os.listdir(tmp_path) == ["a.json"]


def test_writing_follows_no_link(tmp_path):
    other = tmp_path / "other"
    other.write_text("mine")
    (tmp_path / "a").symlink_to(other)
    files.atomic_write(tmp_path / "a", "new")
    assert (other.read_text(), (tmp_path / "a").read_text()) == ("mine", "new")


def test_what_is_appended_after_unshare_has_one_name(tmp_path):
    first, other = tmp_path / "one", tmp_path / "other"
    files.append(first, b"a\n")
    files.link_or_copy(first, other)
    assert other.samefile(first)
    files.unshare(first)
    files.append(first, b"b\n", durable=True)
    assert (first.read_bytes(), other.read_bytes()) == (b"a\nb\n", b"a\n")


def test_a_folder_is_replaced(tmp_path):
    for name in ("place", "made"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    files.replace_folder(tmp_path / "place", tmp_path / "made")
    assert [os.listdir(tmp_path), os.listdir(tmp_path / "place")] == [["place"], ["made"]]


DAMAGE = {
    "empty": b"",
    "cut": b'{"a": [1, 2',
    "null": b"null",
    "list": b"[]",
    "text": b'"a"',
    "nan": b'{"a": NaN}',
    "infinite": b'{"a": 1e999}',
    "digits": b'{"a": ' + b"9" * 5000 + b"}",
    "deep": b"[" * 100_000,
    "encoding": '{"a": "é"}'.encode("latin-1"),
    "zeros": bytes(100),
}


@pytest.mark.parametrize("content", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("read", [files.read_json, files.read_jsonl])
def test_damaged_json(tmp_path, read, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    if read is files.read_jsonl and not content:
        assert read(path) == []
        return
    with pytest.raises(ArtefactError, match=r"a\.json.* is damaged \([^\n]+\); start again\Z"):
        read(path, "start again")


YAML_DAMAGE = {
    "null": b"",
    "list": b"- a",
    "tab": b"a: [\t",
    "mark": b"a: b: c",
    "tag": b"a: !!python/object/apply:os.getcwd []",
    "alias": b"a: &x [1, 2]\nb: [*x, *x]",
    "key": b"[a]: b\n? {c: d}\n: e",
    "date": b"a: 2020-13-45",
    "deep": b"[" * 100_000,
    "zeros": bytes(100),
    "large": b"a: 1\n" + b"#" * files.LARGEST_YAML,
}


@pytest.mark.parametrize("content", YAML_DAMAGE.values(), ids=YAML_DAMAGE)
def test_damaged_yaml(tmp_path, content):
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    with pytest.raises(ArtefactError, match=r"a\.yaml is damaged \([^\n]+\); start again\Z"):
        files.read_yaml(path, "start again")


@pytest.mark.parametrize("read", [files.read_bytes, files.read_json, files.read_jsonl, files.read_yaml])
def test_files_that_cannot_be_opened(tmp_path, read, monkeypatch):
    path = tmp_path / "a"
    with pytest.raises(ArtefactError, match=r"a is missing; start again"):
        read(path, "start again")
    if read is not files.read_bytes:
        assert read(path, default=None) is None
    path.mkdir()
    with pytest.raises(ArtefactError, match="not a regular file"):
        read(path)
    path.rmdir()
    path.symlink_to(path)
    with pytest.raises(ArtefactError, match="cannot be read"):
        read(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ArtefactError, match="not a regular file"):
        read(path)
    path.unlink()
    path.write_text("a")
    monkeypatch.setattr(files.Path, "open", _refuse)
    with pytest.raises(ArtefactError, match=r"a cannot be read \(Permission denied\)"):
        read(path)


def _refuse(path, mode):
    raise PermissionError(13, "Permission denied", str(path))


def test_whole_files(tmp_path):
    path = tmp_path / "a"
    files.write_json(path, {"a": [1.5, None, "é"]})
    assert files.read_json(path) == files.read_yaml(path) == {"a": [1.5, None, "é"]}
    path.write_text('{"a": "\u2028"}\n\n{"a": 2}\n')
    assert files.read_jsonl(path) == [{"a": "\u2028"}, {"a": 2}]


def test_only_this_module_replaces_files():
    """A second way to replace a file would be one without its guarantees."""
    root = files.Path(files.__file__).parents[2]
    modules = [
        path.relative_to(root).as_posix()
        for folder in ("stethoscope", "adapters", "tasks")
        for path in (root / folder).rglob("*.py")
        if "os.replace(" in path.read_text() or "os.rename(" in path.read_text()
    ]
    assert modules == ["stethoscope/core/files.py"]


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (float("nan"), None),
        ({1: (2, 3)}, {"1": [2, 3]}),
        (Generation(max_new_tokens=3), {**files.jsonable(Generation()), "max_new_tokens": 3}),
    ],
)
def test_jsonable(value, plain):
    assert files.jsonable(value) == plain
