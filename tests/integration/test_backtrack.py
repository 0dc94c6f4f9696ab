"""Going back while a model talks: exact against whole passes without a cache, and as a choice of runs and streams."""

import json
import re

import numpy as np
import pytest
import torch
from helpers.rewinds import FAST, STEPWISE, doubt, fake_detector, streamed, streamer_of, words
from helpers.tiny_world import TinyAdapter

import stethoscope as package
from stethoscope import testbed
from stethoscope.adapters import tiny
from stethoscope.adapters.generation import Sampler
from stethoscope.adapters.hf import HfAdapter
from stethoscope.core.errors import CapabilityError
from stethoscope.core.json_rows import violation
from stethoscope.core.types import Generation
from stethoscope.evaluation.cost_meter import CostMeter, read_costs
from stethoscope.features import FeatureSet
from stethoscope.streaming import MentionCompleted, TakenBack, Token
from stethoscope.streaming.backtrack import WHEN_NEEDED, Backtrack, Backtracker
from stethoscope.tasks.chair import Chair
from stethoscope.tasks.extraction import as_extraction
from stethoscope.tasks.object_extraction import mentions as object_mentions
from stethoscope.tracing.token_spans import decode_with_offsets

QUESTION = "Please describe this image in detail."


@pytest.fixture(scope="module")
def adapter():
    return package.load("testbed")


@pytest.fixture(scope="module")
def image():
    return testbed.scenes(7)[6].image()


def brute_force(adapter, encoded, generation):
    """Token ids of the same method, by a whole pass for every token."""
    ids, forbidden, tries, settled, taken = [], {}, 0, 0, 0
    _, arguments = adapter.prepare_generate([encoded], generation)
    ends, suppressed = arguments["generation_config"].eos_token_id or [], adapter._tokens.placeholder_ids

    def choose():
        logits = adapter._forward.logits(adapter._forward.full_forward([encoded], [[*ids, 0]]))[0, len(ids)].float()
        logits[list(suppressed or ())] = -torch.inf
        if generation.do_sample:
            sampler = Sampler(generation, [encoded])
            for _ in range(len(ids) + 1):
                noisy = sampler(None, logits[None].clone())[0]
            logits = noisy
        logits[list(forbidden.get(len(ids), ()))] = -torch.inf
        return int(logits.argmax())

    while True:
        token = choose()
        finished = token in ends
        ids += [] if finished else [token]
        finished = finished or len(ids) == generation.max_new_tokens
        text, spans = decode_with_offsets(ids, adapter._tokens.decode_text)
        known = words(text)
        for number, mention in enumerate(known):
            if number < settled or not (finished or re.match(r"\s*\S+\s", text[mention.end :])):
                continue
            settled = number + 1
            first_token = next(k for k, (start, end) in enumerate(spans) if start < mention.end and end > mention.start)
            if doubt(mention.name) and tries < 12 and len(forbidden.get(first_token, ())) < 3:
                forbidden = {k: v for k, v in forbidden.items() if k <= first_token}
                forbidden.setdefault(first_token, []).append(ids[first_token])
                tries, settled, taken = tries + 1, number, taken + 1
                del ids[first_token:]
                finished = False
                break
        if finished:
            return ids, taken


@torch.inference_mode()
def check(adapter, names, generation, delay=1):
    encoded = adapter.encode(testbed.scenes(1)[0].image(), QUESTION)
    (streamer,) = streamed(streamer_of(adapter, encoded, generation, names, delay))
    answer = streamer.answer
    expected, taken = brute_force(adapter, encoded, generation)
    assert list(answer.token_ids) == expected
    backs = [event for event in streamer.events if type(event) is TakenBack]
    assert len(backs) == taken > 1
    again = adapter.answer(encoded, answer.text, answer.token_ids)
    assert np.allclose(answer.logprobs, again.logprobs, atol=1e-5)
    features = FeatureSet(groups=(), names=names)
    columns = features.compute(adapter.trace(encoded, answer, features.requires))
    for name, values in columns.items():
        size = max(1.0, float(np.abs(values).max()))
        assert np.allclose(streamer.scorer.columns(len(values))[name], values, rtol=0, atol=1e-5 * size), name
    return streamer


QUICK = {("testbed", "every"), ("hf", "fast"), ("qwen2-vl-2b", "every")}
MODELS = ("testbed", "hf", "qwen2-vl-2b", "instructblip-flan-t5-xl", "blip2-opt-2.7b", "smolvlm-2.2b")


@pytest.mark.parametrize(
    ("model", "names"),
    [
        pytest.param(model, names, marks=() if (model, kind) in QUICK else pytest.mark.slow, id=f"{model}-{kind}")
        for model in MODELS
        for kind, names in (("every", STEPWISE), ("fast", FAST))
    ],
)
def test_what_remains_is_as_if_it_had_been_written_at_once(model, names):
    adapter = package.load(model) if model == "testbed" else package.load(model, random_init="tiny")
    check(adapter, names, Generation(max_new_tokens=30))


