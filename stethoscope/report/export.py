"""Read a finished run for other tools, without secrets, local paths or machine names."""

from __future__ import annotations

import base64
import hashlib
import importlib
import io
import json
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stethoscope.core.errors import ArtefactError, ConfigError, unknown
from stethoscope.core.files import check_out, jsonable, read_json, writing_out
from stethoscope.core.redaction import hide_paths, redact, redact_text
from stethoscope.core.types import Answer
from stethoscope.storage.run_dir import REMEDIES

if TYPE_CHECKING:
    from PIL.Image import Image

    from stethoscope.evaluation.results import TaskResults
    from stethoscope.report.run_source import RunReader
    from stethoscope.storage.records import Record

LIBRARY = "lvlm-stethoscope"
EXPORTERS = {
    "every_eval_ever": "every_eval_ever",  # the community's schema: a JSON file per task, a JSON line per sample
    "hub_results": "hub_export",  # .eval_results/*.yaml for the model's repository on the hub
    "inspect": "inspect_log",  # a .eval log per task, for inspect's viewer
    "html": "sample_list",  # a page of all samples with filters and pictures, which needs no server
    "dataset": "hub_export",  # samples and mentions, for `datasets.load_dataset` and the hub
    "custom_generate": "hub_export",  # the run's decoding method as a folder that transformers' `generate` loads
}
"""Targets of ``stethoscope export``, with the module of this package whose function ``write_<target>`` writes it."""
RELATIONS = ("first_party", "third_party", "collaborative", "other")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_RIGHT = ("right", "correct")
_SHORTEST_SECRET = 8  # characters; most tokens of an answer are shorter


@dataclass(frozen=True)
class ExportSettings:
    """Settings of an export.

    Attributes:
        organization: who publishes the results.
        relationship: of the publisher to the model, one of ``RELATIONS``.
        dataset: hub id of the data set that the questions are of; None for the one that the task read, if it did.
        url: web address where the results are described; None for none.
        pictures: largest picture that is put into a log, in bytes; 0 for none.
        time: seconds since 1970, the time of the export.

    Raises:
        ConfigError: a value is of another kind.
    """

    organization: str = "not stated"
    relationship: str = "third_party"
    dataset: str | None = None
    url: str | None = None
    pictures: int = 200_000
    time: float = 0.0

    def __post_init__(self) -> None:
        if self.relationship not in RELATIONS:
            raise ConfigError(unknown("relationship", str(self.relationship), RELATIONS))
        if self.dataset is not None and not _HUB_ID.fullmatch(self.dataset):
            raise ConfigError(f"dataset={self.dataset} should be a data set on the hub, owner/name")
        if self.url is not None and not re.match(r"https?://\S+\Z", self.url):
            raise ConfigError(f"url={self.url} should be a web address, https://...")
        if isinstance(self.pictures, bool) or not isinstance(self.pictures, int) or self.pictures < 0:
            raise ConfigError(f"pictures={self.pictures} should be a number of bytes, 0 or more")


class ModelName(NamedTuple):
    """A model as other tools name it.

    Attributes:
        id: ``owner/name``; the owner is ``local`` for a folder.
        owner: first part of it.
        name: second part.
        on_hub: whether it is a repository on the hub.
        revision: of the repository; empty where not known.
    """

    id: str
    owner: str
    name: str
    on_hub: bool
    revision: str


class Judged(NamedTuple):
    """The outcome of one sample.

    Attributes:
        value: from 0 to 1; for captions the share of invented mentions.
        correct: right answer, or nothing invented.
        metric: of the task that sums such values up.
    """

    value: float
    correct: bool
    metric: str


