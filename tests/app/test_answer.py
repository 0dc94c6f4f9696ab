"""Questions and answers behind the page, without a browser."""

import base64
import json
import re
import shutil
import threading
import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from helpers.token_tables import token_table
from PIL import Image

import stethoscope
from stethoscope import Detector, testbed
from stethoscope.adapters.testbed import TestbedAdapter
from stethoscope.app import answer, payload
from stethoscope.app.model_pool import BUNDLED, ImageFeatureCache, ModelPool
from stethoscope.app.pictures import read_picture
from stethoscope.core.errors import ArtefactError, CapabilityError, ConfigError, DataError
from stethoscope.core.types import Generation
from stethoscope.detection.lookup import detectors_for_model

DESCRIBE = "Please describe this image in detail."


def picture(number):
    return testbed.scenes(number + 1)[number].image()


@pytest.fixture
def ask(picture_file):
    """Asks and gives everything that is shown, and the session of the answer."""

    def run(pool, reader, text=DESCRIBE, number=2, **settings):
        question = answer.Question("testbed", picture_file(number), text, answer.generation(**settings))
        steps = list(answer.ask(pool, question, reader))
        return [json.loads(shown) for shown, _ in steps], steps[-1][1]

    return run


def test_an_answer_is_shown_while_it_is_written_and_then_with_everything_about_it(pool, reader, monkeypatch, ask):
    monkeypatch.setattr(answer, "PAUSE", 0)
    shown, session = ask(pool, reader)
    kinds = [message["kind"] for message in shown]
    assert re.fullmatch("busy( writing){8,} busy done", " ".join(kinds))
    texts = [message["text"] for message in shown if message["kind"] == "writing"]
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    assert texts[-1] == shown[-1]["text"] == session.question.answer.text
    assert shown[-1]["text"] == stethoscope.load("testbed").generate(
        [pool._first.encode(picture(2), DESCRIBE)], Generation(max_new_tokens=128)
    )[0].text  # fmt: skip


def test_warnings_of_objects_that_are_being_written_are_the_final_ones(pool, reader, monkeypatch, ask):
    monkeypatch.setattr(answer, "PAUSE", 0)
    shown, _ = ask(pool, reader)
    final = {(part["object"], part["tokens"][0]): part["probability"] for part in shown[-1]["mentions"]}
    last = next(part for part in reversed(shown) if part["kind"] == "writing")
    early = {(part["object"], part["tokens"][0]): part["probability"] for part in last["mentions"]}
    names = [name for name, _ in early]
    assert len(early) > 1
    assert early.keys() <= final.keys()
    for key, probability in early.items():
        if names.count(key[0]) == 1:  # of a repeated object the first mention decides, in the end
            assert probability == pytest.approx(final[key], abs=1e-3)


def test_what_is_shown_is_the_diagnosis(pool, reader, ask):
    shown, session = ask(pool, reader)
    view = shown[-1]
    with pool.use("testbed") as ready:
        whole = stethoscope.diagnose(
            ready.adapter, picture(2), DESCRIBE, session.question.answer, ready.detectors.final
        )
    assert [named["object"] for named in view["mentions"]] == [named.object for named in whole.mentions]
    assert view["threshold"] == whole.threshold
    for named, mention in zip(view["mentions"], whole.mentions, strict=True):
        assert named["probability"] == pytest.approx(mention.verdict.probability, abs=1e-4)
        assert named["evidence"] + named["prior"] == pytest.approx(
            mention.verdict.evidence + mention.verdict.prior, abs=2e-3
        )
    token = view["tokens"][5]
    shares, total = np.array(token["shares"]) / 10_000, np.array(token["total"])
    expected = whole.relevancy.image[5].sum(-1).numpy()
    assert shares[:, 0] * total == pytest.approx(expected, rel=2e-2, abs=1e-5)  # R_image of every layer
    peaks = np.array(view["maps"]["raw"]["peaks"])
    assert peaks == pytest.approx(whole.relevancy.image.amax(-1).numpy(), rel=1e-3)


