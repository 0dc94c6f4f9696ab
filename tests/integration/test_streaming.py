"""Warnings while the embedded model writes, against traces of the finished answers."""

import re
import threading

import numpy as np
import pytest
import torch
from transformers import LogitsProcessor

import stethoscope
from stethoscope import testbed
from stethoscope.core.errors import CapabilityError, CaptureError, ConfigError
from stethoscope.core.token_table import FeatureSchema
from stethoscope.core.types import Generation
from stethoscope.detection.design_matrix import Design, Inputs
from stethoscope.features import FEATURES, FeatureSet
from stethoscope.features.columns import feature_of
from stethoscope.storage.run_dir import RunStore
from stethoscope.streaming import Final, MentionCompleted, Token, WarningStreamer, stream
from stethoscope.streaming.events import MentionTracker
from stethoscope.streaming.recorded_steps import STEP_REQUIREMENTS
from stethoscope.streaming.scorer import FAST_FEATURES, FastFeatures
from stethoscope.streaming.stream import _diagnose_mentions
from stethoscope.tasks.chair import Chair
from stethoscope.tasks.extraction import as_extraction
from stethoscope.tasks.object_extraction import mentions as object_mentions

QUESTION = "Please describe this image in detail."
FAST = ("uncertainty", "position", "attention", "lens")
STEPWISE = [name for name, item in FEATURES.items() if item.requires <= STEP_REQUIREMENTS]


@pytest.fixture(scope="module")
def adapter():
    return stethoscope.load("testbed")


@pytest.fixture(scope="module")
def images():
    return [scene.image() for scene in testbed.scenes(4)[1:]]


def trained(adapter, folder, features, **settings):
    stethoscope.Evaluator(features=features, run_dir=folder, batch_size=32).run(adapter, Chair(scenes=36))
    table = RunStore(folder).tokens("chair")
    return stethoscope.Detector(C=0.1, **settings).fit(table)


@pytest.fixture(scope="module")
def fast(adapter, tmp_path_factory):
    return trained(adapter, tmp_path_factory.mktemp("fast"), FeatureSet(groups=FAST))


@pytest.fixture(scope="module")
def every(adapter, tmp_path_factory):
    """A detector of everything that a step can give, also what the next step reads."""
    features = FeatureSet(groups=(), names=STEPWISE)
    return trained(adapter, tmp_path_factory.mktemp("every"), features, visual_consistency=False)


def any_word(text):
    """An extraction of which nothing is known beforehand: every token can begin a name."""
    return object_mentions(text)


def streamed(*arguments, extraction=any_word, **settings):
    """Tokens, completed mentions and the last event of a stream, which are all that it yields."""
    *events, last = stream(*arguments, extraction=extraction, **settings)
    tokens, mentions = ([event for event in events if type(event) is kind] for kind in (Token, MentionCompleted))
    assert len(tokens) + len(mentions) == len(events)
    assert type(last) is Final
    return tokens, mentions, last


def offline(adapter, image, generation, detector, names):
    """Answer and probabilities as runs make them: generate, trace, features, predict."""
    import pandas as pd

    encoded = adapter.encode(image, QUESTION)
    answer = adapter.generate([encoded], generation)[0]
    features = FeatureSet(groups=(), names=names)
    columns = features.compute(adapter.trace(encoded, answer, features.requires))
    return answer, detector.predict(pd.DataFrame(columns))


@pytest.mark.parametrize("length", [96, 9, 1])
@pytest.mark.parametrize("delay", [0, 1, 6])
def test_tokens_and_probabilities_are_those_of_the_finished_answer(adapter, images, fast, delay, length):
    for image in images:
        generation = Generation(max_new_tokens=length)
        answer, expected = offline(adapter, image, generation, fast, FeatureSet(groups=FAST).names)
        tokens, _, last = streamed(adapter, image, QUESTION, detector=fast, delay=delay, generation=generation)
        assert [token.id for token in tokens] == list(answer.token_ids) == list(last.answer.token_ids)
        assert (last.answer.text, last.answer.offsets, last.answer.finished) == (
            answer.text, answer.offsets, answer.finished,
        )  # fmt: skip
        assert "".join(token.text for token in tokens) == answer.text
        assert [(token.start, token.end) for token in tokens] == list(answer.offsets)
        assert np.allclose([token.logprob for token in tokens], answer.logprobs, atol=1e-4)
        assert np.allclose([token.probability for token in tokens], expected, rtol=0, atol=1e-4)
        assert [token.index for token in tokens] == list(range(len(tokens)))
        assert np.ptp(expected) > 0.05 or length < 96  # a constant would agree with anything


