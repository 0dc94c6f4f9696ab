"""DASH-B, NaturalBench, MMVP, BEAF, PhD and HumbleBench: the published formats, scores by hand, labelled claims."""

import base64
import json

import numpy as np
import pytest
from helpers.by_hand import figures, reply, settings_of
from PIL import Image
from test_sources import cache, write  # noqa: F401 (a fixture)

from stethoscope.core.errors import ConfigError, DataError
from stethoscope.tasks import choice
from stethoscope.tasks.beaf import Beaf
from stethoscope.tasks.counts import harmonic_mean
from stethoscope.tasks.dash_b import DashB
from stethoscope.tasks.humble_bench import HumbleBench
from stethoscope.tasks.mmvp import Mmvp
from stethoscope.tasks.natural_bench import NaturalBench
from stethoscope.tasks.phd import Phd


def picture(path, colour="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), colour).save(path)
    return path


def table(path, columns, rows, separator="\t"):
    lines = [columns, *([row[column] for column in columns] for row in rows)]
    path.write_text("".join(separator.join(map(str, cells)) + "\n" for cells in lines))
    return str(path)


def encoded(path):
    return base64.b64encode(path.read_bytes()).decode()


def answered(task, answer):
    """Figures of a task whose samples are all answered by one text, or by a function of the sample."""
    task.setup()
    text = answer if callable(answer) else lambda sample: answer
    return figures(task, {sample.id: text(sample) for sample in task.samples()})


def perfect(sample):
    return sample.reference["label"]


def same_samples(task, other):
    task.setup()
    other.setup()
    for sample, twin in zip(task.samples(), other.samples(), strict=True):
        assert (sample.question, sample.group, sample.subset) == (twin.question, twin.group, twin.subset)
        assert sample.reference == twin.reference
        assert sample.image.load().tobytes() == twin.image.load().tobytes()


def claims(task, index, text):
    """What an answer claims: (word, object, label)."""
    sample = task.samples()[index]
    mentions = task.mentions(sample, reply(text))
    return [(text[mention.start : mention.end], mention.object, mention.label) for mention in mentions]


# --- DASH-B -----------------------------------------------------------------------------------------------------------

DASH = {
    "neg": {"coco": {"bench": ["1.png", "2.png"]}, "imagenet": {"fire truck": ["3.png"]}},
    "pos": {"coco": {"bench": ["4.png"], "dog": ["1.png", "5.png"]}},
}


@pytest.fixture
def dash(tmp_path):
    for part, sources in DASH.items():
        (tmp_path / f"dash_benchmark_{part}.json").write_text(json.dumps(sources, indent=4))
        for source, objects in sources.items():
            for name, files in objects.items():
                for file in files:
                    picture(tmp_path / part / source / name / file, "red" if part == "neg" else "blue")
    return tmp_path


def test_dash_b_reads_the_published_folder(dash):
    task = DashB(folder=str(dash))
    task.setup()
    first, *_, last = task.samples()
    assert len(task.samples()) == 6
    assert (first.id, first.group) == ("neg-coco-bench-1", "no bench 1")
    assert first.question == "Can you see a bench in this image? Please answer only with yes or no."
    assert first.reference == {"label": "no", "object": "bench"}
    assert (last.id, last.reference["label"]) == ("pos-coco-dog-5", "yes")
    assert len({sample.group for sample in task.samples()}) == 6  # though two pictures are called 1.png
    assert task.notes(task.samples()) == ["Replies are read by the parser 'contains'."]


def test_dash_b_by_hand(dash):
    """Always yes: half right, and nothing by the harmonic mean. Then 2 of 3 absent and all present objects right."""
    values = answered(DashB(folder=str(dash)), "Yes")
    assert [values[name, "all"] for name in ("accuracy", "tnr", "tpr", "harmonic_mean")] == [0.5, 0.0, 1.0, 0.0]
    assert values["yes_rate", "all"] == 1.0
    replies = iter(["no", "Yes.", "No", "yes", "Yes, there is", "YES"])
    values = answered(DashB(folder=str(dash)), lambda sample: next(replies))
    assert values["tnr", "all"] == pytest.approx(2 / 3)
    assert values["accuracy", "all"] == pytest.approx(5 / 6)
    assert values["harmonic_mean", "all"] == pytest.approx(2 * (2 / 3) / (5 / 3))


def test_dash_b_takes_what_it_cannot_read_for_wrong_in_the_published_figures(dash):
    replies = iter(["no", "It isn't.", "No", "yes", "Perhaps", "yes"])
    values = answered(DashB(folder=str(dash)), lambda sample: next(replies))
    assert [values[name, "all"] for name in ("accuracy", "tnr", "tpr")] == [1.0, 1.0, 1.0]
    assert values["tnr_published", "all"] == values["tpr_published", "all"] == pytest.approx(2 / 3)
    assert values["accuracy_published", "all"] == values["harmonic_mean_published", "all"] == pytest.approx(2 / 3)


def test_dash_b_claims(dash):
    task = DashB(folder=str(dash))
    task.setup()
    assert claims(task, 0, "Yes, a bench") == [("Yes", "bench", 1)]
    assert claims(task, 3, "Yes") == [("Yes", "bench", 0)]
    assert claims(task, 0, "No") == []


def test_dash_b_of_the_hub(dash, tmp_path):
    task = DashB(folder=str(dash))
    task.setup()
    samples = task.samples()
    rows = [
        {
            "image_id": number,
            "question_id": number,
            "question": sample.question,
            "object": sample.reference["object"],
            "answer": sample.reference["label"],
            "img_id": sample.group.rpartition(" ")[2] + ".png",
        }
        for number, sample in enumerate(samples)
    ]
    pictures = [{"path": None, "bytes": sample.image.source.read_bytes()} for sample in samples]
    folder = write(tmp_path / "hub" / "dash", rows, pictures)
    same_samples(DashB("hub", dataset=str(folder)), task)
    other = DashB("hub", dataset=str(folder), question="Is there a {object}?")
    other.setup()
    assert other.samples()[2].question == "Is there a fire truck?"


# --- NaturalBench -----------------------------------------------------------------------------------------------------


def natural_rows(groups):
    return [
        {
            "index": 4 * group + position,
            "question": f"Is there a {('dog', 'cat')[position // 2]} in group {group}?",
            "answer": "x",
            "type": ("yes_no", "multiple_choice")[group % 2],
            "picture": f"{group}_{position % 2}.png",
        }
        for group in range(groups)
        for position in range(4)
    ]


@pytest.fixture
def natural(tmp_path):
    rows = natural_rows(4)
    for index, row in enumerate(rows):
        path = picture(tmp_path / "pictures" / row["picture"], (10 * index, 0, 0))
        row |= {"image": encoded(path), "image_path": row["picture"]}
    return rows


COLUMNS = ["index", "image", "question", "answer", "type"]


def test_natural_bench_reads_the_published_table(natural, tmp_path):
    path = table(tmp_path / "NaturalBenchDataset.tsv", COLUMNS, natural)
    task = NaturalBench("files", file=path)
    task.setup()
    samples = task.samples()
    assert [sample.id for sample in samples] == [str(index) for index in range(16)]
    assert [sample.reference["label"] for sample in samples[:8]] == ["yes", "no", "no", "yes", "A", "B", "B", "A"]
    assert samples[0].question == "Is there a dog in group 0? Please answer Yes or No."
    assert samples[4].question.endswith("Please output the letter corresponding to the correct option.")
    assert {sample.group for sample in samples[4:8]} == {"group 1"}
    assert samples[5].image.load().getpixel((0, 0)) == (50, 0, 0)
    inside = [{**row, "image_path": f"{row['image_path']}"} for row in natural]
    other = table(tmp_path / "paths.tsv", ["index", "image_path", "question", "answer", "type"], inside)
    beside = NaturalBench("files", file=other, images=str(tmp_path / "pictures"))
    beside.setup()
    assert [sample.reference for sample in beside.samples()] == [sample.reference for sample in samples]


def test_natural_bench_shares_pictures_between_rows(natural, tmp_path):
    natural[2]["image"] = "0"
    task = NaturalBench("files", file=table(tmp_path / "t.tsv", COLUMNS, natural))
    task.setup()
    assert task.samples()[2].image.name == "0"
    assert task.samples()[2].image.load().getpixel((0, 0)) == (0, 0, 0)


def test_natural_bench_of_the_hub(natural, tmp_path):
    datasets = pytest.importorskip("datasets")
    files = NaturalBench("files", file=table(tmp_path / "t.tsv", COLUMNS, natural))
    rows = [{"Index": r["index"], "Question": r["question"], "Question_Type": r["type"]} for r in natural]
    pictures = [{"path": None, "bytes": base64.b64decode(row["image"])} for row in natural]
    data = datasets.Dataset.from_list(rows).add_column("Image", pictures).cast_column("Image", datasets.Image())
    (tmp_path / "hub").mkdir()
    data.to_parquet(tmp_path / "hub" / "test-00000-of-00001.parquet")
    same_samples(NaturalBench(dataset=str(tmp_path / "hub")), files)


ACCURACIES = ("Acc", "Q_Acc", "I_Acc", "G_Acc")


def natural_task(natural, tmp_path):
    task = NaturalBench("files", file=table(tmp_path / "t.tsv", COLUMNS, natural))
    task.setup()
    return task


@pytest.mark.parametrize("word", ["yes", "no", "A", "B"])
def test_a_blind_answer_is_right_half_of_the_time_and_never_for_a_pair(natural, tmp_path, word):
    replies = {
        "yes_no": {"A": "yes", "B": "no"}.get(word, word),
        "multiple_choice": "B" if word in ("no", "B") else "A",
    }
    values = answered(natural_task(natural, tmp_path), lambda sample: replies[sample.subset])
    assert [values[name, "all"] for name in ACCURACIES] == [0.5, 0.0, 0.0, 0.0]


def test_natural_bench_by_hand(natural, tmp_path):
    """Group 0: (question 0, picture 1) is wrong. Group 1: none. Group 2: all. Group 3: both of the second question."""
    wrong = {"1", "8", "9", "10", "11", "14", "15"}
    other = {"yes": "no", "no": "yes", "A": "B", "B": "A"}

    def answer(sample):
        label = sample.reference["label"]
        return other[label] if sample.id in wrong else f"{label}."

    values = answered(natural_task(natural, tmp_path), answer)
    assert [values[name, "all"] for name in ACCURACIES] == [9 / 16, 4 / 8, 3 / 8, 1 / 4]
    assert [values[name, "multiple_choice"] for name in ACCURACIES] == [6 / 8, 3 / 4, 2 / 4, 1 / 2]
    perfect_values = answered(natural_task(natural, tmp_path), perfect)
    assert [perfect_values[name, "all"] for name in ACCURACIES] == [1.0] * 4


def test_natural_bench_agrees_with_the_formula_written_out(natural, tmp_path):
    task = natural_task(natural, tmp_path)
    rng = np.random.default_rng(0)
    for _ in range(20):
        ones = rng.integers(-1, 2, (4, 4))  # 1, 0, or -1 for an answer that is not read
        words = {sample.id: ones.flat[int(sample.id)] for sample in task.samples()}
        texts = {"yes_no": {1: "yes", 0: "no", -1: "?"}, "multiple_choice": {1: "A", 0: "(B)", -1: "?"}}
        values = answered(task, lambda sample: texts[sample.subset][words[sample.id]])  # noqa: B023
        question = (ones[:, 0] == 1) & (ones[:, 1] == 0), (ones[:, 3] == 1) & (ones[:, 2] == 0)
        image = (ones[:, 0] == 1) & (ones[:, 2] == 0), (ones[:, 3] == 1) & (ones[:, 1] == 0)
        assert values["Q_Acc_published", "all"] == pytest.approx(np.mean(question))
        assert values["I_Acc_published", "all"] == pytest.approx(np.mean(image))
        assert values["G_Acc_published", "all"] == pytest.approx(np.mean(question[0] & question[1]))
        assert values["Acc_published", "all"] == pytest.approx(np.mean(ones == [1, 0, 0, 1]))


def test_natural_bench_claims(natural, tmp_path):
    task = natural_task(natural, tmp_path)
    assert claims(task, 0, "Yes") == [("Yes", "dog in group 0", 0)]
    assert claims(task, 1, "yes, no") == [("yes", "dog in group 0", 1)]
    assert claims(task, 5, "A") == [("A", "unknown", 1)]


# --- MMVP -------------------------------------------------------------------------------------------------------------

MMVP = [
    (1, "Is the door open?", "(a) Open (b) Closed", "(a)"),
    (2, "Is the door open?", "(a) Open (b) Closed", "(b)"),
    (99, "Does the elephant have long or short tusks?", "(a) Long (b) Short", "(a)"),
    (100, "Does the elephant have long or short tusks?", "(a) Long (b) Short", "(b)"),
    (279, "Is the dog, or the cat, left?", "(a) Dog (b) Cat", "(a)"),
    (280, "Is the dog, or the cat, left?", "(a) Dog (b) Cat", "(b)"),
]


@pytest.fixture
def mmvp(tmp_path):
    lines = ["Index,Question,Options,Correct Answer", *(f'{i},"{q}",{o},{a}' for i, q, o, a in MMVP)]
    (tmp_path / "Questions.csv").write_text("\r\n".join(lines), encoding="utf-8-sig")
    for index, *_ in MMVP:
        picture(tmp_path / "MMVP Images" / f"{index}.jpg")
    return {"source": "files", "file": str(tmp_path / "Questions.csv"), "images": str(tmp_path / "MMVP Images")}


def test_mmvp_reads_the_published_table_and_corrects_its_labels(mmvp):
    task, original = Mmvp(**mmvp), Mmvp(**mmvp, labels="original")
    task.setup()
    original.setup()
    assert [sample.reference["label"] for sample in original.samples()] == ["A", "B"] * 3
    assert [sample.reference["label"] for sample in task.samples()] == ["A", "B", "B", "A", "A", "B"]
    assert task.samples()[1].question == (
        "Is the door open?\nA. Open\nB. Closed\nAnswer with the option's letter from the given choices directly."
    )
    assert [sample.group for sample in task.samples()] == ["pair 1", "pair 1", "pair 50", "pair 50"] + ["pair 140"] * 2


def test_mmvp_by_hand(mmvp):
    values = answered(Mmvp(**mmvp), "A")
    assert (values["accuracy", "all"], values["pair_accuracy", "all"]) == (0.5, 0.0)
    replies = iter(["(a)", "b.", "Option B", "The answer is (A)", "B", "Neither"])
    values = answered(Mmvp(**mmvp), lambda sample: next(replies))
    assert values["accuracy", "all"] == pytest.approx(4 / 5)
    assert values["accuracy_published", "all"] == pytest.approx(4 / 6)
    assert (values["pair_accuracy", "all"], values["pair_accuracy_published", "all"]) == (1.0, pytest.approx(2 / 3))


def test_mmvp_claims_and_the_hub(mmvp, tmp_path):
    task = Mmvp(**mmvp)
    task.setup()
    assert claims(task, 1, "A. Open") == [("A", "Open", 1)]
    assert claims(task, 1, "The answer is B") == [("B", "Closed", 0)]
    assert claims(task, 1, "Neither") == []
    rows = [dict(zip(("Index", "Question", "Options", "Correct Answer"), row, strict=True)) for row in MMVP]
    pictures = [{"path": None, "bytes": sample.image.source.read_bytes()} for sample in task.samples()]
    folder = write(tmp_path / "hub" / "mmvp", rows, pictures)
    same_samples(Mmvp(dataset=str(folder), split="test"), task)


# --- BEAF -------------------------------------------------------------------------------------------------------------


def beaf_rows():
    """An original with a car and a train, and two edits: without the train, without the car."""
    rows = []
    for image, there in (("x.jpg", "car train"), ("x_00.png", "car"), ("x_03.png", "train")):
        for name in ("car", "train", "spoon", "bed"):
            truth = "yes" if name in there.split() else "no"
            question = f"Is there a {name} in the image?"
            row = {"id": len(rows), "image": image, "question": question, "orig_img": image == "x.jpg"}
            rows.append({**row, "removed_q": name in ("car", "train"), "gt": truth})
    return rows


@pytest.fixture
def beaf(tmp_path):
    (tmp_path / "beaf_qna.json").write_text(json.dumps(beaf_rows()))
    for name in ("x.jpg", "x_00.png", "x_03.png"):
        picture(tmp_path / "images" / name)
    return {"source": "files", "file": str(tmp_path / "beaf_qna.json"), "images": str(tmp_path / "images")}


CHANGES = ("TU", "IG", "SB_yes", "SB_no", "ID", "F1_TUID")


def test_beaf_vectors(beaf):
    values = answered(Beaf(**beaf), "Yes.")
    assert [values[name, "all"] for name in CHANGES] == [0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    values = answered(Beaf(**beaf), perfect)
    assert [values[name, "all"] for name in CHANGES] == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    assert [values[name, "all"] for name in ("accuracy", "precision", "recall", "f1")] == [1.0] * 4


def beaf_written_out(rows, answers):
    """The authors' figures, but for answers that cannot be read: of these there must be none."""
    outcome, count = {}, dict.fromkeys(("TU", "IG", "SB_yes", "SB_no", "ID", "other"), 0)
    for row in rows:
        text = answers[row["id"]].lower()
        outcome[row["image"], row["question"]] = ("yes" if "yes" in text else "no") == row["gt"], "yes" in text
    kinds = {((True, True), (True, False)): "TU", ((False, False), (False, True)): "IG"}
    kinds |= {((True, True), (False, True)): "SB_yes", ((False, False), (True, False)): "SB_no"}
    for row in rows:
        if row["orig_img"]:
            continue
        before = outcome[row["image"][:-7] + ".jpg", row["question"]]
        after = outcome[row["image"], row["question"]]
        if not row["removed_q"]:
            count["other"] += 1
            count["ID"] += before[0] != after[0]
        elif row["gt"] == "no":
            count[kinds[before, after]] += 1
    removed = sum(count[name] for name in ("TU", "IG", "SB_yes", "SB_no"))
    values = {name: count[name] / removed for name in ("TU", "IG", "SB_yes", "SB_no")}
    values["ID"] = count["ID"] / count["other"]
    return values


def test_beaf_agrees_with_the_formulas_written_out(beaf):
    rng = np.random.default_rng(1)
    for _ in range(20):
        answers = rng.choice(["Yes, there is.", "No.", "I cannot see it"], 12).tolist()
        values = answered(Beaf(**beaf), lambda sample: answers[int(sample.id)])  # noqa: B023
        for name, value in beaf_written_out(beaf_rows(), answers).items():
            assert values[name, "all"] == pytest.approx(value), name
        assert sum(values[name, "all"] for name in CHANGES[:4]) == pytest.approx(1)


def test_beaf_leaves_out_pairs_that_cannot_be_read(beaf):
    """Question 5 asks about the train, which the first edit lacks: its pair is not counted, nor as the row before."""
    values = answered(Beaf(**beaf), lambda sample: "There isn't." if sample.id == "5" else perfect(sample))
    assert (values["TU", "all"], values["ID", "all"]) == (1.0, 0.0)
    values = answered(Beaf(**beaf), lambda sample: "There isn't." if sample.id in ("5", "8") else perfect(sample))
    assert np.isnan(values["TU", "all"])


def test_beaf_samples_and_claims(beaf):
    task = Beaf(**beaf)
    task.setup()
    assert {sample.group for sample in task.samples()} == {"x"}
    assert task.samples()[5].reference == {
        "label": "no", "object": "train", "original": "x", "edited": True, "removed": True,
    }  # fmt: skip
    assert claims(task, 5, "Yes") == [("Yes", "train", 1)]
    assert claims(task, 1, "Yes") == [("Yes", "train", 0)]


def test_beaf_warns_of_questions_that_were_not_asked_before(beaf, tmp_path):
    rows = [row for row in beaf_rows() if row["id"] != 2]
    (tmp_path / "beaf_qna.json").write_text(json.dumps(rows))
    with pytest.warns(UserWarning, match="2 of 8 questions about edited pictures are not asked about the original"):
        values = answered(Beaf(**beaf), "No.")
    assert values["ID", "all"] == pytest.approx(0.0)
    assert values["SB_no", "all"] == 1.0


def test_beaf_on_the_embedded_scenes():
    task = Beaf(scenes=6, edits=2)
    values = answered(task, perfect)
    assert [values[name, "all"] for name in CHANGES] == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    by_key = {(s.reference["original"], s.question, s.image.name): s for s in task.samples()}
    edited = [s for s in task.samples() if s.reference["edited"] and s.reference["removed"] and perfect(s) == "no"]
    assert edited
    for sample in edited:
        original = by_key[sample.group, sample.question, f"{sample.group}.png"]
        assert original.reference["label"] == "yes"
        assert original.image.load().tobytes() != sample.image.load().tobytes()


# --- PhD --------------------------------------------------------------------------------------------------------------

PHD = [
    {
        "image_id": "139", "task": "object recognition", "hitem": "fork", "gt": "dog", "subject": "table",
        "yes_question": "Is there a dog?", "no_question": "Is there a fork?",
        "context": {"iac": "Forks are metal.", "icc": "A fork lies here."},
    },
    {
        "image_id": "164", "task": "counting", "hitem": "nine", "gt": "two", "subject": "dogs",
        "yes_question": "Are there two dogs?", "no_question": "Are there nine dogs?",
        "context": {"iac": "Dogs bark.", "icc": "Nine dogs bark."},
    },
    {
        "image_id": "0", "ccs_description": "A cube-shaped ball.", "task": "attribute recognition",
        "yes_question": "Is the ball a cube?", "no_question": "Is the ball round?",
    },
]  # fmt: skip


@pytest.fixture
def phd(tmp_path):
    (tmp_path / "data.json").write_text(json.dumps(PHD))
    folder = tmp_path / "images"
    picture(folder / "train2014" / "COCO_train2014_000000000139.jpg")
    picture(folder / "val2014" / "COCO_val2014_000000000164.jpg", "blue")
    picture(folder / "CCS_images" / "0.png", "green")
    return {"file": str(tmp_path / "data.json"), "images": str(folder)}


def test_phd_reads_the_published_file(phd):
    task = Phd(**phd)
    task.setup()
    samples = {sample.id: sample for sample in task.samples()}
    assert len(samples) == 2 * (3 * 2 + 1)
    assert [sample.subset for sample in task.samples()][::4] == ["base", "iac", "icc", "ccs"]
    assert samples["icc-0-no"].question == (
        "A fork lies here. In case there is an inconsistency between the context and the image content, you should "
        "follow the image. Is there a fork?"
    )
    assert samples["base-0-yes"].question == "Is there a dog?"
    assert samples["ccs-2-yes"].image.name == "CCS_images/0.png"
    assert samples["base-1-no"].group == samples["icc-1-yes"].group == "val2014/COCO_val2014_000000000164"
    assert samples["base-0-no"].reference == {"label": "no", "object": "fork", "task": "object recognition"}


def test_phd_by_hand(phd):
    values = answered(Phd(**phd), "Yes.")
    assert {values["phd_index", mode] for mode in ("base", "iac", "icc", "ccs", "base counting")} == {0.0}
    wrong = {"base-0-no", "icc-0-no", "icc-0-yes", "icc-1-yes"}
    swap = {"yes": "no", "no": "yes"}
    values = answered(Phd(**phd), lambda s: swap[perfect(s)] if s.id in wrong else perfect(s))
    assert values["phd_index", "base"] == pytest.approx(2 * 1.0 * 0.5 / 1.5)
    assert values["phd_index", "base object recognition"] == 0.0
    assert values["phd_index", "base counting"] == values["phd_index", "iac"] == values["phd_index", "ccs"] == 1.0
    assert values["phd_index", "icc"] == 0.0
    unread = answered(Phd(**phd), lambda s: "There is." if s.id == "base-1-yes" else perfect(s))
    assert unread["phd_index", "base"] == 1.0
    assert unread["phd_index_published", "base"] == pytest.approx(2 * 0.5 / 1.5)


def test_phd_of_some_modes_needs_only_their_pictures(phd, tmp_path):
    (tmp_path / "images" / "CCS_images" / "0.png").unlink()
    task = Phd(**phd, modes=["icc"])
    task.setup()
    assert len(task.samples()) == 4
    with pytest.raises(DataError, match="CCS_images/0"):
        Phd(**phd).setup()


def test_phd_of_the_hub(phd, tmp_path):
    files = Phd(**phd)
    files.setup()
    pictures = [sample.image.source.read_bytes() for sample in files.samples() if sample.id[-3:] == "yes"]
    cells = [{"path": None, "bytes": pictures[index]} for index in (0, 1, -1)]
    empty = dict.fromkeys(("hitem", "gt", "subject", "ccs_description"), "")
    rows = [{**empty, **row, "context": json.dumps(row.get("context", {}))} for row in PHD]
    hub = Phd("hub", dataset=str(write(tmp_path / "hub" / "phd", rows, cells)))
    hub.setup()
    for sample, twin in zip(hub.samples(), files.samples(), strict=True):
        assert (sample.id, sample.question, sample.subset) == (twin.id, twin.question, twin.subset)
        assert sample.reference == twin.reference
        assert sample.image.load().tobytes() == twin.image.load().tobytes()


# --- HumbleBench ------------------------------------------------------------------------------------------------------

HUMBLE = [
    {"label": "B", "type": "Object", "question_id": 0, "file_name": "a.png"},
    {"label": "E", "type": "Object", "question_id": 1, "file_name": "b.png"},
    {"label": "C", "type": "Relation", "question_id": 2, "file_name": "a.png"},
]
OPTIONS = "\nA. a dog\nB. a cat\nC. a cow\nD. a hen\nE. None of the above"
HUMBLE = [{**row, "question": f"What is in picture {row['question_id']}?{OPTIONS}"} for row in HUMBLE]


@pytest.fixture
def humble(tmp_path, images):
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in HUMBLE))
    return {"source": "files", "file": str(tmp_path / "metadata.jsonl"), "images": str(images)}


