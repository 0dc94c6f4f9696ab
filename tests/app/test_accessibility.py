"""No page violates WCAG 2.2, level A or AA, by axe-core: light and dark, at the width of a desk and of a phone."""

import json
from importlib.resources import files

import pytest
from helpers.page_client import PATIENCE

import stethoscope
from stethoscope import testbed
from stethoscope.app.runs import Runs

pytest.importorskip("axe_playwright_python", reason="no axe-core; pip install axe-playwright-python")

LEVELS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]
COMBINATIONS = [("light", 1280), ("dark", 390), ("dark", 1280), ("light", 390)]
QUICK = 2  # of them, which differ in both
DONE = "#view [data-id=diagnosed]:not([hidden])"
DRAWN = """async () => {
  await document.fonts.ready;
  for (let frame = 0; frame < 3; frame++) await new Promise(requestAnimationFrame); // a change, its layout, its drawing
}"""
VIOLATIONS = """async (levels) => {
  const result = await axe.run(document, { runOnly: { type: "tag", values: levels }, resultTypes: ["violations"] });
  return result.violations.flatMap((rule) => rule.nodes.map((node) =>
    `${rule.id}: ${node.html} ${node.failureSummary}`));
}"""


@pytest.fixture(scope="module")
def page(browser):
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    yield page
    page.close()


def violations(page, state, count):
    """List what violates the rules in a state of the page, in the first combinations of scheme and width."""
    page.add_script_tag(content=files("axe_playwright_python").joinpath("axe.min.js").read_text("utf-8"))
    page.add_style_tag(content="* { transition: none !important; animation: none !important; }")
    page.mouse.move(0, 0)
    listed = []
    for scheme, width in COMBINATIONS[:count]:
        page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        page.evaluate("dark => document.body.classList.toggle('dark', dark)", scheme == "dark")  # as Gradio does
        page.set_viewport_size({"width": width, "height": 900})
        page.evaluate(DRAWN)
        listed += [f"{state} {scheme} {width} {text}" for text in page.evaluate(VIOLATIONS, LEVELS)]
    return listed


def test_the_page_of_a_diagnosis(page, adapter, tmp_path):
    scene = testbed.scenes(2)[1]
    diagnosis = stethoscope.diagnose(
        adapter,
        scene.image(),
        "Please describe this image in detail.",
        detector=testbed.DETECTOR_DIR,
        truth=scene.visible,
    )
    file = tmp_path / "report.html"
    file.write_text(diagnosis.to_html(), "utf-8")
    page.goto(file.as_uri())
    page.locator("[data-id=matrix-details] summary").click()
    page.locator("[data-id=picture]").press("Shift+ArrowDown")
    page.locator("[data-id=patch-attention-title]").wait_for()
    assert violations(page, "diagnosis", QUICK) == []


@pytest.mark.slow
def test_the_report_that_the_app_shows(page, folder, tmp_path):
    file = tmp_path / "figures.html"
    file.write_text(json.loads(Runs(folder, None, tmp_path).figures("small"))["page"], "utf-8")
    page.goto(file.as_uri())
    assert violations(page, "figures", 4) == []
    chip = "getComputedStyle(document.querySelector('article mark.st-last'), '::after').content"
    assert page.evaluate(chip) == "none"  # the percentage is in the heading: no empty chip beside the mention


@pytest.mark.parametrize("count", [QUICK, pytest.param(4, marks=pytest.mark.slow)])
def test_the_app(page, served, count):
    page.set_viewport_size({"width": 1280, "height": 900})
    page.goto(served.address)
    page.wait_for_selector("#view .st-status")
    assert count == QUICK or violations(page, "first", count) == []
    page.locator("#examples button").first.click()
    page.wait_for_selector("#photograph img")
    page.fill("#question textarea", "Is there a dog in the image?")
    page.click("#ask")
    page.wait_for_selector(DONE)
    page.fill("#question textarea", "Please describe this image in detail.")
    page.click("#ask")
    page.wait_for_function("document.querySelectorAll('#view .st-turn').length === 2")
    page.wait_for_selector(DONE)
    assert violations(page, "answer", count) == []
    page.get_by_role("tab", name="Runs").click()
    page.locator("#list article").first.wait_for()
    assert count == QUICK or violations(page, "run", count) == []
    if count != QUICK:
        page.locator("#run input").click()
        page.get_by_role("option", name="all runs").click()
        page.locator("#list .st-run").first.wait_for()
        assert violations(page, "all runs", count) == []
    page.locator("#list .st-chip.st-caught").first.click()
    page.wait_for_selector("#view [data-id=case]:not([hidden])")
    assert count == QUICK or violations(page, "sample", count) == []
