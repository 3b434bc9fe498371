"""A new user's walk in a real browser: teach the example, watch, stop, resume, draw, merge, export. Minutes, so slow.

Needs playwright and a Chromium; where either is missing, it says so and is skipped.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="the browser pages need gradio")
playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium was found")]

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "assets" / "examples" / "mascot"
PORT = 7919
URL = f"http://127.0.0.1:{PORT}/"
PATIENCE_MS = 600_000


class Server:
    """`studio ui` as a process that can be killed and started again."""

    def __init__(self, home):
        self.home, self.process = home, None

    def start(self):
        environment = {**os.environ, "STUDIO_HOME": str(self.home), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "studio", "ui", "--port", str(PORT)]
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + PATIENCE_MS / 1000
        while True:
            try:
                return urllib.request.urlopen(URL, timeout=5).status
            except OSError:
                assert self.process.poll() is None, "the server has ended"
                assert time.monotonic() < deadline, "the server does not answer"
                time.sleep(0.5)

    def kill(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture
def server(home):
    """A server that is started; the trainings that it began end with the test."""
    from studio import jobs

    made = Server(home)
    made.start()
    yield made
    made.kill()
    for job in jobs.jobs():
        if job.process and jobs.is_alive(job.process):
            os.killpg(job.process["pid"], signal.SIGKILL)


@pytest.fixture
def tab():
    """Opens tabs of a browser; gathers what goes wrong in them and each address outside this machine."""
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        faults = []

        def inside(url):
            return url.startswith((URL, "data:", "blob:"))

        def open_tab(path="", width=1240):
            page = browser.new_context(viewport={"width": width, "height": 950}).new_page()
            page.set_default_timeout(PATIENCE_MS)
            page.on("request", lambda request: inside(request.url) or faults.append(request.url))
            page.goto(URL + path)
            page.wait_for_selector("h1.page")
            return page

        yield open_tab
        browser.close()
        assert faults == []


def fill(page, hint, text):
    field = page.locator("label", has_text=hint).locator("input,textarea").first
    field.fill(text)
    field.blur()


def begin(page, name, pictures, steps):
    """Drops pictures, names the thing, shortens the training under Advanced, starts it."""
    page.wait_for_selector(".card")
    page.locator("input[type=file]").first.set_input_files([str(path) for path in pictures])
    page.wait_for_selector("textarea[data-edit]")
    page.get_by_placeholder("my-cat").fill(name)
    fill(page, "Optimizer steps. At least 1", str(steps))
    page.get_by_text("Advanced").first.click()
    page.get_by_text("Samples, checkpoints, export").click()
    fill(page, "Steps between sample pictures", "10")
    fill(page, "Sampling steps of those pictures", "4")
    page.get_by_text("Pictures and captions").click()
    fill(page, "How many class pictures", "0")
    page.wait_for_selector("text=/How long|of steps/")
    page.click("#start")
    page.wait_for_selector(".run-head")


def test_from_dropped_pictures_to_a_picture_of_a_merge_and_an_exported_lora(server, tab, home):
    page = tab()
    begin(page, "Bobo", sorted(EXAMPLE.iterdir()), 2000)
    page.wait_for_selector("text=/time left/")

    other = tab()  # a second tab agrees, and a refresh loses nothing
    other.wait_for_selector(".run-head:has-text('bobo')")
    page.reload()
    page.wait_for_selector(".run-head:has-text('training')")

    server.kill()  # the training goes on without its server
    server.start()
    page.reload()
    page.wait_for_selector(".run-head:has-text('training')")
    page.wait_for_selector(".grid [data-cell] img")
    page.get_by_role("button", name="Stop and keep").click()
    page.wait_for_selector("text=Stopped. Everything is saved")
    cells = page.locator("[data-cell]")
    cells.first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert "the base" in page.locator("dialog p").inner_text()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Resume").click()
    page.wait_for_selector(".run-head:has-text('training')")
    page.get_by_role("button", name="Stop and keep").click()
    page.wait_for_selector("text=Stopped. Everything is saved")

    for name, folder in (("one", EXAMPLE), ("two", EXAMPLE.parent / "riso")):
        begin(tab(), name, sorted(folder.glob("*.png"))[:4], 10)
    page = tab()
    page.wait_for_selector(".run-head:has-text('two'):has-text('finished')")

    page = tab("library")
    page.locator(".card", has_text="one").click()
    page.get_by_text("Export for other programs").click()
    page.get_by_role("button", name="Export and prove").click()
    page.wait_for_selector("text=Proven by reloading: exact")

    page = tab("merge")
    for name in ("one", "two"):
        page.locator("#concepts input").first.click()
        page.locator("[role=option]", has_text=name).first.click()
    page.keyboard.press("Escape")
    fill(page, "Empty: the base's own", "4")
    page.click("#merge")
    page.wait_for_selector(".grid.large img")
    assert page.locator(".grid.large thead th").all_inner_texts()[-1] == "merged"
    page.get_by_role("button", name="Save to the library").click()
    page.wait_for_selector("text=It is in the library as")
    assert (home / "library" / "one-and-two.safetensors").exists()


def test_pages_fit_a_phone_and_name_their_controls(server, tab):
    for path in ("", "runs", "library", "merge", "compare", "generate", "system"):
        page = tab(path, width=390)
        page.wait_for_timeout(1000)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, path
        nameless = page.evaluate(
            "[...document.querySelectorAll('button, input, textarea, select')].filter(e => e.offsetParent !== null && "
            "!(e.labels && e.labels.length) && !e.getAttribute('aria-label') && !e.getAttribute('aria-labelledby') && "
            "!e.title && !e.textContent.trim()).map(e => e.outerHTML.slice(0, 120))"
        )
        assert nameless == [], path


def test_files_outside_the_served_folders_are_refused(server, home):
    (home / "secret.txt").write_text("secret")
    for path in (home / "secret.txt", ROOT / "pyproject.toml", home / "pictures" / ".." / "secret.txt"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{URL}gradio_api/file={path}")
        assert refused.value.code in (403, 404)