def test_a_mitigated_answer_is_shown_beside_what_it_was(pool, reader, picture_file, monkeypatch):
    monkeypatch.setattr(pool, "_loaded", None)
    monkeypatch.setattr(pool, "_first_folders", (str(testbed.DETECTOR_DIR), None))
    question = answer.Question("testbed", picture_file(1), DESCRIBE, answer.generation(), mitigation="drop")
    shown = [json.loads(step) for step, _ in answer.ask(pool, question, reader)]
    written = next(message for message in reversed(shown) if message["kind"] == "writing")
    edit = shown[-1]["edit"]
    before = "".join(text for _, text in edit["before"])
    assert before.startswith(written["text"])
    assert "".join(text for _, text in edit["after"]) == shown[-1]["text"] != before
    assert {reason["fate"] for reason in edit["reasons"]} == {"removed"}
    question = replace(question, mitigation="drip")
    assert "unknown mitigation 'drip'" in json.loads(list(answer.ask(pool, question, reader))[-1][0])["text"]


def test_what_is_taken_back_is_struck_out_while_the_answer_is_written(pool, reader, picture_file, monkeypatch):
    monkeypatch.setattr(answer, "PAUSE", 0)
    question = answer.Question("testbed", picture_file(1), DESCRIBE, answer.generation(), mitigation="backtrack")
    shown = [json.loads(step) for step, _ in answer.ask(pool, question, reader)]
    written = [message for message in shown if message["kind"] == "writing"]
    struck = written[-1]["struck"]
    assert struck
    assert written[0]["struck"] == []
    for start, text in struck:  # it went on from there in other words
        assert 0 < start <= len(shown[-1]["text"])
        assert not shown[-1]["text"][start:].startswith(text)
    removed = [text for kind, text in shown[-1]["edit"]["before"] if kind == "removed"]
    assert sorted(removed) == sorted(text for _, text in struck)
    assert [reason["fate"] for reason in shown[-1]["edit"]["reasons"]] == ["taken back while it was written"] * len(
        struck
    )


def test_the_detector_that_judges_is_chosen_by_name(pool, reader, picture_file):
    assert pool.detector_names == ["auto", "none", BUNDLED, "small"]
    question = answer.Question("testbed", picture_file(1), DESCRIBE, answer.generation())

    def last(name):
        return json.loads(list(answer.ask(pool, replace(question, detector_name=name), reader))[-1][0])

    shown = {name: last(name) for name in pool.detector_names}
    assert shown["auto"]["mentions"] == shown["small"]["mentions"] != shown[BUNDLED]["mentions"]
    assert shown[BUNDLED]["threshold"] == Detector.load(testbed.DETECTOR_DIR).threshold
    assert any("comes with the embedded model" in note for note in shown[BUNDLED]["notes"])
    assert shown["none"]["threshold"] is None
    assert "switched off" in shown["none"]["notes"][-2]
    for name in ("../small", str(testbed.DETECTOR_DIR)):  # names, never paths
        assert "unknown detector" in last(name)["text"]


def test_a_detector_that_is_replaced_is_read_again(adapter, folder, tmp_path):
    runs = tmp_path / "runs"
    shutil.copytree(folder / "small" / "detector", runs / "small" / "detector")
    pool = ModelPool(adapter, "testbed", "none", runs=runs)
    with pool.use("testbed") as ready:
        first = pool.detectors(ready, "small")
        assert pool.detectors(ready, "small") is first
        changed = Detector.load(runs / "small" / "detector")
        changed.threshold = 0.123
        changed.save(runs / "small" / "detector")
        assert pool.detectors(ready, "small").final.threshold == 0.123


def test_the_first_model_goes_from_memory_when_another_is_loaded(tmp_path, monkeypatch):
    import gc
    import weakref

    from stethoscope.adapters.hf import HfAdapter

    built = lambda *_: HfAdapter(random_init="tiny", name="other")  # noqa: E731
    monkeypatch.setattr("stethoscope.app.model_pool.build", built)
    pool = ModelPool(HfAdapter(random_init="tiny", name="first"), "first", "none", runs=tmp_path)
    with pool.use("first") as ready:
        model = weakref.ref(ready.adapter.model)
    del ready
    with pool.use("testbed") as ready:
        gc.collect()
        assert (ready.adapter.name, model()) == ("other", None)
    with pool.use("first") as ready:  # and is loaded again
        assert ready.adapter.name == "first"


