"""BLIP-2 and InstructBLIP: a vision tower, a Q-Former that reads it with a few queries, and a language model."""

from __future__ import annotations

import re
import string
from typing import TYPE_CHECKING

from stethoscope.adapters.tiny.tokenizers import TEXT, add_special, byte_tokenizer, llama_tokenizer

if TYPE_CHECKING:
    from transformers import (
        BertTokenizer,
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        ProcessorMixin,
        T5Tokenizer,
    )

_SIZES = {"hidden_size": 32, "num_attention_heads": 4}
_QUERIES = 6


def blip2_opt() -> tuple[PreTrainedModel, ProcessorMixin]:
    """BLIP-2 with OPT, which ends an answer with a line break as the published one does."""
    from transformers import OPTConfig

    tokenizer = byte_tokenizer(pad="<pad>", bos="</s>", eos="</s>", extra=("<image>",), add_bos=True)
    text = OPTConfig(
        vocab_size=len(tokenizer), **_SIZES, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=3,
        max_position_embeddings=512, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer("\n", add_special_tokens=False)["input_ids"][0],
    )  # fmt: skip
    return _blip("Blip2", text, tokenizer)


def blip2_t5() -> tuple[PreTrainedModel, ProcessorMixin]:
    """BLIP-2 with Flan-T5."""
    return _flan_t5("Blip2")


def instructblip_vicuna() -> tuple[PreTrainedModel, ProcessorMixin]:
    """InstructBLIP with Vicuna; as published, prompts begin with ``</s>``, and ``<s>`` is called an end."""
    from transformers import LlamaConfig

    tokenizer = llama_tokenizer(("[PAD]", "<image>"))
    tokenizer.pad_token, tokenizer.bos_token, tokenizer.unk_token = "[PAD]", "</s>", "</s>"
    tokenizer.update_post_processor()
    text = LlamaConfig(
        vocab_size=len(tokenizer), **_SIZES, intermediate_size=64, num_hidden_layers=3, num_key_value_heads=4,
        max_position_embeddings=1024, bos_token_id=0, eos_token_id=1, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return _blip("InstructBlip", text, tokenizer)


def instructblip_t5() -> tuple[PreTrainedModel, ProcessorMixin]:
    """InstructBLIP with Flan-T5."""
    return _flan_t5("InstructBlip")


def _blip(name: str, text: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> tuple:
    """The parts around a language model; an image of 4 x 4 patches, read by ``_QUERIES`` queries.

    Args:
        name: ``Blip2`` or ``InstructBlip``, with which transformers begins the names of the classes.
    """
    import transformers
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    readers = [bert_tokenizer()] if name == "InstructBlip" else []
    words = len(readers[0]) if readers else 30
    vision = getattr(transformers, f"{name}VisionConfig")(
        **_SIZES, intermediate_size=64, num_hidden_layers=3, image_size=56, patch_size=14
    )
    bridge = getattr(transformers, f"{name}QFormerConfig")(
        **_SIZES, intermediate_size=64, num_hidden_layers=4, vocab_size=words, encoder_hidden_size=32
    )
    config = getattr(transformers, f"{name}Config")(
        vision_config=vision, qformer_config=bridge, text_config=text, num_query_tokens=_QUERIES,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    images = BlipImageProcessorPil(size={"height": 56, "width": 56})
    processor = getattr(transformers, f"{name}Processor")(images, tokenizer, *readers, num_query_tokens=_QUERIES)
    return getattr(transformers, f"{name}ForConditionalGeneration")(config), processor


def _flan_t5(name: str) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Flan-T5 as published: gated feed-forward parts, a head of its own on outputs that are not scaled, spare words."""
    from torch import nn
    from transformers import T5Config

    tokenizer = t5_tokenizer(("<image>",))
    text = T5Config(
        vocab_size=len(tokenizer) + 4, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_decoder_layers=3, num_heads=4,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0, pad_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    model, processor = _blip(name, text, tokenizer)
    head = model.language_model.lm_head
    head.weight = nn.Parameter(head.weight.detach().clone())  # transformers ties it unless a checkpoint has it
    return model, processor


def t5_tokenizer(extra: tuple[str, ...] = ()) -> T5Tokenizer:
    """T5's kind of tokenizer: unigrams with SentencePiece's spaces; line breaks and unknown characters are lost."""
    from transformers import T5Tokenizer

    words = sorted({f"▁{word}" for text in TEXT for word in re.findall(r"[A-Za-z]+", text)})
    scores = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "▁": -3.0}
    scores |= dict.fromkeys(_characters(), -5.0)
    scores |= {word: -4.0 - 0.1 * index for index, word in enumerate(words)}
    tokenizer = T5Tokenizer(vocab=list(scores.items()), extra_ids=2)
    add_special(tokenizer, extra)
    return tokenizer


def bert_tokenizer() -> BertTokenizer:
    """The Q-Former's: BERT's word pieces and a token of its own that begins decoded text."""
    from transformers import BertTokenizer

    letters = [letter for letter in _characters() if letter == letter.lower()]
    words = sorted({word for text in TEXT for word in re.findall(r"[a-z]+", text.lower())} - set(letters))
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, *letters, *(f"##{letter}" for letter in letters), *words]
    tokenizer = BertTokenizer(vocab={piece: index for index, piece in enumerate(pieces)})
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    return tokenizer


def _characters() -> list[str]:
    """Letters, figures and marks that the tokenizers know one by one."""
    return sorted({character for character in string.ascii_letters + string.digits + "".join(TEXT)} - {" "})
