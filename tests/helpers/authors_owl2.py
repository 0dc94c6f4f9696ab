"""mPLUG-Owl2 as its authors have it: a tiny folder in the names of their files, and the model in plain torch."""

import json
import math

import torch
from torch.nn import functional as F

from helpers import authors_llama as llama
from helpers.authors_minigpt4 import Draw, dense

WIDTH, HEADS, LAYERS, INNER, SIZE, PATCH, EPS = 32, 4, 3, 48, 56, 14, 1e-6
QUERIES, A_HEADS, A_LAYERS, A_INNER, GRID = 6, 2, 2, 44, SIZE // PATCH


def tower_weights(seed=1):
    """The vision tower: query, key and value of every head lie together."""
    draw, top = Draw(seed), "model.vision_model"
    held = {f"{top}.embeddings.cls_token": draw(1, 1, WIDTH), **draw.norm(f"{top}.post_layernorm", WIDTH)}
    held[f"{top}.embeddings.position_embedding"] = draw(1, GRID**2 + 1, WIDTH)
    held[f"{top}.embeddings.patch_embed.weight"] = draw(WIDTH, 3, PATCH, PATCH, scale=0.1)
    held |= draw.norm(f"{top}.embeddings.pre_layernorm", WIDTH)
    for number in range(LAYERS):
        layer = f"{top}.encoder.layers.{number}"
        held |= draw.norm(f"{layer}.input_layernorm", WIDTH) | draw.norm(f"{layer}.post_attention_layernorm", WIDTH)
        held |= draw.linear(f"{layer}.self_attn.query_key_value", 3 * WIDTH, WIDTH)
        held |= draw.linear(f"{layer}.self_attn.dense", WIDTH, WIDTH)
        held |= draw.linear(f"{layer}.mlp.fc1", INNER, WIDTH) | draw.linear(f"{layer}.mlp.fc2", WIDTH, INNER)
    return held


def abstractor_weights(seed=2):
    """The visual abstractor, without its fixed tables, which the published files lack."""
    draw, top = Draw(seed), "model.visual_abstractor"
    held = {f"{top}.query_embeds": draw(1, QUERIES, WIDTH), f"{top}.vit_eos": draw(1, 1, llama.WIDTH)}
    held |= draw.linear(f"{top}.visual_fc", llama.WIDTH, WIDTH)
    for number in range(A_LAYERS):
        layer = f"{top}.encoder.layers.{number}.crossattention"
        for name in ("attention.query", "attention.key", "attention.value", "output.out_proj"):
            held |= draw.linear(f"{layer}.{name}", WIDTH, WIDTH)
        for name in ("norm1", "normk", "output.norm2"):
            held |= draw.norm(f"{layer}.{name}", WIDTH)
        held |= draw.linear(f"{layer}.output.mlp.w1", A_INNER, WIDTH)
        held |= draw.linear(f"{layer}.output.mlp.w2", WIDTH, A_INNER)
        held |= draw.linear(f"{layer}.output.mlp.w3", A_INNER, WIDTH)
        held |= draw.norm(f"{layer}.output.mlp.ffn_ln", A_INNER)
    return held


def config(words):
    tower = {
        "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "image_size": SIZE, "patch_size": PATCH, "hidden_act": "quick_gelu", "layer_norm_eps": EPS, "num_channels": 3,
        "projection_dim": 768, "use_flash_attn": False, "attention_dropout": 0.0,
        "model_type": "mplug_owl_vision_model",
    }  # fmt: skip
    abstractor = {
        "num_learnable_queries": QUERIES, "hidden_size": WIDTH, "num_hidden_layers": A_LAYERS, "grid_size": GRID,
        "num_attention_heads": A_HEADS, "intermediate_size": A_INNER, "encoder_hidden_size": WIDTH,
        "layer_norm_eps": EPS, "attention_probs_dropout_prob": 0.0, "model_type": "mplug_owl_visual_abstract",
    }  # fmt: skip
    return {
        **llama.config(words), "architectures": ["MPLUGOwl2LlamaForCausalLM"], "model_type": "mplug_owl2",
        "visual_config": {"visual_model": tower, "visual_abstractor": abstractor},
    }  # fmt: skip


