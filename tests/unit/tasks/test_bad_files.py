"""What is said of broken files of the further benchmarks: one line with file and line number, and what was expected."""

import json

import pytest
from helpers.by_hand import reply

from stethoscope.core.errors import DataError
from stethoscope.tasks.amber import Amber
from stethoscope.tasks.custom import Custom
from stethoscope.tasks.halloc import HalLoc
from stethoscope.tasks.hallusion_bench import HallusionBench
from stethoscope.tasks.mme import Mme
from stethoscope.tasks.pope import Pope

DESCRIPTION = {"id": 1, "type": "generative", "truth": ["dog"], "hallu": ["cat"]}
QUESTION = {"id": 2, "type": "relation", "truth": "no"}
QUERIES = [{"id": 1, "image": "a.png", "query": "Describe."}, {"id": 2, "image": "b.png", "query": "Is there a dog?"}]
FIGURE = {"category": "VD", "subcategory": "map", "visual_input": "1", "set_id": "0", "figure_id": "0"}
FIGURE |= {"question_id": "0", "question": "Is it?", "gt_answer": "1"}
SPAN = {"start": 2, "end": 5, "type": "object"}
POPE = {"question_id": 1, "image": "a.png", "text": "?", "label": "no"}
ANSWER = {"image": "a.png", "question": "What?", "answer": "A dog.", "spans": [SPAN]}


@pytest.fixture
def folder(tmp_path, images):
    """Good files of all benchmarks, beside the folder ``images`` with a.png and b.png."""
    (tmp_path / "relation.json").write_text('{"dog": ["puppy"], "cat": []}')
    (tmp_path / "safe_words.txt").write_text("light")
    (tmp_path / "annotations.json").write_text(json.dumps([DESCRIPTION, QUESTION], indent=1))
    (tmp_path / "query_all.json").write_text(json.dumps(QUERIES, indent=1))
    (tmp_path / "VD" / "map").mkdir(parents=True)
    (images / "a.png").rename(tmp_path / "VD" / "map" / "0_0.png")
    (images / "a.png").write_bytes((images / "b.png").read_bytes())
    (tmp_path / "HallusionBench.json").write_text(json.dumps([FIGURE]))
    (tmp_path / "answers.jsonl").write_text(json.dumps(ANSWER) + "\n")
    (tmp_path / "MME" / "count").mkdir(parents=True)
    (tmp_path / "MME" / "count" / "a.png").write_bytes((images / "b.png").read_bytes())
    (tmp_path / "MME" / "count" / "a.txt").write_text("Is it?\tYes\nIs it not?\tNo\n")
    (tmp_path / "asked.jsonl").write_text('{"image": "a.png", "question": "Is it?", "label": "yes"}\n')
    (tmp_path / "truth.jsonl").write_text('{"image": "a.png", "question": "?", "objects": ["dog"]}\n')
    (tmp_path / "coco_pope_random.json").write_text(
        '{"question_id": 1, "image": "a.png", "text": "?", "label": "no"}\n'
    )
    return tmp_path


def tasks(folder):
    images = str(folder / "images")
    return {
        "amber": Amber(str(folder), images),
        "hallusion_bench": HallusionBench(file=str(folder / "HallusionBench.json"), images=str(folder)),
        "halloc": HalLoc(str(folder / "answers.jsonl"), images),
        "mme": Mme(folder=str(folder / "MME"), categories=["count"]),
        "yes_no": Custom("yes_no", file=str(folder / "asked.jsonl"), images=images),
        "caption": Custom("caption", file=str(folder / "truth.jsonl"), images=images),
        "pope": Pope("files", subsets=["random"], questions=str(folder), images=images),
    }


def changed(base, **more):
    return json.dumps({**base, **more})


def listed(*rows):
    return json.dumps(list(rows), indent=1)


def spans(*changes, **more):
    return changed(ANSWER, spans=[{**SPAN, **change} for change in changes], **more)


