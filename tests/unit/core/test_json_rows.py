"""Schemas of the lines that users write and that we write: valid, agreed on by two libraries, held to the readers."""

import json
from pathlib import Path

import jsonschema
import pytest

from stethoscope.core.errors import ArtefactError, DataError
from stethoscope.core.json_rows import FOLDER, check_content, check_line, read_schema, violation
from stethoscope.storage.logged_answers import read_answers
from stethoscope.tasks.halloc import TYPES

ROOT = Path(__file__).parents[3]
SPAN = {"start": 2, "end": 5, "type": "attribute"}
MARKED = {"image": "1.jpg", "question": "What?", "answer": "A red bus.", "spans": [SPAN]}


def test_every_schema_is_valid_and_published_as_it_is():
    assert (ROOT / "docs" / "schemas").resolve() == FOLDER
    for name in (path.name.removesuffix(".schema.json") for path in FOLDER.iterdir()):
        schema = read_schema(name)
        jsonschema.Draft202012Validator.check_schema(schema)
        assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
        assert schema["$id"] == f"urn:lvlm-stethoscope:schema:{name}:1"
        for example in schema.get("examples", []):
            assert violation(name, example) is None


LINES = {
    "custom": [
        ({"image": "a.png", "question": None, "label": " Yes "}, ""),
        ({"image": "a.png", "id": 3, "objects": ["dog"], "mine": {}}, ""),
        ({"id": 3}, "key 'image' is missing; there are: id"),
        ({"image": 3}, "image 3 is no path"),
        ({"image": "a.png", "id": [1]}, "id [1] should be text or a number"),
        ({"image": "a.png", "id": True}, "id True should be text or a number"),
        ({"image": "a.png", "question": " "}, "' ' is no question; give one on every line, or task.question"),
        ({"image": "a.png", "answer": ""}, "answer '' is no text"),
        ({"image": "a.png", "label": "yess"}, "label 'yess' is neither yes nor no"),
        ({"image": "a.png", "objects": "dog"}, "objects should be a list of names, not 'dog'"),
        ({"image": "a.png", "subset": []}, "subset [] is no name"),
    ],
    "halloc": [
        (MARKED, ""),
        ({**MARKED, "spans": [], "id": "x"}, ""),
        ({**MARKED, "answer": 3}, "answer 3 is no text"),
        ({**MARKED, "spans": [3]}, "spans[0]: an object with start, end and type was expected, not 3"),
        ({**MARKED, "spans": [SPAN, {"start": 1}]}, "spans[1]: an object with start, end and type was expected"),
        ({**MARKED, "spans": [{**SPAN, "type": "scenes"}]}, "unknown type of hallucination 'scenes'; did you mean"),
        ({**MARKED, "spans": [{**SPAN, "end": "5"}]}, "2 to '5' is no span"),
    ],
    "captions": [({"caption": "A dog."}, ""), ({"caption": None}, "caption is NoneType; it should be text")],
}


@pytest.mark.parametrize("name", LINES)
def test_both_libraries_agree_and_the_message_says_what_is_wrong(name):
    reference = jsonschema.Draft202012Validator(read_schema(name))
    for row, message in LINES[name]:
        assert reference.is_valid(row) == (not message), row
        if not message:
            check_line(name, row, "a.jsonl, line 1")
            continue
        with pytest.raises(DataError) as error:
            check_line(name, row, "a.jsonl, line 1")
        assert message in str(error.value)
        assert str(error.value).startswith("a.jsonl, line 1")
        assert "\n" not in str(error.value)


def test_keys_that_are_not_read_may_hold_anything():
    row = {"image": "a.png", "label": "cat", "objects": 5}
    check_line("custom", row, "x", ignored=("label", "objects"))
    with pytest.raises(DataError, match="label 'cat'"):
        check_line("custom", row, "x", ignored=("objects",))


def test_the_types_of_halloc_are_those_of_its_schema():
    assert tuple(read_schema("halloc")["$defs"]["span"]["properties"]["type"]["enum"]) == TYPES


ANSWER = {"id": "1", "answer": "Yes"}
ANSWERS = [
    ({**ANSWER, "answer_token_ids": [3, 4], "answer_logprobs": [-0.5, 0]}, True),
    ({**ANSWER, "prompt": "USER:", "prompt_token_ids": [1], "finish_reason": "stop", "model": "a/b", "row": 0}, True),
    ({"question_id": 3, "prompt": "What?", "text": "A dog."}, True),
    ({"image_id": 42, "caption": "A dog."}, True),
    ({"id": 2.0, "row": 3.0, "response": "yes"}, True),
    ({"row": "7", "answer": None, "error": {"message": "HTTP 500"}}, True),
    ({**ANSWER, "id": None, "question": None, "answer_logprobs": None}, True),
    ({"id": 1}, False),
    ({**ANSWER, "answer": 3}, False),
    ({**ANSWER, "id": True}, False),
    ({**ANSWER, "id": 2.5}, False),
    ({**ANSWER, "id": " "}, False),
    ({**ANSWER, "row": -1}, False),
    ({**ANSWER, "row": "x"}, False),
    ({**ANSWER, "question": 3}, False),
    ({**ANSWER, "prompt": [3]}, False),
    ({**ANSWER, "answer_token_ids": "12"}, False),
    ({**ANSWER, "answer_token_ids": [1, 2.5]}, False),
    ({**ANSWER, "prompt_token_ids": [2**31]}, False),
    ({**ANSWER, "answer_token_ids": [-100]}, False),
    ({**ANSWER, "answer_logprobs": [0.3]}, False),
    ({**ANSWER, "answer_logprobs": [None]}, False),
]


@pytest.mark.parametrize(("row", "valid"), ANSWERS)
def test_the_reader_of_answers_and_its_schema_hold_together(tmp_path, row, valid):
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps(row) + "\n")
    assert (violation("answers", row) is None) == valid
    assert jsonschema.Draft202012Validator(read_schema("answers")).is_valid(row) == valid
    if valid:
        assert len(read_answers(path).answers) == 1
    else:
        with pytest.raises(DataError):
            read_answers(path)


def test_a_file_of_a_run_is_refused_with_the_part_that_is_wrong():
    interval = {"value": 0.5, "low": None, "high": 1, "items": 3, "groups": 2}
    task = {"primary": "f1", "counts": {"samples": 3}, "metrics": [{"metric": "f1", "subset": "all", **interval}]}
    check_content("metrics", {"pope": task}, "metrics.json")
    task["metrics"][0]["items"] = "3"
    with pytest.raises(ArtefactError) as error:
        check_content("metrics", {"pope": task}, "metrics.json", "make it again")
    expected = "metrics.json is damaged (pope.metrics[0].items should be a whole number, not str); make it again"
    assert str(error.value) == expected
    del task["metrics"]
    with pytest.raises(ArtefactError, match=r"\(pope.metrics is missing\)"):
        check_content("metrics", {"pope": task}, "metrics.json")