def save(folder):
    """A folder as on the hub, in pickled shards; gives the weights by their names."""
    folder.mkdir()
    words = llama.save_tokenizer(folder)
    held = llama.weights(words, ways=2) | tower_weights() | abstractor_weights()
    llama.save_shards(folder, held)
    (folder / "config.json").write_text(json.dumps(config(words)))
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "crop_size": SIZE, "size": SIZE, "resample": 3, "do_resize": True, "do_center_crop": True,
                "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
            }
        )
    )  # fmt: skip
    return held


def sines(position, width):
    """One row of a table: sines, then cosines, of width / 2 wavelengths."""
    angles = [position / 10000 ** (2 * index / width) for index in range(width // 2)]
    return [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]


def tower(w, pixels):
    """(1 + patches, width) of pixels (1, 3, height, width), the last norm over all of them."""
    top = "model.vision_model"
    x = F.conv2d(pixels, w[f"{top}.embeddings.patch_embed.weight"], stride=PATCH)[0].flatten(1).T
    x = torch.cat([w[f"{top}.embeddings.cls_token"][0], x]) + w[f"{top}.embeddings.position_embedding"][0]
    x = norm(w, f"{top}.embeddings.pre_layernorm", x, EPS)
    for number in range(LAYERS):
        layer = f"{top}.encoder.layers.{number}"
        mixed = dense(w, f"{layer}.self_attn.query_key_value", norm(w, f"{layer}.input_layernorm", x, EPS))
        out = []
        for head in mixed.view(len(x), HEADS, 3, WIDTH // HEADS).unbind(1):
            q, k, v = head.unbind(1)
            out.append((q @ k.T / (WIDTH // HEADS) ** 0.5).softmax(-1) @ v)
        x = x + dense(w, f"{layer}.self_attn.dense", torch.cat(out, -1))
        inner = dense(w, f"{layer}.mlp.fc1", norm(w, f"{layer}.post_attention_layernorm", x, EPS))
        x = x + dense(w, f"{layer}.mlp.fc2", inner * (1.702 * inner).sigmoid())
    return norm(w, f"{top}.post_layernorm", x, EPS)


def tokens(w, pixels):
    """(queries + 1, width of the language model)."""
    top, vision, size = "model.visual_abstractor", tower(w, pixels), WIDTH // A_HEADS
    own = torch.tensor([sines(number, WIDTH) for number in range(QUERIES)])
    places = [sines(column, WIDTH // 2) + sines(row, WIDTH // 2) for row in range(GRID) for column in range(GRID)]
    positions = torch.cat([own, torch.zeros(1, WIDTH), torch.tensor(places)])
    x = w[f"{top}.query_embeds"][0]
    for number in range(A_LAYERS):
        layer = f"{top}.encoder.layers.{number}.crossattention"
        x = norm(w, f"{layer}.norm1", x)
        keys = torch.cat([x, norm(w, f"{layer}.normk", vision)])
        q = dense(w, f"{layer}.attention.query", x + own)
        k, v = dense(w, f"{layer}.attention.key", keys + positions), dense(w, f"{layer}.attention.value", keys)
        out = [
            (queries @ others.T / size**0.5).softmax(-1) @ values
            for queries, others, values in zip(*(part.split(size, -1) for part in (q, k, v)), strict=True)
        ]
        x = x + dense(w, f"{layer}.output.out_proj", torch.cat(out, -1))
        normed, mlp = norm(w, f"{layer}.output.norm2", x), f"{layer}.output.mlp"
        inner = F.silu(dense(w, f"{mlp}.w1", normed)) * dense(w, f"{mlp}.w3", normed)
        x = x + dense(w, f"{mlp}.w2", norm(w, f"{mlp}.ffn_ln", inner, EPS))
    return torch.cat([dense(w, f"{top}.visual_fc", x), w[f"{top}.vit_eos"][0]])


def norm(w, name, x, eps=1e-5):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]
