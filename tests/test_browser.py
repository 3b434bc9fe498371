"""A new user's walk in a real browser: teach the example, watch, stop, resume, draw, merge, export; and what each page
must be for everybody: reachable by keyboard, readable, fit for a phone, closed to what is not its own.

Needs a Chromium, and playwright with axe (pip install '.[browser]'); where one is missing, it says so and is skipped.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from soundfile import write as write_sound

pytest.importorskip("gradio", reason="the browser pages need gradio")
playwright = pytest.importorskip("playwright.sync_api", reason="pip install '.[browser]'")
axe = pytest.importorskip("axe_playwright_python", reason="pip install '.[browser]'")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium was found: apt-get install chromium")

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "assets" / "examples" / "mascot"
PAGES = ("", "runs", "library", "merge", "compare", "generate", "system")
PATIENCE_MS = int(os.environ.get("PATIENCE_MS", "240000"))
STEPS = 30


class Server:
    """`studio ui` as a process that can be killed and started again."""

    def __init__(self, home):
        self.home, self.process = home, None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"

    def start(self):
        environment = {**os.environ, "STUDIO_HOME": str(self.home), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "studio", "ui", "--port", str(self.port)]
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)

    def wait(self):
        """Until the pages are there; the one that says so has another status."""
        deadline = time.monotonic() + PATIENCE_MS / 1000
        while True:
            try:
                return urllib.request.urlopen(self.url, timeout=5).status
            except OSError:
                assert self.process.poll() is None, "the server has ended"
                assert time.monotonic() < deadline, "the server does not answer"
                time.sleep(0.3)

    def kill(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server on a home of its own; the trainings that it began end with the tests."""
    made = Server(tmp_path_factory.mktemp("browser") / "home")
    made.start()
    yield made
    made.kill()
    for process in running(made):
        with_group(process, signal.SIGKILL)


def running(server):
    """Process ids of the trainings that are at work."""
    records = [json.loads(path.read_text()) for path in (server.home / "jobs").glob("*.json")]
    return [r["process"]["pid"] for r in records if r["phase"] == "started" and r["process"]]