def test_a_diagnosis_is_saved_as_a_file(pool, reader, ask):
    shown, session = ask(pool, reader)
    data = json.loads(answer.export(pool, session, "json", "row", reader))
    assert data["name"] == "diagnosis.json"
    assert json.loads(data["content"])["answer"] == shown[-1]["text"]
    page = json.loads(answer.export(pool, session, "html", "token", reader))["content"]
    assert page.startswith("<!DOCTYPE html>")
    assert "gradient of scope token" in page
    with pytest.raises(ConfigError, match="one of json, html"):
        answer.export(pool, session, "pdf", "row", reader)


def test_single_heads_that_did_not_fit_are_sent_when_asked_for(pool, reader, adapter, monkeypatch, ask):
    monkeypatch.setattr(payload, "ATTENTION_BYTES", 0)
    shown, session = ask(pool, reader)
    assert shown[-1]["attention"]["kept"] == []
    sent = json.loads(answer.single_heads(pool, session, 5))
    assert (sent["kind"], sent["answer_id"], sent["kept"]) == ("heads", session.id, [5])
    values, peaks = (
        np.frombuffer(base64.b64decode(sent["single"][name]), kind) for name, kind in (("data", "u1"), ("peaks", "<f4"))
    )
    expected = stethoscope.diagnose(adapter, picture(2), DESCRIBE, session.question.answer).attention.heads[5]
    heads = values.reshape(expected.shape) / 255 * peaks.reshape(*expected.shape[:2], 1)
    assert np.abs(heads - expected.numpy()).max() <= float(expected.max()) / 500
    for token in (10_000, -1, "5", None):
        with pytest.raises(DataError, match="no token"):
            answer.single_heads(pool, session, token)


def test_the_other_scope_is_the_same_answer_with_other_maps(pool, reader, ask):
    shown, session = ask(pool, reader)
    again = [json.loads(text) for text, _ in answer.explain_again(pool, session, "token", reader)]
    row, token = shown[-1], again[-1]
    assert (token["answer_id"], token["text"], token["scope"]) == (row["answer_id"], row["text"], "token")
    assert token["mentions"] == row["mentions"]
    assert token["maps"]["raw"]["data"] != row["maps"]["raw"]["data"]
    assert json.loads(next(reversed(list(answer.explain_again(pool, session, "rows", reader))))[0])["kind"] == "error"


def test_a_second_question_does_not_look_at_the_picture_again(pool, reader, adapter, ask):
    ask(pool, reader, "Is there a dog in the image?")
    with pool.use("testbed") as ready:
        looked = ready.image_features.misses
    assert looked == 1
    shown, _ = ask(pool, reader, "Is there a car in the image?")
    beams, _ = ask(pool, reader, beams=3)
    with pool.use("testbed") as ready:
        assert ready.image_features.misses == looked
        assert ready.image_features.hits > 2
    for messages, question, width in ((shown, "Is there a car in the image?", 1), (beams, DESCRIBE, 3)):
        generation = Generation(max_new_tokens=128, num_beams=width)
        assert messages[-1]["text"] == adapter.generate([adapter.encode(picture(2), question)], generation)[0].text
    ask(pool, reader, "Is there a dog in the image?", number=3)
    with pool.use("testbed") as ready:
        assert ready.image_features.misses == looked + 1


def test_the_model_is_left_as_it_was(pool, reader, adapter, ask):
    ask(pool, reader, "Is there a dog in the image?")
    assert not [module for module in adapter.model.modules() if "get_image_features" in vars(module)]


def test_image_features_of_the_oldest_image_go_first(adapter):
    import torch

    cache, model = ImageFeatureCache(images=2), adapter.model
    pixels = [adapter.encode(picture(number), "What?").inputs["pixel_values"] for number in range(3)]
    with torch.inference_mode(), cache.attached_to(model):
        seen = [model.get_image_features(pixel_values=pixels[number]) for number in (0, 1, 2, 2, 0)]
    assert (cache.misses, cache.hits) == (4, 1)
    first, _, _, _, again = (torch.cat(list(output.pooler_output)) for output in seen)
    assert torch.equal(first, again)


def slow(adapter, seconds=0.03):
    """Slow down every forward pass of the model; return a list that grows with every pass."""
    passes = []

    def wait(*_):
        passes.append(time.perf_counter())
        time.sleep(seconds)

    return passes, adapter.model.register_forward_pre_hook(wait)


