"""What others wrote stays text in a page."""

import json
from html.parser import HTMLParser

import pytest

from stethoscope.core.html import document, escape, json_block

EVIL = [
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    *("<!-- ", "]]>", "a\u2028b", "&lt;b&gt;", "'"),
]


class Seen(HTMLParser):
    """Tags, attributes, and the text inside every element by its tag."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self._open = [], {}, []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._open.append(tag)

    def handle_endtag(self, tag):
        self._open.pop()

    def handle_data(self, data):
        self.text[self._open[-1] if self._open else ""] = self.text.get(self._open[-1] if self._open else "", "") + data


@pytest.mark.parametrize("text", EVIL)
def test_text_stays_text_in_elements_and_attributes(text):
    seen = Seen(f'<p title="{escape(text)}">{escape(text)}</p>')
    assert seen.tags == [("p", {"title": text})]
    assert seen.text == {"p": text}


@pytest.mark.parametrize("text", EVIL)
def test_data_arrives_as_it_was_and_cannot_end_its_element(text):
    seen = Seen(json_block({text: [text]}))
    assert seen.tags == [("script", {"type": "application/json", "id": "data"})]
    assert json.loads(seen.text["script"]) == {text: [text]}


def test_a_document_says_that_nothing_may_be_fetched():
    seen = Seen(document("<b>", "<p>x</p>"))
    policy = next(attributes["content"] for tag, attributes in seen.tags if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none'")
    assert seen.text["title"] == "<b>"


def test_numbers_that_json_does_not_know_are_refused():
    with pytest.raises(ValueError, match="JSON"):
        json_block(float("nan"))
