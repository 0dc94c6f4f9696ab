"""Generation settings: what is refused, stop strings, seeds."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import GenerationConfig, SuppressTokensLogitsProcessor

from stethoscope.adapters.generation import SuppressTokens, build_config, drop_defaults
from stethoscope.adapters.hf import HfAdapter
from stethoscope.core.errors import ConfigError
from stethoscope.core.files import jsonable
from stethoscope.core.types import Generation
from stethoscope.mitigation.decoding import FirstLogitBoosting
from stethoscope.tracing import growing_cache
from stethoscope.tracing.growing_cache import GrowingLayer

QUESTIONS = ("Is there a dog in the image?", "Please describe this image in detail.", "Yes?")
WAYS = {
    "greedy": Generation(max_new_tokens=24),
    "sampled": Generation(max_new_tokens=24, do_sample=True, temperature=0.8, top_p=0.9, seed=4),
    "beams": Generation(max_new_tokens=24, num_beams=3),
}


@pytest.fixture(scope="module")
def adapter():
    torch.set_num_threads(1)
    adapter = HfAdapter(random_init="tiny", prompt="USER: <image>\n{question} ASSISTANT:", device="cpu")
    adapter.setup()
    return adapter


@pytest.fixture(scope="module")
def encoded(adapter):
    pixels = np.random.default_rng(0).integers(0, 255, (3, 60, 60, 3), dtype=np.uint8)
    return [adapter.encode(Image.fromarray(p), question) for p, question in zip(pixels, QUESTIONS, strict=True)]


@pytest.mark.parametrize(
    "settings", [WAYS["greedy"], WAYS["sampled"], Generation(max_new_tokens=24, mitigation=FirstLogitBoosting())]
)
def test_log_probabilities_are_those_of_the_model_before_any_processor(adapter, encoded, settings):
    """Also where sampling or a mitigation chooses from other scores; they are taken as tokens are written."""
    answers = adapter.generate(encoded, settings)
    model, arguments = adapter.prepare_generate(encoded, settings)
    arguments["generation_config"].output_logits = True  # all steps, which ``generate`` of an adapter does not keep
    output = model.generate(**arguments)
    for index, answer in enumerate(answers):
        for token, logits, logprob in zip(answer.token_ids, output.logits, answer.logprobs, strict=False):
            assert logprob == pytest.approx(float(logits[index].log_softmax(-1)[token]), abs=1e-6)
        assert (
            list(answer.token_ids) == output.sequences[index, -len(output.logits) :][: len(answer.token_ids)].tolist()
        )


class Passes:
    """Counts the forward passes of a model and the positions that they read."""

    def __init__(self, model):
        self.count = 0
        self._hook = model.register_forward_hook(lambda *_: setattr(self, "count", self.count + 1))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._hook.remove()


def middle(answer):
    """A text that starts inside a token of the answer and ends inside a later one."""
    index = next(i for i, (start, end) in enumerate(answer.offsets) if i >= 5 and end - start >= 2)
    start = answer.offsets[index][0] + 1
    stop = answer.text[start : start + 4]
    return stop, answer.text.index(stop)


@pytest.mark.parametrize("way", ["greedy", "sampled"])
def test_an_answer_ends_before_the_first_stop_string_and_stays_aligned(adapter, encoded, way):
    whole = adapter.generate(encoded[:1], WAYS[way])[0]
    stop, stop_start = middle(whole)
    with Passes(adapter.model) as passes:
        answer = adapter.generate(encoded[:1], replace(WAYS[way], stop=("never written", stop)))[0]
    kept = len(answer.token_ids)
    assert answer.text == whole.text[:stop_start]
    assert answer.finished
    assert answer.token_ids == whole.token_ids[:kept]
    assert answer.logprobs == pytest.approx(whole.logprobs[:kept])
    assert answer.offsets[:-1] == whole.offsets[: kept - 1]
    assert answer.offsets[-1] == (
        whole.offsets[kept - 1][0],
        stop_start,
    )  # the token that holds the border is cut there
    last = max(i for i, (start, _) in enumerate(whole.offsets) if start < stop_start + len(stop))
    assert passes.count == last + 1 < len(whole.token_ids)  # not one more than it takes to write the stop string
    assert adapter.trace(encoded[0], answer, ()).logits.shape[0] == kept


def test_the_earliest_of_several_stop_strings_counts(adapter, encoded):
    whole = adapter.generate(encoded[:1], WAYS["greedy"])[0]
    late, early = whole.text[20:24], whole.text[6:9]
    answer = adapter.generate(encoded[:1], replace(WAYS["greedy"], stop=(late, early)))[0]
    assert answer.text == whole.text[: min(whole.text.index(late), whole.text.index(early))]


@pytest.mark.parametrize("way", WAYS)
def test_stops_are_per_prompt_whatever_the_batch(adapter, encoded, way):
    stop = (adapter.generate(encoded[1:2], WAYS[way])[0].text[8:11],)
    generation = replace(WAYS[way], stop=stop)
    together = adapter.generate(encoded, generation)
    for answer, prompt in zip(together, encoded, strict=True):
        alone = adapter.generate([prompt], generation)[0]
        assert replace(answer, logprobs=alone.logprobs) == alone
        assert answer.logprobs == pytest.approx(alone.logprobs, abs=1e-4)
        assert stop[0] not in answer.text
    assert together[1].finished


def test_beams_that_reach_a_stop_string_are_done(adapter, encoded):
    """With every beam ended by the first letter that it may write, the search ends long before its length."""
    letters = tuple("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    with Passes(adapter.model) as passes:
        adapter.generate(encoded[:1], WAYS["beams"])
    long = passes.count
    with Passes(adapter.model) as passes:
        answer = adapter.generate(encoded[:1], replace(WAYS["beams"], stop=letters))[0]
    assert passes.count < long
    assert not set(letters) & set(answer.text)
    assert answer.finished


def test_a_family_may_have_stop_strings_of_its_own(adapter, encoded):
    whole = adapter.generate(encoded[:1], WAYS["greedy"])[0]

    class Family(HfAdapter):
        stop = (whole.text[10:13],)

    adapter = Family(random_init="tiny", device="cpu")
    assert adapter.generate(encoded[:1], WAYS["greedy"])[0].text == whole.text[: whole.text.index(whole.text[10:13])]
    earlier = replace(WAYS["greedy"], stop=(whole.text[3:5],))
    assert adapter.generate(encoded[:1], earlier)[0].text == whole.text[: whole.text.index(whole.text[3:5])]


def test_stop_strings_belong_to_the_fingerprint():
    assert jsonable(Generation(stop=["###"]))["stop"] == ["###"]
    assert Generation(stop=["###"]) == Generation(stop=("###",)) != Generation()
    assert Generation(stop=None).stop == ()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": 0.0, "do_sample": True}, "do_sample=false"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"num_beams": 0}, "num_beams=0"),
        ({"num_beams": 1.5}, "whole number"),
        ({"seed": -1}, "seed=-1"),
        ({"temperature": "hot"}, "temperature=hot"),
        ({"do_sample": "yes"}, "true or false"),
        ({"num_beams": 2, "do_sample": True}, "exclude each other"),
        ({"stop": "###"}, r"\['###'\]"),
        ({"stop": ["a", ""]}, "list of texts"),
        ({"stop": [1]}, "list of texts"),
    ],
)
def test_wrong_settings(settings, words):
    with pytest.raises(ConfigError, match=words):
        Generation(**{"max_new_tokens": 4} | settings)


def test_the_longest_answer_must_be_known_to_write_one():
    with pytest.raises(ConfigError, match="max_new_tokens must be given"):
        build_config(Generation(), [0], 0)


@pytest.fixture
def caches(monkeypatch):
    """The KV caches of all layers that grow in place, which those of all sizes do."""
    monkeypatch.setattr(growing_cache, "_SMALL", 0)
    grown, update = [], GrowingLayer.update
    monkeypatch.setattr(GrowingLayer, "update", lambda self, *states: grown.append(self) or update(self, *states))
    return grown


@pytest.mark.parametrize("tokens", [1, 24])
@pytest.mark.parametrize("way", ["greedy", "sampled"])
def test_a_growing_cache_gives_what_the_cache_of_transformers_gives(adapter, encoded, way, tokens, caches):
    settings = replace(WAYS[way], max_new_tokens=tokens)
    answers = adapter.generate(encoded, settings)
    assert caches
    caches.clear()
    model, arguments = adapter.prepare_generate(encoded, settings)
    ids = model.generate(**arguments).sequences[:, arguments["input_ids"].shape[1] :].tolist()
    assert not caches  # an argument that can be used again
    assert [answer.token_ids for answer in answers] == [
        adapter.decode_answer(row, [0.0] * len(row), settings).token_ids for row in ids
    ]


@pytest.mark.parametrize(("family", "way"), [("llava", "beams"), ("blip-2-t5", "greedy")])
def test_beams_and_encoders_have_the_cache_of_transformers(family, way, caches):
    prompt = "<image>{question}" if family == "llava" else "{question}"
    adapter = HfAdapter(random_init="tiny", family=family, prompt=prompt, device="cpu")
    adapter.generate([adapter.encode(Image.new("RGB", (40, 40)), QUESTIONS[0])], WAYS[way])
    assert not caches


@pytest.mark.parametrize("ids", [[1, 2, 3], [4, 2, 8, 9, 40], [40]])
def test_tokens_are_kept_from_being_written_as_transformers_does_it(ids):
    own, reference = SuppressTokens(ids), SuppressTokensLogitsProcessor(ids)
    for seed in range(2):
        scores = torch.randn(3, 9, generator=torch.Generator().manual_seed(seed))
        before = scores.clone()
        assert torch.equal(own(None, scores), reference(None, scores))
        assert torch.equal(scores, before)


LEAKS = {
    "bad_words_ids": [[5], [6, 7]],
    "begin_suppress_tokens": [5, 6],
    "exponential_decay_length_penalty": (1, 9.0),
    "forced_bos_token_id": 7,
    "forced_eos_token_id": 7,
    "max_time": 1e-6,
    "min_new_tokens": 23,
    "num_return_sequences": 2,
    "penalty_alpha": 0.6,
    "prompt_lookup_num_tokens": 3,
    "repetition_penalty": 5.0,
    "sequence_bias": [[[5], 50.0]],
    "stop_strings": ["a", "e"],
    "suppress_tokens": list(range(100)),
    "watermarking_config": {"bias": 9.0, "greenlist_ratio": 0.5},
}


@pytest.mark.parametrize("family", ["llava", "blip-2-opt"])  # the language model of the second generates by itself
def test_no_setting_of_a_repository_changes_an_answer(family):
    """Greedy is greedy, and beams are beams, whatever ``generation_config.json`` holds."""
    prompt = "USER: <image>\n{question} ASSISTANT:" if family == "llava" else "{question}"
    clean, full = (HfAdapter(random_init="tiny", family=family, prompt=prompt, device="cpu") for _ in range(2))
    clean.setup()
    model, processor = full._tiny()
    for module in model.modules():
        if isinstance(getattr(module, "generation_config", None), GenerationConfig):
            for name, value in LEAKS.items():
                setattr(module.generation_config, name, value)
    full._tiny = lambda: (model, processor)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8))
    for way in ("greedy", "beams"):
        expected, answer = (
            adapter.generate([adapter.encode(image, "Yes?")], WAYS[way])[0] for adapter in (clean, full)
        )
        assert answer == expected
        assert full.generation_settings(WAYS[way]) == clean.generation_settings(WAYS[way])


def test_every_setting_that_transformers_has_is_dropped_but_special_tokens(adapter):
    """Over all fields of GenerationConfig, so that those of a later version are covered or fail here."""
    model = HfAdapter(random_init="tiny", device="cpu")._tiny()[0]
    names = [name for name in vars(GenerationConfig()) if not name.startswith("_")]
    assert len(names) > 50
    for name in (*names, "of_a_later_version"):
        setattr(model.generation_config, name, 77)
    drop_defaults(model)
    kept = {name for name, value in vars(model.generation_config).items() if value == 77}
    assert kept == {"bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id"}


def test_settings_of_the_model_that_are_applied_are_listed(adapter, monkeypatch):
    before = adapter.generation_settings(WAYS["greedy"])
    assert before["num_beams"] == 1
    assert before["max_new_tokens"] == 24
    assert before["do_sample"] is False
    assert "min_new_tokens" not in before
    monkeypatch.setattr(adapter.model, "generation_config", GenerationConfig(min_new_tokens=3))
    assert adapter.generation_settings(WAYS["greedy"])["min_new_tokens"] == 3
