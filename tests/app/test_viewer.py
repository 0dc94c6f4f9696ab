"""The viewer on the static page of a diagnosis, in a real browser: what a click and a slider show."""

import base64
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

import stethoscope
from stethoscope import testbed
from stethoscope.core.html import asset
from stethoscope.core.text import percent
from stethoscope.core.types import Generation
from stethoscope.mitigation.answers import Drop

# keeps what is painted of heat maps
WATCH = """window.painted = [];
const put = CanvasRenderingContext2D.prototype.putImageData;
CanvasRenderingContext2D.prototype.putImageData = function (image, ...more) {
  window.painted.push([...image.data]);
  return put.call(this, image, ...more);
};"""
MOVE = """([id, value]) => {
  const slider = document.querySelector(`[data-id="${id}"]`);
  slider.value = value;
  slider.dispatchEvent(new Event("input", { bubbles: true }));
}"""


@pytest.fixture
def diagnosis(adapter):
    answer = "The image shows a kitchen with a knife and a fork. The knife is on the left side."
    return stethoscope.diagnose(adapter, testbed.scenes(2)[1].image(), "Please describe this image.", answer=answer)


@pytest.fixture
def page(browser, diagnosis, tmp_path):
    """Open the page; at the end no script may have failed, and nothing may have been fetched."""
    file = tmp_path / "report.html"
    file.write_text(diagnosis.to_html(), "utf-8")
    page = browser.new_page()
    failed, fetched = [], []
    page.on("pageerror", lambda error: failed.append(str(error)))
    page.on("console", lambda message: failed.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: fetched.append(request.url))
    page.add_init_script(WATCH)
    page.goto(file.as_uri())
    yield page
    assert failed == []
    assert [url for url in fetched if not url.startswith("data:")] == [file.as_uri()]
    page.close()


def redrawn(page):
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def look(page):
    """Read the page after its next redraw."""
    redrawn(page)
    shown = {
        name: page.locator(f"[data-id={name}]").inner_text()
        for name in ("facts", "question", "before", "layer-text", "shares-scope")
    }
    shown["evolution"] = page.locator("[data-id=evolution] tr").count()
    shown["chosen"] = [int(token.get_attribute("data-token")) for token in page.locator(".st-t.st-chosen").all()]
    shown["map"] = np.array(page.evaluate("window.painted.at(-1)")).reshape(64, 4)
    return shown


def test_the_viewer_shows_the_chosen_token_and_layer(page, diagnosis):
    knife, fork = (mention.tokens[0] for mention in diagnosis.mentions[:2])
    first = look(page)
    assert first["chosen"] == [knife]  # nothing is warned of: the first mention
    assert "knife" in first["facts"]
    assert first["shares-scope"] == ", gradient of scope row"
    assert page.locator("[data-id=scope-line]").is_hidden()  # no server that could change it
    page.locator(f".st-t[data-token='{fork}']").click()
    clicked = look(page)
    assert clicked["chosen"] == [fork]
    assert "fork" in clicked["facts"]
    assert "Please" in clicked["question"]
    assert "knife" in clicked["before"]
    assert clicked["evolution"] == 4
    image = diagnosis.relevancy.image[fork, 3].numpy()
    assert np.abs(clicked["map"][:, 3] - 0.55 * 255 * image / image.max()).max() < 8
    page.evaluate(MOVE, ["layer", 0])
    lower = look(page)
    assert (clicked["layer-text"], lower["layer-text"]) == ("4 of 4", "1 of 4")
    assert (clicked["map"] != lower["map"]).any()
    page.evaluate(MOVE, ["opacity", 0])
    assert not look(page)["map"][:, 3].any()
    page.locator(f".st-t[data-token='{fork}']").focus()
    page.keyboard.press("ArrowRight")
    assert look(page)["chosen"] == [fork + 1]


