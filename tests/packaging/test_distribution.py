"""Wheel, sdist and editable install expose `stethoscope` and nothing else, with YAML files and weights inside."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAPPED = {
    "stethoscope": "stethoscope",
    "adapters": "stethoscope/adapters",
    "tasks": "stethoscope/tasks",
    "conf": "stethoscope/conf",
}


def _expected_files() -> set[str]:
    """What git tracks in the four source folders, under the names it must have inside the package."""
    listed = subprocess.run(
        ["git", "ls-files", *MAPPED], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    return {path.replace(path.split("/")[0], MAPPED[path.split("/")[0]], 1) for path in listed}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder with an sdist of a clean copy of the tree and the wheel that is built from that sdist."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: cannot tell which files belong to the source")
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    archive = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, archive.decode().split("\0")):
        if (ROOT / name).is_file():  # docs/schemas is a link to a folder of the package
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(tree)]
    subprocess.run(build, check=True, capture_output=True)
    return out


def test_wheel_holds_only_the_package_and_all_of_it(built):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        top = next(name for name in wheel.namelist() if name.endswith("top_level.txt"))
        assert wheel.read(top).decode().split() == ["stethoscope"]
    assert {name.split("/")[0] for name in names} == {"stethoscope"}
    assert names == _expected_files()


def test_sdist_holds_the_configuration(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        names = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
    assert {"conf/benchmark.yaml", "conf/model/testbed.yaml", "pyproject.toml", "README.md", "LICENSE"} <= names


def test_wheel_runs_from_another_directory(built, tmp_path):
    site = tmp_path / "site"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--no-index",
            "--target",
            str(site),
            str(next(built.glob("*.whl"))),
        ],
        check=True,
        capture_output=True,
    )
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import stethoscope; print(stethoscope.__file__); "
        "from stethoscope.cli import main; main(['list', 'model'])"
    )
    done = subprocess.run([sys.executable, "-c", script, str(site)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(site))
    assert "testbed" in done.stdout


def test_every_source_folder_is_a_listed_package():
    import tomllib

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    packages = {
        str(path.parent.relative_to(ROOT)).replace(folder, inside, 1).replace("/", ".")
        for folder, inside in MAPPED.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    assert packages == set(listed)


def test_editable_install_exposes_one_top_level_name():
    """The generic folder names must not become importable packages of their own through the installation."""
    script = (
        "import importlib.util as u, stethoscope.adapters, stethoscope.tasks, stethoscope.conf; "
        "print([n for n in ('adapters', 'tasks', 'conf', 'scripts', 'tests') if u.find_spec(n)])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd="/", capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
