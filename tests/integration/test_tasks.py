"""The further benchmarks through the command line, on the embedded model and scenes in the authors' file formats."""

import json
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from helpers import published_files

from stethoscope import testbed
from stethoscope.core.token_table import mention_rows
from stethoscope.evaluation.results import TaskResults
from stethoscope.storage.run_dir import RunStore

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "tasks"))
from helpers import amber_published

PLAIN = ["callbacks=none", "logger=none", "name=run"]
SCENES = 12


@pytest.fixture(scope="module")
def scenes():
    return testbed.scenes(SCENES)


@pytest.fixture
def evaluated(tmp_path, stethoscope):
    """Runs a task; gives its figures by (metric, subset), the answers by sample id, and the section of metrics.json."""

    def call(*words, **_):
        stethoscope("evaluate", *words, *PLAIN, code=0)
        (section,) = json.loads((tmp_path / "runs" / "run" / "metrics.json").read_text()).values()
        figures = {(row["metric"], row["subset"]): row["value"] for row in section["metrics"]}
        lines = (tmp_path / "runs" / "run" / "samples.jsonl").read_text().splitlines()
        return figures, {row["sample_id"]: row for row in map(json.loads, lines)}, section

    return call


def test_amber(tmp_path, scenes, evaluated, stethoscope):
    folder, count = tmp_path / "amber", 6 * 8
    figures, records, section = evaluated(*published_files.amber(folder, scenes[:8]))
    assert section["counts"] == {"samples": count, "ok": count, "unparsed": 0, "failed": 0, "truncated": 0}
    annotations = {row["id"]: row for row in json.loads((folder / "annotations.json").read_text())}
    association = json.loads((folder / "relation.json").read_text())
    texts = {int(id_.split("-")[1]): record["answer"]["text"] for id_, record in records.items()}
    described = {id_: text for id_, text in texts.items() if annotations[id_]["type"] == "generative"}
    known = {word: word for word in association} | {"man": "man", "men": "man", "woman": "woman", "women": "woman"}
    known |= {f"{word}s": word for word in association} | {"benches": "bench", "buses": "bus", "knives": "knife"}

    def nouns_of(text):
        return [known[word] for word in re.findall(r"\w+", text) if word in known]

    theirs = amber_published.describe(described, annotations, association, (), nouns_of, lambda noun, other: False)
    for name, value in theirs.items():
        assert figures[name, "generative"] == pytest.approx(value), name
    assert theirs["chair"] > 0.05  # the embedded model invents
    asked = {id_: text for id_, text in texts.items() if id_ not in described}
    theirs |= amber_published.questions(asked, annotations)
    assert figures["f1_published", "discriminative"] == pytest.approx(theirs["f1"])
    assert figures["f1", "discriminative"] == pytest.approx(theirs["f1"])  # its answers are the very words
    assert figures["amber", "all"] == pytest.approx((100 - 100 * theirs["chair"] + 100 * theirs["f1"]) / 2)
    stethoscope("extract", "run=runs/run", "callbacks=none", "features=fast", code=0)
    rows = mention_rows(RunStore(tmp_path / "runs" / "run").tokens("amber"))
    for row in rows.itertuples():
        if row.subset == "generative":
            truth = annotations[int(row.sample_id.split("-")[1])]["truth"]
            person = row.object in ("man", "woman") and "person" in truth
            assert row.label == int(row.object not in truth and not person)
        else:
            assert row.label == int(records[row.sample_id]["reference"]["label"] == "no")
    assert {0, 1} == set(rows["label"])


