"""Tiny random models of the real classes with the exact inputs of one pass, and by hand how image tokens are merged."""

from dataclasses import dataclass

import torch
import transformers as T
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

IMAGE = 199
ANSWER = [20, 33, 21, 47, 22]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
WORDS = {"vocab_size": 200, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@dataclass
class Case:
    """``merge`` (N, M): image tokens by vision tokens in the order of the pixels, rows sum to 1 (0 for newlines)."""

    model: T.PreTrainedModel
    inputs: dict
    merge: Tensor | None = None
    patches: tuple | None = None
    classes: int = 0
    order: Tensor | None = None
    queries: int = 0

    @property
    def image(self):
        prompt = self.inputs["input_ids"][0]
        return (prompt == IMAGE).nonzero()[:, 0]


def widen(model, seed=0):
    """Weights wide enough that attention is far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 or "query_tokens" in name or "class_embedding" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.25
    return model.eval()


def llama(**more):
    return T.LlamaConfig(**SIZES, **WORDS, num_key_value_heads=2, max_position_embeddings=512, **more)


def qwen(cls=T.Qwen2Config, **more):
    return cls(**SIZES, **WORDS, num_key_value_heads=2, max_position_embeddings=512, **more)


def clip(image=28):
    return T.CLIPVisionConfig(**SIZES, image_size=image, patch_size=14, projection_dim=16)


def siglip(image=28):
    return T.SiglipVisionConfig(**SIZES, image_size=image, patch_size=14, vision_use_head=False)


def pixels(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def prompt(images, before=(1, 5, 6), after=(7, 8, 9, 10), answer=ANSWER, **more):
    ids = torch.tensor([[*before, *[IMAGE] * images, *after, *answer]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}


def one_to_one(tiles, side, classes):
    """Every patch is an image token."""
    merge = torch.zeros(tiles, side * side, tiles, classes + side * side)
    for tile in range(tiles):
        merge[tile, :, tile, classes:] = torch.eye(side * side)
    return merge.flatten(2).flatten(0, 1)


def in_blocks(tiles, side, block, classes):
    """Blocks of patches are merged into an image token, blocks row by row."""
    small = side // block
    merge = torch.zeros(tiles * small * small, tiles, classes + side * side)
    for tile in range(tiles):
        for row in range(side):
            for column in range(side):
                token = tile * small * small + row // block * small + column // block
                merge[token, tile, classes + row * side + column] = 1 / block**2
    return merge.flatten(1)


def llava(side=4):
    """``side`` patches along each side of the image; the tower is read before its last layer."""
    config = T.LlavaConfig(
        vision_config=clip(14 * side), text_config=llama(), image_token_index=IMAGE, vision_feature_layer=-2
    )
    inputs = prompt(side * side, pixel_values=pixels(1, 3, 14 * side, 14 * side))
    return Case(widen(T.LlavaForConditionalGeneration(config)), inputs, one_to_one(1, side, 1), (side, side), 1)


def llava_next():
    """The whole image first, then 2 x 2 tiles as one picture without the padding, a newline after each of its rows."""
    grids = [[56, 56], [28, 56], [56, 28]]
    config = T.LlavaNextConfig(
        vision_config=clip(), text_config=llama(), image_token_index=IMAGE, image_grid_pinpoints=grids
    )
    height, width, side = 60, 36, 2
    new_width = round(width * 56 / height)  # the picture fills the height of 4 patches; its width is cut to 2
    cut = (4 - 4 * new_width // 56 + 1) // 2
    merge = [torch.zeros(5, 5) for _ in range(4)]
    for token in range(4):
        merge[token][0, 1 + token] = 1
    for row in range(4):
        for column in range(cut, 4 - cut):
            weights = torch.zeros(5, 5)
            weights[1 + row // side * 2 + column // side, 1 + row % side * side + column % side] = 1
            merge.append(weights)
        merge.append(torch.zeros(5, 5))
    merge = torch.stack(merge).flatten(1)
    inputs = prompt(len(merge), pixel_values=pixels(1, 5, 3, 28, 28), image_sizes=torch.tensor([[height, width]]))
    return Case(widen(T.LlavaNextForConditionalGeneration(config)), inputs, merge)


def idefics3(name="Idefics3"):
    vision = {**SIZES, "image_size": 56, "patch_size": 14}
    config = getattr(T, f"{name}Config")(
        vision_config=vision, text_config=llama(), image_token_id=IMAGE, scale_factor=2
    )
    model = widen(getattr(T, f"{name}ForConditionalGeneration")(config))
    return Case(model, prompt(8, pixel_values=pixels(1, 2, 3, 56, 56)), in_blocks(2, 4, 2, 0))


def smolvlm():
    return idefics3("SmolVLM")


def internvl():
    vision = T.InternVLVisionConfig(**SIZES, image_size=(56, 56), patch_size=(14, 14))
    config = T.InternVLConfig(vision_config=vision, text_config=qwen(), image_token_id=IMAGE, image_seq_length=4)
    inputs = prompt(8, pixel_values=pixels(2, 3, 56, 56))
    return Case(widen(T.InternVLForConditionalGeneration(config)), inputs, in_blocks(2, 4, 2, 1))


def paligemma(text=None):
    gemma = text or T.GemmaConfig(**SIZES, **WORDS, num_key_value_heads=1, head_dim=8)
    config = T.PaliGemmaConfig(
        vision_config=siglip(), text_config=gemma, image_token_index=IMAGE, projection_dim=32, hidden_size=32
    )
    inputs = prompt(4, before=(), pixel_values=pixels(1, 3, 28, 28))
    kinds = torch.zeros_like(inputs["input_ids"])
    kinds[:, -len(ANSWER) :] = 1  # the prompt is read in both directions, the answer from left to right
    model = widen(T.PaliGemmaForConditionalGeneration(config))
    return Case(model, {**inputs, "token_type_ids": kinds}, one_to_one(1, 2, 0), (2, 2))


def paligemma2():
    return paligemma(
        T.Gemma2Config(
            **SIZES, **WORDS, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, sliding_window=6,
            attn_logit_softcapping=2.0, final_logit_softcapping=5.0,
        )
    )  # fmt: skip


def gemma3():
    text = T.Gemma3TextConfig(
        **SIZES, **WORDS, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, sliding_window=6,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    )  # fmt: skip
    config = T.Gemma3Config(
        vision_config=siglip(56), text_config=text, image_token_index=IMAGE, boi_token_index=198, eoi_token_index=197,
        mm_tokens_per_image=4,
    )  # fmt: skip
    inputs = prompt(4, pixel_values=pixels(1, 3, 56, 56))
    inputs["token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    return Case(widen(T.Gemma3ForConditionalGeneration(config)), inputs, in_blocks(1, 4, 2, 0), (4, 4))


def onevision():
    grids = [[28, 28], [56, 56], [28, 56], [56, 28]]
    config = T.LlavaOnevisionConfig(
        vision_config=siglip(), text_config=qwen(), image_token_index=IMAGE, video_token_index=198,
        image_grid_pinpoints=grids, vision_aspect_ratio="anyres_max_9",
    )  # fmt: skip
    merge = [torch.zeros(5, 4) for _ in range(4)]
    for token in range(4):
        merge[token][0, token] = 1
    for row in range(4):
        for column in range(4):
            weights = torch.zeros(5, 4)
            weights[1 + row // 2 * 2 + column // 2, row % 2 * 2 + column % 2] = 1
            merge.append(weights)
        merge.append(torch.zeros(5, 4))
    merge = torch.stack(merge).flatten(1)
    inputs = prompt(len(merge), pixel_values=pixels(1, 5, 3, 28, 28), image_sizes=torch.tensor([[56, 56]]))
    return Case(widen(T.LlavaOnevisionForConditionalGeneration(config)), inputs, merge)


def onevision_scaled():
    """A tall picture of 3 x 3 tiles: 6 x 4 tokens once its padding is cut off, scaled down to 4 x 3."""
    config = T.LlavaOnevisionConfig(
        vision_config=siglip(), text_config=qwen(), image_token_index=IMAGE, video_token_index=198,
        image_grid_pinpoints=[[28, 28], [84, 84]], vision_aspect_ratio="anyres_max_4",
    )  # fmt: skip
    merge = torch.zeros(4 + 4 * 4, 10, 4)  # image tokens by crops and their 2 x 2 patches
    for token in range(4):
        merge[token, 0, token] = 1
    for row in range(4):
        for column in range(3):
            for y, down in between((row + 0.5) * 6 / 4 - 0.5):
                for x, across in between((column + 0.5) * 4 / 3 - 0.5):
                    left = x + 1  # a column of padding on either side
                    crop, patch = 1 + y // 2 * 3 + left // 2, y % 2 * 2 + left % 2
                    merge[4 + row * 4 + column, crop, patch] += down * across
    sizes = {"pixel_values": pixels(1, 10, 3, 28, 28), "image_sizes": torch.tensor([[84, 60]])}
    return Case(widen(T.LlavaOnevisionForConditionalGeneration(config)), prompt(20, **sizes), merge.flatten(1))


def between(position):
    """The two neighbours of a place on a line, and their weights in linear interpolation."""
    first = int(position)
    return (first, 1 - (position - first)), (first + 1, position - first)


def _qwen_vl(name, vision, text, patch):
    special = {"video_token_id": 198, "vision_start_token_id": 197, "vision_end_token_id": 196}
    config = getattr(T, f"{name}Config")(vision_config=vision, text_config=text, image_token_id=IMAGE, **special)
    rows, columns = 8, 12
    tokens = rows * columns // 4
    inputs = prompt(
        tokens, before=(1, 5, 197), after=(196, 7, 8, 9), pixel_values=pixels(rows * columns, 3 * 2 * patch * patch),
        image_grid_thw=torch.tensor([[1, rows, columns]]),
    )  # fmt: skip
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    merge = torch.zeros(tokens, rows * columns)
    for token in range(tokens):
        merge[token, 4 * token : 4 * token + 4] = 0.25
    return Case(widen(getattr(T, f"{name}ForConditionalGeneration")(config)), inputs, merge, (rows, columns))


ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


def qwen2_vl():
    vision = {"depth": 3, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 14}
    return _qwen_vl("Qwen2VL", vision, qwen(T.Qwen2VLTextConfig, rope_parameters=ROPE), 14)


def qwen2_5_vl():
    """Windows of 4 x 4 patches in the first two layers; the tower keeps its patches window by window."""
    vision = {
        "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32,
        "window_size": 56, "fullatt_block_indexes": [2], "patch_size": 14,
    }  # fmt: skip
    case = _qwen_vl("Qwen2_5_VL", vision, qwen(T.Qwen2_5_VLTextConfig, rope_parameters=ROPE), 14)
    window_order = []  # of every token in its window, tokens in 4 rows of 6, windows of 2 x 2 tokens
    for top in (0, 2):
        for left in (0, 2, 4):
            window_order += [(top + y) * 6 + left + x for y in (0, 1) for x in (0, 1)]
    tower = torch.tensor([4 * token + part for token in window_order for part in range(4)])
    case.order = tower.argsort()
    return case


def qwen3_vl():
    vision = {
        "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32, "patch_size": 16,
        "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    rope = {**ROPE, "mrope_interleaved": True}
    return _qwen_vl("Qwen3VL", vision, qwen(T.Qwen3VLTextConfig, rope_parameters=rope, head_dim=8), 16)


def _blip(name, text, answer):
    """An image of 2 x 2 patches read by 6 queries; the Q-Former cross-attends in layers 0 and 2 of 4."""
    vision = getattr(T, f"{name}VisionConfig")(**SIZES, image_size=28, patch_size=14)
    bridge = getattr(T, f"{name}QFormerConfig")(
        **{**SIZES, "num_hidden_layers": 4}, vocab_size=200, encoder_hidden_size=32, cross_attention_frequency=2
    )
    config = getattr(T, f"{name}Config")(
        vision_config=vision, qformer_config=bridge, text_config=text, num_query_tokens=6, image_token_index=IMAGE
    )
    inputs = prompt(6, before=(), after=(2, 7, 8, 9, 10), answer=answer, pixel_values=pixels(1, 3, 28, 28))
    if name == "InstructBlip":
        inputs["qformer_input_ids"] = torch.tensor([[2, 7, 8, 9, 3]])
        inputs["qformer_attention_mask"] = torch.ones(1, 5, dtype=torch.long)
    if not answer:
        inputs["decoder_input_ids"] = torch.tensor([[0, *ANSWER[:-1]]])
    model = widen(getattr(T, f"{name}ForConditionalGeneration")(config))
    return Case(model, inputs, patches=(2, 2), classes=1, queries=6)


def _t5():
    return T.T5Config(
        vocab_size=200, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_decoder_layers=3, num_heads=4,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip


def _opt():
    return T.OPTConfig(
        vocab_size=200, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=256, pad_token_id=1, bos_token_id=2, eos_token_id=2,
    )  # fmt: skip


def blip2_opt():
    return _blip("Blip2", _opt(), ANSWER)


def instructblip_llama():
    return _blip("InstructBlip", llama(), ANSWER)


def blip2_t5():
    return _blip("Blip2", _t5(), [])


def instructblip_t5():
    return _blip("InstructBlip", _t5(), [])


FAMILIES = {
    make.__name__: make
    for make in (
        llava, llava_next, onevision, onevision_scaled, qwen2_vl, qwen2_5_vl, qwen3_vl, idefics3, smolvlm,
        internvl, paligemma, paligemma2, gemma3,
    )
}  # fmt: skip

QFORMERS = {make.__name__: make for make in (blip2_opt, instructblip_llama)}
SEQ2SEQ = {make.__name__: make for make in (blip2_t5, instructblip_t5)}


class _ConvModel(T.LlavaModel):
    """LLaVA's parts around a convolutional tower, as in ConvLLaVA."""

    def get_image_features(self, pixel_values, **kwargs):
        features = self.vision_tower(pixel_values).last_hidden_state.flatten(2).transpose(1, 2)
        return BaseModelOutputWithPooling(pooler_output=list(self.multi_modal_projector(features)))


class _ConvLlava(T.LlavaForConditionalGeneration):
    def __init__(self, config):
        super().__init__(config)
        self.model = _ConvModel(config)
        self.post_init()


def convolutional():
    tower = {**T.ConvNextConfig(hidden_sizes=[8, 16, 32, 32], depths=[1, 1, 1, 1]).to_dict(), "hidden_size": 32}
    config = T.LlavaConfig(vision_config=tower, text_config=llama(), image_token_index=IMAGE)
    inputs = prompt(4, pixel_values=pixels(1, 3, 64, 64))
    return Case(widen(_ConvLlava(config)), inputs, torch.eye(4), (2, 2))


def mllama():
    """Its language model cross-attends to the image: not supported."""
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_global_layers": 1,
        "attention_heads": 4, "image_size": 28, "patch_size": 14, "max_num_tiles": 2, "vision_output_dim": 64,
        "supported_aspect_ratios": [[1, 1], [1, 2]], "intermediate_layers_indices": [0],
    }  # fmt: skip
    text = {**SIZES, **WORDS, "num_key_value_heads": 2, "cross_attention_layers": [1]}
    model = T.MllamaForConditionalGeneration(
        T.MllamaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    )
    inputs = prompt(
        1, pixel_values=pixels(1, 1, 2, 3, 28, 28), aspect_ratio_ids=torch.tensor([[1]]),
        aspect_ratio_mask=torch.tensor([[[1, 0]]]),
    )  # fmt: skip
    length = inputs["input_ids"].shape[1]
    return Case(widen(model), {**inputs, "cross_attention_mask": torch.ones(1, length, 1, 2, dtype=torch.long)})
