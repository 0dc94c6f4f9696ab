"""POPE's answers by RePOPE's labels, the file before POPE's fix, and the questions of A-OKVQA and GQA."""

import json

import numpy as np
import pytest
from helpers.by_hand import QUESTIONS, figures, reply
from helpers.parquet_folder import write_split

from stethoscope.core.errors import DataError
from stethoscope.metrics.bootstrap import count_replicates, group_weights
from stethoscope.tasks.pope import SUBSETS, Pope

CORRECTED = [
    {"question_id": 1, "image": "a.png", "text": "Is there a dog in the image?", "label": "no"},
    {"question_id": 2, "image": "a.png", "text": "Is there a fire hydrant in the image?", "label": "no"},
]  # the apple of question 3 is ambiguous


def write(folder, name, rows):
    (folder / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))


@pytest.fixture
def repope_folder(tmp_path):
    folder = tmp_path / "repope"
    folder.mkdir()
    for subset in SUBSETS:
        write(folder, f"coco_repope_{subset}.json", CORRECTED)
    return folder


@pytest.fixture
def settings(pope_folder, repope_folder, images):
    return {"questions": str(pope_folder), "images": str(images), "repope": str(repope_folder)}


def read(**settings):
    task = Pope("files", **settings)
    task.setup()
    return task


def answers(task, by_number):
    return {sample.id: by_number[sample.id.rpartition("-")[2]] for sample in task.samples()}


def test_corrected_labels_alone(settings):
    task = read(labels="repope", **settings)
    assert [sample.id for sample in task.samples()][:3] == ["random-1", "random-2", "popular-1"]
    assert [sample.reference["label"] for sample in task.samples()] == ["no", "no"] * 3
    assert task.parser == "repope"
    values = figures(task, answers(task, {"1": "Yes", "2": "I cannot see one"}))
    assert values["accuracy", "random"] == values["tnr", "random"] == 0.5
    assert np.isnan(values["tpr", "random"])
    (mention,) = task.mentions(task.samples()[0], reply("Yes"))
    assert mention.label == 1
    assert task.notes(task.samples()) == [
        "Replies are read by the parser 'repope'; labels: RePOPE's.",
        "RePOPE leaves out 1 of 3 (random), 1 of 3 (popular), 1 of 3 (adversarial) of POPE's questions; they are not "
        "asked.",
    ]


def test_the_same_answers_by_both(settings):
    task = read(labels="both", subsets=["random"], **settings)
    dog, hydrant, apple = task.samples()
    assert [sample.reference["repope"] for sample in task.samples()] == ["no", "no", None]
    assert dog.reference["label"] == "yes"
    values = figures(task, {"random-1": "Yes", "random-2": "no", "random-3": "Yes"})
    assert (values["accuracy", "random"], values["accuracy_repope", "random"]) == (1.0, 0.5)
    assert values["accuracy_difference", "random"] == -0.5
    assert values["tnr_repope", "random"] == 0.5
    assert len({metric for metric, _ in values}) == 24
    assert [task.mentions(sample, reply("Yes"))[0].label for sample in (dog, hydrant, apple)] == [1, 1, -1]
    score = task.score(apple, reply("Yes"))
    assert (score.status, score.counts["tp"], score.counts["repope_tp"]) == ("ok", 1.0, 0.0)
    assert task.notes(task.samples()[:2])[1] == "RePOPE leaves out 0 of 2 (random)."


def test_the_difference_is_paired_over_images(settings):
    task = read(labels="both", **settings)
    scored = [(sample, task.score(sample, reply("yes")).counts) for sample in task.samples()]
    counts = {name: np.array([own[name] for _, own in scored]) for name in scored[0][1]}
    resamples = group_weights([sample.group for sample, _ in scored], replicates=20)
    subsets = [sample.subset for sample, _ in scored]
    values = count_replicates(task.metrics(), counts, subsets, resamples, task.macro)
    for subset in (*SUBSETS, "mean"):
        paired = values["accuracy_repope", subset] - values["accuracy", subset]
        assert np.allclose(values["accuracy_difference", subset], paired, equal_nan=True)


