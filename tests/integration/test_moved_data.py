"""``extract`` of a run whose data or chat template is no longer what it was, from another folder or disk."""

import json

import pytest
from PIL import Image

from stethoscope.adapters.hf import HfAdapter
from stethoscope.storage.run_dir import RunStore

QUIET = ["callbacks=none", "features=fast", "trace=all"]
ASKED = ["task=custom", "task.file=here/q.jsonl", "logger=none", "callbacks=none", "generation.max_new_tokens=3"]


@pytest.fixture
def here(tmp_path):
    folder = tmp_path / "here"
    (folder / "img").mkdir(parents=True)
    for number in range(2):
        Image.new("RGB", (40, 40), (90 * number, 60, 30)).save(folder / "img" / f"{number}.png")
    rows = [{"image": f"{number}.png", "question": "Is there a dog?"} for number in range(2)]
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_data_that_has_moved_is_the_same_data(stethoscope, here, tmp_path, monkeypatch):
    settings = ["model.random_init=tiny", *ASKED, "name=r"]
    stethoscope("evaluate", *settings, "task.images=here/img", "limit=1", code=0)
    stethoscope("evaluate", *settings, "task.images=here/img/", code=0)
    answers = [record.answer for record in RunStore(tmp_path / "runs" / "r").records()]
    assert len(answers) == 2
    monkeypatch.chdir(tmp_path / "runs")  # paths are read from the folder that the run was made in
    assert "6 tokens" in stethoscope("extract", "run=r", *QUIET, code=0)
    monkeypatch.chdir(tmp_path)
    here.rename(tmp_path / "there")
    line = stethoscope("extract", "run=runs/r", *QUIET, "features=uncertainty")
    assert "task.file=here/q.jsonl, which does not exist" in line
    moved = ["task.file=there/q.jsonl", f"task.images={tmp_path / 'there' / 'img'}"]
    stethoscope("extract", "run=runs/r", *QUIET, "features=uncertainty", *moved, code=0)
    assert [record.answer for record in RunStore(tmp_path / "runs" / "r").records()] == answers
    assert "setting of the run's task" in stethoscope("extract", "run=runs/r", *QUIET, "task.folder=there")
    file = tmp_path / "there" / "q.jsonl"
    file.write_text(file.read_text().replace("dog", "cat", 1))
    line = stethoscope("extract", "run=runs/r", *QUIET, *moved)
    assert "1 of 2 samples of custom have no features: 1 have changed since they were asked (question)" in line
    assert "asked again" not in line


def test_the_recorded_prompt_is_traced_where_the_template_writes_the_time(stethoscope, here, tmp_path):
    adapter = HfAdapter(random_init="tiny", family="qwen2_vl", device="cpu")
    adapter.model.save_pretrained(tmp_path / "model")
    adapter.processor.save_pretrained(tmp_path / "model")
    template = tmp_path / "model" / "chat_template.jinja"
    template.write_text("Now: {{ strftime_now('%H:%M:%S.%f') }} " + template.read_text())
    settings = ["model=hf", "model.model_id=model", *ASKED, "task.images=here/img", "name=r"]
    stethoscope("evaluate", *settings, "limit=1", code=0)
    line = stethoscope("evaluate", *settings)
    assert "adapter.prompt: " in line
    assert "set model.prompt" in line
    run = tmp_path / "runs" / "r"
    (before,) = RunStore(run).records()
    stethoscope("extract", "run=runs/r", *QUIET, code=0)
    (after,) = RunStore(run).records()
    assert after.prompt == before.prompt
    rows = RunStore(run).tokens("custom")
    assert rows["nll"].to_list() == pytest.approx([-value for value in after.answer.logprobs], abs=1e-3)
