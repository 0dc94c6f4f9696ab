"""Runs behind the second tab."""

import json
import shutil
from collections import Counter

import pytest

from stethoscope.app.pictures import write_examples
from stethoscope.app.runs import ALL, NO_RUN, Runs
from stethoscope.core.errors import ArtefactError, ConfigError, StethoscopeError
from stethoscope.report import sample_list
from stethoscope.report.compare import compare
from stethoscope.report.run_report import table_page
from stethoscope.report.run_source import RunReader
from stethoscope.storage.run_dir import RunStore, saved_task

EVIL = "<script>window.pwned = 1</script>"


@pytest.fixture
def runs(folder, tmp_path):
    return Runs(folder, None, tmp_path)


def test_the_list_says_what_became_of_every_mention(runs, folder):
    listing = json.loads(runs.listing("small"))
    kinds = Counter(kind for row in listing["rows"] for _, kind, *_ in row["mentions"])
    expected = Counter()
    for text in (folder / "small" / "warnings.jsonl").read_text().splitlines():
        line = json.loads(text)
        names = {(1, True): "caught", (1, False): "missed", (0, True): "false alarm", (0, False): "right"}
        expected[names.get((line["label"], line["warned"]), "not judged")] += 1
    assert kinds == expected
    assert kinds["caught"] > 0
    records = RunStore(folder / "small").records("chair")
    assert [row["sample"] for row in listing["rows"] if row["task"] == "chair"] == [
        record.sample_id for record in records
    ]
    assert {row["task"] for row in listing["rows"]} == {"chair", "pope"}
    assert listing["note"] == ""


def test_figures_are_the_report(runs):
    page = json.loads(runs.figures("small"))["page"]
    for words in ("leader board: auroc", "roc", "reliability", "chair_i"):
        assert words in page.lower()


def test_a_sample_is_opened_with_its_stored_answer_and_its_own_picture(runs, folder, pool, tmp_path):
    record = RunStore(folder / "small").find("chair", "counter-000007")
    question = runs.question("small", "chair", "counter-000007", pool, "testbed")
    assert question.answer == record.answer
    assert question.text == record.question
    assert question.detector is not None
    assert question.picture.is_relative_to(tmp_path)
    from PIL import Image

    from stethoscope import testbed

    assert Image.open(question.picture).tobytes() == testbed.scenes(8)[7].image().tobytes()


def test_a_damaged_edit_is_said(folder, pool, tmp_path):
    copied = shutil.copytree(folder / "small", tmp_path / "runs" / "small")
    kept = copied / "samples.jsonl"
    lines = [{**json.loads(line), "edit": {"removed": 3}} for line in kept.read_text().splitlines()]
    kept.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ArtefactError, match="small"):
        Runs(tmp_path / "runs", None, tmp_path).question("small", "chair", "counter-000007", pool, "testbed")


def test_thumbnails_of_samples(runs):
    keys = ["chair\tcounter-000007", "chair\tcounter-000008", "chair\tnone", "../x"]
    message = json.loads(runs.thumbnails("small", keys))
    assert list(message["pictures"]) == keys[:2]
    assert all(address.startswith("data:image/png;base64,") for address in message["pictures"].values())
    assert json.loads(runs.thumbnails("../small", keys))["pictures"] == {}


def test_a_picture_that_is_gone_leaves_those_of_other_samples(folder, tmp_path):
    copied = shutil.copytree(folder / "small", tmp_path / "small")
    file = copied / "samples.jsonl"
    lines = file.read_text().splitlines()
    [record] = [json.loads(line) for line in lines if '"counter-000007"' in line and '"chair"' in line]
    changed = json.dumps(record | {"question": "What else?"})  # not the task's sample any more
    file.write_text("".join((changed if json.loads(line) == record else line) + "\n" for line in lines))
    shutil.rmtree(copied / "media", ignore_errors=True)
    keys = ["chair\tcounter-000007", "chair\tcounter-000008"]
    pictures = json.loads(Runs(tmp_path, None, tmp_path).thumbnails("small", keys))["pictures"]
    assert list(pictures) == keys[1:]


def test_two_runs_of_one_name_are_told_apart(folder, tmp_path):
    mine = shutil.copytree(folder / "small", tmp_path / "mine" / "small")
    runs = Runs(folder, mine, tmp_path)
    assert (runs.names, runs.first) == (["small", f"{folder.name}/small"], "small")
    assert [path.resolve() for path in runs.folders.values()] == [mine, folder / "small"]
    both = Runs(tmp_path / "none", mine, tmp_path, other=folder / "small")
    assert (both.names, both.other) == (runs.names, f"{folder.name}/small")
    assert len(json.loads(both.listing("small", both.other))["rows"]) == 120


