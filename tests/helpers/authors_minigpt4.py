"""MiniGPT-4 as its authors have it: tiny checkpoints in the names of their files, and the model in plain torch."""

import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from stethoscope.adapters.tiny import llama_tokenizer

WIDTH, HEADS, LAYERS, INNER, PATCH = 32, 4, 3, 69, 14
Q_WIDTH, Q_HEADS, Q_LAYERS, Q_INNER, QUERIES = 24, 3, 4, 40, 6
L_WIDTH, L_HEADS, L_KEYS = 40, 4, 2
SIZES = {"vision_layers": LAYERS, "vision_heads": HEADS, "qformer_heads": Q_HEADS}


class Draw:
    """Random weights that depend on the seed alone."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape, scale=0.25, around=0.0):
        return torch.randn(shape, generator=self.generator) * scale + around

    def linear(self, name, outputs, inputs):
        return {f"{name}.weight": self(outputs, inputs), f"{name}.bias": self(outputs)}

    def norm(self, name, width):
        return {f"{name}.weight": self(width, around=1.0), f"{name}.bias": self(width)}


def eva_vit(size, seed=1):
    """``eva_vit_g.pth``: one block more than is used, and the head of a classifier."""
    draw, positions = Draw(seed), (size // PATCH) ** 2 + 1
    weights = {"cls_token": draw(1, 1, WIDTH), "pos_embed": draw(1, positions, WIDTH)}
    weights |= {
        "patch_embed.proj.weight": draw(WIDTH, 3, PATCH, PATCH, scale=0.1),
        "patch_embed.proj.bias": draw(WIDTH),
    }
    for number in range(LAYERS + 1):
        block = f"blocks.{number}"
        weights |= draw.norm(f"{block}.norm1", WIDTH) | draw.norm(f"{block}.norm2", WIDTH)
        weights |= {f"{block}.attn.{name}_bias": draw(WIDTH) for name in "qv"}
        weights |= {f"{block}.attn.qkv.weight": draw(3 * WIDTH, WIDTH)} | draw.linear(
            f"{block}.attn.proj", WIDTH, WIDTH
        )
        weights |= draw.linear(f"{block}.mlp.fc1", INNER, WIDTH) | draw.linear(f"{block}.mlp.fc2", WIDTH, INNER)
    return weights | draw.norm("norm", WIDTH) | draw.linear("head", 5, WIDTH)


def blip2(seed=2):
    """``blip2_pretrained_flant5xxl.pth``: Q-Former, queries, the norm behind the tower, and what belongs to T5."""
    draw = Draw(seed)
    weights = {"query_tokens": draw(1, QUERIES, Q_WIDTH)} | draw.norm("ln_vision", WIDTH)
    weights |= draw.norm("Qformer.bert.embeddings.LayerNorm", Q_WIDTH) | draw.linear("t5_proj", 7, Q_WIDTH)
    weights |= {"Qformer.bert.embeddings.position_ids": torch.arange(512)[None]}
    for number in range(Q_LAYERS):
        layer = f"Qformer.bert.encoder.layer.{number}"
        for kind, width in (("attention", Q_WIDTH), ("crossattention", WIDTH)):
            if kind == "attention" or number % 2 == 0:
                weights |= draw.linear(f"{layer}.{kind}.self.query", Q_WIDTH, Q_WIDTH)
                weights |= draw.linear(f"{layer}.{kind}.self.key", Q_WIDTH, width)
                weights |= draw.linear(f"{layer}.{kind}.self.value", Q_WIDTH, width)
                weights |= draw.linear(f"{layer}.{kind}.output.dense", Q_WIDTH, Q_WIDTH)
                weights |= draw.norm(f"{layer}.{kind}.output.LayerNorm", Q_WIDTH)
        for end in ("_query", ""):  # the second is for text, which MiniGPT-4 has none of here
            weights |= draw.linear(f"{layer}.intermediate{end}.dense", Q_INNER, Q_WIDTH)
            weights |= draw.linear(f"{layer}.output{end}.dense", Q_WIDTH, Q_INNER)
            weights |= draw.norm(f"{layer}.output{end}.LayerNorm", Q_WIDTH)
    return weights


def projector(inputs, seed=3):
    """The authors' own checkpoint, with what training leaves beside the weights."""
    weights = Draw(seed).linear("llama_proj", L_WIDTH, inputs)
    return {
        "model": weights,
        "optimizer": {"state": {0: {"step": torch.tensor(9.0)}}},
        "epoch": 3,
        "config": {"lr": 1e-4},
    }