@pytest.mark.parametrize(("length", "delay"), [(96, 1), (9, 1), (40, 5)])
def test_the_delayed_mode_reads_consuming_rows_too(adapter, images, every, length, delay):
    generation = Generation(max_new_tokens=length)
    for image in images:
        answer, expected = offline(adapter, image, generation, every, STEPWISE)
        tokens, _, last = streamed(adapter, image, QUESTION, detector=every, delay=delay, generation=generation)
        assert last.answer.token_ids == answer.token_ids == tuple(token.id for token in tokens)
        assert last.answer.finished == answer.finished
        assert np.allclose([token.probability for token in tokens], expected, rtol=0, atol=1e-4)


def test_every_feature_of_a_step_is_that_of_the_trace(adapter, images, every):
    encoded = adapter.encode(images[0], QUESTION)
    settings = {"generation": Generation(max_new_tokens=40), "extraction": any_word}
    with WarningStreamer(adapter, encoded, every, delay=1, **settings) as warner:
        warner.model.generate(**warner.arguments, streamer=warner)
    features = FeatureSet(groups=(), names=STEPWISE)
    columns = features.compute(adapter.trace(encoded, warner.answer, features.requires))
    streamed = warner.scorer.columns(len(warner.tokens))
    assert set(streamed) == set(columns)
    for name, values in columns.items():
        assert np.allclose(streamed[name], values, rtol=1e-3, atol=1e-3), name


def test_sampling_and_stop_strings(adapter, images, every, fast):
    for generation in (
        Generation(max_new_tokens=30, do_sample=True, seed=3),
        Generation(max_new_tokens=60, stop=(" with a", "shows a")),
        Generation(max_new_tokens=60, stop=("the background",)),
    ):
        for detector, delay in ((fast, 0), (every, 1)):
            answer, expected = offline(adapter, images[0], generation, detector, detector_names(detector))
            tokens, mentions, last = streamed(
                adapter, images[0], QUESTION, detector=detector, delay=delay, generation=generation
            )
            assert [(mention.object, mention.start) for mention in mentions] == [
                (mention.object, mention.start) for mention in last.mentions
            ]
            assert last.answer.text == answer.text == "".join(token.text for token in tokens)
            assert tuple(token.id for token in tokens) == answer.token_ids == last.answer.token_ids
            assert last.answer.finished == answer.finished
            assert np.allclose([token.probability for token in tokens], expected, rtol=0, atol=1e-4)


def detector_names(detector):
    return list(dict.fromkeys(map(feature_of, detector.schema.names)))


def test_the_last_item_has_the_mentions_of_a_diagnosis(adapter, images, fast, every):
    generation = Generation(max_new_tokens=60)
    for given, judge in (({}, fast), ({"final": every}, every)):
        *_, last = stream(adapter, images[0], QUESTION, detector=fast, generation=generation, **given)
        whole = stethoscope.diagnose(adapter, images[0], QUESTION, last.answer, judge)
        assert [(mention.object, mention.start, mention.warned) for mention in last.mentions] == [
            (mention.object, mention.start, mention.warned) for mention in whole.mentions
        ]
        assert len(last.mentions) > 1
        assert np.allclose(
            [mention.verdict.probability for mention in last.mentions],
            [mention.verdict.probability for mention in whole.mentions],
            atol=1e-4,
        )


@pytest.mark.parametrize("delay", [0, 1, 6])
def test_only_tokens_that_can_begin_a_name_are_scored(adapter, images, fast, every, delay, monkeypatch):
    """With the values of a stream that scores every token, also of features that read the tokens between them."""
    computed = counted(monkeypatch)
    for detector in (fast, every)[: 1 + bool(delay)]:
        shares = []
        for image in images:
            expected, warnings, _ = streamed(adapter, image, QUESTION, detector=detector, delay=delay)
            computed.clear()
            tokens, mentions, last = streamed(
                adapter, image, QUESTION, detector=detector, delay=delay, extraction="coco"
            )
            scored = [token.index for token in tokens if token.probability is not None]
            assert [token.id for token in tokens] == [token.id for token in expected]
            for index in scored:
                assert tokens[index].probability == pytest.approx(expected[index].probability, abs=1e-5)
            assert {mention.tokens[0] for mention in mentions} <= set(scored)
            assert len(computed) == (len(scored) if detector is fast else 0)
            assert [(named.object, named.start, named.warned) for named in mentions] == [
                (named.object, named.start, named.warned) for named in warnings
            ]
            for mention, named, final in zip(mentions, warnings, last.mentions, strict=True):
                assert mention.probability == pytest.approx(named.probability, abs=1e-5)
                assert mention.probability == pytest.approx(final.verdict.probability, abs=1e-5)
            shares.append(len(scored) / len(tokens))
        assert 0.02 < np.mean(shares) < 0.25