def test_humble_bench_by_hand(humble):
    replies = iter(["B.", "E", "A or B"])
    values = answered(HumbleBench(**humble), lambda sample: next(replies))
    assert values["accuracy", "all"] == 1.0
    assert values["accuracy_published", "all"] == pytest.approx(2 / 3)
    assert (values["accuracy", "Object"], values["accuracy_published", "Relation"]) == (1.0, 0.0)
    assert values["e_accuracy", "all"] == values["e_accuracy_published", "all"] == 1.0
    assert values["chose_B", "all"] == 0.5
    values = answered(HumbleBench(**humble), "E.")
    assert (values["e_accuracy", "all"], values["e_accuracy_published", "all"]) == (1.0, 0.0)
    assert values["accuracy", "all"] == pytest.approx(1 / 3)


def test_humble_bench_variants(humble):
    plain, without, noise = (HumbleBench(**humble, variant=variant) for variant in ("standard", "E", "GN"))
    for task in (plain, without, noise):
        task.setup()
    assert [sample.reference["label"] for sample in without.samples()] == ["E", "E", "E"]
    assert "B. a cat" not in without.samples()[0].question
    assert "C. a cow" in without.samples()[0].question
    assert without.samples()[1].question == plain.samples()[1].question
    assert len({sample.image.sha256 for sample in noise.samples()}) == 1
    assert noise.samples()[0].image.load().size == (256, 256)
    assert (
        [sample.group for sample in noise.samples()] == [sample.group for sample in plain.samples()] == ["a", "b", "a"]
    )
    assert plain.samples()[0].question.endswith("E. None of the above" + plain.suffix)


