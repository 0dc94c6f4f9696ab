"""Odd names and values through the commands: folders of our own sweeps, secrets, characters that steer a terminal."""

import json
import shutil

import pytest
from helpers.made_up_runs import made_up_run
from PIL import Image

from stethoscope.cli import main
from stethoscope.detection import leaderboard

SECRET = "Zq7" + "verySecret9" * 2
HOSTILE = "a\x1b[31mred\x1b]8;;http://x\x1b\\link\x1b]52;c;eA==\x07\rb\u202ec\x9b2J[bold]d[/bold]"
STEERING = ("\x1b", "\x07", "\r", "\u202e", "\x9b")
QUICK = ["detector.C=0.1", "published=false", "logger=none"]
TINY = ["model.random_init=tiny", "callbacks=none", "logger=none"]


@pytest.fixture
def call(tmp_path, monkeypatch, capfd):
    """Runs a command in an empty folder; what it has printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(leaderboard, "SHUFFLES", 1)

    def run(*words, code=0):
        with pytest.raises(SystemExit) as end:
            main([str(word) for word in words])
        printed = capfd.readouterr()
        text = printed.out + printed.err
        assert end.value.code == code, text
        return text

    return run


@pytest.fixture
def odd_run(tmp_path):
    """A run in a folder as sweeps make them, and worse."""
    return made_up_run(tmp_path / "runs" / "study, (b) [c]" / "max_new_tokens=4 'd' {e} $f é", images=100)


@pytest.mark.slow
def test_a_run_in_an_odd_folder(call, odd_run, tmp_path):
    """Given by every command that takes a run."""
    other = shutil.copytree(odd_run, odd_run.with_name("max_new_tokens=6"))
    call("train", f"run={odd_run}", *QUICK, f"test=[{other}]", code=2)  # the brackets inside end the list
    quoted = str(other).replace("'", "\\'")
    assert "detector:" in call("train", f"run={odd_run}", *QUICK, f"test=['{quoted}']")
    call("train", f"run={odd_run}", *QUICK, f"test={other}", f"run_dir={tmp_path}/a=b, c")
    assert (tmp_path / "a=b, c" / "detector").is_dir()
    words = ["diagnose", *TINY[:1], "answer=a dog", "question='a' or 'b'"]
    assert "'a' or 'b'" in call(*words, f"out={tmp_path}/o=1, 'x'", "detector=None")
    assert (tmp_path / "o=1, 'x'" / "report.html").is_file()
    assert "the detector reads features" in call(*words, f"detector={odd_run}", code=2)


@pytest.mark.slow
def test_a_sweep_over_odd_folders(call, odd_run, tmp_path):
    other = shutil.copytree(odd_run, odd_run.with_name("limit=6"))
    values = ",".join('"' + str(folder) + '"' for folder in (odd_run, other))
    text = call(
        "train",
        "--multirun",
        f"run={values}",
        "hydra.sweep.dir=runs/it's = [a], b",
        "detector.objects=False,True",
        *QUICK,
    )
    folder = tmp_path / "runs" / "it's = [a], b"
    jobs = json.loads((folder / "sweep.json").read_text())
    assert [job["settings"]["run"] for job in jobs] == [str(odd_run)] * 2 + [str(other)] * 2
    assert {job["status"] for job in jobs} == {"finished"}
    assert "runs/it's = [a], b/sweep.md" in text


def test_folders_of_our_own_sweep(call, tmp_path):
    words = [
        "evaluate",
        "--multirun",
        *TINY,
        "task=chair",
        "task.scenes=2",
        "name=study",
        "generation.max_new_tokens=None,3",
    ]
    call(*words, f"task.question={json.dumps('What, please, is there?')}")
    folders = sorted((tmp_path / "runs" / "study").glob("*max_new_tokens*"))
    assert [folder.name for folder in folders] == ["max_new_tokens-3", "max_new_tokens-null"]
    call("extract", f"run={folders[0].relative_to(tmp_path)}", "features=fast", "trace=all", "callbacks=none")
    assert "What, please, is there?" in (folders[0] / "samples.jsonl").read_text()
    assert "report.html" in call("report", folders[0], "pictures=False", "plugins=None")
    assert "CHAIR" in call("compare", *folders)
    (tmp_path / "limit=4").symlink_to(folders[0])
    assert "CHAIR" in call("compare", "limit=4", folders[1])


def test_bytes_that_are_no_text_in_paths(call, tmp_path):
    """File systems know such names; they are kept in config.yaml as they are and shown as escapes."""
    folder = tmp_path / "B\udce4ume"
    folder.mkdir()
    Image.new("RGB", (32, 32)).save(folder / "x.png")
    words = ["task=custom", f"task.images={folder}", "task.question=What?", "generation.max_new_tokens=2"]
    text = call("evaluate", *TINY, *words, "name=R\udce4um", "limit=1")
    assert r"runs/R\xe4um" in text
    call("extract", "run=runs/R\udce4um", "features=fast", "trace=all", "callbacks=none")


@pytest.mark.slow
def test_secrets_of_a_sweep_are_in_no_file_and_no_line(call, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", f"hf_{SECRET}")
    words = [
        "evaluate",
        "--multirun",
        "model.random_init=tiny",
        "callbacks=none",
        "task=pope",
        "task.scenes=1",
        "limit=2",
    ]
    words += ["generation.max_new_tokens=2", "seed=0,1", f"+api_key={SECRET}", f"+more={{hub_token: {SECRET}}}"]
    text = call(*words, f"+proxy='http://me:{SECRET}@host',https://you:{SECRET}@host", f"task.suffix= hf_{SECRET}")
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    kept = [path for path in files if path.name not in ("samples.jsonl",) and SECRET.encode() in path.read_bytes()]
    assert {path.name for path in files} >= {
        "multirun.yaml",
        "config.yaml",
        "overrides.yaml",
        "sweep.json",
        "events.jsonl",
    }
    assert kept == []
    assert SECRET not in text
    assert not [path for path in (tmp_path / "runs").rglob("*") if SECRET in path.name]
    assert SECRET not in call("evaluate", f"+api_key={SECRET}", f"model.name=https://me:{SECRET}@h", "--cfg", "job")
    assert SECRET not in call("evaluate", f"+api_key={SECRET},{SECRET}", code=2)
    assert SECRET not in call("evaluate", f"task=https://me:{SECRET}@host", code=2)


@pytest.mark.slow
def test_hostile_names_do_not_steer_the_terminal(call, tmp_path):
    name = HOSTILE.replace("/", "_")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "images" / f"{name}.png")
    line = {
        "image": f"{name}.png",
        "question": HOSTILE,
        "answer": f"A dog. {HOSTILE}",
        "id": HOSTILE,
        "subset": HOSTILE,
    }
    rows = [{**line, "objects": ["dog"]}, {**line, "objects": ["cat"], "id": "2", "subset": f"other {HOSTILE}"}]
    broken = {**line, "objects": ["dog"], "id": f"3{HOSTILE}", "image": f"no{name}.png"}
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "broken.jsonl").write_text(json.dumps(broken) + "\n")
    task = [*TINY, "task=custom", "task.kind=caption", "task.images=images"]
    texts = [
        call("evaluate", *task, "task.file=q.jsonl", f"name={name}"),
        call("evaluate", *task, "task.file=q.jsonl", "name=b"),
        call("evaluate", *task, "task.file=broken.jsonl", code=2),
        call("evaluate", *task, f"task.file={name}", code=2),
        call("extract", f"run=runs/{name}", "features=fast", "trace=all", "callbacks=none"),
        call("report", f"runs/{name}"),
        call("compare", f"runs/{name}", "runs/b"),
        call("compare", f"runs/{name}", "runs/b", "format=markdown"),
        call("diagnose", *TINY[:1], f"image=images/{name}.png", f"question={HOSTILE}", f"answer=A dog. {HOSTILE}"),
        call("evaluate", f"task={HOSTILE}", code=2),
        call(HOSTILE, code=2),
        call("evaluate", f"--{HOSTILE}", code=2),
        call("evaluate", f"{HOSTILE}=3", code=2),
        call(
            "evaluate",
            "--multirun",
            *TINY,
            "task=pope",
            "task.scenes=1",
            "limit=1",
            f"model.name='{HOSTILE}',b",
            f"name=s{name}",
        ),
    ]
    for text in texts:
        assert "red" in text
        for code in STEERING:
            assert code not in text, repr(text)
