"""Add a model family that transformers lacks: here a LLaVA with one image token per 2 x 2 patches.

    PYTHONPATH=examples stethoscope evaluate --config-dir examples/conf plugins=[custom_model] \
        model=pooled model.random_init=tiny task=pope task.scenes=20

A checkpoint of a class that transformers has needs none of this: `model=hf model.model_id=FOLDER`. Traces, features,
relevancy, `device_map`, `quantize` and stop strings come with `HfAdapter`.
"""

from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaModel

from stethoscope.adapters import loading, tiny
from stethoscope.adapters.hf import HfAdapter

POOL = 2  # patches along each side of an image token


class PooledModel(LlavaModel):
    """LLaVA without its head, with pooled patches; its attention is transformers', so it can be recorded."""

    def get_image_features(self, pixel_values: Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """Return ``pooler_output``: a tensor (image tokens, D) for every image."""
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


class PooledAdapter(HfAdapter):
    """Load the model and its processor. The settings of the YAML file are the arguments of ``HfAdapter``."""

    stop = ("###",)  # texts that end an answer of this family; leave out if its end token does

    def _load(self) -> tuple[PooledLlava, LlavaProcessor]:
        model = loading.pretrained(PooledLlava, self._source, self.loading)
        hub_kwargs = self.loading.hub_kwargs(loading.is_folder(self._source))
        return model, LlavaProcessor.from_pretrained(self._source, **hub_kwargs)

    def _tiny(self) -> tuple[PooledLlava, LlavaProcessor]:
        """Build a small random model for ``random_init=tiny``: to try things out without weights."""
        small, processor = tiny.build("llava")
        processor.patch_size *= POOL  # a smaller number of image placeholders in the prompt
        return PooledLlava(small.config).eval(), processor
