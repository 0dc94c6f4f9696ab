"""The page in a real browser, at the width of a desk and of a phone. Screenshots go into $STETHOSCOPE_SCREENSHOTS."""

import json
import os
import re
import shutil
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from helpers.page_client import PATIENCE

from scripts.bench.responsiveness import MOVE, SLIDERS
from stethoscope import diagnose, testbed
from stethoscope.app import payload, sessions
from stethoscope.core.text import percent as text_percent
from stethoscope.core.types import Generation
from stethoscope.diagnosis.answer_verdicts import mention_outcome
from stethoscope.report.examples import read_examples
from stethoscope.report.run_report import EXAMPLES
from stethoscope.report.run_source import RunReader

DONE = "#view [data-id=diagnosed]:not([hidden])"
WIDTHS = {1280: 900, 390: 844}
SIZE = "[...document.querySelectorAll('#photograph img')].map((one) => [one.naturalWidth, one.naturalHeight].join())[0]"
DESCRIBE = "Please describe this image in detail."


@pytest.fixture(params=[1280, pytest.param(390, marks=pytest.mark.slow)], ids=str)
def page(request, browser, served):
    """Open the page; at the end no request may have gone to another server, and no script may have failed."""
    context = browser.new_context(viewport={"width": request.param, "height": WIDTHS[request.param]})
    page = open_page(context, served)
    page.width = request.param
    yield page
    here = urlsplit(served.address).netloc
    assert {urlsplit(url).netloc for url in page.asked if url.startswith("http")} == {here}
    assert page.failed == []
    assert page.evaluate("window.pwned") is None
    context.close()


def open_page(context, served, address=None):
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.asked, page.failed = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("pageerror", lambda error: page.failed.append(str(error)))
    page.on("console", lambda message: page.failed.append(message.text) if message.type == "error" else None)
    page.goto(address or served.address)
    page.wait_for_selector("#view .st-status", state="attached")
    return page


def photograph():
    cbook = pytest.importorskip("matplotlib.cbook", reason="no photograph without matplotlib")
    return cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)


def ask(page, picture, question=DESCRIBE):
    page.set_input_files("#photograph input[type=file]", picture)
    page.wait_for_selector("#photograph img")
    page.fill("#question textarea", question)
    page.click("#ask")
    page.wait_for_selector(DONE)


def text(page, part):
    return page.locator(f"#view [data-id={part}]").inner_text()


def wait_for_words(page, part, words):
    element = f"document.querySelector('#view [data-id={part}]')"
    page.wait_for_function(f"words => {element}.innerText.includes(words)", arg=words)


@contextmanager
def slowed(adapter, seconds=1.0):
    """Let every pass of the model take some time longer, so that no machine is too slow to see an answer begin.

    Gives the list of passes, and an event that ends the slowness.
    """
    passes, enough = [], threading.Event()

    def wait(*_):
        passes.append(1)
        enough.wait(seconds)

    hook = adapter.model.register_forward_pre_hook(wait)
    try:
        yield passes, enough
    finally:
        enough.set()
        hook.remove()


@contextmanager
def rationed(adapter):
    """Let the model make only as many passes as the semaphore that this gives allows, until the block ends."""
    allowed, over = threading.Semaphore(0), threading.Event()

    def wait(*_):
        while not (over.is_set() or allowed.acquire(timeout=0.05)):
            pass

    hook = adapter.model.register_forward_pre_hook(wait)
    try:
        yield allowed
    finally:
        over.set()
        hook.remove()


def take(page, name, folder):
    """Save a screenshot of the whole page for inspection."""
    folder = Path(os.environ.get("STETHOSCOPE_SCREENSHOTS", folder))
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"{name}-{page.width}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= page.width  # nothing sticks out


