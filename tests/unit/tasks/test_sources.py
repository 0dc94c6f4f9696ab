"""Data sets of Parquet files: a local folder goes the way of a hub data set; nothing outside of it is read."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.by_hand import QUESTIONS, reply

from stethoscope.core.errors import DataError
from stethoscope.tasks.chair import Chair
from stethoscope.tasks.pope import Pope
from stethoscope.tasks.sources import split_files

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
    for sample, other in zip(hub.samples(), files.samples(), strict=True):
        assert (sample.id, sample.question, sample.group, sample.subset, sample.reference) == (
            other.id,
            other.question,
            other.group,
            other.subset,
            other.reference,
        )
        assert sample.image.sha256
        assert sample.image.load().tobytes() == other.image.load().tobytes()


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
    assert [(row.id, row.reference["objects"]) for row in task.samples()] == [
        ("7", ["chair", "dog"]),
        ("3", []),
    ]
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


STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def plain(folder, cells, kind, name="test-00000-of-00001", metadata=None, **columns):
    """One Parquet file as other tools write it, with nothing of ``datasets`` in it; gives the task."""
    count = len(cells)
    table = pa.table(
        {
            "question_id": [str(n) for n in range(count)],
            "question": ["Is there a dog in the image?"] * count,
            "answer": (["yes", "no"] * count)[:count],
            "image_source": [f"p{n}" for n in range(count)],
            "category": ["random"] * count,
            **columns,
            "image": pa.array(cells, kind),
        }
    )
    (folder / "data").mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata(metadata), folder / "data" / f"{name}.parquet")
    return Pope("hub", dataset=str(folder), subsets=["random"])


@pytest.mark.parametrize(
    ("kind", "cell"),
    [
        (STRUCT, lambda data, name: {"bytes": data, "path": None}),
        (STRUCT, lambda data, name: {"bytes": data, "path": "http://127.0.0.1:9/ignored.png"}),
        (STRUCT, lambda data, name: {"bytes": None, "path": f"images/{name}"}),
        (pa.struct([("bytes", pa.binary())]), lambda data, name: {"bytes": data}),
        (pa.struct([("bytes", pa.large_binary()), ("path", pa.null())]), lambda data, name: {"bytes": data}),
        (pa.struct([("path", pa.string())]), lambda data, name: {"path": f"images/{name}"}),
        (pa.binary(), lambda data, name: data),
        (pa.large_binary(), lambda data, name: data),
        (pa.string(), lambda data, name: f"images/{name}"),
        (pa.large_string(), lambda data, name: f"images/{name}"),
        (pa.list_(STRUCT), lambda data, name: [{"bytes": data, "path": None}]),
        (pa.list_(pa.binary()), lambda data, name: [data]),
        (pa.list_(pa.string()), lambda data, name: [f"images/{name}"]),
    ],
    ids=lambda value: "cell" if callable(value) else str(value),  # without addresses: workers compare these names
)
def test_images_as_other_tools_write_them(tmp_path, images, kind, cell):
    folder = tmp_path / "set[1]"
    folder.mkdir()
    images.rename(folder / "images")
    names = ["a.png", "b.png"]
    task = plain(folder, [cell((folder / "images" / name).read_bytes(), name) for name in names], kind)
    task.setup()
    colours = [sample.image.load().getpixel((0, 0)) for sample in task.samples()]
    assert colours == [(255, 0, 0), (0, 0, 255)]
    assert [sample.image.name for sample in task.samples()] == ["p0", "p1"]


@pytest.mark.parametrize(
    ("kind", "cells", "message"),
    [
        (pa.int64(), [1], "the column 'image' holds int64; the bytes of image files were expected"),
        (pa.list_(pa.uint8()), [[1]], "holds list<"),
        (pa.list_(pa.list_(pa.binary())), [[[b""]]], "holds list<"),
        (pa.struct([("data", pa.binary())]), [{"data": b""}], "holds struct<data: binary>"),
        (pa.struct([("bytes", pa.string())]), [{"bytes": ""}], "holds struct<bytes: string>"),
        (pa.list_(pa.binary()), [[b""], [b"", b""]], "row 1: 'image' should be one picture, not 2"),
        (pa.list_(pa.binary()), [[b""], []], "row 1: 'image' should be one picture, not 0"),
        (pa.string(), ["images/a.png", "../out.png"], "row 1: image '../out.png' leads out of"),
        (pa.string(), ["/etc/hostname"], "row 0: image '/etc/hostname' leads out of"),
        (STRUCT, [{"bytes": None, "path": "http://127.0.0.1:9/a.png"}], "is an address; .* nothing is fetched"),
        (STRUCT, [{"bytes": None, "path": "file:///etc/hostname"}], "is an address"),
        (STRUCT, [{"bytes": None, "path": "zip://a.png::http://127.0.0.1:9/b.zip"}], "is an address"),
        (STRUCT, [{"bytes": None, "path": "images/linked.png"}], "is a link that leads out of"),
        (STRUCT, [{"bytes": None, "path": "hf://datasets/a/b/c.png"}], "is an address"),
    ],
)
@pytest.mark.parametrize("typed", [True, False], ids=["typed", "plain"])
def test_images_from_elsewhere_or_of_another_type_are_refused_at_once(
    tmp_path, images, kind, cells, message, typed, monkeypatch
):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a connection was made"))
    folder = tmp_path / "set"
    folder.mkdir()
    (images / "a.png").rename(tmp_path / "out.png")
    images.rename(folder / "images")
    (folder / "images" / "a.png").symlink_to(folder / "images" / "b.png")
    (folder / "images" / "linked.png").symlink_to(tmp_path / "out.png")
    metadata = None
    if typed and kind == STRUCT:  # what made ``datasets`` open paths and addresses
        names = ("question_id", "question", "answer", "image_source", "category")
        features = {name: datasets.Value("string") for name in names} | {"image": datasets.Image()}
        metadata = datasets.Features(features).arrow_schema.metadata
    task = plain(folder, cells, kind, metadata=metadata)
    with pytest.raises(DataError, match=message) as error:
        task.setup()
    assert "\n" not in str(error.value)


def test_the_card_of_a_data_set_names_no_files(pope_set, tmp_path, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a connection was made"))
    for path in ("http://127.0.0.1:9/x.parquet", str(tmp_path / "x.parquet"), "../x.parquet"):
        (pope_set / "README.md").write_text(
            f"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: test\n    path: {path}\n---\n"
        )
        task = Pope("hub", dataset=str(pope_set))
        task.setup()
        assert len(task.samples()) == 9


def test_a_picture_that_is_missing_or_broken_fails_its_sample_alone(tmp_path, images):
    cells = [{"bytes": (images / "a.png").read_bytes()}, None, {"bytes": b"none"}, {"bytes": None, "path": None}]
    task = plain(tmp_path / "set", cells, STRUCT)
    task.setup()
    first, *others = task.samples()
    assert first.image.load().size == (4, 4)
    for sample, message in zip(others, ("is missing from", "not an intact file of", "is missing from"), strict=True):
        with pytest.raises(DataError, match=message):
            sample.image.load()


def test_class_labels_are_names(tmp_path, images):
    names = {"answer": ["no", "yes"], "category": ["popular", "random"]}
    picture = {"path": None, "bytes": (images / "a.png").read_bytes()}
    columns = {
        "question_id": ["1", "2"],
        "question": ["Is there a dog in the image?"] * 2,
        "answer": ["yes", "no"],
        "image_source": ["a", "b"],
        "category": ["random"] * 2,
        "image": [picture] * 2,
    }
    data = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    for column, labels in names.items():
        data = data.cast_column(column, datasets.ClassLabel(names=labels))
    (tmp_path / "set").mkdir()
    data.to_parquet(tmp_path / "set" / "test.parquet")
    task = Pope("hub", dataset=str(tmp_path / "set"), subsets=["random"])
    task.setup()
    assert [sample.reference["label"] for sample in task.samples()] == ["yes", "no"]


def test_rows_of_no_category_are_counted(tmp_path, images):
    data = (images / "a.png").read_bytes()
    task = plain(tmp_path / "set", [data] * 3, pa.binary(), category=[" Random", "randm", None])
    with pytest.warns(UserWarning, match="2 of 3 rows .* are left out, being of no category of POPE: randm, None"):
        task.setup()
    assert len(task.samples()) == 1


def test_all_parts_of_a_split_must_be_there(tmp_path, images):
    data = (images / "a.png").read_bytes()
    folder = tmp_path / "set"
    plain(folder, [data], pa.binary(), "test-00000-of-00003")
    plain(folder, [data], pa.binary(), "test-00002-of-00003", question_id=["2"])
    plain(folder, [data], pa.binary(), "._test-00001-of-00003", question_id=["8"])
    plain(folder, [data], pa.binary(), "non_test-00000-of-00001", question_id=["9"])
    task = Pope("hub", dataset=str(folder), subsets=["random"])
    with pytest.raises(DataError, match="cannot be loaded: 2 of 3 files are in"):
        task.setup()
    plain(folder, [data], pa.binary(), "test-00001-of-00003", question_id=["1"])
    task.setup()
    assert [sample.id for sample in task.samples()] == ["random-0", "random-1", "random-2"]


def test_where_the_files_of_a_split_may_lie(tmp_path):
    def files(*names, split="test"):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        return [file.relative_to(tmp_path).as_posix() for file in split_files(tmp_path, split)]

    assert files("one.parquet", split="train") == ["one.parquet"]
    assert files("default/test/0.parquet", "default/test/1.parquet") == [
        "default/test/0.parquet",
        "default/test/1.parquet",
    ]
    with pytest.raises(DataError, match=r"several folders, .*; name one of them"):
        files("Full/test-00000-of-00001.parquet")
    assert files("data/test.parquet") == ["data/test.parquet"]
    with pytest.raises(DataError, match=r"no Parquet file inside .* there are: Full/test-00000-of-00001.parquet, data"):
        files(split="image")
    (tmp_path / "outside").mkdir()
    (tmp_path / "inside").mkdir()
    (tmp_path / "outside" / "test.parquet").touch()
    (tmp_path / "inside" / "test.parquet").symlink_to(tmp_path / "outside" / "test.parquet")
    with pytest.raises(DataError, match="there are: none"):
        split_files(tmp_path / "inside", "test")


SCENES = 24


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    testbed = pytest.importorskip("stethoscope.testbed")
    if not hasattr(testbed, "export"):
        pytest.skip("stethoscope.testbed has no export yet")
    folder = tmp_path_factory.mktemp("exported")
    testbed.export(folder, testbed.scenes(SCENES))
    return folder


def agree(embedded, other):
    """Two tasks with the same samples, pixels and scores."""
    embedded.setup()
    other.setup()
    texts = ("Yes", "No.", "A dog on a couch near two cars, a person and a bottle.", "A traffic light and people", "")
    for ours, theirs in zip(embedded.samples(), other.samples(), strict=True):
        assert ours.image.name == theirs.image.name
        for field in ("id", "question", "group", "subset", "reference"):
            assert getattr(ours, field) == getattr(theirs, field)
        assert ours.image.load().tobytes() == theirs.image.load().tobytes()
        for answer in map(reply, texts):
            assert embedded.score(ours, answer) == other.score(theirs, answer)
            assert embedded.mentions(ours, answer) == other.mentions(theirs, answer)


def test_pope_reads_exported_scenes_back(exported):
    files = Pope("files", questions=str(exported), images=str(exported / "images"))
    ours = Pope(scenes=SCENES)
    agree(ours, files)
    labels = [sample.reference["label"] for sample in ours.samples()]
    assert labels.count("yes") * 2 == len(labels) > 0
    assert "unknown" not in {sample.reference["object"] for sample in ours.samples()}


def test_chair_reads_exported_scenes_back(exported):
    files = Chair(
        "files",
        instances=str(exported / "instances.json"),
        captions=str(exported / "captions.json"),
        images=str(exported / "images"),
    )
    agree(Chair(scenes=SCENES), files)
