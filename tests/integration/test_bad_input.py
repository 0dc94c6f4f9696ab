"""What a user can get wrong: one line on stderr that says what would be right, exit code 2, no traceback."""

import json

import pytest
from helpers import malformed as bad
from helpers.malformed import AMBER, CUSTOM, HALLOC, HALLUSION, INSTANCES, POPE
from PIL import Image

from stethoscope.detection import artifact


@pytest.fixture
def pope(tmp_path):
    """A folder with one question file about one image, and the words that choose it."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (96, 96)).save(tmp_path / "images" / "a.png")
    asked = {"question_id": 1, "image": "a.png", "text": "Is there a dog in the image?", "label": "no"}
    (tmp_path / "coco_pope_random.json").write_text(json.dumps(asked) + "\n")
    words = ["model.random_init=tiny", "task=pope", "task.source=files", "task.subsets=[random]", "logger=none"]
    return tmp_path, [*words, f"task.questions={tmp_path}", f"task.images={tmp_path / 'images'}"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluat"], "unknown command 'evaluat'; did you mean 'evaluate'?"),
        (["evaluate", "model=testbet"], "unknown model 'testbet'; did you mean 'testbed'?"),
        (["evaluate", "task=poppe"], "unknown task 'poppe'; did you mean 'pope'?"),
        (["benchmark", "detector=logistics"], "unknown detector 'logistics'; did you mean 'logistic'?"),
        (["train", "features=paper/blanc"], "unknown features 'paper/blanc'; did you mean 'paper/blank'"),
        (["benchmark", "task=amber"], "benchmark runs POPE and CHAIR"),
        (["benchmark", "detector.features=[nosuch]"], "unknown feature 'nosuch'. There are: attn_entropy, attn_first"),
        (["benchmark", "detector.exclude=[nl_*]"], "unknown feature 'nl_*'. There are: attn_entropy"),
        (["benchmark", "sets=ful"], "unknown feature set 'ful'; did you mean 'full'"),
        (["benchmark", "features=fast", "sets=[paper/opera]"], "sets=paper/opera: none of its features is computed"),
        (["train", "experiment=transfer_task"], "`stethoscope train experiment=transfer_task --help` tells how to"),
        (["diagnose", "image=."], "is a folder, not a file"),
        (["report"], "takes one run, not 0"),
        (["compare"], "takes two runs or more"),
        (["evaluate", "bach_size=3"], "unknown setting 'bach_size'; did you mean 'batch_size'?"),
        (["extract", "run=.", "logger=none"], "unknown setting 'logger'. There are: callbacks, features"),
        (["evaluate", "task.parzer=strict"], "unknown setting of task 'parzer'; did you mean 'parser'?"),
        (["evaluate", "task.parser=offical"], "unknown parser of pope 'offical'; did you mean 'official'?"),
        (["evaluate", "batch_size=0"], "batch_size=0 should be at least 1"),
        (["evaluate", "on_error=explode"], "unknown on_error 'explode'"),
        (["evaluate", "model._target_=os.system"], "'os.system' is outside the packages that may be used"),
        (["evaluate", "model=hf"], "model_id"),
        (["extract"], "run must be given"),
        (["train", "run=nowhere"], "run=nowhere is no directory"),
        (["extract", "run=nowhere"], "nowhere is not a run directory"),
        (["benchmark", "split.train=0.9"], "split.train=0.9 and split.calibration=0.2"),
        (["train", "runs/x"], "'runs/x' should be a setting, key=value, for example run=runs/x"),
        (["train", "run=.", "seed=abc"], "seed=abc should be a whole number, 0 or more"),
        (["diagnose", "seed=-1"], "seed=-1 should be a whole number, 0 or more"),
        (["app", "port=99999"], "port=99999 should be a whole number, from 0 to 65535"),
        (
            ["app", "host=192.0.2.1", "auth=none"],
            "port=7860 on host=192.0.2.1 cannot be used: Cannot assign requested address",
        ),
        (["app", "examples=-1"], "examples=-1 should be a whole number, 0 or more"),
        (["app", "share=maybe"], "share=maybe should be true or false"),
        (["evaluate", "name="], "name= should name a folder for this run inside runs=runs"),
        (["evaluate", "name=../x"], "name=../x should name a folder"),
        (["evaluate", "limit=1,2"], "limit=1,2 gives several values: --multirun makes a run of each, 'limit=[1,2]' is"),
        (["evaluate", "seed=range(3)"], "seed=range(3) gives several values: --multirun makes a run of each"),
        (
            ["evaluate", "--multirun", "seed=interval(0,1)"],
            "seed=interval(0,1) has no end: a sweep takes values one by",
        ),
        (["evaluate", "--multirun", "seed=range(a,b)"], "seed=range(a,b) cannot be read: a sweep takes values between"),
        (["evaluate", "--multirn", "seed=0,1"], "unknown option '--multirn'; did you mean '--multirun'"),
        (["evaluate", "se ed=1"], "'se ed=1' is not a setting: the name before '=' has letters"),
        (
            ["extract", "runs/study/limit=4"],
            "'runs/study/limit=4' should be a setting, key=value, for example run=runs/st",
        ),
        (["evaluate", "limit=(3)"], "limit='(3)' should be a whole number"),
        (["evaluate", "model=(val), 2014"], "model=(val), 2014 gives several values"),
        (["evaluate", "model=test bed=1"], "unknown model 'test bed=1'; did you mean 'testbed'?"),
        (["diagnose", "question=B\udce4ume?"], "question=B\\xe4ume? is not UTF-8 text"),
        (["evaluate", "name=${oc.env:NO_SUCH_VARIABLE}"], "Environment variable 'NO_SUCH_VARIABLE' not found"),
        (["evaluate", "task=chair", "task.source=files", "task.instances=a, (b", "task.images={c}=Größe?"], "a, (b"),
        (["extract", "run='a' and 'b'=$c"], "'a' and 'b'=$c is not a run directory"),
        (["train", "run=runs/study/limit=4"], "run=runs/study/limit=4 is no directory"),
        (["app", "run=runs/study/limit=4 [old]"], "runs/study/limit=4 [old]"),
        (["evaluate", "model=hf", "model.model_id=checkpoints/epoch=3, step=100"], "checkpoints/epoch=3, step=100"),
        (["compare", "limit=4", "limit=6"], "unknown setting of compare 'limit'"),
        (["list", "modl"], "unknown group 'modl'; did you mean 'model'?"),
        (["evaluate", "limit=0"], "limit=0 should be at least 1"),
        (["evaluate", "limit=many"], "limit='many' should be a whole number"),
        (["evaluate", "task.scenes=0"], "task.scenes=0 and task.per_scene=3 must be at least 1"),
        (["evaluate", "task.subsets=[rare]"], "unknown subset of pope 'rare'"),
        (
            ["evaluate", "generation.max_new_tokens=0", "logger=none", "task.scenes=1"],
            "generation.max_new_tokens=0 must be a whole number, at least 1",
        ),
        (["evaluate", "generation=sample", "generation.top_p=2", "logger=none", "task.scenes=1"], "generation.top_p=2"),
        (["evaluate", "generation.stop=end", "logger=none"], "generation.stop='end' should be a list of texts"),
        (["evaluate", "logger.mode=onlin"], "unknown logger.mode 'onlin'; did you mean 'online'"),
        (["evaluate", "logger.patience=0"], "logger.patience=0 should be above 0"),
        (["evaluate", "+callbacks.maps.side=0"], "callbacks.maps.side=0 should be at least 1"),
        (["evaluate", "model.threads=0"], "model.threads=0 should be at least 1"),
        (["evaluate", "+model.prompt=Hello", "logger=none"], "prompt 'Hello' must hold {question} once"),
        (["evaluate", "model.dtype=float3"], "float3"),
        (
            ["evaluate", "model.device=tpu9", "model.random_init=tiny", "logger=none", "task.scenes=1"],
            "device 'tpu9' cannot be used",
        ),
        (["evaluate", "plugins=[nowhere]", "model._target_=nowhere.Model"], "nowhere"),
        (["report", "nowhere"], "nowhere"),
        (["compare", "nowhere", "elsewhere"], "nowhere"),
        (["diagnose", "image=nowhere.png"], "nowhere.png"),
        (["doctor", "model=testbet"], "unknown model 'testbet'; did you mean 'testbed'?"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_names_and_settings(words, message, stethoscope):
    assert message in stethoscope(*words)


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
    "no image of that name": (bad.pope({**POPE, "image": "b.png"}), "line 1: image 'b.png' is not in"),
    "an image outside of the folder": (bad.pope({**POPE, "image": "../outside.png"}), "leads out of"),
    "an image outside by backslashes": (bad.pope({**POPE, "image": "..\\outside.png"}), "leads out of"),
    "an absolute image": (bad.pope({**POPE, "image": "/etc/passwd"}), "'/etc/passwd' leads out of"),
    "a zero byte in a name": (bad.pope({**POPE, "image": "a\0.png"}), "is not in"),
    "no label": (bad.pope({k: v for k, v in POPE.items() if k != "label"}), "line 1: key 'label' is missing"),
    "another label": (bad.pope({**POPE, "label": "perhaps"}), "label 'perhaps' is neither yes nor no"),
    "no question": (bad.pope({**POPE, "text": " "}), "is no question"),
    "the same id twice": (bad.pope(POPE, POPE), "line 2: question_id 1 is used before"),
    "a list in a line": (bad.pope("[1, 2]"), "line 1: a JSON object was expected, not 1"),
    "nothing": (bad.pope(), "coco_pope_random.json is empty"),
    "no text": (bad.pope(b"\xff\xfe\x00"), "coco_pope_random.json is not UTF-16 text"),
    "a number of 5,000 digits": (bad.pope('{"question_id": ' + "9" * 5000), "not JSON that can be read"),
    "too deep": (bad.pope("[" * 100_000), "not JSON that can be read"),
    "no folder of images": (bad.pope(POPE, images="pictures"), "pictures does not exist"),
    "COCO as a list": (bad.chair([1]), "instances.json"),
    "COCO without categories": (bad.chair({**INSTANCES, "categories": []}), "instances.json"),
    "COCO's categories as text": (bad.chair({**INSTANCES, "annotations": ["dog"]}), "instances.json"),
    "captions of other images": (bad.chair(captions={"annotations": []}), "captions.json"),
    "AMBER as an object": (bad.amber({"id": 1}), "annotations.json, line 1: key 'type' is missing"),
    "AMBER's truth as a number": (bad.amber([{**AMBER, "truth": 7}]), "annotations.json"),
    "AMBER without queries": (bad.amber([AMBER], []), "query_all.json"),
    "MME without a tab": (bad.mme("Is there a dog? Yes"), "line 1: a question, a tab and Yes or No were expected"),
    "MME's other answers": (bad.mme("Is there a dog?\tMaybe"), "answer 'Maybe' is neither Yes nor No"),
    "HallusionBench's other answers": (
        bad.one_file("hallusion_bench", [{**HALLUSION, "gt_answer": "2"}]), "VD/map/0_1.png' is not in",
    ),
    "HalLoc's spans outside": (
        bad.one_file("halloc", [{**HALLOC, "spans": [{"start": 2, "end": 99, "type": "object"}]}], lines=True), "99",
    ),
    "HalLoc's other types": (
        bad.one_file("halloc", [{**HALLOC, "spans": [{"start": 2, "end": 5, "type": "colour"}]}], lines=True), "colour",
    ),
    "a custom task's label": (
        bad.one_file("custom", [{**CUSTOM, "label": 3}], "task.kind=yes_no", lines=True),
        "label 3 is neither yes nor no",
    ),
    "a custom task's object": (
        bad.one_file("custom", [{**CUSTOM, "objects": ["dogg"]}], "task.kind=caption", lines=True),
        "unknown object of the vocabulary 'dogg'; did you mean 'dog'?",
    ),
    "a vocabulary of two minds": (bad.vocabulary("dog: [pet]\ncat: [pet]"), "'pet' stands for both 'dog' and 'cat'"),
    "a vocabulary that is no YAML": (bad.vocabulary("dog: [pet"), "line 1: neither YAML nor JSON"),
    # detectors
    "a detector without manifest": (bad.detector(bad.remove(artifact.MANIFEST)), "holds no detector"),
    "a detector cut short": (bad.detector(bad.cut(artifact.OBJECTS)), "was changed since it was written"),
    "a manifest cut short": (bad.detector(bad.cut(artifact.MANIFEST)), "manifest.json is damaged"),
    "a manifest that is a list": (bad.detector(bad.write(artifact.MANIFEST, b"[]")), "an object was expected"),
    "a detector of the future": (bad.detector(bad.manifest(schema_version=99)), "has schema version 99"),
    "a manifest without settings": (bad.detector(bad.manifest(settings=None)), "is damaged"),
    "a manifest of other features": (bad.detector(bad.manifest(features=["a"])), "do not belong together"),
    # run directories
    "a record cut in the middle": (
        bad.finished(COMPARE, bad.write("samples.jsonl", b'{"task": 1\n{"task": "t", "sample_id": "s"}\n')),
        "samples.jsonl:1 is damaged",
    ),
    "a record without an answer's tokens": (
        bad.finished(COMPARE, bad.line(1, answer={"text": "a"})),
        "the record of sample 's01' is damaged",
    ),
    "a record with a number for a status": (
        bad.finished(COMPARE, bad.line(0, status=3)), "the record of sample 's00' is damaged",
    ),
    "metrics that are a list": (bad.finished(["report", "RUN"], bad.write("metrics.json", b"[]")), "metrics.json"),
    "a fingerprint cut short": (
        bad.finished(["report", "RUN"], bad.cut("fingerprint.json")), "fingerprint.json is damaged",
    ),
    "no records": (bad.finished(["train", "run=RUN", "logger=none"], bad.remove("samples.jsonl")), "samples.jsonl"),
    "token rows cut short": (
        bad.finished(["train", "run=RUN", "logger=none"], bad.cut("tokens.parquet")), "tokens.parquet",
    ),
    "a run without configuration": (
        bad.finished(["extract", "run=RUN"], lambda run: None), "is not a run directory: it has no config.yaml",
    ),
}  # fmt: skip
"""What is wrong: (what makes it in a folder and names the command, what the line must say)."""


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files(name, stethoscope, tmp_path, capsys):
    make, message = MALFORMED[name]
    words = make(tmp_path)
    capsys.readouterr()
    assert message in stethoscope(*words)


def test_the_table_is_as_long_as_promised():
    assert len(MALFORMED) >= 40