@pytest.mark.parametrize("delay", [1, 4, WHEN_NEEDED])
def test_samples_and_waiting_tokens_are_taken_back_exactly(adapter, delay):
    streamer = check(adapter, FAST, Generation(max_new_tokens=24, do_sample=True, seed=2), delay)
    forward = streamer.steps.passes
    kept, back = len(streamer.answer.token_ids), [event for event in streamer.events if type(event) is TakenBack]
    # every pass predicts a token; the first after each return is predicted by the pass that was there before
    assert forward == kept + sum(len(event.tokens) for event in back) - len(back)


def test_a_stream_tells_what_is_taken_back(adapter, image):
    generation = Generation(max_new_tokens=128, mitigation=Backtrack(threshold=0.3))
    passes = []
    hook = adapter.model.model.language_model.register_forward_hook(lambda *_: passes.append(1))
    *events, last = package.stream(adapter, image, QUESTION, generation=generation)
    hook.remove()
    tokens, mentions, back = [], [], []
    for event in events:
        match event:
            case Token():
                tokens.append(event)
            case MentionCompleted():
                mentions.append(event)
            case TakenBack():
                text = "".join(token.text for token in tokens)
                assert event.text.startswith(text[event.start :])
                assert event.probability >= 0.3
                assert event.object in {mention.name for mention in object_mentions(event.text)}
                del tokens[event.tokens[0] :]
                mentions = [mention for mention in mentions if mention.end <= event.start]
                back.append(event)
    assert back
    assert "".join(token.text for token in tokens) == last.answer.text
    assert tuple(token.id for token in tokens) == last.answer.token_ids
    assert [(mention.object, mention.start) for mention in mentions] == [
        (mention.object, mention.start) for mention in last.mentions
    ]
    for mention, final in zip(mentions, last.mentions, strict=True):
        assert mention.probability == pytest.approx(final.verdict.probability, abs=1e-4)
    prompt = adapter.encode(image, QUESTION)
    assert adapter.generate([prompt], generation)[0] == last.answer
    assert len(passes) > len(tokens)


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("A cat sits. The image shows a cat and a dog in a park", "dog", [" and", " The"]),
        ("A cat, a small dog, and a big bus. It", "bus", [",", "A"]),
        ("A cat, a small dog, and", "dog", [",", "A"]),
        ("There is also a lamp in the", "lamp", ["There"]),
        ("It is a room with two chairs on", "chairs", [" with", "It"]),
        ("Cats and dogs. On the sofa and the chair there is a lamp", "lamp", [" On"]),
    ],
)
def test_it_goes_back_to_where_a_phrase_can_be_left_out(text, name, expected):
    pieces = re.findall(r" ?[A-Za-z]+|[,.]", text)
    spans = [(sum(map(len, pieces[:index])), sum(map(len, pieces[: index + 1]))) for index in range(len(pieces))]
    start = text.rindex(name)
    mention = MentionCompleted(name, start, start + len(name), (), 0.9, True)
    backtracker = Backtracker(Backtrack(threshold=0.5), fake_detector(["nll"]), as_extraction(None))
    assert [pieces[index] for index in backtracker.starts(mention, text, spans)] == expected


RUN = ["task=chair", "task.scenes=7", "task.scene_seed=5", "callbacks=none", "logger=none", "mitigation=backtrack"]


def records(folder):
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return {line["sample_id"]: line for line in lines}


def test_a_run_takes_objects_back(stethoscope, tmp_path, adapter):
    stethoscope("evaluate", *RUN, "name=back", "limit=3", code=0)
    stethoscope("evaluate", *RUN, "name=back", "batch_size=5", code=0)  # resumed
    stethoscope("evaluate", *RUN, "mitigation=none", "name=plain", code=0)
    written, plain = records(tmp_path / "runs/back"), records(tmp_path / "runs/plain")
    assert len(written) == 7
    changed = [line for line in written.values() if "edit" in line]
    assert len(changed) >= 2
    figures = {}
    for name, lines in (("plain", plain), ("back", written)):
        labels = [mention["label"] for line in lines.values() for mention in line["mentions"]]
        figures[name] = sum(labels) / len(labels)
    assert figures["back"] < figures["plain"]
    for sample_id, line in written.items():
        assert violation("samples", line) is None
        if "edit" not in line:
            assert line["answer"]["text"] == plain[sample_id]["answer"]["text"]
            continue
        first = line["edit"]["taken_back"][0]
        assert plain[sample_id]["answer"]["text"][first["start"] :].startswith(first["text"])
        assert line["edit"]["passes"] > len(line["answer"]["token_ids"])
    fingerprint = json.loads((tmp_path / "runs/back/fingerprint.json").read_text())["chair"]["generation"]
    assert fingerprint["mitigation"]["name"] == "backtrack"
    assert fingerprint["mitigation"]["settings"]["tries_per_place"] == 10
    assert len(fingerprint["mitigation"]["settings"]["detector"]) == 16
    for other in ("mitigation.tries_per_place=3", "mitigation=drop"):
        assert "other settings" in stethoscope("evaluate", *RUN, other, "name=back")
    stethoscope("extract", "run=runs/back", "features=fast", code=0)


