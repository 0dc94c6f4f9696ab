"""What a model needs: counted from its configuration, against what it takes once it is there."""

import json
import struct

import pytest
import torch
from PIL import Image

from stethoscope.adapters import memory, tiny
from stethoscope.adapters.hf import HfAdapter
from stethoscope.adapters.load_settings import Loading
from stethoscope.adapters.loading import dispatch_model, pretrained
from stethoscope.adapters.memory import estimate, skeleton, weights
from stethoscope.cli import main
from stethoscope.commands.doctor import DeviceMemory, verdict
from stethoscope.core.errors import CapabilityError, StethoscopeError
from stethoscope.core.types import Memory
from stethoscope.relevancy.shared_passes import PromptPass
from stethoscope.tracing.hooks import selected

GIB = 2**30
OF_TRANSFORMERS = [
    name for name, make in tiny.FAMILIES.items() if make()[0].__class__.__module__.startswith("transformers.")
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=OF_TRANSFORMERS)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    tiny.build(request.param)[0].save_pretrained(folder)
    return str(folder)


def bytes_of(model):
    """Every storage once: two names may share it."""
    return sum({p.data_ptr(): p.nbytes for p in model.parameters()}.values())


@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_weights_are_those_of_the_loaded_model(folder, dtype):
    from transformers import AutoModelForImageTextToText

    loading = Loading(dtype=dtype)
    counted = skeleton(folder, loading)
    assert all(parameter.is_meta for parameter in counted.parameters())
    model = pretrained(AutoModelForImageTextToText, folder, loading)
    assert weights(counted, loading) == bytes_of(model)
    if dtype != "float16":  # there transformers keeps some parts in float32, and may name the model after them
        assert counted.dtype == model.dtype


def test_weights_are_those_of_the_file(folder):
    from pathlib import Path

    with (Path(folder) / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    header.pop("__metadata__", None)
    stored = sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in header.values())
    assert weights(skeleton(folder, Loading()), Loading()) == stored


def test_the_cache_is_what_a_pass_leaves():
    for family in ("llava", "qwen2_5_vl", "paligemma", "blip-2-opt"):
        model, _ = tiny.build(family)
        text = model.language_model if hasattr(model, "language_model") else model.model.language_model
        with torch.no_grad():
            cache = text(input_ids=torch.arange(5, 12)[None].repeat(3, 1), use_cache=True).past_key_values
        kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        logits = 3 * 2 * text.config.vocab_size * 4  # of one step, raw and processed
        assert estimate(model, Loading(), context=7, batch_size=3, new_tokens=5).cache == kept + logits, family


def test_the_cache_of_an_encoder_decoder_has_its_cross_attention():
    model, _ = tiny.build("blip-2-t5")
    with torch.no_grad():
        output = model.language_model(input_ids=torch.arange(5, 12)[None], decoder_input_ids=torch.arange(7)[None])
    cache = output.past_key_values
    layers = [*cache.self_attention_cache.layers, *cache.cross_attention_cache.layers]
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    logits = 8 * model.config.text_config.vocab_size  # of one step, raw and processed
    assert estimate(model, Loading(), context=7, batch_size=1, new_tokens=0).cache == kept + logits


def test_the_relevancy_pass_keeps_about_what_is_estimated():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    from stethoscope.relevancy import relevancy_from_inputs
    from stethoscope.relevancy.attention_backward import BUDGET

    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=300, hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=8
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=299, image_seq_length=16)
    )
    model = model.eval().requires_grad_(False)
    ids = torch.cat([torch.full((1, 16), 299), torch.arange(284)[None] % 290 + 3], 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 56, 56)}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    alive, peak = {}, 0

    class Kept:
        def __init__(self, tensor):
            nonlocal peak
            self.tensor, storage = tensor, tensor.untyped_storage()
            self.address = storage.data_ptr()
            if self.address not in own:
                count, _ = alive.get(self.address, (0, 0))
                alive[self.address] = count + 1, storage.nbytes()
                peak = max(peak, sum(size for _, size in alive.values()))

        def __del__(self):
            if self.address in alive:
                count, size = alive.pop(self.address)
                if count > 1:
                    alive[self.address] = count - 1, size

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        relevancy_from_inputs(model, inputs, ids[0, -20:].tolist())
    guess = estimate(model, Loading(), context=300, batch_size=1, new_tokens=20).relevancy - min(BUDGET, 4 * 8 * 300**2)
    inputs_of_layers = 4 * (6 * 300 * 256 + 2 * 17 * 64)
    assert guess / 3 < peak + inputs_of_layers < guess * 1.5