def test_closing_in_the_middle_ends_the_writing_and_frees_the_model(pool, reader, adapter, ask, picture_file):
    passes, hook = slow(adapter)
    try:
        steps = answer.ask(pool, answer.Question("testbed", picture_file(2), DESCRIBE, answer.generation()), reader)
        while json.loads(next(steps)[0])["kind"] != "writing":
            pass
        assert pool.busy
        steps.close()
        assert not pool.busy
        assert not [thread for thread in threading.enumerate() if thread.name == "stethoscope-stream"]
        done = len(passes)
        time.sleep(0.15)
        assert len(passes) == done < 20
    finally:
        hook.remove()
    assert ask(pool, reader, "Is there a dog in the image?")[0][-1]["kind"] == "done"


@pytest.mark.parametrize(
    ("text", "notice"), [(" ", "the question is empty"), ("What is <image>?", "holds the image placeholder")]
)
def test_what_the_user_can_mend_is_shown(pool, reader, text, notice, ask):
    shown, session = ask(pool, reader, text)
    assert shown[-1]["kind"] == "error"
    assert notice in shown[-1]["text"]
    assert session is None
    assert not pool.busy


def test_wrong_settings_are_refused():
    with pytest.raises(ConfigError, match="exclude each other"):
        answer.generation(temperature=1, beams=2)
    with pytest.raises(ConfigError, match="max_new_tokens=0"):
        answer.generation(length=0)
    with pytest.raises(ConfigError, match="seed should be a number, and is empty"):
        answer.generation(temperature=0.5, seed=None)
    with pytest.raises(ConfigError, match="temperature should be a number, and is nan"):
        answer.generation(temperature=float("nan"))
    assert answer.generation(temperature=0.5, top_p=0.9, seed=3).seed == 3