def test_raw_attention_by_layer_and_head(page, diagnosis):
    look(page)
    knife, attention = diagnosis.mentions[0].tokens[0], diagnosis.attention
    for layer, head, values in (
        ("mean", "mean", attention.mean[knife].mean(0)),
        ("1", "largest", attention.largest[knife, 1]),
        ("3", "2", attention.heads[knife, 3, 2]),
    ):
        page.locator("[data-id=attention-layer]").select_option(layer)
        page.locator("[data-id=attention-head]").select_option(head)
        look(page)
        painted = np.array(page.evaluate("window.painted.at(-2)")).reshape(64, 4)[:, 3]  # relevancy is the last
        assert np.abs(painted - 0.55 * 255 * (values / values.max()).numpy()).max() < 2
        mass = "for every" if head == "largest" else f"{percent(float(values.sum()))} of the attention"
        assert mass in page.locator("[data-id=attention-note]").inner_text()
        assert page.locator("[data-id=attention-most]").inner_text().startswith(percent(float(values.max())))
    page.locator("[data-id=heads]").focus()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowLeft")
    look(page)
    chosen = [page.locator(f"[data-id=attention-{name}]").input_value() for name in ("layer", "head")]
    assert chosen == ["2", "1"]
    share = percent(float(attention.image_mass[knife, 2, 1]))
    assert page.locator("[data-id=heads-value]").inner_text() == (
        f"layer 3, head 2: {share} of its attention falls on the picture"
    )
    page.evaluate("window.painted = []")
    page.locator("[data-id=heads-show]").select_option("map")
    look(page)
    painted = [np.array(cells).reshape(64, 4) for cells in page.evaluate("window.painted")]
    assert sum((cells[:, 3] == 255).all() for cells in painted) == attention.image_mass[knife].numel()  # drawn once


def test_where_the_detector_sees_the_object(browser, diagnosis, tmp_path):
    seen = {"knife": np.arange(64) / 70, "fork": np.eye(8).ravel() / 9}
    file = tmp_path / "seen.html"
    file.write_text(replace(diagnosis, seen=seen).to_html(), "utf-8")
    page, failed = browser.new_page(), []
    page.on("pageerror", lambda error: failed.append(str(error)))
    page.add_init_script(WATCH)
    page.goto(file.as_uri())
    page.locator("[data-id=source]").select_option("seen")
    for name, token in (("knife", diagnosis.mentions[0].tokens[0]), ("fork", diagnosis.mentions[1].tokens[0])):
        page.locator(f".st-t[data-token='{token}']").click()
        painted, values = look(page)["map"][:, 3], seen[name]
        assert np.abs(painted - 0.55 * 255 * values).max() < 2  # not scaled to its own largest value
        note = page.locator("[data-id=seen-note]").inner_text()
        assert f"looks for “{name}” among the image tokens" in note
        assert f"makes it {percent(values.max())} probable" in note
        assert page.locator("[data-id=seen-title]").inner_text() == f"Where the detector sees “{name}”"
    assert page.locator("[data-id=map-title]").is_hidden()
    page.locator(".st-t").first.click()
    assert not look(page)["map"][:, 3].any()
    assert "names no object that the detector looks for" in page.locator("[data-id=seen-note]").inner_text()
    page.locator("[data-id=picture]").click()  # patches are chosen as before
    redrawn(page)
    assert page.locator("[data-id=patch-title]").inner_text().startswith("Tokens to which this patch")
    page.locator("[data-id=source]").select_option("raw")
    assert look(page)["map"][:, 3].any()
    assert page.locator("[data-id=seen-title]").is_hidden()
    assert failed == []
    page.close()


def test_mean_attention_as_a_matrix(page, diagnosis):
    look(page)
    page.locator("[data-id=matrix-details] summary").click()
    page.locator("[data-id=matrix][aria-label]").focus()  # it is drawn
    tokens = [token.strip() for token in diagnosis.answer.tokens]
    names = ["picture", *(f"“{token}”" for token in [*diagnosis.question_tokens, *tokens])]
    page.keyboard.press("ArrowRight")  # the first cell of the chosen token's row
    row, column = diagnosis.mentions[0].tokens[0], 0
    for key, count in (("ArrowDown", 2), ("ArrowRight", len(diagnosis.question_tokens) + 3), ("ArrowLeft", 1)):
        for _ in range(count):
            page.keyboard.press(key)
        row += count if key == "ArrowDown" else 0
        column += {"ArrowRight": count, "ArrowLeft": -count}.get(key, 0)
        look(page)
        share = percent(float(diagnosis.attention.matrix[row, column]))
        shown = page.locator("[data-id=matrix-value]").inner_text()
        assert shown == f"“{tokens[row]}” to {names[column]}: {share}"
    page.keyboard.press("Enter")
    assert look(page)["chosen"] == [row]


def patch_rows(page, kind):
    return [row.split("\n") for row in page.locator(f"[data-id=patch{kind}-tokens] .st-bar").all_inner_texts()]


