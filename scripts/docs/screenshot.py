"""Take the picture of the app that README and site show: an answer, a warned word clicked.

    python scripts/docs/screenshot.py docs/assets/app.png
    python scripts/docs/screenshot.py docs/assets/app-dark.png --dark

Needs Chromium (found on the path, or named by STETHOSCOPE_CHROMIUM) and the extras ``app`` and ``dev``.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal

from PIL import Image
from playwright.sync_api import sync_playwright

from stethoscope import testbed

PORT = 7869
WIDTH, HEIGHT = 1280, 860
SCENE = 1  # number of the rendered scene


def main() -> None:
    """Start the app, ask one question in a real browser, and write the picture with a small palette."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--dark", action="store_true", help="as the app looks where the system is dark")
    options = parser.parse_args()
    file = options.file.resolve()
    folder = tempfile.mkdtemp()  # the app looks for runs where it is started
    command = [sys.executable, "-m", "stethoscope", "app", f"port={PORT}"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            address = next(url[0] for line in server.stdout if (url := re.search(r"http://\S+", line)))
            scene = Path(folder) / "scene.png"
            testbed.scenes(SCENE + 1)[SCENE].image().save(scene)
            take(address, scene, file, options.dark)
        finally:
            server.terminate()
    shutil.rmtree(folder)
    print(f"{file}: {file.stat().st_size / 1000:.0f} kB")


def take(address: str, scene: Path, file: Path, dark: bool) -> None:
    """Ask about a rendered scene, click the first warned word, and save what the window shows."""
    chromium = os.environ.get("STETHOSCOPE_CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--headless", "--no-sandbox"])
        scheme: Literal["dark", "light"] = "dark" if dark else "light"
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme=scheme)
        page.goto(address)
        page.wait_for_selector("#view .st-status")
        page.set_input_files("#photograph input[type=file]", scene)
        page.wait_for_selector("#photograph img")
        page.click("#ask")
        page.wait_for_selector("#view [data-id=diagnosed]:not([hidden])", timeout=60_000)
        warned = page.locator("#view .st-warned")
        warned.first.click()
        page.mouse.move(5, 5)  # so that no hint covers the answer
        page.wait_for_timeout(800)
        page.screenshot(path=file)
        browser.close()
    Image.open(file).convert("P", palette=Image.Palette.ADAPTIVE, colors=96).save(file, optimize=True)


if __name__ == "__main__":
    main()
