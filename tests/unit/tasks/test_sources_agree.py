"""The embedded scenes, and the same scenes exported in the published formats and read back."""

import pytest
from helpers.by_hand import reply

from stethoscope.tasks.chair import Chair
from stethoscope.tasks.pope import Pope

SCENES = 24


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    testbed = pytest.importorskip("stethoscope.testbed")
    if not hasattr(testbed, "export"):
        pytest.skip("stethoscope.testbed has no export yet")
    folder = tmp_path_factory.mktemp("exported")
    testbed.export(folder, testbed.scenes(SCENES))
    return folder


def agree(one, other):
    """Two tasks with the same samples, pixels and scores."""
    one.setup()
    other.setup()
    texts = ("Yes", "No.", "A dog on a couch near two cars, a person and a bottle.", "A traffic light and people", "")
    for ours, theirs in zip(one.samples(), other.samples(), strict=True):
        assert ours.image.name == theirs.image.name
        for field in ("id", "question", "group", "subset", "reference"):
            assert getattr(ours, field) == getattr(theirs, field)
        assert ours.image.load().tobytes() == theirs.image.load().tobytes()
        for answer in map(reply, texts):
            assert one.score(ours, answer) == other.score(theirs, answer)
            assert one.mentions(ours, answer) == other.mentions(theirs, answer)


def test_pope(exported):
    files = Pope("files", questions=str(exported), images=str(exported / "images"))
    ours = Pope(scenes=SCENES)
    agree(ours, files)
    labels = [sample.reference["label"] for sample in ours.samples()]
    assert labels.count("yes") * 2 == len(labels) > 0
    assert "unknown" not in {sample.reference["object"] for sample in ours.samples()}


def test_chair(exported):
    files = Chair(
        "files",
        instances=str(exported / "instances.json"),
        captions=str(exported / "captions.json"),
        images=str(exported / "images"),
    )
    agree(Chair(scenes=SCENES), files)
