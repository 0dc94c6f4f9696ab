"""``stethoscope judge``: every line comes back with its mentions, and what is wrong is named with its line."""

import json
import subprocess
import sys

import pytest
from helpers.messages import error_lines

from stethoscope.cli import main
from stethoscope.commands import judge
from stethoscope.detection.text_only import TextOnlyDetector
from stethoscope.tasks.object_extraction import mentions

ROWS = [
    {"image_id": 7, "caption": "A man with two dogs.\nThere is also a handbag, and a dog.", "model": "made"},
    {"caption": "", "nested": {"a": [1, 2.5, None, True]}, "big": 2**70},
    {"caption": "Nothing of note", "naïve": "狗"},
    {"question": "?", "caption": "狗 İ **Stop  signs** and naïve \u2028 people"},
]


def call(*words):
    """Exit code of the command."""
    with pytest.raises(SystemExit) as end:
        main(["judge", *map(str, words)])
    return end.value.code


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "captions.jsonl", ROWS)


def test_lines_come_back_with_all_their_keys_and_their_mentions(source, tmp_path, capsys):
    target = tmp_path / "new" / "judged.jsonl"
    assert call(source, f"out={target}") == 0
    output = capsys.readouterr()
    assert output.out == f"{target}\n"
    assert "4 captions name 6 COCO objects" in output.err
    judged = read(target)
    assert [{key: value for key, value in row.items() if key != "mentions"} for row in judged] == ROWS
    for row in judged:
        assert [(m["name"], m["start"], m["end"]) for m in row["mentions"]] == [*map(tuple, mentions(row["caption"]))]
        assert all(set(mention) == {"name", "start", "end", "probability"} for mention in row["mentions"])
        assert all(0 <= mention["probability"] <= 1 for mention in row["mentions"])
    first = judged[0]
    assert [first["caption"][m["start"] : m["end"]] for m in first["mentions"]] == ["man", "dogs", "handbag", "dog"]
    sign = judged[3]["mentions"][0]
    assert judged[3]["caption"][sign["start"] : sign["end"]] == "Stop  signs"


def test_probabilities_are_those_of_the_python_interface(source, tmp_path):
    call(source, f"out={tmp_path / 'o'}")
    expected = [m.probability for named in TextOnlyDetector.load().predict(r["caption"] for r in ROWS) for m in named]
    written = [mention["probability"] for row in read(tmp_path / "o") for mention in row["mentions"]]
    assert written == pytest.approx(expected, abs=6e-5)


def test_old_mentions_are_replaced_and_odd_bytes_survive(tmp_path):
    source = tmp_path / "captions.jsonl"
    source.write_bytes(b'\xef\xbb\xbf{"mentions": 3, "caption": "a \\ud800 dog"}\r\n\n  \n{"caption": "a cat"}')
    assert call(source, f"out={tmp_path / 'o'}") == 0
    judged = read(tmp_path / "o")
    assert [row["caption"] for row in judged] == ["a \ud800 dog", "a cat"]
    assert [row["mentions"][0]["start"] for row in judged] == [4, 2]


def test_many_lines_keep_their_order(tmp_path):
    rows = [{"index": index, "caption": f"a {'dog' if index % 3 else 'cat'}"} for index in range(3 * judge.BATCH + 7)]
    assert call(write(tmp_path / "many", rows), f"out={tmp_path / 'o'}") == 0
    judged = read(tmp_path / "o")
    assert [row["index"] for row in judged] == [*range(len(rows))]
    assert all(row["mentions"][0]["name"] == ("dog" if row["index"] % 3 else "cat") for row in judged)


def test_an_empty_file_gives_an_empty_file(tmp_path, capsys):
    assert call(write(tmp_path / "none", []), f"out={tmp_path / 'o'}") == 0
    assert (tmp_path / "o").read_bytes() == b""
    assert "0 captions name 0 COCO objects\n" in capsys.readouterr().err


