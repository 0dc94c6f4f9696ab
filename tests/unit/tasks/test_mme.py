"""MME's hallucination part: folders and hub, scores by hand, pairs that are not complete."""

import numpy as np
import pytest
from helpers.by_hand import figures, reply, settings_of
from PIL import Image
from test_sources import cache, write  # noqa: F401 (a fixture)

from stethoscope.core.errors import ConfigError, DataError
from stethoscope.tasks.mme import Mme

ASKED = {"a": [("Is there a dog in this image? Please answer yes or no.", "Yes"), ("Is there an elephant?", "No")]}
ASKED["b"] = [("Is the car red?", "Yes"), ("Is the car blue?", "No")]


@pytest.fixture
def folder(tmp_path):
    """Existence with two images in one folder, colour with texts and images apart."""
    root = tmp_path / "MME"
    for category, texts, images in (("existence", ".", "."), ("color", "questions_answers_YN", "images")):
        for name, ending in (("a", "png"), ("b", "jpg")):
            (root / category / texts).mkdir(parents=True, exist_ok=True)
            (root / category / images).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4), "red").save(root / category / images / f"{name}.{ending}")
            lines = "".join(f"{question}\t{truth}\r\n" for question, truth in ASKED[name])
            (root / category / texts / f"{name}.txt").write_text(lines)
    return root


def made(folder, *categories, **settings):
    task = Mme(folder=str(folder), categories=list(categories or ("existence", "color")), **settings)
    task.setup()
    return task


def answered(task, *texts):
    """Figures of answers in the order of the samples; None for a sample that failed."""
    pairs = zip(task.samples(), texts, strict=True)
    return figures(task, {sample.id: text for sample, text in pairs if text is not None})


def test_samples(folder):
    samples = made(folder, suffix=" Now.").samples()
    assert [s.id for s in samples[:4]] == ["existence-a-1", "existence-a-2", "existence-b-1", "existence-b-2"]
    assert [s.subset for s in samples] == ["existence"] * 4 + ["color"] * 4
    assert [s.group for s in samples[:4]] == ["a", "a", "b", "b"]
    assert samples[0].question == "Is there a dog in this image? Please answer yes or no. Now."
    assert samples[0].reference == {"label": "yes", "object": "dog"}
    assert samples[-1].image.name == "b.jpg"
    assert samples[-1].image.load().size == (4, 4)


def test_a_broken_file_leaves_no_questions_behind(folder):
    (folder / "existence" / "b.txt").write_text("Is it?\tPerhaps\n")
    task = Mme(folder=str(folder), categories=["existence"])
    for _ in range(2):
        with pytest.raises(DataError, match="neither yes nor no"):
            task.setup()
    assert not task.samples()


def test_score_of_a_category_by_hand(folder):
    """Three of four answers right, one of two images wholly: 75 + 50."""
    values = answered(made(folder, "existence"), "Yes", "No.", "yes it is", "Yes")
    assert values["accuracy", "existence"] == 0.75
    assert values["accuracy_plus", "existence"] == 0.5
    assert values["score", "existence"] == values["score_published", "existence"] == 125
    assert ("score", "total") not in values


def test_strict_reading(folder):
    """Without "yes it is" three answers are read and all right, and one image is whole."""
    values = answered(made(folder, "existence"), "Yes", "No.", "yes it is", "No")
    assert values["score", "existence"] == 200
    assert values["score_strict", "existence"] == 200
    values = answered(made(folder, "existence"), "Yes", "Yes", "yes it is", "No")
    assert values["score_strict", "existence"] == pytest.approx(100 * 2 / 3)


def test_the_first_four_characters_count(folder):
    """ "Nothing of it" is a no, and "I see: yes" is nothing; read strictly, neither is anything."""
    task = made(folder, "existence")
    replies = [task.score(task.samples()[1], reply(text)).detail for text in ("Nothing of it", "I see: yes", "no")]
    assert [(row["reply"], row["strict"]) for row in replies] == [("no", None), (None, None), ("no", "no")]
    values = answered(task, "Yes", "Nothing of it", "Yes", "No")
    assert values["score", "existence"] == 200
    assert values["accuracy", "existence"] == 1.0