@dataclass(frozen=True)
class RunExport:
    """A finished run, as it leaves this machine.

    Attributes:
        source: the run.
        tasks: results of the tasks to export.
        settings: of the export.
        picture: loads the picture of a record that the run has not stored; None where it cannot be loaded.
    """

    source: RunReader
    tasks: tuple[TaskResults, ...]
    settings: ExportSettings = ExportSettings()
    picture: Callable[[Record], Image | None] = field(default=lambda record: None, repr=False)

    @cached_property
    def finished(self) -> datetime:
        """Time at which the figures were written, in UTC."""
        return datetime.fromtimestamp((self.source.folder / "metrics.json").stat().st_mtime, UTC)

    def fingerprint(self, task: str, part: str) -> dict[str, Any]:
        """Return a part of what identifies a task's answers; empty without it.

        ``part`` is ``adapter``, ``task``, ``generation`` or ``answers``.
        """
        return self._fingerprints[task].get(part) or {}

    @cached_property
    def _fingerprints(self) -> dict[str, Any]:
        return redact(self.source.store.fingerprints())

    def log(self, task: str) -> dict[str, Any]:
        """Return what is known of the log that answers come from; empty if the model wrote them."""
        return self.fingerprint(task, "answers")

    def generation(self, task: str) -> dict[str, Any]:
        """Return the settings of decoding; none for answers of a log.

        ``max_new_tokens`` is the longest answer that was applied.
        """
        if self.log(task):
            return {}
        chosen = self.fingerprint(task, "generation")
        applied = chosen.get("applied") or {}
        longest = chosen.get("max_new_tokens") or applied.get("max_new_tokens")
        return {**{key: value for key, value in chosen.items() if key != "applied"}, "max_new_tokens": longest}

    def model(self, task: str) -> ModelName:
        """Name the model that wrote the answers of a task: that of their log, where they come from one.

        A folder is named by its last part.
        """
        described = self.log(task) or self.fingerprint(task, "adapter")
        known = str(described.get("model" if self.log(task) else "model_id") or "")
        revision = str(described.get("revision") or "")
        if _HUB_ID.fullmatch(known) and not known.startswith("local/"):
            owner, _, name = known.partition("/")
            return ModelName(known, owner, name, True, revision)
        name = known or "unknown" if self.log(task) else self.source.model
        plain = re.sub(r"[^\w.-]+", "-", name.rpartition("/")[2]).strip(".-") or "unknown"
        return ModelName(f"local/{plain}", "local", plain, False, revision)

    def hub_dataset(self, task: str) -> tuple[str, str, str] | None:
        """Return id, split and revision of the data set on the hub that a task read; None if it read none.

        ``settings.dataset`` names it where the task read files.
        """
        described = self.fingerprint(task, "task")
        configured = (node for node in self.source.config.values() if isinstance(node, dict))
        node: dict[str, Any] = next((n for n in configured if n.get("_target_") == described.get("class")), {})
        dataset, split = str(node.get("dataset") or ""), str(node.get("split") or "")
        if self.settings.dataset:
            return self.settings.dataset, "", ""
        if node.get("source") != "hub" or not _HUB_ID.fullmatch(dataset) or Path(dataset).expanduser().exists():
            return None
        return dataset, split, str(node.get("revision") or "")

    def parser(self, task: str) -> str:
        """Name the rule by which replies of a task are read; empty where it has none to choose."""
        return str((self.fingerprint(task, "task").get("settings") or {}).get("parser") or "")

    def labeller(self, task: str) -> str:
        """Return name and version of a task, such as ``chair/1``."""
        described = self.fingerprint(task, "task")
        return f"{described.get('name', task)}/{described.get('version', '?')}"

    @cached_property
    def packages(self) -> dict[str, str]:
        """Versions of the packages that the run was made with."""
        file = self.source.folder / "environment.json"
        versions = read_json(file, REMEDIES[file.name], default={}).get("packages") or {}
        return {str(name): str(number) for name, number in versions.items() if number}

    def records(self, task: str) -> Iterator[Record]:
        """Yield the records of a task as they may leave the machine.

        An answer in which something had to be masked comes without tokens and mentions, which would give it away.
        """
        for record in self.source.store.records(task):
            answer, score, mentions = record.answer, record.score, record.mentions
            if answer is not None and clean(answer.text) != answer.text:
                answer, mentions = Answer(clean(answer.text), (), (), (), answer.finished), ()
            if score is not None:
                score = replace(score, detail=redact(score.detail, text=clean_text))
            yield replace(
                record,
                answer=answer,
                score=score,
                mentions=mentions,
                reference=redact(record.reference, text=clean_text),
                error=hide_paths(record.error),
                untraced=hide_paths(record.untraced),
            )

    def warnings(self, task: str) -> dict[str, list[dict[str, Any]]]:
        """Return a detector's warnings about a task by sample.

        ``start`` is that of a mention's first token.
        """
        if self.source.task != task:
            return {}
        by_sample: dict[str, list[dict[str, Any]]] = {}
        for row in self.source.warnings.to_dict("records"):
            kept = ("object", "start", "end", "label", "probability", "warned", "fold")
            by_sample.setdefault(str(row["sample_id"]), []).append({str(key): row[key] for key in kept})
        return by_sample

    def record_picture(self, record: Record) -> Image | None:
        """Read the picture of a record, or else the run's small copy; None if none is wanted."""
        if not self.settings.pictures:
            return None
        picture = self.picture(record)
        if picture is None and (media := self.source.saved_media(record)) is not None:
            picture = media.picture
        return picture

    def data_uri(self, record: Record) -> str:
        """Return the picture of a record as a data URI; empty if none is small enough."""
        limit, image = self.settings.pictures, self.record_picture(record)
        if image is None:
            return ""
        for kind, options in (("png", {}), ("jpeg", {"quality": 90}), ("jpeg", {"quality": 60})):
            buffer = io.BytesIO()
            image.save(buffer, kind.upper(), **options)
            if buffer.tell() <= limit:
                return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
        return ""

    def identifier(self, task: str, purpose: str) -> str:
        """Return a UUID (version 4 in form) that is the same for the same answers of the same model."""
        digest = hashlib.sha256(f"{purpose}\n{task}\n".encode())
        digest.update(json.dumps(self._fingerprints[task], sort_keys=True).encode())
        for record in self.source.store.records(task):
            digest.update(
                f"{record.sample_id}\0{record.answer.text if record.answer else ''}\0".encode(errors="replace")
            )
        return str(uuid.UUID(bytes=digest.digest()[:16], version=4))