class Spelled(LogitsProcessor):
    """Makes a model write given tokens."""

    def __init__(self, ids):
        self.ids = list(ids)

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.ids.pop(0)] = 0
        return forced


STRANGE = "A bicycle, an airplane (2 sheep)\nand a hot  dog's keyboard; at to a toaster. A TV"


@pytest.mark.parametrize("subtokens", ["first", "max"])
@pytest.mark.parametrize("delay", [0, 1, 4])
def test_names_in_tokens_that_no_tokenizer_would_choose(adapter, images, fast, every, delay, subtokens, monkeypatch):
    """Letter by letter, so that it is known late, or not before the name is complete, which letters begin names."""
    tokenizer, encoded = adapter.processor.tokenizer, adapter.encode(images[0], QUESTION)
    ids = [token for letter in STRANGE for token in tokenizer(letter, add_special_tokens=False)["input_ids"]]
    for detector in (fast, every)[: 1 + bool(delay)]:
        monkeypatch.setitem(detector.settings, "subtokens", subtokens)
        finals = []
        for extraction in ("coco", any_word):
            with WarningStreamer(adapter, encoded, detector, delay, extraction=extraction) as warner:
                spelled = Spelled(ids if detector is fast else [*ids, 0])  # consuming rows need a step more
                settings = {"max_new_tokens": len(spelled.ids), "logits_processor": [spelled], "do_sample": False}
                adapter.model.generate(**encoded.inputs, streamer=warner, **settings)
            assert warner.answer.text.startswith(STRANGE)
            finals.append(_diagnose_mentions(adapter, images[0], encoded, warner, None, as_extraction(extraction))[0])
            mentions = [event for event in warner.events if type(event) is MentionCompleted]
            assert [mention.object for mention in mentions] == [
                "bicycle", "airplane", "sheep", "hot dog", "keyboard", "toaster", "tv"
            ]  # fmt: skip
            for mention, final in zip(mentions, finals[-1], strict=True):
                assert (mention.object, mention.start) == (final.object, final.start)
                if subtokens == "first":
                    assert mention.probability == pytest.approx(final.verdict.probability, abs=1e-5)
        for final, expected in zip(*finals, strict=True):
            assert final.verdict.probability == pytest.approx(expected.verdict.probability, abs=1e-5)


def test_stop_strings_that_cut_words_and_answers_that_end_within_them(adapter, images, every, fast):
    """What is cut off leaves names that nobody could have foreseen."""
    text, tokenizer = "A man with dogmas", adapter.processor.tokenizer
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for detector, delay in ((fast, 0), (fast, 3), (every, 1)):
        for limit in range(1, len(ids)):
            for stop in ((), ("mas",), ("ith",)):
                generation, encoded = Generation(max_new_tokens=limit, stop=stop), adapter.encode(images[0], QUESTION)
                with WarningStreamer(adapter, encoded, detector, delay, generation=generation) as warner:
                    arguments = {**warner.arguments, "logits_processor": [Spelled(ids)]}
                    warner.model.generate(**arguments, streamer=warner)
                mentions = [event for event in warner.events if type(event) is MentionCompleted]
                assert [mention.object for mention in mentions] == [
                    mention.name for mention in object_mentions(warner.answer.text)
                ]
                assert all(mention.probability is not None for mention in mentions)


