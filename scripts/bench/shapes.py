"""Build random models of real sizes behind our own adapter, and keep figures as they come."""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
try:
    import stethoscope.adapters
except ImportError:  # a checkout that is not installed: adapters/, tasks/ and conf/ are parts of the package
    sys.path.insert(0, str(ROOT))
    import stethoscope

    stethoscope.__path__.append(str(ROOT))

from stethoscope.adapters.hf import HfAdapter  # noqa: E402
from stethoscope.adapters.tiny import decoder_families  # noqa: E402
from stethoscope.core.errors import first_line  # noqa: E402
from stethoscope.core.token_table import KEY_COLUMNS  # noqa: E402
from stethoscope.tracing.trace import Encoded  # noqa: E402

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

QUESTION = "Please describe this image in detail."
_DERIVED = ("layer_types", "head_dim", "architectures", "dtype", "torch_dtype")  # by other settings


@dataclass(frozen=True)
class Shape:
    """Sizes of a model and of its image.

    Attributes:
        family: ``llava`` (LLaVA-1.5) or ``qwen2_5_vl`` (window attention in the tower, grouped heads).
        image: image tokens, a square number.
        layers: of the language model.
        width: of the language model, whose heads are ``width / heads`` wide.
        heads: of the language model.
        groups: its key-value heads.
        inner: width of its feed-forward layers.
        vocabulary: its tokens.
        vision_layers: of the vision tower.
        vision_width: of the vision tower, whose heads are 64 or 80 wide as in the published model.
        vision_inner: width of its feed-forward layers.
    """

    family: str = "llava"
    image: int = 576
    layers: int = 2
    width: int = 64
    heads: int = 4
    groups: int = 4
    inner: int = 128
    vocabulary: int = 1000
    vision_layers: int = 2
    vision_width: int = 64
    vision_inner: int = 128

    @property
    def side(self) -> int:
        """Number of image tokens along a side."""
        side = round(self.image**0.5)
        if side * side != self.image:
            raise SystemExit(f"{self.image} image tokens fill no square; {side * side} would")
        return side


PUBLISHED = {
    "llava": Shape("llava", 576, 32, 4096, 32, 32, 11008, 32064, 24, 1024, 4096),
    "qwen2_5_vl": Shape("qwen2_5_vl", 576, 28, 3584, 28, 4, 18944, 152064, 32, 1280, 3420),
}
"""Sizes of LLaVA-1.5-7B and Qwen2.5-VL-7B."""
NARROW = {"llava": Shape(), "qwen2_5_vl": replace(Shape("qwen2_5_vl"), groups=2, vision_layers=4)}
"""The same models with two layers and narrow, for a machine without a GPU."""


class ShapedAdapter(HfAdapter):
    """Adapt a random model of a shape.

    Args:
        shape: of the model.
        dtype: of the model.
        device: that the model is built on; ``auto`` spreads it over all devices.
    """

    def __init__(self, shape: Shape, dtype: str, device: str) -> None:
        placed: Any = {"device_map": "auto"} if device == "auto" else {"device": device}
        super().__init__(name=shape.family, random_init="tiny", family=shape.family, dtype=dtype, **placed)
        self.shape, self._build_device = shape, "cpu" if device == "auto" else device

    def _tiny(self) -> tuple[PreTrainedModel, ProcessorMixin]:
        """Build the model, and the processor of the tiny model of its family for images of the shape."""
        shape = self.shape
        if shape.family == "llava":
            tiny, processor = decoder_families.llava(14 * shape.side)
        else:
            tiny, processor = decoder_families.qwen2_5_vl()
            pixels = (28 * shape.side) ** 2
            processor.image_processor.size = {"shortest_edge": pixels, "longest_edge": pixels}
        config = tiny.config
        sizes = {name: value for name, value in config.to_dict().items() if name not in _DERIVED}
        text, vision = (
            {name: value for name, value in part.to_dict().items() if name not in _DERIVED}
            for part in (config.text_config, config.vision_config)
        )
        sizes["text_config"] = type(config.text_config)(**text | _text_sizes(shape))
        sizes["vision_config"] = type(config.vision_config)(**vision | _vision_sizes(shape))
        torch.manual_seed(0)
        torch.set_default_dtype(getattr(torch, self.loading.dtype))
        try:
            with torch.device(self._build_device):
                model = type(tiny)(type(config)(**sizes))
        finally:
            torch.set_default_dtype(torch.float32)
        return model, processor