def test_patches_lead_to_the_words_that_were_written_from_them(page, diagnosis):
    look(page)
    page.locator("[data-id=picture]").focus()  # and scroll to it
    box = page.locator("[data-id=picture]").bounding_box()
    side = min(box["width"], box["height"])
    left, top = box["x"] + (box["width"] - side) / 2, box["y"] + (box["height"] - side) / 2

    def middle(row, column):
        return left + (column + 0.5) / 8 * side, top + (row + 0.5) / 8 * side

    def drag(start, end):
        page.mouse.move(*middle(*start))
        page.mouse.down()
        page.mouse.move(*middle(*end), steps=3)
        page.mouse.up()

    def with_shift(act):
        page.keyboard.down("Shift")
        act()
        page.keyboard.up("Shift")

    block = [row * 8 + column for row in (4, 5, 6) for column in (0, 1)]
    for act, patches in (
        (lambda: page.mouse.click(*middle(2, 5)), [21]),
        (lambda: page.keyboard.press("ArrowDown"), [29]),
        (lambda: page.keyboard.press("Shift+ArrowRight"), [29, 30]),
        (lambda: drag((6, 1), (4, 0)), block),
        (lambda: with_shift(lambda: page.mouse.click(*middle(2, 5))), [*block, 21]),
        (lambda: with_shift(lambda: page.mouse.click(*middle(5, 0))), [*(set(block) - {40}), 21]),
    ):
        act()
        look(page)
        relevant, attended = (patch_rows(page, kind) for kind in ("", "-attention"))
        values = diagnosis.relevancy.image[:, 3, patches].sum(-1).numpy()
        step = float(diagnosis.relevancy.image[:, 3].max()) / 255 * len(patches)  # of the values on the page
        assert np.allclose([float(row[-1]) for row in relevant], np.sort(values)[::-1][:5], rtol=0.06, atol=step)
        assert relevant[0][0] == diagnosis.answer.tokens[int(values.argmax())].strip()
        values = diagnosis.attention.mean.mean(1)[:, patches].sum(-1).numpy()
        shown = [float(row[-1].rstrip("\xa0%<")) / 100 for row in attended]
        assert np.allclose(shown, np.sort(values)[::-1][:5], rtol=0.06, atol=1e-3)
        assert f"{len(patches)} patches" in page.locator("[data-id=patch-title]").inner_text() or len(patches) == 1
    page.locator("[data-id=colour]").select_option("attention")
    look(page)
    colours = [
        float(re.search(r"([\d.]+)%", colour)[1]) / 45
        for colour in page.locator(".st-t").evaluate_all("all => all.map((one) => one.style.background)")
    ]
    assert np.allclose(colours, values / values.max(), atol=0.03)
    page.locator("[data-id=picture]").focus()
    page.keyboard.press("Escape")
    look(page)
    assert page.locator("[data-id=patch]").is_hidden()
    assert page.locator("[data-id=patch-attention]").is_hidden()


DATA = re.compile(r'(<script type="application/json" id="data">)(.*?)(</script>)', re.S)


@pytest.fixture
def shown(browser, diagnosis, tmp_path):
    """Return a function that opens the page with a changed payload; at the end no script may have failed."""
    page, failed = browser.new_page(), []
    page.on("pageerror", lambda error: failed.append(str(error)))

    def show(change):
        html = diagnosis.to_html()
        data = json.loads(DATA.search(html)[2])
        change(data)
        file = tmp_path / "changed.html"
        file.write_text(DATA.sub(lambda match: match[1] + json.dumps(data) + match[3], html), "utf-8")
        page.goto(file.as_uri())
        page.wait_for_selector(".st-t.st-chosen, .st-t >> nth=0")
        return page

    yield show
    assert failed == []
    page.close()


def test_a_letter_that_is_two_in_javascript_moves_no_box(shown):
    def begin_with_a_cat(data):
        data["text"] = "\U0001f431" + data["text"]
        for token in data["tokens"]:
            token["span"] = [position + 1 for position in token["span"]]

    page = shown(begin_with_a_cat)
    assert page.locator(".st-t").all_inner_texts()[:3] == ["The", "image", "shows"]
    assert page.locator("[data-id=answer]").inner_text().startswith("\U0001f431The image")
    assert page.locator(".st-t").nth(1).get_attribute("aria-label") == "image"


def test_warnings_are_those_of_the_threshold_and_not_of_its_percentage(shown):
    def judge(data):
        data["threshold"] = 0.3449
        for mention, probability in zip(data["mentions"], (0.34491, 0.34489, 0.1), strict=True):
            mention["probability"] = probability

    page = shown(judge)
    assert page.locator("[data-id=outcomes]").inner_text().startswith("Warned of 1 of 3 mentions.")
    assert page.locator("[data-id=warn-text]").inner_text() == "34\xa0%"
    page.evaluate(MOVE, ["warn", 20])
    redrawn(page)
    assert page.locator("[data-id=outcomes]").inner_text().startswith("Warned of 2 of 3 mentions.")