def test_a_photograph_is_asked_about_and_looked_at(page, served, adapter, tmp_path):
    from PIL import Image

    picture = Image.open(photograph()).convert("RGB")
    ask(page, photograph())
    take(page, "answer", tmp_path)
    answer = adapter.generate([adapter.encode(picture, DESCRIBE)], Generation(max_new_tokens=128))[0]
    assert page.evaluate("document.querySelector('#view [data-id=answer]').textContent").strip() == answer.text

    tokens = page.locator("#view .st-t")
    assert tokens.count() == len(answer.token_ids)
    tokens.nth(6).click()
    wait_for_words(page, "facts", f"7 of {len(answer.token_ids)}")
    assert page.locator(".st-chosen.st-t").inner_text() == answer.tokens[6].strip()
    assert page.locator("#view [data-id=words] .st-bar").count() == 5
    assert page.locator("#view [data-id=evolution] tr").count() == 4
    assert page.locator("#view [data-id=before] .st-bar").count() == 6
    assert "R_image" in text(page, "sums")
    page.keyboard.press("ArrowRight")
    wait_for_words(page, "facts", f"8 of {len(answer.token_ids)}")

    requests = len(page.asked)
    page.evaluate(MOVE, ["layer", 2])
    for name, positions in SLIDERS.items():  # how soon: scripts/bench/responsiveness.py
        assert any([page.evaluate(MOVE, [name, position]) is not None for position in positions]), name
    assert [text(page, f"{name}-text") for name in SLIDERS] == ["2 of 4", "60\xa0%", "30\xa0%", "× 3.98"]
    assert "2 of 4" in text(page, "shares-layer")
    assert len(page.asked) == requests  # the browser did it alone

    old = text(page, "question")
    page.select_option("#view [data-id=scope]", "token")
    page.wait_for_function("before => document.querySelector('#view [data-id=question]').innerText !== before", arg=old)
    assert page.locator(".st-chosen.st-t").inner_text() == answer.tokens[7].strip()  # still the same token and layer
    assert text(page, "layer-text") == "2 of 4"
    requests = len(page.asked)
    page.select_option("#view [data-id=scope]", "row")  # which the page still has
    wait_for_words(page, "question", old)
    assert len(page.asked) == requests
    take(page, "token", tmp_path)


def test_the_truth_of_an_example_is_beside_every_mention(page, served, adapter, tmp_path):
    """The first example shows a catch; a photograph has no truth."""
    example = page.get_by_role("button", name="rendered scene counter-000001")
    example.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#photograph img")
    page.click("#ask")
    page.wait_for_selector(DONE)
    scene = testbed.scenes(2)[1]
    with served.pool.use("testbed") as ready:
        diagnosis = diagnose(adapter, scene.image(), DESCRIBE, detector=ready.detectors.final, truth=scene.visible)
    kinds = [mention.outcome for mention in diagnosis.mentions]
    assert "caught" in kinds
    rows = [row.inner_text() for row in page.locator("#view [data-id=mentions] tr").all()]
    for row, mention in zip(rows, diagnosis.mentions, strict=True):
        assert row.startswith(mention.object)
        assert f"{'hallucinated' if mention.label else 'grounded'}: {mention.outcome}" in row
    wrong = sum(mention.label for mention in diagnosis.mentions)
    assert f"{wrong} of {len(kinds)} are hallucinated: {kinds.count('caught')} caught" in text(page, "outcomes")
    assert "truth: hallucinated" in text(page, "key")
    assert "clock, knife, surfboard" in text(page, "truth-note")
    if page.width < 760:  # the answer comes below the question, and is scrolled to
        assert page.evaluate("document.querySelector('#view [data-id=answer]').getBoundingClientRect().top") < 400
    page.fill("#question textarea", " ")
    page.click("#ask")
    wait_for_words(page, "status", "the question is empty")
    assert page.locator("#view [data-id=written]").is_hidden()  # the answer to another question
    page.fill("#question textarea", "Is there a dog in the image?")
    page.click("#ask")
    page.wait_for_selector(DONE)
    assert re.search(r"The answer is (yes|no) and names no object.*sure the model is: \1", text(page, "reply"))
    assert page.locator("#view [data-id=top-card]").is_hidden()
    take(page, "reply", tmp_path)