@pytest.mark.parametrize("repeats", ["first", "all"])
@pytest.mark.parametrize("delay", [0, 4])
def test_an_object_is_told_when_its_name_is_complete_and_with_its_final_warning(
    adapter, images, fast, delay, repeats, monkeypatch
):
    monkeypatch.setitem(fast.settings, "repeats", repeats)
    warned = []
    for image in images:
        *events, last = stream(adapter, image, QUESTION, detector=fast, delay=delay)
        mentions = [event for event in events if type(event) is MentionCompleted]
        for mention, final in zip(mentions, last.mentions, strict=True):
            assert (mention.object, mention.start, mention.end, mention.tokens, mention.warned) == (
                final.object, final.start, final.end, final.tokens, final.warned,
            )  # fmt: skip
            assert mention.probability == pytest.approx(final.verdict.probability, abs=1e-4)
            before = [event for event in events[: events.index(mention)] if type(event) is Token]
            behind = "".join(token.text for token in before)[mention.end :]
            assert re.fullmatch(r"\W*\s+\w+", behind) or len(before) == len(last.answer.token_ids)
        warned += [mention.warned for mention in mentions]
    assert {True, False} == set(warned)


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (("A", " baby", " eleph", "ant", " and", " a"), {5: ["elephant"]}),
        (("A", " train", " tr", "ack", " and", " a"), {}),
        (("A", " train", " t", "rip", " and", " a"), {4: ["train"]}),
        (("A", " dog", "s", ",", " cats", ".", " It"), {5: ["dog"], 7: ["cat"]}),
        (("A", " dog"), {"end": ["dog"]}),
        (("A", " cat", " and", " a", " cat"), {3: ["cat"], "end": ["cat"]}),
        (("No", " such", " thing"), {}),
    ],
)
def test_names_are_complete_when_nothing_can_change_them(pieces, expected):
    tracker, spans, names_by_step = MentionTracker(object_mentions, None), [], {}

    def completed(text, finished=False):
        return [tracker.add(mention, spans).object for mention in tracker.new(text, finished)]

    for index in range(len(pieces)):
        spans.append((sum(map(len, pieces[:index])), sum(map(len, pieces[: index + 1]))))
        names = completed("".join(pieces[: index + 1]))
        names_by_step |= {index + 1: names} if names else {}
    names = completed("".join(pieces), finished=True)
    assert names_by_step | ({"end": names} if names else {}) == expected
    for mention in tracker.completed:
        assert "".join(pieces)[mention.start : mention.end].lower().rstrip("s").endswith(mention.object)


def test_a_generate_call_of_ones_own(adapter, images, fast):
    encoded, seen = adapter.encode(images[0], QUESTION), []
    with WarningStreamer(adapter, encoded, fast, on_event=seen.append) as warner:
        ids = adapter.model.generate(**encoded.inputs, streamer=warner, max_new_tokens=20, do_sample=False)
    written = ids[0, encoded.inputs["input_ids"].shape[1] :].tolist()
    assert [token.id for token in warner.tokens] == written
    assert seen == warner.events
    assert [event for event in seen if type(event) is Token] == warner.tokens != seen
    assert warner.answer.token_ids == tuple(written)
    with pytest.raises(CaptureError, match="new streamer"), warner:
        adapter.model.generate(**encoded.inputs, streamer=warner, max_new_tokens=3, do_sample=False)
    two = {name: torch.cat([value, value]) for name, value in encoded.inputs.items()}
    with pytest.raises(CaptureError, match="one prompt"), WarningStreamer(adapter, encoded, fast) as warner:
        adapter.model.generate(**two, streamer=warner, max_new_tokens=3, do_sample=False)


def test_tokens_wait_as_long_as_was_said_and_no_longer(adapter, images, fast):
    for delay in (0, 3):
        steps, tokens = [], stream(adapter, images[0], QUESTION, detector=fast, delay=delay, extraction=any_word)
        hook = adapter.model.register_forward_hook(lambda *_, steps=steps: steps.append(1))
        try:
            for token in range(12):
                while type(event := next(tokens)) is MentionCompleted:
                    pass
                assert event.index == token
                assert len(steps) - 1 - token == delay - token % (delay + 1)
        finally:
            hook.remove()
            tokens.close()


def test_tokens_that_begin_no_name_do_not_wait(adapter, images, fast):
    steps, tokens, waits = [], stream(adapter, images[0], QUESTION, detector=fast, delay=3), {True: [], False: []}
    hook = adapter.model.register_forward_hook(lambda *_: steps.append(1))
    try:
        for event in tokens:
            if type(event) is Token:
                waits[event.probability is not None].append(len(steps) - 1 - event.index)
    finally:
        hook.remove()
    assert waits[True][0] == max(waits[True]) == 3  # others are scored with a first one, before their time
    assert waits[False].count(0) > len(waits[False]) / 2
    assert max(waits[False]) <= 3


