"""ConvLLaVA as its authors have it: tiny folders in the names of their files, and the model in plain torch."""

import json

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from helpers import authors_llama as llama
from helpers.authors_minigpt4 import Draw, dense

STAGES, DEPTHS, RESOLUTION = (4, 6, 8, 12, 20), (1, 2, 1, 2, 1), 192


def tower_weights(seed=1):
    """The tower's file: no norm behind the last stage."""
    draw = Draw(seed)
    held = {"embeddings.patch_embeddings.weight": draw(STAGES[0], 3, 4, 4)}
    held |= {"embeddings.patch_embeddings.bias": draw(STAGES[0])} | draw.norm("embeddings.layernorm", STAGES[0])
    for stage, (width, depth) in enumerate(zip(STAGES, DEPTHS, strict=True)):
        name = f"encoder.stages.{stage}"
        if stage:
            held |= draw.norm(f"{name}.downsampling_layer.0", STAGES[stage - 1])
            held[f"{name}.downsampling_layer.1.weight"] = draw(width, STAGES[stage - 1], 2, 2)
            held[f"{name}.downsampling_layer.1.bias"] = draw(width)
        for number in range(depth):
            layer = f"{name}.layers.{number}"
            held |= {f"{layer}.dwconv.weight": draw(width, 1, 7, 7), f"{layer}.dwconv.bias": draw(width)}
            held |= draw.norm(f"{layer}.layernorm", width) | draw.linear(f"{layer}.pwconv1", 4 * width, width)
            held |= draw.linear(f"{layer}.pwconv2", width, 4 * width)
            held[f"{layer}.layer_scale_parameter"] = draw(width, around=0.5)
    return held


def projector(seed=2):
    draw = Draw(seed)
    first = draw.linear("model.mm_projector.0", llama.WIDTH, STAGES[-1])
    return first | draw.linear("model.mm_projector.2", llama.WIDTH, llama.WIDTH)


def tower_config():
    return {
        "architectures": ["ConvNextModel"], "model_type": "convnext", "depths": list(DEPTHS),
        "hidden_sizes": list(STAGES), "num_stages": 5, "patch_size": 4, "num_channels": 3, "hidden_act": "gelu",
        "image_size": RESOLUTION, "layer_norm_eps": 1e-12, "layer_scale_init_value": 1e-6, "drop_path_rate": 0.1,
        "stage_names": ["stem", "stage1", "stage2", "stage3", "stage4", "stage5"], "out_features": ["stage5"],
        "out_indices": [5], "torch_dtype": "float32", "transformers_version": "4.37.2",
    }  # fmt: skip


def config(words):
    """Calls itself ``llava``, which transformers takes for another model; holds no resolution."""
    return {
        **llama.config(words), "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava",
        "mm_vision_tower": "ConvLLaVA/ConvLLaVA-ConvNeXt-768", "mm_projector_type": "mlp2x_gelu", "mm_hidden_size": 20,
        "mm_vision_select_layer": -1, "mm_use_im_start_end": False, "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
    }  # fmt: skip


def save(folder):
    """Two folders as on the hub, ``model`` and ``tower``; gives all weights of both by their names."""
    for part in ("model", "tower"):
        (folder / part).mkdir()
    words = llama.save_tokenizer(folder / "model")
    held, seen = llama.weights(words) | projector(), tower_weights()
    unused = {"model.vision_tower.vision_tower.embeddings.patch_embeddings.bias": torch.zeros(3)}
    save_file(held | unused, folder / "model" / "model.safetensors", metadata={"format": "pt"})
    save_file(seen, folder / "tower" / "model.safetensors", metadata={"format": "pt"})
    (folder / "model" / "config.json").write_text(json.dumps(config(words)))
    (folder / "tower" / "config.json").write_text(json.dumps(tower_config()))
    statistics = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
    sizes = {"crop_size": {"height": RESOLUTION, "width": RESOLUTION}, "size": {"shortest_edge": RESOLUTION}}
    (folder / "tower" / "preprocessor_config.json").write_text(json.dumps(statistics | sizes))
    return held | seen


def tokens(w, pixels):
    """(rows * columns, width) of pixels (1, 3, height, width)."""

    def norm(name, x):  # over channels, of (1, C, H, W)
        centred = x - x.mean(1, keepdim=True)
        scaled = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
        return scaled * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]

    def convolved(name, x, **how):
        return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], **how)

    x = norm("embeddings.layernorm", convolved("embeddings.patch_embeddings", pixels, stride=4))
    for stage, depth in enumerate(DEPTHS):
        name = f"encoder.stages.{stage}"
        if stage:
            x = convolved(f"{name}.downsampling_layer.1", norm(f"{name}.downsampling_layer.0", x), stride=2)
        for number in range(depth):
            layer = f"{name}.layers.{number}"
            inner = norm(f"{layer}.layernorm", convolved(f"{layer}.dwconv", x, padding=3, groups=x.shape[1]))
            inner = dense(w, f"{layer}.pwconv2", F.gelu(dense(w, f"{layer}.pwconv1", inner[0].permute(1, 2, 0))))
            x = x + (inner * w[f"{layer}.layer_scale_parameter"]).permute(2, 0, 1)[None]
    return dense(w, "model.mm_projector.2", F.gelu(dense(w, "model.mm_projector.0", x[0].flatten(1).T)))
