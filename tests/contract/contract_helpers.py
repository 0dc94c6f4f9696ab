"""What the contract tests share: adapters by the name of their configuration, pictures, questions, plain passes."""

from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from PIL import Image
from torch import nn

import stethoscope.conf

CONFIGS = sorted(path.stem for path in (Path(stethoscope.conf.__file__).parent / "model").glob("*.yaml"))
QUESTIONS = ("Is there a dog in the image?", "Please describe this image in detail.", "Yes?")
SIZES = ((72, 56), (72, 56), (100, 40))  # the last is cut into another number of tiles by families that have tiles
LANGUAGE = ("model.language_model", "model.text_model", "language_model.model.decoder", "language_model.model")


def configured(name, *overrides):
    with initialize_config_module("stethoscope.conf", version_base=None):
        return compose(overrides=[f"+model={name}", "model.device=cpu", "model.dtype=float32", *overrides]).model


def load(name, *overrides):
    adapter = instantiate(configured(name, *overrides))
    adapter.setup()
    return adapter


def distinct(names):
    """One configuration of each adapter, family and prompt: sizes of one family have the same tiny model."""
    first = {}
    for name in names:
        config = configured(name)
        settings = {key: config.get(key) for key in ("_target_", "family", "prompt")}
        first.setdefault(tuple(settings.values()), name)
    return list(first.values())


def picture(seed, width=72, height=56):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def language(adapter):
    """The stack of decoder layers with the norm behind it."""
    modules = dict(adapter.model.named_modules())
    return next(
        modules[path] for path in LANGUAGE if isinstance(getattr(modules.get(path), "layers", None), nn.ModuleList)
    )


def extended(adapter, encoded, ids):
    """Inputs of a pass over prompt and answer, written out: answers are text, which PaliGemma reads causally."""
    inputs = dict(encoded.inputs)
    kinds = {"token_type_ids": int(adapter.model.config.model_type == "paligemma"), "mm_token_type_ids": 0}
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([list(ids)])], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    for name, kind in kinds.items():
        if name in inputs:
            inputs[name] = torch.cat([inputs[name], torch.full((1, len(ids)), kind)], 1)
    return inputs


def predicting(encoded, ids):
    """The rows of that pass that predict the answer's tokens."""
    return slice(encoded.spans.length - 1, encoded.spans.length - 1 + len(ids))


@contextmanager
def attention(model, implementation):
    """Another attention implementation for a while, then the former one in every part."""
    parts = [module.config for module in model.modules() if hasattr(module, "config")]
    parts += [getattr(config, key) for config in parts for key in config.sub_configs if getattr(config, key, None)]
    before = [(config, config._attn_implementation_internal) for config in parts]
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        for config, former in before:
            config._attn_implementation_internal = former
