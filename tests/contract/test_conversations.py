"""A second question about a picture: the prompt holds the first with its answer, and everything is of the second."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import brute_force
from helpers.contract_helpers import (
    CONFIGS,
    attention,
    configured,
    extended,
    load,
    others_slow,
    picture,
    predicting,
)
from hydra.utils import instantiate

import stethoscope
import stethoscope.conf
from stethoscope import testbed
from stethoscope.adapters.hf import HfAdapter
from stethoscope.adapters.testbed import TestbedAdapter
from stethoscope.core.errors import CapabilityError, ConfigError, DataError
from stethoscope.core.types import Generation
from stethoscope.relevancy import token_relevancy

HISTORY = [("What is on the table?", "A cup and a plate."), ("Is the cup red?", " No, it is blue.\n")]
QUESTION = "Is there a dog in the image?"
ONE_TURN = ("blip2-flan-t5-xl", "blip2-opt-2.7b", "instructblip-flan-t5-xl", "instructblip-vicuna-7b", "paligemma-3b",
            "paligemma2-3b", "testbed")  # fmt: skip
SEVERAL = [
    "llava-1.5-7b", "llava-1.6-mistral-7b", "llava-1.6-vicuna-7b", "llava-onevision-0.5b", "qwen2-vl-2b",
    "qwen2.5-vl-3b", "qwen3-vl-4b", "internvl3-1b", "gemma-3-4b", "idefics3-8b", "smolvlm2-500m", "convllava-768",
    "minigpt4-vicuna-7b", "minigpt4-llama2-7b", "mplug-owl2-7b",
]  # fmt: skip
OWN = {  # as the authors' code joins turns
    "llava-1.5-7b": "USER: <image>\nA? ASSISTANT: B.</s>USER: C? ASSISTANT:",
    "mplug-owl2-7b": "USER: <|image|>A? ASSISTANT: B.</s>USER: C? ASSISTANT:",
    "minigpt4-vicuna-7b": "###Human: <Img><ImageHere></Img> A?###Assistant: B.###Human: C?###Assistant: ",
    "minigpt4-llama2-7b": "<s>[INST] <Img><ImageHere></Img> A? [/INST] B.<s>[INST] C? [/INST] ",
}
FOLLOW_UP = "</s>USER: {question} ASSISTANT:"


@pytest.fixture(scope="module", params=[*others_slow(SEVERAL), "testbed, trained"])
def adapter(request):
    """An adapter that takes several turns; the embedded model as one that is told how."""
    if request.param.startswith("testbed"):
        built = TestbedAdapter(follow_up=FOLLOW_UP, device="cpu", threads=1)
        built.setup()
        return built
    return load(request.param, "model.random_init=tiny")


@pytest.fixture(scope="module")
def first(adapter):
    return adapter.encode(picture(0), QUESTION)


@pytest.fixture(scope="module")
def second(adapter):
    return adapter.encode(picture(0), QUESTION, HISTORY)


@pytest.fixture(scope="module")
def answer(adapter, second):
    return adapter.generate([second], Generation(max_new_tokens=5))[0]


def test_every_configuration_takes_several_turns_or_is_known_to_take_one():
    one_turn = set()
    for name in CONFIGS:
        settings = yaml.safe_load((Path(stethoscope.conf.__file__).parent / "model" / f"{name}.yaml").read_text())
        if name != "hf" and settings.get("prompt", "") is not None and "follow_up" not in settings:
            one_turn.add(settings.get("family", name))
    assert one_turn == {"blip-2-t5", "blip-2-opt", "instructblip-t5", "instructblip-vicuna", "paligemma", "paligemma2",
                        "testbed"}  # fmt: skip


def test_the_prompt_is_what_the_processor_makes_of_the_conversation(adapter, second):
    processor = adapter.processor
    if getattr(processor, "chat_template", None) and adapter.prompt is None:
        turns = []
        for number, (question, reply) in enumerate([*HISTORY, (QUESTION, None)]):
            parts = [{"type": "text", "text": question}]
            turns.append({"role": "user", "content": [*([] if number else [{"type": "image"}]), *parts]})
            if reply is not None:
                turns.append({"role": "assistant", "content": [{"type": "text", "text": reply.strip()}]})
        assert second.text == processor.apply_chat_template(turns, add_generation_prompt=True)
    begun = second.text.startswith(processor.tokenizer.bos_token or " ")
    direct = processor(images=picture(0), text=second.text, return_tensors="pt", add_special_tokens=not begun)
    if not adapter.pad:
        assert all(torch.equal(value, second.inputs[name]) for name, value in direct.items())
    assert second.history == tuple(HISTORY)
    assert "turn 3" in repr(second)


def test_spans_are_those_of_the_last_question(adapter, first, second):
    ids = second.inputs["input_ids"][0]
    assert second.spans.image == first.spans.image
    assert second.spans.grids == first.spans.grids
    assert second.spans.length == len(ids) > first.spans.length
    asked = ids[list(second.spans.question)]
    assert adapter.processor.tokenizer.decode(asked).strip() == QUESTION
    assert len(asked) == len(first.spans.question)
    assert min(second.spans.question) > max(second.spans.image)
    assert second.sha256 != first.sha256
    assert adapter.encode(picture(0), QUESTION).sha256 == first.sha256
    assert adapter.encode(picture(0), QUESTION, HISTORY).sha256 == second.sha256
    assert adapter.encode(picture(0), QUESTION, HISTORY[:1]).sha256 not in (first.sha256, second.sha256)


def test_a_trace_is_that_of_a_whole_plain_pass(adapter, second, answer):
    trace = adapter.trace(second, answer)
    rows = predicting(adapter, second, answer.token_ids)
    with attention(adapter.model, "eager"), torch.no_grad():
        inputs = extended(adapter, second, answer.token_ids)
        output = adapter.model(**inputs, output_attentions=True)
    output = output.get("language_model_outputs") or output
    assert (trace.logits - output.logits[0, rows]).abs().max() <= 1e-4
    maps = torch.stack(output.attentions)[:, 0, :, rows].permute(2, 0, 1, 3)
    assert (trace.image_attention - maps[..., list(second.spans.image)].mean(2)).abs().max() <= 1e-5
    asked = maps[..., list(second.spans.question)].sum(-1)
    assert (trace.mass[..., 1] - asked).abs().max() <= 1e-5


def test_relevancy_is_that_of_the_definitions(adapter, second, answer):
    if adapter.model.config.model_type not in ("llava", "qwen2_vl", "mplug_owl2"):
        pytest.skip("one of a kind is enough")
    diagnosis = stethoscope.diagnose(adapter, picture(0), QUESTION, answer, history=HISTORY)
    assert diagnosis.history == tuple(HISTORY)
    model, inputs = adapter.forward_inputs(second, answer.token_ids)
    expected, _ = brute_force.language(model, dict(inputs), list(answer.token_ids), "row")
    image = expected[..., list(second.spans.image)]
    assert brute_force.error(diagnosis.relevancy.image, image) < 1e-3
    alone = token_relevancy(adapter, picture(0), QUESTION, answer, history=HISTORY)
    assert torch.equal(torch.as_tensor(alone.question_positions), torch.as_tensor(second.spans.question))
    assert brute_force.error(alone.image, image) < 1e-3
    assert diagnosis.heat_map(0).shape == (56, 72)
    assert diagnosis.to_dict()["history"] == [list(turn) for turn in HISTORY]


def test_a_stream_reads_the_history_too(adapter, answer):
    events = list(
        stethoscope.stream(adapter, picture(0), QUESTION, history=HISTORY, generation=Generation(max_new_tokens=5))
    )
    assert events[-1].answer.token_ids == answer.token_ids


@pytest.mark.parametrize("name", [*OWN])
def test_prompts_of_several_turns_are_the_authors(name):
    adapter = instantiate(configured(name, "model.random_init=tiny"))
    assert adapter.encode(picture(0), "C?", [("A?", "B.")]).text.endswith(OWN[name])


@pytest.mark.parametrize("name", others_slow(ONE_TURN))
def test_a_model_of_one_turn_says_so(name):
    adapter = instantiate(configured(name, "model.random_init=tiny"))
    with pytest.raises(CapabilityError, match=f"{name} is asked one question at a time"):
        adapter.encode(picture(0), QUESTION, HISTORY)
    with pytest.raises(CapabilityError, match="one question at a time"):
        stethoscope.diagnose(adapter, picture(0), QUESTION, history=HISTORY)
    with pytest.raises(CapabilityError, match="one question at a time"):
        token_relevancy(adapter, picture(0), QUESTION, "A dog.", history=HISTORY)


def test_a_chat_template_that_drops_turns_is_one_for_single_questions():
    adapter = HfAdapter(random_init="tiny", family="llava", device="cpu")
    _, processor = adapter._seeded_tiny()
    processor.chat_template = "USER: <image>\n{{ messages[-1]['content'][-1]['text'] }} ASSISTANT:"
    adapter._tiny = lambda: (adapter_model, processor)
    adapter_model = HfAdapter(random_init="tiny", family="llava", device="cpu").model
    with pytest.raises(CapabilityError, match="its chat template writes no earlier turns"):
        adapter.encode(picture(0), QUESTION, HISTORY)


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ("before", r"history should be a list of earlier turns, \[\(question, answer\), ...\], got str"),
        (5, "history should be a list of earlier turns.*got int"),
        (np.array([["Is it?", "Yes."]]), "history should be a list of earlier turns.*got ndarray"),
        (["What?"], r"turn 1 of the history should be a pair \(question, answer\), got 'What\?'"),
        ([("a?", "b"), ("What?",)], "turn 2 of the history should be a pair"),
        ([("What?", None)], "the answer of turn 1 of the history should be a text, got NoneType"),
        ([(" ", "Yes.")], "the question of turn 1 of the history is empty"),
        ([("What?", "")], "the answer of turn 1 of the history is empty; leave the turn out"),
    ],
)
def test_a_wrong_history_is_one_line(history, message):
    adapter = load("llava-1.5-7b", "model.random_init=tiny")
    with pytest.raises(ConfigError, match=message):
        adapter.encode(picture(0), QUESTION, history)


def test_a_history_that_is_too_long_or_holds_a_picture_is_refused():
    adapter = load("llava-1.5-7b", "model.random_init=tiny")
    with pytest.raises(DataError, match=r"with 1 earlier turn; llava-1\.5-7b reads fewer than"):
        adapter.encode(picture(0), QUESTION, [("a b " * 2000, "Yes.")])
    with pytest.raises(DataError, match="the answer of turn 1 holds the image placeholder"):
        adapter.encode(picture(0), QUESTION, [("What?", "an <image>")])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"follow_up": "USER:", "prompt": "{image} {question}"}, "model.follow_up='USER:' must hold {question} once"),
        ({"follow_up": 5, "prompt": "{image} {question}"}, "model.follow_up=5 must hold {question} once"),
        ({"follow_up": "{question}"}, "the chat template writes its own turns"),
    ],
)
def test_a_wrong_follow_up_is_one_line(settings, message):
    with pytest.raises(ConfigError, match=message.replace("{", r"\{")):
        HfAdapter(random_init="tiny", **settings)


def test_no_probability_is_called_calibrated_behind_a_history():
    adapter = TestbedAdapter(follow_up=FOLLOW_UP, device="cpu", threads=1)
    image, text = testbed.scenes(1)[0].image(), "There is a cat and a boat."
    later = stethoscope.diagnose(adapter, image, QUESTION, text, testbed.DETECTOR_DIR, history=HISTORY)
    assert later.mentions[0].verdict is not None
    assert later.calibration == "shifted"
    assert later.shift.startswith("This answers a follow-up question.")


@pytest.mark.slow
def test_the_embedded_model_is_worse_behind_a_description_and_so_asked_one_question_at_a_time():
    """Of 120 questions about objects that are there or not: 94 % right alone, 75 % behind a description."""
    adapter = TestbedAdapter(follow_up=FOLLOW_UP, device="cpu", threads=1)
    scenes = testbed.scenes(60)
    every = sorted({name for scene in scenes for name in scene.visible})
    describe = "Please describe this image in detail."
    right = {"alone": 0, "behind": 0}
    for number, scene in enumerate(scenes):
        absent = [name for name in every if name not in scene.visible]
        image = scene.image()
        text = adapter.generate([adapter.encode(image, describe)], Generation(max_new_tokens=128))[0].text
        for name, truth in ((scene.visible[0], "Yes"), (absent[number % len(absent)], "No")):
            asked = f"Is there a {name} in the image?"
            prompts = [adapter.encode(image, asked), adapter.encode(image, asked, [(describe, text)])]
            for kind, reply in zip(right, adapter.generate(prompts, Generation(max_new_tokens=4)), strict=True):
                right[kind] += reply.text.startswith(truth)
    print(right)
    assert right["alone"] > 105
    assert right["behind"] < right["alone"] - 10
