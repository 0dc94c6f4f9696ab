"""The command line, called in this process from an empty folder."""

import pytest

from stethoscope.cli import main


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
