"""Answers of the embedded model, written to a log and read back: same figures, same features, same warnings."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import published_files
from helpers.parquet_folder import write_split

import stethoscope as package
from stethoscope import Detector, Evaluator, testbed
from stethoscope.adapters.no_model import NoModel
from stethoscope.app.runs import Runs
from stethoscope.core.types import Generation
from stethoscope.evaluation.given_answers import NOT_OWN
from stethoscope.features import FeatureSet
from stethoscope.features.columns import keep_columns
from stethoscope.report.run_report import collect_report
from stethoscope.report.run_source import RunReader
from stethoscope.storage.run_dir import RunStore
from stethoscope.tasks.chair import Chair
from stethoscope.tasks.pope import Pope
from stethoscope.testbed import DETECTOR_DIR

SCENES = 6
FEATURES = FeatureSet(names=["relevancy_image"], sets=["default_relevancy"])


@pytest.fixture(scope="module")
def adapter():
    return package.load("testbed")


@pytest.fixture(scope="module")
def own(adapter, tmp_path_factory):
    """A run of the model's own captions with the default features."""
    folder = tmp_path_factory.mktemp("own") / "run"
    Evaluator(run_dir=folder, features=FEATURES).run(adapter, Chair(scenes=SCENES))
    return folder


def write_log(run, task, file, edit=lambda text: text, **without):
    """Write the answers of a run as JSON lines."""
    with file.open("w") as lines:
        for record in RunStore(run).records(task):
            answer = record.answer
            line = {
                "id": record.sample_id,
                "question": record.question,
                "answer": edit(answer.text),
                "answer_token_ids": answer.token_ids,
                "answer_logprobs": answer.logprobs,
                "prompt": record.prompt,
                "model": "testbed",
                "finish_reason": "stop" if answer.finished else "length",
            }
            lines.write(json.dumps({key: value for key, value in line.items() if key not in without}) + "\n")
    return file


def columns(run):
    """Feature columns of a run, and the shipped detector's probabilities of its mentions."""
    table = RunStore(run).tokens("chair")
    numbers = table.select_dtypes("float32")
    return table, numbers


def test_token_ids_give_the_same_figures_features_and_warnings(adapter, own, tmp_path):
    log = write_log(own, "chair", tmp_path / "log.jsonl")
    results = Evaluator(run_dir=tmp_path / "run", features=FEATURES, answers=log).run(adapter, Chair(scenes=SCENES))
    given = {key: value for key, value in RunStore(tmp_path / "run").metrics()["chair"].items() if key != "answers"}
    assert given == RunStore(own).metrics()["chair"]
    check = results.answers["check"]
    assert check["argmax_share"] == 1.0
    assert check["logprob_difference"] < 1e-4
    assert check["own"]
    assert results.answers["logged"] == results.answers["same_prompts"] == SCENES
    (table, numbers), (own_table, own_numbers) = columns(tmp_path / "run"), columns(own)
    assert list(table["text"]) == list(own_table["text"])
    assert list(table["label"]) == list(own_table["label"])
    assert any(name.startswith("relevancy_image") for name in numbers)
    np.testing.assert_allclose(numbers, own_numbers, rtol=1e-5, atol=1e-5)
    detector = Detector.load(DETECTOR_DIR)
    warned, own_warned = (
        detector.predict(detector.select_mentions(keep_columns(rows, detector.schema.names)))
        for rows in (table, own_table)
    )
    np.testing.assert_allclose(warned, own_warned, atol=1e-5)


def test_texts_are_tokenised_again(adapter, own, tmp_path):
    log = write_log(own, "chair", tmp_path / "log.jsonl", answer_token_ids=0, answer_logprobs=0)
    results = Evaluator(answers=log).run(adapter, Chair(scenes=SCENES))
    assert (results.answers["retokenised"], results.answers["changed"]) == (SCENES, 0)
    assert results.answers["check"]["argmax_share"] == 1.0
    own_figures = RunStore(own).metrics()["chair"]
    assert {**results.to_dict(), "answers": None} == {**own_figures, "answers": None}


def test_edited_and_sampled_answers_are_noticed(adapter, own, tmp_path):
    edited = write_log(own, "chair", tmp_path / "edited.jsonl", lambda text: text.replace("a ", "two "),
                       answer_token_ids=0)  # fmt: skip
    results = Evaluator(answers=edited, run_dir=tmp_path / "run").run(adapter, Chair(scenes=SCENES))
    assert results.answers["check"]["argmax_share"] < 0.95
    assert NOT_OWN in str(results)
    (first, *_) = collect_report(RunReader.read(tmp_path / "run")).sections
    assert f"chair: {NOT_OWN}" in first.lead
    assert NOT_OWN in Runs(tmp_path, tmp_path / "run", tmp_path).listing("run")
    hot = Generation(do_sample=True)
    Evaluator(run_dir=tmp_path / "sampled", generation=hot).run(adapter, Chair(scenes=SCENES))
    sampled = write_log(tmp_path / "sampled", "chair", tmp_path / "sampled.jsonl")
    check = Evaluator(answers=sampled).run(adapter, Chair(scenes=SCENES)).answers["check"]
    assert check["argmax_share"] < 0.95
    assert check["own"]  # by its log-probabilities
    without = write_log(tmp_path / "sampled", "chair", tmp_path / "sampled.jsonl", answer_logprobs=0)
    assert not Evaluator(answers=without).run(adapter, Chair(scenes=SCENES)).answers["check"]["own"]


