"""The command line, called in this process from an empty folder."""

import shutil

import pytest

from stethoscope.cli import main
from stethoscope.detection import leaderboard

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
    """Runs the command in an empty folder; gives its last line on stderr (exit code 2) or its stdout (0)."""
    monkeypatch.chdir(tmp_path)

    def call(*words, code=2):
        with pytest.raises(SystemExit) as end:
            main([str(word) for word in words])
        said = capsys.readouterr()
        assert end.value.code == code, said.out + said.err
        return said.out if code == 0 else said.err.strip().splitlines()[-1]

    return call
