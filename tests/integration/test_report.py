"""``stethoscope report`` and ``compare`` on small real runs of the embedded model."""

import base64
import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stethoscope.app.runs import Runs
from stethoscope.cli import main
from stethoscope.core.token_table import mention_rows
from stethoscope.detection import leaderboard
from stethoscope.report import compare
from stethoscope.report.run_source import RunReader
from stethoscope.storage.run_dir import RunStore
from stethoscope.storage.saved_heatmaps import HeatmapFile
from stethoscope.tasks.chair import Chair

LIMIT = 60  # samples of the runs in conftest.py


class Page(HTMLParser):
    """Words, tags and addresses of a page."""

    def __init__(self, text):
        super().__init__()
        self.words, self.tags, self.addresses = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "action", "data")]

    def handle_data(self, data):
        self.words.append(data)


def test_a_report_says_what_metrics_json_says(finished, tmp_path, stethoscope):
    out = stethoscope("report", finished / "greedy", "out=made", code=0)
    assert out.split() == ["made/report.html", "made/report.md", "made/report.tex"]
    texts = {path.suffix: path.read_text() for path in (tmp_path / "made").iterdir()}
    metrics = RunStore(finished / "greedy").metrics()
    board = metrics["detector"]["leaderboard"]["rows"]
    figures = [row for task in ("pope", "chair") for row in metrics[task]["metrics"]]
    figures += [row["metrics"]["auroc_controlled"] for row in board if row["kind"] != "feature"]
    words = " ".join(Page(texts[".html"]).words)
    for row in figures:
        shown = "[{low:.3f}, {high:.3f}]".format(**row)
        for text in (words, texts[".md"], texts[".tex"]):
            assert f"{row['value']:.3f}" in text
            assert shown in text
    counts = f"{LIMIT} samples: {LIMIT} ok, 0 unparsed, 0 failed"
    assert all(counts in text for text in (words, texts[".md"], texts[".tex"]))
    for name in ("ROC", "Precision and recall", "Reliability", "AUROC by token position", "Feature importance"):
        assert name.lower() in words.lower()


