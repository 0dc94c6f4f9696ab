"""The shipped model, and that training shows it exactly what inference does."""

from __future__ import annotations

import random

import pytest
import torch

from scripts.train_testbed.data import Batch, Encoder, conversations, pack, pixels
from stethoscope import testbed
from stethoscope.testbed import language
from stethoscope.testbed.vocabulary import CATEGORIES

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def processor() -> transformers.ProcessorMixin:
    return transformers.AutoProcessor.from_pretrained(testbed.MODEL_DIR)


@pytest.fixture(scope="module")
def model() -> transformers.PreTrainedModel:
    return transformers.AutoModelForImageTextToText.from_pretrained(testbed.MODEL_DIR).eval()


@pytest.fixture(scope="module")
def scene() -> testbed.Scene:
    return testbed.scenes(3)[2]


def test_size(model: transformers.PreTrainedModel) -> None:
    assert 1e6 < sum(p.numel() for p in model.parameters()) < 4e6
    assert sum(f.stat().st_size for f in testbed.MODEL_DIR.iterdir()) <= 12 * 2**20
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_it_sees_and_speaks(
    model: transformers.PreTrainedModel, processor: transformers.ProcessorMixin, scene: testbed.Scene
) -> None:
    present = scene.visible[0]
    absent = next(name for name in CATEGORIES if name not in scene.visible)
    questions = [language.pope_question(present), language.pope_question(absent), language.DETAIL_PROMPTS[0]]
    inputs = processor(
        images=[scene.image()] * 3,
        text=[language.TEMPLATE.format(question=question) for question in questions],
        padding=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        out = model.generate(**inputs, do_sample=False, max_new_tokens=120)
    answers = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answers[0].strip() in ("Yes", "No")
    assert answers[1].strip() in ("Yes", "No")
    assert answers[2].strip().endswith(".")
    assert out[2, -1] in (processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id)


def test_any_text_survives_the_tokenizer(processor: transformers.ProcessorMixin) -> None:
    text = "Zürich 東京 🩺\n\ttabs"
    tokenizer = processor.tokenizer
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_training_tokens_equal_those_of_the_processor(
    processor: transformers.ProcessorMixin, scene: testbed.Scene
) -> None:
    encoder, image = Encoder(processor.tokenizer), scene.image()
    asked = [*language.DETAIL_PROMPTS, *(language.pope_question(name) + language.ONE_WORD for name in CATEGORIES[::5])]
    for question in asked:
        text = language.TEMPLATE.format(question=question)
        inputs = processor(images=image, text=text, return_tensors="pt")
        mine = [*encoder.prefix(), *encoder.encode(f"\n{question} ASSISTANT:")]
        assert inputs["input_ids"][0].tolist() == mine
    torch.testing.assert_close(pixels(_array(scene)[None]), inputs["pixel_values"])


def test_question_branch_equals_its_text(processor: transformers.ProcessorMixin, scene: testbed.Scene) -> None:
    encoder, rng = Encoder(processor.tokenizer), random.Random(0)
    for question in language.yes_no_questions(scene, rng, 60):
        branch = encoder.question(question)
        whole = f"\n{question.text} ASSISTANT: {question.answer}"
        assert processor.tokenizer.decode(branch.ids[:-1]) == whole
        assert branch.ids[:-1] == processor.tokenizer.encode(whole, add_special_tokens=False)
        last_word = processor.tokenizer.decode(branch.ids[branch.object_at]).strip()
        assert last_word
        assert question.object.endswith(last_word)


def test_new_names_point_at_first_mentions(processor: transformers.ProcessorMixin, scene: testbed.Scene) -> None:
    encoder = Encoder(processor.tokenizer)
    text = "The image shows a park with a potted plant and a dog. The dog is next to the potted plant."
    branch = encoder.caption("Describe.", text, ("dog", "potted plant", "kite"))
    names = {name: processor.tokenizer.decode(branch.ids[index]) for name, index in branch.new_names.items()}
    assert names == {"potted plant": " potted", "dog": " dog"}
    batch = pack([encoder.prefix()], [[branch]], encoder.pad)
    left = [{name for name, here in zip(CATEGORIES, row, strict=True) if here} for row in batch.untold[0].tolist()]
    offset = len(encoder.prefix())
    assert left[offset + branch.prompt - 1] == {"dog", "potted plant", "kite"}
    assert left[offset + branch.new_names["dog"] - 1] == {"dog", "kite"}
    assert left[offset + branch.new_names["dog"]] == left[-1] == {"kite"}


def test_packed_branches_equal_single_conversations(
    model: transformers.PreTrainedModel, processor: transformers.ProcessorMixin, scene: testbed.Scene
) -> None:
    encoder = Encoder(processor.tokenizer)
    branches = conversations(encoder, scene, random.Random(1), room=132)
    assert len(branches) >= 3
    alone = [encoder.prefix() + branch.ids for branch in branches]
    picture = pixels(_array(scene)[None])
    packed = _packed_logits(model, picture, encoder, pack([encoder.prefix()], [branches], encoder.pad))
    offset = len(encoder.prefix())
    for ids, branch in zip(alone, branches, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), pixel_values=picture).logits[0, len(encoder.prefix()) :]
        torch.testing.assert_close(packed[offset : offset + len(branch.ids)], logits, atol=2e-4, rtol=1e-3)
        offset += len(branch.ids)


def _array(scene: testbed.Scene):
    import numpy as np

    return np.asarray(scene.image())


def _packed_logits(
    model: transformers.PreTrainedModel, picture: torch.Tensor, encoder: Encoder, batch: Batch
) -> torch.Tensor:
    with torch.no_grad():
        seen = model.model.multi_modal_projector(model.model.vision_tower(picture).last_hidden_state[:, 1:])
        embedded = model.get_input_embeddings()(batch.ids)
        embedded = embedded.masked_scatter((batch.ids == encoder.image).unsqueeze(-1), seen)
        hidden = model.model.language_model(
            inputs_embeds=embedded, attention_mask=batch.mask, position_ids=batch.positions
        ).last_hidden_state
        return model.lm_head(hidden)[0]