def test_runs_are_chosen_by_name_alone(runs, folder, pool):
    for name in ("../small", str(folder / "small"), "", "smal"):
        with pytest.raises(ArtefactError, match="unknown run"):
            runs.question(name, "chair", "counter-000007", pool, "testbed")
        assert json.loads(runs.listing(name))["rows"] == []
        assert "unknown run" in json.loads(runs.figures(name))["note"]
    with pytest.raises(ArtefactError, match="no answer to chair sample"):
        runs.question("small", "chair", "../../etc/passwd", pool, "testbed")


def test_a_picture_that_is_gone_is_said(runs, folder, pool, tmp_path):
    copied = shutil.copytree(folder / "small", tmp_path / "runs" / "small")
    kept = copied / "samples.jsonl"
    lines = [{**json.loads(line), "question": "Where is it?"} for line in kept.read_text().splitlines()]
    kept.write_text("".join(json.dumps(line) + "\n" for line in lines))  # of a data file that has changed since
    with pytest.raises(ArtefactError, match="is not to be had: its task no longer has the sample"):
        Runs(tmp_path / "runs", None, tmp_path).question("small", "chair", "counter-000007", pool, "testbed")


def test_a_run_from_elsewhere_comes_first_and_one_in_progress_is_shown(folder, tmp_path):
    runs = Runs(tmp_path, folder / "small", tmp_path)
    assert runs.names == ["small"]
    assert json.loads(Runs(tmp_path, None, tmp_path).listing(None))["note"] == NO_RUN
    half = shutil.copytree(folder / "small", tmp_path / "half")  # after the app was started
    (half / "status.json").write_text('{"chair": "running", "pope": "finished"}')
    assert runs.names == ["small", "half"]
    message = json.loads(runs.listing("half"))
    assert message["progress"] == "half: chair: 60 of 60 answered, running."
    assert len(message["rows"]) == 120
    assert "once the run is finished" in json.loads(runs.figures("half"))["note"]
    assert runs.refreshed("half", "", message["state"]) is None
    (half / "status.json").write_text('{"chair": "finished", "pope": "finished"}')
    assert json.loads(runs.refreshed("half", "", message["state"]))["progress"] == ""
    with pytest.raises(ArtefactError, match="is no directory"):
        Runs(tmp_path, tmp_path / "none", tmp_path)


def test_two_runs_side_by_side(folder, tmp_path):
    copied = shutil.copytree(folder / "small", tmp_path / "other")
    runs = Runs(tmp_path, folder / "small", tmp_path, other=copied)
    assert (runs.names, runs.other) == (["small", "other"], "other")
    message = json.loads(runs.listing("small", "other"))
    assert len(message["rows"]) == 120
    assert all(row["same"] and row["other"]["mentions"] == row["mentions"] for row in message["rows"])
    page = json.loads(runs.figures("small", "other"))["page"]
    sources = [RunReader.read(path) for path in (folder / "small", copied)]
    tables, _ = compare(sources, lambda source, task: saved_task(source.store, task), common=True)
    assert page == table_page("other against small", tables, sortable=False)
    assert "shown already" in json.loads(runs.listing("small", "small"))["note"]
    assert "unknown run" in json.loads(runs.listing("small", "../other"))["note"]


@pytest.fixture
def several(folder, tmp_path):
    """Make three runs with a link to a fourth that stands elsewhere, the second one without a detector."""
    for path in ("runs/a", "runs/b", "runs/c", "elsewhere"):
        shutil.copytree(folder / "small", tmp_path / path)
    (tmp_path / "runs" / "d").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "runs" / "b" / "warnings.jsonl").unlink()
    metrics = json.loads((tmp_path / "runs" / "b" / "metrics.json").read_text())
    del metrics["detector"]
    (tmp_path / "runs" / "b" / "metrics.json").write_text(json.dumps(metrics))
    return tmp_path / "runs"


def test_samples_of_all_runs_are_those_of_each(several, pool, tmp_path):
    runs = Runs(several, None, tmp_path)
    message = json.loads(runs.listing(ALL, "a"))
    assert (message["run"], message["other"], message["note"]) == (ALL, "", "Without a detector: b.")
    assert len(message["rows"]) == 480
    for name in "abcd":
        alone = json.loads(runs.listing(name))["rows"]
        own = [row for row in message["rows"] if row["run"] == name]
        assert [{**row, "run": name} for row in alone] == own
    assert runs.refreshed(ALL, "", message["state"]) is None
    keys = [f"{name}\tchair\tcounter-000007" for name in "adx"]
    assert list(json.loads(runs.thumbnails(ALL, keys))["pictures"]) == keys[:2]
    assert "choose it" in json.loads(runs.figures(ALL))["note"]
    assert runs.question("d", "chair", "counter-000007", pool, "testbed").case["run"] == "d"
    with pytest.raises(ArtefactError, match="unknown run"):
        runs.question(ALL, "chair", "counter-000007", pool, "testbed")
    shutil.copytree(several / "a", several / "new")  # while the page is open
    assert len(json.loads(runs.refreshed(ALL, "", message["state"]))["rows"]) == 600


