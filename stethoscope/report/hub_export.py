"""Write a run for the Hugging Face hub: figures of a model, or a data set of mentions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stethoscope.core.errors import ArtefactError, ConfigError, first_line
from stethoscope.core.files import atomic_write, replacing
from stethoscope.core.token_table import feature_names, mention_rows
from stethoscope.evaluation.results import TaskResults
from stethoscope.report.export import LIBRARY, RunExport, clean, dumps, path_part

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

SAMPLES, MENTIONS, CARD = "samples.parquet", "mentions.parquet", "README.md"
MENTION_COLUMNS = {
    "id": "task, sample and index of the mention",
    "task": "name of the task",
    "sample_id": "of the sample, as in the samples",
    "group": "id of the image",
    "subset": "part of the task",
    "word": "what the answer says",
    "object": "canonical name",
    "start": "first character of the mention in the answer, from 0",
    "end": "character after the last one",
    "label": "1 hallucinated, 0 grounded, -1 not judged",
    "repeat_index": "how often the answer named the object before",
    "fold": "train, calibration or test of the detector; empty without one",
    "probability": "that the object is not in the picture, by the run's detector; null without one",
}
"""Columns of the mentions before their features."""


# --- figures for the repository of a model ----------------------------------------------------------------------------


def write_hub_results(run: RunExport, folder: Path) -> list[Path]:
    """Write ``.eval_results/{task}.yaml``: the main metric of each subset, for the hub.

    Raises:
        ConfigError: a task's questions are of no data set on the hub, and ``dataset`` names none.
    """
    import yaml
    from huggingface_hub import eval_result_entries_to_yaml

    target, files = folder / ".eval_results", []
    entries = {results.task: hub_entries(run, results) for results in run.tasks}
    target.mkdir(parents=True, exist_ok=True)
    for task, listed in entries.items():
        text = yaml.safe_dump(clean(eval_result_entries_to_yaml(listed)), sort_keys=False, allow_unicode=True)
        files.append(target / f"{path_part(task)}.yaml")
        atomic_write(files[-1], text)
    return files


def hub_entries(run: RunExport, results: TaskResults) -> list[Any]:
    """Return the hub's entries of one task, one for each subset."""
    from huggingface_hub import EvalResultEntry

    dataset = run.hub_dataset(results.task)
    if dataset is None:
        raise ConfigError(
            f"the questions of {results.task} are of no data set on the hub; dataset=owner/name says of which they are"
        )
    parser = run.parser(results.task)
    entries = []
    for row in results.metrics:
        interval = row.interval.to_dict()
        if row.metric != results.primary or interval["value"] is None:
            continue
        ends = [interval["low"], interval["high"]]
        sure = f", 95 % interval {ends[0]:.4f} to {ends[1]:.4f}" if None not in ends else ""
        counted = f"{interval['items']} samples, {interval['groups']} images"
        notes = f"{row.metric}{sure}, {counted}; {run.labeller(results.task)}"
        entries.append(
            EvalResultEntry(
                dataset_id=dataset[0],
                task_id=results.task if row.subset == "all" else f"{results.task}_{row.subset}",
                value=interval["value"],
                dataset_revision=dataset[2] or None,
                date=run.finished.strftime("%Y-%m-%dT%H:%M:%SZ"),
                source_url=run.settings.url,
                source_name="LVLM-Stethoscope" if run.settings.url else None,
                notes=notes + (f", parser {parser}" if parser else ""),
            )
        )
    return entries


# --- a data set -------------------------------------------------------------------------------------------------------