def test_a_token_without_a_text_of_its_own_leaves_the_answer_in_reach_of_the_keyboard(shown):
    def empty(data):
        data["start"] = 2
        data["tokens"][2]["span"] = [data["tokens"][2]["span"][0]] * 2

    page = shown(empty)
    assert page.locator(".st-t[tabindex='0']").all_inner_texts() == ["image"]


def test_the_matrix_of_a_long_answer_and_a_picture_that_is_a_line(shown):
    def lengthen(data):
        again = 512 // len(data["tokens"]) + 1
        data["tokens"] = (data["tokens"] * again)[:512]
        data["layers"], data["maps"], own = (
            [],
            {},
            data["attention"],
        )  # what is shown of one token is not asked about here
        own["matrix"] = base64.b64encode(np.full((512, 514 + len(data["question"])), 9, "<u2").tobytes()).decode()
        data["size"] = [20_000, 10]

    page = shown(lengthen)
    page.locator("[data-id=matrix-details] summary").click()
    redrawn(page)
    assert "512 answer tokens" in page.locator("[data-id=matrix]").get_attribute("aria-label")
    assert page.evaluate("document.querySelector('[data-id=picture]').height") == 1


def test_the_tip_goes_with_escape(page):
    page.locator(".st-t").nth(3).hover()
    assert page.locator("[data-id=tip]").is_visible()
    page.keyboard.press("Escape")
    assert page.locator("[data-id=tip]").is_hidden()


def test_a_photograph_outside_of_what_the_detector_knows(browser, adapter, tmp_path):
    photograph = Image.fromarray(load_sample_image("china.jpg"))
    diagnosis = stethoscope.diagnose(
        adapter, photograph, "Please describe this image in detail.", detector=testbed.DETECTOR_DIR
    )
    file = tmp_path / "report.html"
    file.write_text(diagnosis.to_html(), "utf-8")
    page = browser.new_page()
    page.goto(file.as_uri())
    assert diagnosis.shift in page.locator("[data-id=notes] .st-error").inner_text()
    assert "score of the detector, not calibrated for this picture" in page.locator("[data-id=key]").inner_text()
    assert page.locator("[data-id=mentions-head] th").all_inner_texts()[1] == "score"
    body = page.locator("main").inner_text()
    assert body.count("calibrated") == body.count("not calibrated") + body.count("calibrated on") + body.count(
        "no percentage here is calibrated"
    )
    assert page.locator("[data-id=margin]").is_visible()  # the model sees the middle of it
    page.close()


def test_before_and_after_a_mitigation(browser, adapter, tmp_path):
    scene, detector = testbed.scenes(2)[1], testbed.DETECTOR_DIR
    generation = Generation(max_new_tokens=128, mitigation=Drop())
    diagnosis = stethoscope.diagnose(
        adapter,
        scene.image(),
        "Please describe this image.",
        detector=detector,
        generation=generation,
        truth=scene.visible,
    )
    file = tmp_path / "report.html"
    file.write_text(diagnosis.to_html(), "utf-8")
    page = browser.new_page()
    page.goto(file.as_uri())
    removed = " ".join(page.locator("[data-id=before-edit] del").all_inner_texts())
    rows = page.locator("[data-id=reasons] tr").all_inner_texts()
    mentions = [mention for mention in diagnosis.edit["mentions"] if mention["probability"] >= diagnosis.threshold]
    assert len(rows) == len(mentions) > 0
    for row, mention in zip(rows, mentions, strict=True):
        assert mention["object"] in removed
        assert row.split("\t")[:2] == [mention["object"], percent(mention["probability"])]
        assert row.endswith("hallucinated\tremoved")
    assert page.locator("[data-id=after-edit]").inner_text() == diagnosis.answer.text
    shares = [0, 0.0001, 0.0005, 0.048, 0.0994, 0.0995, 0.5, 1]  # one way to write them, in the page and in Python
    script = asset("diagnosis/parts.js").replace("const $", "var $")
    assert page.evaluate(f"shares => {{ const element = null; {script}; return shares.map(percent); }}", shares) == [
        percent(share) for share in shares
    ]
    page.close()


def test_the_answer_is_there_without_the_script(browser, diagnosis, tmp_path):
    file = tmp_path / "report.html"
    file.write_text(diagnosis.to_html(), "utf-8")
    page = browser.new_context(java_script_enabled=False).new_page()
    page.goto(file.as_uri())
    assert page.locator("[data-id=answer]").inner_text().strip() == diagnosis.answer.text.strip()
    assert page.locator("h2:visible >> nth=0").inner_text() == diagnosis.question
    page.close()