def test_reasoning_is_read_and_not_scored(adapter, own, tmp_path):
    log = write_log(own, "chair", tmp_path / "log.jsonl", lambda text: f"<think>a zebra?</think> {text}",
                    answer_token_ids=0, answer_logprobs=0)  # fmt: skip
    run = tmp_path / "run"
    results = Evaluator(run_dir=run, answers=log).run(adapter, Chair(scenes=SCENES))
    assert [row.to_dict() for row in results.metrics] == RunStore(own).metrics()["chair"]["metrics"]
    for record, plain in zip(RunStore(run).records("chair"), RunStore(own).records("chair"), strict=True):
        text, plain_text = record.answer.text, plain.answer.text
        assert "zebra" in text
        assert [text[item.start : item.end] for item in record.mentions] == [
            plain_text[item.start : item.end] for item in plain.mentions
        ]


def test_a_file_is_scored_without_a_model(stethoscope, own, tmp_path):
    write_log(own, "chair", tmp_path / "log.jsonl")
    words = ["evaluate", "task=chair", f"task.scenes={SCENES}", "logger=none", "answers.file=log.jsonl"]
    printed = stethoscope(*words, "model=none", "name=none", code=0)
    assert (
        "answers from log.jsonl (jsonl, written by testbed): 6 of 6 samples; left out, without an answer: 0" in printed
    )
    metrics = RunStore(tmp_path / "runs" / "none").metrics()["chair"]
    assert metrics["metrics"] == RunStore(own).metrics()["chair"]["metrics"]
    stethoscope("report", "runs/none", code=0)
    page = (tmp_path / "runs" / "none" / "report.md").read_text()
    assert "Answers from log.jsonl" in page
    assert "no model has read its answers" in page


LOGS = Path(__file__).parents[1] / "unit" / "storage" / "logs"
OTHER_TOOLS = {
    name: sorted(
        path.relative_to(LOGS).as_posix()
        for path in LOGS.rglob(f"*{name}*")
        if path.suffix != ".md" and "requests" not in path.name
    )
    for name in ("pope", "chair")
}


LOGGED = {"pope": lambda: Pope(subsets=["adversarial"], scenes=2, per_scene=2), "chair": lambda: Chair(scenes=4)}


@pytest.fixture(scope="module")
def own_metrics(adapter):
    """Metrics of the model's own answers, by task."""
    return {name: Evaluator().run(adapter, task()).metrics for name, task in LOGGED.items()}


@pytest.mark.parametrize(("name", "log"), [(name, log) for name, logs in OTHER_TOOLS.items() for log in logs])
def test_logs_of_other_tools_are_those_of_our_own_run(adapter, own_metrics, name, log):
    """The figures are those of the model itself, which finds all answers to be its own."""
    if log.endswith("xlsx"):
        pytest.importorskip("openpyxl")
    results = Evaluator(answers=LOGS / log).run(adapter, LOGGED[name]())
    assert results.metrics == own_metrics[name]
    assert results.answers["missing"] == results.answers["unmatched"] == results.answers["changed"] == 0
    assert results.answers["check"]["argmax_share"] == 1.0
    without = Evaluator(answers=LOGS / log).run(NoModel(), LOGGED[name]())
    assert without.metrics == own_metrics[name]