def test_single_heads_are_loaded_when_they_are_looked_at(page, served, adapter, monkeypatch, tmp_path):
    monkeypatch.setattr(payload, "ATTENTION_BYTES", 0)
    ask(page, photograph())
    diagnosis = diagnose(adapter, photograph(), DESCRIBE)
    wait_for_words(page, "attention-note", "mean over layers, mean over heads: ")
    page.select_option("#view [data-id=attention-layer]", "2")
    page.select_option("#view [data-id=attention-head]", "1")
    for token in (6, 8):
        page.locator("#view .st-t").nth(token).click()
        share = text_percent(float(diagnosis.attention.heads[token, 2, 1].sum()))
        wait_for_words(page, "attention-note", f"layer 3, head 2: {share} of the attention")
    take(page, "heads", tmp_path)


def test_warnings_follow_their_threshold(page, served, tmp_path):
    ask(page, next(served.own.glob("counter-*.png")))
    rows = page.locator("#view [data-id=mentions] tr").all()
    assert rows
    for percent, warned in ((100, 0), (0, len(rows))):
        page.evaluate(
            """value => { const one = document.querySelector('#view [data-id=warn]'); one.value = value;
            one.dispatchEvent(new Event("input", { bubbles: true })); }""",
            percent,
        )
        page.wait_for_function(f"document.querySelectorAll('#view tr.st-alarm').length === {warned}")
        boxed = page.locator("#view .st-last")
        assert boxed.count() == warned
    assert boxed.first.get_attribute("data-chance").endswith("%")  # not told by colour alone
    boxed.first.hover()
    tip = page.locator("#view [data-id=tip]")
    assert re.search(r"\d\s%\s\(score\)", tip.inner_text())
    assert re.search(r"evidence [+−]\d.*prior [+−]\d", tip.inner_text())
    take(page, "warnings", tmp_path)


def test_a_finished_run_is_gone_through_and_a_sample_is_opened(page, served, tmp_path):
    page.get_by_role("tab", name="Runs").click()
    cards = page.locator("#list article")
    cards.first.wait_for()
    assert served.evil in cards.first.inner_text()
    whole = text_of(page, "#list [data-id=count]")
    for kind in ("caught", "missed", "false alarm"):
        page.select_option("#list [data-id=kind]", kind)
        assert all(f"{kind}: " in card for card in cards.all_inner_texts())  # listed anew at once
    page.select_option("#list [data-id=fold]", "")
    page.select_option("#list [data-id=kind]", "caught")
    assert cards.count() > 0
    assert text_of(page, "#list [data-id=count]") != whole
    take(page, "samples", tmp_path)
    page.select_option("#list [data-id=order]", "high")
    chips = [cards.nth(index).locator(".st-chip.st-caught").all_inner_texts() for index in range(cards.count())]
    shares = [max(float(re.search(r"([\d.]+)\s%$", text)[1]) for text in texts) for texts in chips]
    assert shares == sorted(shares, reverse=True)
    page.wait_for_function("document.querySelectorAll('#list .st-thumbnail:not([hidden])').length > 0")
    names = [card.locator("b").inner_text() for card in cards.all()]
    chip = cards.first.locator(".st-chip", has_text="caught: ").last
    wanted = re.match(r"caught: (.*) \d", chip.inner_text())[1]
    chip.click()
    page.wait_for_selector(DONE)
    assert text(page, "answer").startswith(served.evil)
    assert f"sample {names[0]}" in text(page, "notes")
    assert page.locator("#question textarea").input_value() == DESCRIBE
    assert "hallucinated: caught" in text(page, "facts")
    assert page.locator("#view .st-t.st-chosen").inner_text() == wanted.split()[0]  # the mention that was clicked
    take(page, "opened", tmp_path)
    with page.expect_download() as download:
        page.click("#view [data-save=json]")
    saved = json.loads(Path(download.value.path()).read_text())
    assert saved["answer"] == page.locator("#view [data-id=answer]").text_content()
    assert "caught" in [mention_outcome(mention["label"], mention["warned"]) for mention in saved["mentions"]]
    link = page.url
    assert f"run=small&task=chair&sample={names[0]}&mention=" in link
    page.click("#view [data-id=next]")
    wait_for_words(page, "case-name", names[1])  # in the order of the list, with its filter
    page.locator("#view .st-t").first.focus()
    page.keyboard.press("p")
    wait_for_words(page, "case-name", names[0])
    shared = open_page(page.context, served, link)
    shared.wait_for_selector(DONE)
    assert text(shared, "case-name").startswith(f"small, chair: {names[0]}")
    assert shared.locator("#view .st-t.st-chosen").inner_text() == wanted.split()[0]
    shared.close()
    assert shared.failed == []
    page.get_by_role("tab", name="Runs").click()
    page.get_by_role("tab", name="Figures").click()
    frame = page.frame_locator("#figures iframe")
    frame.locator("svg").first.wait_for(timeout=60_000)
    for words in ("Leader board: AUROC", "ROC", "Reliability"):
        assert frame.get_by_text(re.compile(words, re.I)).count() > 0
    source = RunReader.read(served.runs / "small")
    expected = [example.kind.replace(" ", "-") for example in read_examples(source, EXAMPLES)]
    cards = [frame.locator(f"article.{kind}").count() for kind in ("caught", "missed", "false-alarm")]
    assert cards == [expected.count(kind) for kind in ("caught", "missed", "false-alarm")]
    assert sum(cards) > 0
    take(page, "figures", tmp_path)


