"""Files of logs."""

import json

import pytest

from stethoscope.core.errors import DataError
from stethoscope.storage.logged_answers import read_answers


@pytest.fixture
def write(tmp_path):
    """Write bytes, text or JSON lines into a file, ``log.jsonl`` unless it is named."""

    def write_file(content, name="log.jsonl"):
        path = tmp_path / name
        if isinstance(content, list):
            content = "\n".join(json.dumps(row) for row in content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write_file


@pytest.fixture
def refused(write):
    """Check that a log is refused in one line, which names the file and says so much."""

    def read_refused(content, message, format="auto"):
        path = write(content)
        with pytest.raises(DataError) as error:
            read_answers(path, format)
        assert message in str(error.value)
        assert str(error.value).startswith(str(path))
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 2 * len(str(path)) + 350

    return read_refused
