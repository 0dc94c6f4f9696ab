"""The role of every module, read off its name."""

import pytest
from torch import nn

from stethoscope.tracing.model_parts import Site, sites


@pytest.mark.parametrize(
    ("name", "role", "layer"),
    [
        ("model.vision_tower.encoder.layers.2.self_attn", "vision", 2),
        ("model.visual.blocks.0.attn", "vision", 0),
        ("qformer.encoder.layer.4.crossattention.attention", "connector", 4),
        ("language_model.encoder.block.1.layer.0.SelfAttention", "encoder", 1),
        ("language_model.decoder.block.1.layer.0.SelfAttention", "language", 1),
        ("language_model.decoder.block.1.layer.1.EncDecAttention", "cross", 1),
        ("model.language_model.layers.11.cross_attn", "cross", 11),
        ("language_model.model.decoder.layers.3.self_attn", "language", 3),
        ("model.text_model.layers.7.self_attn", "language", 7),
        ("model.language_model.layers.31.self_attn", "language", 31),
    ],
)
def test_roles(name, role, layer):
    root = nn.Module()
    part = root
    for word in name.split("."):
        part.add_module(word, nn.Module())
        part = part.get_submodule(word)
    assert sites(root)[id(part)] == Site(name, role, layer)
