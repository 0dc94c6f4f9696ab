"""Store each job of a sweep in a JSON file: its overrides, its status and its run directory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from stethoscope.core.files import damaged, read_json, write_json

FOLDER = "jobs"  # with the files, inside the sweep's folder
REMEDY = "delete it and start the sweep again"
RUNNING, FINISHED, FAILED, INTERRUPTED = "running", "finished", "failed", "interrupted"


@dataclass(frozen=True)
class Job:
    """One job of a sweep.

    Attributes:
        sweep: id of the launch that it belongs to.
        index: in the sweep, from 0.
        overrides: the settings, ``key=value``, in which the sweep's jobs may differ.
        folder: its run directory; empty where it has none.
        status: ``running`` (or killed), ``finished``, ``failed`` or ``interrupted``.
        error: one line on why it failed, else empty.
        seconds: duration.
        logger: settings of its loggers, by their paths in the configuration.
        plugins: packages of the user that its command line names.
    """

    sweep: str
    index: int
    overrides: tuple[str, ...]
    folder: str = ""
    status: str = RUNNING
    error: str = ""
    seconds: float = 0.0
    logger: dict[str, Any] = field(default_factory=dict)
    plugins: tuple[str, ...] = ()

    @property
    def settings(self) -> dict[str, str]:
        """Overrides by key."""
        return {key: value for key, _, value in (override.lstrip("+").partition("=") for override in self.overrides)}

    @property
    def title(self) -> str:
        """Overrides in one line, or the index of a job without any."""
        return " ".join(self.overrides) or f"job {self.index}"

    def ended(self, status: str, seconds: float, error: str = "") -> Job:
        """Return a copy of the job with its final status."""
        return replace(self, status=status, seconds=round(seconds, 3), error=error)

    def write(self, folder: Path) -> None:
        """Write the job's file into the folder of its sweep; it appears whole or not at all."""
        path = folder / FOLDER / f"{self.index:04d}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(self))


def read_jobs(folder: Path, sweep: str) -> list[Job]:
    """Read the jobs of one launch of a sweep, in their order, without earlier launches in the same folder.

    Raises:
        ArtefactError: a job's file is damaged.
    """
    jobs = []
    for path in sorted((folder / FOLDER).glob("[!.]*.json")):  # not the ._ files of macOS
        job = _job(read_json(path, REMEDY), path)
        if job.sweep == sweep:
            jobs.append(job)
    return sorted(jobs, key=lambda job: job.index)


def _job(values: dict[str, Any], path: Path) -> Job:
    """Build a job from the content of its file."""
    overrides = values.get("overrides")
    try:
        job = Job(**{**values, "overrides": tuple(overrides) if isinstance(overrides, list) else overrides})
    except TypeError as error:
        raise damaged(path, str(error).replace("Job.__init__()", "a job"), REMEDY) from None
    texts = (job.sweep, job.folder, job.status, job.error, *(job.overrides or ("",)))
    valid = isinstance(job.overrides, tuple) and all(isinstance(text, str) for text in texts)
    numbers = isinstance(job.index, int) and isinstance(job.seconds, (int, float))
    if not (valid and numbers and isinstance(job.logger, dict)):
        raise damaged(path, "a value is of another type than a job's", REMEDY)
    return job


def distinct_overrides(overrides: Sequence[str], fixed: Sequence[str]) -> tuple[str, ...]:
    """Select the overrides of a job that the sweep's other jobs need not have.

    >>> distinct_overrides(["limit=5", "seed=0"], ["limit=5", "seed=0,1"])
    ('seed=0',)
    """
    return tuple(override for override in overrides if override not in fixed)


def slug(overrides: Sequence[str]) -> str:
    """Build a folder name from overrides, without ``=``.

    Keys lose their parents where that is unambiguous.

    >>> slug(["detector.C=0.1", "features=paper/svar"])
    'C-0.1_features-paper_svar'
    >>> slug(["a.seed=0", "b.seed=0"])
    'a.seed-0_b.seed-0'
    """
    pairs = [override.lstrip("+~").partition("=") for override in overrides]
    last = [key.rpartition(".")[2] for key, _, _ in pairs]
    keys = last if len(set(last)) == len(last) else [key for key, _, _ in pairs]
    text = "_".join("-".join(filter(None, (key, value))) for key, (_, _, value) in zip(keys, pairs, strict=True))
    return "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in text)
