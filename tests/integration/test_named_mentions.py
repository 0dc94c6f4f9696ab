"""Detectors that need the name of an object judge it once the name is complete, with what a finished answer gives."""

import json

import numpy as np
import pytest
from helpers.rewinds import words
from test_streaming import QUESTION, STRANGE, Spelled

import stethoscope
from stethoscope import testbed
from stethoscope.app import answer as app_answer
from stethoscope.app.model_pool import ModelPool
from stethoscope.core.errors import CapabilityError
from stethoscope.core.token_table import IMAGE_TOKENS, FeatureSchema, unpack_vectors
from stethoscope.core.types import Generation
from stethoscope.detection.array_classifiers import LinearClassifier, Preprocessing
from stethoscope.detection.calibrated_model import CalibratedModel
from stethoscope.detection.design_matrix import Design, Inputs
from stethoscope.detection.image_probe import ImageProbe
from stethoscope.diagnosis.answer_verdicts import AnswerFeatures, ReadAnswer, extract_mentions, token_rows
from stethoscope.features import FeatureSet
from stethoscope.features.relevancy import image_tokens
from stethoscope.storage.run_dir import RunStore
from stethoscope.streaming import Final, MentionCompleted, TakenBack, Token, WarningStreamer, stream
from stethoscope.streaming.backtrack import WHEN_NEEDED, Backtrack, MentionScorer, make_streamer
from stethoscope.streaming.scorer import FastFeatures, smallest_delay
from stethoscope.streaming.stream import _diagnose_mentions
from stethoscope.streaming.warning_streamer import decode_answers
from stethoscope.tasks.chair import Chair
from stethoscope.tasks.extraction import as_extraction
from stethoscope.tasks.object_extraction import mentions as object_mentions

GROUPS = ("uncertainty", "position", "attention", "lens", "hidden")
NEAR = {"rel": 0, "abs": 1e-5}


@pytest.fixture(scope="module")
def adapter():
    return stethoscope.load("testbed")


@pytest.fixture(scope="module")
def table(adapter, tmp_path_factory):
    folder = tmp_path_factory.mktemp("states")
    stethoscope.Evaluator(features=FeatureSet(groups=GROUPS), run_dir=folder, batch_size=32).run(
        adapter, Chair(scenes=36)
    )
    return RunStore(folder).tokens("chair")


@pytest.fixture(scope="module")
def detector(table):
    fitted = stethoscope.Detector(C=0.1).fit(table)
    assert fitted.inputs.imaged
    return fitted


def completed(events):
    return [event for event in events if type(event) is MentionCompleted]


def compare(mentions, expected):
    """Compare completed mentions with those of a diagnosis of the finished answer."""
    assert [(mention.object, mention.start, mention.end, mention.tokens, mention.warned) for mention in mentions] == [
        (mention.object, mention.start, mention.end, mention.tokens, mention.warned) for mention in expected
    ]
    probabilities = [mention.probability for mention in mentions]
    assert probabilities == pytest.approx([mention.verdict.probability for mention in expected], **NEAR)
    return probabilities


