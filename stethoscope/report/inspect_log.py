"""Write a task of a run as a log of inspect (UK AI Security Institute).

A ``.eval`` file is a zip of ``header.json`` (what was evaluated, figures), ``samples/{id}_epoch_1.json`` (messages,
output with log-probabilities, scores) and ``summaries.json``. Fields are those of inspect-ai 0.3 (log version 2).
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stethoscope import __version__
from stethoscope.core.files import replacing
from stethoscope.core.types import Answer
from stethoscope.evaluation.results import TaskResults
from stethoscope.metrics.bootstrap import REPLICATES
from stethoscope.report.export import LIBRARY, Judged, RunExport, dumps, judged_mentions, outcome_of, reference_texts
from stethoscope.storage.records import Record

VERSION = 2
SCORER = "lvlm-stethoscope"


def write_inspect(run: RunExport, folder: Path) -> list[Path]:
    """Write a log for every task; see ``export.export``."""
    return [_write_log(run, results, folder) for results in run.tasks]


def _write_log(run: RunExport, results: TaskResults, folder: Path) -> Path:
    identifier = run.identifier(results.task, "inspect")
    model = run.model(results.task)
    plain = re.sub(r"[^\w.-]+", "-", f"{results.task}_{model.name}")
    path = folder / f"{run.finished:%Y-%m-%dT%H-%M-%S}_{plain}_{identifier[:8]}.eval"
    warnings = run.warnings(results.task)
    metrics = list(dict.fromkeys(row.metric for row in results.metrics))
    summaries, ids = [], []
    with replacing(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for record in run.records(results.task):
            sample = sample_file(run, record, outcome_of(record, metrics), warnings.get(record.sample_id, []))
            archive.writestr(f"samples/{record.sample_id}_epoch_1.json", dumps(sample))
            summaries.append(summary(sample))
            ids.append(record.sample_id)
        archive.writestr("summaries.json", dumps(summaries))
        archive.writestr("header.json", dumps(header(run, results, identifier, ids)))
    return path


def header(run: RunExport, results: TaskResults, identifier: str, ids: list[str]) -> dict[str, Any]:
    """Return what was evaluated, with a score for each subset and its intervals."""
    task, model, chosen = results.task, run.model(results.task), run.generation(results.task)
    dataset, adapter, described = run.hub_dataset(task), run.fingerprint(task, "adapter"), run.fingerprint(task, "task")
    config = {"max_tokens": chosen.get("max_new_tokens"), "temperature": 0.0} if chosen else {}
    if chosen.get("do_sample"):
        config |= {key: chosen.get(key) for key in ("temperature", "top_p", "seed")}
    time = run.finished.isoformat(timespec="seconds")
    evaluation = {
        **dict.fromkeys(("eval_id", "run_id", "task_id"), identifier.replace("-", "")[:22]),
        "created": time,
        "task": task,
        "task_version": str(described.get("version", 0)),
        "dataset": {
            "name": dataset[0] if dataset else task,
            "location": dataset[0] if dataset else None,
            "samples": len(ids),
            "sample_ids": ids,
            "shuffled": False,
        },
        "model": f"hf/{model.id}" if model.on_hub else model.id,
        "model_generate_config": {key: value for key, value in config.items() if value is not None},
        "model_args": {}
        if run.log(task)
        else {k: adapter[k] for k in ("revision", "dtype", "quantize") if adapter.get(k)},
        "config": {"epochs": 1, "log_images": bool(run.settings.pictures)},
        "packages": {LIBRARY: run.packages.get(LIBRARY, __version__)},
        "metadata": {"parser": run.parser(task), "labeller": run.labeller(task), "versions": run.packages},
    }
    return {
        "version": VERSION,
        "status": "success",
        "eval": evaluation,
        "plan": {"name": "plan", "steps": [{"solver": "generate", "params": {}}], "config": {}},
        "results": {
            "total_samples": results.counts["samples"],
            "completed_samples": results.counts["samples"] - results.counts["failed"],
            "scores": [_score_section(results, subset) for subset in results.subsets],
        },
        "stats": {"started_at": time, "completed_at": time, "model_usage": {}},
    }


def _score_section(results: TaskResults, subset: str) -> dict[str, Any]:
    """Return the metrics of one subset, each with the ends of its interval."""
    metrics: dict[str, dict[str, Any]] = {}
    for row in results.metrics:
        interval = row.interval.to_dict()
        if row.subset == subset and interval["value"] is not None:
            facts = {"low": interval["low"], "high": interval["high"], "items": interval["items"],
                     "images": interval["groups"], "replicates": REPLICATES}  # fmt: skip
            metrics[row.metric] = {"name": row.metric, "value": interval["value"], "params": {}, "metadata": facts}
    counts = results.subset_counts.get(subset, results.counts)
    return {
        "name": subset,
        "scorer": SCORER,
        "params": {},
        "metrics": metrics,
        "scored_samples": counts["ok"],
        "unscored_samples": counts["samples"] - counts["ok"],
    }


def sample_file(
    run: RunExport, record: Record, outcome: Judged | None, warnings: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return one sample: messages with the picture, output with log-probabilities, score, mentions."""
    content: list[dict[str, Any]] = [{"type": "text", "text": record.question}]
    picture = run.data_uri(record)
    if picture:
        content.insert(0, {"type": "image", "image": picture, "detail": "auto"})
    user = {"role": "user", "content": content if picture else record.question, "source": "input"}
    model = run.model(record.task).id
    sample: dict[str, Any] = {
        "id": record.sample_id,
        "epoch": 1,
        "input": [user],
        "target": reference_texts(record) or "",
        "messages": [user],
        "output": {"model": model, "choices": [], "completion": ""},
        "scores": _sample_scores(record, outcome),
        "metadata": {
            "subset": record.subset,
            "group": record.group,
            "image": record.image,
            "image_sha256": record.image_sha256,
            "prompt": record.prompt,
            "status": record.status,
            "mentions": judged_mentions(record, warnings),
        },
        "store": {},
        "events": [],
        "model_usage": {},
        "attachments": {},
        "total_time": sum(record.seconds.values()),
    }
    if record.answer is not None:
        message = {"role": "assistant", "content": record.answer.text, "source": "generate", "model": model}
        stop = "stop" if record.answer.finished else "max_tokens"
        choice = {"message": message, "stop_reason": stop, "logprobs": {"content": _logprobs(record.answer)}}
        sample["messages"] = [user, message]
        sample["output"] |= {"choices": [choice], "completion": record.answer.text}
        sample["output"]["metadata"] = {"token_ids": list(record.answer.token_ids)}
    if record.status == "failed":
        sample["error"] = {"message": record.error, "traceback": "", "traceback_ansi": ""}
    return sample