def language_model(folder, seed=4, **saving):
    """A folder with a Llama and its tokenizer, as on the hub."""
    tokenizer = llama_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=L_WIDTH, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=L_HEADS, num_key_value_heads=L_KEYS, max_position_embeddings=1024, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    model, draw = LlamaForCausalLM(config), Draw(seed)
    for parameter in model.parameters():
        parameter.data = draw(*parameter.shape, around=0.0 if parameter.dim() > 1 else 1.0)
    model.save_pretrained(folder, **saving)
    tokenizer.save_pretrained(folder)
    return model.state_dict()


def tower(w, pixels, heads=HEADS):
    """(1 + patches, width): all blocks but the last of the file; no norm behind them."""
    x = F.conv2d(pixels, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=PATCH)[0].flatten(1).T
    x = torch.cat([w["cls_token"][0], x]) + w["pos_embed"][0]
    for number in range(LAYERS):
        b = f"blocks.{number}."
        bias = torch.cat([w[b + "attn.q_bias"], torch.zeros(WIDTH), w[b + "attn.v_bias"]])
        normed = F.layer_norm(x, (WIDTH,), w[b + "norm1.weight"], w[b + "norm1.bias"], 1e-6)
        q, k, v = (normed @ w[b + "attn.qkv.weight"].T + bias).view(len(x), 3, heads, -1).permute(1, 2, 0, 3)
        mixed = ((q @ k.transpose(1, 2)) * q.shape[-1] ** -0.5).softmax(-1) @ v
        x = x + dense(w, b + "attn.proj", mixed.transpose(0, 1).flatten(1))
        normed = F.layer_norm(x, (WIDTH,), w[b + "norm2.weight"], w[b + "norm2.bias"], 1e-6)
        x = x + dense(w, b + "mlp.fc2", F.gelu(dense(w, b + "mlp.fc1", normed)))
    return x


def queried(w, image, heads=Q_HEADS):
    """(queries, width) of the Q-Former over an image (1 + patches, width)."""
    x = norm(w, "Qformer.bert.embeddings.LayerNorm", w["query_tokens"][0])
    for number in range(Q_LAYERS):
        layer = f"Qformer.bert.encoder.layer.{number}."
        x = attended(w, layer + "attention", x, x, heads)
        if number % 2 == 0:
            x = attended(w, layer + "crossattention", x, image, heads)
        inner = F.gelu(dense(w, layer + "intermediate_query.dense", x))
        x = norm(w, layer + "output_query.LayerNorm", dense(w, layer + "output_query.dense", inner) + x)
    return x


def attended(w, name, x, other, heads):
    q, k, v = (
        dense(w, f"{name}.self.{part}", source).view(len(source), heads, -1).transpose(0, 1)
        for part, source in (("query", x), ("key", other), ("value", other))
    )
    mixed = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1) @ v
    out = dense(w, f"{name}.output.dense", mixed.transpose(0, 1).flatten(1))
    return norm(w, f"{name}.output.LayerNorm", out + x)


def llama(w, x):
    """(S, words) logits of embeddings (S, width)."""
    length, size = len(x), L_WIDTH // L_HEADS
    angles = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, size, 2) / size)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)

    def turned(z):
        first, second = z.chunk(2, -1)
        return z * cos + torch.cat([-second, first], -1) * sin

    ahead = torch.full((length, length), -torch.inf).triu(1)
    for number in range(2):
        layer = f"model.layers.{number}."
        normed = rms(w[layer + "input_layernorm.weight"], x)
        q, k, v = (
            (normed @ w[f"{layer}self_attn.{part}_proj.weight"].T).view(length, -1, size).transpose(0, 1)
            for part in "qkv"
        )
        k, v = (part.repeat_interleave(L_HEADS // L_KEYS, 0) for part in (k, v))
        mixed = (turned(q) @ turned(k).transpose(1, 2) / size**0.5 + ahead).softmax(-1) @ v
        x = x + mixed.transpose(0, 1).flatten(1) @ w[layer + "self_attn.o_proj.weight"].T
        normed = rms(w[layer + "post_attention_layernorm.weight"], x)
        gate, up = (normed @ w[f"{layer}mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ w[layer + "mlp.down_proj.weight"].T
    return rms(w["model.norm.weight"], x) @ w["lm_head.weight"].T


def dense(w, name, x):
    return x @ w[name + ".weight"].T + w[name + ".bias"]


def norm(w, name, x, eps=1e-12):
    return F.layer_norm(x, (x.shape[-1],), w[name + ".weight"], w[name + ".bias"], eps)


def rms(weight, x):
    return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * weight
