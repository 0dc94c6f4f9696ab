"""A made-up model from outside the package: a file and a YAML of the user's, the real command, its maps."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stethoscope.adapters import tiny
from stethoscope.core.component import build, compose
from stethoscope.core.types import Generation
from stethoscope.features import FEATURES
from stethoscope.relevancy import token_relevancy

EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_model.py"
PROMPT = "USER: <image>\\n{question} ASSISTANT:"
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (56, 56, 3), dtype=np.uint8))
TASK = (
    "task=pope", "task.source=files", "task.subsets=[random]", "task.questions=asked", "task.images=asked",
    "logger=none", "callbacks=none",
)  # fmt: skip


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A package ``my_models`` on the path, from the example, with configurations beside it, and a checkpoint."""
    torch.set_num_threads(1)
    package, conf = tmp_path / "my_models", tmp_path / "my_models" / "conf" / "model"
    conf.mkdir(parents=True)
    (package / "__init__.py").touch()
    shutil.copy(EXAMPLE, package / "pooled.py")
    model, processor = runpy.run_path(str(EXAMPLE))["PooledAdapter"](random_init="tiny")._tiny()
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.25)
    model.save_pretrained(tmp_path / "weights")
    processor.save_pretrained(tmp_path / "weights")
    lines = ["_target_: my_models.pooled.PooledAdapter", f"model_id: {tmp_path / 'weights'}", f'prompt: "{PROMPT}"']
    (conf / "pooled.yaml").write_text("\n".join(["# Mine.", "defaults: [hf, _self_]", *lines, "name: pooled"]) + "\n")
    (tmp_path / "asked").mkdir()
    IMAGE.save(tmp_path / "asked" / "a.png")
    asked = [
        {"question_id": n, "image": "a.png", "text": f"Is there a {n} in the image?", "label": "no"} for n in (1, 2)
    ]
    (tmp_path / "asked" / "coco_pope_random.json").write_text("\n".join(map(json.dumps, asked)) + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield package
    for name in [name for name in sys.modules if name.split(".")[0] == "my_models"]:
        del sys.modules[name]


def records(folder):
    return [json.loads(line) for line in (Path("runs") / folder / "samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("way", ["--config-dir", "hydra.searchpath"])
def test_a_task_runs_on_it(mine, stethoscope, way):
    options = ("--config-dir", mine / "conf") if way == "--config-dir" else (f"hydra.searchpath=[file://{mine}/conf]",)
    printed = stethoscope("evaluate", *options, "model=pooled", "plugins=[my_models]", *TASK, "name=one", code=0)
    assert "0 failed" in printed
    lines = records("one")
    assert len(lines) == 2
    assert all("USER: <image>" in record["prompt"] and record["answer"]["token_ids"] for record in lines)
    config = (Path("runs") / "one" / "config.yaml").read_text()
    assert "my_models.pooled.PooledAdapter" in config
    assert "my_models.pooled.PooledAdapter" in (Path("runs") / "one" / "fingerprint.json").read_text()


def test_its_features_need_nothing_more(mine, stethoscope):
    """Also relevancy's; the run's configuration tells the second command the class, its user the package."""
    import pandas

    words = ("--config-dir", mine / "conf", "model=pooled", "plugins=[my_models]", "generation.max_new_tokens=3")
    stethoscope("evaluate", *words, *TASK, "name=two", code=0)
    words = ("extract", "run=runs/two", "features.groups=[uncertainty,relevancy]", "trace=all")
    assert "add plugins=[my_models] if you trust it" in stethoscope(*words)
    stethoscope(*words, "plugins=[my_models]", code=0)
    table = pandas.read_parquet("runs/two/tokens.parquet")
    columns = [name for name in table.columns if name.startswith("relevancy")]
    assert columns
    assert len(table) == sum(len(record["answer"]["token_ids"]) for record in records("two"))
    assert np.isfinite(table[columns].to_numpy(dtype=float)).any()


def test_without_the_users_word_nothing_of_it_runs(mine, stethoscope):
    line = stethoscope("evaluate", "--config-dir", mine / "conf", "model=pooled", *TASK)
    assert "plugins=[my_models]" in line
    assert "my_models.pooled" not in sys.modules


def test_what_is_wrong_with_it_is_said_in_a_line(mine, stethoscope):
    options = ("--config-dir", mine / "conf", "plugins=[my_models]", *TASK)
    assert "did you mean 'pooled'" in stethoscope("evaluate", *options, "model=pooledd")
    line = stethoscope("evaluate", *options, "model=pooled", "model._target_=my_models.nothing.Adapter")
    assert "No module named 'my_models.nothing'" in line
    (mine / "pooled.py").write_text("import a_package_that_is_not_here\n")
    assert "No module named 'a_package_that_is_not_here'" in stethoscope("evaluate", *options, "model=pooled")


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        (
            "careless",
            "trace.mass[:, -1, 0, 0]",
            "TypeError: 'NoneType' object is not subscriptable; the parts of the trace",
        ),
        ("summed", "trace.logits.sum(0)", "first dimension should be the tokens"),
    ],
)
def test_a_feature_that_fails_is_named_before_anything_is_asked_or_replaced(
    stethoscope, copy, tmp_path, monkeypatch, name, value, error
):
    lines = [f"@feature('{name}', 'depends')", f"def {name}(trace):", "    'Read what it has not asked for.'"]
    imports = "from stethoscope.features import feature\n\n"
    (tmp_path / f"{name}_features.py").write_text(imports + "\n".join([*lines, f"    return {value}\n"]))
    monkeypatch.syspath_prepend(str(tmp_path))
    words = [f"plugins=[{name}_features]", f"features.groups=[{name}]"]
    state = {path: path.read_bytes() for path in copy.iterdir() if path.is_file()}
    try:
        lines = [
            stethoscope("benchmark", *words, "name=own", "logger=none", "limit=2"),
            stethoscope("extract", *words, f"run={copy}"),
        ]
    finally:
        FEATURES.pop(name, None)
    for line in lines:
        assert f"feature '{name}' of {name}_features " in line
        assert error in line
    assert not Path("runs/own").exists()
    assert state == {path: path.read_bytes() for path in copy.iterdir() if path.is_file()}  # the token table is there


def test_only_a_yaml_for_a_class_of_transformers(mine, stethoscope, tmp_path):
    model, processor = tiny.build("llava")
    model.save_pretrained(tmp_path / "llava")
    processor.save_pretrained(tmp_path / "llava")
    lines = ["defaults: [hf, _self_]", f"model_id: {tmp_path / 'llava'}", f'prompt: "{PROMPT}"']
    (mine / "conf" / "model" / "finetuned.yaml").write_text("\n".join(lines) + "\n")
    printed = stethoscope("evaluate", "--config-dir", mine / "conf", "model=finetuned", *TASK, code=0)
    assert "2 samples" in printed
    assert "0 failed" in printed


def test_it_gets_maps_and_all_loading_options(mine):
    """A token's map says where the picture matters to it: its patches are those that the token was pooled from."""
    calls = []
    for settings in ([], ["model.device_map={model: disk, lm_head: cpu}"]):
        words = [f"hydra.searchpath=[file://{mine}/conf]", "+model=pooled", *settings]
        adapter = build(compose(words).model, object, "model", plugins=["my_models"])
        encoded = adapter.encode(IMAGE, "Is there a dog?")
        assert encoded.spans.grids == ((2, 2),)
        answer = adapter.generate([encoded], Generation(max_new_tokens=4))[0]
        calls.append((answer, token_relevancy(adapter, IMAGE, "Is there a dog?", answer)))
    (answer, maps), (same, away) = calls
    assert answer == same
    assert maps.image.shape == (len(answer.token_ids), 3, 4)
    assert (maps.image[:, -1].sum(-1) > 0).any()
    assert maps.patches.shape[2:] in ((4, 4), (2, 2))
    assert torch.equal(maps.image, away.image)
    assert torch.equal(maps.patches, away.patches)