def write_dataset(run: RunExport, folder: Path) -> list[Path]:
    """Write ``samples.parquet``, ``mentions.parquet`` and the card that tells the hub how to read them.

    Both are Parquet, as ``datasets`` reads all files of a folder by one reader.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = [clean(line) for results in run.tasks for line in sample_lines(run, results.task)]
    samples = pa.Table.from_pylist(lines, schema=sample_features().arrow_schema.remove_metadata())
    tables = {SAMPLES: samples, MENTIONS: mention_table(run)}
    files = []
    for name, table in tables.items():
        (folder / name).unlink(missing_ok=True)  # of an earlier export, which had mentions
        if table is not None:
            with replacing(folder / name) as file:
                pq.write_table(table, file)
            files.append(folder / name)
    atomic_write(folder / CARD, dataset_card(run, folder, samples.num_rows, tables[MENTIONS]))
    return [*files, folder / CARD]


def sample_lines(run: RunExport, task: str) -> Iterator[dict[str, Any]]:
    """Yield a line for each sample of a task.

    The task's own nested values are JSON texts, so that a column has one type.
    """
    for record in run.records(task):
        answer, score = record.answer, record.score
        yield {
            "id": f"{task}/{record.sample_id}",
            "task": task,
            "sample_id": record.sample_id,
            "group": record.group,
            "subset": record.subset,
            "image": record.image,
            "image_sha256": record.image_sha256,
            "question": record.question,
            "reference": dumps(dict(record.reference)),
            "prompt": record.prompt,
            "status": record.status,
            "error": record.error,
            "answer": answer.text if answer else None,
            "token_ids": list(answer.token_ids) if answer else [],
            "logprobs": list(answer.logprobs) if answer else [],
            "finished": answer.finished if answer else None,
            "score": dumps({"counts": dict(score.counts), "detail": dict(score.detail)}) if score else None,
        }


def sample_features() -> Any:
    """Return the columns of the samples as ``datasets`` describes them."""
    from datasets import Features, List, Value

    texts = ("id", "task", "sample_id", "group", "subset", "image", "image_sha256", "question", "reference", "prompt")
    return Features(
        {
            **{name: Value("string") for name in (*texts, "status", "error", "answer")},
            "token_ids": List(Value("int64")),
            "logprobs": List(Value("float64")),
            "finished": Value("bool"),
            "score": Value("string"),
        }
    )


def mention_table(run: RunExport) -> pa.Table | None:
    """Return the mentions of all tasks with features and probabilities; None for a run that traced none.

    Returns:
        Columns of ``MENTION_COLUMNS``, then features (float32), null where a task's run did not compute one.
    """
    import pandas as pd
    import pyarrow as pa

    traced = set(run.source.store.traced_tasks())
    parts = [_mentions_of(run, results.task) for results in run.tasks if results.task in traced]
    parts = [part for part in parts if len(part)]
    if not parts:
        return None
    table = pd.concat(parts, ignore_index=True)
    features = [name for name in table.columns if name not in MENTION_COLUMNS]
    texts = ("id", "task", "sample_id", "group", "subset", "word", "object", "fold")
    kinds = {name: pa.string() if name in texts else pa.int32() for name in MENTION_COLUMNS}
    kinds |= {"probability": pa.float64(), **dict.fromkeys(features, pa.float32())}
    for name in texts:
        table[name] = table[name].map(clean)
    schema = pa.schema([(name, kinds[name]) for name in (*MENTION_COLUMNS, *features)])
    return pa.Table.from_pandas(table, schema=schema, preserve_index=False).replace_schema_metadata(None)


def _mentions_of(run: RunExport, task: str) -> pd.DataFrame:
    import pandas as pd

    rows = mention_rows(run.source.store.tokens(task), "first", "all", judged=False)
    features = list(feature_names(rows))
    answers = {record.sample_id: record.answer.text for record in run.records(task) if record.answer}
    spans = {
        (record.sample_id, mention.mention_index): (mention.start, mention.end)
        for record in run.records(task)
        for mention in record.mentions
    }
    ends = [spans.get(key, (0, 0)) for key in zip(rows["sample_id"], rows["mention_index"], strict=True)]
    verdicts = {
        (sample, warning["start"]): warning for sample, listed in run.warnings(task).items() for warning in listed
    }
    judged = [verdicts.get(key, {}) for key in zip(rows["sample_id"], rows["start"], strict=True)]
    keys = pd.DataFrame(
        {
            "id": [
                f"{task}/{sample}/{index}"
                for sample, index in zip(rows["sample_id"], rows["mention_index"], strict=True)
            ],
            "task": task,
            **{name: rows[name].astype(str) for name in ("sample_id", "group", "subset")},
            "word": [
                answers.get(sample, "")[start:end] for sample, (start, end) in zip(rows["sample_id"], ends, strict=True)
            ],
            "object": rows["object"].astype(str),
            "start": [start for start, _ in ends],
            "end": [end for _, end in ends],
            "label": rows["label"],
            "repeat_index": rows["repeat_index"],
            "fold": [str(verdict.get("fold", "")) for verdict in judged],
            "probability": [verdict.get("probability") for verdict in judged],
        }
    )
    return pd.concat([keys, rows[features]], axis=1)


def dataset_card(run: RunExport, folder: Path, rows: int, mentions: pa.Table | None) -> str:
    """Return the card: Markdown after the hub's YAML header, which names files, columns and sizes."""
    from datasets import DatasetInfo, Features, SplitDict, SplitInfo
    from datasets.info import DatasetInfosDict
    from huggingface_hub import DatasetCardData

    def described(name: str, file: Path, features: Any, count: int) -> DatasetInfo:
        size = file.stat().st_size
        splits = SplitDict({"train": SplitInfo("train", num_bytes=size, num_examples=count)})
        return DatasetInfo(features=features, splits=splits, config_name=name, download_size=size, dataset_size=size)

    infos = {"samples": described("samples", folder / SAMPLES, sample_features(), rows)}
    files = {"samples": SAMPLES}
    if mentions is not None:
        features = Features.from_arrow_schema(mentions.schema)
        infos["mentions"] = described("mentions", folder / MENTIONS, features, len(mentions))
        files["mentions"] = MENTIONS
    data = DatasetCardData(
        pretty_name=clean(f"{run.source.name}: answers and mentions"),
        tags=["hallucination-detection", "vision-language", LIBRARY],
        configs=[
            {"config_name": name, "data_files": file, **({"default": True} if name == "samples" else {})}
            for name, file in files.items()
        ],
    )
    DatasetInfosDict(infos).to_dataset_card_data(data)
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(_card_text(run, rows, mentions)) + "\n"