CHANGED = "There is nothing to be seen. "


@pytest.fixture
def beside(served):
    """Put a second run beside the first: its first answer differs, and its detector warns of nothing."""
    copied = shutil.copytree(served.runs / "small", served.runs / "beside")
    for name, change in (("samples", {}), ("warnings", {"warned": False, "probability": 0.1})):
        file = copied / f"{name}.jsonl"
        lines = [{**json.loads(line), **change} for line in file.read_text().splitlines()]
        if name == "samples":
            chair = next(line for line in lines if line["task"] == "chair")
            chair["answer"]["text"] = CHANGED + chair["answer"]["text"][len(CHANGED) :]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    yield copied
    shutil.rmtree(copied)


def test_two_runs_are_set_side_by_side_and_one_in_progress_is_followed(page, served, beside, tmp_path):
    page.get_by_role("tab", name="Runs").click()
    cards, count = page.locator("#list article"), page.locator("#list [data-id=count]")
    cards.first.wait_for()
    status = (beside / "status.json").read_text()
    (beside / "status.json").write_text(status.replace('"chair": "finished"', '"chair": "running"'))
    page.click("#list [data-id=refresh]")  # the run was made after the page was opened
    page.locator("#other input").click()
    page.get_by_role("option", name="beside").click()
    page.wait_for_function("document.querySelector('#list [data-id=progress]').textContent.includes('60 of 60')")
    page.select_option("#list [data-id=fold]", "")
    page.select_option("#list [data-id=kind]", "differ")
    assert cards.first.locator("section").count() == 2
    cards.first.locator("button").first.focus()
    held = page.evaluate("document.activeElement.ariaLabel")
    (beside / "status.json").write_text(status)
    page.wait_for_function("document.querySelector('#list [data-id=progress]').hidden")  # it looks again by itself
    assert page.evaluate("document.activeElement.ariaLabel") == held
    assert page.locator("#list [data-id=kind]").input_value() == "differ"
    warnings = RunReader.read(served.runs / "small").warnings
    for kind, label in (("caught", 1), ("false alarm", 0)):
        page.select_option("#list [data-id=kind]", kind)
        warned = warnings[(warnings["label"] == label) & warnings["warned"]]  # the other run warns of nothing
        assert count.inner_text() == f"{warned['sample_id'].nunique()} of 120 samples"
    page.select_option("#list [data-id=kind]", "hallucinated")
    assert count.inner_text() == "0 of 120 samples"  # the same objects are named
    page.select_option("#list [data-id=kind]", "caught")
    page.select_option("#list [data-id=order]", "apart")
    take(page, "pair", tmp_path)
    page.locator("#list article section").nth(1).get_by_role("button", name="look at sample").click()
    page.wait_for_selector(DONE)
    assert text(page, "case-name").startswith("beside, chair")
    assert "hallucinated: " in text(page, "facts")  # the mention that the filter is about
    page.get_by_role("tab", name="Runs").click()
    assert page.locator("#run input").input_value() == "small"  # the list stays as it was
    page.get_by_role("tab", name="Figures").click()
    frame = page.frame_locator("#figures iframe")
    frame.get_by_text("Detectors: beside against small").first.wait_for(timeout=60_000)
    take(page, "comparison", tmp_path)
    page.locator("#other input").click()
    page.get_by_role("option", name="none").click()  # while the figures are seen
    page.wait_for_selector("#figures iframe[title='figures of small']", timeout=60_000)
    assert page.locator("#figures iframe").is_visible()


