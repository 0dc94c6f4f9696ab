"""The documentation site: it builds strictly, loads nothing from other hosts, and nothing sticks out on a phone.

Screenshots of some pages go into $STETHOSCOPE_SCREENSHOTS.
"""

import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from importlib.resources import files
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason='no mkdocs; pip install ".[docs]"')
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
WIDTHS = {1280: 900, 390: 844}
SHOWN = ("index", "concepts", "features", "reproduction", "own/model", "api/features")


VIOLATIONS = """async () => {
  const levels = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"];
  const result = await axe.run(document, { runOnly: { type: "tag", values: levels }, resultTypes: ["violations"] });
  return result.violations.flatMap((rule) => rule.nodes.map((node) =>
    `${rule.id}: ${node.html} ${node.failureSummary}`));
}"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def address(site):
    """A server of the site on this machine."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(site))
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    """Chromium, the one that is installed."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright")
    path = os.environ.get("STETHOSCOPE_CHROMIUM") or shutil.which("chromium")
    if path is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=path, args=["--headless", "--no-sandbox"])
        yield chromium
        chromium.close()


def test_llms_txt_lists_every_page(site):
    names = re.findall(r"\]\(([^)]+\.md)\): \S", (site / "llms.txt").read_text())
    assert set(names) == {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert all((site / name).is_file() for name in names)
    assert not any("<!-- table:" in (site / name).read_text() for name in names)


def test_the_tables_come_from_the_registry(site):
    from stethoscope.features import FEATURES

    text = (site / "features.md").read_text()
    assert all(f"| `{name}` |" in text for name in FEATURES)


@pytest.mark.parametrize("width", WIDTHS)
def test_in_a_browser(site, address, browser, width, tmp_path):
    page = browser.new_page(viewport={"width": width, "height": WIDTHS[width]})
    errors, requests = [], []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    folder = Path(os.environ.get("STETHOSCOPE_SCREENSHOTS", tmp_path))
    for file in sorted(site.rglob("*.html")):
        name = file.relative_to(site).with_suffix("").as_posix()
        page.goto(f"{address}/{name}.html", wait_until="load")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        if name in SHOWN:
            page.wait_for_timeout(300)
            page.screenshot(path=folder / f"{name.replace('/', '-')}-{width}.png")
    assert errors == []
    assert {url for url in requests if not url.startswith((address, "data:", "blob:"))} == set()
    page.close()


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_no_page_violates_wcag(address, browser, scheme, width):
    """Level A and AA, by axe-core."""
    axe = pytest.importorskip("axe_playwright_python", reason="no axe-core; pip install axe-playwright-python")
    script = files(axe).joinpath("axe.min.js").read_text("utf-8")
    context = browser.new_context(viewport={"width": width, "height": WIDTHS[width]}, color_scheme=scheme)
    page = context.new_page()
    for name in (*SHOWN, "detectors", "looking", "own/estimator"):
        page.goto(f"{address}/{name}.html", wait_until="load")
        page.add_script_tag(content=script)
        page.wait_for_timeout(300)
        assert page.evaluate(VIOLATIONS) == [], name
    context.close()


def test_search_finds_a_page(address, browser):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(f"{address}/index.html")
    page.fill(".md-search__input", "relevancy")
    page.wait_for_selector(".md-search-result__link", timeout=120_000)
    page.close()
