"""The page of ``export to=html``: the list of samples without a server, in a real browser."""

import base64
import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from stethoscope.report.export import ExportSettings, RunExport, export
from stethoscope.report.run_source import RunReader
from stethoscope.storage.records import Record
from stethoscope.storage.sample_notes import Note, append_note
from stethoscope.storage.saved_heatmaps import HeatmapFile

EVIL = "<script>window.pwned = 1</script>"


@pytest.fixture
def run(folder, tmp_path):
    """Copy the run; make up a heat map of its first caught mention, and note something on it."""
    copied = shutil.copytree(folder / "small", tmp_path / "small")
    source = RunReader.read(copied)
    caught = source.warnings[(source.warnings["label"] == 1) & source.warnings["warned"]].iloc[0]
    record: Record = source.record(caught["sample_id"])
    token = [start for start, _ in record.answer.offsets].index(caught["start"])
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 60, 3), dtype=np.uint8))
    heatmap = np.arange(20, dtype=np.uint8).reshape(4, 5)
    HeatmapFile(copied).append("chair", record.sample_id, record.answer, picture, {token: heatmap})
    append_note(copied, Note("chair", record.sample_id, tags=("odd",), text=EVIL, author="Zelda"))
    return RunReader.read(copied), record, caught, token


def test_samples_are_gone_through_without_a_server(run, browser, tmp_path):
    source, record, caught, token = run
    [file] = export(RunExport(source, source.results, ExportSettings(time=1.0)), "html", tmp_path / "page")
    assert "Zelda" not in file.read_text()
    page, failed, fetched = browser.new_page(viewport={"width": 390, "height": 844}), [], []
    page.on("pageerror", lambda error: failed.append(str(error)))
    page.on("console", lambda message: failed.append(message.text))
    page.on("request", lambda request: fetched.append(request.url))
    page.goto(file.as_uri())
    cards = page.locator("article")
    cards.first.wait_for()
    page.select_option("[data-id=fold]", "")
    page.select_option("[data-id=kind]", "caught")
    right = source.warnings[(source.warnings["label"] == 1) & source.warnings["warned"]]
    assert cards.count() == right["sample_id"].nunique()
    page.select_option("[data-id=noted]", "#odd")
    assert EVIL in cards.inner_text()
    chip = page.get_by_role("button", name=f"caught: {caught['object']}").first
    chip.focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.textContent").startswith("caught: ")  # still the same chip
    mark = record.answer.text[caught["start"] : caught["end"]].strip()
    assert page.locator("mark").inner_text() == mark
    assert page.locator("article .st-words").text_content() == record.answer.text
    assert ", ".join(sorted(record.reference["objects"])) in page.locator(".st-detail").inner_text()
    page.locator("canvas").wait_for()
    drawn = page.evaluate("document.querySelector('canvas').toDataURL().split(',')[1]")
    expected = source.saved_media(record).overlay(token, width=1)
    difference = np.array(Image.open(io.BytesIO(base64.b64decode(drawn))).convert("RGB"), int) - np.array(expected, int)
    assert np.abs(difference).max() <= 2
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    link = page.url
    page.goto("about:blank")
    page.goto(link)  # of one sample
    page.locator(".st-detail").wait_for()
    assert cards.locator("b").all_inner_texts() == [record.sample_id]
    assert failed == []
    assert {url for url in fetched if not url.startswith("data:")} <= {file.as_uri(), link, "about:blank"}
    page.close()


def test_pictures_are_left_out_and_shared(run, tmp_path):
    source = run[0]

    def data(name, **settings):
        page = export(RunExport(source, source.results, ExportSettings(**settings)), "html", tmp_path / name)[
            0
        ].read_text()
        return json.loads(page.partition('id="data">')[2].partition("</script>")[0])

    assert len(data("with")["pictures"]) == 1  # that the run has saved
    without = data("without", pictures=0)
    assert without["pictures"] == []
    assert len(without["rows"]) == 120
    assert not any(row["maps"] for row in without["rows"])
