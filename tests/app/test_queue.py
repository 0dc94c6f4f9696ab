"""Several people at once: all are served, and whoever waits reads how many are before."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from app.test_sessions import png
from app.test_ui import DESCRIBE, DONE, open_page, rationed, slowed, wait_for_words
from helpers.page_client import Client, file

from stethoscope import testbed
from stethoscope.core.types import Generation

SESSIONS = 20
TOLD = range(SESSIONS - 2, SESSIONS - 6, -1)
RECORD = """() => {
  const status = document.querySelector("#view [data-id=status]");
  window.lines = [];
  new MutationObserver(() => window.lines.push(status.textContent)).observe(status, { childList: true });
}"""


@pytest.fixture
def pages(browser, served):
    """Return a function that opens the page at a width, as somebody else each time."""
    contexts = []

    def opened(width, height):
        contexts.append(browser.new_context(viewport={"width": width, "height": height}))
        return open_page(contexts[-1], served)

    yield opened
    for context in contexts:
        context.close()


def prepare(page, served):
    page.set_input_files("#photograph input[type=file]", sorted(served.own.glob("counter-*.png"))[0])
    page.wait_for_selector("#photograph img")
    page.fill("#question textarea", DESCRIBE)


def test_a_phone_is_served_when_the_one_before_it_is_closed(pages, served, adapter):
    desk, phone = pages(1280, 900), pages(390, 844)
    for page in (desk, phone):
        prepare(page, served)
    picture = testbed.scenes(1)[0].image()
    whole = adapter.generate([adapter.encode(picture, DESCRIBE)], Generation(max_new_tokens=128))[0]
    with slowed(adapter) as (passes, _):
        desk.click("#ask")
        wait_for_words(desk, "status", "writing")
        phone.click("#ask")
        wait_for_words(phone, "status", "1 question before yours")
        assert phone.evaluate("document.querySelector('#view').getBoundingClientRect().top") < 400
        assert phone.evaluate("document.documentElement.scrollWidth") <= 390
        desk.close()
        wait_for_words(phone, "status", "writing")
        assert len(passes) < len(whole.token_ids)  # the answer of the closed page was given up in the middle
    phone.wait_for_selector(DONE)
    assert phone.locator("#view [data-id=status]").inner_text() == ""
    assert phone.failed == []
    assert not served.pool.busy


def test_twenty_sessions_are_queued_and_each_is_told_its_place(pages, served, adapter):
    page, users = pages(390, 844), [Client(served.address) for _ in range(SESSIONS - 1)]
    with slowed(adapter, 0) as (passes, _):
        for _ in range(2):  # the second finds everything prepared
            passes.clear()
            assert users[0].ask(file(users[0].upload(png()).json()[0]), length=2)["kind"] == "done"
    with served.pool.use("testbed"):
        for user in users:
            assert user.join(file(user.upload(png()).json()[0]), length=2).status_code == 200
        page.evaluate(RECORD)
        prepare(page, served)
        page.click("#ask")
        wait_for_words(page, "status", f"{SESSIONS - 1} questions before yours")
    with rationed(adapter) as allowed:
        for number in TOLD:  # the model answers one question, and no other before the page has said so
            allowed.release(len(passes))
            wait_for_words(page, "status", f"{number} questions before yours")
    with ThreadPoolExecutor(SESSIONS) as readers:
        assert [shown["kind"] for shown in readers.map(Client.read, users)] == ["done"] * len(users)
    page.wait_for_selector(DONE)
    lines = [line for line in page.evaluate("window.lines") if "before yours" in line]
    numbers = [int(line.split()[1]) for line in lines]
    assert numbers[0] == SESSIONS - 1
    assert numbers == sorted(numbers, reverse=True)
    assert set(numbers) >= {SESSIONS - 1, *TOLD}
    assert page.failed == []
    for user in users:
        user.close()