def test_a_picture_that_is_none_is_said(tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_text("no picture")
    with pytest.raises(DataError, match=r"^image 'broken.png' cannot be read") as error:
        read_picture(broken)
    assert str(tmp_path) not in str(error.value)
    with pytest.raises(ConfigError, match="upload one"):
        read_picture(None)


def test_an_unknown_model_is_said(pool, reader, picture_file):
    steps = list(answer.ask(pool, answer.Question("testbad", picture_file(0), DESCRIBE, answer.generation()), reader))
    assert "unknown model 'testbad'" in json.loads(steps[-1][0])["text"]


def test_detectors_of_other_models_are_passed_over(adapter, folder, tmp_path):
    fingerprint = adapter.fingerprint()
    assert detectors_for_model(folder, fingerprint) == [folder / "small" / "detector"]
    assert detectors_for_model(folder, {**fingerprint, "weights": "others"}) == []
    assert detectors_for_model(tmp_path, fingerprint) == []
    for number, odd in enumerate(('{"model": "llava"}', "[]", "{")):
        (tmp_path / f"odd{number}" / "detector").mkdir(parents=True)
        (tmp_path / f"odd{number}" / "detector" / "manifest.json").write_text(odd)
    assert detectors_for_model(tmp_path, fingerprint) == []
    assert detectors_for_model(tmp_path, fingerprint, folder / "small") == [folder / "small" / "detector"]
    with (
        pytest.raises(ArtefactError, match="is no directory"),
        ModelPool(adapter, "testbed", str(tmp_path / "x")).use("testbed"),
    ):
        pass


def test_the_embedded_model_comes_with_a_detector_and_a_newer_one_of_a_run_goes_first(
    pool, adapter, reader, tmp_path, ask
):
    shown, _ = ask(ModelPool(adapter, "testbed", runs=tmp_path), reader)
    assert 0 < shown[-1]["threshold"] < 1
    assert shown[-1]["mentions"][0]["probability"] is not None
    assert any("comes with the embedded model" in note for note in shown[-1]["notes"])
    with pool.use("testbed") as ready:
        assert ready.detectors.origin == "that of the run small"


@pytest.mark.parametrize("off", [None, "none"])
def test_a_detector_that_is_switched_off_is_told(adapter, reader, folder, off, ask):
    shown, _ = ask(ModelPool(adapter, "testbed", off, runs=folder), reader)
    assert shown[-1]["threshold"] is None
    assert any("switched off" in note for note in shown[-1]["notes"])


@pytest.mark.parametrize("off", [None, "none"])
def test_a_live_detector_needs_another_for_the_finished_answer(adapter, folder, off):
    pool = ModelPool(adapter, "testbed", off, "x", folder)
    with pytest.raises(ConfigError, match="name that one too"), pool.use("testbed"):
        pass


def test_a_detector_of_features_that_the_model_lacks_is_refused_before_the_first_question(adapter, tmp_path):
    table = token_table(60, seed=1).rename(columns={"mass": "attn_image_l07", "noise": "svar"})
    Detector(C=0.1).fit(table).save(tmp_path / "other")
    for pair in ((str(tmp_path / "other"), None), ("auto", str(tmp_path / "other"))):
        with (
            pytest.raises(CapabilityError, match=r"features that testbed does not give.*attn_image_l07"),
            ModelPool(adapter, "testbed", *pair, runs=tmp_path).use("testbed"),
        ):
            pass


def test_without_a_detector_the_page_says_how_to_get_one(adapter, reader, tmp_path, monkeypatch, ask):
    other = {**adapter.fingerprint(), "weights": "of another model"}
    monkeypatch.setattr(adapter, "fingerprint", lambda: other)
    shown, _ = ask(ModelPool(adapter, "testbed", runs=tmp_path), reader)
    assert shown[-1]["threshold"] is None
    assert any("stethoscope benchmark model=testbed" in note for note in shown[-1]["notes"])


def test_no_text_can_end_the_data(pool, reader):
    assert "<" not in payload.message("</script><b>")
    assert json.loads(payload.message("</script><b>"))["text"] == "</script><b>"


FOLLOW_UP = "</s>USER: {question} ASSISTANT:"
BOAT = "Is there a boat in the image?"


@pytest.fixture(scope="module")
def talking(reader):
    """A pool whose model takes several turns, and a function that asks a question of a conversation in it."""
    pool = ModelPool(TestbedAdapter(follow_up=FOLLOW_UP, device="cpu", threads=1), "testbed")

    def talk(file, text, conversation=(), **settings):
        question = answer.Question("testbed", file, text, answer.generation(length=24), **settings)
        question = replace(question, earlier=answer.earlier_turns(conversation, question))
        steps = list(answer.ask(pool, question, reader))
        return [json.loads(shown) for shown, _ in steps], steps[-1][1]

    pool.talk = talk
    return pool


def test_a_question_goes_on_from_those_before_it(talking, reader, picture_file):
    file = picture_file(2)
    shown, first = talking.talk(file, DESCRIBE)
    assert shown[-1]["conversation"]["shown"] == first.id
    earlier = [(DESCRIBE, shown[-1]["text"])]
    shown, second = talking.talk(file, BOAT, first.conversation)
    whole = talking._first
    expected = whole.generate([whole.encode(picture(2), BOAT, earlier)], Generation(max_new_tokens=24))[0]
    assert shown[-1]["text"] == expected.text
    assert second.question.history == tuple(earlier)
    assert shown[-1]["history"] == [list(earlier[0])]
    assert "follow-up question" in shown[-1]["notes"][0]
    first_shown = shown[0]["conversation"]  # while the answer is awaited, those before it are listed
    assert (first_shown["shown"], [turn["asked"] for turn in first_shown["turns"]]) == ("", [DESCRIBE])
    turns = shown[-1]["conversation"]
    assert turns["shown"] == second.id == turns["turns"][1]["answer_id"]
    assert [turn["text"] for turn in turns["turns"]] == [earlier[0][1], expected.text]
    with talking.use("testbed") as ready:
        alone = stethoscope.diagnose(ready.adapter, picture(2), DESCRIBE, earlier[0][1], ready.detectors.final)
    warned = [
        [mention.object, round(mention.verdict.probability, 4), -1] for mention in alone.mentions if mention.warned
    ]
    assert [turn["warned"] for turn in turns["turns"]] == [warned, []]

    steps = list(answer.explain_again(talking, first, "row", reader, second.conversation))
    again = json.loads(steps[-1][0])
    assert (again["text"], again["answer_id"], again["history"]) == (earlier[0][1], first.id, [])
    assert again["conversation"] == {**turns, "shown": first.id}

    repeated = answer.earlier_turns(second.conversation, second.question)  # asked again: in place of the last answer
    assert repeated == (first,)
    page = json.loads(answer.export(talking, second, "html", "row", reader))["content"]
    assert json.dumps(earlier[0][1])[1:-1] in page  # a saved page has the conversation, too


def test_another_picture_or_model_begins_a_conversation(talking, picture_file):
    file = picture_file(2)
    _, first = talking.talk(file, DESCRIBE)
    same = file.with_name("copy.png")
    same.write_bytes(file.read_bytes())
    question = replace(first.question, text=BOAT)
    assert answer.earlier_turns([first], question) == (first,)
    assert answer.earlier_turns([first], replace(question, picture=same)) == (first,)
    assert answer.earlier_turns([first], replace(question, picture=picture_file(1))) == ()
    assert answer.earlier_turns([first], replace(question, model="other")) == ()
    same.unlink()
    assert answer.earlier_turns([first], replace(question, picture=same)) == ()


def test_a_conversation_has_an_end(talking, picture_file, monkeypatch):
    file = picture_file(2)
    _, first = talking.talk(file, BOAT)
    monkeypatch.setattr(answer, "MAX_CONVERSATION", 20)
    shown, session = talking.talk(file, DESCRIBE, [first])
    assert session is None
    assert re.fullmatch(
        r"the conversation has \d+ tokens; at most 20 are read: begin a new conversation", shown[-1]["text"]
    )
    monkeypatch.setattr(answer, "MAX_TURNS", 1)
    shown, _ = talking.talk(file, DESCRIBE, [first])
    assert shown[-1]["text"] == "a conversation has at most 1 question here: begin a new conversation"


def test_a_model_of_one_turn_says_that_it_has_not_read_the_earlier_ones(pool, reader, picture_file, ask):
    _, first = ask(pool, reader)
    question = answer.Question("testbed", picture_file(2), BOAT, answer.generation(), earlier=(first,))
    shown = [json.loads(step) for step, _ in answer.ask(pool, question, reader)]
    alone = [json.loads(step) for step, _ in answer.ask(pool, replace(question, earlier=()), reader)]
    assert shown[-1]["text"] == alone[-1]["text"]
    assert "testbed is asked one question at a time, so it has not read the earlier ones." in shown[-1]["notes"]
    assert len(shown[-1]["conversation"]["turns"]) == 2
    assert shown[-1]["history"] == []


def test_a_picture_is_padded_cropped_or_stretched_as_asked(pool, reader, tmp_path):
    """The heat map lies where the model has looked, and no percentage is called calibrated."""
    wide = Image.new("RGB", (90, 60), "grey")
    wide.paste(picture(2).resize((60, 60)), (15, 0))
    file = tmp_path / "wide.png"
    wide.save(file)
    boxes = {}
    for square in ("own", "pad", "crop", "stretch"):
        question = answer.Question("testbed", file, DESCRIBE, answer.generation(length=16), square=square)
        steps = list(answer.ask(pool, question, reader))
        shown = json.loads(steps[-1][0])
        boxes[square] = shown["maps"]["raw"]["box"]
        assert any("otherwise than" in note for note in shown["notes"]) == (square != "own")
        assert square == "own" or shown["calibration"] == "shifted"
        whole = json.loads(list(answer.explain_again(pool, steps[-1][1], "row", reader))[-1][0])
        assert whole["maps"]["raw"] == shown["maps"]["raw"]
    expected = {"own": [15, 0, 75, 60], "pad": [0, -15, 90, 75], "crop": [15, 0, 75, 60], "stretch": [0, 0, 90, 60]}
    for square, box in expected.items():
        assert boxes[square] == pytest.approx(box, abs=1.5), square
    wrong = replace(question, square="round")
    assert (
        "unknown way to make a picture square 'round'"
        in json.loads(list(answer.ask(pool, wrong, reader))[-1][0])["text"]
    )
    square_file = tmp_path / "square.png"
    picture(2).save(square_file)
    steps = list(answer.ask(pool, replace(question, picture=square_file, square="crop"), reader))
    assert "otherwise than" not in " ".join(json.loads(steps[-1][0])["notes"])  # it is one already