def test_runs_share_the_list_evenly_and_a_damaged_one_does_not_hide_the_others(several, tmp_path, monkeypatch):
    monkeypatch.setattr(sample_list, "MOST_SAMPLES", 90)
    with (several / "c" / "warnings.jsonl").open("a") as file:
        file.write('{"task": 3}\n')
    lines = (several / "a" / "samples.jsonl").read_text().splitlines(keepends=True)
    (several / "a" / "samples.jsonl").write_text("".join(line for line in lines if '"pope"' in line))
    message = json.loads(Runs(several, None, tmp_path).listing(ALL))
    counts = Counter((row["run"], row["task"]) for row in message["rows"])
    assert counts["d", "chair"] == counts["b", "chair"] == 30
    assert max(counts.values()) <= 90 // 3
    assert {run for run, _ in counts} == {"a", "b", "d"}
    assert "Left out, since files of them are damaged: c." in message["note"]
    assert "chair: of 180 samples the first 30 of every run are listed" in message["note"]


def test_a_note_is_written_into_the_run_and_changes_no_result(folder, pool, tmp_path):
    copied = shutil.copytree(folder / "small", tmp_path / "runs" / "small")
    before = {file.name: file.read_bytes() for file in copied.iterdir() if file.is_file()}
    runs = Runs(tmp_path / "runs", None, tmp_path, writable=True)
    rows = json.loads(runs.listing("small"))["rows"]
    row = next(row for row in rows if row["mentions"])
    name, _, _, start, _ = row["mentions"][0]
    values = {"task": row["task"], "sample": row["sample"], "start": start, "label": 0, "tags": ["odd"], "text": EVIL}
    runs.annotate("small", values, "me")
    message = json.loads(runs.listing("small"))
    [note] = next(other for other in message["rows"] if other["sample"] == row["sample"])["notes"]
    assert (note["object"], note["label"], note["tags"], note["text"], note["author"]) == (name, 0, ["odd"], EVIL, "me")
    assert "<script" not in runs.listing("small")
    assert message["writable"]
    opened = runs.question("small", row["task"], row["sample"], pool, "testbed")
    assert any(f"{name}: label corrected to grounded; #odd" in line for line in opened.notes)
    assert json.loads(json.loads(runs.notes("small", "json"))["content"]) == [note]
    assert EVIL in json.loads(runs.notes("small", "csv"))["content"]
    assert {
        file.name: file.read_bytes() for file in copied.iterdir() if file.name != "notes.jsonl" and file.is_file()
    } == before
    for wrong in (
        {"start": 9999},
        {"start": [1]},
        {"sample": "../x"},
        {"task": "none"},
        {"text": "x" * 3000},
        {"label": 7},
    ):
        with pytest.raises(StethoscopeError):
            runs.annotate("small", {**values, **wrong}, "me")
    with pytest.raises(ArtefactError, match="unknown run"):
        runs.annotate("../small", values, "me")
    with pytest.raises(ConfigError, match="notes=false"):
        Runs(tmp_path / "runs", None, tmp_path).annotate("small", values, "me")
    assert len((copied / "notes.jsonl").read_text().splitlines()) == 1


def test_a_link_without_a_task_opens_the_sample(runs, pool):
    question = runs.question("small", "", "counter-000007", pool, "testbed")
    assert question.case["task"] == "chair"


def test_a_run_without_a_detector_lists_its_samples(folder, tmp_path):
    alone = shutil.copytree(folder / "small", tmp_path / "runs" / "alone")
    (alone / "warnings.jsonl").unlink()
    shutil.rmtree(alone / "detector")
    metrics = json.loads((alone / "metrics.json").read_text())
    del metrics["detector"]
    (alone / "metrics.json").write_text(json.dumps(metrics))
    listing = json.loads(Runs(tmp_path / "runs", None, tmp_path).listing("alone"))
    assert "stethoscope train" in listing["note"]
    assert len(listing["rows"]) > 100


def test_examples_are_pictures(tmp_path):
    from PIL import Image

    from stethoscope import testbed

    examples = write_examples(tmp_path, 5, 2)
    assert [example.file.name for example in examples] == ["counter-000005.png", "counter-000006.png"]
    assert Image.open(examples[0].file).size == (96, 96)
    assert examples[1].objects == testbed.scenes(7)[6].visible
