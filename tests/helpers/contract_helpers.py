"""What the contract tests share: adapters by the name of their configuration, pictures, questions, plain passes."""

from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from PIL import Image
from torch import nn
from transformers import T5Tokenizer

import stethoscope.conf
from stethoscope.core.types import Generation
from stethoscope.tracing.trace import CAUSAL

FOLDER = Path(stethoscope.conf.__file__).parent / "model"
CONFIGS = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != "none")
QUESTIONS = ("Is there a dog in the image?", "Please describe this image in detail.", "Yes?")
SIZES = ((72, 56), (72, 56), (100, 40))  # the last is cut into another number of tiles by families that have tiles
ONE_OF_A_KIND = {
    "llava-1.6-mistral-7b": "tiles of the image, a projector",
    "qwen2-vl-2b": "a grid that follows the image",
    "instructblip-vicuna-13b": "a Q-Former",
    "blip2-flan-t5-xl": "a Q-Former before an encoder-decoder",
    "mplug-owl2-7b": "the authors' own code, an abstractor",
}
"""Families that `make test` takes through the contract; the others are of these kinds and marked as slow."""
WAYS = {
    "greedy": Generation(max_new_tokens=7),
    "sampled": Generation(max_new_tokens=9, do_sample=True, temperature=1.5, seed=3),
    "stopped": Generation(max_new_tokens=9, stop=("e", " ")),
}
REQUIREMENTS = (("attention", "lens", "blank"), ("heads", "trajectory"), ("no_image", "core", "noise"))
PARTS = (
    "logits", "mass", "image_attention", "lens_logprob", "blank_logits", "trajectory", "noise_logits",
    "no_image_logits", "core_logits", "image", "top", "peak", "response",
)  # fmt: skip
NEAR = 5e-5  # of tiny models with wide weights, whose logits are around 10
LANGUAGE = ("model.language_model", "model.text_model", "language_model.model.decoder", "language_model.model")


@cache
def configured(name, *overrides):
    """The configuration of a model, which is only read."""
    with initialize_config_module("stethoscope.conf", version_base=None):
        return compose(overrides=[f"+model={name}", "model.device=cpu", "model.dtype=float32", *overrides]).model


@cache
def settings(name):
    """Read a model's file and those that it builds on; composing all of them takes Hydra seconds."""
    own = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    below = [settings(other) for other in own.pop("defaults", []) if other != "_self_"]
    return {key: value for part in (*below, own) for key, value in part.items()}


def load(name, *overrides):
    adapter = instantiate(configured(name, *overrides))
    adapter.setup()
    return adapter


def distinct(names):
    """One configuration of each adapter, family and prompt: sizes of one family have the same tiny model."""
    first = {}
    for name in names:
        first.setdefault(tuple(settings(name).get(key) for key in ("_target_", "family", "prompt")), name)
    return list(first.values())


def others_slow(names):
    """Parameters of a fixture: configurations, all but the first one of each family of ``ONE_OF_A_KIND`` slow."""
    fast, families = set(), {_family(name) for name in ONE_OF_A_KIND}
    for name in names:
        if _family(name) in families:
            families.remove(_family(name))
            fast.add(name)
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


def _family(name):
    return settings(name)["_target_"], settings(name).get("family")


def reads_by_queries(adapter):
    """Whether image tokens are queries, of a Q-Former or an abstractor."""
    return any(hasattr(adapter.model.config, f"{part}_config") for part in ("qformer", "abstractor"))


def picture(seed, width=72, height=56):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def tensors(trace):
    held = {**vars(trace), **(vars(trace.heads) if trace.heads else {})}
    return {name: held[name] for name in PARTS if held.get(name) is not None}


def same(trace, other):
    trace, other = tensors(trace), tensors(other)
    assert trace.keys() == other.keys()
    for name, part in trace.items():
        assert part.shape == other[name].shape
        assert not part.numel() or (part - other[name]).abs().max() <= NEAR, name


def reuses(adapter):
    return adapter.model.config.model_type in CAUSAL


def has_encoder(adapter):
    """Whether the language model is an encoder-decoder one: the answer is then in a sequence of its own."""
    return bool(adapter.model.config.get_text_config().is_encoder_decoder)


def language(adapter):
    """The decoder layers, the norm behind them, and where the self-attention of a layer hangs."""
    if has_encoder(adapter):
        decoder = adapter.model.language_model.decoder
        holders = [(block.layer[0], "SelfAttention") for block in decoder.block]
        return SimpleNamespace(layers=decoder.block, norm=decoder.final_layer_norm, holders=holders)
    modules = dict(adapter.model.named_modules())
    stack = next(
        modules[path] for path in LANGUAGE if isinstance(getattr(modules.get(path), "layers", None), nn.ModuleList)
    )
    norm = stack.norm if hasattr(stack, "norm") else stack.final_layer_norm
    return SimpleNamespace(layers=stack.layers, norm=norm, holders=[(layer, "self_attn") for layer in stack.layers])


def queries(adapter, layer):
    """The weights that make the queries of a layer's self-attention."""
    attends = getattr(*language(adapter).holders[layer])
    return (attends.q if has_encoder(adapter) else attends.q_proj).weight


def extended(adapter, encoded, ids):
    """Inputs of a pass over prompt and answer, written out: answers are text, which PaliGemma reads causally."""
    inputs = dict(encoded.inputs)
    if has_encoder(adapter):
        return {**inputs, "decoder_input_ids": torch.tensor([[0, *ids]])}
    kinds = {"token_type_ids": int(adapter.model.config.model_type == "paligemma"), "mm_token_type_ids": 0}
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([list(ids)])], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    for name, kind in kinds.items():
        if name in inputs:
            inputs[name] = torch.cat([inputs[name], torch.full((1, len(ids)), kind)], 1)
    return inputs


def predicting(adapter, encoded, ids):
    """The rows of that pass that predict the answer's tokens."""
    first = 0 if has_encoder(adapter) else encoded.spans.length - 1
    return slice(first, first + len(ids))


def phrased(adapter, question):
    """The text that stands in the prompt for a question: PaliGemma is asked in the words of its training."""
    return adapter.phrases.get("question", "{question}").replace("{question}", question)


def squared(adapter, image):
    """The picture as the processor gets it: LLaVA-1.5's is padded to a square with the mean colour."""
    if not adapter.pad:
        return image
    colour = tuple(int(255 * part) for part in adapter.processor.image_processor.image_mean)
    side = max(image.size)
    canvas = Image.new("RGB", (side, side), colour)
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


def said(adapter, text):
    """The text as far as the tokenizer can say it: T5's knows no line breaks, nor characters beyond its own."""
    tokenizer = adapter.processor.tokenizer
    if not isinstance(tokenizer, T5Tokenizer):
        return text
    known = tokenizer.get_vocab()
    return "".join(character for character in " ".join(text.split()) if character == " " or character in known)


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