@pytest.mark.parametrize(
    ("pictures", "settings", "delay"),
    [
        (4, {}, 0),
        (1, {"repeats": "all", "subtokens": "max"}, 4),
        pytest.param(120, {}, 0, marks=pytest.mark.slow),
        pytest.param(20, {"repeats": "all", "subtokens": "mean"}, 1, marks=pytest.mark.slow),
        pytest.param(20, {"subtokens": "all"}, 0, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_mentions_have_the_probabilities_of_the_finished_answer(
    adapter, detector, pictures, settings, delay, monkeypatch
):
    for name, value in settings.items():
        monkeypatch.setitem(detector.settings, name, value)
    assert smallest_delay(detector) == 0
    judged, repeated = [], 0
    for scene in testbed.scenes(pictures + 1)[1:]:
        *events, last = stream(adapter, scene.image(), QUESTION, detector=detector, delay=delay)
        assert type(last) is Final
        tokens = [event for event in events if type(event) is Token]
        assert {token.probability for token in tokens} == {None}
        whole = stethoscope.diagnose(adapter, scene.image(), QUESTION, last.answer, detector)
        mentions = completed(events)
        judged += compare(mentions, whole.mentions)
        verdicts = [mention.verdict.probability for mention in last.mentions]
        assert verdicts == pytest.approx([mention.probability for mention in mentions], **NEAR)
        assert last.shift == whole.shift
        repeated += len(mentions) - len({mention.object for mention in mentions})
        for mention in mentions[:-1]:  # told with the second token behind the name
            before = [event for event in events[: events.index(mention)] if type(event) is Token]
            assert len(before) - mention.tokens[-1] <= 3
    assert np.ptp(judged) > 0.2
    assert repeated or pictures < 20


LATE = "Two dining  tables, a table near a stop sign. Two hot dogs, a baby elephant and a hot dog on the dining table"


@pytest.mark.parametrize("subtokens", ["first", pytest.param("mean", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("text", "letters"),
    [
        pytest.param(LATE, False, id="late"),
        pytest.param(STRANGE, True, id="strange-letters"),
        pytest.param(LATE, True, marks=pytest.mark.slow, id="late-letters"),
        pytest.param(STRANGE, False, marks=pytest.mark.slow, id="strange"),
    ],
)
def test_names_of_several_tokens_and_words_and_at_the_very_end(
    adapter, detector, text, letters, subtokens, monkeypatch
):
    monkeypatch.setitem(detector.settings, "subtokens", subtokens)
    image, tokenizer = testbed.scenes(2)[1].image(), adapter.processor.tokenizer
    parts = text if letters else [text]
    ids = [token for part in parts for token in tokenizer(part, add_special_tokens=False)["input_ids"]]
    encoded, generation = adapter.encode(image, QUESTION), Generation(max_new_tokens=len(ids))
    for extraction in ("coco", lambda text: as_extraction("coco")(text)):  # names that are known beforehand, or not
        with WarningStreamer(adapter, encoded, detector, generation=generation, extraction=extraction) as warner:
            arguments = {**warner.arguments, "logits_processor": [Spelled([*ids, 0])]}
            warner.model.generate(**arguments, streamer=warner)
        assert warner.answer.text == text
        whole = stethoscope.diagnose(adapter, image, QUESTION, warner.answer, detector)
        compare(completed(warner.events), whole.mentions)
        assert any(len(mention.tokens) > 1 for mention in whole.mentions)
    with WarningStreamer(adapter, encoded, detector) as warner:  # whose last token nothing reads
        adapter.model.generate(
            **encoded.inputs, streamer=warner, logits_processor=[Spelled(ids)], max_new_tokens=len(ids), do_sample=False
        )
    again = [mention.probability for mention in completed(warner.events)]
    assert again[:-1] == pytest.approx([mention.verdict.probability for mention in whole.mentions][:-1], **NEAR)
    finals, _ = _diagnose_mentions(adapter, image, encoded, warner, None, as_extraction(None))
    assert len(finals) == len(again)


@pytest.fixture(scope="module", params=["factored", "objects"])
def prior(table, request):
    """A detector that knows the object without image tokens."""
    fitted = stethoscope.Detector(C=0.1, exclude=["hidden_*"], **{request.param: True}).fit(table)
    assert not fitted.inputs.imaged
    return fitted


def test_other_detectors_that_need_the_name(adapter, prior):
    image, fitted = testbed.scenes(5)[4].image(), prior
    *events, last = stream(adapter, image, QUESTION, detector=fitted)
    compare(completed(events), stethoscope.diagnose(adapter, image, QUESTION, last.answer, fitted).mentions)


def made_up_detector(columns, tokens, objects):
    """A detector of random weights for the columns and image tokens of any model."""
    random, names = np.random.default_rng(1), tuple(columns)
    values, size = np.stack([columns[name] for name in names], 1), tokens.shape[1]
    mean, scale = np.append(values.mean(0), 0.0), np.append(values.std(0) + 1e-3, 1.0)
    width = len(mean)
    limits = (np.full(width, end) for end in (-1e30, 1e30))
    inputs = Preprocessing(np.zeros(width), np.zeros(0, int), *limits, mean, scale)
    weights = random.normal(size=(width, 1)) / width**0.5
    weights[-1] = 2.0
    fake = stethoscope.Detector(repeats="all", hidden_probe=False)
    fake._model = CalibratedModel(LinearClassifier(inputs, weights, np.zeros(1), None))
    probe = ImageProbe(
        tokens.mean(0), tokens.std(0) + 1e-3, random.normal(size=(size, 64)) / size**0.5, random.normal(size=64),
        random.normal(size=(64, len(objects))), random.normal(size=len(objects)),
    )  # fmt: skip
    fake.design = Design(FeatureSchema(names), Inputs(names, objects, probed=False, imaged=True), probe)
    return fake


QUICK = ("qwen2-vl-2b", "instructblip-flan-t5-xl")
OTHERS = ("llava-1.6-mistral-7b", "blip2-opt-2.7b", "blip2-flan-t5-xl", "smolvlm-2.2b", "gemma-3-4b", "internvl3-2b")


@pytest.mark.parametrize("model", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_other_families(model, monkeypatch):
    """Random weights name no object, so every word is one; an encoder, tiles, queries, a grid of one's own."""
    other, image = stethoscope.load(model, random_init="tiny"), testbed.scenes(2)[1].image()
    encoded, generation = other.encode(image, QUESTION), Generation(max_new_tokens=24, do_sample=True, seed=1)
    answer = other.generate([encoded], generation)[0]
    features = FeatureSet(groups=GROUPS)
    trace = other.trace(encoded, answer, features.requires)
    columns = dict(features.compute(trace))
    tokens = image_tokens(trace, columns)
    named = extract_mentions(answer, as_extraction(words))
    objects = tuple(sorted({mention.object for mention in named})[::2])  # the others are not known
    fake = made_up_detector(columns, unpack_vectors(tokens), objects)
    rows = fake.select_mentions(
        token_rows(ReadAnswer(encoded, answer, named, AnswerFeatures(columns, tokens))), judged=False
    )
    expected = fake.predict(rows)
    assert len(expected) > 2
    assert np.ptp(expected) > 0.1
    for supports in (FastFeatures.supports, lambda *_: False):
        monkeypatch.setattr(FastFeatures, "supports", supports)
        *events, last = stream(other, image, QUESTION, detector=fake, generation=generation, extraction=words)
        assert last.answer.token_ids == answer.token_ids
        assert [mention.probability for mention in completed(events)] == pytest.approx(list(expected), **NEAR)
    with WarningStreamer(other, encoded, fake, generation=generation, extraction=words) as warner:
        other.generate([encoded], Generation(max_new_tokens=2))  # another answer meanwhile
        warner.model.generate(**warner.arguments, streamer=warner)
    assert [mention.probability for mention in completed(warner.events)] == pytest.approx(list(expected), **NEAR)


def test_objects_are_taken_back_by_image_tokens_without_a_traced_pass(adapter, detector):
    pictures = [scene.image() for scene in testbed.scenes(7)[3:6]]
    generation, method = Generation(max_new_tokens=60), Backtrack(threshold=0.3)
    prompts = [adapter.encode(picture, QUESTION) for picture in pictures]

    def streamers():
        words = as_extraction(None)
        return [make_streamer(adapter, prompt, method, detector, generation, words, WHEN_NEEDED) for prompt in prompts]

    together, passes = streamers(), []
    for _ in decode_answers(together):
        pass
    hook = adapter.model.model.language_model.register_forward_hook(lambda *_: passes.append(1))
    alone = streamers()
    for streamer in alone:
        assert streamer.scorer is not None
        for _ in decode_answers([streamer]):
            pass
    hook.remove()
    assert len(passes) == sum(streamer.steps.passes for streamer in alone)
    backs = 0
    for single, batched, picture in zip(alone, together, pictures, strict=True):
        assert single.answer.token_ids == batched.answer.token_ids
        taken = [[event for event in streamer.events if type(event) is TakenBack] for streamer in (single, batched)]
        assert [event.text for event in taken[0]] == [event.text for event in taken[1]]
        backs += len(taken[0])
        whole = stethoscope.diagnose(adapter, picture, QUESTION, single.answer, detector)
        kept = single._mentions.completed
        for mention, other, final in zip(kept, batched._mentions.completed, whole.mentions, strict=True):
            assert (mention.object, mention.start) == (other.object, other.start) == (final.object, final.start)
            for probability in (mention.probability, other.probability):
                assert probability == pytest.approx(final.verdict.probability, **NEAR)
        scorer = MentionScorer(adapter, single.encoded, detector, as_extraction(None))
        for number, event in enumerate(taken[0]):  # judged as a traced pass over the answer so far would
            draft = adapter.answer(single.encoded, event.draft)
            mention = next(named for named in object_mentions(draft.text) if named.name == event.object)
            expected = scorer(draft)[draft.covering(mention.start, mention.end)[0]]
            if event.object not in {earlier.object for earlier in taken[0][:number]}:
                assert event.probability == pytest.approx(expected, **NEAR)
    assert backs


def test_the_app_warns_by_image_tokens_while_an_answer_is_written(adapter, detector, tmp_path, monkeypatch):
    monkeypatch.setattr(app_answer, "PAUSE", 0)
    detector.save(tmp_path / "runs" / "mine" / "detector", {"model": adapter.fingerprint()})
    testbed.scenes(3)[2].image().save(tmp_path / "picture.png")
    pool = ModelPool(adapter, "testbed", runs=tmp_path / "runs")
    question = app_answer.Question("testbed", tmp_path / "picture.png", QUESTION, app_answer.generation(length=64))
    shown = [json.loads(message) for message, _ in app_answer.ask(pool, question, as_extraction(None))]
    with pool.use("testbed") as ready:
        assert ready.detectors.live is ready.detectors.final
    final = {(named["object"], named["tokens"][0]): named["probability"] for named in shown[-1]["mentions"]}
    last = next(message for message in reversed(shown) if message["kind"] == "writing")
    assert len(last["mentions"]) > 1
    assert last["threshold"] == detector.threshold
    for named in last["mentions"]:
        assert named["probability"] == pytest.approx(final[named["object"], named["tokens"][0]], abs=1e-4)


def test_what_a_step_does_not_give_is_refused_in_a_line(adapter, detector, monkeypatch):
    fake = stethoscope.Detector()
    names = ("nll", "attended_embedding_d0000")
    fake.design = Design(FeatureSchema(names), Inputs(names, ("dog",), imaged=True))
    with pytest.raises(CapabilityError, match="attended_embedding, which a decoding step does not give") as caught:
        stream(adapter, testbed.scenes(1)[0].image(), QUESTION, detector=fake)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr("stethoscope.streaming.step_recorder.layers_of", lambda *_: [])
    with pytest.raises(CapabilityError, match="image tokens, which this model hides"):
        list(stream(adapter, testbed.scenes(1)[0].image(), QUESTION, detector=detector))


def test_rows_are_judged_as_a_table_is(table, detector, prior):
    for fitted in (detector, prior):
        rows = fitted.select_mentions(table, judged=False)
        values = rows[list(fitted.features)].to_numpy(dtype=np.float32)
        places = rows[["token", "mention_index", "repeat_index"]].to_numpy(dtype=float)
        expected = fitted.predict(rows)
        for index in range(0, len(rows), 9):
            tokens = unpack_vectors(rows[IMAGE_TOKENS][index])
            absence = fitted.design.absent_objects(tokens)
            row = fitted.design.arrange(values[[index]], [rows["object"][index]], places[[index]], absence)
            judged = fitted.model.predict(row)
            assert judged[0] == pytest.approx(expected[index], abs=1e-9)