def outcome_of(record: Record, metrics: Sequence[str]) -> Judged | None:
    """Return the outcome of one sample; None if its task judges no single answer.

    Args:
        record: of an answer; ``unparsed`` and failed ones have no outcome.
        metrics: names of the task's metrics.
    """
    if record.score is None or record.status != "ok":
        return None
    counts = record.score.counts
    accuracy = next((name for name in ("accuracy", "aAcc", "Acc") if name in metrics), "")
    if sum(counts.get(name, 0) for name in ("tp", "fp", "tn", "fn")):
        right = counts.get("tp", 0) + counts.get("tn", 0)
        return Judged(float(right), bool(right), accuracy)
    if counts.get("mentions") is not None and "hallucinated" in counts and counts.get("captions"):
        share = counts["hallucinated"] / counts["mentions"] if counts["mentions"] else 0.0
        return Judged(float(share), not counts["hallucinated"], "chair_i" if "chair_i" in metrics else "")
    right_name = next((name for name in _RIGHT if name in counts), None)
    if right_name is not None:
        return Judged(float(counts[right_name]), bool(counts[right_name]), accuracy)
    return None


def judged_mentions(record: Record, warnings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the mentions of an answer, with a detector's probabilities where it judged them.

    Args:
        record: of the answer.
        warnings: of ``RunExport.warnings``; their spans are of tokens, which may begin with a blank.
    """
    text = record.answer.text if record.answer else ""
    if not record.mentions or not warnings:
        return [vars(mention) for mention in record.mentions]
    return [
        {**warning, "start": warning["start"] + len(named) - len(named.lstrip())}
        for warning in warnings
        for named in [text[warning["start"] : warning["end"]]]
    ]


def reference_texts(record: Record) -> list[str]:
    """Return the ground truth of a sample as texts: its label, or the objects in the picture."""
    label = record.reference.get("label")
    return [str(label)] if isinstance(label, (str, int)) else shown_objects(record) or []


def right_answer(record: Record) -> str:
    """Return the one right answer to a question; empty where there is none."""
    label = record.reference.get("label")
    return label if isinstance(label, str) else ""


def shown_objects(record: Record) -> list[str] | None:
    """Return the names of the objects that the picture shows; None where they are not known."""
    objects = record.reference.get("objects")
    return list(map(str, objects)) if isinstance(objects, list) else None


def clean(value: Any) -> Any:
    """Copy plain values with secrets masked, and without paths inside the home and this folder.

    Keys are ours here; what a user's own keys call a secret is masked where it is read.
    """
    if isinstance(value, Mapping):
        return {key: clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(item) for item in value]
    return clean_text(value) if isinstance(value, str) else value


def clean_text(text: str) -> str:
    """Mask secrets and shorten paths in one text; a picture is left as it is."""
    if len(text) < _SHORTEST_SECRET or text.startswith("data:image/"):
        return text
    return hide_paths(redact_text(text), known_only=True)


def path_part(name: str) -> str:
    """Return a name, such as that of a task in a run's file, that may be one part of a path.

    >>> path_part("pope"), path_part("../../etc/x y")
    ('pope', 'etc_x_y')
    """
    return re.sub(r"[^\w.+-]+", "_", name).strip(". _") or "unknown"


def dumps(value: Any, indent: int | None = None) -> str:
    """Write plain values as JSON that may leave the machine, see ``clean``.

    Numbers that are not finite become null.
    """
    value = clean(value)
    try:
        text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError:  # JSON has no infinity and no NaN
        text = json.dumps(jsonable(value), indent=indent, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace").decode()


def export(run: RunExport, target: str, folder: Path) -> list[Path]:
    """Write a run for another tool.

    Args:
        run: the run.
        target: one of ``EXPORTERS``.
        folder: to write into; created if it is missing.

    Returns:
        The files.

    Raises:
        ConfigError: there is no such target, or the folder cannot be written to.
        ArtefactError: the run lacks what the target needs.
    """
    if target not in EXPORTERS:
        raise ConfigError(unknown("target of export", str(target), EXPORTERS))
    if not run.tasks:
        raise ArtefactError(f"{run.source.folder} has no task to export")
    module = importlib.import_module(f"stethoscope.report.{EXPORTERS[target]}")
    check_out(folder)
    with writing_out(folder):
        return getattr(module, f"write_{target}")(run, folder)