def test_an_answer_that_cannot_be_read(folder):
    """Left out, with its image, of the score; wrong in the published one, as in the authors' code."""
    task = made(folder, "existence")
    assert task.score(task.samples()[0], reply("It is a dog")).status == "unparsed"
    values = answered(task, "It is a dog", "No", "Yes", "No")
    assert values["accuracy", "existence"] == values["accuracy_plus", "existence"] == 1.0
    assert values["score", "existence"] == 200
    assert values["score_published", "existence"] == 75 + 50


def test_an_image_with_a_failed_question_has_no_pair(folder):
    values = answered(made(folder, "existence"), "Yes", None, "Yes", "Yes")
    assert values["accuracy", "existence"] == pytest.approx(2 / 3)
    assert values["accuracy_plus", "existence"] == 0.0
    assert values["score_published", "existence"] == pytest.approx(100 * 2 / 3)
    values = answered(made(folder, "existence"), "Yes", None, "Yes", None)
    assert np.isnan(values["accuracy_plus", "existence"])


def test_the_total_is_the_sum_over_categories(folder):
    right, wrong = ["Yes", "No", "Yes", "No"], ["Yes", "Yes", "Yes", "Yes"]
    values = answered(made(folder), *right, *wrong)
    assert (values["score", "existence"], values["score", "color"]) == (200, 50)
    assert values["score", "total"] == 250
    assert values["accuracy", "total"] == 0.75
    values = answered(made(folder), *right, *wrong[:2], None, None)  # one image less does not count less
    assert values["score", "total"] == 250


def test_all_right_is_eight_hundred(folder):
    for category in ("count", "position"):
        (folder / category).symlink_to(folder / "color")
    values = answered(made(folder, "existence", "count", "position", "color"), *["Yes", "No"] * 8)
    assert values["score", "total"] == 800


def test_mentions(folder):
    dog, elephant = made(folder).samples()[:2]
    task = made(folder)
    assert task.mentions(dog, reply("Yes"))[0].label == 0
    assert [(m.object, m.label, m.start, m.end) for m in task.mentions(elephant, reply("Yes."))] == [
        ("elephant", 1, 0, 3)
    ]
    assert task.mentions(dog, reply("No")) == ()


def test_the_hub_gives_the_same(folder, tmp_path):
    rows, pictures = [], []
    for category in ("existence", "artwork", "color"):
        for name, questions in ASKED.items():
            for question, truth in questions:
                rows.append({"question_id": f"{category}/{name}.png", "question": question, "answer": truth})
                rows[-1]["category"] = category
                pictures.append({"path": None, "bytes": (folder / "existence" / "a.png").read_bytes()})
    task = made(None, source="hub", dataset=str(write(tmp_path / "hub" / "mme", rows, pictures)))
    for ours, theirs in zip(task.samples(), made(folder).samples(), strict=True):
        assert (ours.id, ours.question, ours.group, ours.subset) == (
            theirs.id,
            theirs.question,
            theirs.group,
            theirs.subset,
        )
        assert ours.reference == theirs.reference
    assert task.samples()[0].image.load().size == (4, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"categories": ["colour"]}, "did you mean 'color'"),
        ({"categories": "color"}, "should be a list"),
        ({"source": "file"}, "did you mean 'files'"),
        ({"folder": None}, "task.folder"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        Mme(**{"folder": "MME", **settings})


def test_a_task_that_has_read_nothing_yet_tallies_the_same(folder):
    """As `stethoscope compare` makes it, of the records of a finished run."""
    task = made(folder)
    fresh = type(task)(**settings_of(task))
    judged = [(sample, task.score(sample, reply("Yes")).counts) for sample in task.samples()]
    assert fresh.tally(judged) == task.tally(judged)