def test_mme(tmp_path, scenes, evaluated):
    figures, records, section = evaluated(*published_files.mme(tmp_path / "mme", scenes))
    assert section["counts"]["samples"] == 4 * 2 * SCENES
    right = defaultdict(list)
    for record in records.values():
        reply_start = record["answer"]["text"].lower()[:4]
        reply = "yes" if "yes" in reply_start else "no" if "no" in reply_start else "other"
        right[record["subset"], record["image"]].append(reply == record["reference"]["label"])
    total = 0
    for category in ("existence", "count", "position", "color"):
        pairs = [pair for (group, _), pair in right.items() if group == category]
        assert {len(pair) for pair in pairs} == {2}
        score = 100 * np.mean(pairs) + 100 * np.mean([all(pair) for pair in pairs])
        assert figures["score", category] == figures["score_published", category] == pytest.approx(score)
        total += score
    assert figures["score", "total"] == pytest.approx(total)
    assert section["primary"] == "score"
    assert total < 800


def test_hallusion_bench(tmp_path, scenes, evaluated):
    words = published_files.hallusion_bench(tmp_path / "hallusion", scenes)
    figures, records, section = evaluated(*words)
    asked = [row for row in json.loads((tmp_path / "hallusion" / "HallusionBench.json").read_text())]
    asked = [row for row in asked if row["visual_input"] != "0"]
    assert section["counts"]["ok"] == len(asked) == 2 * SCENES
    groups = {"fAcc": defaultdict(list), "qAcc": defaultdict(list)}
    for row in asked:
        ids = [row[key] for key in ("category", "subcategory", "set_id", "figure_id", "question_id")]
        right = records["_".join(ids)]["answer"]["text"].strip(".").lower() == ("no", "yes")[int(row["gt_answer"])]
        groups["fAcc"][tuple(ids[:4])].append(right)
        groups["qAcc"][(*ids[:3], ids[4])].append(right)
    for name, sets in groups.items():
        for subset in ("all", "VD", "VS"):
            answers_right = [all(answers) for key, answers in sets.items() if subset in ("all", key[0])]
            assert figures[name, subset] == pytest.approx(np.mean(answers_right))
    assert figures["aAcc", "all"] == pytest.approx(
        np.mean([right for answers_right in groups["fAcc"].values() for right in answers_right])
    )
    assert figures["qAcc", "all"] < 1


def test_halloc(tmp_path, scenes, evaluated, stethoscope):
    """Given answers are read and not written; every word of theirs is a labelled mention with features."""
    words = published_files.halloc(tmp_path / "halloc", scenes)
    figures, records, section = evaluated(*words)
    asked = [json.loads(line) for line in (tmp_path / "halloc" / "halloc.jsonl").read_text().splitlines()]
    assert section["counts"] == {"samples": SCENES, "ok": SCENES, "unparsed": 0, "failed": 0, "truncated": 0}
    assert [records[str(n)]["answer"]["text"] for n in range(1, SCENES + 1)] == [row["answer"] for row in asked]
    surprise = {"hallucinated": [], "grounded": []}
    for number, row in enumerate(asked, 1):
        answer, (span,) = records[str(number)]["answer"], row["spans"]
        for (start, end), logprob in zip(answer["offsets"], answer["logprobs"], strict=True):
            text = answer["text"][start:end]
            inside = start < span["end"] and end > span["start"]
            if inside or re.search(r"\w", text):
                surprise["hallucinated" if inside else "grounded"].append(-logprob)
    gap = np.mean(surprise["hallucinated"]) - np.mean(surprise["grounded"])
    assert figures["nll_gap", "all"] == pytest.approx(gap, abs=1e-5)
    stethoscope("extract", "run=runs/run", "callbacks=none", "features=fast", code=0)
    table = RunStore(tmp_path / "runs" / "run").tokens("halloc")
    for number, row in enumerate(asked, 1):
        (span,), mine = row["spans"], table[table["sample_id"] == str(number)]
        marked = mine[mine["label"] == 1]
        assert (marked["start"].min() <= span["start"]) & (marked["end"].max() == span["end"])
        assert set(mine[mine["end"] <= span["start"]]["label"]) == {0}
        assert np.allclose(mine["nll"], -np.array(records[str(number)]["answer"]["logprobs"]), atol=1e-4)


