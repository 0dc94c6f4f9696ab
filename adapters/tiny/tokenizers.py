"""Build tiny tokenizers of the kinds that the families use, trained on a few sentences."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

TEXT = (
    "USER: What is in the image? ASSISTANT: A cat and a dog lie on the table.",
    "Is there a red car in the photo? Yes, there is. No, there is no car.",
    "Please describe this image in detail. The image shows two people who look at the camera.",
)
"""Training text of every tiny tokenizer."""

CHATML = (
    "{{% for m in messages %}}{{% if loop.first and m['role'] != 'system' %}}<|im_start|>system\nYou are a helpful "
    "assistant.<|im_end|>\n{{% endif %}}<|im_start|>{{{{ m['role'] }}}}\n{{% for c in m['content'] %}}"
    "{{% if c['type'] == 'image' %}}{image}{{% else %}}{{{{ c['text'] }}}}{{% endif %}}{{% endfor %}}<|im_end|>\n"
    "{{% endfor %}}{{% if add_generation_prompt %}}<|im_start|>assistant\n{{% endif %}}"
)
"""Chat template of Qwen's language models, to be formatted with the image placeholder."""


def add_special(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> None:
    """Add tokens that are never split."""
    from transformers import AddedToken

    added = [AddedToken(token, special=True, normalized=False) for token in tokens]
    tokenizer.add_tokens(added, special_tokens=True)


def llama_tokenizer(extra: Sequence[str] = (), named_tokens: Mapping[str, str] | None = None) -> LlamaTokenizer:
    """Build a tokenizer like Llama's: byte-pair encoding with SentencePiece's spaces and bytes for unknown characters.

    Args:
        extra: more tokens that are never split, such as the image placeholder.
        named_tokens: more such tokens, which the tokenizer stores as attributes, by name.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaTokenizer

    pieces = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    pieces.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=True)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces.train_from_iterator(
        TEXT * 3, trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    )
    trained = json.loads(pieces.to_str())["model"]
    merges = [tuple(merge) for merge in trained["merges"]]
    tokenizer = LlamaTokenizer(
        vocab=trained["vocab"], merges=merges, add_bos_token=True, extra_special_tokens=dict(named_tokens or {})
    )
    tokenizer.pad_token = "<unk>"
    add_special(tokenizer, extra)
    return tokenizer


def chatml_tokenizer(named_tokens: Mapping[str, str]) -> PreTrainedTokenizerFast:
    """Build a tokenizer like that of Qwen's language models: no first token, special tokens around turns."""
    return byte_tokenizer("<|endoftext|>", None, "<|im_end|>", ["<|im_start|>"], named_tokens=named_tokens)


def byte_tokenizer(
    pad: str,
    bos: str | None,
    eos: str,
    extra: Sequence[str] = (),
    add_bos: bool = False,
    named_tokens: Mapping[str, str] | None = None,
) -> PreTrainedTokenizerFast:
    """Build a tokenizer like those of GPT-2, OPT, Qwen and Llama 3: byte-pair encoding over bytes.

    Args:
        pad: token to pad with.
        bos: first token of a text, None where the family has none.
        eos: end of a turn.
        extra: more tokens that are never split, such as the image placeholder.
        add_bos: whether every text starts with ``bos``.
        named_tokens: more such tokens, which the tokenizer stores as attributes, by name.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    special = list(dict.fromkeys(token for token in (pad, bos, eos) if token))
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    pieces.train_from_iterator(TEXT * 3, trainer)
    if add_bos and bos:
        pieces.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, pieces.token_to_id(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pieces,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        extra_special_tokens=dict(named_tokens or {}),
    )
    add_special(tokenizer, extra)
    return tokenizer


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
"""Sizes of language models and of most vision towers."""


def text_sizes(tokenizer: Any, **more: Any) -> dict[str, Any]:
    """Build the arguments of a language model's configuration from ``SIZES`` and a tokenizer."""
    return {
        **SIZES,
        "vocab_size": len(tokenizer),
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **more,
    }
