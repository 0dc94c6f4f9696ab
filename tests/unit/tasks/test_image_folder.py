"""Pictures of a folder are all found or counted; what annotations name never leads out of it."""

import pytest
from PIL import Image

from stethoscope.core.errors import DataError
from stethoscope.tasks.custom import Custom
from stethoscope.tasks.image_folder import ImageFolder


@pytest.fixture
def tree(tmp_path):
    """A folder with a picture and a folder in it, beside a picture outside."""
    (tmp_path / "in" / "more").mkdir(parents=True)
    for name in ("in/a.png", "in/more/b.png", "out.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    return tmp_path


def test_every_picture_is_asked_about_and_the_rest_is_counted(tree):
    photo = Image.new("RGB", (8, 8), "red")
    kinds = {"b.jfif": "JPEG", "c.JPE": "JPEG", "d.avif": "AVIF", "e.jp2": "JPEG2000", "f.ppm": "PPM",
             "000123": "JPEG", "g.part": "PNG", "more/even/h.webp": "WEBP"}  # fmt: skip
    (tree / "in" / "more" / "even").mkdir()
    for name, kind in kinds.items():
        photo.save(tree / "in" / name, kind)
    for name in ("notes.txt", "x.json", "y.json", "README", ".hidden.png", "._a.png"):
        (tree / "in" / name).write_text("{}")
    (tree / "in" / ".thumbs").mkdir()
    photo.save(tree / "in" / ".thumbs" / "t.png")
    (tree / "in" / "linked").symlink_to(tree, target_is_directory=True)
    task = Custom(images=str(tree / "in"), question="What is there?")
    with pytest.warns(UserWarning, match=r"5 of 15 .* are left out.*: 2 \.json, 1 linked folders, .*1 without ending"):
        task.setup()
    assert {sample.id for sample in task.samples()} == {"a.png", "more/b.png", *kinds}
    assert len({sample.group for sample in task.samples()}) == len(task.samples())
    for sample in task.samples():
        assert sample.image.load().mode == "RGB"


def test_nothing_is_said_of_a_folder_of_pictures_alone(tree, recwarn):
    assert ImageFolder(tree / "in").walk() == ["a.png", "more/b.png"]
    assert not [warning for warning in recwarn if "left out" in str(warning.message)]


@pytest.mark.parametrize(
    "name",
    [
        "../out.png",
        "more/../../out.png",
        "{tree}/out.png",
        "..\\out.png",
        "C:\\out.png",
        "C:/out.png",
        "/etc/hostname",
    ],
)
def test_a_path_that_leads_out(tree, name):
    with pytest.raises(DataError, match="leads out of"):
        ImageFolder(tree / "in").find(name.format(tree=tree), "q.jsonl, line 1")


@pytest.mark.parametrize(
    "name",
    ["http://127.0.0.1:9/a.png", "https://x/a.png", "file:///etc/hostname", "zip://a.png::http://x/y.zip", "s3://a"],
)
def test_an_address_is_never_followed(tree, name, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a connection was made"))
    with pytest.raises(DataError, match=r"is an address; .* nothing is fetched"):
        ImageFolder(tree / "in").find(name, "q.jsonl, line 1")


def test_links_that_lead_out_are_refused_and_those_that_stay_inside_are_not(tree):
    root = tree / "in"
    (root / "out.png").symlink_to(tree / "out.png")
    (root / "more" / "out.png").symlink_to(tree / "out.png")
    (root / "up").symlink_to(tree, target_is_directory=True)
    (root / "same.png").symlink_to(root / "more" / "b.png")
    folder = ImageFolder(root)
    for name in ("out.png", "more/out.png", "up/out.png"):
        with pytest.raises(DataError, match="is a link that leads out of"):
            folder.find(name, "here")
    assert folder.find("same.png", "here").load().size == (4, 4)
    with pytest.raises(DataError, match="is a link that leads out of"):
        Custom(images=str(root), question="?").setup()


def test_the_folder_itself_may_be_a_link(tree):
    (tree / "link").symlink_to(tree / "in", target_is_directory=True)
    folder = ImageFolder(tree / "link")
    assert folder.find("more/b.png", "here").load().size == (4, 4)
    assert folder.walk() == ["a.png", "more/b.png"]


def test_links_of_the_hub_cache_count_as_inside(tree):
    repository = tree / "datasets--me--set"
    (repository / "blobs").mkdir(parents=True)
    (repository / "snapshots" / "0123" / "images").mkdir(parents=True)
    (tree / "out.png").rename(repository / "blobs" / "abc")
    link = repository / "snapshots" / "0123" / "images" / "a.png"
    link.symlink_to("../../../blobs/abc")
    assert ImageFolder(link.parent).find("a.png", "here").load().size == (4, 4)


@pytest.mark.parametrize("name", ["{tree}/in/more/b.png", "more\\b.png", "./more/b.png"])
def test_other_ways_to_name_a_picture_inside(tree, name):
    image = ImageFolder(tree / "in").find(name.format(tree=tree), "here")
    assert image.load().size == (4, 4)
    assert image.group == "more/b"
