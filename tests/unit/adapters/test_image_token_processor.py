"""Prompts in chunks: the ids that SentencePiece gives piece by piece, and spans measured from them."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from stethoscope.adapters import tiny
from stethoscope.adapters.authors.minigpt4 import PROMPTS as MINIGPT4
from stethoscope.adapters.authors.processor import (
    ImageTokenEncoder,
    ImageTokenProcessor,
    PixelProcessor,
    add_placeholder,
    load_llama_tokenizer,
    squash,
)
from stethoscope.adapters.load_settings import Loading
from stethoscope.adapters.tiny.tokenizers import TEXT
from stethoscope.core.errors import ConfigError, DataError

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8))
QUESTIONS = ["Is there a dog in the image?", "a", "image", "How many café crèmes? 日本", "a  b\nc", "is <s> a token?"]


@pytest.fixture(scope="module")
def plain():
    """A tokenizer that knows nothing of images."""
    return tiny.llama_tokenizer()


@pytest.fixture(scope="module")
def processor():
    tokenizer = tiny.llama_tokenizer()
    token = add_placeholder(tokenizer, "<image>", len(tokenizer))
    return ImageTokenProcessor(tokenizer, PixelProcessor((partial(squash, size=28),)), "<image>", token, 4)


def pieces(tokenizer, *texts):
    return [
        tokenizer(text, add_special_tokens=False)["input_ids"] if isinstance(text, str) else [text] for text in texts
    ]


@pytest.mark.parametrize("question", QUESTIONS[:-1])
def test_ids_are_those_of_the_chunks(processor, plain, question):
    encoded = ImageTokenEncoder(processor, "USER: {image}\n{question} ASSISTANT:")(IMAGE, question)
    before, behind = pieces(plain, "USER: ", f"\n{question} ASSISTANT:")
    assert encoded.inputs["input_ids"].tolist() == [[1, *before, *[len(plain)] * 4, *behind]]
    assert encoded.inputs["attention_mask"].tolist() == [[1] * encoded.spans.length]
    assert encoded.text == f"USER: <image>\n{question} ASSISTANT:"
    assert encoded.question == question


def test_text_behind_a_special_token_begins_anew(processor, plain):
    encoded = ImageTokenEncoder(processor, "See.<s>[INST] <image>{question}</s>")(IMAGE, "is it?")
    parts = pieces(plain, 1, "See.", 1, "[INST] ", *[len(plain)] * 4, "is it?", 2)
    expected = [token for part in parts for token in part]
    assert encoded.inputs["input_ids"][0].tolist() == expected
    assert plain.convert_ids_to_tokens(expected)[expected.index(1, 1) + 1].startswith("▁")


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize(
    "template", ["USER: {image}{question} ASSISTANT:", "{question} <image>.", "<s>A <image>\n{question}"]
)
def test_spans(processor, template, question):
    encoded = ImageTokenEncoder(processor, template, ((2, 2),))(IMAGE, question)
    ids, spans = encoded.inputs["input_ids"][0], encoded.spans
    assert (spans.length, spans.grids) == (len(ids), ((2, 2),))
    assert list(spans.image) == (ids == processor.image_token_id).nonzero()[:, 0].tolist()
    assert len(spans.image) == 4
    decoded = processor.tokenizer.decode(ids[list(spans.question)]).strip()
    assert decoded.replace("<s>  a", "<s> a") == question  # SentencePiece puts one more space behind a special token
    assert list(spans.question) == list(range(spans.question[0], spans.question[-1] + 1))


def test_a_question_that_stands_elsewhere_too(processor):
    encoded = ImageTokenEncoder(processor, "a a {image} a {question} a")(IMAGE, "a")
    assert encoded.spans.question == (encoded.spans.length - 2,)


def test_the_processor_gives_the_encoders_inputs(processor):
    encoded = ImageTokenEncoder(processor, "USER: {image} {question}")(IMAGE, "What is it?")
    direct = processor(images=IMAGE, text=encoded.text, return_tensors="pt")
    assert set(direct) == set(encoded.inputs)
    assert all(torch.equal(value, encoded.inputs[name]) for name, value in direct.items())
    bare = processor(images=IMAGE, text=encoded.text, add_special_tokens=False)["input_ids"]
    assert torch.equal(bare, direct["input_ids"][:, 1:])


@pytest.mark.parametrize(
    "prompt", ["{question}", "{image} only", "{image} {image} {question}", "{image}{question}{question}"]
)
def test_templates_without_one_place_for_each(processor, prompt):
    with pytest.raises(ConfigError, match="once"):
        ImageTokenEncoder(processor, prompt)


def test_a_question_with_the_placeholder_is_refused(processor):
    with pytest.raises(DataError, match="placeholder"):
        ImageTokenEncoder(processor, "{image} {question}")(IMAGE, "what is <image>?")


def test_an_image_that_cannot_be_preprocessed_is_refused(processor):
    def refuses(images):
        raise ValueError("too small\nby far")

    broken = ImageTokenProcessor(processor.tokenizer, refuses, "<image>", processor.image_token_id, 4)
    with pytest.raises(DataError, match=r"40 x 30 pixels.*too small$"):
        ImageTokenEncoder(broken, "{image} {question}")(IMAGE, "what?")


def test_the_placeholder_comes_behind_all_words():
    tokenizer = tiny.llama_tokenizer()
    words = len(tokenizer) + 3
    assert add_placeholder(tokenizer, "<image>", words) == words
    assert tokenizer.convert_ids_to_tokens(words) == "<image>"
    assert "<image>" not in tokenizer.decode(tokenizer("a <unk> b", add_special_tokens=False)["input_ids"])


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    """A folder with a ``tokenizer.model`` and no more, and SentencePiece's own reader of it."""
    library = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("sentencepiece")
    text = [*TEXT, "[INST] [/INST] <Img> </Img> ###Human: ###Assistant: Please answer my questions."]
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(text * 20), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=400,
        byte_fallback=True, remove_extra_whitespaces=False, normalization_rule_name="identity",
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    return folder, library.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.mark.parametrize("question", [*QUESTIONS[:-1], " a dog?", "  two spaces", "[INST] [/INST]"])
@pytest.mark.parametrize(
    "template",
    [*MINIGPT4.values(), "USER: <ImageHere>\n{question} ASSISTANT:", "USER: <ImageHere>{question} ASSISTANT:"],
)
def test_ids_are_sentencepieces(sentencepiece, template, question):
    """As the authors' slow tokenizer works: text between special tokens goes to SentencePiece, piece by piece."""
    folder, reader = sentencepiece
    tokenizer = load_llama_tokenizer(str(folder), Loading())
    token = add_placeholder(tokenizer, "<ImageHere>", len(tokenizer))
    pixels = PixelProcessor((partial(squash, size=28),))
    encoded = ImageTokenEncoder(ImageTokenProcessor(tokenizer, pixels, "<ImageHere>", token, 1), template)(
        IMAGE, question
    )
    expected, (before, behind) = [1], encoded.text.split("<ImageHere>")
    for number, piece in enumerate(before.split("<s>")):
        expected += ([1] if number else []) + reader.encode(piece)
    ids = encoded.inputs["input_ids"][0]
    assert ids.tolist() == [*expected, reader.vocab_size(), *reader.encode(behind)]
    assert tokenizer.decode(ids[list(encoded.spans.question)]).strip() == question.strip()