def test_a_run_that_is_newer_than_the_page_is_opened_by_its_link_and_may_go(page, served):
    newer = shutil.copytree(served.runs / "small", served.runs / "newer")
    try:
        store = RunReader.read(newer).store
        first, second = list(store.sample_ids("chair"))[:2]
        page.goto(f"{served.address}/?run=newer&task=chair&sample={first}")
        page.wait_for_selector(DONE, timeout=60_000)
        assert text(page, "case-name").startswith(f"newer, chair: {first}")
        page.click("#view [data-id=next]")
        wait_for_words(page, "case-name", f"newer, chair: {second}")
    finally:
        shutil.rmtree(newer)
    page.wait_for_selector(DONE, timeout=60_000)
    page.click("#view [data-id=next]")
    page.get_by_text("run='newer' is unknown").or_(page.get_by_text("unknown run")).first.wait_for()


def test_samples_of_all_runs_are_one_list(page, served, beside, tmp_path):
    page.get_by_role("tab", name="Runs").click()
    cards, count = page.locator("#list article"), page.locator("#list [data-id=count]")
    cards.first.wait_for()
    assert page.locator("#list [data-id=run-line]").is_hidden()
    page.locator("#run input").click()
    page.get_by_role("option", name="all runs").click()
    page.wait_for_function("document.querySelector('#list [data-id=count]').textContent.endsWith('2 runs')")
    page.select_option("#list [data-id=fold]", "")
    assert count.inner_text() == "240 of 240 samples of 2 runs"
    page.select_option("#list [data-id=kind]", "caught")
    page.select_option("#list [data-id=order]", "high")
    assert {card.locator(".st-run").inner_text() for card in cards.all()} == {"small"}  # the other warns of nothing
    page.select_option("#list [data-id=run]", "beside")
    assert cards.count() == 0
    page.select_option("#list [data-id=run]", "")
    page.select_option("#list [data-id=kind]", "")
    page.select_option("#list [data-id=task]", "chair")
    page.select_option("#list [data-id=order]", "together")
    page.fill("#list [data-id=find]", "counter-0000")
    heads = [(card.locator("b").inner_text(), card.locator(".st-run").inner_text()) for card in cards.all()]
    names = sorted({name for name, _ in heads})
    assert sorted(heads) == sorted((name, run) for name in names for run in ("small", "beside"))
    assert [name for name, _ in heads] == sorted(names * 2)
    page.wait_for_function("document.querySelectorAll('#list .st-thumbnail[hidden]').length === 0")
    take(page, "all_runs", tmp_path)
    cards.first.locator("button").first.focus()
    page.keyboard.press("n")
    assert page.evaluate("document.activeElement.closest('article').dataset.key").split("\t")[0] == heads[1][1]
    cards.nth(1).get_by_role("button", name=f"look at sample {names[0]} of {heads[1][1]}").press("Enter")
    page.wait_for_selector(DONE, timeout=60_000)
    assert text(page, "case-name").startswith(f"{heads[1][1]}, chair: {names[0]}")
    assert f"run={heads[1][1]}&task=chair&sample={names[0]}" in page.url
    page.click("#view [data-id=previous]")  # in the list, which is of the other run
    wait_for_words(page, "case-name", f"{heads[0][1]}, chair: {names[0]}")
    page.get_by_role("tab", name="Runs").click()
    assert page.locator("#run input").input_value() == "all runs"
    assert cards.count() == len(heads)
    page.get_by_role("tab", name="Figures").click()
    page.get_by_text("Figures are of one run").wait_for()


