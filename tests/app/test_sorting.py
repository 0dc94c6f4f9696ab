"""Tables of a report page are sorted by a click on the head of a column."""

from stethoscope.metrics.bootstrap import Interval
from stethoscope.report.run_report import table_page
from stethoscope.report.tables import Table


def interval(value):
    return Interval(value, value - 0.1, value + 0.1, 90, 30)


def test_a_click_sorts_a_second_turns_round_a_third_restores(browser, tmp_path):
    rows = (("b", interval(0.2)), ("c", None), ("a", interval(-0.3)), ("d", interval(0.1)))
    file = tmp_path / "page.html"
    file.write_text(table_page("tables", [Table("scores", ("name", "AUROC"), rows)]), encoding="utf-8")
    page, logged = browser.new_page(), []
    page.on("console", lambda message: logged.append(message.text))
    page.goto(file.as_uri())

    def names():
        return page.locator("tbody th").all_inner_texts()

    def order():
        return page.locator("thead th", has_text="AUROC").get_attribute("aria-sort")

    button = page.get_by_role("button", name="AUROC")
    seen = [(names(), order())]
    for _ in range(3):
        button.click()
        seen.append((names(), order()))
    assert seen == [
        (["b", "c", "a", "d"], None),
        (["b", "d", "a", "c"], "descending"),  # one without a value comes last
        (["a", "d", "b", "c"], "ascending"),
        (["b", "c", "a", "d"], None),
    ]
    page.get_by_role("button", name="name").press("Enter")
    assert names() == ["a", "b", "c", "d"]
    assert logged == []
    page.close()