BROKEN = {
    "cut": (b'{"caption": "a do', "not a line of JSON"),
    "not an object": (b"[1]", "is list"),
    "no caption": (b'{"image_id": 3, "text": "a dog"}', "no caption; its keys are: image_id, text"),
    "no keys": (b"{}", "its keys are: none"),
    "caption is a number": (b'{"caption": 3}', "caption is int"),
    "caption is null": (b'{"caption": null}', "caption is NoneType"),
    "not UTF-8": (b'{"caption": "a \xff dog"}', "not UTF-8"),
    "NaN": (b'{"caption": "a dog", "x": NaN}', "NaN is not a JSON value"),
    "too large": (b'{"caption": "a dog", "x": 1e999}', "too large"),
    "too deep": (b'{"caption": "a dog", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    "too many digits": (b'{"caption": "a dog", "x": ' + b"1" * 5000 + b"}", "not a line of JSON"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_line_is_named_and_nothing_is_written(case, tmp_path, capsys):
    line, words = BROKEN[case]
    source = tmp_path / "captions.jsonl"
    source.write_bytes(b'{"caption": "a dog"}\n\n' + line + b'\n{"caption": "a cat"}\n')
    assert call(source, f"out={tmp_path / 'judged.jsonl'}") == 2
    message = capsys.readouterr().err
    assert f"{source}:3" in message
    assert words in message
    assert len(error_lines(message)) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["captions.jsonl"]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["out=o"], "one file of captions, not 0"),
        (["captions.jsonl", "captions.jsonl", "out=o"], "not 2"),
        (["captions.jsonl"], "out must be given"),
        (["captions.jsonl", "out="], "out must be given"),
        (["captions.jsonl", "out=o", "overwrite=maybe"], "true or false"),
        (["captions.jsonl", "output=o"], "unknown setting of judge 'output'"),
        (["captions.jsonl", "out=o", "--fast"], "no option --fast"),
        (["captoins.jsonl", "out=o"], "captoins.jsonl is missing"),
        ([".", "out=o"], "no regular file"),
        (["captions.jsonl", "out=captions.jsonl"], "is the file of captions itself"),
        (["captions.jsonl", "out=link", "overwrite=true"], "is the file of captions itself"),
        (["captions.jsonl", "out=other"], "exists; choose another file, or add overwrite=true"),
        (["captions.jsonl", "out=folder"], "is a folder"),
        (["captions.jsonl", "out=/dev/null", "overwrite=true"], "out=/dev/null is no regular file"),
        (["captions.jsonl", "out=other/o"], "cannot be written to"),
        (["captions.jsonl", "out=o", "detector=captions.jsonl"], "text-only detector captions.jsonl"),
        (["captions.jsonl", "out=o", "detector=nowhere"], "nowhere is missing"),
    ],
)
def test_wrong_words_are_explained(words, part, source, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(source)
    before = source.read_bytes()
    assert call(*words) == 2
    message = capsys.readouterr().err
    assert part in message
    assert len(error_lines(message)) == 1
    assert source.read_bytes() == before
    assert (tmp_path / "other").read_text() == "mine"
    assert not (tmp_path / "o").exists()


def test_a_file_that_is_there_is_replaced_when_asked_for(source, tmp_path):
    target = tmp_path / "judged.jsonl"
    target.write_text("old")
    assert call(source, f"out={target}", "overwrite=True") == 0
    assert len(read(target)) == len(ROWS)


def test_a_detector_of_ones_own_is_used(source, tmp_path):
    captions = ["a dog", "a cat and a dog", "nothing"] * 20
    own = TextOnlyDetector().fit(captions, [{"cat"}] * 60, range(60))
    own.save(tmp_path / "own")
    assert call(source, f"out={tmp_path / 'o'}", f"detector={tmp_path / 'own'}") == 0
    expected = [m.probability for m in own.predict_one(ROWS[0]["caption"])]
    assert [m["probability"] for m in read(tmp_path / "o")[0]["mentions"]] == pytest.approx(expected, abs=6e-5)


def test_help_explains_the_form_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call("captions.jsonl", "--help") == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("`caption`", "mentions", "probability", "overwrite", "detector"))
    row = json.loads(next(line for line in text.splitlines() if line.strip().startswith('{"image_id"')))
    example = json.loads(next(line for line in text.splitlines() if line.strip().startswith('{"name"')))
    judged = {mention.name: mention for mention in TextOnlyDetector.load().predict_one(row["caption"])}
    assert example == {**judged["dog"]._asdict(), "probability": round(judged["dog"].probability, 4)}
    assert not list(tmp_path.iterdir())


def test_progress_has_lines_with_the_time_that_is_left(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(judge, "PATIENCE", 0.0)
    monkeypatch.setattr(judge, "EVERY", 0.0)
    monkeypatch.setattr(judge, "BATCH", 2)
    assert call(source, f"out={tmp_path / 'o'}") == 0
    assert "2 captions" in capsys.readouterr().err


def test_judging_imports_neither_torch_nor_a_table_library(source, tmp_path):
    script = (
        "import sys\nfrom stethoscope.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n"
        "    heavy = {'torch', 'transformers', 'datasets', 'pandas', 'sklearn', 'scipy', 'hydra'} & set(sys.modules)\n"
        "    sys.exit(f'imported {heavy}' if heavy or end.code else 0)"
    )
    words = [sys.executable, "-c", script, "judge", str(source), f"out={tmp_path / 'o'}"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(read(tmp_path / "o")) == len(ROWS)
