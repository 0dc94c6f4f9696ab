"""Any file in the place of a published one: the task reads it and judges answers, or says in one line what is wrong."""

import json
import shutil
import warnings

import pytest
from fuzz.broken import answers, damaged, json_bytes, judged, line_bytes
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from stethoscope.tasks.amber import Amber
from stethoscope.tasks.beaf import Beaf
from stethoscope.tasks.chair import Chair
from stethoscope.tasks.custom import Custom
from stethoscope.tasks.dash_b import DashB
from stethoscope.tasks.extraction import read_vocabulary
from stethoscope.tasks.halloc import HalLoc
from stethoscope.tasks.hallusion_bench import HallusionBench
from stethoscope.tasks.humble_bench import HumbleBench
from stethoscope.tasks.mhal_detect import MHalDetect
from stethoscope.tasks.mme import Mme
from stethoscope.tasks.mmvp import Mmvp
from stethoscope.tasks.natural_bench import NaturalBench
from stethoscope.tasks.phd import Phd
from stethoscope.tasks.pope import Pope

POPE = [
    {"question_id": 1, "image": "a.png", "text": "Is there a dog in the image?", "label": "no"},
    {"question_id": 2, "image": "b.png", "text": "Is there a cat in the image?", "label": "yes"},
]
IMAGES = [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}]
INSTANCES = {
    "images": IMAGES,
    "annotations": [{"image_id": 1, "category_id": 18}, {"image_id": 2, "category_id": 17}],
    "categories": [{"id": 18, "name": "dog"}, {"id": 17, "name": "cat"}],
}
CAPTIONS = {"images": IMAGES, "annotations": [{"image_id": 1, "caption": "a dog"}, {"image_id": 2, "caption": "cats"}]}
AMBER = [
    {"id": 1, "type": "generative", "truth": ["dog"], "hallu": ["cat"]},
    {"id": 2, "type": "discriminative-hallucination", "truth": "no"},
]
QUERIES = [
    {"id": 1, "image": "AMBER_1.png", "query": "Describe this image."},
    {"id": 2, "image": "AMBER_1.png", "query": "Is there a cat in this image?"},
]
HALLUSION = [
    {
        "category": "VD", "subcategory": "illusion", "set_id": "0", "figure_id": str(figure), "question_id": "0",
        "visual_input": str(figure), "question": "Is it longer?", "gt_answer": "1",
    }
    for figure in (1, 2)
]  # fmt: skip
HALLOC = [
    {
        "image": "a.png", "question": "What is there?", "answer": "A dog and a cat.",
        "spans": [{"start": 12, "end": 15, "type": "object"}],
    }
]  # fmt: skip
CUSTOM = {
    "yes_no": [{"id": "1", "image": "a.png", "question": "Is it red?", "label": "yes", "subset": "colour"}],
    "caption": [{"image": "a.png", "question": "What is there?", "objects": ["dog", "cat"], "answer": "A dog."}],
    "free": [{"image": "sub/c.png", "question": "Why?"}],
}


BEAF = [
    {
        "id": number,
        "image": image,
        "question": "Is there a dog?",
        "orig_img": number == 0,
        "removed_q": True,
        "gt": label,
    }
    for number, (image, label) in enumerate((("a.png", "yes"), ("a_00.png", "no")))
]
PHD = [
    {
        "image_id": "1", "task": "counting", "yes_question": "Is it?", "no_question": "Is it not?",
        "context": {"iac": "It may be.", "icc": "It is not."},
    },
    {"image_id": "1", "task": "object", "yes_question": "Is it?", "no_question": "Is it no?", "ccs_description": "Odd"},
]  # fmt: skip
HUMBLE = [
    {"label": "A", "question": "What?\nA. a dog\nE. None", "type": "Object", "question_id": 1, "file_name": "a.png"}
]
MHAL = [
    {
        "question": "What?", "response": "A dog.", "image": "a.png",
        "annotations": [{"start": 0, "end": 5, "text": "A dog", "label": "ACCURATE"}],
    }
]  # fmt: skip
FURTHER = {
    "dash_benchmark_neg.json": (json_bytes({"coco": {"dog": ["a.png"]}}), DashB, {"folder": "images"}),
    "beaf.json": (json_bytes(BEAF), Beaf, {"source": "files"}),
    "phd.json": (json_bytes(PHD), Phd, {}),
    "humble.jsonl": (line_bytes(HUMBLE), HumbleBench, {"source": "files"}),
    "mhal.json": (json_bytes(MHAL), MHalDetect, {"source": "files"}),
    "mmvp.csv": (
        damaged(st.just(b'Index,Question,Options,Correct Answer\n1,"Is it, or not?",(a) Yes (b) No,(a)\n')),
        Mmvp,
        {"source": "files"},
    ),
    "natural.tsv": (
        damaged(st.just(b"index\timage_path\tquestion\ttype\n" + b"0\ta.png\tIs it?\tyes_no\n" * 4)),
        NaturalBench,
        {"source": "files"},
    ),
}
"""File -> its damaged content, the task that reads it, and the task's other settings."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures under all the names that the files above use, and somewhere to write."""
    folder = tmp_path_factory.mktemp("fuzz")
    names = ("a.png", "b.png", "sub/c.png", "AMBER_1.png", "VD/illusion/0_1.png", "VD/illusion/0_2.png", "1.jpg")
    names += ("a_00.png", "train2014/COCO_train2014_000000000001.jpg", "CCS_images/1.png", "neg/coco/dog/a.png")
    for name in names:
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(folder / "images" / name)
    for category in ("existence", "count"):
        (folder / "mme" / category).mkdir(parents=True)
        shutil.copy(folder / "images" / "a.png", folder / "mme" / category / "a.png")
    (folder / "outside.png").write_bytes((folder / "images" / "a.png").read_bytes())
    return folder