def test_scoring_a_file_imports_no_torch(own, tmp_path):
    write_log(own, "chair", tmp_path / "log.jsonl")
    words = ["evaluate", "model=none", "task=chair", f"task.scenes={SCENES}", "logger=none", "answers.file=log.jsonl"]
    script = (
        "import sys\nfrom stethoscope.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n"
        "    heavy = {'torch', 'transformers', 'sklearn'} & set(sys.modules)\n"
        "    sys.exit(f'imported {heavy}' if heavy or end.code else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_rows_are_those_of_the_data_set_and_not_of_the_task(tmp_path):
    """The task asks subset by subset; the log numbers the rows of the hub's file, in which they are mixed."""
    scenes = testbed.scenes(6)
    rows, pictures = [], []
    for index, scene in enumerate(scenes):
        name, label = (scene.visible[0], "yes") if index % 3 else (published_files.absent(scene), "no")
        asked = {"question_id": str(index), "question": f"Is there a {name} in the image?", "answer": label}
        rows.append({**asked, "image_source": scene.id, "category": ("adversarial", "random")[index % 2]})
        file = io.BytesIO()
        scene.image().save(file, "PNG")
        pictures.append(file.getvalue())
    folder = write_split(tmp_path / "data", rows, pictures, "test-00000-of-00001")
    lines = [{"row": index, "question": row["question"], "answer": row["answer"]} for index, row in enumerate(rows)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = Pope(source="hub", dataset=str(folder), subsets=["random", "adversarial"])
    results = Evaluator(answers=tmp_path / "log.jsonl").run(NoModel(), task)
    assert results.counts["ok"] == 6
    assert results.value("accuracy", "random") == results.value("accuracy", "adversarial") == 1.0


def test_the_file_that_amber_itself_reads_is_joined_by_its_own_ids(stethoscope, tmp_path):
    settings = [*published_files.amber(tmp_path / "amber", testbed.scenes(3)), "callbacks=none", "logger=none"]
    stethoscope("evaluate", *settings, "name=own", code=0)
    records = RunStore(tmp_path / "runs" / "own").records("amber")
    rows = [{"id": int(item.sample_id.rpartition("-")[2]), "response": item.answer.text} for item in records]
    (tmp_path / "amber.json").write_text(json.dumps(rows))
    stethoscope("evaluate", *settings, "name=given", "model=none", "answers.file=amber.json", code=0)
    own, given = (RunStore(tmp_path / "runs" / name).metrics()["amber"]["metrics"] for name in ("own", "given"))
    assert given == own


@pytest.mark.parametrize("task", ["pope", "amber", "mme", "hallusion_bench", "mmvp", "natural_bench"])
def test_a_run_of_any_benchmark_is_scored_again_without_a_model(stethoscope, tmp_path, task):
    words = getattr(published_files, task)(tmp_path / task, testbed.scenes(4))
    settings = [*words, "callbacks=none", "logger=none"]
    stethoscope("evaluate", *settings, "name=own", code=0)
    log = f"answers.file={tmp_path / 'runs' / 'own' / 'samples.jsonl'}"
    stethoscope("evaluate", *settings, "name=given", "model=none", log, code=0)
    own, given = (RunStore(tmp_path / "runs" / name).metrics()[task] for name in ("own", "given"))
    assert given.pop("answers")["missing"] == 0
    assert given == own


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["answers.file=gone.jsonl"], "gone.jsonl does not exist"),
        (["answers.file=log.jsonl", "answers.format=csv"], "answers.format 'csv'"),
        (["answers.file=log.jsonl", "answers.token_ids=maybe"], "answers.token_ids=maybe should be true or false"),
        (["answers=some/folder"], "a log is answers.file=some/folder, a folder of runs answers.runs"),
        (["answers.file=[a,b]"], "should be the path of a log, or a mapping of task names"),
        (["answers.file={pope: a.jsonl}"], "answers.file: unknown task 'pope'"),
        (["answers.file=other.jsonl"], "none of the 1 answers in other.jsonl belongs to a sample"),
        (["answers.file=asked.jsonl"], "the log asks 'Who?', but sample"),
        (["answers.file=ids.jsonl"], "add answers.token_ids=false to tokenise their texts"),
        (["answers.file=half.jsonl"], "half.jsonl, line 1"),
        (["model=none"], "model=none writes no answers"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(stethoscope, tmp_path, words, message):
    id_ = Chair(scenes=1)
    id_.setup()
    id_ = id_.samples()[0].id
    for name, line in {
        "log": {"id": id_, "answer": "a dog"},
        "other": {"id": "other", "answer": "a dog"},
        "asked": {"id": id_, "question": "Who?", "answer": "a dog"},
        "ids": {"id": id_, "answer": "a dog", "answer_token_ids": [1, 2, 3]},
    }.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "half.jsonl").write_text('{"id": "a", "answ')
    settings = ["task=chair", "task.scenes=2", "logger=none", "callbacks=none"]
    assert message in stethoscope("evaluate", *settings, *words, alone=True)


def test_benchmark_takes_a_file_for_each_task(stethoscope, adapter, tmp_path):
    for task, folder in ((Pope(scenes=4), "pope"), (Chair(scenes=8), "chair")):
        Evaluator(run_dir=tmp_path / folder).run(adapter, task)
        write_log(tmp_path / folder, folder, tmp_path / f"{folder}.jsonl")
    files = "answers.file={pope: pope.jsonl, chair: chair.jsonl}"
    printed = stethoscope("benchmark", "pope.scenes=4", "chair.scenes=8", "fast_dev_run=true", "features=fast",
                          "logger=none", "callbacks=none", files, code=0)  # fmt: skip
    assert "answers from pope.jsonl" in printed
    assert "answers from chair.jsonl" in printed
    for command in (["benchmark", "answers.file=pope.jsonl"], ["benchmark", "model=none"], ["diagnose", "model=none"]):
        line = stethoscope(*command, "logger=none" if command[0] == "benchmark" else "scope=row", alone=True)
        assert "should name a file for every task" in line or "needs a model that reads them" in line
