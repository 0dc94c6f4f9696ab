"""What tiny models have in common."""

from __future__ import annotations

from typing import Any

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
"""Of language models and of most vision towers."""


def words(tokenizer: Any, **more: Any) -> dict[str, Any]:
    """What a tokenizer and ``SIZES`` say about a language model: arguments of its config."""
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
