"""Every task reads the same ways of writing objects down, and calls a file of another kind what it is."""

import gzip
import json
import zipfile

import pytest
from PIL import Image

from stethoscope.core.errors import DataError
from stethoscope.core.json_rows import read_rows
from stethoscope.tasks.amber import Amber
from stethoscope.tasks.annotations import image_id, read_instances
from stethoscope.tasks.chair import Chair
from stethoscope.tasks.custom import Custom
from stethoscope.tasks.halloc import HalLoc
from stethoscope.tasks.hallusion_bench import HallusionBench
from stethoscope.tasks.mme import Mme
from stethoscope.tasks.pope import Pope

FIGURE = {
    "category": "VD", "subcategory": "map", "visual_input": "1", "set_id": "0", "figure_id": "0", "question": "Is it?",
    "gt_answer": "1",
}  # fmt: skip
ROWS = {
    "pope": [{"question_id": n, "image": "a.png", "text": f"Is there a dög {n}?", "label": "no"} for n in (1, 2)],
    "custom": [{"image": "a.png", "question": f"Is it? {n}", "label": "yes"} for n in (1, 2)],
    "halloc": [{"image": "a.png", "question": "What?", "answer": f"A dog {n}.", "spans": []} for n in (1, 2)],
    "hallusion_bench": [{**FIGURE, "question_id": str(n)} for n in (1, 2)],
    "amber": [{"id": n, "image": "a.png", "query": f"Is there a dog {n}?"} for n in (1, 2)],
}
FILES = {"pope": "coco_pope_random.json", "amber": "query_all.json"}
WAYS = {
    "lines": lambda rows: "\n".join(json.dumps(row) for row in rows),
    "windows lines": lambda rows: "\r\n".join(json.dumps(row) for row in rows) + "\r\n",
    "old mac lines": lambda rows: "\r".join(json.dumps(row) for row in rows),
    "blank lines": lambda rows: "\n\n" + "\n\n".join(json.dumps(row) for row in rows) + "\n\n",
    "list": lambda rows: json.dumps(rows),
    "pretty list": lambda rows: "\n " + json.dumps(rows, indent=2) + "\n",
    "pretty objects": lambda rows: "\n".join(json.dumps(row, indent=2) for row in rows),
    "letters": lambda rows: json.dumps(rows, ensure_ascii=False),
}


def made(task, folder):
    """A task over ``folder``, which holds all its files under one name each."""
    file, images = str(folder / FILES.get(task, f"{task}.json")), str(folder / "images")
    return {
        "pope": lambda: Pope("files", subsets=["random"], questions=str(folder), images=images),
        "custom": lambda: Custom("yes_no", file=file, images=images),
        "halloc": lambda: HalLoc(file, images),
        "hallusion_bench": lambda: HallusionBench(file=file, images=images),
        "amber": lambda: Amber(str(folder), images),
    }[task]()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images" / "VD" / "map").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "images" / "a.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "images" / "VD" / "map" / "0_0.png")
    (tmp_path / "relation.json").write_text('{"dog": []}')
    (tmp_path / "safe_words.txt").write_text("light")
    (tmp_path / "annotations.json").write_text(
        json.dumps([{"id": n, "type": "relation", "truth": "no"} for n in (1, 2)])
    )
    return tmp_path


def samples(task, folder, data):
    (folder / FILES.get(task, f"{task}.json")).write_bytes(data)
    read = made(task, folder)
    read.setup()
    return [(sample.id, sample.question, sample.answer) for sample in read.samples()]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("task", ROWS)
def test_every_way_of_writing_gives_the_same_samples(folder, task, way, encoding):
    usual = samples(task, folder, "\n".join(map(json.dumps, ROWS[task])).encode())
    assert len(usual) == 2
    read = samples(task, folder, WAYS[way](ROWS[task]).encode(encoding))
    if way in ("blank lines", "pretty objects"):  # a row without an id has its line's number
        assert [row[1:] for row in read] == [row[1:] for row in usual]
    else:
        assert read == usual


def zipped(folder):
    with zipfile.ZipFile(folder / "x.zip", "w") as file:
        file.writestr("rows.json", "[]")
    return (folder / "x.zip").read_bytes()


