"""How long does a user wait for a diagnosis, an answer on the page, a slider?

Each has a limit.

    python scripts/bench/responsiveness.py               # all three; exit status 1 if a limit is passed
    python scripts/bench/responsiveness.py --rounds 9

- diagnosis: seconds of CPU time of ``diagnose`` and its HTML page, on one thread, with the bundled detector;
- page: CPU time of the server for one answer in a real browser, divided by that of ``diagnose`` on the same picture;
- slider: milliseconds of the clock from moving a slider to another picture on the screen.

The best of all rounds counts, since other processes share the machine. Page and slider need Chromium (found on the
path, or named by STETHOSCOPE_CHROMIUM) and the extras ``app`` and ``dev``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from playwright.sync_api import Page, sync_playwright

import stethoscope
from stethoscope import testbed
from stethoscope.adapters.base import Adapter
from stethoscope.app.model_pool import ModelPool
from stethoscope.app.pictures import write_examples
from stethoscope.app.runs import Runs
from stethoscope.app.server import own_folder, start
from stethoscope.app.sessions import Sessions
from stethoscope.app.ui import build_page
from stethoscope.detection.lookup import bundled_detectors
from stethoscope.diagnosis.run_diagnosis import diagnose
from stethoscope.tasks.extraction import load_extraction

QUESTION = "Please describe this image in detail."
LIMITS = {"diagnosis": 3.0, "page": 6.0, "slider": 300.0}
UNITS = {"diagnosis": "s of CPU time", "page": "times the CPU time of a diagnosis", "slider": "ms"}
SLIDERS = {"layer": (3, 0, 1), "threshold": (90, 30, 60), "opacity": (90, 60, 30), "scale": (4, 8, 12)}
"""Sliders of the page and the positions that they are moved to."""

# moves a slider as a hand does, and returns after how many milliseconds the picture on the screen is another one
MOVE = """async ([id, value]) => {
  const slider = document.querySelector(`#view [data-id="${id}"]`), canvas = document.querySelector("#view canvas");
  const small = Object.assign(document.createElement("canvas"), { width: 64, height: 64 });
  const brush = small.getContext("2d", { willReadFrequently: true });
  const look = () => { brush.drawImage(canvas, 0, 0, 64, 64); return brush.getImageData(0, 0, 64, 64).data.join(); };
  const before = look(), began = performance.now();
  slider.value = value;
  slider.dispatchEvent(new Event("input", { bubbles: true }));
  for (let frame = 0; frame < 30; frame++) {
    await new Promise((done) => requestAnimationFrame(done));
    if (look() !== before) return performance.now() - began;
  }
  return null;
}"""


def main() -> None:
    """Measure, print one line for each measure, and exit with status 1 if one is above its limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    adapter = stethoscope.load("testbed")
    adapter.setup()
    figures = {"diagnosis": diagnosis_seconds(adapter, rounds)}
    figures["page"], figures["slider"] = page_figures(adapter, rounds)
    for name, value in figures.items():
        print(f"{name:10s} {value:8.2f} {UNITS[name]} (limit {LIMITS[name]:g})")
    sys.exit(any(value >= LIMITS[name] for name, value in figures.items()))


def cpu_seconds(work: Callable[[], object]) -> float:
    """Return the CPU seconds that all threads of this process need for some work."""
    start_time = time.process_time()
    work()
    return time.process_time() - start_time


def diagnosis_seconds(adapter: Adapter, rounds: int) -> float:
    """Return the CPU seconds of a diagnosis with its page, the best of all rounds."""
    picture = testbed.scenes(9)[8].image()
    detector = bundled_detectors(adapter)[0]
    return min(
        cpu_seconds(lambda: diagnose(adapter, picture, QUESTION, detector=detector).to_html()) for _ in range(rounds)
    )


def page_figures(adapter: Adapter, rounds: int) -> tuple[float, float]:
    """Return the best ratio of the page to a diagnosis, and the slowest slider's milliseconds."""
    image = testbed.scenes(2)[1].image()
    chromium = os.environ.get("STETHOSCOPE_CHROMIUM") or shutil.which("chromium")
    with tempfile.TemporaryDirectory() as folder, served(adapter, Path(folder)) as address, sync_playwright() as driver:
        scene = Path(folder) / "scene.png"
        image.save(scene)
        browser = driver.chromium.launch(executable_path=chromium, args=["--headless", "--no-sandbox"])
        ratios = []
        for _ in range(rounds):
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.goto(address)
            page.wait_for_selector("#view .st-status")
            answered = cpu_seconds(partial(ask, page, scene))
            ratios.append(answered / cpu_seconds(lambda: diagnose(adapter, image, QUESTION)))
        page.evaluate(MOVE, ["layer", 2])
        slowest = max(slider_milliseconds(page, name, rounds) for name in SLIDERS)
        browser.close()
    return min(ratios), slowest


@contextmanager
def served(adapter: Adapter, folder: Path) -> Iterator[str]:
    """Serve the app from threads of this process; yield its address."""
    pool = ModelPool(adapter, "testbed", runs=folder / "runs")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with own_folder() as own:
        with pool.use("testbed"):
            sessions = Sessions(own)
            runs = Runs(folder / "runs", None, own)
            page = build_page(pool, runs, load_extraction("coco"), write_examples(own, 0, 3), sessions)
        yield start(page, "127.0.0.1", port, sessions)
        page.close(verbose=False)


def ask(page: Page, scene: Path) -> None:
    """Ask about a picture and wait until the answer stands there with its diagnosis."""
    page.set_input_files("#photograph input[type=file]", scene)
    page.wait_for_selector("#photograph img")
    page.fill("#question textarea", QUESTION)
    page.click("#ask")
    page.wait_for_selector("#view [data-id=diagnosed]:not([hidden])", timeout=60_000)


def slider_milliseconds(page: Page, name: str, rounds: int) -> float:
    """Return the milliseconds until a moved slider shows; infinite if the picture stays.

    The best of its moves counts.
    """
    waits = [page.evaluate(MOVE, [name, value]) for value in rounds * SLIDERS[name]]
    return min((wait for wait in waits if wait is not None), default=float("inf"))


if __name__ == "__main__":
    main()
