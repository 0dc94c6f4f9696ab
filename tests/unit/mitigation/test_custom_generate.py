"""Folders that transformers itself loads and calls: the same answers as ours."""

import ast

import pytest
import torch
from helpers.contract_helpers import load, picture

from stethoscope.core.errors import ConfigError
from stethoscope.core.types import Generation
from stethoscope.mitigation.custom_generate import write_generate_folder
from stethoscope.mitigation.decoding import Cut, NoImageContrast, NoiseContrast

METHODS = [
    NoImageContrast(alpha=0.9, rate=0.2),
    NoImageContrast(weight=0.5, beta=0.1),
    NoiseContrast(alpha=9, step=700, seed=3),
]
TOKENS = 12


FAMILIES = ["qwen2.5-vl-3b", "gemma-3-4b", "internvl3-1b"]
"""With grids of patches, with sliding windows, with tiles as rows."""


@pytest.fixture(
    scope="module", params=["llava-1.5-7b", *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES)]
)
def adapter(request):
    torch.set_num_threads(1)
    return load(request.param, "model.random_init=tiny")


@pytest.fixture(scope="module")
def prompts(adapter):
    questions = ["Please describe this image in detail.", "Is there a dog in the image?", "What is this?"]
    return [adapter.encode(picture(seed, 300, 100), question) for seed, question in enumerate(questions)]


@pytest.fixture(autouse=True)
def _modules(tmp_path, monkeypatch):
    """Let transformers copy the code of a folder into a temporary one."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_transformers_generates_the_same_ids(adapter, prompts, method, batch, tmp_path):
    write_generate_folder(method, tmp_path / "decoder")
    generation = Generation(max_new_tokens=TOKENS)
    model, arguments = adapter.prepare_generate(prompts[:batch], generation)
    folder = str(tmp_path / "decoder")
    output = model.generate(**arguments, custom_generate=folder, trust_remote_code=True)
    start = arguments["input_ids"].shape[1]
    ids = [
        adapter.decode_answer(row, [0.0] * len(row), generation).token_ids
        for row in output.sequences[:, start:].tolist()
    ]
    own = adapter.generate(prompts[:batch], Generation(max_new_tokens=TOKENS, mitigation=method))
    plain = adapter.generate(prompts[:batch], generation)
    assert ids == [answer.token_ids for answer in own]
    assert ids != [answer.token_ids for answer in plain]


def test_the_code_needs_torch_and_transformers_alone(tmp_path):
    code, readme = write_generate_folder(NoiseContrast(), tmp_path)
    tree = ast.parse(code.read_text())
    names = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert {name.split(".")[0] for name in names} <= {
        "__future__", "collections", "copy", "inspect", "math", "torch", "transformers", "typing",
    }  # fmt: skip
    assert "alpha 1.0, beta 0.1, step 500, seed 0" in readme.read_text()


def test_what_cannot_be_done_is_told(adapter, prompts, tmp_path):
    with pytest.raises(ConfigError, match=r"mitigation=cut cannot be written .* no_image and vcd can"):
        write_generate_folder(Cut(), tmp_path)
    write_generate_folder(NoImageContrast(), tmp_path)
    model, arguments = adapter.prepare_generate(prompts[:1], Generation(max_new_tokens=2, num_beams=2))
    with pytest.raises(ValueError, match="not with beams"):
        model.generate(**arguments, custom_generate=str(tmp_path), trust_remote_code=True)
    del arguments["pixel_values"]
    with pytest.raises(ValueError, match="needs input_ids and pixel_values"):
        model.generate(**{**arguments, "num_beams": 1}, custom_generate=str(tmp_path), trust_remote_code=True)