def test_a_note_is_written_and_filtered_by(page, served, tmp_path):
    page.get_by_role("tab", name="Runs").click()
    cards = page.locator("#list article")
    cards.first.wait_for()
    page.select_option("#list [data-id=kind]", "caught")
    page.get_by_role("button", name="note on sample").first.focus()
    page.keyboard.press("Enter")
    form = page.locator("#list form")
    assert page.evaluate("document.activeElement.tagName") == "SELECT"
    form.locator("select").first.select_option(index=1)
    form.locator("select").nth(1).select_option("0")
    form.locator("input").fill("hidden, small")
    form.locator("textarea").fill(served.evil)
    page.evaluate("document.querySelector('#list article').dataset.old = 1")
    os.utime(served.runs / "small" / "samples.jsonl")
    page.locator("#list [data-id=refresh]").click()
    page.wait_for_function("!document.querySelector('#list article').dataset.old")  # a new list, the same form
    take(page, "note", tmp_path)
    form.get_by_role("button", name="save").click()
    try:
        page.locator("#list .st-notes").wait_for()
        assert f"label corrected to grounded; #hidden; #small; {served.evil}".strip() in text_of(
            page, "#list .st-notes"
        )
        assert page.locator("#list [data-id=kind]").input_value() == "caught"
        page.select_option("#list [data-id=kind]", "")
        page.select_option("#list [data-id=noted]", "#small")
        assert cards.count() == 1
        with page.expect_download() as download:
            page.get_by_role("button", name="save notes as JSON").click()
        [note] = json.loads(Path(download.value.path()).read_text())
        with page.expect_download():  # the same once more
            page.get_by_role("button", name="save notes as JSON").click()
        assert (note["label"], note["tags"]) == (0, ["hidden", "small"])
        assert note["author"]
    finally:
        (served.runs / "small" / "notes.jsonl").unlink(missing_ok=True)


def test_questions_about_a_picture_are_a_conversation(page, served, adapter, tmp_path):
    """Earlier answers stay in reach with their warnings; a new conversation or another picture begins afresh."""
    ask(page, next(served.own.glob("counter-000001*.png")))
    described = text(page, "answer")
    assert page.locator("#view [data-id=turns-card]").is_hidden()
    asked = "Is there a clock in the image?"
    page.click("#view [data-id=ask-on]")
    page.keyboard.type(asked)  # in place of the first question
    assert page.locator("#question textarea").input_value() == asked
    page.click("#ask")
    turns = page.locator("#view .st-turn")
    page.wait_for_function("document.querySelectorAll('#view .st-turn').length === 2")
    page.wait_for_selector(DONE)
    first, second = [turn.inner_text() for turn in turns.all()]
    assert first.startswith(f"1. {DESCRIBE}")
    assert re.search(r"warned of .* \d+\s%.*\(caught\)", first)
    assert second.startswith(f"2. {asked}")
    assert "shown below" in second
    assert "testbed is asked one question at a time" in text(page, "notes")
    take(page, "conversation", tmp_path)
    turns.first.focus()
    page.keyboard.press("Enter")
    page.wait_for_function(
        "words => document.querySelector('#view [data-id=answer]').innerText === words", arg=described
    )
    assert turns.first.get_attribute("aria-current") == "true"
    assert page.locator("#view tr.st-alarm").count() > 0
    page.fill("#question textarea", " ")
    page.click("#ask")
    wait_for_words(page, "status", "the question is empty")
    assert turns.count() == 2  # still in reach
    turns.last.click()
    page.wait_for_selector(DONE)
    assert text(page, "asked") == asked
    page.click("#anew")
    wait_for_words(page, "status", "A new conversation")
    assert turns.count() == 0
    assert page.locator("#view [data-id=written]").is_hidden()
    page.fill("#question textarea", asked)
    page.click("#ask")
    page.wait_for_selector(DONE)
    page.get_by_role("button", name="rendered scene counter-000002").click()
    page.wait_for_function("document.querySelector('#photograph img').src.includes('000002')")
    page.fill("#question textarea", "Is there a car in the image?")
    page.click("#ask")
    wait_for_words(page, "asked", "car")
    page.wait_for_selector(DONE)
    assert turns.count() <= 1  # of the other picture nothing is listed
    assert page.locator("#view [data-id=turns-card]").is_hidden()


