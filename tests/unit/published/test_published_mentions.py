"""What is asked and hidden for every mention, transcribed: one question, one picture, one plain pass at a time."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers.plain_pass import PICTURE, TOLERANCE, load
from PIL import Image

from stethoscope.core.errors import CapabilityError
from stethoscope.core.types import Answer, Generation, Mention
from stethoscope.features import FeatureSet
from stethoscope.tracing.mention_passes import Resampling, question, reply_ids, trace_answers
from stethoscope.tracing.trace import Spans, Trace

SQUARE = Image.fromarray(np.random.default_rng(1).integers(0, 255, (140, 140, 3), dtype=np.uint8))
FEATURES = FeatureSet(["verification", "verify_states", "masked"], ["nll"])
NAMES = ("verify_yes", "verify_odds", "masked_prob", "masked_drop")


@pytest.fixture(scope="module")
def square(adapter):
    """An answer about a picture that the processor leaves as large as it is: ten by ten patches of fourteen pixels."""
    encoded = adapter.encode(SQUARE, "Please describe this image in detail.")
    answer = adapter.generate([encoded], Generation(max_new_tokens=8, do_sample=True, temperature=3.0, seed=2))[0]
    starts = [start for start, _ in answer.offsets]
    ends = [end for _, end in answer.offsets]
    mentions = (
        Mention(starts[1], ends[2], "dog", 1, 0, 0),
        Mention(starts[4], ends[4], "orange", 0, 1, 0),
        Mention(starts[6], ends[6], "dog", 1, 2, 1),
    )
    return encoded, answer, mentions


OWNERS = [None, "dog", "dog", None, "orange", None, "dog", None]


@pytest.fixture(scope="module")
def computed(adapter, square):
    encoded, answer, mentions = square
    assert [mention and mention.object for mention in answer.owners(mentions)] == OWNERS
    return FEATURES.compute(trace_answers(adapter, [encoded], [answer], FEATURES.requires, [SQUARE], [mentions])[0])


def eager(adapter, picture, text, ids=(), **options):
    encoded = adapter.encode(picture, text)
    inputs = dict(encoded.inputs)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([ids], dtype=torch.long)], 1)
    inputs["attention_mask"] = options.pop("attention_mask", torch.ones_like(inputs["input_ids"]))
    adapter.model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            return adapter.model(**inputs, **options)
    finally:
        adapter.model.set_attn_implementation("sdpa")


def same(values, expected):
    expected = [math.nan if value is None else value for value in expected]
    np.testing.assert_allclose(values, expected, rtol=TOLERANCE, atol=TOLERANCE)


def words(adapter, word):
    """Ids of the vocabulary's entries that are the word, in any case and with or without a blank before."""
    spelt = [blank + spelling for spelling in (word, word.title(), word.upper()) for blank in ("", "▁")]
    vocabulary = adapter.processor.tokenizer.get_vocab()
    return [vocabulary[spelling] for spelling in spelt if spelling in vocabulary]


def test_self_verification(adapter, square, computed):
    """Every sub-token and every later mention of an object has its one answer."""
    texts = {"dog": "Is there a dog in the image?", "orange": "Is there an orange in the image?"}
    asked = {None: None}
    for name, text in texts.items():
        row = eager(adapter, SQUARE, text).logits[0, -1].double().softmax(-1).tolist()
        yes, no = (sum(row[index] for index in words(adapter, word)) for word in ("yes", "no"))
        asked[name] = yes / (yes + no)
    assert asked["dog"] != pytest.approx(asked["orange"], abs=1e-4)
    same(computed["verify_yes"], [asked[name] for name in OWNERS])
    same(computed["verify_odds"], [name and math.log(asked[name] / (1 - asked[name])) for name in OWNERS])


class Knocked:
    """Attention masks, by hand, of a pass in which no position after the image sees it."""

    def __init__(self, spans, length):
        self.mask = torch.full((1, 1, length, length), float("-inf"), dtype=torch.float64).triu(1)
        last = spans.image[-1]
        self.mask[..., last + 1 :, list(spans.image)] = float("-inf")