def test_the_model_is_free_between_tokens(adapter, images, every):
    """Other answers, traces and streams of the same model disturb nothing."""
    generation = Generation(max_new_tokens=24)
    alone = [list(stream(adapter, image, QUESTION, detector=every, delay=1, generation=generation)) for image in images]
    encoded = adapter.encode(images[2], QUESTION)
    both = [stream(adapter, image, QUESTION, detector=every, delay=1, generation=generation) for image in images[:2]]
    recorded = [[], []]
    for step in range(10):
        for items, events in zip(recorded, both, strict=True):
            items.append(next(events))
        if step == 4:
            answer = adapter.generate([encoded], generation)[0]
            adapter.trace(encoded, answer, ("attention", "lens"))
    recorded[0] += both[0]
    recorded[1] += both[1]
    assert adapter.model.config._attn_implementation != "stethoscope"
    for items, expected in zip(recorded, alone, strict=False):
        assert items[:-1] == expected[:-1]
        assert items[-1].answer == expected[-1].answer


def test_when_nobody_listens_and_without_a_detector(adapter, images, fast):
    def hooks():
        return sum(len(module._forward_hooks) for module in adapter.model.modules())

    before, hooked, implementation = threading.active_count(), hooks(), adapter.model.config._attn_implementation
    tokens = stream(adapter, images[0], QUESTION, detector=fast, extraction=any_word)
    first = next(tokens)
    assert 0 <= first.probability <= 1
    tokens.close()
    assert threading.active_count() == before
    assert hooks() == hooked
    assert adapter.model.config._attn_implementation == implementation != "stethoscope"
    tokens, mentions, last = streamed(adapter, images[0], QUESTION)
    assert {event.probability for event in (*tokens, *mentions)} == {None}
    assert {mention.warned for mention in mentions} == {False}
    assert [mention.object for mention in mentions] == [mention.object for mention in last.mentions] != []
    assert {named.verdict for named in last.mentions} == {None}


def counted(monkeypatch):
    """How many tokens have been read without a trace."""
    tokens, rows = [], FastFeatures.rows

    def count(self, ids, *more):
        tokens.extend(ids)
        return rows(self, ids, *more)

    monkeypatch.setattr(FastFeatures, "rows", count)
    return tokens


@pytest.mark.parametrize("delay", [0, 1, 6])
def test_rows_without_a_trace_are_those_of_one(adapter, images, fast, delay, monkeypatch):
    rows, tokens = [], counted(monkeypatch)
    for supports in (None, lambda *_: False):
        if supports is not None:
            monkeypatch.setattr(FastFeatures, "supports", supports)
        encoded = adapter.encode(images[0], QUESTION)
        settings = {"generation": Generation(max_new_tokens=60), "extraction": any_word}
        with WarningStreamer(adapter, encoded, fast, delay, **settings) as warner:
            warner.model.generate(**warner.arguments, streamer=warner)
        assert len(tokens) == len(warner.tokens)  # all, and none the second time
        rows.append((warner.scorer.columns(len(warner.tokens)), warner.answer.logprobs))
    assert set(FeatureSet(groups=FAST).names) == FAST_FEATURES
    for name, values in rows[1][0].items():
        assert np.allclose(rows[0][0][name], values, rtol=1e-4, atol=1e-4), name
    assert np.allclose(rows[0][1], rows[1][1], atol=1e-5)


def test_only_a_few_numbers_are_read_without_a_trace(adapter, images, fast, monkeypatch):
    monkeypatch.setattr("stethoscope.streaming.scorer._MAX_NUMBERS", 1000)
    tokens = counted(monkeypatch)
    written, _, _ = streamed(adapter, images[0], QUESTION, detector=fast, generation=Generation(max_new_tokens=5))
    assert len(written) == 5
    assert not tokens


@pytest.mark.parametrize(
    "model",
    ["blip2-opt-2.7b", "gemma-3-4b", "instructblip-flan-t5-xl", "llava-1.6-mistral-7b", "qwen2-vl-2b", "smolvlm-2.2b"],
)
def test_the_loop_writes_what_generate_writes(model, images):
    other = stethoscope.load(model, random_init="tiny")
    for generation in (Generation(max_new_tokens=16), Generation(max_new_tokens=9, do_sample=True, seed=1)):
        answer = other.generate([other.encode(images[0], QUESTION)], generation)[0]
        tokens, _, last = streamed(other, images[0], QUESTION, generation=generation)
        assert tuple(token.id for token in tokens) == answer.token_ids == last.answer.token_ids
        assert np.allclose([token.logprob for token in tokens], answer.logprobs, atol=1e-5)
        assert last.answer.finished == answer.finished