def test_halloc_without_pictures(tmp_path, scenes, evaluated):
    """The control: what is there surprises a model more that cannot see it."""
    words = published_files.halloc(tmp_path / "halloc", scenes)
    sees, _, _ = evaluated(*words)
    blind, _, _ = evaluated(*words, "task.text_only=true", "overwrite=true")
    assert blind["nll_grounded", "all"] > sees["nll_grounded", "all"] + 0.1


def yes_or_no(text):
    return "yes" if "yes" in text else "no" if "no" in text else None


def lone_letter(text):
    letters = set(re.findall(r"\w+", text)) & set("abcde")
    return letters.pop() if len(letters) == 1 else None


BY_HAND = {
    "dash_b": ("accuracy", yes_or_no),
    "natural_bench": ("Acc", yes_or_no),
    "mmvp": ("accuracy_published", None),
    "beaf": ("accuracy", yes_or_no),
    "phd": ("phd_index", None),
    "humble_bench": ("accuracy", lone_letter),
    "mhal_detect": ("hallucinated", None),
}
"""Task -> a figure, and how to read its replies where the figure is the share of right ones."""


@pytest.mark.parametrize("name", BY_HAND)
def test_further_benchmarks(tmp_path, scenes, evaluated, name):
    words = getattr(published_files, name)(tmp_path / name, scenes)
    figures, records, section = evaluated(*words)
    counts = section["counts"]
    assert counts["ok"] + counts["unparsed"] == counts["samples"] == len(records) > 0
    metric, parse = BY_HAND[name]
    value = figures[metric, "base" if name == "phd" else "all"]
    replies = [(parse(r["answer"]["text"].lower()), r["reference"]["label"].lower()) for r in records.values() if parse]
    if read := [reply == label for reply, label in replies if reply]:
        assert value == pytest.approx(np.mean(read))
    if name == "beaf":
        assert sum(figures[change, "all"] for change in ("TU", "IG", "SB_yes", "SB_no")) == pytest.approx(1)
        assert figures["TU", "all"] > 0.3  # the embedded model sees most objects
    if name == "mhal_detect":
        labels = {mention["label"] for record in records.values() for mention in record["mentions"]}
        assert labels == {0, 1, -1}


@pytest.fixture
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def test_pope_by_the_labels_of_repope_too(tmp_path, scenes, stethoscope):
    out = stethoscope("evaluate", *published_files.pope(tmp_path / "pope", scenes), *PLAIN, code=0)
    (section,) = json.loads((tmp_path / "runs" / "run" / "metrics.json").read_text()).values()
    rows = {(row["metric"], row["subset"]): row for row in section["metrics"]}
    lines = (tmp_path / "runs" / "run" / "samples.jsonl").read_text().splitlines()
    records = [row for row in map(json.loads, lines) if row["subset"] == "random"]
    replies = [
        (row["answer"]["text"].lower(), row["reference"]["label"], row["reference"]["repope"]) for row in records
    ]
    right = [("yes" in text) == (label == "yes") for text, label, _ in replies]
    again = [("yes" in text) == (label == "yes") for text, _, label in replies if label]
    assert 0 < len(again) < len(right)
    assert rows["accuracy", "random"]["value"] == pytest.approx(np.mean(right))
    assert rows["accuracy_repope", "random"]["value"] == pytest.approx(np.mean(again))
    for subset in ("random", "popular", "adversarial", "mean"):
        difference = rows["f1_difference", subset]
        assert difference["value"] == pytest.approx(rows["f1_repope", subset]["value"] - rows["f1", subset]["value"])
        assert difference["low"] < difference["value"] < difference["high"]
        assert difference["groups"] == SCENES
    assert rows["f1_difference", "mean"]["value"] < 0  # the model answers by the right labels, which POPE has here
    notes = [line for line in out.splitlines() if line.startswith(("Replies are read", "RePOPE leaves out", "From "))]
    assert notes[:2] == section["notes"]
    assert notes[2] == f"From {SCENES} images."
    assert "parser 'repope'" in notes[0]