def read(task):
    """Sets a task up; what it then holds must be inside the folder of images and can be judged."""

    def call():
        task.setup()
        judged(task)
        return task

    result = answers(call)
    for sample in result.samples() if result else ():
        assert "images" in sample.image.source.resolve().parts or "mme" in sample.image.source.resolve().parts


@given(data=line_bytes(POPE))
def test_pope(folder, data):
    (folder / "coco_pope_random.json").write_bytes(data)
    read(Pope(source="files", subsets=["random"], questions=str(folder), images=str(folder / "images")))


@given(instances=json_bytes(INSTANCES), captions=json_bytes(CAPTIONS), which=st.integers(0, 2))
def test_coco(folder, instances, captions, which):
    (folder / "instances.json").write_bytes(instances if which != 1 else json.dumps(INSTANCES).encode())
    (folder / "captions.json").write_bytes(captions if which != 0 else json.dumps(CAPTIONS).encode())
    files = {"instances": str(folder / "instances.json"), "captions": str(folder / "captions.json")}
    read(Chair(source="files", images=str(folder / "images"), **files))


@given(
    annotations=json_bytes(AMBER), queries=json_bytes(QUERIES), relation=json_bytes({"dog": ["puppy"], "cat": []}),
    safe=damaged(st.just(b"light\nday")), which=st.integers(0, 3),
)  # fmt: skip
def test_amber(folder, annotations, queries, relation, safe, which):
    valid = [json.dumps(value).encode() for value in (AMBER, QUERIES, {"dog": ["puppy"], "cat": []})] + [b"light\nday"]
    names = ("annotations.json", "query_all.json", "relation.json", "safe_words.txt")
    for number, (name, data) in enumerate(zip(names, (annotations, queries, relation, safe), strict=True)):
        (folder / name).write_bytes(data if number == which else valid[number])
    read(Amber(folder=str(folder), images=str(folder / "images")))


@given(data=damaged(st.just(b"Is there a dog?\tYes\nIs there a cat?\tNo\n")))
def test_mme(folder, data):
    for category in ("existence", "count"):
        (folder / "mme" / category / "a.txt").write_bytes(data)
    read(Mme(source="files", folder=str(folder / "mme"), categories=["existence", "count"]))


@given(data=json_bytes(HALLUSION))
def test_hallusion_bench(folder, data):
    (folder / "hallusion.json").write_bytes(data)
    read(HallusionBench(source="files", file=str(folder / "hallusion.json"), images=str(folder / "images")))


@given(data=line_bytes(HALLOC))
def test_halloc(folder, data):
    (folder / "halloc.jsonl").write_bytes(data)
    read(HalLoc(file=str(folder / "halloc.jsonl"), images=str(folder / "images")))


@pytest.mark.parametrize("file", FURTHER)
def test_further_benchmarks(folder, file):
    content, kind, settings = FURTHER[file]
    path = folder / "images" / file if kind is DashB else folder / file
    (folder / "images" / "dash_benchmark_pos.json").write_text('{"coco": {}}')
    paths = (
        {"folder": str(folder / "images")} if kind is DashB else {"file": str(path), "images": str(folder / "images")}
    )

    @given(data=content)
    def run(data):
        path.write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(kind(**{**settings, **paths}))

    run()


@pytest.mark.parametrize("kind", CUSTOM)
def test_custom(folder, kind):
    @given(data=line_bytes(CUSTOM[kind]))
    def run(data):
        (folder / "custom.jsonl").write_bytes(data)
        read(Custom(kind=kind, file=str(folder / "custom.jsonl"), images=str(folder / "images")))

    run()


VOCABULARY = damaged(
    st.sampled_from([b"dog: [puppy, hound]\ncat:\n", b"[dog, cat]", b"- dog\n- cat", b"? x\n: &a [*a]"])
)


@given(data=st.one_of(VOCABULARY, json_bytes({"dog": ["puppy"], "cat": []})))
def test_vocabulary(folder, data):
    (folder / "words.yaml").write_bytes(data)
    words = answers(lambda: read_vocabulary(folder / "words.yaml"))
    assert words is None or all(isinstance(name, str) for name in words)