def test_an_answer_is_stopped(page, served, adapter, tmp_path):
    with rationed(adapter) as allowed:
        page.set_input_files("#photograph input[type=file]", next(served.own.glob("counter-000001*.png")))
        page.wait_for_selector("#photograph img")
        allowed.release()
        page.evaluate(
            "document.querySelector('#ask').click(), document.querySelector('#view').classList.toggle('upload')"
        )
        page.wait_for_selector("#view .st-caret")
        assert page.locator("#busy").is_hidden()
        page.click("#ask")  # which Gradio drops, whatever changed the viewer just after the first click
        page.wait_for_selector("#busy:visible")
        assert text_of(page, "#busy") == "An answer is being written. Stop ends it, then ask again."
        with page.expect_response("**/cancel"):
            page.click("#stop")
            wait_for_words(page, "status", "stopping")  # as the model is in a pass
            assert page.locator("#busy").is_visible()
            allowed.release()
        wait_for_words(page, "status", "stopped")
        page.wait_for_timeout(500)
        assert text(page, "status") == "stopped"
        assert page.locator("#view [data-id=written]").is_hidden()
        assert page.locator("#busy").is_hidden()
        allowed.release()
        page.click("#ask")
        page.wait_for_selector("#view .st-caret")
        assert page.locator("#busy").is_hidden()  # asked anew
        broken = tmp_path / "broken.png"
        broken.write_text("no picture")
        page.locator("#photograph button").first.click()  # takes the picture away
        page.set_input_files("#photograph input[type=file]", broken)
        page.wait_for_timeout(1000)
        page.click("#ask")  # the answer is still being written
        page.wait_for_selector("#busy:visible")
        page.click("#stop")
    wait_for_words(page, "status", "stopped")


def test_what_is_looked_at_again_is_stopped_and_a_complete_answer_stays(page, served, adapter):
    ask(page, next(served.own.glob("counter-000001*.png")))
    shown = text(page, "answer")
    hook = adapter.model.register_forward_pre_hook(lambda *_: time.sleep(0.5))
    try:
        page.select_option("#view [data-id=scope]", "token")
        wait_for_words(page, "status", "again")
        page.click("#stop")
        wait_for_words(page, "status", "stopped")
    finally:
        hook.remove()
    page.wait_for_timeout(1000)
    assert (text(page, "status"), text(page, "answer")) == ("stopped", shown)
    assert page.locator("#view [data-id=scope]").input_value() == "row"
    assert page.locator("#view [data-id=scope]").is_enabled()


def text_of(page, selector):
    return page.locator(selector).inner_text()