def test_nine_cells_of_pope(tmp_path, scenes, evaluated):
    figures, records, section = evaluated(*published_files.pope_nine(tmp_path / "pope", scenes[:3]))
    cells = {subset for metric, subset in figures if metric == "f1"} - {"mean"}
    assert len(cells) == 9
    assert figures["f1", "mean"] == pytest.approx(np.mean([figures["f1", cell] for cell in cells]))
    assert {row["low"] for row in section["metrics"]} == {None}  # from three images
    assert len(records) == section["counts"]["samples"]


def test_data_sets_described_by_configuration(tmp_path, scenes, evaluated, datasets_cache):
    figures, records, section = evaluated(*published_files.h_pope(tmp_path / "h_pope", scenes))
    assert section["counts"]["ok"] == len(records) == 2 * SCENES
    assert figures["accuracy", "positive"] == figures["tpr", "all"]
    assert figures["accuracy", "negative"] == figures["tnr", "all"]
    assert section["notes"] == ["Replies are read by the parser 'official'."]


def test_multiple_choice_described_by_configuration(tmp_path, scenes, evaluated, datasets_cache):
    figures, records, section = evaluated(*published_files.hub_choice(tmp_path / "crpe", scenes))
    assert section["counts"]["samples"] == len(records) == SCENES
    assert records["0"]["question"].splitlines()[1].startswith("A. ")
    read = [row["score"]["detail"] for row in records.values() if row["status"] == "ok"]
    if read:
        assert figures["accuracy", "exist"] == pytest.approx(np.mean([row["reply"] == row["label"] for row in read]))


def test_a_changed_answer_is_read_again(tmp_path, scenes, evaluated):
    words = published_files.halloc(tmp_path / "halloc", scenes[:2])
    evaluated(*words)
    file = tmp_path / "halloc" / "halloc.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[1] |= {"answer": "A dog.", "spans": []}
    published_files.dump(file, rows, lines=True)
    _, records, _ = evaluated(*words)
    assert [records[id_]["answer"]["text"] for id_ in ("1", "2")] == [rows[0]["answer"], "A dog."]


def test_one_of_ones_own(tmp_path, scenes, evaluated, stethoscope):
    """Captions with a vocabulary of one's own, described by one YAML file in a folder of one's own."""
    (tmp_path / "conf" / "task").mkdir(parents=True)
    (tmp_path / "pictures").mkdir()
    rows = []
    for scene in scenes:
        scene.image().save(tmp_path / "pictures" / f"{scene.id}.png")
        rows.append({"image": f"pictures/{scene.id}.png", "objects": list(scene.visible)})
    published_files.dump(tmp_path / "mine.jsonl", rows, lines=True)
    (tmp_path / "words.json").write_text(json.dumps(list(testbed.CATEGORIES)))
    (tmp_path / "conf" / "task" / "mine.yaml").write_text(
        "# Mine\n_target_: stethoscope.tasks.custom.Custom\nkind: caption\nname: mine\n"
        "question: Please describe this image in detail.\nfile: mine.jsonl\nextraction: words.json\n"
    )
    figures, records, section = evaluated("--config-dir", "conf", "task=mine")
    assert section["counts"]["ok"] == SCENES
    named = invented = 0
    for scene in scenes:
        (record,) = [record for record in records.values() if record["group"] == f"pictures/{scene.id}"]
        for mention in record["mentions"]:
            named, invented = named + 1, invented + (mention["object"] not in scene.visible)
            assert mention["label"] == int(mention["object"] not in scene.visible)
    assert figures["chair_i", "all"] == pytest.approx(invented / named)
    assert named > 2 * SCENES


