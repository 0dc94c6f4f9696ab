"""A file of answers is continued after any end, and never with other settings."""

import json

import pytest
from helpers.tiny_world import TinyTask

from stethoscope.core.errors import ArtefactError, ConfigError
from stethoscope.storage.answer_file import AnswerFile

SETTINGS = {"model": "a", "generation": {"stop": (), "max_new_tokens": 8}}
SAMPLES = TinyTask(count=4).samples()


def answer(sample, **values):
    return {"id": sample.id, "image": sample.image.name, "question": sample.question, "answer": "Yes", **values}


def resume(path, settings=SETTINGS, samples=SAMPLES, overwrite=False):
    """Ids that are left, and how many have changed."""
    with AnswerFile(path) as file:
        remaining = file.resume(settings, samples, overwrite)
        return [sample.id for sample in remaining.samples], remaining.changed


@pytest.fixture
def path(tmp_path):
    """Two answers."""
    path = tmp_path / "folder" / "answers.jsonl"
    with AnswerFile(path) as file:
        assert len(file.resume(SETTINGS, SAMPLES).samples) == 4
        for sample in SAMPLES[:2]:
            file.append(answer(sample))
    return path


def test_what_is_answered_is_not_asked_again(path):
    content = path.read_bytes()
    assert resume(path) == (["s02", "s03"], 0)
    assert path.read_bytes() == content


def test_the_half_line_of_a_killed_process_is_cut_off(path):
    content = path.read_bytes()
    path.write_bytes(content + b'{"id": "s02", "answer": "Y')
    assert resume(path) == (["s02", "s03"], 0)
    assert path.read_bytes() == content
    path.write_bytes(content[:-1])  # all but the line's end
    assert resume(path) == (["s01", "s02", "s03"], 0)


def test_a_damaged_line_before_the_last_is_told(path):
    path.write_bytes(b"{\n" + path.read_bytes())
    with pytest.raises(ArtefactError, match=r"answers.jsonl:1 is damaged"):
        resume(path)


def test_failed_samples_are_tried_again(path):
    with AnswerFile(path) as file:
        file.append({**answer(SAMPLES[2]), "answer": "", "error": "500"})
    assert resume(path) == (["s02", "s03"], 0)
    assert "500" not in path.read_text()


def test_changed_samples_are_asked_again(path):
    digest = SAMPLES[3].image.sha256
    with AnswerFile(path) as file:
        file.append(answer(SAMPLES[2], question="another?"))
        file.append(answer(SAMPLES[3], image_sha256=digest))
    assert resume(path) == (["s02"], 1)
    with AnswerFile(path) as file:
        file.append(answer(SAMPLES[2], image_sha256="0" * 64))
    SAMPLES[2].image.load()  # compared only once it has been loaded
    assert resume(path) == (["s02"], 1)


def test_answers_to_other_samples_stay(path):
    assert resume(path, samples=SAMPLES[1:2]) == ([], 0)
    assert len(path.read_text().splitlines()) == 2


def test_other_settings_are_refused(path):
    content = path.read_bytes()
    other = {"model": "b", "generation": {"stop": [], "max_new_tokens": 8}}
    with pytest.raises(ConfigError, match=r"other settings \(model: 'a' before, 'b' now\)"):
        resume(path, settings=other)
    assert path.read_bytes() == content
    assert resume(path, settings=other, overwrite=True) == (["s00", "s01", "s02", "s03"], 0)
    assert path.read_bytes() == b""
    assert json.loads(path.with_name("answers.jsonl.settings.json").read_text())["model"] == "b"


def test_a_file_of_somebody_else_is_refused(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"id": "s00"}\n')
    with pytest.raises(ConfigError, match=r"has no answers.jsonl.settings.json"):
        resume(path)
    with pytest.raises(ConfigError, match="is a folder"):
        resume(tmp_path)
    with pytest.raises(ConfigError, match=r"out=.*answers.jsonl/a.jsonl cannot be written to: \w"):
        resume(path / "a.jsonl")


def test_one_process_writes(path):
    with AnswerFile(path), pytest.raises(ConfigError, match="another process writes"):
        resume(path)