def with_group(process, number):
    try:
        os.killpg(process, number)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        yield started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def tab(server, browser):
    """Opens tabs; gathers what goes wrong in them and each address outside this machine."""
    faults = []

    def open_tab(path=""):
        context = browser.new_context(viewport={"width": 1240, "height": 950}, color_scheme="light")
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on("request", lambda r: r.url.startswith((server.url, "data:", "blob:")) or faults.append(r.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(server.url + path)
        page.wait_for_selector("h1.page")
        return page

    yield open_tab
    for context in browser.contexts:
        context.close()
    assert faults == []


def fill(page, name, text):
    field = page.locator(f"#f-{name}").first
    field.fill(text)
    field.blur()


def open_part(page, title):
    page.locator("summary", has_text=title).first.click()


@contextmanager
def answered(page):
    """The form that the server sends after what is done inside is there at the end."""
    before = page.locator("[data-time]:visible").first.get_attribute("data-time")
    yield
    page.wait_for_selector(f"[data-time='{before}']", state="detached")


def begin(page, name, pictures):
    """Drops pictures, names the thing, shortens the training under Advanced, starts it."""
    page.locator(".card[data-click=subject]").wait_for()
    page.locator("input[type=file]").first.set_input_files([str(path) for path in pictures])
    page.wait_for_selector("textarea[data-edit]")
    fill(page, "title", name)
    fill(page, "steps", str(STEPS))
    open_part(page, "Advanced")
    open_part(page, "Samples, checkpoints, export")
    for key, text in {"sample-every": "10", "sample-steps": "2", "sample-prompts": "a {trigger}\na dog"}.items():
        fill(page, key, text)
    page.uncheck("[data-edit=export][data-option=diffusers]")  # exported below, with its proof to be seen
    open_part(page, "Data and captions")
    fill(page, "data-prior-pictures", "0")
    open_part(page, "Length, speed, precision")
    for key, text in {"batch-size": "1", "sketches": "0"}.items():
        fill(page, key, text)
    page.click("#start")
    page.wait_for_selector(".run-head")


# From here on each step stands on what the one before has left.


def test_a_page_is_there_while_the_server_starts_and_gives_way(server, browser):
    page = browser.new_context().new_page()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            page.goto(server.url)
            break
        except playwright.Error:
            time.sleep(0.1)
    page.wait_for_selector("h1.page, h1:has-text('the studio')")
    page.wait_for_selector("h1.page", timeout=PATIENCE_MS)
    page.context.close()
    assert server.wait() == 200


def test_a_training_survives_refresh_kill_and_stop_and_ends_in_the_library(server, tab):
    server.wait()
    page = tab()
    begin(page, "Bobo", sorted(EXAMPLE.iterdir())[:4])
    page.wait_for_selector("text=/time left/")
    page.wait_for_selector(".grid tr:nth-child(2) [data-cell] img")
    (process,) = running(server)
    assert with_group(process, signal.SIGSTOP)  # so that it is not over before all this has been looked at

    other = tab()  # a second tab agrees, and a refresh loses nothing
    other.wait_for_selector(".run-head:has-text('bobo'):has-text('training')")
    page.reload()
    page.wait_for_selector(".run-head:has-text('training')")
    server.kill()
    server.start()
    server.wait()
    page = tab()
    page.wait_for_selector(".run-head:has-text('training')")
    page.get_by_role("button", name="Stop and keep").click()
    page.wait_for_selector(".run-head:has-text('stopping')")
    assert with_group(process, signal.SIGCONT)
    page.wait_for_selector("text=Stopped. Everything is saved")
    assert page.locator(".curve polyline").count() == 2

    cells = page.locator("[data-cell]:visible")
    cells.first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert page.locator("dialog p").inner_text() == "a dog (step 10)"
    page.keyboard.press("ArrowUp")
    assert page.locator("dialog p").inner_text() == "a dog (the base)"
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Resume").click()
    page.wait_for_selector(".run-head:has-text('finished')")
    page.wait_for_selector(f"text={STEPS} / {STEPS}")
    assert (server.home / "library" / "bobo.safetensors").exists()


@pytest.fixture(scope="module")
def second_concept(server, tmp_path_factory):
    """Another adapter of the same base, as a file: the first one with its changes turned round."""
    from studio.adapter import load_adapter

    adapter = load_adapter(server.home / "library" / "bobo.safetensors")
    for number, parameter in enumerate(adapter.parameters()):
        parameter.data.mul_(-1 if number % 3 else 1)
    adapter.card = adapter.card.model_copy(update={"trigger": "dodo"})
    path = tmp_path_factory.mktemp("files") / "Dodo.safetensors"
    adapter.save(path)
    return path


def test_the_library_takes_files_in_refuses_broken_ones_brings_back_and_exports_with_proof(server, tab, second_concept):
    page = tab("library")
    page.locator(".card", has_text="bobo").wait_for()
    broken = second_concept.with_name("broken.safetensors")
    broken.write_bytes(second_concept.read_bytes()[:-100])
    drop = page.locator("input[type=file]").first
    drop.set_input_files(str(broken))
    page.wait_for_selector("text=/truncated/i")
    page.reload()
    page.locator(".card", has_text="bobo").wait_for()
    page.locator("input[type=file]").first.set_input_files(str(second_concept))
    page.wait_for_selector(".card:has-text('dodo')")
    name = page.get_by_label("Name")
    name.fill("../outside")
    name.press("Enter")
    page.wait_for_selector("text=/cannot be a name/")
    page.get_by_role("button", name="Remove", exact=True).click()
    page.get_by_role("button", name="Undo").click()
    page.wait_for_selector(".card:has-text('dodo')")
    page.locator(".card", has_text="bobo").click()
    page.get_by_text("Export for other programs").click()
    page.get_by_role("button", name="Export and prove").click()
    page.wait_for_selector("text=Proven by reloading: exact")
    assert [path.name for path in (server.home / "library").glob("*.safetensors")].count("dodo.safetensors") == 1


def test_a_picture_is_drawn_by_regions_restored_and_swept(server, tab):
    page = tab("generate")
    page.wait_for_selector("textarea.prompt")
    page.fill("textarea.prompt", "on a green background")
    page.locator("textarea.prompt").first.blur()
    open_part(page, "Advanced")
    fill(page, "steps", "2")
    open_part(page, "Regions")
    canvas = page.locator(".canvas").first
    canvas.scroll_into_view_if_needed()
    for start, end in ((0.05, 0.45), (0.55, 0.95)):
        frame = canvas.bounding_box()
        with answered(page):
            page.mouse.move(frame["x"] + start * frame["width"], frame["y"] + 0.1 * frame["height"])
            page.mouse.down()
            page.mouse.move(frame["x"] + end * frame["width"], frame["y"] + 0.9 * frame["height"], steps=4)
            page.mouse.up()
    page.locator(".canvas .box").first.focus()
    page.keyboard.press("ArrowLeft")
    for number, name in enumerate(("bobo", "dodo")):
        fill(page, f"region-{number}-prompt", f"a {name}, on a green background")
        with answered(page):
            page.select_option(f"#f-region-{number}-adapter", name)
    page.click("#generate-image")
    page.wait_for_selector(".works:not(.small) a[download]")
    (picture,) = (server.home / "pictures").glob("*/000.png")
    regions = json.loads(Image.open(picture).text["studio"])["regions"]
    assert [region["adapter"] for region in regions] == ["bobo", "dodo"]
    assert regions[0]["box"] == pytest.approx([0.03, 0.1, 0.43, 0.9], abs=0.02)

    fresh = tab("generate")
    fresh.wait_for_selector(".works.small")
    with answered(fresh):
        fresh.locator("input[type=file]").first.set_input_files(str(picture))
    assert fresh.locator("#f-region-1-prompt").input_value() == "a dodo, on a green background"
    for _ in range(2):
        with answered(fresh):
            fresh.get_by_role("button", name="Remove region 1").click()
    with answered(fresh):
        fresh.select_option("#f-add", "bobo")
    open_part(fresh, "Sweep")
    with answered(fresh):
        fresh.select_option("#f-x", "strength")
    fill(fresh, "xs", "0.5, 1")
    fresh.click("#generate-image")
    fresh.wait_for_selector(".grid td:nth-child(4) img")
    assert fresh.locator(".grid thead th").all_inner_texts() == ["no adapter", "strength 0.5", "strength 1"]


WIDTH = "picture => picture.decode().then(() => picture.naturalWidth)"  # once it has come
SECONDS = "sound => new Promise(done => { sound.onloadedmetadata = () => done(sound.duration); sound.load(); })"


def asking(page, medium, field, prompt):
    """The part of the page for a medium, with the prompt typed in."""
    page.get_by_role("tab", name=medium).click()
    page.fill(field, prompt)
    page.locator(field).blur()
    return page.get_by_role("tabpanel").filter(has=page.locator(field))


def test_a_clip_is_drawn_around_a_given_picture_and_becomes_a_sticker(server, tab, tmp_path):
    page = tab("generate")
    panel = asking(page, "Video", "#p-video", "a fox bouncing")
    picture = tmp_path / "fox.png"
    Image.new("RGBA", (64, 64), (250, 120, 10, 255)).save(picture)
    panel.locator("input[type=file]").first.set_input_files(str(picture))
    panel.locator("img[alt='given frame']").wait_for()  # the form is drawn anew with it
    fill(panel, "frames", "3")
    open_part(panel, "Advanced")
    fill(panel, "steps", "2")
    page.click("#generate-video")
    panel.locator(".works:not(.small) a[download]").first.wait_for()
    (made,) = (server.home / "pictures").glob("*/000.webp")
    with Image.open(made) as clip:
        assert clip.n_frames == 3
        assert clip.convert("RGBA").getpixel((32, 32)) == (250, 120, 10, 255)
    panel.get_by_role("button", name="WhatsApp").first.click()
    panel.locator("text=It fits what WhatsApp takes").wait_for()
    with page.expect_download() as saved:
        panel.get_by_role("link", name="whatsapp").click()
    with Image.open(saved.value.path()) as sticker:
        assert sticker.size == (512, 512)


def test_a_melody_is_made_and_can_be_heard_and_seen(server, tab):
    page = tab("generate")
    panel = asking(page, "Music", "#p-audio", "a slow happy melody on a flute")
    fill(panel, "seconds", "1")
    page.click("#generate-audio")
    panel.locator(".works:not(.small) audio").first.wait_for()
    assert panel.locator("img[alt='waveform']").first.evaluate(WIDTH) > 0
    assert panel.locator("img[alt^='spectrogram']").first.evaluate(WIDTH) > 0
    assert panel.locator("img.pitch").count() == 0  # no mode is named
    assert panel.locator("audio").first.evaluate(SECONDS) == pytest.approx(1, abs=0.1)


def test_a_base_that_hears_beats_and_chords_is_told_them(server, tab):
    page = tab("generate")
    panel = asking(page, "Music", "#p-audio", "a melody in d minor on a flute")
    assert panel.locator("#f-beats").count() == 0
    open_part(panel, "Advanced")
    panel.locator("#f-base").select_option("melody-diffusion")
    fill(panel, "beats", "90 bpm 3/4")
    fill(panel, "chords", "Dm")
    fill(panel, "steps", "2")
    fill(panel, "seconds", "1")
    page.click("#generate-audio")
    panel.locator(".works:not(.small) audio").first.wait_for()
    assert panel.locator("img.pitch").first.evaluate(WIDTH) > 0
    assert "| beats: 90 bpm 3/4 | chords: Dm" in panel.locator(".works:not(.small) figcaption").first.inner_text()


def test_recordings_teach_a_base_of_music_and_its_samples_can_be_heard(server, tab, tmp_path):
    server.wait()
    for pitch in (220, 330):
        write_sound(tmp_path / f"{pitch}.wav", np.sin(np.arange(12_000) * 2 * np.pi * pitch / 12_000) / 2, 12_000)
    page = tab()
    page.locator(".card[data-click=raga]").click()
    page.wait_for_selector("text=Drop recordings here")
    page.locator("input[type=file]").first.set_input_files([str(path) for path in sorted(tmp_path.glob("*.wav"))])
    page.wait_for_selector("text=2 recordings")
    fill(page, "title", "Tones")
    fill(page, "steps", "2")
    open_part(page, "Advanced")
    open_part(page, "Samples, checkpoints, export")
    for key, text in {"sample-every": "2", "sample-seconds": "0.5", "sample-prompts": "{trigger} music"}.items():
        fill(page, key, text)
    open_part(page, "Data and captions")
    for key, text in {"data-seconds": "1", "data-validation": "0"}.items():
        fill(page, key, text)
    page.click("#start")
    page.wait_for_selector(".run-head:has-text('tones'):has-text('finished')")
    players = page.locator(".grid td.sound audio")
    players.nth(1).wait_for()
    assert players.count() == 2  # the base, and step 2
    assert players.last.evaluate(SECONDS) == pytest.approx(0.5, abs=0.05)
    assert (server.home / "library" / "tones.safetensors").exists()


def test_two_concepts_are_merged_compared_and_kept(server, tab):
    page = tab("merge")
    for name in ("bobo", "dodo"):
        page.locator("#concepts input").first.click()
        page.locator("[role=option]", has_text=name).first.click()
    page.keyboard.press("Escape")
    page.get_by_label("Steps").fill("2")
    page.click("#merge")
    page.wait_for_selector(".grid.large img")
    assert page.locator(".grid.large thead th").all_inner_texts()[-1] == "merged"
    page.get_by_role("button", name="Save to the library").click()
    page.wait_for_selector("text=It is in the library as")
    assert (server.home / "library" / "bobo-and-dodo.safetensors").exists()


SERIOUS = ("serious", "critical")


def test_each_page_is_for_everybody_in_light_and_dark_and_fits_a_phone(server, tab):
    script = (Path(axe.__file__).parent / "axe.min.js").read_text()
    page, found = tab(), {}
    for path in PAGES:
        page.set_viewport_size({"width": 1240, "height": 950})
        page.goto(server.url + path)
        page.wait_for_selector("h1.page")
        page.wait_for_timeout(500)
        page.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true; })")
        page.evaluate(script)
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            page.wait_for_function(f"document.body.classList.contains('dark') === {json.dumps(scheme == 'dark')}")
            page.wait_for_timeout(300)  # colours fade
            for fault in page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]:
                if fault["impact"] in SERIOUS:
                    nodes = [node["html"][:160] for node in fault["nodes"][:3]]
                    found[path, scheme, fault["id"]] = (fault["help"], nodes)
        page.set_viewport_size({"width": 390, "height": 844})
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, path
    assert found == {}


def test_files_outside_the_served_folders_are_refused(server):
    server.wait()
    (server.home / "secret.txt").write_text("secret")
    for path in (server.home / "secret.txt", ROOT / "pyproject.toml", server.home / "pictures" / ".." / "secret.txt"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{server.url}gradio_api/file={path}")
        assert refused.value.code in (403, 404)