def test_humble_bench_claims_and_the_hub(humble, tmp_path, images):
    task = HumbleBench(**humble)
    task.setup()
    assert claims(task, 0, "A") == [("A", "a dog", 1)]
    assert claims(task, 0, "The answer is B.") == [("B", "a cat", 0)]
    assert claims(task, 0, "E") == []
    rows = [{key: value for key, value in row.items() if key != "file_name"} for row in HUMBLE]
    pictures = [{"path": None, "bytes": (images / row["file_name"]).read_bytes()} for row in HUMBLE]
    hub = HumbleBench(dataset=str(write(tmp_path / "hub" / "humble", rows, pictures)), split="test")
    hub.setup()
    assert [sample.reference for sample in hub.samples()] == [sample.reference for sample in task.samples()]
    assert hub.samples()[0].group == hub.samples()[2].group != hub.samples()[1].group


# --- all of them ------------------------------------------------------------------------------------------------------


def test_reply_rules_side_by_side():
    """The table of reply rules that published benchmarks apply to one and the same answer."""
    from stethoscope.tasks.yes_no import PARSERS

    table = {
        "Yes, there is.": ("yes", "yes", "yes", "yes"),
        "There isn't.": ("yes", None, None, None),
        "I cannot see one.": ("yes", "no", "no", None),
        "It is not there": ("no", "no", "no", None),
        "Known: yes": ("yes", "yes", "yes", "yes"),
        "No, but yes for the cat": ("no", "yes", "yes", "no"),
    }
    for text, replies in table.items():
        assert tuple(PARSERS[name](text) for name in ("official", "repope", "contains", "earlier")) == replies, text


