"""Does a detector's monitor speak where its promises break, and is it silent where they hold?

Makes runs of the embedded model under the shifts of ``SHIFTS``, each in a folder of its own (a run
that is there is resumed), fits a detector with a guaranteed threshold on the home run and prints for every shift: ECE,
false alarms among grounded mentions, the monitor's p-value and verdict, the pictures that it flags one by one, and ECE
after recalibration on 50 labelled pictures (mean and largest of 20 draws, judged on all others) and without labels,
whether the monitor refuses that, and for which share of 40 random sets of 50, 100 and 200 pictures it does not.

    python scripts/check/shift.py runs/shift                        # 3,000 scenes to learn from, 400 of each shift
    python scripts/check/shift.py runs/shift --chosen-on            # also the shifts on which the rule was chosen
    python scripts/check/shift.py runs/shift --home runs/mine       # learn from a run that is there
    python scripts/check/shift.py runs/shift --scenes 100 --only noise photographs

Photographs are 100 random crops at most, of those that come with scikit-learn, matplotlib and, if it is installed,
scikit-image.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image, ImageFilter

from stethoscope import testbed
from stethoscope.core.errors import DataError
from stethoscope.detection.detector import Detector
from stethoscope.detection.shift import ShiftMonitor
from stethoscope.detection.shift_measures import RUN_LEVEL, Readings, RunShift
from stethoscope.features.columns import matching_columns
from stethoscope.metrics.bootstrap import group_weights, split_folds
from stethoscope.metrics.classification import ece
from stethoscope.storage.run_dir import RunStore
from stethoscope.testbed.scene import Scene

SEED = 11  # of the scenes of every shift; no detector has learned from them
SIGMA = 30.0  # of the noise, in grey values of 255
PROMISE = {"max_false_alarms": 0.05}
FEATURES = "features=default"


def fresh_scenes(seed: int) -> list[str]:
    """Return the settings of scenes of another stream."""
    return ["task.scenes={scenes}", f"task.scene_seed={seed}"]


FRESH = fresh_scenes(SEED)
FILES = ["task.source=files", "task.instances={folder}/instances.json", "task.images={folder}/images"]
SHIFTS = {
    "home": ["task.scenes={home}"],
    "seed": FRESH,
    "prompt": [*FRESH, "task.question='What is in this image?'"],
    "temperature": [*FRESH, "generation=sample"],
    "prior": [*FRESH, "task.scene_mode=prior"],
    "noise": FILES,
    "photographs": FILES,
}
PROMPTS = {
    "picture": "Describe this picture.",
    "see": "What can you see?",
    "list": "List the objects in this picture.",
    "brief": "Describe this image briefly.",
    "sentence": "Describe the image in one sentence.",
    "detail": "Write a detailed description of the image.",
}
CHOSEN_ON = {
    **{f"seed-{seed}": fresh_scenes(seed) for seed in (13, 16)},
    **{f"prompt-{name}": [*fresh_scenes(12), f"task.question='{text}'"] for name, text in PROMPTS.items()},
    **{
        f"temperature-{value}": [
            *FRESH,
            f"task.scene_seed={seed}",
            "generation=sample",
            f"generation.temperature={value}",
        ]
        for value, seed in ((0.5, 15), (0.7, 14), (1.5, 15))
    },
    **{f"{mode}-12": [*fresh_scenes(12), f"task.scene_mode={mode}"] for mode in ("prior", "collage")},
    **dict.fromkeys(("noise-10", "noise-20", "noise-60", "blur", "dark", "bright", "rotate", "crop", "few"), FILES),
}
"""Shifts on which the rule of the monitor was chosen, before it was tried on ``SHIFTS``."""
SEEDS = {
    "noise-10": 12,
    "noise-20": 18,
    "noise-60": 13,
    "blur": 14,
    "dark": 15,
    "bright": 12,
    "rotate": 16,
    "crop": 13,
    "few": 17,
}
CROP = (12, 12, 84, 84)
PHOTOGRAPHS = {
    "sklearn": ["datasets/images/china.jpg", "datasets/images/flower.jpg"],
    "matplotlib": ["mpl-data/sample_data/grace_hopper.jpg"],
    "skimage": [
        f"data/{name}"
        for name in (
            "astronaut.png",
            "camera.png",
            "chelsea.png",
            "coffee.png",
            "coins.png",
            "motorcycle_left.png",
            "rocket.jpg",
        )
    ],
}


def make_run(out: Path, shift: str, scenes: int, home: int) -> Path:
    """Make the run of a shift with its token table, or the part of it that is missing."""
    folder = out / "pictures" / shift
    every = {**SHIFTS, **CHOSEN_ON}
    if "{folder}" in " ".join(every[shift]) and not (folder / "instances.json").is_file():
        if shift == "photographs":
            write_photographs(folder, scenes)
        else:
            write_scenes(folder, shift, scenes)
    settings = [text.format(scenes=scenes, home=home, folder=folder) for text in every[shift]]
    run = ["task=chair", f"runs={out}", f"name={shift}", "logger=none", "callbacks=none"]
    if not (out / shift / "tokens.parquet").is_file():
        for command in (["evaluate", *run, *settings], ["extract", f"run={out / shift}", FEATURES]):
            subprocess.run([sys.executable, "-m", "stethoscope", *command], check=True, stdout=subprocess.DEVNULL)
    return out / shift


def write_scenes(folder: Path, shift: str, scenes: int) -> None:
    """Write scenes with their ground truth, then change the pictures."""
    seed = SEEDS.get(shift, SEED)
    originals = testbed.scenes(scenes, seed=seed)
    shown = [truth_of(scene, shift) for scene in originals]
    testbed.export(folder, shown)
    rng = np.random.default_rng(seed)
    for original, scene in zip(originals, shown, strict=True):
        picture = (original if shift == "crop" else scene).image()
        changed_picture(picture, shift, rng).save(folder / "images" / f"{scene.id}.png")


def truth_of(scene: Scene, shift: str) -> Scene:
    """Return the scene with the objects that are left: two of them, or those in the middle of the picture."""
    if shift == "few":
        for name in scene.visible[2:]:
            scene = scene.without(name, scene.id)
    if shift == "crop":
        left, top, right, bottom = CROP
        pixels = np.bincount(scene.mask()[top:bottom, left:right].ravel(), minlength=len(testbed.CATEGORIES) + 1)[1:]
        kept = {name for name, count in zip(testbed.CATEGORIES, pixels, strict=True) if count >= 30}
        objects = (replace(item, visible=item.visible and item.category in kept) for item in scene.objects)
        scene = replace(scene, objects=tuple(objects))
    return scene


def changed_picture(picture: Image.Image, shift: str, rng: np.random.Generator) -> Image.Image:
    """Return a picture with noise, blurred, darker, brighter, turned, or its enlarged middle."""
    if shift == "blur":
        return picture.filter(ImageFilter.GaussianBlur(1.5))
    if shift == "rotate":
        return picture.transpose(Image.Transpose.ROTATE_90)
    if shift == "crop":
        return picture.crop(CROP).resize(picture.size, Image.Resampling.BICUBIC)
    pixels = np.asarray(picture.convert("RGB"), dtype=float) * {"dark": 0.6, "bright": 1.4}.get(shift, 1.0)
    if shift.startswith("noise"):
        pixels = pixels + rng.normal(0, float(shift.partition("-")[2] or SIGMA), pixels.shape)
    return Image.fromarray(np.clip(pixels, 0, 255).round().astype(np.uint8))


def photographs() -> Iterator[Path]:
    """Find the photographs that installed packages bring with them."""
    for package, names in PHOTOGRAPHS.items():
        spec = importlib.util.find_spec(package)
        if spec and spec.origin:
            paths = [Path(spec.origin).parent / name for name in names]
            yield from (path for path in paths if path.is_file())


def write_photographs(folder: Path, crops: int = 100) -> None:
    """Write random crops of photographs, and annotations without any object.

    A crop is a quarter to all of the shorter side.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)  # a call that was interrupted has made it
    rng, paths, images = np.random.default_rng(SEED), list(photographs()), []
    for number in range(min(crops, 100)):
        path = paths[number % len(paths)]
        photograph = Image.open(path).convert("RGB")
        side = int(min(photograph.size) * rng.uniform(0.25, 1))
        left, top = (int(rng.integers(0, length - side + 1)) for length in photograph.size)
        name = f"{number:03d}-{path.stem}.png"
        photograph.crop((left, top, left + side, top + side)).save(folder / "images" / name)
        images.append({"id": number + 1, "file_name": name, "width": side, "height": side})
    categories = [{"id": number, "name": name} for number, name in enumerate(testbed.CATEGORIES, 1)]
    content = {"images": images, "annotations": [], "categories": categories}
    (folder / "instances.json").write_text(json.dumps(content))


