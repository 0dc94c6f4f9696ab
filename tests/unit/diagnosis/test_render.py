"""The page and the notebook display: the model's text stays text, nothing is fetched, the page's script works."""

import base64
import io
import json
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

import stethoscope
from stethoscope import testbed
from stethoscope.core.types import Answer
from stethoscope.diagnosis.answer_verdicts import DiagnosedMention, TokenVerdict
from stethoscope.diagnosis.diagnosis import Diagnosis
from stethoscope.diagnosis.viewer_parts import attention_payload

EVIL = "A <script>alert(1)</script> *dog*\n# and </p> [a](javascript:alert(1)) <img src=x onerror=alert(1)> & `cat`"


class Seen(HTMLParser):
    """Tags and attributes, the text of the answer, and what every script holds."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.scripts, self.answer, self._path = [], [], "", []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag not in ("meta", "img", "input", "link", "br"):
            self._path.append((tag, attributes.get("class") or attributes.get("style") or ""))
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        while self._path and self._path.pop()[0] != tag:
            pass

    def handle_data(self, data):
        if self._path and self._path[-1][0] == "script":
            self.scripts[-1] += data
        elif any("st-answer" in kind or "pre-wrap" in kind for _, kind in self._path):
            self.answer += data


def tokens(text, size=3):
    """Split a text into tokens of a few characters, with gaps between them."""
    spans = [(start, min(start + size, len(text))) for start in range(0, len(text), size + 1)]
    return Answer(text, tuple(range(len(spans))), tuple(spans), (-0.5,) * len(spans))


@pytest.fixture(scope="module")
def evil():
    """Make a diagnosis with a warned mention in the middle of hostile text."""
    answer = tokens(EVIL)
    start = EVIL.index("dog")
    why = TokenVerdict(0.9, 3.0, -0.8, (("<b>nll</b>", 2.0), ("entropy", -1.0)), (("<u>cat</u>", 0.61), (None, 0.3)))
    owners = tuple(answer.covering(start, start + 3))
    return Diagnosis(
        model="<i>model</i>", image=Image.new("RGB", (30, 20), "teal"), question="<script>what</script>?",
        answer=answer,
        entropy=np.ones(len(answer.token_ids), np.float32), verdicts=(why,) * len(answer.token_ids), threshold=0.5,
        mentions=(DiagnosedMention("<u>dog</u>", start, start + 3, owners, why, True),), notes=("no <relevancy>",),
    )  # fmt: skip


@pytest.fixture(scope="module")
def real():
    adapter = stethoscope.load("testbed")
    text = "The image shows a kitchen with a knife and a fork. The knife is on the left side."
    picture = testbed.scenes(2)[1].image()
    return stethoscope.diagnose(adapter, picture, "Please describe this image in detail.", answer=text)


@pytest.mark.parametrize("show", [Diagnosis.to_html, Diagnosis._repr_html_], ids=["page", "notebook"])
def test_hostile_text_is_shown_letter_by_letter(evil, show):
    seen = Seen(show(evil))
    assert seen.answer == EVIL
    assert len(seen.scripts) == (2 if show is Diagnosis.to_html else 0)
    assert {tag for tag, _ in seen.tags}.isdisjoint({"u", "b", "a", "relevancy"})
    assert [tag for tag, _ in seen.tags].count("i") == (4 if show is Diagnosis.to_html else 0)  # the legends' own
    assert not [name for _, attributes in seen.tags for name in attributes if name.startswith("on")]


def test_hostile_text_without_a_detector_is_shown_letter_by_letter_too(evil):
    plain = replace(evil, verdicts=(), threshold=None, mentions=())
    for show in (Diagnosis.to_html, Diagnosis._repr_html_):
        seen = Seen(show(plain))
        assert seen.answer == EVIL
        assert not [name for _, attributes in seen.tags for name in attributes if name.startswith("on")]
    assert "no detector, so no warnings" in plain._repr_html_()


def test_the_notebook_says_what_is_warned_of_in_words_too(evil, real):
    shown = evil._repr_html_()
    assert "&lt;u&gt;dog&lt;/u&gt;, score 90\xa0%" in shown
    assert shown.count("border:2px solid") == len(evil.mentions[0].tokens)
    assert shown.count("<img") == 1  # no relevancy, so no heat map
    images = [attributes for tag, attributes in Seen(real._repr_html_()).tags if tag == "img"]
    assert images[0]["alt"] == "the picture"
    assert len(images) == 1 + min(len([mention for mention in real.mentions if mention.tokens]), 6)


def payload_of(page):
    """Read the data that the page's viewer shows."""
    return json.loads(Seen(page).scripts[0])


