"""Do the parts of against.py as one checkout does them, in a process that imports the package of this checkout.

python scripts/bench/against_worker.py ROOT serve FOLDER     # lines of JSON ask for parts and are answered by lines
python scripts/bench/against_worker.py ROOT command WORDS    # the command `stethoscope`
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

SETS = ("fast", "default", "default_relevancy", "full")
"""Named sets of features."""
OLDER_FULL = (
    "uncertainty", "logits", "position", "attention", "lens", "trajectory", "heads", "lookback", "maps", "sinks",
    "grid", "states", "image_lens", "blank", "noise", "no_image", "core", "relevancy",
)  # fmt: skip
"""Groups of the older full features, but one that has another name today."""
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

    def build(self, **sizes: Any) -> tuple[Any, Any, list[int]]:
        """Build the random model of ``relevancy.py``, the inputs of its pass and the answer's ids."""
        import relevancy

        key = tuple(sorted(sizes.items()))
        if key not in self._built:
            self._built.clear()
            self._built[key] = relevancy.build(replace(relevancy.PRESETS["small"], **sizes), "cpu")
            self._built[key][0].requires_grad_(False)
        return self._built[key]

    def relevancy(self, rounds: int = 3, **sizes: Any) -> Times:
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

        class Adapter(hf.HfAdapter):  # type: ignore[name-defined]  # of the checkout
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

    def warm_up(self) -> Times:
        """Do what a process does slowly for the first time, unless it has been done; time nothing."""
        if "warm" not in self._built:
            self._built["warm"] = True
            self.features(8, "none")  # encoded pictures may be kept
            for batch in (1, 8):
                for way in ("none", *SETS):
                    self.features(batch, way, scenes=batch)
            gc.collect()
            gc.freeze()  # else a look at the objects of all libraries, a third of a run, falls on one run or another
        return {}

    def features(self, batch: int, way: str, scenes: int = 24) -> Times:
        """Time a run over descriptions with a set of features, or with ``none``."""
        chosen = None if way == "none" else self.named_set(way)
        task = self.captions(scenes)
        return {way: timed(lambda: self.run(task, features=chosen, batch_size=batch))}

    def stream(self, pictures: int = 16) -> Times:
        """Time answers that are generated, and streamed with probabilities."""
        testbed, generation = importlib.import_module("stethoscope.testbed"), take("Generation")(max_new_tokens=128)
        if "detector" not in self._built:
            folder = self.run(self.captions(48), features=self.set_of("uncertainty", "position", "attention", "lens"))
            strength: Any = {"strength" if self.older else "C": 0.1}
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

    def named_set(self, name: str) -> Any:
        """Build a named set; `default` was the one with relevancy before version 0.2."""
        older = self.older and name == "default_relevancy"
        return importlib.import_module("stethoscope.features").named_set("default" if older else name)

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
        self.run(self.captions(scenes), features=self.named_set(features), batch_size=8)
        return {"mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}

    def same(self, scenes: int = 200) -> dict[str, str]:
        """Describe scenes with the older full features, and compute the maps; return the files."""
        import numpy as np
        import torch

        folder = self.run(self.captions(scenes), "same", self.set_of(*OLDER_FULL, EVIDENCE[self.older]), batch_size=8)
        take("RunStore")(folder).tokens("chair").to_parquet(folder / "table.parquet")
        task = self.captions(scenes)
        maps: dict[str, Any] = {}
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
    sys.path.insert(1, str(Path(__file__).resolve().parent))
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    worker = Worker(folder, not (root / "stethoscope" / "core").exists())
    for line in sys.stdin:
        way, options = json.loads(line)
        print(json.dumps(getattr(worker, way)(**options)), file=replies, flush=True)


def main() -> None:
    """Serve, or run one command."""
    root, way, *words = sys.argv[1:]
    if way == "serve":
        serve(Path(root), Path(words[0]))
        return
    import_from(Path(root))
    from stethoscope.cli import main as command

    command(words)


if __name__ == "__main__":
    main()
