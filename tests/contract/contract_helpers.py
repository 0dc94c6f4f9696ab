"""What the contract tests share: adapters by the name of their configuration, pictures, questions."""

from pathlib import Path

import numpy as np
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from PIL import Image

import stethoscope.conf

CONFIGS = sorted(path.stem for path in (Path(stethoscope.conf.__file__).parent / "model").glob("*.yaml"))
QUESTIONS = ("Is there a dog in the image?", "Please describe this image in detail.", "Yes?")


def load(name, *overrides):
    with initialize_config_module("stethoscope.conf", version_base=None):
        config = compose(overrides=[f"+model={name}", "model.device=cpu", "model.dtype=float32", *overrides])
    adapter = instantiate(config.model)
    adapter.setup()
    return adapter


def picture(seed, width=72, height=56):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))