def test_states_of_the_question(adapter, square, computed):
    """At layers 4, 6, 8, 11 and 13 of 17; without the image the picture's pixels do not matter."""
    texts = {"dog": "Is there a dog in the image?", "orange": "Is there an orange in the image?"}
    layers, states, without = [round(layer / 32 * 17) for layer in (8, 12, 16, 20, 24)], {}, {}
    assert layers == [4, 6, 8, 11, 13]
    grey = Image.new("RGB", (140, 140), "grey")
    for name, text in texts.items():
        states[name] = [s[0, -1] for s in eager(adapter, SQUARE, text, output_hidden_states=True).hidden_states]
        encoded = adapter.encode(grey, text)
        mask = Knocked(encoded.spans, encoded.spans.length).mask
        output = eager(adapter, grey, text, attention_mask=mask, output_hidden_states=True)
        without[name] = [s[0, -1] for s in output.hidden_states]
    assert not torch.allclose(states["dog"][13], without["dog"][13], atol=1e-3)
    width = states["dog"][0].shape[-1]
    nothing = [math.nan] * width
    for index, layer in enumerate(layers):
        for name, values in (("verify_state", states), ("verify_state_without", without)):
            expected = [values[owner][layer].tolist() if owner else nothing for owner in OWNERS]
            columns = [computed[f"{name}_l{index:02d}_d{dimension:04d}"] for dimension in range(width)]
            np.testing.assert_allclose(np.stack(columns, 1), expected, rtol=TOLERANCE, atol=TOLERANCE)
            change = [computed[f"verify_state_change_l{index:02d}_d{dimension:04d}"] for dimension in range(width)]
        expected = [(states[owner][layer] - without[owner][layer]).tolist() if owner else nothing for owner in OWNERS]
        np.testing.assert_allclose(np.stack(change, 1), expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert "verify_state_l05_d0000" not in computed


def attended_patches(maps, spans, row):
    """CADMP's patches: of the layer before the sharpest change of the head-mean attention over the image."""
    layers = [[float(layer[:, row, column].mean()) for column in spans.image] for layer in maps]
    layers = [[value / sum(values) for value in values] for values in layers]
    drifts = [sum(p * math.log(p / q) for p, q in zip(here, before, strict=True)) for before, here in pairwise(layers)]
    sharpest = drifts.index(max(drifts)) + 1
    values = layers[sharpest - 1]
    ordered, rank = sorted(values), 0.7 * (len(values) - 1)
    low = int(rank)
    limit = ordered[low] + (rank - low) * (ordered[low + 1] - ordered[low])
    return [index for index, value in enumerate(values) if value >= limit]


def test_masked_pass(adapter, square, computed):
    encoded, answer, _ = square
    maps = eager(adapter, SQUARE, encoded.question, answer.token_ids, output_attentions=True).attentions
    maps, ids, drops, masked = torch.stack(maps)[:, 0].double(), answer.token_ids, [], []
    for token, name in enumerate(OWNERS):
        pixels = np.array(SQUARE)
        if name is not None:
            for patch in attended_patches(maps, encoded.spans, encoded.spans.length + token - 1):
                top, left = 14 * (patch // 10), 14 * (patch % 10)
                pixels[top : top + 14, left : left + 14] = 128
            row = eager(adapter, Image.fromarray(pixels), encoded.question, ids[:token]).logits[0, -1]
            masked.append(float(row.double().softmax(-1)[ids[token]]))
            drops.append(math.exp(-computed["nll"][token]) - masked[-1])
        else:
            masked.append(None)
            drops.append(None)
    assert np.nanmax(np.abs(computed["masked_drop"])) > 1e-5
    same(computed["masked_prob"], masked)
    same(computed["masked_drop"], drops)


def test_words_of_the_question():
    assert [question(name) for name in ("umbrella", "hair drier")] == [
        "Is there an umbrella in the image?", "Is there a hair drier in the image?"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "prompt"),
    [("qwen2_vl", None), ("blip-2-t5", "Question: {question} Answer:"), ("internvl", None), ("idefics3", None)],
)
def test_other_families_are_asked_too(family, prompt):
    adapter = load(family, prompt)
    encoded = adapter.encode(PICTURE, "What is there?")
    answer = adapter.generate([encoded], Generation(max_new_tokens=3, do_sample=True, seed=1))[0]
    yes, no = reply_ids(adapter, encoded)
    assert yes
    assert no
    assert not set(yes) & set(no)
    mention = Mention(answer.offsets[-1][0], max(answer.offsets[-1][1], answer.offsets[-1][0] + 1), "dog", 1)
    features = FeatureSet(["verify_states"], ["verify_yes"])
    both = []
    for picture in (PICTURE, PICTURE.point(lambda value: 255 - value)):
        encoded = adapter.encode(picture, "What is there?")
        stored = adapter._tracer._contrasts._hidden_image_states
        stored._values.values.clear()  # so that nothing is taken from the other picture
        both.append(
            features.compute(trace_answers(adapter, [encoded], [answer], features.requires, [picture], [[mention]])[0])
        )
    assert np.isfinite(both[0]["verify_yes"]).sum() >= 1
    hidden, shown = (
        [[c[n] for n in c if n.startswith(f"{name}_l")] for c in both]
        for name in ("verify_state_without", "verify_state")
    )
    np.testing.assert_allclose(*hidden, atol=1e-5)
    assert np.nanmax(np.abs(np.subtract(*shown))) > 1e-3
    if family == "blip-2-t5":
        with pytest.raises(CapabilityError, match=r"exclude=\[masked\]"):
            trace_answers(adapter, [encoded], [answer], FEATURES.requires, [PICTURE], [[mention]])


def test_nothing_named_costs_nothing(adapter, square):
    encoded, answer, _ = square
    trace = trace_answers(adapter, [encoded], [answer], FEATURES.requires, [SQUARE], [()])[0]
    columns = FEATURES.compute(trace)
    assert all(np.isnan(columns[name]).all() for name in NAMES)
    assert np.isnan(columns["verify_state_l04_d0000"]).all()


def test_sampled_answers():
    """Five answers, one at a time, whose "objects" are read off their ids; the answer's own seed is not used."""
    adapter = load("internvl", None)  # whose distributions are flat, unlike those of the deep one
    own = Generation(max_new_tokens=6, do_sample=True, temperature=3.0, seed=2)
    other, encoded = adapter.encode(PICTURE, "What is it?"), adapter.encode(SQUARE, "What is there?")
    answer = adapter.generate([encoded], own)[0]
    half = answer.offsets[3][0]
    mentions = (Mention(0, half, "dog", 1, 0, 0), Mention(half, len(answer.text), "orange", 0, 1, 0))

    def read(sample):
        return {"dog"} if sum(sample.token_ids) % 2 else {"orange", "sofa"}

    features, both = FeatureSet(["sampling"]), Resampling(own, [read, read])
    prompts, pictures = [other, encoded], [PICTURE, SQUARE]
    traces = trace_answers(adapter, prompts, [answer] * 2, features.requires, pictures, [mentions[:0], mentions], both)
    samples = [adapter.generate([encoded], Generation(6, True, 1.0, seed=seed))[0] for seed in (3, 4, 5, 6, 7)]
    dogs = sum(sum(sample.token_ids) % 2 for sample in samples) / 5
    assert 0 < dogs < 1
    shares, columns = {"dog": dogs, "orange": 1 - dogs}, features.compute(traces[1])
    owners = [owner and owner.object for owner in answer.owners(mentions)]
    assert {"dog", "orange"} <= set(owners)
    same(columns["sample_agreement"], [shares.get(name) for name in owners])
    disorder = -dogs * math.log(dogs) - (1 - dogs) * math.log(1 - dogs)
    same(columns["sample_entropy"], [name and disorder for name in owners])
    assert np.isnan(features.compute(traces[0])["sample_agreement"]).all()
    with pytest.raises(CapabilityError, match="extractor"):
        trace_answers(adapter, [encoded], [answer], {"samples"}, [SQUARE], [mentions])


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0.0), (1.0, 0.0), (0.5, math.log(2))])
def test_agreed_answers_have_no_entropy(share, expected):
    trace = Trace(
        Answer("a", (0,), ((0, 1),), (0.0,)), Spans(1, (0,), ()), torch.zeros(1, 2), named_share=torch.tensor([share])
    )
    assert FeatureSet(["sampling"]).compute(trace)["sample_entropy"][0] == pytest.approx(expected)