@pytest.mark.parametrize("task", ROWS)
def test_other_files_are_called_what_they_are(folder, task):
    keys = list(ROWS[task][0])
    cases = [
        (b"", "is empty; JSON objects were expected"),
        (b" \n\n", "is empty"),
        ((",".join(keys) + "\n1,2\n").encode(), r"comma-separated values \(CSV\) with the columns .*sep=','"),
        (("\t".join(keys) + "\n1\t2\n").encode("utf-16"), r"tab-separated values \(TSV\) with the columns"),
        ((";".join(f'"{key}"' for key in keys) + "\n").encode(), "values between semicolons"),
        (gzip.compress(b"[]"), "a gzip archive; unpack it"),
        (zipped(folder), "a zip archive; unpack it"),
        (b"PAR1\0\0", "a Parquet file; task.source=hub"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS"),
        (b"\n<!DOCTYPE html>\n<html>", "a web page"),
        ("[]".encode("utf-16-le"), "zero byte at 1; UTF-16 is read if it has a byte order mark"),
        ('[{"image": "caf\u00e9"}]'.encode("latin-1"), "not UTF-8 text: .* at byte"),
        (b"image: a.png\n", "line 1: not JSON"),
        (b"3", "line 1: a JSON object was expected, not 3"),
        (b'{"rows": [1]}', "line 1: key .* is missing; there are: rows"),
        (b"[[1]]", r"line 1: a JSON object was expected, not \[1\]"),
    ]
    for data, message in cases:
        with pytest.raises(DataError, match=message) as error:
            samples(task, folder, data)
        assert "\n" not in str(error.value)


def test_a_single_huge_line_is_a_line(tmp_path):
    (tmp_path / "a").write_text(json.dumps([{"a": "x" * 1000, "n": n} for n in range(5000)]))
    rows = list(read_rows(tmp_path / "a", ["a", "n"]))
    assert [row.values["n"] for row in rows] == [row.number - 1 for row in rows] == list(range(5000))
    assert rows[4999].origin.endswith("a, line 1, item 5000")


def test_objects_over_several_lines_that_break_off_are_named_by_line(tmp_path):
    (tmp_path / "a").write_text('{\n "a": 1\n}\n{\n "a": 2\n')
    with pytest.raises(DataError, match="a, line 4: not JSON"):
        list(read_rows(tmp_path / "a", ["a"]))
    (tmp_path / "a").write_text('{\n "a": 1\n} {"a": 2}')
    with pytest.raises(DataError, match="more after the object's end, at column 2"):
        list(read_rows(tmp_path / "a", ["a"]))


def test_hidden_files_beside_those_of_mme_are_none(tmp_path):
    folder = tmp_path / "count"
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(folder / "1.png")
    (folder / "1.txt").write_text("Is it?\tYes\nIs it not?\tNo\n")
    for name in ("._1.txt", "._1.png", ".DS_Store"):
        (folder / name).write_bytes(b"\0\5\26\7\0\2\0\0Mac OS X")
    task = Mme(folder=str(tmp_path), categories=["count"])
    task.setup()
    assert [sample.id for sample in task.samples()] == ["count-1-1", "count-1-2"]


def test_images_of_mme_without_questions_and_with_two_endings_are_not_passed_over(tmp_path):
    folder = tmp_path / "count"
    folder.mkdir()
    for name in ("1.jfif", "2.png"):
        Image.new("RGB", (4, 4)).save(folder / name, "PNG")
    (folder / "1.TXT").write_text("Is it?\tYes\n")
    task = Mme(folder=str(tmp_path), categories=["count"])
    with pytest.warns(UserWarning, match=r"1 images in .* are left out, having no text file .*: 2"):
        task.setup()
    assert len(task.samples()) == 1
    Image.new("RGB", (4, 4)).save(folder / "1.png")
    with pytest.raises(DataError, match=r"one image named 1 was expected in .*, there is 1.*, 1\."):
        Mme(folder=str(tmp_path), categories=["count"]).setup()


def test_questions_without_an_image_are_counted(folder):
    rows = [{**FIGURE, "question_id": str(n), "visual_input": str(n % 2)} for n in range(5)]
    (folder / "hallusion_bench.json").write_text(json.dumps(rows))
    with pytest.warns(UserWarning, match="3 questions without an image are left out, 2 are asked"):
        made("hallusion_bench", folder).setup()


@pytest.mark.parametrize("form", [int, str, float, "{:012d}.jpg".format, "COCO_val2014_{:012d}.jpg".format])
def test_captions_count_however_an_image_id_is_written(instances, images, tmp_path, form):
    people = [{"image_id": form(7), "caption": "A man with a cup"}, {"image_id": form(3), "caption": "A cat."}]
    (tmp_path / "captions.json").write_text(json.dumps({"annotations": people}))
    files = {"instances": str(instances), "captions": str(tmp_path / "captions.json"), "images": str(images)}
    task = Chair("files", image_ids=[form(3), form(7)], **files)
    task.setup()
    assert [sample.reference["objects"] for sample in task.samples()] == [["cat"], ["chair", "cup", "dog", "person"]]


def test_ids_that_are_no_numbers_stay_apart():
    ids = ["cat", "12.5", 12.5, "a/b", "img_12.jpg", None, "1e3", "٣"]
    assert [image_id(value) for value in ids] == [str(value) for value in ids]


def test_images_without_captions_are_counted(instances, images, tmp_path):
    (tmp_path / "captions.json").write_text(json.dumps({"annotations": [{"image_id": 3, "caption": "A cat."}]}))
    files = {"instances": str(instances), "captions": str(tmp_path / "captions.json"), "images": str(images)}
    with pytest.warns(UserWarning, match="no caption of 1 of 2 images"):
        Chair("files", **files).setup()


def test_an_image_id_that_comes_twice_replaces_no_image(instances):
    data = json.loads(instances.read_text())
    data["images"].append({"id": "7", "file_name": "b.png"})
    instances.write_text(json.dumps(data))
    with pytest.raises(DataError, match=r"images\[2\] has the id '7', which is used before"):
        read_instances(instances)


def test_json_lines_where_one_value_is_wanted(tmp_path):
    (tmp_path / "a.json").write_text('{"images": []}\n{"images": []}\n')
    with pytest.raises(DataError, match="this is JSON lines, one value was expected"):
        read_instances(tmp_path / "a.json")
