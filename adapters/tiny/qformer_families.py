"""Build tiny models of BLIP-2 and InstructBLIP."""

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
    """Build a BLIP-2 with OPT, which ends an answer with a line break as the published one does."""
    from transformers import OPTConfig

    tokenizer = byte_tokenizer(pad="<pad>", bos="</s>", eos="</s>", extra=("<image>",), add_bos=True)
    text = OPTConfig(
        vocab_size=len(tokenizer), **_SIZES, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=3,
        max_position_embeddings=512, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer("\n", add_special_tokens=False)["input_ids"][0],
    )  # fmt: skip
    return _blip("Blip2", text, tokenizer)


def blip2_t5() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Build a BLIP-2 with Flan-T5."""
    return _flan_t5("Blip2")


def instructblip_vicuna() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Build an InstructBLIP with Vicuna; as published, prompts begin with ``</s>``, and ``<s>`` ends an answer."""
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
    """Build an InstructBLIP with Flan-T5."""
    return _flan_t5("InstructBlip")


def _blip(name: str, text: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> tuple:
    """Build the parts around a language model: an image of 4 x 4 patches, read by ``_QUERIES`` queries.

    Args:
        name: prefix of transformers' class names, ``Blip2`` or ``InstructBlip``.
        text: configuration of the language model.
        tokenizer: of the language model.
    """
    import transformers
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    qformer_tokenizers = [bert_tokenizer()] if name == "InstructBlip" else []
    vocab_size = len(qformer_tokenizers[0]) if qformer_tokenizers else 30
    vision = getattr(transformers, f"{name}VisionConfig")(
        **_SIZES, intermediate_size=64, num_hidden_layers=3, image_size=56, patch_size=14
    )
    qformer = getattr(transformers, f"{name}QFormerConfig")(
        **_SIZES, intermediate_size=64, num_hidden_layers=4, vocab_size=vocab_size, encoder_hidden_size=32
    )
    config = getattr(transformers, f"{name}Config")(
        vision_config=vision, qformer_config=qformer, text_config=text, num_query_tokens=_QUERIES,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    images = BlipImageProcessorPil(size={"height": 56, "width": 56})
    processor = getattr(transformers, f"{name}Processor")(
        images, tokenizer, *qformer_tokenizers, num_query_tokens=_QUERIES
    )
    return getattr(transformers, f"{name}ForConditionalGeneration")(config), processor


def _flan_t5(name: str) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Build the parts around a Flan-T5: gated feed-forward, an untied head on unscaled outputs, unused token ids."""
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
    """Build a tokenizer like T5's: unigrams with SentencePiece's spaces, without line breaks or unknown characters."""
    from transformers import T5Tokenizer

    words = sorted({f"▁{word}" for text in TEXT for word in re.findall(r"[A-Za-z]+", text)})
    scores = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "▁": -3.0}
    scores |= dict.fromkeys(_characters(), -5.0)
    scores |= {word: -4.0 - 0.1 * index for index, word in enumerate(words)}
    tokenizer = T5Tokenizer(vocab=list(scores.items()), extra_ids=2)
    add_special(tokenizer, extra)
    return tokenizer


def bert_tokenizer() -> BertTokenizer:
    """Build the Q-Former's tokenizer: BERT's word pieces, and a token that begins decoded text."""
    from transformers import BertTokenizer

    letters = [letter for letter in _characters() if letter == letter.lower()]
    words = sorted({word for text in TEXT for word in re.findall(r"[a-z]+", text.lower())} - set(letters))
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, *letters, *(f"##{letter}" for letter in letters), *words]
    tokenizer = BertTokenizer(vocab={piece: index for index, piece in enumerate(pieces)})
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    return tokenizer


def _characters() -> list[str]:
    """List the letters, digits and punctuation marks that are tokens of their own."""
    return sorted({character for character in string.ascii_letters + string.digits + "".join(TEXT)} - {" "})
