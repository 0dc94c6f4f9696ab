"""Results in the form of other tools: read by these tools themselves, and nothing private in them."""

import json
import platform
import re
import zipfile
from pathlib import Path

import pytest
import yaml
from helpers.hub_server import local_hub
from helpers.messages import error_lines
from helpers.other_tools import run_with
from huggingface_hub import DatasetCard, parse_eval_result_entries

from stethoscope.cli import main
from stethoscope.core.errors import ArtefactError, ConfigError
from stethoscope.core.files import read_json, read_jsonl
from stethoscope.core.json_rows import violation
from stethoscope.report.export import ExportSettings, RunExport, export, outcome_of
from stethoscope.report.hub_export import push
from stethoscope.report.run_source import RunReader

SECRET = "hf_" + "aBcD1234" * 4


def run_export(folder, *tasks, picture=lambda record: None, **settings):
    """Make the export of a run: of all its tasks, or of those named."""
    source = RunReader.read(folder)
    chosen = tuple(results for results in source.results if not tasks or results.task in tasks)
    return RunExport(source, chosen, ExportSettings(time=1_800_000_000.0, **settings), picture)


def change_lines(path, change):
    """Rewrite the lines of POPE in a file of JSON lines; ``change`` alters each, and gets its index among them."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for index, line in enumerate(line for line in lines if line["task"] == "pope"):
        change(line, index)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_everything_that_a_run_writes_follows_its_schema(testbed_run):
    for name, schema in (("samples", "samples"), ("events", "events"), ("warnings", "warnings")):
        rows = read_jsonl(testbed_run / f"{name}.jsonl")
        assert rows
        assert [violation(schema, row) for row in rows] == [None] * len(rows)
    assert violation("metrics", read_json(testbed_run / "metrics.json")) is None


# --- Every Eval Ever --------------------------------------------------------------------------------------------------

VALIDATE = """
import json, sys
from pathlib import Path
from every_eval_ever.validator.validation_core import validate_file
root = Path(sys.argv[1])
files = sorted(path for path in root.rglob("*") if path.is_file())
names = {path.relative_to(root).as_posix() for path in files}
reports = [validate_file(path, repo_path=path.relative_to(root).as_posix(), available_files=names,
                         read_repo_file=lambda name: (root / name).read_text(), run_semantic_checks=True)
           for path in files]
