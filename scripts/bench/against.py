"""Measure another checkout and this one in turn, and print one Markdown table: time, memory, equality.

    python scripts/bench/against.py 2984e12           # that commit against this checkout, about ten minutes
    python scripts/bench/against.py 2984e12 --parts relevancy beside --rounds 3
    python scripts/bench/against.py 2984e12 --table   # the table of the figures so far

Both checkouts run in a process of their own, with the same libraries, and take turns part by part, so that other work
on the machine falls on both; of --rounds times the smallest counts. Every figure is one JSON line in --out, written as
soon as it is reached; a second call goes on with those that are missing. Times are of the processor; those of the clock
are printed beside them. A part that fails is left out: 2984e12 needs skops for `stream` and `train` (in a folder of its
own, on PYTHONPATH).

    relevancy     from nothing, in plain forward passes: 8 layers, 512 wide, 640 prompt and 64 answer tokens
    beside        the same model: generation and trace with relevancy less those without, in forward passes
    image         relevancy from nothing at 2,916 image tokens
    features      runs of the evaluator over descriptions by the embedded model with each checkout's fast, default and
                  full features, token tables and heat maps, less the run without features
    stream        a stream with the detector's probabilities, undelayed, beside generation
    pope          questions per second, 18 to a picture, in batches of 32
    train         the command `train` on 1,000 descriptions with each checkout's default features
    start         a whole process that answers one question, beside a bare script of transformers (harness.py)
    memory        peak of relevancy and of whole runs
    same          200 descriptions: token ids, features and maps, and the probabilities of one logistic regression,
                  fitted on the other checkout's features and applied to both
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CHECKOUTS = ("before", "after")
PARTS = ("relevancy", "beside", "image", "features", "stream", "pope", "train", "start", "memory", "same")
ONCE = ("image", "train", "memory", "same")
"""Parts that are not repeated."""
SETS, BATCHES = ("fast", "default", "full"), (1, 8)
PER_PICTURE = 18
OLDER_FULL = (
    "uncertainty", "logits", "position", "attention", "lens", "trajectory", "heads", "lookback", "maps", "sinks",
    "grid", "states", "image_lens", "blank", "noise", "no_image", "core", "relevancy",
)  # fmt: skip
"""Groups of the older full features, but one that has another name today."""
REDEFINED = "glsim"
"""Beginning of the names of features that have another definition since 2984e12 (CHANGELOG.md); not compared."""
EVIDENCE = {True: "sight", False: "visual_evidence"}
QUESTION = "Please describe this image in detail."
HOMES = {
    "Generation": ("core.types", "records"),
    "SaveHeatmaps": ("evaluation.callbacks", "runs.maps:KeepMaps"),
    "SampleTable": ("evaluation.callbacks", "callbacks"),
    "Timing": ("evaluation.callbacks", "callbacks"),
    "RunStore": ("storage.run_dir", "runs.store"),
    "llava": ("adapters.tiny.decoder_families", "adapters.tiny.llava"),
}
"""Modules of names in this checkout and in those before version 0.2, with the older name where it differs."""

Times = dict[str, list[float]]
"""By way, seconds of the processor and of the clock."""


def take(name: str) -> Any:
    """Import a name from wherever a checkout has it."""
    for home in HOMES[name]:
        module, _, other = home.partition(":")
        try:
            return getattr(importlib.import_module(f"stethoscope.{module}"), other or name)
        except (ImportError, AttributeError):
            continue
    raise SystemExit(f"{name} is in none of {', '.join(HOMES[name])}")


def timed(call: Callable[[], Any]) -> list[float]:
    """Return the seconds of the processor and of the clock that a call takes."""
    start = time.process_time(), time.perf_counter()
    call()
    return [time.process_time() - start[0], time.perf_counter() - start[1]]


def in_turn(ways: Mapping[str, Callable[[], Any]], rounds: int = 3) -> Times:
    """Time ways in turn after a first round; the smallest times count."""
    times = [{name: timed(way) for name, way in ways.items()} for _ in range(rounds + 1)][1:]
    return {name: [min(parts) for parts in zip(*(part[name] for part in times), strict=True)] for name in ways}


# --- in the process of one checkout -----------------------------------------------------------------------------------


class Worker:
    """The parts, as one checkout does them.

    Args:
        folder: for runs.
        older: whether the checkout comes before version 0.2.
    """

    def __init__(self, folder: Path, older: bool) -> None:
        import stethoscope

        self.api, self.folder, self.older = stethoscope, folder, older
        self._testbed: Any = None
        self._built: dict[Any, Any] = {}

    @property
    def testbed(self) -> Any:
        """The embedded model."""
        self._testbed = self._testbed or self.api.load("testbed")
        return self._testbed

    def build(self, **sizes: int) -> tuple[Any, Any, list[int]]:
        """Build the random model of ``relevancy.py``, the inputs of its pass and the answer's ids."""
        import relevancy

        key = tuple(sorted(sizes.items()))
        if key not in self._built:
            self._built.clear()
            self._built[key] = relevancy.build(replace(relevancy.PRESETS["small"], **sizes), "cpu")
            self._built[key][0].requires_grad_(False)
        return self._built[key]

    def relevancy(self, rounds: int = 3, **sizes: int) -> Times:
        """Time a forward pass and relevancy after every layer, from nothing."""
        import relevancy

        model, inputs, ids = self.build(**sizes)
        return in_turn({
            "forward": lambda: relevancy.plain(model, inputs),
            "relevancy": lambda: relevancy.relevancy_from_inputs(model, inputs, ids, recompute=False),
        }, rounds)  # fmt: skip

    def image(self) -> Times:
        """Time the same at 2,916 image tokens."""
        return self.relevancy(1, image=2916)

    def adapter(self) -> tuple[Any, list[Any]]:
        """Build an adapter of the random model, and its prompt of 640 tokens or a few more."""
        from PIL import Image

        hf, llava = importlib.import_module("stethoscope.adapters.hf"), take("llava")
        model = self.build()[0]
        self._built.clear()  # the ids of its inputs are others

        class Adapter(hf.HfAdapter):
            def _tiny(self) -> tuple[Any, Any]:
                tiny, processor = llava(336)
                model.config.image_token_index = tiny.config.image_token_id
                model.config.image_token_id = tiny.config.image_token_id
                return model, processor

        adapter = Adapter(random_init="tiny")
        return adapter, [adapter.encode(Image.effect_noise((336, 336), 64).convert("RGB"), "what " * 14)]

    def answer(self, adapter: Any, prompts: list[Any], requires: Sequence[str]) -> Any:
        """Answer with 64 tokens and trace the answers, as a run does."""
        generation = take("Generation")(max_new_tokens=64)
        if self.older:
            answers, kept = adapter.generate_and_keep(prompts, generation)
        else:
            answers, kept = adapter.generate_with_cache(adapter.prefill(prompts, requires), generation)
        return adapter.trace_batch(kept, answers, frozenset(requires))

    def beside(self) -> Times:
        """Time generation and trace of 64 tokens with relevancy and without, and a forward pass."""
        import relevancy

        adapter, prompts = self.adapter()
        model, inputs = adapter.forward_inputs(prompts[0], range(10, 74))
        return in_turn({
            "plain": lambda: self.answer(adapter, prompts, []),
            "with": lambda: self.answer(adapter, prompts, ["relevancy"]),
            "forward": lambda: relevancy.plain(model, inputs),
        })  # fmt: skip

    def run(self, task: Any, name: str = "", features: Any = None, **options: Any) -> Path:
        """Evaluate a task with the embedded model, with tables and maps; return the run directory."""
        folder = self.folder / (name or "run")
        shutil.rmtree(folder, ignore_errors=True)
        callbacks = [take(callback)() for callback in ("Timing", "SampleTable", "SaveHeatmaps")]
        self.api.Evaluator(callbacks, features=features, run_dir=folder, **options).run(self.testbed, task)
        return folder

    def captions(self, scenes: int) -> Any:
        """Build the task of describing so many scenes."""
        return importlib.import_module("stethoscope.tasks.chair").Chair(scenes=scenes)

    def features(self, batch: int, scenes: int = 24) -> Times:
        """Time runs over descriptions without features and with every set."""
        named_set = importlib.import_module("stethoscope.features").named_set
        ways = {"none": None, **{name: named_set(name) for name in SETS}}
        self.run(self.captions(batch), features=ways["full"], batch_size=batch)  # warms up
        return {
            name: timed(lambda chosen=chosen: self.run(self.captions(scenes), features=chosen, batch_size=batch))
            for name, chosen in ways.items()
        }

    def stream(self, pictures: int = 16) -> Times:
        """Time answers that are generated, and streamed with probabilities."""
        testbed, generation = importlib.import_module("stethoscope.testbed"), take("Generation")(max_new_tokens=128)
        if "detector" not in self._built:
            folder = self.run(self.captions(48), features=self.set_of("uncertainty", "position", "attention", "lens"))
            strength = {"strength" if self.older else "C": 0.1}
            self._built["detector"] = self.api.Detector(**strength).fit(take("RunStore")(folder).tokens("chair"))
        times = {"generate": [0.0, 0.0], "stream": [0.0, 0.0]}
        for number, scene in enumerate(testbed.scenes(pictures + 1)):
            picture = scene.image()
            ways = {
                "generate": lambda: self.testbed.generate([self.testbed.encode(picture, QUESTION)], generation),  # noqa: B023
                "stream": lambda: list(self.api.stream(self.testbed, picture, QUESTION, generation=generation,  # noqa: B023
                                                       detector=self._built["detector"], delay=0)),
            }  # fmt: skip
            for name, way in ways.items():
                seconds = timed(way)
                if number:  # the first picture warms up
                    times[name] = [sum(pair) for pair in zip(times[name], seconds, strict=True)]
        return times

    def set_of(self, *groups: str) -> Any:
        """Build a set of feature groups."""
        return importlib.import_module("stethoscope.features").FeatureSet(groups=groups)

    def pope(self, scenes: int = 40) -> Times:
        """Time questions of POPE."""
        pope = importlib.import_module("stethoscope.tasks.pope").Pope(scenes=scenes)
        self.run(self.captions(2))  # warms up
        folder = self.folder / "pope"
        shutil.rmtree(folder, ignore_errors=True)
        seconds = timed(lambda: self.api.Evaluator(batch_size=32, run_dir=folder).run(self.testbed, pope))
        lines = (folder / "samples.jsonl").read_text().splitlines()
        return {"question": [part / len(lines) for part in seconds]}

    def train(self, scenes: int = 1000) -> Times:
        """Time the command `train`, on a run that stays for a later call."""
        folder = self.folder / f"train-{scenes}"
        command = importlib.import_module("stethoscope.cli").main

        def run(*words: str) -> None:
            with contextlib.redirect_stdout(io.StringIO()):
                try:
                    command(list(words))
                except SystemExit as end:
                    if end.code:
                        raise RuntimeError(f"{' '.join(words)} ended with {end.code}") from end

        if not (folder / "finished").exists():
            words = ["task=chair", f"task.scenes={scenes}", "generation.max_new_tokens=32", "batch_size=8"]
            run("evaluate", *words, f"run_dir={folder}", "logger=none", "callbacks=none")
            run("extract", f"run={folder}", "features=default", "callbacks=none")
            (folder / "finished").touch()
        return {"train": timed(lambda: run("train", f"run={folder}", "logger=none"))}

    def memory(self, kind: str) -> dict[str, float]:
        """Measure the MiB at the peak of relevancy, from nothing or beside generation, beyond those before it."""
        import ctypes

        import relevancy

        ctypes.CDLL(None).mallopt(-3, 2**16)  # freed tensors go back to the system at once
        model, inputs, ids = self.build()
        small = relevancy.build(relevancy.TINY, "cpu")
        relevancy.relevancy_from_inputs(*small)
        if kind == "beside":
            adapter, prompts = self.adapter()
            call = lambda: self.answer(adapter, prompts, ["relevancy"])  # noqa: E731
        else:
            kept = kind == "kept"
            call = lambda: relevancy.relevancy_from_inputs(model, inputs, ids, recompute=not kept)  # noqa: E731
        return {"mib": relevancy.peak(call, "cpu") / 2**20}

    def rss(self, features: str, scenes: int = 48) -> dict[str, float]:
        """Measure the MiB at the peak of a process that runs descriptions with features, in batches of 8."""
        chosen = importlib.import_module("stethoscope.features").named_set(features)
        self.run(self.captions(scenes), features=chosen, batch_size=8)
        return {"mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}

    def same(self, scenes: int = 200) -> dict[str, str]:
        """Describe scenes with the older full features, and compute the maps; return the files."""
        import numpy as np
        import torch

        folder = self.run(self.captions(scenes), "same", self.set_of(*OLDER_FULL, EVIDENCE[self.older]), batch_size=8)
        take("RunStore")(folder).tokens("chair").to_parquet(folder / "table.parquet")
        task, maps = self.captions(scenes), {}
        task.setup()
        samples = list(task.samples())
        for start in range(0, len(samples), 8):
            batch = samples[start : start + 8]
            prompts = [self.testbed.encode(sample.image.load(), sample.question) for sample in batch]
            for sample, trace in zip(batch, self.answer(self.testbed, prompts, ["relevancy"]), strict=True):
                maps[sample.id] = torch.cat([trace.relevancy.image[:, -1], trace.relevancy.answer[:, -1]], 1).numpy()
        np.savez(folder / "maps.npz", **maps)
        return {"folder": str(folder)}


def import_from(root: Path) -> None:
    """Import the package of a checkout, and no module of an installed one that the checkout lacks."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
    sys.path.insert(0, str(root))
    import stethoscope

    if Path(stethoscope.__file__).parent.parent != root:
        raise SystemExit(f"{root} is not the package that was imported, {stethoscope.__file__}")
    stethoscope.__path__.append(str(root))  # adapters/, tasks/ and conf/ are parts of the package


def serve(root: Path, folder: Path) -> None:
    """Do what lines of the standard input ask for with a checkout, and print a line of JSON for each."""
    replies, sys.stdout = sys.stdout, sys.stderr
    import_from(root)
    sys.path.insert(1, str(ROOT / "scripts" / "bench"))
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    worker = Worker(folder, not (root / "stethoscope" / "core").exists())
    for line in sys.stdin:
        way, options = json.loads(line)
        print(json.dumps(getattr(worker, way)(**options)), file=replies, flush=True)


# --- the process that compares ----------------------------------------------------------------------------------------


class Checkout:
    """A checkout, in a process that starts when it is first asked.

    Args:
        root: of the checkout.
        folder: for its runs.
        threads: of torch.
    """

    def __init__(self, root: Path, folder: Path, threads: int) -> None:
        self.root, self.folder, self._process = root, folder, None
        self._environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "WANDB_MODE": "offline"}
        folder.mkdir(parents=True, exist_ok=True)

    def ask(self, way: str, fresh: bool = False, **options: Any) -> Any:
        """Return what a method of ``Worker`` returns; ``fresh`` in a process that does nothing else."""
        if fresh:
            self.close()
        if self._process is None:
            words = [sys.executable, __file__, "--serve", str(self.root), str(self.folder)]
            self._process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1,
                env=self._environment, cwd=self.folder,
            )  # fmt: skip
        self._process.stdin.write(json.dumps([way, options]) + "\n")
        reply = self._process.stdout.readline()
        if not reply:
            raise SystemExit(f"{self.root}: {way} failed: {self._process.stderr.read()[-2000:]}")
        if fresh:
            self.close()
        return json.loads(reply)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.communicate()
            self._process = None

    def start(self) -> Times:
        """Time a process that answers one question of POPE."""
        with tempfile.TemporaryDirectory() as folder:
            words = ["evaluate", "task=pope", "task.scenes=2", "limit=1", "logger=none", f"run_dir={folder}/run"]
            return {"start": self.process([sys.executable, __file__, "--command", str(self.root), *words])}

    def bare(self) -> Times:
        """Time a bare script of transformers that answers one question."""
        import harness

        with tempfile.TemporaryDirectory() as folder:
            harness._export(Path(folder), 1)
            words = [sys.executable, harness.__file__, "--bare", folder, "--questions", "1"]
            return {"bare": self.process(words)}

    def process(self, words: Sequence[str]) -> list[float]:
        """Return the seconds of the processor and of the clock that a process takes."""
        start = time.perf_counter()
        with subprocess.Popen(
            words, env=self._environment, cwd=self.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{' '.join(words)} ended with {process.returncode}")
        return [usage.ru_utime + usage.ru_stime, time.perf_counter() - start]


def asked(part: str) -> list[tuple[str, dict[str, Any]]]:
    """List the methods that a part asks for, with their options."""
    if part == "features":
        return [("features", {"batch": batch}) for batch in BATCHES]
    if part == "memory":
        peaks = [("memory", {"fresh": True, "kind": kind}) for kind in ("recomputed", "kept", "beside")]
        return [*peaks, *[("rss", {"fresh": True, "features": name}) for name in ("default", "full")]]
    return [(part, {})]


def measure(options: argparse.Namespace, figures: Any) -> None:
    """Measure what is missing, checkouts in turn."""
    folder = options.out.parent / f"against-{options.commit}"
    other = folder / "checkout"
    if not other.exists():
        other.mkdir(parents=True)
        archive = subprocess.run(["git", "archive", options.commit], cwd=ROOT, capture_output=True, check=True).stdout
        subprocess.run(["tar", "x"], cwd=other, input=archive, check=True)
    roots = {"before": other, "after": ROOT}
    checkouts = {name: Checkout(root, (folder / name).resolve(), options.threads) for name, root in roots.items()}
    for part in options.parts:
        rounds = 1 if part in ONCE else options.rounds
        for number in range(rounds):
            for way, extra in asked(part):
                for name, checkout in checkouts.items():
                    label = "-".join(str(value) for value in (way, *extra.values()) if value is not True)
                    key = f"{options.threads} {name} {label} {number}"
                    if not figures.missing(key):
                        continue
                    try:
                        values = checkout.start() if way == "start" else checkout.ask(way, **extra)
                        if way == "start" and name == "after":
                            values |= checkout.bare()
                    except SystemExit as error:
                        print(error, file=sys.stderr)
                        checkout.close()
                        continue
                    figures.add(key, part=label, name=name, threads=options.threads, values=values)
    for checkout in checkouts.values():
        checkout.close()


# --- the table --------------------------------------------------------------------------------------------------------

Row = tuple[str, str, Callable[[Mapping[str, float]], float], str, Callable[[float, float], bool] | None]
"""Part, what it shows, how it follows from the seconds of the part's ways, the limit, and whether it is kept by the
values before and after."""


def _rows() -> list[Row]:
    beside = lambda t: (t["with"] - t["plain"]) / t["forward"]  # noqa: E731
    nothing = lambda t: t["relevancy"] / t["forward"]  # noqa: E731
    rows: list[Row] = [
        ("beside", "relevancy beside generation, forwards", beside, "1.5", lambda _, now: now <= 1.5),
        ("relevancy", "relevancy from nothing, forwards", nothing, "2.5", lambda _, now: now <= 2.5),
        ("image", "2,916 image tokens, forwards", nothing, "4", lambda _, now: now <= 4),
    ]
    limits = {1: (0.06, 0.32, 0.65), 8: (0.10, 0.60, 1.40)}
    for batch in BATCHES:
        for name, limit in zip(SETS, limits[batch], strict=True):
            what = f"`{name}`, {'batches of 8' if batch == 8 else 'one at a time'}, x plain"
            more = lambda t, name=name: t[name] / t["none"]  # noqa: E731
            kept = lambda _, now, limit=limit: now <= 1 + limit  # noqa: E731
            rows.append((f"features-{batch}", what, more, f"{1 + limit:.2f}", kept))
    rows += [
        ("stream", "streaming, undelayed, x plain", lambda t: t["stream"] / t["generate"], "1.05",
         lambda _, now: now <= 1.05),
        ("pope", "POPE questions per second", lambda t: 1 / t["question"], "2.5 x", lambda was, now: now >= 2.5 * was),
        ("train", "`train` on 1,000 descriptions, s", lambda t: t["train"], "half", lambda was, now: now <= was / 2),
        ("start", "start to first answer, s", lambda t: t["start"], "bare + 1", None),
    ]  # fmt: skip
    peaks = {"memory-recomputed": "relevancy from nothing", "memory-kept": "the same, graphs kept",
             "memory-beside": "relevancy and generation", "rss-default": "run with `default`",
             "rss-full": "run with `full`"}  # fmt: skip
    fits = lambda was, now: now <= 1.02 * was  # noqa: E731
    return rows + [(part, f"peak memory, {what}, MiB", lambda t: t["mib"], "as before", fits)
                   for part, what in peaks.items()]  # fmt: skip


def smallest(lines: Sequence[dict[str, Any]], part: str, name: str, clock: int) -> dict[str, float]:
    """Return the smallest seconds of every way of a part; memory as it is."""
    times: dict[str, float] = {}
    for line in lines:
        if (line["part"], line["name"]) == (part, name):
            for way, value in line["values"].items():
                number = value[clock] if isinstance(value, list) else value
                times[way] = min(number, times.get(way, number))
    return times


def table(lines: Sequence[dict[str, Any]], threads: int) -> str:
    """Format the figures as Markdown."""
    lines = [line for line in lines if line["threads"] == threads]
    text = [f"| {threads} thread(s) | before | after | limit | kept | clock, before | clock, after |",
            "|---|---|---|---|---|---|---|"]  # fmt: skip
    for part, what, figure, limit, kept in _rows():
        times = [[smallest(lines, part, name, clock) for name in CHECKOUTS] for clock in (0, 1)]
        if not all(times[0]):
            continue
        values = [figure(ways) for clock in times for ways in clock]
        good = kept(*values[:2]) if kept else None
        if part == "start":
            bare = [clock[1]["bare"] for clock in times]
            limit, good = f"{bare[0] + 1:.1f} (bare + 1)", values[1] <= bare[0] + 1
        cells = [f"{value:.0f}" if value >= 100 else f"{value:.2f}" for value in values]
        cells[2:] = ["", ""] if "memory" in what else cells[2:]
        text.append(f"| {what} | {' | '.join([*cells[:2], limit, 'yes' if good else 'NO', *cells[2:]])} |")
    folders = {line["name"]: Path(line["values"]["folder"]) for line in lines if line["part"] == "same"}
    return "\n".join(text + (equality(*(folders[name] for name in CHECKOUTS)) if len(folders) == 2 else []))


def equality(before: Path, after: Path) -> list[str]:
    """Compare answers, features, maps and probabilities of two runs; return lines of text."""
    import numpy as np
    import pandas as pd
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    ids = []
    for folder in (before, after):
        records = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        ids.append({record["sample_id"]: record["answer"]["token_ids"] for record in records})
    same = sum(ids[0][key] == ids[1].get(key) for key in ids[0])
    text = ["", f"The same token ids in {same} of {len(ids[0])} answers."]
    tables = [pd.read_parquet(folder / "table.parquet") for folder in (before, after)]
    numbers = [set(table.select_dtypes("floating").columns) for table in tables]
    shared = sorted(name for name in numbers[0] & numbers[1] if not name.startswith(REDEFINED))
    keys = ["sample_id", "token"]
    if not tables[0][keys].reset_index(drop=True).equals(tables[1][keys].reset_index(drop=True)):
        return [*text, "The rows of the two tables differ."]
    parts = [table[shared].to_numpy(float) for table in tables]
    scale = np.maximum(np.nanstd(parts[0], 0), 1e-12)
    gap = np.nan_to_num(np.abs(parts[1] - parts[0]) / np.maximum(np.abs(parts[0]), scale))
    if (np.isnan(parts[0]) != np.isnan(parts[1])).any():
        text.append("Values are missing in one of the tables alone.")
    worst = sorted(zip(gap.max(0), shared, strict=True), reverse=True)
    above = [f"{name} {value:.1e}" for value, name in worst if value > 1e-5]
    text.append(f"{len(shared)} features in both; largest difference {worst[0][0]:.1e} of the value or its deviation "
                f"({worst[0][1]}); above 1e-5: {', '.join(above) or 'none'}.")  # fmt: skip
    apart = [sorted({name.rstrip("0123456789") for name in numbers[side] - numbers[1 - side]}) for side in (0, 1)]
    text.append(f"Defined anew: {REDEFINED}. Only before: {', '.join(apart[0]) or 'none'}; "
                f"only after: {', '.join(apart[1]) or 'none'}.")  # fmt: skip
    maps = [np.load(folder / "maps.npz") for folder in (before, after)]
    errors = [np.linalg.norm(maps[1][key] - maps[0][key]) / np.linalg.norm(maps[0][key]) for key in maps[0].files]
    text.append(f"Relevancy of {len(errors)} answers: relative difference {max(errors):.1e} at most, "
                f"{statistics.median(errors):.1e} in the median.")  # fmt: skip
    labelled = tables[0]["label"].isin((0, 1)).to_numpy()
    inputs = [np.nan_to_num(part[labelled]) for part in parts]
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=5000))
    model.fit(inputs[0], tables[0]["label"][labelled])
    probabilities = [model.predict_proba(part)[:, 1] for part in inputs]
    text.append(f"Probabilities of {labelled.sum()} tokens of mentions by one logistic regression, fitted on the "
                f"features before: {np.abs(probabilities[1] - probabilities[0]).max():.1e} apart at most.")  # fmt: skip
    return text


def main() -> None:
    """Measure, and print the table."""
    if sys.argv[1:2] == ["--serve"]:
        serve(Path(sys.argv[2]), Path(sys.argv[3]))
        return
    if sys.argv[1:2] == ["--command"]:
        import_from(Path(sys.argv[2]))
        from stethoscope.cli import main as command

        command(sys.argv[3:])
        return
    from shapes import Figures

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="the other checkout")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "against.jsonl")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=2, help="of parts that are repeated; the smallest time counts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no further figure after so long")
    parser.add_argument("--table", action="store_true", help="print the table of the figures so far")
    options = parser.parse_args()
    figures = Figures(options.out, options.seconds)
    if not options.table:
        measure(options, figures)
    print(table(figures.lines, options.threads))


if __name__ == "__main__":
    main()