def _logprobs(answer: Answer) -> list[dict[str, Any]]:
    """Return text, bytes and log-probability of every token of an answer."""
    return [
        {"token": text, "logprob": value, "bytes": list(text.encode("utf-8", "replace"))}
        for text, value in zip(answer.tokens, answer.logprobs, strict=True)
    ]


def _sample_scores(record: Record, outcome: Judged | None) -> dict[str, Any]:
    """Return the score of one sample under its subset.

    It is C or I for a question, a share of invented mentions for a caption.
    """
    if record.score is None:
        return {}
    detail: Mapping[str, Any] = record.score.detail
    value: Any = outcome.value if outcome else "N"
    if outcome is not None and outcome.value in (0.0, 1.0) and isinstance(detail.get("reply"), str):
        value = "C" if outcome.correct else "I"
    reply = detail.get("reply", ", ".join(map(str, detail.get("objects", ()))))
    return {
        record.subset: {
            "value": value,
            "answer": str(reply) if reply is not None else None,
            "explanation": "" if record.status == "ok" else f"{record.status}: in no figure",
            "metadata": {"counts": dict(record.score.counts), "detail": dict(detail)},
        }
    }


def summary(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return a sample's entry in the list that a viewer shows first.

    Picture and log-probabilities are left out.
    """
    question = sample["input"][0]["content"]
    text = question if isinstance(question, str) else question[-1]["text"]
    scores = {name: {**score, "metadata": {}} for name, score in sample["scores"].items()}
    metadata = {key: sample["metadata"][key] for key in ("subset", "image", "status")}
    return {
        "id": sample["id"],
        "epoch": 1,
        "input": text,
        "target": sample["target"],
        "metadata": metadata,
        "scores": scores,
        "completed": True,
        "total_time": sample["total_time"],
        "message_count": len(sample["messages"]),
        **({"error": sample["error"]["message"]} if "error" in sample else {}),
    }
