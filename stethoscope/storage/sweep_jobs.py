"""The jobs of a sweep as files: what each was asked, how it ended, where it wrote, whatever machine ran it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from stethoscope.core.files import damaged, read_json, write_json

FOLDER = "jobs"  # of the files, inside the sweep's folder
REMEDY = "delete it and start the sweep again"
RUNNING, FINISHED, FAILED, INTERRUPTED = "running", "finished", "failed", "interrupted"


@dataclass(frozen=True)
class Job:
    """One job of a sweep.

    Attributes:
        sweep: which launch of the sweep it belongs to.
        number: its place in the sweep, from 0.
        words: the settings, ``key=value``, in which the sweep's jobs may differ.
        folder: its run directory; empty where it has none.
        status: ``running`` (or killed), ``finished``, ``failed`` or ``interrupted``.
        error: one line that says why it failed, else empty.
        seconds: how long it took.
        logger: settings of its W&B logger; empty without one.
        plugins: the user's packages that its command line names.
    """

    sweep: str
    number: int
    words: tuple[str, ...]
    folder: str = ""
    status: str = RUNNING
    error: str = ""
    seconds: float = 0.0
    logger: dict[str, Any] = field(default_factory=dict)
    plugins: tuple[str, ...] = ()

    @property
    def settings(self) -> dict[str, str]:
        """The words as keys and values."""
        return {key: value for key, _, value in (word.partition("=") for word in self.words)}

    @property
    def title(self) -> str:
        """What to call the job."""
        return " ".join(self.words) or f"job {self.number}"

    def ended(self, status: str, seconds: float, error: str = "") -> Job:
        """The job at its end."""
        return replace(self, status=status, seconds=round(seconds, 3), error=error)

    def write(self, folder: Path) -> None:
        """Writes the job's file into the folder of its sweep; it appears whole or not at all."""
        path = folder / FOLDER / f"{self.number:04d}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(self))


def read_jobs(folder: Path, sweep: str) -> list[Job]:
    """The jobs of one launch of a sweep, in their order; those of earlier launches in the same folder are left out.

    Raises:
        ArtefactError: a job's file is damaged.
    """
    jobs = []
    for path in sorted((folder / FOLDER).glob("[!.]*.json")):  # not the ._ files of macOS
        job = _job(read_json(path, REMEDY), path)
        if job.sweep == sweep:
            jobs.append(job)
    return sorted(jobs, key=lambda job: job.number)


def _job(values: dict[str, Any], path: Path) -> Job:
    """The job that a file holds."""
    words = values.get("words")
    try:
        job = Job(**{**values, "words": tuple(words) if isinstance(words, list) else words})
    except TypeError as error:
        raise damaged(path, str(error).replace("Job.__init__()", "a job"), REMEDY) from None
    texts = (job.sweep, job.folder, job.status, job.error, *(job.words or ("",)))
    sound = isinstance(job.words, tuple) and all(isinstance(text, str) for text in texts)
    numbers = isinstance(job.number, int) and isinstance(job.seconds, (int, float))
    if not (sound and numbers and isinstance(job.logger, dict)):
        raise damaged(path, "a value is of another type than a job's", REMEDY)
    return job


def own_words(words: Sequence[str], fixed: Sequence[str]) -> tuple[str, ...]:
    """Of a job's words those that the sweep's other jobs need not have.

    >>> own_words(["limit=5", "seed=0"], ["limit=5", "seed=0,1"])
    ('seed=0',)
    """
    return tuple(word for word in words if word not in fixed)


def slug(words: Sequence[str]) -> str:
    """The name of a folder for some words: keys without their parents where that is clear.

    >>> slug(["detector.strength=0.1", "features=paper/svar"])
    'strength=0.1-features=paper_svar'
    >>> slug(["a.seed=0", "b.seed=0"])
    'a.seed=0-b.seed=0'
    """
    pairs = [word.lstrip("+~").partition("=") for word in words]
    last = [key.rpartition(".")[2] for key, _, _ in pairs]
    keys = last if len(set(last)) == len(last) else [key for key, _, _ in pairs]
    text = "-".join(key + equals + value for key, (_, equals, value) in zip(keys, pairs, strict=True))
    return "".join(letter if letter.isalnum() or letter in "=-." else "_" for letter in text)