print(json.dumps([[r.valid, r.errors, r.warnings, r.line_count] for r in reports], default=str))
"""


def test_every_eval_ever_accepts_the_files(testbed_run, tmp_path):
    files = export(
        run_export(testbed_run, organization="Lab", url="https://example.org/x"), "every_eval_ever", tmp_path
    )
    assert sorted(file.suffix for file in files) == [".json", ".json", ".jsonl", ".jsonl"]
    reports = json.loads(run_with("every-eval-ever", VALIDATE, tmp_path))
    assert [report[:3] for report in reports] == [[True, [], []]] * 4
    assert sorted(report[3] for report in reports) == [0, 0, 6, 6]


def test_every_eval_ever_has_the_run_s_own_figures(testbed_run, tmp_path):
    run = run_export(testbed_run, "pope")
    aggregate, lines = sorted(export(run, "every_eval_ever", tmp_path), key=lambda path: path.suffix)
    assert aggregate.parent == tmp_path / "data" / "pope" / "local" / "testbed"
    assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", aggregate.stem)
    written = json.loads(aggregate.read_text())
    figures = {result["evaluation_result_id"]: result for result in written["evaluation_results"]}
    for row in run.tasks[0].metrics:
        if row.interval.to_dict()["value"] is None:
            continue
        result = figures[f"pope/{row.subset}/{row.metric}"]
        assert result["score_details"]["score"] == row.interval.value
        interval = result["score_details"]["uncertainty"].get("confidence_interval")
        if interval:
            assert (interval["lower"], interval["upper"]) == (row.interval.low, row.interval.high)
    samples = [json.loads(line) for line in lines.read_text().splitlines()]
    records = list(run.source.store.records("pope"))
    assert [sample["sample_id"] for sample in samples] == [record.sample_id for record in records]
    assert [sample["output"]["raw"] for sample in samples] == [[record.answer.text] for record in records]
    assert {sample["answer_attribution"][0]["extraction_method"] for sample in samples} == {"yes_no/official"}
    right = [record.score.counts["tp"] + record.score.counts["tn"] for record in records]
    assert [sample["evaluation"]["score"] for sample in samples] == right
    again = sorted(export(run, "every_eval_ever", tmp_path), key=lambda path: path.suffix)
    assert again == [aggregate, lines]  # the same run has the same files


def test_every_eval_ever_has_the_probabilities_of_a_detector(testbed_run, tmp_path):
    run = run_export(testbed_run, "chair")
    lines = next(path for path in export(run, "every_eval_ever", tmp_path) if path.suffix == ".jsonl")
    mentions = [mention for line in lines.read_text().splitlines() for mention in
                json.loads(json.loads(line)["metadata"].get("mentions", "[]"))]  # fmt: skip
    assert len(mentions) == len(run.source.warnings)
    assert [mention["probability"] for mention in mentions] == run.source.warnings["probability"].tolist()


@pytest.mark.parametrize(
    ("name", "known_as"),
    [("Qwen/Qwen3-VL-4B", "Qwen/Qwen3-VL-4B"), ("my llava", "local/my-llava"), ("", "local/unknown")],
)
def test_answers_of_a_log_are_those_of_its_model(own_run, tmp_path, name, known_as):
    fingerprints = read_json(own_run / "fingerprint.json")
    fingerprints["pope"]["answers"] = {
        "file": "/home/me/log.jsonl",
        "engine": "vllm 0.11",
        "model": name,
        "revision": "",
    }
    (own_run / "fingerprint.json").write_text(json.dumps(fingerprints))
    files = export(run_export(own_run, "pope"), "every_eval_ever", tmp_path / "out")
    aggregate = json.loads(next(path for path in files if path.suffix == ".json").read_text())
    assert aggregate["model_info"]["id"] == known_as
    assert aggregate["model_info"]["inference_engine"]["name"] == "vllm 0.11"
    assert "generation_args" not in aggregate["evaluation_results"][0]["generation_config"]
    assert "/home/me" not in json.dumps(aggregate)
    assert {report[0] for report in json.loads(run_with("every-eval-ever", VALIDATE, tmp_path / "out"))} == {True}


def test_samples_without_an_outcome_say_so(own_run, tmp_path):
    def change(line, index):
        if index == 0:
            line.update(status="failed", error="the image is gone", answer=None, score=None, mentions=[])
        elif index == 1:
            line.update(status="unparsed")

    change_lines(own_run / "samples.jsonl", change)
    folder = tmp_path / "out"
    export(run_export(own_run, "pope"), "every_eval_ever", folder)
    rows = [json.loads(line) for path in folder.rglob("*.jsonl") for line in path.read_text().splitlines()]
    errors = [row.get("error") for row in rows]
    assert errors == ["the image is gone", "unparsed: in no figure", *[None] * (len(errors) - 2)]
    assert {report[0] for report in json.loads(run_with("every-eval-ever", VALIDATE, folder))} == {True}


# --- inspect ----------------------------------------------------------------------------------------------------------

READ_LOG = """
import json, sys
from inspect_ai.log import read_eval_log, read_eval_log_sample, read_eval_log_sample_summaries
log = read_eval_log(sys.argv[1])
first = log.samples[0]
assert read_eval_log_sample(sys.argv[1], first.id, 1).output.completion == first.output.completion
summaries = read_eval_log_sample_summaries(sys.argv[1])
print(json.dumps({
    "task": log.eval.task, "model": log.eval.model, "status": log.status, "ids": [s.id for s in log.samples],
    "summaries": [s.id for s in summaries], "text": [s.output.completion for s in log.samples],
    "roles": [m.role for m in first.messages],
    "logprobs": [[p.logprob for p in s.output.choices[0].logprobs.content] for s in log.samples],
    "tokens": ["".join(p.token for p in s.output.choices[0].logprobs.content) for s in log.samples],
    "images": [c.image[:22] for s in log.samples for c in (s.input[0].content if not isinstance(s.input[0].content, str)
               else []) if c.type == "image"],
    "values": [[v.value for v in s.scores.values()] for s in log.samples],
    "mentions": [s.metadata["mentions"] for s in log.samples],
    "metrics": {f"{score.name}/{name}": m.value for score in log.results.scores for name, m in score.metrics.items()},
}))
"""


@pytest.mark.parametrize("task", ["pope", "chair"])
def test_inspect_reads_the_log(testbed_run, tmp_path, task):
    run = run_export(testbed_run, task)
    (path,) = export(run, "inspect", tmp_path)
    log = json.loads(run_with("inspect-ai", READ_LOG, path))
    records = {record.sample_id: record for record in run.source.store.records(task)}
    assert (log["task"], log["model"], log["status"]) == (task, "local/testbed", "success")
    assert sorted(log["ids"]) == sorted(log["summaries"]) == sorted(records)
    assert log["roles"] == ["user", "assistant"]
    answers = [records[name].answer for name in log["ids"]]
    assert log["text"] == log["tokens"] == [answer.text for answer in answers]
    assert log["logprobs"] == [list(answer.logprobs) for answer in answers]
    expected = {
        f"{row.subset}/{row.metric}": row.interval.value
        for row in run.tasks[0].metrics
        if row.interval.to_dict()["value"] is not None
    }
    assert log["metrics"] == expected
    if task == "pope":
        assert {value for values in log["values"] for value in values} <= {"C", "I"}
    else:
        for name, mentions in zip(log["ids"], log["mentions"], strict=True):
            words = {records[name].answer.text[mention["start"] : mention["end"]] for mention in mentions}
            assert all(mention["probability"] >= 0 for mention in mentions)
            assert words == {records[name].answer.text[m.start : m.end] for m in records[name].mentions}


def test_pictures_of_a_log_keep_to_the_size(testbed_run, tmp_path):
    from PIL import Image

    noisy = Image.effect_noise((300, 300), 90).convert("RGB")
    sizes = {}
    for limit in (0, 1_000, 60_000, 2_000_000):
        (path,) = export(
            run_export(testbed_run, "pope", picture=lambda record: noisy, pictures=limit), "inspect", tmp_path
        )
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.startswith("samples/")]
            content = json.loads(archive.read(names[0]))["input"][0]["content"]
        sizes[limit] = "" if isinstance(content, str) else content[0]["image"].partition(";")[0]
    assert sizes == {0: "", 1_000: "", 60_000: "data:image/jpeg", 2_000_000: "data:image/png"}


# --- the hub ----------------------------------------------------------------------------------------------------------


def test_datasets_loads_samples_and_mentions(testbed_run, tmp_path, monkeypatch):
    import datasets

    run, folder = run_export(testbed_run), tmp_path / "published"
    files = export(run, "dataset", folder)
    assert [path.name for path in files] == ["samples.parquet", "mentions.parquet", "README.md"]
    samples = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    records = list(run.source.store.records())
    assert samples["id"][:] == [f"{record.task}/{record.sample_id}" for record in records]
    assert samples["answer"][:] == [record.answer.text for record in records]
    assert samples["token_ids"][:] == [list(record.answer.token_ids) for record in records]
    assert json.loads(samples[0]["reference"]) == records[0].reference
    mentions = datasets.load_dataset(str(folder), "mentions", split="train", cache_dir=str(tmp_path / "cache"))
    chair = [record for record in records if record.task == "chair"]
    expected = [record.answer.text[mention.start : mention.end] for record in chair for mention in record.mentions]
    assert mentions["word"][:] == expected
    assert mentions["probability"][:] == run.source.warnings["probability"].tolist()
    table = run.source.store.tokens("chair")
    first = table[table["is_first_subtoken"] & (table["mention_index"] >= 0)]
    assert mentions["nll"][:] == pytest.approx(first["nll"].tolist())
    card = DatasetCard.load(folder / "README.md").data
    assert [info["config_name"] for info in card.dataset_info] == ["mentions", "samples"]
    assert {info["splits"][0]["num_examples"] for info in card.dataset_info} == {len(samples), len(mentions)}


def test_a_run_without_token_rows_has_no_mentions(testbed_run, tmp_path):
    assert [path.name for path in export(run_export(testbed_run, "pope"), "dataset", tmp_path)][1:] == ["README.md"]
    assert "mentions" not in (tmp_path / "README.md").read_text().partition("# Answers")[0].replace("and mentions", "")


def test_results_for_the_repository_of_a_model(testbed_run, own_run, tmp_path):
    with pytest.raises(ConfigError, match="questions of pope are of no data set on the hub; dataset=owner/name"):
        export(run_export(testbed_run, "pope"), "hub_results", tmp_path)
    run = run_export(testbed_run, "pope", dataset="lmms-lab/POPE", url="https://example.org/run")
    (path,) = export(run, "hub_results", tmp_path)
    assert path == tmp_path / ".eval_results" / "pope.yaml"
    entries = parse_eval_result_entries(yaml.safe_load(path.read_text()))
    values = {entry.task_id: entry.value for entry in entries}
    assert values == {f"pope_{row.subset}": row.interval.value for row in run.tasks[0].metrics if row.metric == "f1"}
    assert {entry.dataset_id for entry in entries} == {"lmms-lab/POPE"}
    assert all("parser official" in entry.notes and entry.source_url for entry in entries)
    config = yaml.safe_load((own_run / "config.yaml").read_text())
    config["pope"].update(source="hub", revision="v1")
    (own_run / "config.yaml").write_text(yaml.safe_dump(config))
    (path,) = export(run_export(own_run, "pope"), "hub_results", tmp_path)
    entry = parse_eval_result_entries(yaml.safe_load(path.read_text()))[0]
    assert (entry.dataset_id, entry.dataset_revision, entry.source_url) == ("lmms-lab/POPE", "v1", None)


@pytest.mark.parametrize("target", ["every_eval_ever", "inspect", "hub_results"])
def test_the_name_of_a_task_leads_nowhere_else(own_run, tmp_path, target):
    for name in ("fingerprint.json", "metrics.json", "status.json"):
        sections = read_json(own_run / name)
        sections["../../../evil"] = sections.pop("pope")
        (own_run / name).write_text(json.dumps(sections))
    change_lines(own_run / "samples.jsonl", lambda line, index: line.update(task="../../../evil"))
    out = tmp_path / "a" / "b" / "out"
    files = export(run_export(own_run, "../../../evil", dataset="lmms-lab/POPE"), target, out)
    assert files
    assert all(path.resolve().is_relative_to(out) for path in files)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_a_push_uploads_the_files_and_nothing_else(testbed_run, tmp_path, monkeypatch):
    run, folder = run_export(testbed_run, "pope", dataset="lmms-lab/POPE"), tmp_path / "out"
    export(run, "dataset", folder)
    export(run, "hub_results", folder)
    (folder / "notes.txt").write_text("mine")
    with local_hub(monkeypatch, tmp_path) as hub:
        assert push(folder, "me/answers", "dataset", private=True, token="hf_secret").endswith(f"/commit/{1:040x}")
        assert set(hub.commits[f"{1:040x}"]) == {"samples.parquet", "README.md"}
        assert hub.made["type"] == "dataset"
        assert hub.made.get("private") or hub.made.get("visibility") == "private"
        assert push(folder, "me/detector", "model", None, token="hf_secret").endswith("/discussions/1")
        assert set(hub.commits[f"{2:040x}"]) == {".eval_results/pope.yaml"}
    with pytest.raises(ArtefactError, match="cannot be pushed to 'me/answers'") as error:
        push(folder, "me/answers", "dataset", None, token="hf_secret")
    assert "\n" not in str(error.value)


# --- nothing private --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["every_eval_ever", "inspect", "html", "dataset", "hub_results"])
def test_nothing_private_is_exported(own_run, tmp_path, monkeypatch, target):
    monkeypatch.setenv("LAB_API_KEY", "topsecretvalue")
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setattr(platform, "node", lambda: "gpu-node17")

    def change(line, index):
        line["reference"]["api_key"] = "letmein123"
        line["question"] += f" {SECRET}"
        line["untraced"] = "no room on gpu-node17"
        if index == 0:
            line["status"], line["error"] = "failed", "/data/private/coco/1.jpg is missing on gpu-node17"
        if index == 1:
            line["answer"]["text"] = "Yes, topsecretvalue, see /home/somebody/notes/plan.txt"
            line["score"]["detail"]["hub_token"] = "letmein123"

    change_lines(own_run / "samples.jsonl", change)
    config = yaml.safe_load((own_run / "config.yaml").read_text())
    config["pope"].update(images="/home/somebody/images", dataset="/home/somebody/POPE")
    (own_run / "config.yaml").write_text(yaml.safe_dump(config))
    fingerprints = read_json(own_run / "fingerprint.json")
    fingerprints["pope"]["task"]["settings"].update(images="/home/somebody/images", password="letmein123")
    (own_run / "fingerprint.json").write_text(json.dumps(fingerprints))
    files = export(run_export(own_run, "pope", dataset="lmms-lab/POPE"), target, tmp_path / "out")
    texts = []
    for path in files:
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            texts.append(json.dumps(pq.read_table(path).to_pylist()))
        elif path.suffix == ".eval":
            with zipfile.ZipFile(path) as archive:
                texts += [archive.read(name).decode() for name in archive.namelist()]
        else:
            texts.append(path.read_text())
        texts.append(path.relative_to(tmp_path).as_posix())
    whole = "\n".join(texts)
    for private in (SECRET, "topsecretvalue", "letmein123", "/home/", "/data/private", "gpu-node17", str(tmp_path)):
        assert private not in whole, private
    if target != "hub_results":
        assert ".../1.jpg is missing" in whole or target == "html"  # which shows the answer, where there is one
        assert "Yes, ***, see .../plan.txt" in whole


# --- the command ------------------------------------------------------------------------------------------------------


def call(capsys, *words):
    """Run the command; its exit status, output and errors."""
    with pytest.raises(SystemExit) as ended:
        main(["export", *map(str, words)])
    printed = capsys.readouterr()
    return ended.value.code, printed.out, printed.err


def test_the_command_prints_its_files(testbed_run, tmp_path, capsys):
    status, output, _ = call(capsys, f"run={testbed_run}", "to=inspect", "tasks=[chair]", f"out={tmp_path}")
    assert status == 0
    (path,) = map(Path, output.split())
    with zipfile.ZipFile(path) as archive:  # rendered again: the scenes are embedded
        name = next(name for name in archive.namelist() if name.startswith("samples/"))
        assert json.loads(archive.read(name))["input"][0]["content"][0]["image"].startswith("data:image/png")
    assert call(capsys, f"run={testbed_run}", "to=dataset", "tasks=pope", f"out={tmp_path / 'd'}")[0] == 0


def test_a_run_at_an_address_is_exported_as_from_its_folder(testbed_run, tmp_path, capsys):
    import fsspec

    files = fsspec.filesystem("memory")
    files.put(f"{testbed_run}/", f"/bucket/{testbed_run.name}", recursive=True)
    try:
        for run, out in ((testbed_run, "here"), (f"memory://bucket/{testbed_run.name}", "there")):
            assert call(capsys, f"run={run}", "to=html", f"out={tmp_path / out}")[0] == 0
        status, _, errors = call(capsys, f"run=memory://bucket/{testbed_run.name}", "to=html")
    finally:
        files.rm("/bucket", recursive=True)
    assert (tmp_path / "here" / "index.html").read_bytes() == (tmp_path / "there" / "index.html").read_bytes()
    assert status == 2
    assert "needs a folder of this machine: out=FOLDER" in errors


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["to=inspct"], "unknown target of export 'inspct'; did you mean 'inspect'"),
        (["tasks=[pop]"], "did you mean 'pope'"),
        (["relationship=friend"], "unknown relationship 'friend'"),
        (["dataset=POPE"], "dataset=POPE should be a data set on the hub, owner/name"),
        (["url=example.org"], "url=example.org should be a web address"),
        (["pictures=-1"], "pictures=-1 should be a number of bytes"),
        (["push=me/x"], "to=every_eval_ever only writes files"),
        (["push=../x", "to=dataset"], "push=../x should be a repository on the hub"),
        (["to=hub_results"], "dataset=owner/name says of which they are"),
    ],
)
def test_wrong_settings_are_one_line(testbed_run, tmp_path, capsys, words, message):
    status, _, errors = call(capsys, f"run={testbed_run}", f"out={tmp_path}", *words)
    assert status == 2
    assert message in errors
    assert len(error_lines(errors)) == 1
    assert not any(tmp_path.iterdir())


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    status, _, errors = call(capsys, f"run={tmp_path / 'nothing'}", f"out={tmp_path}")
    assert status == 2
    assert "nothing is no directory" in errors


def test_a_task_that_judges_no_answer_has_no_outcomes(testbed_run):
    record = next(RunReader.read(testbed_run).store.records("pope"))
    assert outcome_of(record, ["accuracy"]).metric == "accuracy"
    from dataclasses import replace

    from stethoscope.core.types import Score

    assert outcome_of(replace(record, score=Score("ok", {"answers": 1.0})), ["length"]) is None
    assert outcome_of(replace(record, score=Score("ok", {"asked": 1, "right": 0})), ["Acc"]) == (0.0, False, "Acc")
