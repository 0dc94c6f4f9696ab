"""Write a run in the schema of Every Eval Ever 0.3.0 (arXiv 2606.14516).

Files lie as its data store wants them: ``data/{benchmark}/{developer}/{model}/{uuid}.json`` with the figures of a task
and their intervals, and ``{uuid}_samples.jsonl`` with a line for every sample whose outcome is known by itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stethoscope import __version__
from stethoscope.core.files import atomic_write
from stethoscope.evaluation.results import TaskResults
from stethoscope.metrics.bootstrap import REPLICATES, MetricRow
from stethoscope.report.export import (
    LIBRARY,
    RunExport,
    clean,
    dumps,
    judged_mentions,
    outcome_of,
    path_part,
    reference_texts,
)
from stethoscope.storage.records import Record

SCHEMA_VERSION = "0.3.0"
LOWER_IS_BETTER = {"chair_i", "chair_s", "chair", "hal", "cog", "IG", "ID", "SB_yes", "SB_no"}
"""Metrics of which smaller values are better."""
BOUNDS: dict[str, tuple[float | str, float | str, str]] = {
    "length": (0, "Infinity", "words"),
    "nll_gap": ("-Infinity", "Infinity", "nats per token"),
    "nll": (0, "Infinity", "nats per token"),
    "score": (0, 2800, "points"),
    "amber": (0, 100, "points"),
}
"""Range and unit of metrics that are no shares, by the start of their names."""
GLOBAL_METRICS = ("accuracy", "precision", "recall", "f1")


def write_every_eval_ever(run: RunExport, folder: Path) -> list[Path]:
    """Write the aggregate file of every task, and the lines of its samples; see ``export.export``."""
    files = []
    for results in run.tasks:
        model, name = run.model(results.task), run.identifier(results.task, "every_eval_ever")
        named = [path_part(label) for label in (results.task, model.owner, model.name)]
        parts = ["data", *(f"{part}_" if part == "data" else part for part in named)]  # the store begins with the one
        inside = "/".join(parts)
        target = folder.joinpath(*parts)
        target.mkdir(parents=True, exist_ok=True)
        evaluation_id = f"{results.task}/{model.id}/{int(run.settings.time)}"
        lines = [dumps(line) for line in instance_lines(run, results, evaluation_id)]
        aggregate = aggregate_file(run, results, evaluation_id)
        if lines:
            data = ("\n".join(lines) + "\n").encode()
            aggregate["detailed_evaluation_results"] = {
                "format": "jsonl",
                "file_path": f"{inside}/{name}_samples.jsonl",
                "hash_algorithm": "sha256",
                "checksum": hashlib.sha256(data).hexdigest(),
                "total_rows": len(lines),
            }
            files.append(target / f"{name}_samples.jsonl")
            atomic_write(files[-1], data)
        files.append(target / f"{name}.json")
        atomic_write(files[-1], dumps(aggregate, indent=1) + "\n")
    return files


def aggregate_file(run: RunExport, results: TaskResults, evaluation_id: str) -> dict[str, Any]:
    """Return the aggregate of one task: where its figures come from, and each with its interval."""
    model, adapter = run.model(results.task), run.fingerprint(results.task, "adapter")
    log = run.log(results.task)
    facts = {} if log else {key: str(adapter[key]) for key in ("dtype", "quantize", "weights") if adapter.get(key)}
    versions = run.packages
    engine = {"name": "transformers", "version": versions.get("transformers", "unknown")}
    if log:
        engine = {"name": str(log.get("engine") or "unknown"), "version": "unknown"}
    return {
        "schema_version": SCHEMA_VERSION,
        "evaluation_id": evaluation_id,
        "evaluation_timestamp": run.finished.isoformat(timespec="seconds"),
        "retrieved_timestamp": str(int(run.settings.time)),
        "source_metadata": {
            "source_name": "LVLM-Stethoscope",
            "source_type": "evaluation_run",
            "source_organization_name": run.settings.organization,
            "evaluator_relationship": run.settings.relationship,
            **({"additional_details": {"url": run.settings.url}} if run.settings.url else {}),
        },
        "eval_library": {
            "name": LIBRARY,
            "version": versions.get(LIBRARY, __version__),
            "additional_details": {"task": run.labeller(results.task), **versions},
        },
        "model_info": {
            "name": model.name,
            "id": model.id,
            "developer": model.owner,
            "inference_engine": engine,
            "additional_details": {
                "deployment_type": "unknown" if log else "self_deployed",
                "model_availability": "open_weights" if model.on_hub else "unknown",
                **({"revision": model.revision} if model.revision else {}),
                **facts,
            },
        },
        "evaluation_results": [
            evaluation_result(run, results, row)
            for row in results.metrics
            if row.interval.to_dict()["value"] is not None
        ],
    }


def evaluation_result(run: RunExport, results: TaskResults, row: MetricRow) -> dict[str, Any]:
    """Return one figure with its interval over images."""
    interval, counts = row.interval.to_dict(), results.subset_counts.get(row.subset, results.counts)
    metric = row.metric if row.metric in GLOBAL_METRICS else f"{results.task}.{row.metric}"
    low, high, unit = _bounds(row)
    uncertainty: dict[str, Any] = {"num_samples": interval["items"]}
    if interval["low"] is not None and interval["high"] is not None:
        uncertainty["confidence_interval"] = {
            "lower": interval["low"],
            "upper": interval["high"],
            "confidence_level": 0.95,
            "method": "percentiles of a bootstrap over images",
        }
        uncertainty["num_bootstrap_samples"] = REPLICATES
    return {
        "evaluation_result_id": result_id(results.task, row.subset, row.metric),
        "evaluation_name": f"{results.task}/{row.subset}",
        "source_data": source_data(run, results, counts.get("samples", interval["items"])),
        "metric_config": {
            "metric_id": metric,
            "metric_name": row.metric,
            "metric_kind": row.metric,
            "metric_unit": unit,
            "lower_is_better": row.metric in LOWER_IS_BETTER,
            "score_type": "continuous",
            "min_score": low,
            "max_score": high,
            **({"metric_parameters": {"parser": run.parser(results.task)}} if run.parser(results.task) else {}),
        },
        "score_details": {
            "score": interval["value"],
            "details": {"images": str(interval["groups"]), **{name: str(count) for name, count in counts.items()}},
            "uncertainty": uncertainty,
        },
        "generation_config": generation_config(run, results.task),
    }


def result_id(task: str, subset: str, metric: str) -> str:
    """Return the id that joins lines of samples with a figure."""
    return f"{task}/{subset}/{metric}"


def source_data(run: RunExport, results: TaskResults, samples: Any) -> dict[str, Any]:
    """Return where the questions come from: a data set on the hub, or files that only their owner has."""
    dataset = run.hub_dataset(results.task)
    if dataset is None:
        details = {"samples": str(samples), "source": str(_settings(run, results.task).get("source") or "files")}
        return {"dataset_name": results.task, "source_type": "other", "additional_details": details}
    split = {"hf_split": dataset[1]} if dataset[1] else {}
    return {
        "dataset_name": results.task,
        "source_type": "hf_dataset",
        "hf_repo": dataset[0],
        **split,
        "samples_number": int(samples),
        **({"additional_details": {"revision": dataset[2]}} if dataset[2] else {}),
    }


def generation_config(run: RunExport, task: str) -> dict[str, Any]:
    """Return the settings of decoding and the prompt."""
    chosen, adapter = run.generation(task), run.fingerprint(task, "adapter")
    if not chosen:  # decoded by another engine, which has not said how
        return {"additional_details": {"answers": "given, from a log"}}
    arguments: dict[str, Any] = {"temperature": 0.0}
    if chosen.get("do_sample"):
        arguments = {key: float(chosen[key]) for key in ("temperature", "top_p") if chosen.get(key) is not None}
    if chosen.get("max_new_tokens"):
        arguments["max_tokens"] = int(chosen["max_new_tokens"])
    if isinstance(adapter.get("prompt"), str):
        arguments["prompt_template"] = adapter["prompt"]
    others = {key: str(value) for key, value in chosen.items() if key in ("do_sample", "num_beams", "seed", "stop")}
    return {"generation_args": arguments, "additional_details": others}


def instance_lines(run: RunExport, results: TaskResults, evaluation_id: str) -> Iterator[dict[str, Any]]:
    """Yield a line for every sample; none if the task judges no single answer, as for free text.

    A sample without an outcome says so in ``error``: its score of 0 stands for nothing and is in no figure.
    """
    metrics = list(dict.fromkeys(row.metric for row in results.metrics))
    records = list(run.records(results.task))
    judged = {record.sample_id: outcome_of(record, metrics) for record in records}
    if not any(judged.values()):
        return
    warnings, model = run.warnings(results.task), run.model(results.task)
    subsets = {row.subset for row in results.metrics}
    for record in records:
        outcome = judged[record.sample_id]
        subset = record.subset if record.subset in subsets else "all"
        metric = outcome.metric if outcome and outcome.metric else results.primary
        references = reference_texts(record)
        text = record.answer.text if record.answer else None
        line: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "evaluation_id": evaluation_id,
            "model_id": model.id,
            "evaluation_name": f"{results.task}/{subset}",
            "evaluation_result_id": result_id(results.task, subset, metric),
            "sample_id": record.sample_id,
            "sample_hash": hashlib.sha256("".join([record.question, *references]).encode(errors="replace")).hexdigest(),
            "interaction_type": "single_turn",
            "input": {"raw": record.question, "formatted": record.prompt or None, "reference": references},
            "output": {"raw": [] if text is None else [text]},
            "answer_attribution": attribution(run, results.task, record),
            "evaluation": {"score": outcome.value if outcome else 0.0, "is_correct": bool(outcome and outcome.correct)},
            "performance": {
                "generation_time_ms": 1000 * record.seconds.get("generate", 0.0),
            },
            "metadata": metadata(record, warnings.get(record.sample_id, ())),
        }
        if outcome is None:
            line["error"] = record.error or f"{record.status}: in no figure"
        yield line


def attribution(run: RunExport, task: str, record: Record) -> list[dict[str, Any]]:
    """Return what was read out of an answer, and by which rule."""
    detail = record.score.detail if record.score else {}
    reply, objects = detail.get("reply"), detail.get("objects")
    if isinstance(reply, str):
        value, method = reply, f"yes_no/{run.parser(task)}" if run.parser(task) else run.labeller(task)
    elif isinstance(objects, list):
        value, method = ", ".join(map(str, objects)), f"object names by {run.labeller(task)}"
    else:
        return []
    return [
        {
            "turn_idx": 0,
            "source": "output.raw",
            "extracted_value": value,
            "extraction_method": method,
            "is_terminal": True,
        }
    ]


def metadata(record: Record, warnings: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return further facts of a sample, all of them texts."""
    facts = {
        "image": record.image,
        "image_sha256": record.image_sha256,
        "subset": record.subset,
        "group": record.group,
        "status": record.status,
        "answer_tokens": str(len(record.answer.token_ids) if record.answer else 0),
        "finished": str(bool(record.answer and record.answer.finished)).lower(),
    }
    if record.mentions:
        facts["mentions"] = dumps(judged_mentions(record, warnings))
    return {key: value for key, value in facts.items() if value}


def _settings(run: RunExport, task: str) -> dict[str, Any]:
    return clean(run.fingerprint(task, "task").get("settings") or {})


def _bounds(row: MetricRow) -> tuple[float | str, float | str, str]:
    """Return lowest and highest value of a metric and its unit; a share by default."""
    name = next((name for name in BOUNDS if row.metric.startswith(name)), None)
    if name is not None:
        return BOUNDS[name]
    if 0 <= row.interval.value <= 1:
        return 0, 1, "proportion"
    return "-Infinity", "Infinity", "not stated"
