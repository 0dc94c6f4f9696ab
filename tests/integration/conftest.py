"""The command line, called in this process from an empty folder."""

import shutil

import pytest
from helpers.messages import MessageSnapshot

from stethoscope.cli import main
from stethoscope.detection import leaderboard

HYDRA_PREFACE = "Error executing job with overrides:"
LIMIT = 60
SMALL = ["features=fast", "callbacks=none", "detector.C=0.1", "batch_size=64"]
SMALL += [f"limit={LIMIT}", f"pope.scenes={LIMIT}", f"chair.scenes={LIMIT}"]
SHOWN = [
    "+callbacks.maps._target_=stethoscope.evaluation.callbacks.SaveHeatmaps",
    "+callbacks.samples._target_=stethoscope.evaluation.callbacks.SampleTable",
    "features.names=[relevancy_image]",
    "logger.pictures=9",
]


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Folder of two runs with detectors, greedy and sampled, and one of a task alone; tests only read them.

    The greedy one has kept its pictures and heat maps and is logged to W&B offline.
    """
    folder = tmp_path_factory.mktemp("finished")
    jobs = [
        ["benchmark", "name=greedy", *SMALL, *SHOWN],
        ["benchmark", "name=sampled", "generation=sample", "logger=none", *SMALL],
        ["evaluate", "task=chair", f"task.scenes={LIMIT}", "limit=5", "name=alone", "callbacks=none", "logger=none"],
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(leaderboard, "SHUFFLES", 1)
        for words in jobs:
            with pytest.raises(SystemExit) as end:
                main(words)
            assert end.value.code == 0
    return folder / "runs"


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the greedy run, to write into."""
    return shutil.copytree(finished / "greedy", tmp_path / "copy", ignore=shutil.ignore_patterns("wandb"))


@pytest.fixture
def stethoscope(tmp_path, monkeypatch, capsys):
    """Runs the command in an empty folder; gives its last line on stderr (exit code 2) or its stdout (0).

    With ``alone`` it must be the only line on stderr, but for the one by which Hydra announces an error and for those
    that say what is being done, which end in three dots.
    """
    monkeypatch.chdir(tmp_path)

    def call(*words, code=2, alone=False):
        with pytest.raises(SystemExit) as end:
            main([str(word) for word in words])
        printed = capsys.readouterr()
        assert end.value.code == code, printed.out + printed.err
        if code == 0:
            return printed.out
        lines = printed.err.strip().splitlines()
        others = [line for line in lines if not (line.startswith(HYDRA_PREFACE) or line.endswith(" ..."))]
        assert not alone or len(others) == 1, printed.err
        return lines[-1]

    return call


@pytest.fixture(scope="module")
def messages(request):
    """Messages of this file's cases, for the test that compares them with the snapshot; written anew on demand."""
    snapshot = MessageSnapshot(request.module.__name__)
    yield snapshot
    if request.config.getoption("--update-messages"):
        snapshot.write()
