"""A model of your own: copy this file into a package of yours, change what the comments number, name it in a YAML file.

The model here is made up, and works: a LLaVA whose image tokens each stand for 2 x 2 patches. What transformers has
already needs none of this, only a YAML file. Saved by ``save_pretrained`` with its tokenizer, it loads under all the
options of ``loading.Loading``; its traces, features and relevancy come with ``HfAdapter``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import AutoTokenizer, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaModel

from stethoscope.adapters import loading
from stethoscope.adapters.chunks import ChunkEncoder, ChunkProcessor
from stethoscope.adapters.hf import HfAdapter
from stethoscope.adapters.pixels import PixelProcessor, squash
from stethoscope.adapters.tiny import llava

if TYPE_CHECKING:
    from PIL.Image import Image

    from stethoscope.trace import Encoded

PLACEHOLDER = "<image>"
POOL = 2  # patches along the side of an image token


# 1. The model, from transformers' parts: their attention is heard and explained as it is.


class PooledModel(LlavaModel):
    """LLaVA without its head, with pooled patches."""

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """As ``pooler_output`` (image tokens, D) for every image."""
        patches = self.vision_tower(pixel_values).last_hidden_state[:, 1:]  # without the class token
        side = round(patches.shape[1] ** 0.5)
        square = patches.transpose(1, 2).unflatten(2, (side, side))
        tokens = nn.functional.avg_pool2d(square, POOL).flatten(2).transpose(1, 2)
        output = list(self.multi_modal_projector(tokens))
        return BaseModelOutputWithPooling(last_hidden_state=patches, pooler_output=output)


class PooledLlava(LlavaForConditionalGeneration):
    """LLaVA with pooled patches."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__(config)
        self.model = PooledModel(config)
        self.post_init()


# 2. What stands between a picture, a question and the model's inputs.


def make_processor(config: LlavaConfig, tokenizer: Any) -> ChunkProcessor:
    """The image squashed to the tower's square and normalised; as many image tokens as the model makes of it.

    A processor of transformers can stand here too, with ``encoding.Encoder`` instead of ``ChunkEncoder`` below.
    """
    side = config.vision_config.image_size // config.vision_config.patch_size // POOL
    images = PixelProcessor((partial(squash, size=config.vision_config.image_size),))
    return ChunkProcessor(tokenizer, images, PLACEHOLDER, config.image_token_id, side**2)


# 3. The adapter: three short methods. Settings of the YAML file arrive as arguments of ``HfAdapter.__init__``.


class Adapter(HfAdapter):
    """LLaVA with pooled patches; arguments as for ``HfAdapter``."""

    stop = ("###",)  # texts that end an answer of this family; leave out if its end token does

    def _load(self) -> tuple[PooledLlava, ChunkProcessor]:
        """From a folder or the hub. ``checkpoints.read`` and ``checkpoints.build`` take files with other names."""
        model = loading.pretrained(PooledLlava, self.model_id, self.loading)
        folder = loading.is_folder(self.model_id)
        with loading.one_line(self.model_id):
            source = loading.source_of(self.model_id, folder)
            tokenizer = AutoTokenizer.from_pretrained(source, **self.loading.where(folder))
        return model, make_processor(model.config, tokenizer)

    def _tiny(self) -> tuple[PooledLlava, ChunkProcessor]:
        """For ``random_init=tiny``: small, random, from no file; what the contract tests run on."""
        small, processor = llava.llava()
        return PooledLlava(small.config).eval(), make_processor(small.config, processor.tokenizer)

    def _make_encoder(self, model: PooledLlava, processor: ChunkProcessor) -> Callable[[Image, str], Encoded]:
        side = round(processor.image_tokens**0.5)
        return ChunkEncoder(processor, self.prompt, grids=((side, side),))
