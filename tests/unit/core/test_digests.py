"""What identifies a model, a task and a picture: digests of files, of code, and of what a loaded model holds."""

import hashlib
import importlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from stethoscope.adapters.testbed import TestbedAdapter
from stethoscope.core import digests
from stethoscope.core.digests import cached_digest, source_digest
from stethoscope.core.types import ImageRef
from stethoscope.storage.run_fingerprint import differences
from stethoscope.tasks.pope import Pope
from stethoscope.testbed import MODEL_DIR


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "MIN_CACHED_BYTES", 1)
    return tmp_path / "cache/stethoscope/digests.json"


def test_a_digest_is_remembered_until_a_file_changes_even_if_its_times_are_set_back(tmp_path, cache):
    file, calls = tmp_path / "weights", []

    def compute():
        calls.append(1)
        return hashlib.sha256(file.read_bytes()).hexdigest()

    file.write_bytes(b"one")
    first = cached_digest([file], compute)
    assert [cached_digest([file], compute), len(calls)] == [first, 1]
    stat = file.stat()
    file.write_bytes(b"two")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stat().st_mtime_ns == stat.st_mtime_ns
    assert cached_digest([file], compute) == hashlib.sha256(b"two").hexdigest()
    cache.write_text("{damaged")
    assert cached_digest([file], compute) == hashlib.sha256(b"two").hexdigest()
    assert len(calls) == 3
    assert list(json.loads(cache.read_text()).values()) == [hashlib.sha256(b"two").hexdigest()]


def test_small_files_and_a_home_that_cannot_be_written_to_are_no_trouble(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_bytes(b"x" * 10)
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))  # no folder can be made in a file
    assert cached_digest([file], lambda: "small") == "small"
    monkeypatch.setattr(digests, "MIN_CACHED_BYTES", 1)
    assert cached_digest([file], lambda: "large") == "large"

    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", home)
    assert cached_digest([file], lambda: "without a home") == "without a home"


PACKAGE = {
    "__init__.py": "",
    "task.py": "from mine_{0}.help import words\nfrom . import more\nimport json\n\nclass Task: pass\n",
    "help.py": "words = 1\n",
    "more.py": "import mine_{0}.deep.inner\n",
    "deep/__init__.py": "",
    "deep/inner.py": "depth = 1\n",
    "other.py": "unused = 1\n",
}


@pytest.mark.parametrize("changed", PACKAGE)
def test_code_is_what_a_class_is_made_of_in_its_package(tmp_path, monkeypatch, changed):
    name = f"mine_{list(PACKAGE).index(changed)}"
    for path, text in PACKAGE.items():
        file = tmp_path / name / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text.format(name.removeprefix("mine_")))
    monkeypatch.syspath_prepend(str(tmp_path))
    task = importlib.import_module(f"{name}.task").Task
    before = source_digest(task)
    assert source_digest(task) == before
    file = tmp_path / name / changed
    file.write_text(file.read_text() + "# a word\n")
    assert (source_digest(task) != before) == (changed not in ("other.py", "__init__.py", "deep/__init__.py"))
    monkeypatch.delitem(sys.modules, f"{name}.task")


def test_code_of_classes_of_this_package_and_of_none():
    used = digests._sources([Pope])
    assert {"stethoscope.tasks.pope", "stethoscope.tasks.yes_no", "stethoscope.tasks.base"} <= set(used)
    assert not {"stethoscope.tasks.chair", "stethoscope.metrics.bootstrap"} & set(used)
    used = digests._sources([TestbedAdapter])
    assert {"stethoscope.adapters.hf", "stethoscope.adapters.generation", "stethoscope.adapters.base"} <= set(used)
    typed = type("Typed", (), {"__module__": "__nowhere__"})
    assert source_digest(typed) != source_digest(Pope)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy of the embedded model."""
    return Path(shutil.copytree(MODEL_DIR, tmp_path_factory.mktemp("model") / "model"))


def edit(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def flip(file):
    """Another weight: one bit of the last byte, with the file's old times."""
    stat, content = file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


CHANGES = {
    "weights": ("model.safetensors", flip),
    "settings.image_processor": ("processor_config.json", lambda file: edit(file, "0.27", "0.28")),
    "settings.tokenizer": ("tokenizer.json", lambda file: edit(file, '"lstrip": false', '"lstrip": true')),
    "settings.config": ("config.json", lambda file: edit(file, '_feature_layer": -1', '_feature_layer": -2')),
}


@pytest.mark.parametrize("key", CHANGES)
def test_a_changed_file_of_a_model_changes_its_key_and_no_other(folder, tmp_path, key):
    def fingerprint():
        return TestbedAdapter(model_id=str(copy)).fingerprint()

    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    before = fingerprint()
    assert fingerprint() == before
    name, change = CHANGES[key]
    change(copy / name)
    differing = {changed for changed, *_ in differences(before, fingerprint())}
    assert differing == {key}


def test_what_a_call_leaves_in_a_tokenizer_is_not_part_of_it():
    adapter = TestbedAdapter()
    before = adapter.fingerprint()
    adapter.processor.tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
    assert '"padding":null' not in adapter.processor.tokenizer.backend_tokenizer.to_str()
    assert adapter.fingerprint() == before


def test_a_picture_has_one_digest_and_a_changed_file_another(tmp_path):
    file = tmp_path / "a.png"
    Image.new("RGB", (3, 2), (1, 2, 3)).save(file)
    assert ImageRef("a", file).sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    first = ImageRef("a", file).sha256
    assert not ImageRef("a", file).differs(first)
    Image.new("RGB", (3, 2), (1, 2, 4)).save(file)
    assert ImageRef("a", file).differs(first)
    file.unlink()
    assert not ImageRef("a", file).differs(first)
    loads = []
    picture = ImageRef("b", lambda: loads.append(1) or Image.new("RGB", (3, 2), (1, 2, 3)))
    assert not picture.differs("anything")  # it is not made for that
    picture.load()
    assert picture.differs("anything")
    assert len(loads) == 1
    assert picture.sha256 == hashlib.sha256(b"(3, 2)" + bytes([1, 2, 3] * 6)).hexdigest()


def test_source_is_parsed_again_where_python_loses_count(monkeypatch):
    parse, failures = digests.ast.parse, [1, 1]

    def flaky(text):
        if failures:
            failures.pop()
            raise SystemError("AST constructor recursion depth mismatch (before=204, after=248)")
        return parse(text)

    plain = source_digest(Pope)
    monkeypatch.setattr(digests.ast, "parse", flaky)
    digests._imported_names.cache_clear()  # what has been parsed is known
    assert source_digest(Pope) == plain
    assert failures == []
    failures.extend([1, 1, 1])
    digests._imported_names.cache_clear()
    with pytest.raises(SystemError):
        source_digest(Pope)
