"""Nothing sticks out on a phone or is cut off there: the screen of an answer and the page of a diagnosis.

Screenshots go into $STETHOSCOPE_SCREENSHOTS.
"""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.page_client import PATIENCE

import stethoscope
from stethoscope import testbed
from stethoscope.app.model_pool import Detectors
from stethoscope.detection.detector import Detector
from stethoscope.evaluation.evaluator import Evaluator
from stethoscope.features import FeatureSet
from stethoscope.storage.run_dir import RunStore
from stethoscope.tasks.chair import Chair

QUESTION = "Please describe this image in detail."
WIDTHS = {1280: 900, 390: 844}

# what lies beyond the right edge of the window or of a box that would have to be scrolled, except in those of `but`
BEYOND = """([root, but]) => {
  const inside = [...document.querySelectorAll(root + " *")].filter(
    (one) => one.getClientRects().length && !one.closest(but));
  const cut = inside.filter((one) => one.scrollWidth > one.clientWidth + 1
    && ["auto", "scroll", "hidden"].includes(getComputedStyle(one).overflowX) && one.tagName !== "SELECT");
  const out = inside.filter((one) => one.getBoundingClientRect().right > window.innerWidth + 1);
  return [...cut, ...out].map((one) => `${one.tagName}.${one.className} ${one.textContent.slice(0, 40)}`);
}"""


@pytest.fixture(scope="module")
def grounded(adapter, tmp_path_factory):
    """Fit a detector with visual evidence."""
    folder = tmp_path_factory.mktemp("grounded")
    features = FeatureSet(groups=["uncertainty", "position"], names=["attended_embedding"])
    Evaluator(features=features, run_dir=folder, batch_size=32).run(adapter, Chair(scenes=60))
    return Detector(C=0.1).fit(RunStore(folder).tokens("chair"))


@pytest.fixture(params=[390, pytest.param(1280, marks=pytest.mark.slow)], ids=str)
def page(request, browser):
    page = browser.new_page(viewport={"width": request.param, "height": WIDTHS[request.param]})
    page.set_default_timeout(PATIENCE)
    page.width = request.param
    yield page
    page.close()


def take(page, name, folder):
    folder = Path(os.environ.get("STETHOSCOPE_SCREENSHOTS", folder))
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"{name}-{page.width}.png", full_page=True)


def beyond(page, root, but="[data-none]"):
    assert page.evaluate("document.documentElement.scrollWidth") <= page.width
    return page.evaluate(BEYOND, [root, but])


def test_the_page_of_a_diagnosis(page, adapter, grounded, tmp_path):
    answer = "The image shows a kitchen with a knife, a fork and a dining table."
    diagnosis = stethoscope.diagnose(adapter, testbed.scenes(2)[1].image(), QUESTION, answer, grounded)
    long = "W" * 90  # which some vocabularies have
    tokens = [[(long, *layer[1:]) for layer in token] for token in diagnosis.evolution.top_tokens]
    diagnosis = replace(diagnosis, evolution=replace(diagnosis.evolution, top_tokens=tokens))
    file = tmp_path / "report.html"
    file.write_text(diagnosis.to_html(), "utf-8")
    page.goto(file.as_uri())
    page.locator(".st-visual-evidence").last.click()
    page.wait_for_function("document.querySelector('[data-id=facts]').innerText.includes('looks like')")
    take(page, "diagnosis", tmp_path)
    assert page.locator("[data-id=facts]").inner_text().count("the place looks like") == 1
    assert page.locator(".st-visual-evidence").count() == len(diagnosis.mentions) == 3
    assert beyond(page, "main", ".st-scroll:has(.st-strip)") == [] or page.width > 390


def test_the_screen_of_an_answer(page, served, grounded, monkeypatch, tmp_path):
    with served.pool.use("testbed") as ready:
        shown = replace(ready, detectors=Detectors(grounded, origin="with visual evidence"))
    monkeypatch.setattr(served.pool, "_loaded", ("testbed", shown))
    page.goto(served.address)
    page.wait_for_selector("#view .st-status")
    page.set_input_files("#photograph input[type=file]", sorted(served.own.glob("counter-*.png"))[0])
    page.wait_for_selector("#photograph img")
    page.click("#ask")
    page.wait_for_selector("#view [data-id=diagnosed]:not([hidden])")
    page.locator("#view .st-visual-evidence").first.click()
    page.wait_for_function("document.querySelector('#view [data-id=facts]').innerText.includes('looks like')")
    take(page, "visual_evidence", tmp_path)
    looks = page.locator("#view .st-visual-evidence")
    assert looks.count() == page.locator("#view [data-id=mentions] tr").count() / 2
    assert looks.first.inner_text().startswith("looks like: ")
    assert "no object detector" in page.locator("#view [data-id=visual-evidence-note]").inner_text()
    assert beyond(page, "#view", ".st-scroll:has(.st-strip)") == []  # many tokens are a strip that is scrolled