def test_a_letter_is_looked_for_as_published():
    options = {"A": "", "B": ""}
    texts = ("A", "(b)", "b. Closed", "A answer", "I say: the answer is (B)", "option b", "It is (A)", "Both", "Open")
    replies = ["A", "B", "B", "A", "B", "B", "A", "B", None]
    assert [choice.directed_letter(text, options) for text in texts] == replies


def test_harmonic_mean_keeps_what_is_not_defined():
    assert np.isnan(harmonic_mean(np.array(np.nan), np.array(0.0)))


@pytest.mark.parametrize("name", ["dash", "beaf", "phd", "humble", "mmvp"])
def test_a_task_that_has_read_nothing_yet_tallies_the_same(name, request):
    """As `stethoscope compare` makes it, of the records of a finished run."""
    settings = request.getfixturevalue(name)
    classes = {"dash": DashB, "beaf": Beaf, "phd": Phd, "humble": HumbleBench, "mmvp": Mmvp}
    task = classes[name](folder=str(settings)) if name == "dash" else classes[name](**settings)
    task.setup()
    scored = [(sample, task.score(sample, reply("yes A")).counts) for sample in task.samples()]
    assert type(task)(**settings_of(task)).tally(scored) == task.tally(scored)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DashB(folder="x", parser="contain"), "did you mean 'contains'"),
        (lambda: DashB(folder="x", question="Is it there?"), "should contain {object}"),
        (lambda: DashB(), "task.folder"),
        (lambda: NaturalBench("files"), "task.file"),
        (lambda: Mmvp("files", file="x"), "task.images"),
        (lambda: Mmvp(labels="corected"), "did you mean 'corrected'"),
        (lambda: Beaf("files"), "task.file"),
        (lambda: Beaf(scenes=0), "task.scenes=0 should be a whole number of at least 1"),
        (lambda: Beaf(edits=1.5), "task.edits=1.5 should be a whole number"),
        (lambda: Beaf(scenes=True), "task.scenes=True should be a whole number"),
        (lambda: Beaf(scenes="5"), "task.scenes='5' should be a whole number"),
        (lambda: NaturalBench(suffix="no"), "task.suffix='no' should be true or false"),
        (lambda: NaturalBench(local_files_only="false"), "task.local_files_only='false' should be true or false"),
        (lambda: Phd(file="x", images="y", modes=["ics"]), "unknown mode of phd 'ics'; did you mean 'icc'"),
        (lambda: HumbleBench(variant="noise"), "unknown variant of humble_bench 'noise'"),
    ],
)
def test_wrong_settings(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


@pytest.mark.parametrize(("given", "expected"), [("false", False), ("true", True), (False, False)])
def test_the_suffix_of_natural_bench_is_a_flag_on_the_command_line_too(given, expected):
    assert NaturalBench(suffix=given).suffix is expected


def dumped(path, value):
    path.write_text(json.dumps(value) if not isinstance(value, str) else value)


BEAF = {"id": 0, "image": "x.jpg", "question": "Is there a car?", "orig_img": True, "removed_q": False, "gt": "yes"}
NATURAL = "index\timage_path\tquestion\ttype\n"
HEADER = "Index,Question,Options,Correct Answer\n"
BAD = [
    # fixture, file, its content, what is said
    ("dash", "dash_benchmark_neg.json", "[]", "an object of sources, objects and lists of file names was expected"),
    ("dash", "dash_benchmark_neg.json", {"coco": ["a.png"]}, "coco should be an object of lists, not ['a.png']"),
    ("dash", "dash_benchmark_neg.json", {"coco": {"bench": "1.png"}}, "bench should be a list of file names"),
    ("dash", "dash_benchmark_pos.json", {"coco": {"bench": ["9.png"]}}, "image 'pos/coco/bench/9.png' is not in"),
    ("dash", "dash_benchmark_pos.json", {"..": {"x": ["9.png"]}}, "leads out of"),
    ("dash", "dash_benchmark_pos.json", {"coco": {"dog": ["5.png", "5.png"]}}, "id pos-coco-dog-5 is used before"),
    ("natural", "t.tsv", "", "t.tsv is empty; a table with the columns index"),
    ("natural", "t.tsv", "index\tquestion\n", "line 1: column 'type' is missing; there are: index, question"),
    ("natural", "t.tsv", NATURAL + "0\t0_0.png\tIs it?\n", "line 2: 3 cells, but 4 columns"),
    ("natural", "t.tsv", NATURAL + "x\t0_0.png\tIs it?\tyes_no\n", "line 2: index 'x' is no whole number"),
    ("natural", "t.tsv", NATURAL + "0\t0_0.png\tIs it?\tyesno\n", "did you mean 'yes_no'"),
    ("natural", "t.tsv", NATURAL + "0\t0_0.png\t \tyes_no\n", "is no question"),
    ("natural", "t.tsv", NATURAL + "0\t9.png\tIs it?\tyes_no\n", "line 2: image '9.png' is not in"),
    ("natural", "t.tsv", NATURAL + "0\t0_0.png\tIs it?\tyes_no\n", "1 of the 4 rows with the indices 0 to 3 are there"),
    ("natural", "t.tsv", NATURAL + '0\t"0_0.png\tIs it?\tyes_no\n', "line 2: no row of a table"),
    ("mmvp", "Questions.csv", "Index,Question\n", "column 'Options' is missing"),
    ("mmvp", "Questions.csv", HEADER + "1,Is it?,(a) x (c) y,(a)\n", "should be of the form '(a) Open (b) Closed'"),
    ("mmvp", "Questions.csv", HEADER + "1,Is it?,(a) x (b) y,(c)\n", "label 'C' is neither A nor B"),
    ("mmvp", "Questions.csv", HEADER + "3,Is it?,(a) x (b) y,(a)\n", "image '3.jpg' is not in"),
    ("beaf", "beaf_qna.json", [{**BEAF, "gt": "maybe"}], "label 'maybe' is neither yes nor no"),
    ("beaf", "beaf_qna.json", [{**BEAF, "orig_img": 1}], "orig_img 1 is neither true nor false"),
    ("beaf", "beaf_qna.json", [{**BEAF, "orig_img": False}], "should be called <original>_NN.png"),
    ("beaf", "beaf_qna.json", [BEAF, BEAF], "id 0 is used before"),
    ("beaf", "beaf_qna.json", [{**BEAF, "orig_img": False, "image": "x_00.png"}], "is asked about x too"),
    ("phd", "data.json", [{**PHD[0], "context": {"icc": ""}}], "context has no text for mode 'iac'"),
    ("phd", "data.json", [{**PHD[0], "image_id": "../1"}], "image_id '../1' is no number of a COCO image"),
    ("phd", "data.json", [{**PHD[2], "image_id": "../../x"}], "leads out of"),
    ("phd", "data.json", [{**PHD[0], "no_question": None}], "key 'no_question' is missing"),
    ("phd", "data.json", PHD[:2], "no row of mode 'ccs'"),
    ("humble", "metadata.jsonl", {**HUMBLE[0], "label": "F"}, "label 'F' is none of A, B, C, D, E"),
    ("humble", "metadata.jsonl", {**HUMBLE[0], "type": " "}, "type ' ' is empty"),
    ("humble", "metadata.jsonl", {**HUMBLE[0], "file_name": "z.png"}, "image 'z.png' is not in"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "file", "content", "message"), BAD)
def test_one_line_says_what_is_wrong(name, file, content, message, request, tmp_path):
    settings = request.getfixturevalue(name)
    dumped(tmp_path / file, content)
    tasks = {
        "dash": lambda: DashB(folder=str(settings)),
        "natural": lambda: NaturalBench("files", file=str(tmp_path / "t.tsv"), images=str(tmp_path / "pictures")),
        "mmvp": lambda: Mmvp(**settings),
        "beaf": lambda: Beaf(**settings),
        "phd": lambda: Phd(**settings),
        "humble": lambda: HumbleBench(**settings),
    }
    with pytest.raises(DataError) as error:
        tasks[name]().setup()
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


def test_pictures_in_a_table_that_are_none(natural, tmp_path):
    for cell, message in (("", "no picture in the column"), ("7", "names no row before this one")):
        rows = [{**natural[0], "image": cell}, *natural[1:4]]
        with pytest.raises(DataError, match=message):
            NaturalBench("files", file=table(tmp_path / "t.tsv", COLUMNS, rows)).setup()
    rows = [{**natural[0], "image": "!" * 80}, {**natural[1], "image": "AAAA" * 20}, *natural[2:4]]
    task = NaturalBench("files", file=table(tmp_path / "t.tsv", COLUMNS, rows))
    task.setup()
    for sample, message in zip(task.samples(), ("not in base64", "not an intact file"), strict=False):
        with pytest.raises(DataError, match=message):
            sample.image.load()
    with pytest.raises(DataError, match=r"called \.tsv or \.csv"):
        NaturalBench("files", file=str(tmp_path / "t.json")).setup()


def test_cells_in_quotation_marks_over_several_lines(natural, tmp_path):
    rows = [{**row, "question": f'"First line\nof ""{row["index"]}"""'} for row in natural[:4]]
    task = NaturalBench("files", file=table(tmp_path / "t.tsv", COLUMNS, rows))
    task.setup()
    assert task.samples()[1].question == 'First line\nof "1" Please answer Yes or No.'
    assert task.samples()[3].image.load().getpixel((0, 0)) == (30, 0, 0)