def _text_sizes(shape: Shape) -> dict[str, Any]:
    head = shape.width // shape.heads
    sizes = {
        "hidden_size": shape.width,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.groups,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 32768,
    }
    if shape.family == "llava":
        return sizes
    third = head // 8  # the published 16, 24 and 24 of 64 frequencies
    section = [head // 2 - 2 * (3 * third // 2), 3 * third // 2, 3 * third // 2]
    return sizes | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section}}


def _vision_sizes(shape: Shape) -> dict[str, Any]:
    sizes = {"hidden_size": shape.vision_width, "intermediate_size": shape.vision_inner}
    if shape.family == "llava":
        heads = max(shape.vision_width // 64, 1)
        return sizes | {"num_hidden_layers": shape.vision_layers, "num_attention_heads": heads}
    windows = {"window_size": 112, "fullatt_block_indexes": list(range(3, shape.vision_layers, 4)) or [0]}
    heads = max(shape.vision_width // 80, 1)
    return sizes | windows | {"depth": shape.vision_layers, "num_heads": heads, "out_hidden_size": shape.width}


def pictures(shape: Shape, count: int) -> list[Image.Image]:
    """Draw different random pictures that fill the shape's image tokens exactly."""
    side = (14 if shape.family == "llava" else 28) * shape.side
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(count)]


def encode(adapter: ShapedAdapter, count: int) -> list[Encoded]:
    """Encode so many prompts, each with its own picture."""
    prompts = [adapter.encode(picture, QUESTION) for picture in pictures(adapter.shape, count)]
    tokens = len(prompts[0].spans.image)
    if tokens != adapter.shape.image:
        raise SystemExit(f"the prompt has {tokens} image tokens instead of {adapter.shape.image}")
    return prompts


def made_up_detector(columns: dict[str, np.ndarray]) -> stethoscope.Detector:
    """Fit a detector on made-up mentions whose features are near those of an answer; it predicts nothing."""
    generator = np.random.default_rng(0)
    count = 400
    rows = generator.integers(0, len(next(iter(columns.values()))), count)
    keys: dict[str, Any] = dict.fromkeys(KEY_COLUMNS, "")
    keys |= {"task": "bench", "subset": "all", "object": "dog", "label": generator.integers(0, 2, count, dtype=np.int8)}
    keys |= {"group": [f"picture-{index // 4}" for index in range(count)], "is_first_subtoken": True}
    keys |= dict.fromkeys(("token", "token_id", "start", "end", "mention_index", "repeat_index"), 0)
    noisy = {
        name: np.nan_to_num(values[rows]).astype(np.float32) + generator.normal(0, 0.1, count).astype(np.float32)
        for name, values in columns.items()
    }
    return stethoscope.Detector(C=0.1).fit(pd.DataFrame(keys | {"sample_id": keys["group"]} | noisy))


class Figures:
    """JSON lines of figures, appended as they are reached.

    Args:
        path: of the file.
        seconds: time for all figures of this call.
    """

    def __init__(self, path: Path, seconds: float) -> None:
        self._path, self._end = path, time.monotonic() + seconds
        path.parent.mkdir(parents=True, exist_ok=True)
        self.lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def left(self) -> float:
        """Seconds left for all figures."""
        return self._end - time.monotonic()

    def missing(self, key: str) -> bool:
        """Decide whether a figure is missing and there is time for it."""
        return self.left > 0 and all(line["key"] != key for line in self.lines)

    def add(self, key: str, **values: Any) -> None:
        """Append a figure and print it."""
        line = {"key": key, **values}
        self.lines.append(line)
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)

    def attempt(self, key: str, function: Callable[[], dict[str, Any]]) -> None:
        """Add the figure of a function, or the first line of its error; other parts go on."""
        if not self.missing(key):
            return
        try:
            values = function()
        except Exception as error:  # a figure that cannot be had is a result
            values = {"error": f"{type(error).__name__}: {first_line(error)}"}
        self.add(key, **values)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