def test_other_ids_of_the_same_questions_and_wrong_ids(settings, pope_folder, images):
    """A file that numbers otherwise has the labels of its own questions, and never those of a line or an id."""
    rows = [QUESTIONS[2] | {"question_id": 1}, QUESTIONS[1], QUESTIONS[0] | {"question_id": 3}]
    rows[1] = rows[1] | {"text": "Is there a fire hydrant in the imange?"}  # as the old file spells some
    write(pope_folder, "coco_pope_random.json", rows)
    task = read(labels="both", subsets=["random"], **settings)
    assert [sample.reference["repope"] for sample in task.samples()] == [None, "no", "no"]


def test_the_hub_gives_the_same(settings, pope_folder, images, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [
        {"question_id": str(row["question_id"]), "question": row["text"], "answer": row["label"]}
        | {"image_source": row["image"].removesuffix(".png"), "category": subset}
        for subset in SUBSETS[::-1]
        for row in QUESTIONS
    ]
    pictures = [(images / row["image"]).read_bytes() for _ in SUBSETS for row in QUESTIONS]
    folder = write_split(tmp_path / "hub", rows, pictures, "test")
    hub = Pope("hub", dataset=str(folder), labels="both", repope=settings["repope"])
    hub.setup()
    for sample, other in zip(hub.samples(), read(labels="both", **settings).samples(), strict=True):
        assert (sample.id, sample.reference) == (other.id, other.reference)


def test_the_file_before_the_fix_is_named(pope_folder, images):
    labels = ["yes"] * 1500 + ["no"] * 1410
    rows = [{**QUESTIONS[0], "question_id": n, "label": label} for n, label in enumerate(labels, 1)]
    write(pope_folder, "coco_pope_random.json", rows)
    task = read(questions=str(pope_folder), images=str(images))
    assert len(task.samples()) == 2910 + 6
    assert "random: POPE's file before its fix, 2,910 of now 3,000 questions" in task.notes(task.samples())[-1]


def test_bad_label_files(settings, repope_folder, pope_folder):
    write(repope_folder, "coco_repope_popular.json", [CORRECTED[0] | {"label": "maybe"}])
    with pytest.raises(DataError, match=r"coco_repope_popular\.json, line 1: label 'maybe' is neither"):
        read(labels="both", **settings)
    (repope_folder / "coco_repope_popular.json").unlink()
    with pytest.raises(DataError, match=r"coco_repope_popular\.json does not exist"):
        read(labels="both", **settings)
    for name in SUBSETS:
        write(repope_folder, f"coco_repope_{name}.json", [CORRECTED[0] | {"image": "other.png"}])
    for labels in ("both", "repope"):
        with pytest.raises(DataError, match="none of the 9 questions is in"):
            read(labels=labels, **settings)


def test_nine_cells(tmp_path, images):
    """Files as AoiDragon/POPE has them for A-OKVQA and GQA: one list, the objects over several lines."""
    other = tmp_path / "gqa"
    other.mkdir()
    for name in ("a.png", "b.png"):
        (other / name).write_bytes((images / name).read_bytes())
    for origin in ("coco", "aokvqa", "gqa"):
        for subset in SUBSETS:
            (tmp_path / f"{origin}_pope_{subset}.json").write_text(json.dumps(QUESTIONS, indent=4))
    pictures = {"coco": str(images), "aokvqa": str(images), "gqa": str(other)}
    task = read(questions=str(tmp_path), images=pictures, origins=["coco", "aokvqa", "gqa"])
    assert len({sample.id for sample in task.samples()}) == 27
    names = [f"{origin} {subset}" for origin in ("coco", "aokvqa", "gqa") for subset in SUBSETS]
    assert list(dict.fromkeys(sample.subset for sample in task.samples())) == names
    values = figures(task, {sample.id: "Yes." for sample in task.samples()})
    assert values["accuracy", "gqa popular"] == pytest.approx(2 / 3)
    alone = read(questions=str(tmp_path), images=str(tmp_path / "{origin}"), origins=["gqa"])
    assert [sample.subset for sample in alone.samples()] == [subset for subset in SUBSETS for _ in QUESTIONS]


SIZES = {"random": 2774, "popular": 2727, "adversarial": 2684}
OF_POPES_LABELS = {
    "random": (0.9481, 0.8925, 0.9957, 0.9413),
    "popular": (0.9347, 0.8925, 0.9673, 0.9284),
    "adversarial": (0.9359, 0.8925, 0.9722, 0.9306),
}
ALWAYS_YES = {"random": (0.4178, 0.5894), "popular": (0.4375, 0.6087), "adversarial": (0.4423, 0.6133)}


@pytest.fixture(scope="module")
def real(shared, tmp_path_factory):
    if not (shared / "repope").is_dir():
        pytest.skip(f"no labels of RePOPE: {shared / 'repope'} is not there")
    folder = tmp_path_factory.mktemp("images")
    for path in (shared / "pope").glob("*.json"):
        for line in path.read_text().splitlines():
            (folder / json.loads(line)["image"]).touch()
    return {"questions": str(shared / "pope"), "images": str(folder), "repope": str(shared / "repope")}


def test_the_published_files_give_the_counts_and_figures_of_the_reference(real):
    task = read(labels="both", **real)
    by_pope = figures(task, {sample.id: sample.reference["label"] for sample in task.samples()})
    constant = figures(task, {sample.id: "Yes" for sample in task.samples()})
    for subset in SUBSETS:
        labels = [(s.reference["label"], s.reference["repope"]) for s in task.samples() if s.subset == subset]
        assert len(labels) == 3000
        assert sum(corrected is not None for _, corrected in labels) == SIZES[subset]
        assert labels.count(("yes", "no")) == 139
        assert labels.count(("yes", "yes")) == 1154
        assert labels.count(("yes", None)) == 207
        names = ("accuracy", "precision", "recall", "f1")
        assert [by_pope[name, subset] for name in names] == [1.0] * 4
        values = [by_pope[f"{name}_repope", subset] for name in names]
        assert values == pytest.approx(OF_POPES_LABELS[subset], abs=5e-5)
        values = [constant[f"{name}_repope", subset] for name in ("accuracy", "precision", "f1")]
        accuracy, f1 = ALWAYS_YES[subset]
        assert values == pytest.approx([accuracy, accuracy, f1], abs=5e-5)
        assert constant["balanced_accuracy_repope", subset] == 0.5
    assert task.notes(task.samples())[1] == (
        "RePOPE leaves out 226 of 3000 (random), 273 of 3000 (popular), 316 of 3000 (adversarial)."
    )
    alone = read(labels="repope", **real)
    assert len(alone.samples()) == sum(SIZES.values())


def test_renumbered_lines_of_the_published_file_keep_their_labels(real, tmp_path, shared):
    """As in POPE's file before its fix: questions are missing, and the others are counted through."""
    rows = [json.loads(line) for line in (shared / "pope" / "coco_pope_random.json").read_text().splitlines()]
    dropped = {row["question_id"] for row in [row for row in rows if row["label"] == "no"][::16][:90]}
    old = [{**row, "question_id": n} for n, row in enumerate((r for r in rows if r["question_id"] not in dropped), 1)]
    write(tmp_path, "coco_pope_random.json", old)
    new = read(labels="both", subsets=["random"], **real)
    labels = {(sample.group, sample.question): sample.reference["repope"] for sample in new.samples()}
    task = read(labels="both", subsets=["random"], **{**real, "questions": str(tmp_path)})
    assert len(task.samples()) == 2910
    assert all(labels[sample.group, sample.question] == sample.reference["repope"] for sample in task.samples())
    assert "before its fix" in task.notes(task.samples())[-1]
