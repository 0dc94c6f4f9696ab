"""HallusionBench: sets by hand and against a grouping written out, questions without an image, file and hub."""

import json
import random
from collections import defaultdict

import numpy as np
import pytest
from helpers.by_hand import figures, reply, settings_of
from PIL import Image
from test_sources import cache, write  # noqa: F401 (a fixture)

from stethoscope.core.errors import ConfigError
from stethoscope.tasks.hallusion_bench import HallusionBench


def row(category, subcategory, set_id, figure, question, truth, visual="1"):
    ids = {"set_id": str(set_id), "figure_id": str(figure), "question_id": str(question)}
    asked = {"question": f"Is it {set_id}{figure}{question}?", "gt_answer": str(truth), "gt_answer_details": ""}
    filename = f"./hallusion_bench/{category}/{subcategory}/{set_id}_{figure}.png"
    more = {"sample_note": "x", "filename": filename} if visual != "0" else {"sample_note": "x"}
    return {"category": category, "subcategory": subcategory, "visual_input": visual, **ids, **asked, **more}


ROWS = [
    row("VD", "illusion", 0, 0, 0, 1),
    row("VD", "illusion", 0, 0, 1, 0),
    row("VD", "illusion", 0, 1, 0, 0),
    row("VD", "illusion", 0, 1, 1, 1),
    row("VS", "map", 0, 0, 0, 1, visual="0"),
    row("VS", "map", 0, 1, 0, 1),
    row("VS", "map", 0, 2, 0, 0, visual="2"),
]


@pytest.fixture
def root(tmp_path):
    return published(tmp_path, ROWS)


def published(folder, rows):
    """The published file, all on one line, and its images; as settings."""
    for entry in rows:
        if "filename" in entry:
            path = folder / entry["filename"]
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4)).save(path)
    (folder / "HallusionBench.json").write_text(json.dumps(rows))
    return {"file": str(folder / "HallusionBench.json"), "images": str(folder / "hallusion_bench")}


def made(settings, **more):
    task = HallusionBench(**settings, **more)
    task.setup()
    return task


def answered(task, *texts):
    pairs = zip(task.samples(), texts, strict=True)
    return figures(task, {sample.id: text for sample, text in pairs if text is not None})


def test_samples(root):
    samples = made(root, suffix=" Yes or no?").samples()
    assert [s.id for s in samples] == [
        *("VD_illusion_0_0_0", "VD_illusion_0_0_1", "VD_illusion_0_1_0", "VD_illusion_0_1_1"),
        *("VS_map_0_1_0", "VS_map_0_2_0"),
    ]
    assert [s.reference["label"] for s in samples] == ["yes", "no", "no", "yes", "yes", "no"]
    assert {s.group for s in samples} == {"VD_illusion_0", "VS_map_0"}
    assert samples[0].question == "Is it 000? Yes or no?"
    assert samples[-1].image.name == "VS/map/0_2.png"


def test_by_hand(root):
    """Wrong: the second question of the second figure. So 5 of 6, 3 of 4 figures, 2 of 3 questions."""
    values = answered(made(root), "Yes", "No", "no", "The answer is no.", "yes", "No, it is not")
    assert values["aAcc", "all"] == pytest.approx(5 / 6)
    assert values["fAcc", "all"] == pytest.approx(3 / 4)
    assert values["qAcc", "all"] == pytest.approx(2 / 3)
    assert [values[name, "VD"] for name in ("aAcc", "fAcc", "qAcc")] == [0.75, 0.5, 0.5]
    assert [values[name, "VS"] for name in ("aAcc", "fAcc", "qAcc")] == [1.0, 1.0, 1.0]


def test_what_cannot_be_read(root):
    """An answer without yes or no takes its figure and its question out of the figures, but not of the published."""
    task = made(root)
    assert task.score(task.samples()[0], reply("Yes and no")).status == "unparsed"
    values = answered(task, "It is", "No", "no", "Yes", "yes", "no")
    assert [values[name, "all"] for name in ("aAcc", "fAcc", "qAcc")] == [1.0, 1.0, 1.0]
    assert values["aAcc_published", "all"] == pytest.approx(5 / 6)
    assert values["fAcc_published", "all"] == pytest.approx(3 / 4)
    assert values["qAcc_published", "all"] == pytest.approx(2 / 3)


def test_sets_that_are_not_complete_are_not_judged(root):
    values = answered(made(root), "Yes", "Yes", None, None, "yes", None)
    assert values["fAcc", "VD"] == 0.0  # the first figure is complete
    assert np.isnan(values["qAcc", "VD"])
    assert values["fAcc", "VS"] == 1.0
    assert np.isnan(values["qAcc", "VS"])


def test_against_a_grouping_written_out(tmp_path):
    draw = random.Random(3)
    rows = [
        row(category, sub, set_id, figure, question, draw.randrange(2))
        for category, sub in (("VD", "illusion"), ("VD", "math"), ("VS", "chart"))
        for set_id in range(4)
        for figure in range(1, 3)
        for question in range(1 + set_id % 3)
    ]
    task = made(published(tmp_path, rows))
    texts = [draw.choice(("Yes", "No", "Hm", "No", "Yes")) for _ in rows]
    values = answered(task, *texts)
    right = [text == ("No", "Yes")[int(entry["gt_answer"])] for entry, text in zip(rows, texts, strict=True)]
    for name, key in (("fAcc", "figure_id"), ("qAcc", "question_id")):
        groups = defaultdict(list)
        for index, entry in enumerate(rows):
            groups[entry["category"], entry["subcategory"], entry["set_id"], entry[key]].append(index)
        published_value = np.mean([all(right[i] for i in indices) for indices in groups.values()])
        read = [indices for indices in groups.values() if all(texts[i] != "Hm" for i in indices)]
        assert values[f"{name}_published", "all"] == pytest.approx(published_value)
        assert values[name, "all"] == pytest.approx(np.mean([all(right[i] for i in indices) for indices in read]))
        assert 0 < len(read) < len(groups)
    assert values["aAcc_published", "all"] == pytest.approx(np.mean(right))


def test_the_hub_gives_the_same(root, tmp_path):
    rows = [{key: value for key, value in entry.items() if key != "filename"} for entry in ROWS if "filename" in entry]
    pictures = [
        {"path": None, "bytes": (tmp_path / entry["filename"]).read_bytes()} for entry in ROWS if "filename" in entry
    ]
    folder = write(tmp_path / "hub" / "hallusion", rows, pictures)
    for entry, other in zip(
        made({"source": "hub", "dataset": str(folder), "split": "test"}).samples(), made(root).samples(), strict=True
    ):
        assert (entry.id, entry.question, entry.group, entry.subset) == (
            other.id,
            other.question,
            other.group,
            other.subset,
        )
        assert entry.reference == other.reference
        assert entry.image.load().size == (4, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parser": "ether"}, "did you mean 'either'"),
        ({"source": "hab"}, "did you mean 'hub'"),
        ({"file": None}, "task.file"),
        ({"images": None}, "task.images"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        HallusionBench(**{"file": "a", "images": "b", **settings})


def test_a_task_that_has_read_nothing_yet_tallies_the_same(root):
    """As `stethoscope compare` makes it, of the records of a finished run."""
    task = made(root)
    fresh = type(task)(**settings_of(task))
    judged = [(sample, task.score(sample, reply("Yes")).counts) for sample in task.samples()]
    assert fresh.tally(judged) == task.tally(judged)
