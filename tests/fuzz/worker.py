"""Reads hostile files under an audit hook, many cases in one process: ``python worker.py WORK SEED FIRST LAST``.

``WORK/run`` is a finished run with a detector, ``WORK/model`` a model folder. Prints a JSON line before every case and
one after it; whoever started this sees from the first of them which case has hung or has killed the process.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import resource
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

DEFAULT_MODEL = ""
KINDS = {"run": 50, "detector": 12, "model": 14, "data": 24}  # shares of the cases
LONGEST = 300  # seconds of a case by the clock, after which its stack is printed and the process ends
RUN_FILES = {
    "config.yaml": 8, "fingerprint.json": 8, "metrics.json": 5, "samples.jsonl": 5, "warnings.jsonl": 3,
    "maps.jsonl": 3, "tokens.parquet": 3, "status.json": 1, "environment.json": 1, "overrides.yaml": 1,
    "events.jsonl": 1,
    "detector/manifest.json": 3,
}  # fmt: skip


def main(work: Path, seed: int, first: int, last: int) -> None:
    """Runs the cases from ``first`` to before ``last``."""
    stdout, sys.stdout = sys.stdout, StringIO()
    prepare(work)
    from fuzz.audit import Audit
    from fuzz.broken import StethoscopeError
    from fuzz.mutations import MARK, hostile_strings

    world = World(work)
    strings = hostile_strings(work, work / "outside")
    for kind in KINDS:  # what a first use imports and starts is no event of a case
        world.read(kind, world.case(kind, random.Random(0))[0], random.Random(0), every=True)
    audit = Audit(work / "cases")
    audit.named = {str(path) for path in (work / "base").rglob("*")}
    for number in range(first, last):
        rng = random.Random(f"{seed}-{number}")
        kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
        folder, files = world.case(kind, rng)
        done = world.change(kind, folder, files, rng, strings)
        report: dict[str, Any] = {"case": number, "kind": kind, "changed": done}
        print(json.dumps({"case": number, "kind": kind, "changed": done}), file=stdout, flush=True)
        start, cpu = time.monotonic(), time.process_time()
        faulthandler.dump_traceback_later(LONGEST, exit=True)
        with audit.watching() as events, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            errors = world.read(kind, folder, rng)
        faulthandler.cancel_dump_traceback_later()
        report |= {"seconds": round(time.monotonic() - start, 2), "cpu": round(time.process_time() - cpu, 2)}
        report["events"] = sorted(set(events))
        if (work / MARK).exists():
            report["events"].append("hostile code has run")
            (work / MARK).unlink()
        report["refused"] = [str(error)[:200] for error in errors if isinstance(error, StethoscopeError)]
        report["faults"] = [_fault(error) for error in errors if _fault(error)]
        print(json.dumps(report), file=stdout, flush=True)
        shutil.rmtree(folder)


def _fault(error: BaseException) -> str:
    """What is wrong with an error: it is none of ours, or is not one line that can be printed."""
    from fuzz.broken import StethoscopeError

    if not isinstance(error, StethoscopeError):
        return "".join(traceback.format_exception(error)[-6:])
    text = str(error)
    if not text or "\n" in text or len(text) > 2000:
        return f"not a line: {type(error).__name__}: {text[:300]!r}"
    return ""


def prepare(work: Path) -> None:
    """Folders, limits and an environment in which nothing needs the network."""
    shutil.rmtree(work / "cases", ignore_errors=True)  # of a worker that has hung
    (work / "cases" / "tmp").mkdir(parents=True)
    os.environ |= {
        "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "WANDB_SILENT": "true", "TOKENIZERS_PARALLELISM": "false",
        "HF_DATASETS_CACHE": str(work / "cases" / "cache"), "HF_MODULES_CACHE": str(work / "cases" / "modules"),
        "TMPDIR": str(work / "cases" / "tmp"), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "MPLCONFIGDIR": str(work / "cases" / "tmp"), "TQDM_DISABLE": "1",
    }  # fmt: skip
    resource.setrlimit(resource.RLIMIT_AS, (16 * 2**30, resource.RLIM_INFINITY))
    sys.path.insert(0, str(work / "outside" / "path"))
    import torch

    torch.set_num_threads(1)
    os.chdir(work / "cases")


class World:
    """Whole files of all kinds, and everything that reads them."""

    def __init__(self, work: Path) -> None:
        """Composes what does not change from case to case."""
        global DEFAULT_MODEL
        from stethoscope.adapters.testbed import TestbedAdapter
        from stethoscope.core.component import compose
        from stethoscope.evaluation.evaluator import Evaluator

        DEFAULT_MODEL = TestbedAdapter().model_id
        self.work, self.base = work, work / "base"
        self.extract, self.train = compose(["run=x"], "extract"), compose([], "train")
        Evaluator.run = _reading_part
        self.count = 0

    def case(self, kind: str, rng: random.Random) -> tuple[Path, list[Path]]:
        """A whole copy of the files of one kind, and those that may be changed."""
        self.count += 1
        folder = self.work / "cases" / f"{kind}-{self.count}"
        shutil.copytree(self.base / kind, folder)
        if kind == "run":
            return folder, [folder / "one" / rng.choices(list(RUN_FILES), list(RUN_FILES.values()))[0]]
        if kind == "detector":
            return folder, [rng.choice([folder / "manifest.json", folder / "detector.safetensors"])]
        suffixes = (".json", ".jsonl", ".yaml", ".txt", ".md", ".jinja", ".parquet")
        files = [path for path in sorted(folder.rglob("*")) if path.suffix in suffixes]
        return folder, [rng.choice(files)]

    def change(self, kind: str, folder: Path, files: list[Path], rng: random.Random, strings: list[str]) -> str:
        """Exchanges strings in the files; what was done."""
        from fuzz.mutations import mutate

        return "; ".join(f"{path.relative_to(folder)}: {mutate(path, rng, strings)}" for path in files)[:300]

    def read(self, kind: str, folder: Path, rng: random.Random, every: bool = False) -> list[Exception]:
        """All that the readers of one kind raise."""
        readers = dict(getattr(self, f"_readers_of_{kind}")(folder))
        if kind == "run" and not every:
            chosen = rng.sample(sorted(readers), 2)
            readers = {name: readers[name] for name in chosen}
        errors = []
        for name, call in readers.items():
            try:
                with redirect_stdout(StringIO()):
                    call()
            except SystemExit as error:
                if error.code not in (0, 2):
                    errors.append(RuntimeError(f"{name} ended with {error.code}"))
            except Exception as error:  # what is to be found
                error.add_note(f"in {name}")
                errors.append(error)
        return errors

    def _readers_of_run(self, folder: Path) -> dict[str, Callable[[], Any]]:
        from stethoscope.app.runs import Runs
        from stethoscope.commands import compare, extract, report, train
        from stethoscope.detection.lookup import detectors_for_model, load_detector
        from stethoscope.report.run_source import RunReader
        from stethoscope.storage.run_dir import RunStore

        run, whole = folder / "one", self.base / "run" / "one"

        def app() -> None:
            runs = Runs(folder, None, folder)
            for name in {*runs.names, "one"}:
                runs.listing(name)
            source = RunReader.read(run)
            for task in ("pope", "chair"):
                record = next(iter(source.store.records(task)), None)
                if record is not None:
                    runs._read_picture(source, record, [])
            detectors_for_model(folder, {"model_id": "x"})

        def train_reads() -> None:
            config = self.train.copy()
            config.run = str(run)
            store = RunStore(run)
            for task in (*store.traced_tasks(), "chair"):
                train.read_token_rows(config, store, task, None)
                store.model(task)
            store.metrics(), store.status(), store.fingerprints()

        def extract_reads() -> None:
            config = self.extract.copy()
            config.run, config.warn = str(run), str(run)
            extract.run(config)

        return {
            "report": lambda: report.main([str(run), f"out={folder / 'out'}", "cases=1"]),
            "compare": lambda: compare.main([str(whole), str(run), "format=markdown"]),
            "extract": extract_reads,
            "train": train_reads,
            "app": app,
            "figures": lambda: Runs(folder, None, folder).figures("one"),
            "diagnose": lambda: load_detector(str(run)),
        }

    def _readers_of_detector(self, folder: Path) -> dict[str, Callable[[], Any]]:
        import pandas as pd

        from stethoscope.detection.detector import Detector
        from stethoscope.detection.lookup import detectors_for_model
        from stethoscope.report.run_source import RunReader

        def load() -> None:
            detector = Detector.load(folder)
            detector.manifest  # noqa: B018
            table = RunReader.read(self.base / "run" / "one").store.tokens("chair")
            missing = {name: 0.5 for name in detector.schema.names if name not in table}
            detector.predict(pd.concat([table, pd.DataFrame(missing, table.index)], axis=1))

        return {"load": load, "lookup": lambda: detectors_for_model(folder.parent, {"model_id": "x"})}

    def _readers_of_model(self, folder: Path) -> dict[str, Callable[[], Any]]:
        from PIL import Image

        from stethoscope.adapters import memory
        from stethoscope.adapters.hf import HfAdapter
        from stethoscope.adapters.load_settings import Loading

        def load() -> None:
            adapter = HfAdapter(str(folder))
            adapter.setup()
            adapter.encode(Image.new("RGB", (60, 60)), "What is this?")
            adapter.fingerprint()

        return {"load": load, "doctor": lambda: memory.skeleton(str(folder), Loading())}

    def _readers_of_data(self, folder: Path) -> dict[str, Callable[[], Any]]:
        from fuzz.data_sets import tasks

        return {name: lambda make=make: _all_of(make()) for name, make in tasks(folder).items()}


def _all_of(task: Any) -> None:
    task.setup()
    for sample in list(task.samples())[:4]:
        sample.image.load()


def _reading_part(evaluator: Any, adapter: Any, task: Any) -> None:
    """In the place of ``Evaluator.run``: sets up what the run's files name, and traces nothing."""
    from stethoscope.core.errors import DataError
    from stethoscope.storage.run_dir import RunStore

    task.setup()
    next(iter(task.samples()), None)
    if getattr(adapter, "model_id", None) != DEFAULT_MODEL:  # whose loading is the same every time
        adapter.setup()
    store = RunStore(evaluator.run_dir)
    store.fingerprints(), list(store.records(task.name)), store.tokens(task.name)
    raise DataError("everything is read")


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # the tests' folder, of which fuzz is a package
    main(Path(sys.argv[1]).resolve(), *map(int, sys.argv[2:]))