def test_where_nothing_can_be_written_nothing_is_computed(finished, tmp_path, stethoscope, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("computed before out= was checked")

    for name in ("run_report.collect_report", "compare.compare", "every_eval_ever.write_every_eval_ever"):
        monkeypatch.setattr(f"stethoscope.report.{name}", refuse)
    (tmp_path / "file").touch()
    runs = (finished / "greedy", finished / "sampled")
    for command, out in (
        (("report", runs[0]), "file/inside"),
        (("compare", *runs), "file/inside"),
        (("compare", *runs), "."),
        (("export", f"run={runs[0]}", "to=every_eval_ever"), "file/inside"),
    ):
        assert f"out={out} cannot be written to" in stethoscope(*command, f"out={out}")


def test_the_page_needs_no_network_and_shows_pictures(finished, tmp_path, stethoscope):
    stethoscope("report", finished / "greedy", "out=made", code=0)
    page = Page((tmp_path / "made" / "report.html").read_text())
    assert all(address.startswith(("data:image/", "#")) for address in page.addresses)
    assert page.tags.count("svg") == 6
    assert page.tags.count("img") == 2 * page.tags.count("article") > 4  # each with its heat map
    assert "what the name was written from: relevancy after the last layer." in " ".join(page.words)
    stethoscope("report", finished / "greedy", "out=plain", "pictures=false", "cases=1", code=0)
    page = Page((tmp_path / "plain" / "report.html").read_text())
    assert "img" not in page.tags
    assert 0 < page.tags.count("article") <= 3


def test_pictures_are_those_that_the_run_has_kept(copy, stethoscope):
    """Another picture in ``maps.jsonl`` is the one that is shown, with the mention's map over it and all others too."""
    file = HeatmapFile(copy)
    for record in RunStore(copy).records("chair"):
        view = file.find(record)
        if view is not None:
            hot = {token: np.eye(8, dtype=np.uint8) * 255 for token in view.maps}
            picture = Image.new("RGB", (96, 96), (0, 128, 0))
            file.append("chair", record.sample_id, record.answer, picture, hot, "attention")
    stethoscope("report", copy, code=0)
    page = Page((copy / "report.html").read_text())
    images = [address for address in page.addresses if address.startswith("data:")]
    shown = [np.asarray(Image.open(io.BytesIO(base64.b64decode(image.partition(",")[2]))), int) for image in images]
    for picture, heat in zip(shown[::2], shown[1::2], strict=True):
        assert np.abs(picture - (0, 128, 0)).max() < 6
        side = len(heat)
        cells = heat[side // 16 :: side // 8, side // 16 :: side // 8]
        red = cells[..., 0] > 80
        assert red.tolist() == np.eye(8, dtype=bool).tolist()
    lead = next(text for text in page.words if "red for most" in text)
    assert "where the name attends: raw attention" in lead
    assert "relevancy" not in lead
    captions = re.findall('alt="([^"]*)"', (copy / "report.html").read_text())[1::2]
    assert all(re.fullmatch("where [a-z ]+ attends", caption) for caption in captions)


def test_a_run_that_has_kept_nothing_shows_the_pictures_of_its_task(finished, tmp_path, stethoscope):
    stethoscope("report", finished / "sampled", "out=made", code=0)
    page = Page((tmp_path / "made" / "report.html").read_text())
    assert page.tags.count("img") == page.tags.count("article") > 2
    assert "red for most" not in " ".join(page.words)


def test_damaged_maps_are_one_line(copy, stethoscope):
    lines = (copy / "maps.jsonl").read_text().splitlines()
    (copy / "maps.jsonl").write_text("".join(line.replace('"shape": [8, 8]', '"shape": [9]') + "\n" for line in lines))
    assert re.search(r"maps\.jsonl: .*counter-\d+ is damaged", stethoscope("report", copy))
    stethoscope("report", copy, "pictures=false", code=0)


def test_no_torch_is_imported(finished, tmp_path):
    script = (
        "import sys\nfrom stethoscope.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n"
        "    heavy = {'torch', 'transformers', 'datasets', 'matplotlib.pyplot'} & set(sys.modules)\n"
        "    sys.exit(f'imported {heavy}' if heavy or end.code else 0)"
    )
    for words in (["report", finished / "greedy", f"out={tmp_path}"], ["compare", *_both(finished)]):
        done = subprocess.run([sys.executable, "-c", script, *map(str, words)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def _both(finished):
    return finished / "greedy", finished / "sampled"


def test_words_of_the_model_stay_words(copy, tmp_path, stethoscope):
    evil, opening = "<script>`*|_$\\&x*", "The image depicts"
    assert len(evil) == len(opening)
    file = copy / "samples.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        line["answer"]["text"] = line["answer"]["text"].replace(opening, evil)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    stethoscope("report", copy, code=0)
    page = Page((copy / "report.html").read_text())
    assert page.tags.count("script") == 1  # ours, which sorts tables
    assert any(evil in words for words in page.words)
    markdown, latex = (copy / "report.md").read_text(), (copy / "report.tex").read_text()
    assert "&lt;script&gt;\\`\\*\\|\\_$\\\\&amp;x\\*" in markdown
    assert "<script>" not in markdown
    assert r"\textless{}script\textgreater{}`*\textbar{}\_\$\textbackslash{}\&x*" in latex


def test_a_run_without_a_detector_is_reported_as_far_as_it_goes(finished, tmp_path, stethoscope, capsys):
    with pytest.raises(SystemExit):
        main(["report", str(finished / "alone"), f"out={tmp_path}"])
    assert "has no detector: `stethoscope extract run=" in capsys.readouterr().err
    text = (tmp_path / "report.md").read_text()
    assert "CHAIR\\_i" in text
    assert "has no detector" in text


def test_a_run_that_a_detector_from_elsewhere_was_applied_to(finished, copy, stethoscope):
    """As ``extract warn=...`` leaves it: warnings of all images, no leader board, no detector of its own."""
    shutil.rmtree(copy / "detector")
    metrics = json.loads((copy / "metrics.json").read_text())
    del metrics["detector"]
    (copy / "metrics.json").write_text(json.dumps(metrics))
    lines = [json.loads(line) for line in (copy / "warnings.jsonl").read_text().splitlines()]
    (copy / "warnings.jsonl").write_text("".join(json.dumps({**line, "fold": ""}) + "\n" for line in lines))
    stethoscope("report", copy, code=0)
    table = mention_rows(RunStore(copy).tokens("chair"))
    words = " ".join(Page((copy / "report.html").read_text()).words)
    assert f"{len(table)} judged mentions of this run, which it was not fitted on" in words
    assert "leader board" not in words
    assert "Feature importance" not in words
    out = stethoscope("compare", finished / "sampled", copy, code=0)
    assert "detectors: copy against sampled" in out


def test_what_is_no_finished_run_is_one_line(finished, copy, stethoscope):
    line = stethoscope("report", finished / "gredy")
    assert "is no directory; unknown run 'gredy'; did you mean 'greedy'" in line
    assert "holds 3: alone, greedy, sampled" in stethoscope("report", finished)
    assert "has no samples.jsonl" in stethoscope("report", finished / "greedy" / "detector")
    assert "takes one run, not 2" in stethoscope("report", *_both(finished))
    assert "did you mean 'pictures'" in stethoscope("report", copy, "picture=false")
    (copy / "status.json").write_text('{"pope": "finished", "chair": "interrupted"}')
    for words in (["report", copy], ["compare", finished / "greedy", copy]):
        assert "is not finished (chair: interrupted); the command that was cut short goes on with it" in stethoscope(
            *words
        )


def test_help_teaches(stethoscope):
    assert "report.html" in stethoscope("report", "--help", code=0)
    assert "stethoscope compare runs/" in stethoscope("compare", "--help", code=0)


def test_a_run_against_itself_differs_in_nothing(finished):
    source = RunReader.read(finished / "greedy")
    tables, remarks = compare.compare([source, source], lambda source, name: _tasks()[name])
    assert remarks == []
    differences = [cell for table in tables for row in table.rows for cell in row if hasattr(cell, "p")]
    assert len(differences) > 20
    assert all(cell.interval.value == cell.interval.low == cell.interval.high == 0 for cell in differences)
    assert all(cell.p == 1 for cell in differences)


def test_many_runs_give_the_tables_of_pairs_and_each_is_read_once(finished, copy, monkeypatch):
    """What is kept of the first run changes no bit, also where the second and the third run have other samples."""
    lines = (copy / "samples.jsonl").read_text().splitlines()
    lines[0] = lines[0].replace('"status": "ok"', '"status": "failed"', 1)
    (copy / "samples.jsonl").write_text("\n".join(lines) + "\n")
    paths = [finished / "greedy", finished / "sampled", copy, finished / "sampled"]

    def load(source, name):
        return _tasks()[name]

    def paired(paths):
        tables, _ = compare.compare([RunReader.read(path) for path in paths], load)
        return [
            (table.columns[0], table.rows, table.note)
            for table in tables
            if any(hasattr(cell, "p") for row in table.rows for cell in row)
        ]

    pairs = [table for path in paths[1:] for table in paired([paths[0], path])]
    reads, records = [], RunStore.records
    monkeypatch.setattr(RunStore, "records", lambda store, task: reads.append(task) or records(store, task))
    together = paired(paths)
    assert repr(together) == repr(pairs)  # repr gives every bit, and NaN equals NaN
    assert sorted(reads) == ["chair"] * 4 + ["pope"] * 4
    assert any("1 samples that failed" in note for _, _, note in together)


def _tasks():
    from stethoscope.tasks.pope import Pope

    return {"chair": Chair(), "pope": Pope()}


def test_task_differences_are_paired_over_images(finished):
    """Against a bootstrap written out: images drawn once for both runs, CHAIR_i of their summed counts."""
    first, other = (RunReader.read(path) for path in _both(finished))
    table = compare.paired_table(first, other, Chair(), ("a", "b"))
    _, _, mine, theirs, difference = table.rows[0]
    stored = [source.results[1].interval("chair_i") for source in (first, other)]
    assert [mine, theirs] == stored
    counts = []
    for source in (first, other):
        records = {record.group: record.score.counts for record in source.store.records("chair")}
        counts.append(
            np.array([[records[name]["hallucinated"], records[name]["mentions"]] for name in sorted(records)])
        )
    draws = np.random.default_rng(0).integers(LIMIT, size=(1000, LIMIT))
    gaps = []
    for draw in draws:
        rates = [pair[draw].sum(axis=0)[0] / pair[draw].sum(axis=0)[1] for pair in counts]
        gaps.append(rates[1] - rates[0])
    assert difference.interval.value == pytest.approx(stored[1].value - stored[0].value)
    assert [difference.interval.low, difference.interval.high] == pytest.approx(
        np.percentile(gaps, [2.5, 97.5]).tolist()
    )
    width = difference.interval.high - difference.interval.low
    assert width < np.hypot(mine.high - mine.low, theirs.high - theirs.low)  # what pairing is for


@pytest.mark.slow
def test_detector_differences_are_those_of_the_leader_board(finished, copy, monkeypatch, stethoscope):
    """Two detectors fitted on one run, compared as two runs, give the paired difference that training gives."""
    monkeypatch.setattr(leaderboard, "SHUFFLES", 1)
    other = shutil.copytree(copy, copy.with_name("other"))
    stethoscope("train", f"run={copy}", "compare_with=[boosting]", "detector.C=0.1", code=0)
    stethoscope("train", f"run={other}", "detector=boosting", "overwrite=true", code=0)
    first, second = RunReader.read(copy), RunReader.read(other)
    table = compare.detector_table(first, second, ("a", "b"))
    differences = first.detector.leaderboard.differences
    expected = {row.metric: row for row in differences if (row.detector, row.other) == ("detector", "boosting")}
    compared = {row[0]: row[3] for row in table.rows}
    for metric, name in (("auroc", "AUROC"), ("auroc_controlled", "position-controlled")):
        interval, p = expected[metric].interval, expected[metric].p
        reversed_signs = [-interval.value, -interval.high, -interval.low, p]
        difference = compared[name]
        figures = [difference.interval.value, difference.interval.low, difference.interval.high, difference.p]
        assert figures == pytest.approx(reversed_signs, abs=1e-4)
    out = stethoscope("compare", copy, other, code=0)
    assert re.search(r"detector.estimator +logistic +boosting", out)


def test_compare_prints_writes_and_knows_sweeps(finished, tmp_path, stethoscope):
    sweep = tmp_path / "sweep"
    for path in _both(finished):
        (sweep / path.name).mkdir(parents=True)
        for file in path.glob("*.*"):
            shutil.copy(file, sweep / path.name)
    (sweep / "multirun.yaml").write_text("hydra: {}\n")
    out = stethoscope("compare", *sorted(sweep.glob("*")), code=0)
    for words in ("generation.do_sample", "CHAIR: sampled against greedy", "leader boards", "detectors: sampled"):
        assert words in out
    assert stethoscope("compare", sweep, code=0) == out
    assert stethoscope("compare", sweep, "format=latex", "out=made/c.tex", code=0).strip() == "made/c.tex"
    latex = (tmp_path / "made" / "c.tex").read_text()
    assert latex.count(r"\toprule") == latex.count(r"\end{table}") == out.count("\n\n") + 1
    stethoscope("compare", sweep, "format=html", "out=made/c.html", code=0)
    page = Page((tmp_path / "made" / "c.html").read_text())
    assert page.tags.count("table") == latex.count(r"\toprule")
    assert page.addresses == []
    assert page.tags.count("svg") == 3  # the differences of POPE, of CHAIR and of the detectors
    assert "| **CHAIR\\_i** |" in stethoscope("compare", sweep, "format=markdown", code=0)


def test_runs_that_did_not_answer_the_same_are_refused(finished, copy, stethoscope):
    line = stethoscope("compare", finished / "greedy", finished / "alone")
    assert re.search(
        rf"did not answer the same: chair has {LIMIT - 5} samples only in .*greedy, such as 'counter-", line
    )
    assert "takes two runs or more" in stethoscope("compare", copy)
    assert "did you mean 'latex'" in stethoscope("compare", *_both(finished), "format=latx")
    fingerprint, samples = copy / "fingerprint.json", copy / "samples.jsonl"
    good = json.loads(fingerprint.read_text())
    good["chair"]["task"]["version"] = "0"
    fingerprint.write_text(json.dumps(good))
    assert "chair version is '1' and '0'" in stethoscope("compare", finished / "greedy", copy)
    good["chair"]["task"]["version"] = "1"
    fingerprint.write_text(json.dumps(good))
    samples.write_text(samples.read_text().replace("Please describe this image in detail.", "What?", 3))
    line = stethoscope("compare", finished / "greedy", copy)
    assert re.search(r"chair has another question in \d samples, such as 'counter-", line)


def test_a_run_names_no_code(copy, stethoscope, capsys):
    """A run directory from elsewhere does not decide what is imported."""
    (copy / "maps.jsonl").unlink()
    text = (copy / "fingerprint.json").read_text().replace("stethoscope.tasks.chair.Chair", "os.system")
    (copy / "fingerprint.json").write_text(text)
    config = (copy / "config.yaml").read_text().replace("stethoscope.tasks.chair.Chair", "os.system")
    (copy / "config.yaml").write_text(config.replace("plugins: []", "plugins: [os]"))
    with pytest.raises(SystemExit):
        main(["report", str(copy)])
    assert "has no pictures: chair._target_='os.system' is outside the packages" in capsys.readouterr().err
    assert "<img" not in Path(copy / "report.html").read_text()


def _set(path, keys, value):
    """Exchanges one value of a JSON file, or of a line of JSON lines."""
    number, *keys = keys if isinstance(keys[0], int) else (None, *keys)
    texts = path.read_text().splitlines() if number is not None else [path.read_text()]
    data = json.loads(texts[number or 0])
    inside = data
    for key in keys[:-1]:
        inside = inside[key]
    inside[keys[-1]] = value
    texts[number or 0] = json.dumps(data)
    path.write_text("\n".join(texts) + "\n")


DAMAGE = {
    "a figure": ("metrics.json", ("detector", "leaderboard", "rows", 0, "metrics", "auroc_controlled", "high"), "x"),
    "a section": ("metrics.json", ("detector", "leaderboard", "rows", 0, "metrics", "brier"), True),
    "a count": ("metrics.json", ("chair", "counts", "failed"), "\x00"),
    "a probability": ("warnings.jsonl", (3, "probability"), "x"),
    "a name": ("fingerprint.json", ("chair", "features", "names"), [{}]),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_value_of_another_kind_is_one_line_about_the_run(copy, finished, tmp_path, stethoscope, kind):
    name, keys, value = DAMAGE[kind]
    _set(copy / name, keys, value)
    lines = []
    for words in (("report", copy), ("compare", copy, finished / "sampled")):
        with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()) as err:
            main(list(map(str, words)))
        lines += err.getvalue().splitlines()[-1:]
    runs = Runs(copy.parent, None, tmp_path)  # one of several; a damaged one that the user names is refused at once
    lines += [json.loads(text).get("note", "") for text in (runs.listing("copy"), runs.figures("copy"))]
    assert any(f"{copy}" in line and "damaged" in line for line in lines)
    assert not any("Traceback" in line or len(line) > 1000 for line in lines)
