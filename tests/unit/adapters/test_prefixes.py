"""Prefixes of prompts: what is common to them, what becomes of a run's answers, and who goes the ordinary way."""

import json

import pytest
import torch
from helpers.contract_helpers import picture

import stethoscope
from stethoscope import Evaluator
from stethoscope.adapters.forward import ForwardRunner
from stethoscope.adapters.hf import HfAdapter
from stethoscope.adapters.prefixes import SharedPrefixes
from stethoscope.core.types import Generation
from stethoscope.tasks.pope import Pope

QUESTIONS = ("Is there a dog in the image?", "Is there a cat in the image?")


@pytest.fixture(scope="module")
def testbed():
    return stethoscope.load("testbed", threads=1)


def lines(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_a_run_has_the_answers_of_each_question_by_itself_in_the_order_of_the_task(testbed, tmp_path, monkeypatch):
    def run(name, batch_size, *limits):
        for limit in limits:
            Evaluator(batch_size=batch_size, limit=limit, run_dir=tmp_path / name).run(testbed, Pope(scenes=3))
        return lines(tmp_path / name)

    resumed = run("resumed", 16, 7, 29, None)  # the rest of every picture's questions, more at a time
    together = run("together", 32, None)
    monkeypatch.setattr(SharedPrefixes, "compute", lambda self, encoded: None)
    ordinary = run("ordinary", 32, None)
    for shared in (resumed, together):
        for line, expected in zip(shared, ordinary, strict=True):
            logprobs = line["answer"].pop("logprobs")
            assert logprobs == pytest.approx(expected["answer"]["logprobs"], abs=1e-5)
            assert line.pop("seconds").keys() == expected["seconds"].keys()
            assert line["answer"].items() <= expected["answer"].items()
            assert {**line, "answer": None}.items() <= {**expected, "answer": None}.items()


def test_the_image_tokens_of_a_picture_go_from_batch_to_batch(testbed, monkeypatch):
    """Traces that need them read no picture again, though the first questions go on from the batch before."""
    prompts = [testbed.encode(picture(0), question) for question in QUESTIONS]
    monkeypatch.setattr(ForwardRunner, "read_embeds", None)  # a call would fail
    with testbed.sharing_prefixes():
        for _ in range(3):
            answers, cached = testbed.generate_with_cache(prompts, Generation(max_new_tokens=4))
            traces = testbed.trace_batch(cached, answers, ["hidden"])
            assert all(torch.equal(trace.image_embeds, traces[0].image_embeds) for trace in traces)


def test_prefixes_end_before_the_questions_differ(testbed):
    prompts = [testbed.encode(picture(1), question) for question in QUESTIONS]
    ids = [prompt.inputs["input_ids"][0].tolist() for prompt in prompts]
    first, second = testbed._generator.prefixes.compute(prompts)
    assert first.cache is second.cache
    assert ids[0][: first.length] == ids[1][: first.length]
    assert ids[0][first.length] != ids[1][first.length]
    assert first.length > max(prompts[0].spans.image)


def test_text_before_the_picture_that_differs_leaves_nothing_to_share():
    adapter = HfAdapter(random_init="tiny", prompt="{question} {image} Answer:", device="cpu")
    prompts = [adapter.encode(picture(1), question) for question in QUESTIONS]
    assert adapter._generator.prefixes.compute(prompts) is None
    answers = adapter.generate(prompts, Generation(max_new_tokens=3))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert adapter.generate([prompt], Generation(max_new_tokens=3))[0].token_ids == answer.token_ids


def test_models_that_drop_keys_go_the_ordinary_way():
    class Sliding(HfAdapter):
        def _tiny(self):
            model, processor = super()._tiny()
            model.config.text_config.sliding_window = 8
            return model, processor

    adapter = Sliding(random_init="tiny", family="llava_next", device="cpu")
    assert not adapter.can_share_prefixes()
    prompts = [adapter.encode(picture(1), question) for question in QUESTIONS]
    assert adapter._generator.prefixes.compute(prompts) is None
    answers, kept = adapter.generate_with_cache(prompts, Generation(max_new_tokens=3))
    assert [prompt.cache for prompt in kept] == [None, None]
    assert len(answers) == 2