def test_what_is_no_picture_is_said(page, served, tmp_path):
    page.click("#ask")
    page.wait_for_selector("#view .st-error")
    assert "upload one" in text(page, "status")
    page.fill("#question textarea", "")
    for _ in range(3):  # the same error again and again
        page.click("#ask")
        wait_for_words(page, "status", "the question is empty")
        page.wait_for_function("document.querySelector('#view').ariaBusy !== 'true'")
        page.wait_for_timeout(500)
    assert page.locator("#busy").is_hidden()  # no answer is being written
    page.set_input_files("#photograph input[type=file]", next(served.own.glob("counter-*.png")))
    page.wait_for_selector("#photograph img")
    page.wait_for_timeout(500)
    page.locator("#photograph button").first.click()
    broken = tmp_path / "broken.png"
    broken.write_text("no picture")
    page.set_input_files("#photograph input[type=file]", broken)
    wait_for_words(page, "status", "cannot be read")  # before anything is asked
    assert "'broken.png'" in text(page, "status")
    page.wait_for_selector("#photograph input[type=file]", state="attached")
    assert page.locator("#photograph img").count() == 0


def test_a_question_that_is_refused_is_not_being_written(page, monkeypatch):
    monkeypatch.setattr(sessions, "MAX_PENDING", 0)
    for _ in range(2):
        page.click("#ask")
        page.wait_for_selector("#view .error", state="attached")
        page.wait_for_timeout(600)
    assert page.locator("#busy").is_hidden()
    assert all("429" in line for line in page.failed)
    page.failed.clear()


@pytest.mark.parametrize("name", ["turned.jpg", "scan.tiff"])
def test_every_picture_is_shown_upright_before_it_is_asked_about(page, tmp_path, name):
    from PIL import Image

    picture = Image.new("RGB", (80, 40), "teal")
    exif = picture.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    picture.save(tmp_path / name, exif=exif)
    page.set_input_files("#photograph input[type=file]", tmp_path / name)
    page.wait_for_selector("#photograph img")
    page.wait_for_function(SIZE + "=== '40,80'")


def test_two_users_at_once_get_their_own_answers(browser, served, adapter):
    questions = ["Is there a dog in the image?", DESCRIBE]
    files = sorted(served.own.glob("counter-*.png"))[:2]
    expected = []
    for number, question in enumerate(questions):  # before the others have the model
        encoded = adapter.encode(testbed.scenes(number + 2)[number + 1].image(), question)
        expected.append((adapter.generate([encoded], Generation(max_new_tokens=128))[0].text, question))
    contexts = [browser.new_context() for _ in questions]
    pages = [open_page(context, served) for context in contexts]
    for page, file, question in zip(pages, files, questions, strict=True):
        page.set_input_files("#photograph input[type=file]", file)
        page.wait_for_selector("#photograph img")
        page.fill("#question textarea", question)
    for page in pages:
        page.click("#ask")
    for page, answers in zip(pages, expected, strict=True):
        page.wait_for_selector(DONE)
        assert (text(page, "answer").strip(), text(page, "asked")) == answers
    for page in pages:  # each looks again at its own
        before = text(page, "answer")
        page.select_option("#view [data-id=scope]", "token")
        page.wait_for_function("document.querySelector('#view [data-id=status]').hidden")
        assert text(page, "answer") == before
    for context in contexts:
        context.close()


def test_closing_the_page_in_the_middle_of_an_answer_frees_the_model(browser, served, adapter):
    with slowed(adapter) as (passes, enough):
        context = browser.new_context()
        page = open_page(context, served)
        page.set_input_files("#photograph input[type=file]", next(served.own.glob("counter-*.png")))
        page.wait_for_selector("#photograph img")
        page.click("#ask")
        page.wait_for_selector("#view .st-caret")
        assert "score of the object so far" in text(page, "key")  # what the colours mean, while they appear
        assert served.pool.busy
        context.close()
        while served.pool.busy:
            assert len(passes) < 30  # of some fifty that the whole answer takes, and more to explain it
            time.sleep(0.02)
        seen = len(passes)
        enough.set()
        time.sleep(0.5)
        assert len(passes) == seen
