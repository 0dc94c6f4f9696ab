"""Pictures and heat maps that a run keeps, against relevancy computed anew."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import stethoscope
from stethoscope import testbed
from stethoscope.core.errors import ArtefactError, ConfigError
from stethoscope.core.types import Answer, ImageRef, Mention, Sample
from stethoscope.evaluation.callbacks import SaveHeatmaps
from stethoscope.evaluation.evaluator import Evaluator
from stethoscope.features import FeatureSet
from stethoscope.relevancy import token_relevancy
from stethoscope.storage.records import Record
from stethoscope.storage.run_dir import RunStore
from stethoscope.storage.saved_heatmaps import HeatmapFile
from stethoscope.tasks.chair import Chair

SCENES = 4


@pytest.fixture(scope="module")
def adapter():
    return stethoscope.load("testbed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, adapter):
    """A run that has kept its maps; tests only read it."""
    path = tmp_path_factory.mktemp("maps")
    features = FeatureSet(groups=(), names=["relevancy_image"])
    Evaluator([SaveHeatmaps()], features=features, run_dir=path).run(adapter, Chair(scenes=SCENES))
    return path


def test_maps_are_the_relevancy_of_the_first_token_of_every_mention(folder, adapter):
    scenes = {scene.id: scene for scene in testbed.scenes(SCENES)}
    table = RunStore(folder).tokens("chair")
    assert len((folder / "maps.jsonl").read_text().splitlines()) == SCENES
    for record in RunStore(folder).records("chair"):
        view, picture = HeatmapFile(folder).find(record), scenes[record.sample_id].image()
        assert view.shows == "relevancy"
        rows = table[(table["sample_id"] == record.sample_id) & table["is_first_subtoken"]]
        assert sorted(view.maps) == sorted(rows["token"])
        relevancy = token_relevancy(adapter, picture, record.question, record.answer)
        for token, values in view.maps.items():
            wanted = relevancy.image[token, -1].numpy().reshape(8, 8)
            assert values.shape == (8, 8)
            assert np.abs(values / 255 - wanted / wanted.max()).max() < 0.02  # a byte, and a batch of others
        assert view.picture.size == (96, 96)
        small = [np.asarray(image.resize((12, 12), Image.Resampling.BOX), float) for image in (view.picture, picture)]
        assert np.abs(small[0] - small[1]).max() < 12  # JPEG smooths the noise away
        token = next(iter(view.maps))
        assert view.overlay(token, 200).width >= 200
        assert view.overlay(10_000) is None


def attention_of_names(adapter, scene, record, last):
    """The map of the name that ends at token ``last``, from all maps of one eager pass, layer by layer, row by row."""
    encoded = adapter.encode(scene.image(), record.question)
    model, inputs = adapter.forward_inputs(encoded, record.answer.token_ids)
    usual = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            layers = [layer[0].mean(0) for layer in model(**inputs, output_attentions=True).attentions]
    finally:
        model.set_attn_implementation(usual)
    start, count, image = encoded.spans.length, len(record.answer.token_ids), list(encoded.spans.image)
    excesses = []
    for layer in layers:  # row start - 1 predicts the first token, row start is the first token's own
        usually = sum(layer[start - 1 + row, image] for row in range(count)) / count
        excesses.append((layer[start + last, image] - usually).clamp(min=0))
    return max(excesses, key=lambda excess: float(excess.max())).reshape(8, 8).numpy()


def test_without_relevancy_the_maps_are_the_attention_of_the_names(tmp_path, adapter):
    scenes = {scene.id: scene for scene in testbed.scenes(8)}
    features = FeatureSet(groups=["attention"])
    Evaluator([SaveHeatmaps()], features=features, run_dir=tmp_path).run(adapter, Chair(scenes=8))
    names = []
    for record in RunStore(tmp_path).records("chair"):
        view = HeatmapFile(tmp_path).find(record)
        assert view.shows == "attention"
        for mention in record.mentions:
            tokens = record.answer.covering(mention.start, mention.end)
            wanted = attention_of_names(adapter, scenes[record.sample_id], record, tokens[-1])
            assert np.abs(view.maps[tokens[0]] / 255 - wanted / wanted.max()).max() < 0.01
            names.append(len(tokens))
    assert max(names) > 1  # some name has several tokens
    line = json.loads((tmp_path / "maps.jsonl").read_text().splitlines()[0])
    del line["shows"]  # as older versions wrote it
    (tmp_path / "maps.jsonl").write_text(json.dumps(line) + "\n")
    assert HeatmapFile(tmp_path).find(next(RunStore(tmp_path).records("chair"))).shows == "relevancy"


def test_maps_of_another_answer_or_sample_are_none(folder):
    record = next(RunStore(folder).records("chair"))
    assert HeatmapFile(folder).find(replace(record, answer=replace(record.answer, text="a dog"))) is None
    assert HeatmapFile(folder).find(replace(record, answer=None)) is None
    assert HeatmapFile(folder).find(replace(record, sample_id="other")) is None
    assert HeatmapFile(folder / "detector").find(record) is None


def test_a_run_without_relevancy_keeps_pictures_and_one_without_both_nothing(tmp_path, adapter):
    features = FeatureSet(groups=["position"])
    Evaluator([SaveHeatmaps(side=48)], features=features, run_dir=tmp_path / "a").run(adapter, Chair(scenes=2))
    record = next(RunStore(tmp_path / "a").records("chair"))
    view = HeatmapFile(tmp_path / "a").find(record)
    assert (view.maps, view.picture.size) == ({}, (48, 48))
    assert view.overlay(3) is None
    Evaluator([SaveHeatmaps(pictures=False)], features=features, run_dir=tmp_path / "b").run(adapter, Chair(scenes=2))
    assert not (tmp_path / "b" / "maps.jsonl").exists()
    Evaluator([SaveHeatmaps()], features=features).run(adapter, Chair(scenes=1))  # no run directory, nothing to keep


class Stub:
    """What ``SaveHeatmaps`` reads of a run."""

    def __init__(self, adapter, folder, mentions):
        self.adapter, self.task, self.store = adapter, self, RunStore(folder)
        self.name, self.label_mentions = "stub", lambda sample, answer: mentions


def wide_map(tmp_path, **settings):
    """The map of the one mention of an answer about a wide picture, 8 x 20 cells, by a tiny LLaVA-1.5."""
    adapter = stethoscope.load("llava-1.5-7b", random_init="tiny", **settings)
    picture = Image.linear_gradient("L").resize((400, 160)).convert("RGB")
    encoded = adapter.encode(picture, "What?")
    answer = adapter.answer(encoded, "a dog")
    trace = adapter.trace(encoded, answer, {"relevancy"})
    run = Stub(adapter, tmp_path, (Mention(2, 5, "dog", -1),))
    SaveHeatmaps(cells=20, side=100).on_trace(run, Sample("s", ImageRef("p", lambda: picture), "What?", "p"), trace)
    line = json.loads((tmp_path / "maps.jsonl").read_text())
    token = answer.covering(2, 5)[0]
    assert line["shape"] == [8, 20]
    assert list(line["maps"]) == [str(token)]
    view = HeatmapFile(tmp_path).find(_record(answer))
    assert view.picture.size == (100, 40)
    return view.maps[token]


def test_a_padded_picture_has_the_map_of_the_cells_that_show_it(tmp_path):
    values = wide_map(tmp_path)  # 4 x 4 cells lie over the padded square, rows 2 and 3 of them over the picture
    cells = values[::4, ::5].astype(int)  # boxes are measured, to a fraction of a pixel
    assert abs(values.reshape(2, 4, 4, 5).astype(int) - cells[:, None, :, None]).max() <= 5
    assert len(set(cells.ravel().tolist())) > 4
    assert values.max() == 255


def test_a_cropped_picture_has_no_map_where_the_model_does_not_look(tmp_path):
    values = wide_map(tmp_path, pad=False)
    assert not values[:, :6].any()  # the middle square is cut out: columns 6 to 13
    assert not values[:, 14:].any()
    assert values.max() == 255


def _record(answer):
    return Record("stub", "s", "p", "all", "p", "What?", answer=answer)


def test_the_last_line_counts_and_the_others_go(tmp_path):
    file, old, new = HeatmapFile(tmp_path), *(Answer(text, (1,), ((0, 3),), (-0.1,)) for text in ("cat", "dog"))
    for answer, level in ((old, 10), (new, 200)):
        file.append("stub", "s", answer, Image.new("RGB", (8, 8), (level,) * 3), {0: np.full((2, 3), level, np.uint8)})
    file.append("other", "s", old, None, {})
    with file.path.open("ab") as half:
        half.write(b'{"task": "stub", "sam')  # as a kill leaves it
    for _ in range(2):
        assert file.find(_record(old)) is None
        view = file.find(_record(new))
        assert view.maps[0].tolist() == [[200] * 3] * 2
        assert abs(view.picture.getpixel((4, 4))[0] - 200) < 3
        file.compact()
        assert len(file.path.read_bytes().splitlines()) == 2
    compacted = file.path.stat()
    file.compact()
    assert file.path.stat().st_ino == compacted.st_ino  # nothing to remove, so nothing was written


def test_a_run_goes_on_behind_a_line_that_was_cut_short(tmp_path):
    file, answers = HeatmapFile(tmp_path), [Answer(text, (1,), ((0, 3),), (-0.1,)) for text in ("cat", "dog")]
    file.append("stub", "s", answers[0], Image.new("RGB", (64, 64)), {})
    whole = file.path.read_bytes()
    for cut in (1, 2, len(whole) // 2, len(whole) - 1):
        file.path.write_bytes(whole + whole[:cut])
        file.append("stub", "s", answers[1], Image.new("RGB", (8, 8)), {})
        assert file.find(_record(answers[1])).picture.size == (8, 8)
        file.compact()
        assert len(file.path.read_bytes().splitlines()) == 1
        assert file.find(_record(answers[1])).picture.size == (8, 8)


def test_what_is_damaged_is_one_line(tmp_path):
    file, answer = HeatmapFile(tmp_path), Answer("dog", (1,), ((0, 3),), (-0.1,))
    file.append("stub", "s", answer, Image.new("RGB", (8, 8)), {0: np.zeros((2, 2), np.uint8)})
    line = json.loads(file.path.read_text())
    for change in (
        {"picture": "AAAA"}, {"shape": 2}, {"shape": [3, 3]}, {"shape": [4]}, {"shape": [-1, 2]},
        {"maps": {"x": "AAAA"}}, {"maps": [1]}, {"shows": "gradients"}, {"shows": []},
    ):  # fmt: skip
        file.path.write_text(json.dumps({**line, **change}) + "\n")
        with pytest.raises(ArtefactError, match="of s is damaged"):
            HeatmapFile(tmp_path).find(_record(answer))
    with pytest.raises(ConfigError, match=r"callbacks\.maps\.cells=0 should be"):
        SaveHeatmaps(cells=0)


def test_a_line_that_a_kill_has_cut_off_costs_no_other_sample(tmp_path):
    file, answer = HeatmapFile(tmp_path), Answer("dog", (1,), ((0, 3),), (-0.1,))
    for number in range(4):
        file.append("stub", f"s{number}", answer, None, {0: np.full((2, 2), number, np.uint8)})
        if number == 1:
            file.path.write_bytes(file.path.read_bytes()[:-20])  # the next sitting's line follows at once
    file.compact()
    kept = [json.loads(line)["sample_id"] for line in file.path.read_text().splitlines()]
    assert kept == ["s0", "s2", "s3"]