def _card_text(run: RunExport, rows: int, mentions: pa.Table | None) -> list[str]:
    lines = ["# Answers of a vision-language model, and the objects that they name", ""]
    for results in run.tasks:
        model = run.model(results.task)
        lines.append(f"- {results.task} ({run.labeller(results.task)}), answered by {model.id}: {results.summary()}")
    lines += ["", f"`samples`: {rows} lines. `reference` and `score` are JSON texts of the task."]
    if mentions is not None:
        lines += [
            "",
            f"`mentions`: {len(mentions)} rows; after these columns, the features of the first sub-token:",
            "",
        ]
        lines += [f"- `{name}`: {text}" for name, text in MENTION_COLUMNS.items()]
    lines += ["", "| task | metric | subset | value | 95 % interval | images |", "|---|---|---|---|---|---|"]
    for results in run.tasks:
        for row in results.metrics:
            interval = row.interval.to_dict()
            if interval["value"] is not None:
                ends = [interval["low"], interval["high"]]
                sure = "" if None in ends else f"{ends[0]:.3f} to {ends[1]:.3f}"
                figures = f"{interval['value']:.3f} | {sure} | {interval['groups']}"
                lines.append(f"| {results.task} | {row.metric} | {row.subset} | {figures} |")
    lines += ["", f"Made with {LIBRARY} {run.packages.get(LIBRARY, '')}. Pictures are not part of the data set."]
    return clean(lines)


def push(folder: Path, repo_id: str, kind: str, private: bool | None, token: str | None = None) -> str:
    """Upload exported files to the hub.

    Args:
        folder: with the files.
        repo_id: ``owner/name``; a data set is created if there is none.
        kind: ``dataset``, or ``model`` for a pull request to the repository of a model.
        private: who may see a new data set; None for the owner's default.
        token: of an account that may write there; None for the one that is logged in.

    Returns:
        The address of the commit or pull request.

    Raises:
        ArtefactError: the hub refuses or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api, message = HfApi(token=token), "Results of LVLM-Stethoscope"
    try:
        if kind == "dataset":
            api.create_repo(repo_id, repo_type=kind, private=private, exist_ok=True)
            names = [SAMPLES, MENTIONS, CARD]
            return api.upload_folder(
                repo_id=repo_id, repo_type=kind, folder_path=folder, allow_patterns=names, commit_message=message
            ).commit_url
        files = sorted((folder / ".eval_results").glob("*.yaml"))
        added = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files]
        commit = api.create_commit(repo_id, added, commit_message=message, create_pr=True)
    except Exception as error:  # the client lets errors of its HTTP library through, which changes with its versions
        raise ArtefactError(
            f"the files cannot be pushed to {repo_id!r}: {type(error).__name__}: {first_line(error)}"
        ) from None
    return commit.pr_url or commit.commit_url


# --- the decoding method as code for transformers -------------------------------------------------------------------


def write_custom_generate(run: RunExport, folder: Path) -> list[Path]:
    """Write the mitigation of a run as a folder that ``model.generate(custom_generate=folder)`` loads.

    Raises:
        ConfigError: its answers were written by no method that reads them a second time.
    """
    from stethoscope.mitigation.custom_generate import write_generate_folder
    from stethoscope.mitigation.decoding import NoImageContrast, NoiseContrast

    section = run.fingerprint(run.tasks[0].task, "generation").get("mitigation") or {}
    methods = {method.name: method for method in (NoImageContrast, NoiseContrast)}
    if section.get("name") not in methods:
        raise ConfigError(
            f"{run.source.folder} was written with mitigation={section.get('name', 'none')}; to=custom_generate is for "
            f"{' and '.join(methods)}"
        )
    return write_generate_folder(methods[section["name"]](**section["settings"]), folder)