BAD = [
    # task, file, its content (None: no file), what is said
    ("amber", "annotations.json", None, "annotations.json does not exist"),
    ("amber", "annotations.json", "", "annotations.json is empty; JSON objects were expected"),
    ("amber", "annotations.json", "{}", "annotations.json, line 1: key 'id' is missing"),
    ("amber", "annotations.json", b"\xff\xfe[", "annotations.json is not UTF-16 text"),
    ("amber", "annotations.json", "[\n{},\n", "annotations.json, line 2: key 'id' is missing"),
    ("amber", "annotations.json", listed(DESCRIPTION) + "]", "more after the list's end"),
    ("amber", "annotations.json", listed(DESCRIPTION)[:-2], "line 11: not JSON (a comma or the list's end"),
    ("amber", "annotations.json", listed(DESCRIPTION)[:-2] + ",", "line 11: not JSON (Expecting value"),
    ("amber", "annotations.json", "[\n\n" + "[" * 100_000, "annotations.json, line 3: not JSON that can be read"),
    ("amber", "annotations.json", "[" + "1" * 5000 + "]", "annotations.json, line 1: not JSON that can be read"),
    ("amber", "annotations.json", "[1]", "annotations.json, line 1: a JSON object was expected, not 1"),
    ("amber", "annotations.json", listed(DESCRIPTION, {**QUESTION, "type": "relatio"}), "did you mean 'relation'"),
    ("amber", "annotations.json", listed(DESCRIPTION, {**QUESTION, "truth": "maybe"}), "truth 'maybe' is neither"),
    ("amber", "annotations.json", listed(DESCRIPTION, {**QUESTION, "id": 1}), "line 12: id 1 is used before"),
    ("amber", "annotations.json", listed({**DESCRIPTION, "truth": "dog"}), "'truth' should be a list of words"),
    ("amber", "annotations.json", listed({**DESCRIPTION, "hallu": [1]}), "'hallu' should be a list of words"),
    ("amber", "annotations.json", listed({**DESCRIPTION, "id": [1]}), "line 2: id [1] is no number"),
    ("amber", "annotations.json", listed({**DESCRIPTION, "type": []}), "line 2: unknown type of question"),
    ("amber", "annotations.json", listed(QUESTION), "query_all.json, line 2: id 1 is not among the annotations"),
    ("amber", "query_all.json", "[]", "has no question of generative, existence, attribute, relation"),
    ("amber", "query_all.json", listed(QUERIES[0], QUERIES[0]), "line 7: id 1 is used before"),
    ("amber", "query_all.json", listed({**QUERIES[0], "image": "c.png"}), "query_all.json, line 2: image 'c.png'"),
    ("amber", "query_all.json", listed({**QUERIES[0], "image": "../b.png"}), "leads out of"),
    ("amber", "query_all.json", listed({**QUERIES[0], "query": None}), "line 2: None is no question"),
    ("amber", "query_all.json", listed({**QUERIES[0], "id": {}}), "id {} is not among the annotations"),
    ("amber", "relation.json", "[]", "relation.json: an object was expected"),
    ("amber", "relation.json", '{"dog": "puppy"}', "an object was expected that gives every word a list of words"),
    ("amber", "relation.json", '{"dog":\n ["puppy"}', "relation.json, line 2: not JSON"),
    ("amber", "safe_words.txt", None, "safe_words.txt does not exist"),
    ("hallusion_bench", "HallusionBench.json", "[]", "task hallusion_bench holds no question"),
    ("hallusion_bench", "HallusionBench.json", listed({**FIGURE, "category": "VX"}), "VX/map/0_0.png' is not in"),
    ("hallusion_bench", "HallusionBench.json", listed({**FIGURE, "gt_answer": "2"}), "gt_answer '2' is neither 0"),
    ("hallusion_bench", "HallusionBench.json", listed({**FIGURE, "question": " "}), "' ' is no question"),
    ("hallusion_bench", "HallusionBench.json", listed(FIGURE, FIGURE), "id VD_map_0_0_0 is used before"),
    ("hallusion_bench", "HallusionBench.json", listed({**FIGURE, "set_id": "../../x"}), "leads out of"),
    ("hallusion_bench", "HallusionBench.json", listed({**FIGURE, "subcategory": "/etc"}), "is not in"),
    ("hallusion_bench", "HallusionBench.json", listed({"category": "VD"}), "key 'subcategory' is missing"),
    ("halloc", "answers.jsonl", "", "answers.jsonl is empty"),
    ("halloc", "answers.jsonl", changed(ANSWER) + "\n\n{", "answers.jsonl, line 3: not JSON"),
    ("halloc", "answers.jsonl", changed(ANSWER) + " {}", "line 1: not JSON (more after the object's end"),
    ("halloc", "answers.jsonl", changed(ANSWER, answer=""), "line 1: answer '' is no text"),
    ("halloc", "answers.jsonl", changed(ANSWER, question=3), "line 1: question 3 is no text"),
    ("halloc", "answers.jsonl", changed(ANSWER, spans={}), "line 1: spans should be a list, not {}"),
    ("halloc", "answers.jsonl", changed(ANSWER, spans=["x"]), "spans[0]: an object with start, end and type"),
    ("halloc", "answers.jsonl", spans({"type": "objekt"}), "did you mean 'object'"),
    ("halloc", "answers.jsonl", spans({"end": 7}), "2 to 7 is no span of an answer of 6 characters"),
    ("halloc", "answers.jsonl", spans({"start": -1}), "-1 to 5 is no span"),
    ("halloc", "answers.jsonl", spans({"end": 2}), "2 to 2 is no span"),
    ("halloc", "answers.jsonl", spans({"start": True}), "True to 5 is no span"),
    ("halloc", "answers.jsonl", spans({"start": 1, "end": 2}), "1 to 2 holds nothing but blanks"),
    ("halloc", "answers.jsonl", spans({}, {"start": 4, "end": 6}), "spans 2-5 and 4-6 overlap"),
    ("halloc", "answers.jsonl", "\n".join([changed(ANSWER, id="x")] * 2), "line 2: id x is used before"),
    ("halloc", "answers.jsonl", changed(ANSWER, image="/etc/passwd"), "line 1: image '/etc/passwd' leads out of"),
    ("halloc", "answers.jsonl", changed(ANSWER, image="a\0.png"), "is not in"),
    ("halloc", "answers.jsonl", changed(ANSWER, image="a" * 5000), "is not in"),
    ("halloc", "answers.jsonl", changed(ANSWER, image="\ud800.png"), "half of a surrogate pair"),
    ("mme", "MME/count/a.txt", "Is it? Yes\n", "a.txt, line 1: a question, a tab and Yes or No were expected"),
    ("mme", "MME/count/a.txt", "Is it?\tYes\n\nIs it?\tPerhaps", "line 3: label 'Perhaps' is neither yes nor no"),
    ("mme", "MME/count/a.txt", "\tYes\n", "a.txt, line 1: '' is no question"),
    ("mme", "MME/count/a.txt", "\n", "a.txt holds no question"),
    ("mme", "MME/count/a.txt", None, "has no text file with questions"),
    ("mme", "MME/count/c.txt", "Is it?\tYes\n", "c.txt: one image named c was expected in"),
    ("mme", "MME/count/a.png", None, "holds no image"),
    ("yes_no", "asked.jsonl", None, "asked.jsonl does not exist"),
    ("yes_no", "asked.jsonl", '{"image": "a.png"}', "line 1: key 'label' is missing; there are: image"),
    ("yes_no", "asked.jsonl", '{"image": "a.png", "label": "yes"}', "None is no question; give one on every line"),
    ("yes_no", "asked.jsonl", '{"image": "a.png", "label": 1, "question": "?"}', "label 1 is neither yes nor no"),
    ("yes_no", "asked.jsonl", '\n{"image": "a.png", "label": "no", "question": "?", "answer": 3}', "line 2: answer 3"),
    ("yes_no", "asked.jsonl", '{"image": "images/../../a.png", "label": "no", "question": "?"}', "leads out of"),
    ("yes_no", "asked.jsonl", '{"image": "..\\\\a.png", "label": "no", "question": "?"}', "leads out of"),
    ("yes_no", "asked.jsonl", '{"image": "C:\\\\a.png", "label": "no", "question": "?"}', "leads out of"),
    ("yes_no", "asked.jsonl", '{"image": "", "label": "no", "question": "?"}', "image '' is not in"),
    ("caption", "truth.jsonl", '{"image": "a.png", "objects": "dog", "question": "?"}', "objects should be a list"),
    ("caption", "truth.jsonl", '{"image": "a.png", "objects": ["dig"], "question": "?"}', "the vocabulary 'dig'"),
    ("caption", "truth.jsonl", '{"image": "a.png", "objects": [["dog"]], "question": "?"}', "unknown object of"),
    ("pope", "coco_pope_random.json", changed(POPE, image="../a.png"), "leads out"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "file", "content", "message"), BAD)
def test_one_line_says_what_is_wrong(folder, name, file, content, message):
    path = folder / file
    if content is None:
        path.unlink()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content)
    with pytest.raises(DataError) as error:
        tasks(folder)[name].setup()
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


def test_the_files_are_good_otherwise(folder):
    for task in tasks(folder).values():
        task.setup()
        for sample in task.samples():
            assert sample.image.load().size == (4, 4)
            assert task.score(sample, reply(sample.answer or "A dog")).status in ("ok", "unparsed")