def test_the_pages_scope_is_told(real):
    assert "gradient of scope row" in real.to_html()
    assert real.to_dict()["scope"] == "row"
    assert "gradient of scope token" in replace(real, scope="token").to_html()


def test_what_the_place_looks_like_is_told_with_what_that_means(evil, real):
    data = payload_of(evil.to_html())
    assert "It is no object detector" in data["visual_evidence_note"]
    assert payload_of(real.to_html())["visual_evidence_note"] == ""
    mention = data["mentions"][data["tokens"][data["start"]]["mention"]]
    assert mention["visual_evidence"] == "<u>cat</u> 61\xa0%, nothing known 30\xa0%"
    objects = [{"object": "<u>cat</u>", "probability": 0.61}, {"object": None, "probability": 0.3}]
    assert evil.to_dict()["mentions"][0]["visual_evidence"] == objects


def test_figures_show_themselves(real):
    pytest.importorskip("matplotlib")
    figure = real.plot(real.mentions[0].tokens[0])
    assert Image.open(io.BytesIO(figure._repr_png_())).width == 960


def test_the_pages_data_arrives_as_it_was(evil):
    data = payload_of(evil.to_html())
    assert data["text"] == EVIL
    assert [token["text"] for token in data["tokens"]] == list(evil.answer.tokens)
    mention = data["mentions"][data["tokens"][data["start"]]["mention"]]
    assert mention["object"] == "<u>dog</u>"
    assert mention["top"][0] == ["<b>nll</b>", 2.0]


def decoded(text, kind="<u2"):
    return np.frombuffer(base64.b64decode(text), kind)


def test_raw_attention_that_fits_the_page(real):
    attention, (count, layers, heads) = real.attention, real.attention.image_mass.shape
    whole = payload_of(real.to_html())["attention"]
    assert whole["kept"] == list(range(count))
    single = decoded(whole["single"]["data"], "u1").reshape(count, layers, heads, 64) / 255
    single = single * decoded(whole["single"]["peaks"], "<f4").reshape(count, layers, heads, 1)
    assert np.abs(single - attention.heads.numpy()).max() <= float(attention.heads.max()) / 510 + 1e-6
    assert np.allclose(decoded(whole["mass"]) / 32767, attention.image_mass.flatten(), atol=2e-5)
    assert np.allclose(decoded(whole["matrix"]) / 32767, attention.matrix.flatten(), atol=2e-5)
    means, token = 2 * count * 3 * 64, layers * heads * 64
    few = attention_payload(real, 2 * means + token)  # half of it are two of the four layers and their mean
    assert few["chosen"] == [0, layers - 1]
    named = sorted(token for mention in real.mentions for token in mention.tokens)
    kept = (means + token) // token
    assert len(named) < kept < count
    assert few["kept"] == sorted(
        [*named, *[token for token in range(count) if token not in named][: kept - len(named)]]
    )
    mean = decoded(few["maps"]["mean"]["peaks"], "<f4").reshape(count, 3)
    expected = np.stack([*attention.mean[:, [0, layers - 1]].unbind(1), attention.mean.mean(1)], 1).max(-1)
    assert np.allclose(mean, expected)
    assert attention_payload(real, 0)["kept"] == []


def test_attention_to_queries_is_a_row(real):
    row = attention_payload(replace(real, token_regions=None), 2**20)
    assert row["box"] is None
    assert row["shape"] == [1, 64]


@pytest.mark.parametrize("show", [Diagnosis.to_html, Diagnosis._repr_html_], ids=["page", "notebook"])
def test_nothing_is_fetched(real, show):
    page = show(real)
    seen = Seen(page)
    for tag, attributes in seen.tags:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, name)
        assert "url(" not in (attributes.get("style") or "")
    assert "@import" not in page
    assert "http://" not in page
    assert "https://" not in page
    images = [attributes["src"] for tag, attributes in seen.tags if tag == "img"]
    if show is Diagnosis.to_html:
        images.append(payload_of(page)["photo"])
    assert images
    for address in images:
        Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).load()


def test_the_pages_maps_are_the_relevancy(real):
    data = payload_of(real.to_html())
    image = real.relevancy.image
    count, layers = image.shape[:2]
    values = np.frombuffer(base64.b64decode(data["maps"]["raw"]["data"]), np.uint8).reshape(count, layers, -1)
    expected = (image / image.amax(-1, keepdim=True)).numpy()
    assert np.abs(values / 255 - expected).max() <= 0.5 / 255 + 1e-6
    assert data["maps"]["raw"]["box"] == pytest.approx([0, 0, 96, 96], abs=0.2)
    assert np.array(data["tokens"][9]["answer"]).shape == (layers, 9)
    assert np.allclose(np.array(data["tokens"][9]["shares"]).sum(1), 10_000, atol=2)