def promise_kept(table: pd.DataFrame, detector: Detector) -> dict[str, Any]:
    """Measure ECE and false alarms on judged mentions.

    False alarms come with their 95 % interval over pictures.
    """
    rows = detector.select_mentions(table)
    grounded = rows["label"].to_numpy() == 0
    if not grounded.any():
        return {"rate": 1.0, "ece": None, "false_alarms": None}
    probabilities = detector.predict(rows)
    alarms = group_weights(rows["group"].to_numpy(dtype=str), 1000, 0)
    flagged = (probabilities >= detector.threshold) & grounded
    shares = alarms.apply(lambda weights: {"share": (weights @ flagged) / (weights @ grounded)})["share"]
    return {
        "rate": float((~grounded).mean()),
        "ece": ece(rows["label"].to_numpy(dtype=int), probabilities),
        "false_alarms": alarms.interval(shares),
    }


def describe(shift: RunShift) -> str:
    """Write the monitor's verdict on a run: what it says, and the two estimates that it rests on."""
    says = f"speaks, {shift.view}" if shift.shifted else "silent"
    risk = "" if shift.risk is None else f", risk {shift.risk:.3f}"
    return f"{says}, p {shift.p:.2g}, error {shift.error:.3f}{risk}"


def ece_after(table: pd.DataFrame, detector: Detector, labels: int, draws: int = 20) -> list[float]:
    """Compute ECE after recalibration on ``labels`` pictures, judged on all others."""
    rows, rng = detector.select_mentions(table), np.random.default_rng(0)
    scores, truth = detector.model.scores(detector.matrix(rows)), rows["label"].to_numpy(dtype=int)
    errors, groups = [], rows["group"].unique()
    for _ in range(draws):
        chosen = np.isin(rows["group"], rng.choice(groups, min(labels, len(groups) // 2), replace=False))
        new = detector.recalibrate(rows[chosen].reset_index(drop=True))
        errors.append(ece(truth[~chosen], new.model.calibrate(scores[~chosen])))
    return errors


def ece_without_labels(table: pd.DataFrame, detector: Detector) -> str:
    """Write the ECE after recalibration without labels, and whether the monitor refuses it."""
    rows, unwatched = detector.select_mentions(table), copy.copy(detector)
    unwatched.monitor = None
    refused = "" if allowed(detector.readings(table), detector) else " (refused)"
    new = unwatched.recalibrate(table, labelled=False)
    return f"{ece(rows['label'].to_numpy(dtype=int), new.predict(rows)):.3f}{refused}"


def allowed(readings: Readings, detector: Detector) -> bool:
    """Say whether the monitor allows recalibration without labels."""
    try:
        if detector.monitor is not None:
            detector.monitor.check_share_alone(readings)
    except DataError:
        return False
    return True


def share_allowed(table: pd.DataFrame, detector: Detector, draws: int = 40) -> str:
    """Write for which share of random sets of 50, 100 and 200 pictures it does so."""
    readings, rng, shares = detector.readings(table), np.random.default_rng(0), []
    images = readings.mentions["group"].to_numpy(dtype=str)
    groups = np.unique(images)
    for size in (50, 100, 200):
        sets = (np.isin(images, rng.choice(groups, size, replace=False)) for _ in range(draws))
        shares.append(np.mean([allowed(readings.select(chosen), detector) for chosen in sets]))
    return ", ".join(f"{share:.0%}" for share in shares)


def false_alarms(
    table: pd.DataFrame, detector: Detector, seeds: int = 100, pictures: int = 200
) -> tuple[float, float, float]:
    """Count alarms of monitors fitted, calibrated and asked on disjoint random pictures of one run.

    Returns:
        Share of runs with an alarm, share with a p-value that would allow it, and mean share of flagged pictures.
    """
    readings, counts = detector.readings(table), []
    images = readings.mentions.groupby("group", sort=False).ngroup().to_numpy()
    for seed in range(seeds):
        order = np.random.default_rng(seed).permutation(images.max() + 1)
        parts = (order[: -2 * pictures], order[-2 * pictures : -pictures], order[-pictures:])
        train, calibration, fresh = (readings.select(np.isin(images, part)) for part in parts)
        monitor = ShiftMonitor.fit(detector.inputs.explained_columns, train, calibration)
        shift = None if monitor is None else monitor.run(fresh, detector.threshold, detector.certificate)
        if shift is not None:
            counts.append((shift.shifted, shift.p <= RUN_LEVEL, shift.unlike / shift.pictures))
    alarms, allowed_by_chance, flagged = np.mean(counts, axis=0)
    return float(alarms), float(allowed_by_chance), float(flagged)


def main() -> None:
    """Make the runs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the runs")
    home = parser.add_mutually_exclusive_group()
    home.add_argument("--home", type=Path, help="a run to learn from, with the same features; made if not given")
    home.add_argument("--home-scenes", type=int, default=3000, help="of the run that is made")
    parser.add_argument("--scenes", type=int, default=400, help="of each shift")
    parser.add_argument("--only", nargs="+", choices=[*SHIFTS, *CHOSEN_ON], default=list(SHIFTS))
    parser.add_argument("--chosen-on", action="store_true", help="also the shifts on which the rule was chosen")
    parser.add_argument("--seeds", type=int, default=100, help="of the count of false alarms")
    options = parser.parse_args()
    asked = ["home", *options.only, *(CHOSEN_ON if options.chosen_on else ())]
    shifts = [name for name in dict.fromkeys(asked) if name != "home" or options.home is None]
    runs = {name: make_run(options.out, name, options.scenes, options.home_scenes) for name in shifts}
    table = RunStore(options.home or runs["home"]).tokens("chair")
    folds = split_folds(table["group"])
    detector = Detector(threshold=PROMISE).fit(table[folds["train"]], table[folds["calibration"]])
    if detector.monitor is None:
        raise SystemExit("the home run has too few pictures for a monitor")
    tables = {"home, test images": table[folds["test"]]}
    for name, run in runs.items():
        if name != "home":
            tables[name] = matching_columns(RunStore(run).tokens("chair"), detector.schema.names, name)
    columns = "shift | hallucinated | ECE | false alarms | monitor | flagged | ECE, 50 labels: mean, largest"
    print(f"{columns} | ECE, no label | random sets that are recalibrated without labels")
    for name, rows in tables.items():
        kept, shift = promise_kept(rows, detector), detector.shift(rows)
        verdict = "-" if shift is None else describe(shift)
        flagged = "-" if shift is None else f"{shift.unlike} of {shift.pictures}"
        line = [name, f"{kept['rate']:.3f}", "-", "-", verdict, flagged, "-", "-", "-"]
        if kept["ece"] is not None:
            few = ece_after(rows, detector, 50)
            line[2:4] = f"{kept['ece']:.3f}", str(kept["false_alarms"])
            line[6:8] = f"{np.mean(few):.3f}, {max(few):.3f}", ece_without_labels(rows, detector)
            line[8] = share_allowed(rows, detector) if rows["group"].nunique() > 200 else "-"
        print(" | ".join(line))
    alarms, chance, single = false_alarms(table, detector, options.seeds)
    print(
        f"false alarms on fresh scenes: {alarms:.1%} of {options.seeds} runs ({chance:.1%} have p <= {RUN_LEVEL}), "
        f"{single:.2%} of single pictures"
    )


if __name__ == "__main__":
    main()