def test_an_answer_of_a_batch_may_end_with_its_first_token(adapter, image):
    objects = testbed.scenes(7)[6].visible
    names = [objects[0], next(name for name in testbed.CATEGORIES if name not in objects)]
    prompts = [adapter.encode(image, f"Is there a {name} in the image?") for name in names]
    generation = Generation(max_new_tokens=4, stop=("Yes",))
    alone = [streamed(streamer_of(adapter, prompt, generation, ("nll",), 0))[0].answer for prompt in prompts]
    assert [bool(answer.token_ids) for answer in alone] == [False, True]
    together = streamed(*(streamer_of(adapter, prompt, generation, ("nll",), 0) for prompt in prompts))
    assert [streamer.answer.token_ids for streamer in together] == [answer.token_ids for answer in alone]


def test_passes_are_counted_alike_in_batches_and_one_by_one(tmp_path, adapter):
    passes = []
    for scenes, size in ((1, 1), (3, 1), (3, 4)):  # the first time a pass more checks the logit lens
        evaluator = package.Evaluator(
            callbacks=[CostMeter(leaving=True)],
            run_dir=tmp_path / str(len(passes)),
            batch_size=size,
            generation=Generation(max_new_tokens=40, mitigation=Backtrack(threshold=0.1)),
        )
        evaluator.run(adapter, Chair(scenes=scenes, scene_seed=5))
        passes.append(read_costs(tmp_path / str(len(passes)), "chair").passes)
    assert passes[1] == passes[2] > 1.1  # of tokens that were kept: some were written twice


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generation=beam"], "mitigation=backtrack goes with greedy decoding and sampling"),
        (["mitigation.threshold=2"], "mitigation.threshold=2 should be a number from 0 to 1"),
        (["mitigation.tries_per_place=0"], "mitigation.tries_per_place=0 should be a whole number of at least 1"),
        (["mitigation.tries_per_answer=1.5"], "mitigation.tries_per_answer=1.5 should be a whole number"),
        (["mitigation.detector=nowhere"], "nowhere is no directory"),
    ],
)
def test_wrong_settings_end_before_the_model_is_loaded(stethoscope, words, message):
    assert message in stethoscope("evaluate", *RUN, "model=hf", "model.model_id=nowhere", *words)


def test_models_that_lose_states_are_refused_before_they_are_loaded(tmp_path):
    from transformers import Qwen3_5Config

    tiny.build("gemma3")[0].config.save_pretrained(tmp_path / "window")
    Qwen3_5Config().save_pretrained(tmp_path / "recurrent")
    method = Backtrack(detector=str(testbed.DETECTOR_DIR))
    window, recurrent = (HfAdapter(str(tmp_path / name)) for name in ("window", "recurrent"))
    with pytest.raises(CapabilityError, match=r"layers of window keep the last 32 tokens only.*may have 64; lower"):
        window.check_mitigation(Generation(max_new_tokens=64, mitigation=method))
    window.check_mitigation(Generation(max_new_tokens=16, mitigation=method))
    with pytest.raises(CapabilityError, match=r"layers of recurrent keep a running state") as caught:
        recurrent.check_mitigation(Generation(max_new_tokens=16, mitigation=method))
    assert "\n" not in str(caught.value)
    with pytest.raises(CapabilityError, match="mitigation=backtrack changes how"):
        TinyAdapter().check_mitigation(Generation(mitigation=method))
    loaded = package.load("gemma-3-4b", random_init="tiny")  # whose prompt is longer than the window
    prompt = loaded.encode(testbed.scenes(1)[0].image(), QUESTION)
    with pytest.raises(CapabilityError, match="keep the last 32 tokens only"):
        loaded.prepare_generate([prompt], Generation(max_new_tokens=4, mitigation=method))


def test_a_detector_that_asks_is_refused(adapter):
    detector = fake_detector(["nll", "verify_odds"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(package.Detector, "load", classmethod(lambda cls, folder: detector))
        with pytest.raises(CapabilityError, match="the detector reads verify_odds, for which"):
            Backtrack().load(adapter)
