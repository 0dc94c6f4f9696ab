"""Data sets through ``datasets.load_dataset``: a local folder of parquet files goes the way of a hub data set."""

import pytest
from by_hand import QUESTIONS

from stethoscope.errors import DataError
from stethoscope.tasks.chair import Chair
from stethoscope.tasks.pope import Pope

datasets = pytest.importorskip("datasets")


def write(folder, rows, images):
    """A data set as the hub lays it out: a card that names the splits, and parquet files with the images inside."""
    data = datasets.Dataset.from_list(rows).add_column("image", images)
    (folder / "data").mkdir(parents=True)
    data.cast_column("image", datasets.Image()).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: test\n    path: data/test-*\n"
        "- config_name: Full\n  data_files:\n  - split: random\n    path: Full/random-*\n---\n"
    )
    return folder


@pytest.fixture
def pope_set(tmp_path, images):
    rows = [
        {
            "id": str(index),
            "question_id": str(row["question_id"]),
            "question": row["text"],
            "answer": row["label"],
            "image_source": row["image"].removesuffix(".png"),
            "category": subset,
        }
        for index, (subset, row) in enumerate((s, r) for s in ("adversarial", "random", "popular") for r in QUESTIONS)
    ]
    pictures = [{"path": None, "bytes": (images / row["image"]).read_bytes()} for row in QUESTIONS] * 3
    return write(tmp_path / "hub" / "pope", rows, pictures)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("local_files_only", [True, False])
def test_pope_equals_the_published_files(pope_set, pope_folder, images, local_files_only):
    hub = Pope("hub", dataset=str(pope_set), local_files_only=local_files_only)
    files = Pope("files", questions=str(pope_folder), images=str(images))
    hub.setup()
    files.setup()
    for one, other in zip(hub.samples(), files.samples(), strict=True):
        assert (one.id, one.question, one.group, one.subset, one.reference) == (
            other.id,
            other.question,
            other.group,
            other.subset,
            other.reference,
        )
        assert one.image.sha256
        assert one.image.load().tobytes() == other.image.load().tobytes()


def test_a_revision_is_found_in_the_hub_cache_without_network(pope_set, tmp_path, monkeypatch):
    cached = tmp_path / "hub_cache" / "datasets--owner--pope"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "v1").write_text("0123abc")
    (cached / "snapshots").mkdir()
    pope_set.rename(cached / "snapshots" / "0123abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    task = Pope("hub", dataset="owner/pope", revision="v1", local_files_only=True)
    task.setup()
    assert len(task.samples()) == 9
    with pytest.raises(DataError, match="cannot be loaded"):
        Pope("hub", dataset="owner/pope", revision="v2", local_files_only=True).setup()


def test_chair(tmp_path, images):
    rows = [{"question_id": 7, "gt_object": ["dog", "chair"]}, {"question_id": 3, "gt_object": []}]
    pictures = [{"path": None, "bytes": (images / name).read_bytes()} for name in ("a.png", "b.png")]
    task = Chair("hub", dataset=str(write(tmp_path / "chair", rows, pictures)))
    task.setup()
    assert [(one.id, one.reference["objects"]) for one in task.samples()] == [("7", ["chair", "dog"]), ("3", [])]
    assert task.samples()[1].image.load().getpixel((0, 0)) == (0, 0, 255)


def test_what_is_wrong_is_said_in_one_line(pope_set, tmp_path, images):
    picture = [{"path": None, "bytes": (images / "a.png").read_bytes()}]
    cases = [
        (Pope("hub", dataset=str(pope_set), split="train"), "split 'train', cannot be loaded"),
        (Pope("hub", dataset=str(tmp_path / "nowhere")), "cannot be loaded"),
        (Pope("hub", dataset="nobody/nothing-at-all", local_files_only=True), "cannot be loaded"),
        (Chair("hub", dataset=str(pope_set)), "has no column 'gt_object'; there are: "),
        (
            Chair("hub", dataset=str(write(tmp_path / "odd", [{"question_id": 1, "gt_object": ["doge"]}], picture))),
            "row 0, gt_object: unknown COCO object 'doge'; did you mean 'dog'",
        ),
    ]
    for task, message in cases:
        with pytest.raises(DataError) as error:
            task.setup()
        assert message in str(error.value)
        assert "\n" not in str(error.value)