@pytest.mark.parametrize(
    ("model", "straight"),
    [("blip2-flan-t5-xl", 0), ("blip2-opt-2.7b", 3), ("qwen2-vl-2b", 3), ("smolvlm-2.2b", 3)],
)
@pytest.mark.parametrize("names", [STEPWISE, FeatureSet(groups=FAST).names], ids=["every", "fast"])
def test_rows_of_other_families(model, straight, names, images, every, monkeypatch):
    """Features that a step can give, on random weights: an encoder, a language model of its own, tiles."""
    tokens, straight = counted(monkeypatch), straight if len(names) < len(STEPWISE) else 0
    other = stethoscope.load(model, random_init="tiny")
    encoded, generation = other.encode(images[0], QUESTION), Generation(max_new_tokens=5)
    names = [name for name in names if FEATURES[name].group != "grid"]
    fake = stethoscope.Detector()
    features = FeatureSet(groups=(), names=names)
    answer = other.generate([encoded], generation)[0]
    columns = features.compute(other.trace(encoded, answer, features.requires))
    fake.design, fake._model = Design(FeatureSchema(tuple(columns)), Inputs(tuple(columns))), every.model
    streamer = WarningStreamer(other, encoded, fake, delay=1, generation=generation, extraction=any_word)
    streamer.scorer._predict = lambda rows: np.full(len(rows), 0.5)
    with streamer:
        streamer.model.generate(**streamer.arguments, streamer=streamer)
    assert streamer.answer.token_ids == answer.token_ids
    for name, values in columns.items():
        assert np.allclose(streamer.scorer.columns(len(values))[name], values, rtol=1e-3, atol=1e-3), name
    assert len(tokens) == straight


@pytest.mark.parametrize(
    "settings",
    [{}, {"calibration": "none"}, {"calibration": "isotonic"}, {"estimator": "boosting"}, {"estimator": "per_head"}],
    ids=str,
)
def test_rows_are_judged_as_a_table_is(settings):
    import pandas as pd

    random = np.random.default_rng(0)
    values = random.normal(size=(400, 3))
    values[::7, 1] = np.nan  # the classifier then has a column that says so
    table = pd.DataFrame(values, columns=["a", "b", "c"])
    table["label"] = (values[:, 0] + random.normal(size=400) > 0).astype(int)
    table["group"] = [f"image{row // 2}" for row in range(400)]
    table["is_first_subtoken"], table["repeat_index"], table["object"], table["mention_index"] = True, 0, "dog", 0
    table["task"], table["sample_id"] = "t", table["group"]
    detector = stethoscope.Detector(C=1.0, **settings).fit(table)
    whole = table[~table["b"].isna()].copy()
    whole.loc[:5, "a"] = 50.0  # is clipped
    judge, rows = detector.model.predict, whole[["a", "b", "c"]].to_numpy()
    probabilities = [judge(row[None])[0] for row in rows]
    assert np.ptp(probabilities) > 0.3
    assert np.allclose(probabilities, detector.predict(whole), rtol=0, atol=1e-12)
    assert np.allclose(judge(rows), probabilities, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("names", "settings", "delay", "message"),
    [
        (["nll", "pmi", "relevancy_peak"], {}, 0, "pmi, relevancy_peak.*features=fast"),
        (["nll", "svar_c"], {}, 0, "svar_c of the row that consumes.*delay=1"),
        (["telepathy"], {}, 0, "unknown feature 'telepathy'"),
    ],
    ids=str,
)
def test_detectors_that_read_more_are_refused_in_a_line(adapter, images, names, settings, delay, message):
    detector = stethoscope.Detector(**settings)
    detector.design = Design(FeatureSchema(tuple(names)), Inputs(tuple(names)))
    with pytest.raises(CapabilityError, match=message) as caught:
        stream(adapter, images[0], QUESTION, detector=detector, delay=delay)
    assert "\n" not in str(caught.value)


def test_settings_that_are_wrong(adapter, images, fast):
    for arguments, message in (
        ({"delay": -1, "detector": fast}, "delay=-1"),
        ({"question": " "}, "question is empty"),
        ({"generation": Generation(num_beams=2)}, "num_beams=2"),
    ):
        with pytest.raises(ConfigError, match=message):
            stream(adapter, images[0], **{"question": QUESTION, **arguments})
    other = stethoscope.load("qwen2-vl-2b", random_init="tiny")
    with pytest.raises(CapabilityError, match="trained on another model"):
        list(stream(other, images[0], QUESTION, detector=fast))
