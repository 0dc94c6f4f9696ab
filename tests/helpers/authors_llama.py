"""Llama as ConvLLaVA's and mPLUG-Owl2's files have it, with one way or two, and the model in plain torch."""

import json

import torch
from torch.nn import functional as F

from helpers.authors_minigpt4 import Draw
from stethoscope.adapters.tiny import llama_tokenizer

WIDTH, HEADS, KEYS, LAYERS, INNER, EPS = 40, 4, 2, 3, 56, 1e-5
TWO_WAYS = ("self_attn.k_proj", "self_attn.v_proj", "input_layernorm", "post_attention_layernorm")


def config(words):
    """The language model's part of ``config.json``, with what else the authors' files hold."""
    return {
        "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": KEYS, "rms_norm_eps": EPS, "vocab_size": words, "max_position_embeddings": 1024,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "hidden_act": "silu", "rope_scaling": None,
        "pretraining_tp": 1, "torch_dtype": "float16", "transformers_version": "4.31.0", "use_cache": True,
    }  # fmt: skip


def weights(words, ways=1, seed=4):
    """Tensors by the authors' names."""
    draw, size = Draw(seed), WIDTH // HEADS
    held = {"model.embed_tokens.weight": draw(words, WIDTH), "lm_head.weight": draw(words, WIDTH)}
    held |= {"model.norm.weight": draw(WIDTH, around=1.0)}
    for number in range(LAYERS):
        shapes = {"self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (KEYS * size, WIDTH)}
        shapes |= {"self_attn.v_proj": (KEYS * size, WIDTH), "self_attn.o_proj": (WIDTH, WIDTH)}
        shapes |= {"mlp.gate_proj": (INNER, WIDTH), "mlp.up_proj": (INNER, WIDTH), "mlp.down_proj": (WIDTH, INNER)}
        shapes |= {"input_layernorm": (WIDTH,), "post_attention_layernorm": (WIDTH,)}
        for name, shape in shapes.items():
            split = ways > 1 and name in TWO_WAYS
            for end in [f"multiway.{way}.weight" for way in range(ways)] if split else ["weight"]:
                held[f"model.layers.{number}.{name}.{end}"] = draw(*shape, around=float(len(shape) == 1))
        held[f"model.layers.{number}.self_attn.rotary_emb.inv_freq"] = torch.ones(size // 2)  # old files have it
    return held


def save_tokenizer(folder):
    """A tokenizer's files; gives the number of its words."""
    tokenizer = llama_tokenizer()
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def save_shards(folder, held, count=3):
    """The tensors in pickled shards with their index."""
    places = {}
    for number in range(count):
        name = f"pytorch_model-{number + 1:05d}-of-{count:05d}.bin"
        shard = dict(list(held.items())[number::count])
        torch.save(shard, folder / name)
        places |= dict.fromkeys(shard, name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def logits(w, x, image=()):
    """(S, words) of embeddings (S, width); ``image``: positions that go the second way where there are two."""
    length, size = len(x), WIDTH // HEADS
    ways = [int(position in image) for position in range(length)]
    angles = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, size, 2) / size)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)

    def of(name, position):
        return w[f"{name}.weight"] if f"{name}.weight" in w else w[f"{name}.multiway.{ways[position]}.weight"]

    def dense(name, x):
        return torch.stack([of(name, position) @ row for position, row in enumerate(x)])

    def norm(name, x):
        return torch.stack(
            [row / (row.square().mean() + EPS).sqrt() * of(name, position) for position, row in enumerate(x)]
        )

    def turned(z):
        first, second = z.chunk(2, -1)
        return z * cos + torch.cat([-second, first], -1) * sin

    ahead = torch.full((length, length), -torch.inf).triu(1)
    for number in range(LAYERS):
        layer = f"model.layers.{number}"
        normed = norm(f"{layer}.input_layernorm", x)
        q, k, v = (
            dense(f"{layer}.self_attn.{part}_proj", normed).view(length, -1, size).transpose(0, 1) for part in "qkv"
        )
        k, v = (part.repeat_interleave(HEADS // KEYS, 0) for part in (k, v))
        mixed = (turned(q) @ turned(k).transpose(1, 2) / size**0.5 + ahead).softmax(-1) @ v
        x = x + dense(f"{layer}.self_attn.o_proj", mixed.transpose(0, 1).flatten(1))
        normed = norm(f"{layer}.post_attention_layernorm", x)
        gate, up = (dense(f"{layer}.mlp.{part}_proj", normed) for part in ("gate", "up"))
        x = x + dense(f"{layer}.mlp.down_proj", F.silu(gate) * up)
    return norm("model.norm", x) @ w["lm_head.weight"].T