def test_a_folder_of_images(tmp_path, scenes, evaluated):
    (tmp_path / "pictures").mkdir()
    for scene in scenes[:3]:
        scene.image().save(tmp_path / "pictures" / f"{scene.id}.png")
    words = ["task=custom", "task.images=pictures", "task.question='Please describe this image in detail.'"]
    _, records, section = evaluated(*words)
    assert set(records) == {f"{scene.id}.png" for scene in scenes[:3]}
    assert section["counts"]["ok"] == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task=amber"], "amber needs task.folder"),
        (["task=mme"], "mme needs task.folder"),
        (["task=hallusion_bench"], "hallusion_bench needs task.file"),
        (["task=halloc"], "halloc needs task.file"),
        (["task=custom"], "a custom task needs task.file"),
        (["task=custom", "task.kind=captions"], "unknown kind of custom task 'captions'; did you mean 'caption'?"),
        (["task=custom", "task.file=none.jsonl"], "none.jsonl does not exist"),
        (["task=mme", "task.folder=none"], "none/existence does not exist"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_what_is_missing(words, message, stethoscope):
    assert message in stethoscope("evaluate", *words, *PLAIN)


def test_a_broken_line_of_ones_own(tmp_path, scenes, stethoscope):
    scenes[0].image().save(tmp_path / "a.png")
    rows = '{"image": "a.png", "question": "Is there a dog in the image?", "label": "no"}\n{"image": "../a.png"\n'
    (tmp_path / "mine.jsonl").write_text(rows)
    line = stethoscope("evaluate", "task=custom", "task.kind=yes_no", "task.file=mine.jsonl", *PLAIN)
    assert "mine.jsonl, line 2: not JSON" in line


def test_answers_that_are_no_yes_and_no_no_are_counted_where_they_are(tmp_path, stethoscope):
    """Given answers, so that which ones can be read is known; none is scored as wrong, none is lost."""
    testbed.scenes(1)[0].image().save(tmp_path / "a.png")
    replies = {"colour": ["Yes.", "no", "A city.", "No"], "shape": ["A city.", "A city."], "size": ["Yes."]}
    rows = [
        {"image": name, "question": "Is it red?", "label": "no", "subset": subset, "answer": answer}
        for subset, answers in replies.items()
        for answer, name in zip(answers, ["a.png"] * 4, strict=False)
    ]
    (tmp_path / "broken.png").write_bytes(b"none")
    rows.append({**rows[-1], "image": "broken.png"})
    (tmp_path / "asked.json").write_text(json.dumps(rows, indent=1))
    words = ["model.random_init=tiny", "task=custom", "task.kind=yes_no", f"task.file={tmp_path / 'asked.json'}"]
    assert "1 of 8 samples failed" in stethoscope("evaluate", *words, *PLAIN)
    (section,) = json.loads((tmp_path / "runs" / "run" / "metrics.json").read_text()).values()
    figures = {(row["metric"], row["subset"]): row["value"] for row in section["metrics"]}
    assert section["counts"] == {"samples": 8, "ok": 4, "unparsed": 3, "failed": 1, "truncated": 0}
    assert section["subset_counts"] == {
        "colour": {"samples": 4, "ok": 3, "unparsed": 1, "failed": 0},
        "shape": {"samples": 2, "ok": 0, "unparsed": 2, "failed": 0},
        "size": {"samples": 2, "ok": 1, "unparsed": 0, "failed": 1},
    }
    assert figures["accuracy", "colour"] == pytest.approx(2 / 3)
    assert figures["accuracy", "shape"] is None
    assert figures["accuracy", "size"] == 0
    assert TaskResults.from_dict("custom", section).summary() == (
        "8 samples: 4 ok, 3 unparsed, 1 failed; 0 truncated; "
        "by subset: colour 1 unparsed of 4, shape 2 unparsed of 2, size 1 failed of 2"
    )
