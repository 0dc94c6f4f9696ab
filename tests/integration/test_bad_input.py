"""What a user can get wrong: one line on stderr that says what would be right, exit code 2, no traceback."""

import json

import pytest
from helpers import malformed as bad
from helpers.malformed import AMBER, CUSTOM, HALLOC, HALLUSION, INSTANCES, POPE
from PIL import Image

from stethoscope.detection import artifact


def case_id(value):
    """Name of a case in the snapshot; the bytes of words that are no text are escaped."""
    return value if isinstance(value, str) else " ".join(value).encode(errors="backslashreplace").decode()


@pytest.fixture
def pope(tmp_path):
    """A folder with one question file about one image, and the words that choose it."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (96, 96)).save(tmp_path / "images" / "a.png")
    asked = {"question_id": 1, "image": "a.png", "text": "Is there a dog in the image?", "label": "no"}
    (tmp_path / "coco_pope_random.json").write_text(json.dumps(asked) + "\n")
    words = ["model.random_init=tiny", "task=pope", "task.source=files", "task.subsets=[random]", "logger=none"]
    return tmp_path, [*words, f"task.questions={tmp_path}", f"task.images={tmp_path / 'images'}"]


SETTINGS = [
    (["evaluat"], "command"),
    (["evaluate", "model=testbet"], "model"),
    (["evaluate", "task=poppe"], "task"),
    (["benchmark", "detector=logistics"], "detector"),
    (["train", "features=paper/blanc"], "features"),
    (["benchmark", "task=amber"], "benchmark"),
    (["mitigate", "task=amber"], "mitigate"),
    (["mitigate", "methods=[cut,drop]"], "none"),
    (["mitigate", "methods=[none,opera]"], "method"),
    (["mitigate", "stop=[0]"], "stop"),
    (["--multirun", "mitigate", "seed=0,1"], "mitigate"),
    (["mitigate", "answers.file=log.jsonl"], "answers.file"),
    (["mitigate", "model=hf", "model.model_id=nowhere", "methods=[none,cut,drop]"], "detector"),
    (["mitigate", "model=hf", "model.model_id=nowhere", "mitigation.vcd.alpha=-1"], "alpha"),
    (["benchmark", "detector.features=[nosuch]"], "feature"),
    (["benchmark", "detector.exclude=[nl_*]"], "feature"),
    (["benchmark", "sets=ful"], "feature set"),
    (["benchmark", "features=fast", "sets=[paper/opera]"], "sets"),
    (["train", "experiment=transfer_task"], "transfer_task"),
    (["diagnose", "image=."], "folder"),
    (["report"], "one run"),
    (["compare"], "two runs"),
    (["evaluate", "experiment=transfer_split"], "stethoscope train"),
    (["evaluate", "pope"], "task=pope"),
    (["diagnose", "china.jpg"], "image=china.jpg"),
    (["evaluate", "--task", "pope"], "task=pope"),
    (["report", "run=runs/first"], "report runs/first"),
    (["evaluate", "model=llava"], "llava-1.5-7b"),
    (["evaluate", "model=owner/no-such-model", "model.local_files_only=true", "logger=none"], "owner/no-such-model"),
    (["benchmark", "features=[fast,nosuch]"], "feature set"),
    (["evaluate", "plugins=[nosuch_package]"], "nosuch_package"),
    (["evaluate", "plugins=[seen]", "task=seen"], "--config-dir"),
    (["list", "features", "plugins=nosuch_package"], "nosuch_package"),
    (["list", "features", "--config-dir", "conf"], "option"),
    (["evaluate", "bach_size=3"], "setting"),
    (["extract", "run=.", "logger=none"], "logger"),
    (["extract", "task=chair", "limit=2"], "task"),
    (["answer", "engine=http://127.0.0.1:8000"], "engine.base_url"),
    (["train", "split=0.5"], "split.train"),
    (["evaluate", "task.parzer=strict"], "task"),
    (["evaluate", "task.parser=offical"], "parser"),
    (["evaluate", "batch_size=0"], "batch_size"),
    (["evaluate", "on_error=explode"], "on_error"),
    (["evaluate", "model._target_=os.system"], "packages"),
    (["evaluate", "model=hf"], "model_id"),
    (["extract"], "run"),
    (["train", "run=nowhere"], "directory"),
    (["extract", "run=nowhere"], "is no directory"),
    (["benchmark", "split.train=0.9"], "split.calibration"),
    (["benchmark", "split.train=most"], "split.calibration"),
    (["train", "runs/x"], "key=value"),
    (["train", "run=.", "seed=abc"], "seed"),
    (["diagnose", "seed=-1"], "seed"),
    (["app", "port=99999"], "port"),
    (["app", "host=192.0.2.1", "auth=none"], "host"),
    (["app", "examples=-1"], "examples"),
    (["app", "share=maybe"], "share"),
    (["evaluate", "name="], "folder"),
    (["evaluate", "name=../x"], "folder"),
    (["evaluate", "limit=1,2"], "several values"),
    (["evaluate", "seed=range(3)"], "several values"),
    (["evaluate", "--multirun", "seed=interval(0,1)"], "no end"),
    (["evaluate", "--multirun", "seed=range(a,b)"], "cannot be read"),
    (["evaluate", "--multirn", "seed=0,1"], "option"),
    (["evaluate", "se ed=1"], "letters"),
    (["extract", "runs/study/limit=4"], "key=value"),
    (["evaluate", "limit=(3)"], "whole number"),
    (["evaluate", "model=(val), 2014"], "several values"),
    (["evaluate", "model=test bed=1"], "model"),
    (["diagnose", "question=B\udce4ume?"], "UTF-8"),
    (["evaluate", "name=${oc.env:NO_SUCH_VARIABLE}"], "NO_SUCH_VARIABLE"),
    (["evaluate", "task=chair", "task.source=files", "task.instances=a, (b", "task.images={c}=Größe?"], "a, (b"),
    (["extract", "run='a' and 'b'=$c"], "is no directory"),
    (["train", "run=runs/study/limit=4"], "directory"),
    (["app", "run=runs/study/limit=4 [old]"], "limit=4 [old]"),
    (["evaluate", "model=hf", "model.model_id=checkpoints/epoch=3, step=100"], "epoch=3"),
    (["compare", "limit=4", "limit=6"], "setting"),
    (["list", "modl"], "group"),
    (["evaluate", "limit=0"], "limit"),
    (["evaluate", "limit=many"], "whole number"),
    (["evaluate", "task.scenes=0"], "task.scenes=0"),
    (["evaluate", "task.subsets=[rare]"], "subset"),
    (["evaluate", "generation.max_new_tokens=0", "logger=none", "task.scenes=1"], "max_new_tokens"),
    (["evaluate", "generation=sample", "generation.top_p=2", "logger=none", "task.scenes=1"], "top_p"),
    (["evaluate", "generation.stop=end", "logger=none"], "list of texts"),
    (["evaluate", "logger.mode=onlin"], "logger.mode"),
    (["evaluate", "logger.patience=0"], "patience"),
    (["evaluate", "+callbacks.maps.side=0"], "side"),
    (["evaluate", "model.threads=0"], "threads"),
    (["evaluate", "+model.prompt=Hello", "logger=none"], "{question}"),
    (["evaluate", "model.dtype=float3"], "dtype"),
    (["evaluate", "model.device=tpu9", "model.random_init=tiny", "logger=none", "task.scenes=1"], "device"),
    (["evaluate", "plugins=[nowhere]", "model._target_=nowhere.Model"], "nowhere"),
    (["report", "nowhere"], "nowhere"),
    (["compare", "nowhere", "elsewhere"], "nowhere"),
    (["diagnose", "image=nowhere.png"], "nowhere.png"),
    (["doctor", "model=testbet"], "model"),
]
"""Words of the command line, and the key noun of its message."""


@pytest.mark.parametrize(("words", "noun"), SETTINGS, ids=case_id)
def test_names_and_settings(words, noun, stethoscope, messages, tmp_path):
    message = stethoscope(*words, alone=True)
    assert noun in message
    messages.record(case_id(words), message, tmp_path)


def test_good_input_for_comparison(pope, stethoscope):
    _, words = pope
    assert "1 ok, 0 unparsed, 0 failed" in stethoscope("evaluate", *words, code=0)


def test_missing_image(pope, stethoscope):
    folder, words = pope
    (folder / "images" / "a.png").rename(folder / "images" / "b.png")
    line = stethoscope("evaluate", *words)
    assert "a.png" in line
    assert "coco_pope_random.json" in line


def test_corrupt_image(pope, stethoscope):
    folder, words = pope
    whole = (folder / "images" / "a.png").read_bytes()
    (folder / "images" / "a.png").write_bytes(whole[: len(whole) // 2])
    assert "a.png cannot be read" in stethoscope("evaluate", *words)


def test_one_corrupt_image_of_two_loses_nothing_else(pope, stethoscope):
    """The run goes on; the line names the sample, and its mended file is all that the next run asks about."""
    folder, words = pope
    Image.new("RGB", (96, 96)).save(folder / "images" / "b.png")
    (folder / "images" / "a.png").write_bytes(b"this is no image")
    file = folder / "coco_pope_random.json"
    second = {"question_id": 2, "image": "b.png", "text": "Is there a cat in the image?", "label": "yes"}
    file.write_text(file.read_text() + json.dumps(second) + "\n")
    line = stethoscope("evaluate", *words)
    assert "1 of 2 samples failed" in line
    assert "a.png cannot be read" in line
    Image.new("RGB", (96, 96)).save(folder / "images" / "a.png")
    assert "2 ok, 0 unparsed, 0 failed" in stethoscope("evaluate", *words, code=0)


def test_empty_image_folder(pope, stethoscope):
    folder, words = pope
    (folder / "images" / "a.png").unlink()
    assert "images" in stethoscope("evaluate", *words)


def test_broken_line(pope, stethoscope):
    folder, words = pope
    file = folder / "coco_pope_random.json"
    file.write_text(file.read_text() + "{'question_id': 2\n")
    assert "coco_pope_random.json, line 2: not JSON" in stethoscope("evaluate", *words)


def test_another_setting_in_the_same_run_directory(pope, stethoscope):
    _, words = pope
    stethoscope("evaluate", *words, "name=one", code=0)
    line = stethoscope("evaluate", *words, "name=one", "task.parser=strict")
    assert "parser" in line
    assert "overwrite=true" in line


COMPARE = ["compare", "RUN", "WHOLE"]
MALFORMED = {
    # data sets
    "no image of that name": (bad.pope({**POPE, "image": "b.png"}), "b.png"),
    "an image outside of the folder": (bad.pope({**POPE, "image": "../outside.png"}), "../outside.png"),
    "an image outside by backslashes": (bad.pope({**POPE, "image": "..\\outside.png"}), "leads out"),
    "an absolute image": (bad.pope({**POPE, "image": "/etc/passwd"}), "/etc/passwd"),
    "a zero byte in a name": (bad.pope({**POPE, "image": "a\0.png"}), "image"),
    "no label": (bad.pope({k: v for k, v in POPE.items() if k != "label"}), "label"),
    "another label": (bad.pope({**POPE, "label": "perhaps"}), "perhaps"),
    "no question": (bad.pope({**POPE, "text": " "}), "question"),
    "the same id twice": (bad.pope(POPE, POPE), "question_id"),
    "a list in a line": (bad.pope("[1, 2]"), "JSON object"),
    "nothing": (bad.pope(), "empty"),
    "no text": (bad.pope(b"\xff\xfe\x00"), "UTF-16"),
    "a number of 5,000 digits": (bad.pope('{"question_id": ' + "9" * 5000), "JSON"),
    "too deep": (bad.pope("[" * 100_000), "JSON"),
    "no folder of images": (bad.pope(POPE, images="pictures"), "pictures"),
    "COCO as a list": (bad.chair([1]), "instances.json"),
    "COCO without categories": (bad.chair({**INSTANCES, "categories": []}), "instances.json"),
    "COCO's categories as text": (bad.chair({**INSTANCES, "annotations": ["dog"]}), "instances.json"),
    "captions of other images": (bad.chair(captions={"annotations": []}), "captions.json"),
    "AMBER as an object": (bad.amber({"id": 1}), "type"),
    "AMBER's truth as a number": (bad.amber([{**AMBER, "truth": 7}]), "annotations.json"),
    "AMBER without queries": (bad.amber([AMBER], []), "query_all.json"),
    "MME without a tab": (bad.mme("Is there a dog? Yes"), "tab"),
    "MME's other answers": (bad.mme("Is there a dog?\tMaybe"), "Maybe"),
    "HallusionBench's other answers": (
        bad.one_file("hallusion_bench", [{**HALLUSION, "gt_answer": "2"}]), "VD/map/0_1.png",
    ),
    "HalLoc's spans outside": (
        bad.one_file("halloc", [{**HALLOC, "spans": [{"start": 2, "end": 99, "type": "object"}]}], lines=True), "99",
    ),
    "HalLoc's other types": (
        bad.one_file("halloc", [{**HALLOC, "spans": [{"start": 2, "end": 5, "type": "colour"}]}], lines=True), "colour",
    ),
    "a custom task's label": (
        bad.one_file("custom", [{**CUSTOM, "label": 3}], "task.kind=yes_no", lines=True),
        "label",
    ),
    "a custom task's object": (
        bad.one_file("custom", [{**CUSTOM, "objects": ["dogg"]}], "task.kind=caption", lines=True),
        "vocabulary",
    ),
    "a vocabulary of two minds": (bad.vocabulary("dog: [pet]\ncat: [pet]"), "pet"),
    "a vocabulary that is no YAML": (bad.vocabulary("dog: [pet"), "YAML"),
    # detectors
    "a detector without manifest": (bad.detector(bad.remove(artifact.MANIFEST)), "manifest.json"),
    "a detector cut short": (bad.detector(bad.cut(artifact.OBJECTS)), "SHA-256"),
    "a manifest cut short": (bad.detector(bad.cut(artifact.MANIFEST)), "manifest.json"),
    "a manifest that is a list": (bad.detector(bad.write(artifact.MANIFEST, b"[]")), "object"),
    "a detector of the future": (bad.detector(bad.manifest(schema_version=99)), "schema version"),
    "a manifest without settings": (bad.detector(bad.manifest(settings=None)), "damaged"),
    "a manifest of other features": (bad.detector(bad.manifest(features=["a"])), "belong together"),
    # run directories
    "a record cut in the middle": (
        bad.finished(COMPARE, bad.write("samples.jsonl", b'{"task": 1\n{"task": "t", "sample_id": "s"}\n')),
        "samples.jsonl:1",
    ),
    "a record without an answer's tokens": (
        bad.finished(COMPARE, bad.line(1, answer={"text": "a"})),
        "s01",
    ),
    "a record with a number for a status": (
        bad.finished(COMPARE, bad.line(0, status=3)), "s00",
    ),
    "metrics that are a list": (bad.finished(["report", "RUN"], bad.write("metrics.json", b"[]")), "metrics.json"),
    "a fingerprint cut short": (
        bad.finished(["report", "RUN"], bad.cut("fingerprint.json")), "fingerprint.json",
    ),
    "no records": (bad.finished(["train", "run=RUN", "logger=none"], bad.remove("samples.jsonl")), "samples.jsonl"),
    "token rows cut short": (
        bad.finished(["train", "run=RUN", "logger=none"], bad.cut("tokens.parquet")), "tokens.parquet",
    ),
    "a run without configuration": (
        bad.finished(["extract", "run=RUN"], lambda run: None), "config.yaml",
    ),
}  # fmt: skip
"""What is wrong: (what makes it in a folder and names the command, the key noun of the message)."""


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files(name, stethoscope, messages, tmp_path, capsys):
    make, noun = MALFORMED[name]
    words = make(tmp_path)
    capsys.readouterr()
    message = stethoscope(*words, alone=True)
    assert noun in message
    messages.record(name, message, tmp_path)


def test_whole_messages_are_those_of_the_snapshot(messages, request):
    if request.config.getoption("--update-messages"):
        pytest.skip("the snapshot is written anew")
    assert messages.differences([*(case_id(words) for words, _ in SETTINGS), *MALFORMED]) == {}


def test_the_table_is_as_long_as_promised():
    assert len(MALFORMED) >= 40
