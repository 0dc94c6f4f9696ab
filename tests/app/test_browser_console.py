"""Nothing is logged to the browser's console, in any tab, panel or frame of the app, nor by the pages that it saves."""

import shutil

import pytest
from helpers.page_client import PATIENCE

DONE = "#view [data-id=diagnosed]:not([hidden])"


@pytest.fixture
def page(browser, served):
    """A page whose messages, of any level and any frame, are kept."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.logged = []
    page.on("console", lambda message: page.logged.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: page.logged.append(str(error)))
    yield page
    context.close()


def open_all(page, root):
    """Open everything that is folded, so that what it holds is drawn."""
    for summary in page.locator(f"{root} details:not([open]) > summary:visible").all():
        summary.click()


def test_the_console_stays_empty(page, served, tmp_path):
    shutil.copytree(served.runs / "small", served.runs / "again", dirs_exist_ok=True)
    try:
        page.goto(served.address)
        page.wait_for_selector("#view .st-status")
        page.locator("#examples button").first.click()
        page.wait_for_selector("#photograph img")
        page.get_by_role("button", name="generation").click()
        page.click("#ask")
        page.wait_for_selector(DONE)
        open_all(page, "#view")
        page.locator("#view .st-t").nth(3).click()
        page.locator("#view [data-id=picture]").press("Shift+ArrowDown")
        page.select_option("#view [data-id=scope]", "token")
        page.wait_for_function("document.querySelector('#view [data-id=status]').hidden")
        page.get_by_role("tab", name="Runs").click()
        page.locator("#list article").first.wait_for()
        open_all(page, "#list")
        page.get_by_role("tab", name="Figures").click()
        figures = page.frame_locator("#figures iframe")
        figures.locator("section").first.wait_for(timeout=60_000)
        figures.locator("svg").last.wait_for()
        page.wait_for_timeout(500)  # for errors, which may still come
        page.get_by_role("tab", name="Samples").click()
        page.locator("#list .st-chip.st-caught").first.click()
        page.wait_for_selector("#view [data-id=case]:not([hidden])")
        page.wait_for_selector(DONE)
    finally:
        shutil.rmtree(served.runs / "again")
    assert page.logged == []