@pytest.mark.parametrize("quantize", ["4bit", "8bit"])
@pytest.mark.parametrize("family", ["llava", "blip-2-t5", "qwen3_vl"])
def test_quantised_weights(family, quantize):
    pytest.importorskip("bitsandbytes", minversion="0.46.1")
    whole = tiny.build(family)[0]
    model = dispatch_model(whole, Loading(quantize=quantize, device_map={"": "cpu"}))
    stored = bytes_of(model)
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        stored += 0 if state is None else state.absmax.nbytes + state.code.nbytes
        scales = getattr(getattr(module, "weight", None), "SCB", None)
        stored += 0 if scales is None else scales.nbytes
    assert weights(whole, Loading(quantize=quantize)) == stored < bytes_of(whole)


def test_shared_weights_count_once_and_published_sizes_are_right(tmp_path):
    """LLaVA-1.5 7B has 7,063,427,072 weights (model card); nothing of them is made."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14, projection_dim=768,
    )  # fmt: skip
    text = LlamaConfig(vocab_size=32064, max_position_embeddings=4096)
    config = LlavaConfig(vision_config=vision, text_config=text, dtype="float16", image_seq_length=576)
    config.save_pretrained(tmp_path)
    need = HfAdapter(str(tmp_path), prompt="{image}{question}").memory(context=2048)
    assert need.parameters == 7_063_427_072
    assert (need.dtype, need.weights) == ("float16", 2 * 7_063_427_072)
    assert need.cache == 2048 * 2 * 32 * 4096 * 2 + 8 * 32064
    assert 0.7 * GIB < need.relevancy < 1.3 * GIB  # layers run again one at a time
    four = HfAdapter(str(tmp_path), prompt="{image}{question}", quantize="4bit").memory(context=1024)
    assert 3.5 * GIB < four.weights < 5 * GIB


@pytest.mark.parametrize(
    ("rooms", "words"),
    [
        ([("cuda:0", 30), ("cpu", 8)], "fits on cuda:0"),
        ([("cuda:0", 8), ("cuda:1", 30), ("cpu", 8)], "fits on cuda:1"),
        ([("cpu", 64)], "fits on cpu"),
        ([("cuda:0", 12), ("cuda:1", 12), ("cpu", 8)], "device_map=auto: spreads over cuda:0, cuda:1"),
        ([("cuda:0", 12), ("cpu", 64)], "device_map=auto: the rest is kept in CPU memory"),
        ([("cuda:0", 10), ("cpu", 2)], "model.quantize=4bit"),
        ([("cpu", 2)], "offload_folder"),
    ],
)
def test_verdicts(rooms, words):
    need = Memory(7 * 10**9, "bfloat16", weights=14 * GIB, cache=GIB, relevancy=5 * GIB)
    small = Memory(7 * 10**9, "bfloat16", weights=4 * GIB, cache=GIB, relevancy=5 * GIB)
    text = verdict(need, [DeviceMemory(device, size * GIB) for device, size in rooms], [("model.quantize=4bit", small)])
    assert words in text


@pytest.fixture
def doctor(capsys):
    def call(*words, code=0):
        with pytest.raises(SystemExit) as end:
            main(["doctor", *words])
        printed = capsys.readouterr()
        assert end.value.code == code, printed
        return printed.out if code == 0 else printed.err.strip().splitlines()[-1]

    return call


def test_the_command_on_a_folder(doctor, tmp_path, monkeypatch):
    model, processor = tiny.build("llava")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    words = ("model=hf", f"model.model_id={tmp_path}", "context=100", "batch_size=4")
    printed = doctor(*words)
    assert f"{sum(p.numel() for p in model.parameters()):,} in float32" in printed
    assert "4 x 100 tokens" in printed
    assert printed.splitlines()[-3:-1] == [
        "reads a picture once for all questions about it in a row",
        "relevancy goes back through generation and trace",
    ]
    assert "fits on" in printed.splitlines()[-1]
    assert "100,800 in bfloat16, 8bit" in doctor(*words, "model.dtype=bfloat16", "model.quantize=8bit")
    needs = [HfAdapter(str(tmp_path), dtype=dtype).memory(500, 4).total for dtype in ("float32", "bfloat16")]
    monkeypatch.setattr(
        "stethoscope.commands.doctor.free_memory_by_device", lambda: [DeviceMemory("cpu", int(1.1 * sum(needs) / 2))]
    )
    assert "model.dtype=bfloat16 (about" in doctor(*words, "context=500")
    assert "needs batch_size=8 (about" in doctor(*words, "context=500", "batch_size=640", "model.dtype=bfloat16")


def test_the_command_without_files_or_network(doctor, monkeypatch):
    monkeypatch.setattr("stethoscope.adapters.load_settings._hub_reachable", lambda: False)
    printed = doctor("model=owner/unknown-7b")
    assert printed.startswith("note  unknown-7b: nothing to count")
    assert "hf download owner/unknown-7b config.json" in printed
    printed = doctor("model=llava-1.5-7b")
    assert "7,063,427,072 in float16" in printed
    assert "from the sizes that come with this package" in printed
    assert "fits on" in doctor("model=llava-1.5-7b", "model.random_init=tiny")
    printed = doctor("model=qwen2-vl-2b", "model.random_init=tiny")
    assert "reads a picture again for every question\nrelevancy runs prompt and answer again" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model=lava-1.5-7b"], "did you mean 'llava-1.5-7b'"),
        (["model.dtyp=auto"], "did you mean 'dtype'"),
        (["context=0"], "context=0 should be a number of at least 1"),
        (["--verbose"], "doctor takes settings as model=llava-1.5-7b, got '--verbose'"),
        (["model=hf"], "model_id"),
    ],
)
def test_wrong_settings(words, message, doctor):
    assert message in doctor(*words, code=2)


def test_an_adapter_with_files_of_its_own_says_that_it_cannot_tell():
    class Own(HfAdapter):
        def _load(self):
            pytest.fail("loaded")

    with pytest.raises(CapabilityError, match="sizes"):
        Own("a/b").memory(10)


def test_a_folder_without_a_configuration(tmp_path):
    with pytest.raises(StethoscopeError, match=str(tmp_path)):
        memory.skeleton(str(tmp_path), Loading())


def graph_and_bytes(adapter, prompt):
    """The graph of a pass over a prompt, and the bytes that it keeps beside the parameters."""
    parameters, saved = {part.data_ptr() for part in adapter.model.parameters()}, {}

    def pack(part):
        saved[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
        return part

    with selected(adapter.model), torch.autograd.graph.saved_tensors_hooks(pack, lambda part: part):
        graph = PromptPass(adapter.model, dict(prompt.inputs), recompute=False)
    return graph, sum(size for pointer, size in saved.items() if pointer not in parameters)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_a_tower_with_several_patches_to_a_token_is_counted_whole(family, monkeypatch):
    """Large pictures, whose maps are not kept: the tower has four positions for every image token."""
    monkeypatch.setattr(memory, "_KEPT_MAP", 0)
    adapter = HfAdapter(random_init="tiny", family=family)
    images = adapter.processor.image_processor
    images.size = type(images.size)(**{**dict(images.size), "longest_edge": 448**2})
    prompt = adapter.encode(Image.new("RGB", (448, 448), "grey"), "What is here?")
    assert len(prompt.spans.image) == 256
    graph, actual = graph_and_bytes(adapter, prompt)
    assert 0.3 < actual / memory.graph_bytes(adapter.model, graph.length) < 1


def test_graphs_take_what_was_estimated_and_keep_no_large_map():
    adapter = HfAdapter(random_init="tiny")
    graph, actual = graph_and_bytes(adapter, adapter.encode(Image.new("RGB", (56, 56), "grey"), "What is here?"))
    assert 0.3 < actual / memory.graph_bytes(adapter.model, graph.length) < 1
    sizes = [memory.graph_bytes(adapter.model, length) for length in (2000, 4000, 6000)]
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0]
