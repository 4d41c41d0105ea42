"""From end to end in a browser: notebook 02 run in JupyterLab, labels by keyboard, a slider, a killed kernel, labels there;
the clip's slider of notebook 03 beside a training plot that grows; the site, also on a phone and in the dark; all slides.

Needs an installed Chromium (playwright brings none here) and is skipped where there is none. With
RLHF_EDU_SCREENSHOTS=FOLDER it leaves pictures of what it saw.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -e '.[dev]'")
nbformat = pytest.importorskip("nbformat", reason="no JupyterLab: pip install -e .")
pytest.importorskip("jupyterlab", reason="no JupyterLab: pip install -e .")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt install chromium")

FLAGS = "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync"
PATIENCE = 1000 * int(os.environ.get("RLHF_EDU_BROWSER_SECONDS") or 300)  # milliseconds, for a busy machine
SETTINGS = {  # all cells in the page, not only those in view; no question about news over the pictures
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
KEYS = "keys: click here"
LIVE = """# a training of 60 steps that does nothing else than watch
import time
live = LivePlot(["loss"], every=0.2, share=1.0)
for step in range(60):
    live({"step": step, "loss": 1 / (1 + step)})
    time.sleep(0.1)
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """(address, folder) of a JupyterLab on a copy of the course with notebook 02 alone: labels go into the copy."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "notebooks").mkdir()
    book = nbformat.read(next((ROOT / "notebooks").glob("02_*.ipynb")), as_version=4)
    for cell in book.cells:  # what is seen later was made here
        if cell.cell_type == "code":
            cell.update(outputs=[], execution_count=None)
    nbformat.write(book, folder / "notebooks" / "02.ipynb")
    book = nbformat.read(next((ROOT / "notebooks").glob("03_*.ipynb")), as_version=4)
    code = [c.source for c in book.cells if c.cell_type == "code"]
    first = next(
        i for i, text in enumerate(code) if "LivePlot" in text
    )  # set-up and imports stand up to here
    book.cells = [nbformat.v4.new_code_cell(text) for text in (*code[: first + 1], LIVE)]
    book.cells.append(nbformat.v4.new_code_cell(next(text for text in code if "def draw_clip" in text)))
    nbformat.write(book, folder / "notebooks" / "03.ipynb")
    shutil.copytree(ROOT / "rlhf_edu", folder / "rlhf_edu", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "data").symlink_to(ROOT / "data")
    for name, value in SETTINGS.items():
        path = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))
    env = {**os.environ, "HOME": str(folder), "RLHF_EDU_SCALE": "smoke", "PYTHONPATH": str(folder)}
    env |= {"JUPYTERLAB_SETTINGS_DIR": f"{folder}/settings", "JUPYTER_RUNTIME_DIR": f"{folder}/runtime"}
    env |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = "-m jupyterlab --no-browser --allow-root --ip=127.0.0.1 --port=0 --IdentityProvider.token=t"
    with open(folder / "lab.log", "wb") as log:
        process = subprocess.Popen([sys.executable, *command.split()], env=env, stdout=log, stderr=log,
                                   cwd=folder / "notebooks")  # fmt: skip
    address, end = None, time.monotonic() + PATIENCE / 1000
    try:
        while address is None and time.monotonic() < end and process.poll() is None:
            with contextlib.suppress(OSError, ValueError, StopIteration):  # it is not up yet
                address = json.loads(next((folder / "runtime").glob("jpserver-*.json")).read_text())["url"]
                urllib.request.urlopen(address + "api?token=t", timeout=5).close()
                break
            address = None
            time.sleep(0.2)
        assert address, (folder / "lab.log").read_text()
        yield address, folder
    finally:
        process.terminate()  # it ends its kernels
        process.wait(60)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        running = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield running
        running.close()


def open_notebook(browser, lab, name):
    page = browser.new_page(viewport={"width": 1300, "height": 1000})
    page.set_default_timeout(PATIENCE)
    page.goto(f"{lab[0]}lab/tree/{name}?token=t&reset")
    idle(page)
    return page


def menu(page, *names):
    page.get_by_role("menuitem", name=names[0], exact=True).click()
    page.get_by_role("menuitem", name=names[1], exact=True).click()


def idle(page):
    page.wait_for_selector("text=Python 3 (ipykernel) | Idle")  # the toolbar's dot is idle before any session


def picture(page, name):
    if folder := os.environ.get("RLHF_EDU_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")


def test_notebook_02_labels_by_keyboard_a_slider_and_a_killed_kernel(browser, lab):
    page = open_notebook(browser, lab, "02.ipynb")
    menu(page, "Run", "Run All Cells")
    numbers = "[...document.querySelectorAll('.jp-CodeCell .jp-InputArea-prompt')].map(e => e.textContent)"
    page.wait_for_function(f"() => {numbers}.every(t => /[0-9]/.test(t))")  # [ ] and [*] came before
    idle(page)
    assert page.locator("[data-mime-type='application/vnd.jupyter.stderr'] >> text=Traceback").count() == 0
    assert page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.error']").count() == 0

    keys = page.get_by_placeholder(KEYS)
    keys.scroll_into_view_if_needed()
    picture(page, "panel")
    for number, key in enumerate("abt", 1):
        page.wait_for_timeout(600)  # a new pair is not labelled faster than one can see it
        keys.press_sequentially(key)
        page.wait_for_selector(f"text={number} of 20 done")
    picture(page, "labelled")
    labels = lab[1] / "outputs" / "labels" / "me.jsonl"
    written = [json.loads(line) for line in labels.read_text().splitlines()]
    assert [w["choice"] == "tie" for w in written] == [False, False, True]
    on_the_left = [w["choice"] == w["left"] for w in written]
    assert on_the_left == [True, False, False]

    handle = page.locator(".noUi-handle")
    handle.scroll_into_view_if_needed()
    cell = page.locator(".jp-CodeCell", has=handle)
    before = cell.locator("img").get_attribute("src")
    assert cell.locator(".widget-readout").inner_text() == "0.15"
    picture(page, "slider")
    handle.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    image = "[...document.querySelectorAll('.jp-CodeCell')].find(c => c.querySelector('.noUi-handle'))"
    page.wait_for_function(f"before => {image}.querySelector('img').src !== before", arg=before)
    page.wait_for_function(f"() => {image}.querySelector('.widget-readout').textContent === '0.30'")
    idle(page)
    picture(page, "slider_moved")

    menu(page, "Kernel", "Shut Down Kernel")
    page.wait_for_selector("text=No Kernel")
    page.close()
    page = open_notebook(browser, lab, "02.ipynb")
    page.locator(".jp-Cell").first.click()
    for _ in range(7):  # to the cell of the panel
        page.keyboard.press("Shift+Enter")
    page.wait_for_selector("text=3 of 20 done")
    page.get_by_placeholder(KEYS).scroll_into_view_if_needed()
    picture(page, "reopened")
    assert labels.read_text().count("\n") == 3
    page.close()


def test_a_training_plot_grows_and_the_clip_moves(browser, lab):
    page = open_notebook(browser, lab, "03.ipynb")
    menu(page, "Run", "Run All Cells")
    live = page.locator(".jp-CodeCell", has_text="a training of 60 steps").locator("img")
    seen = [live.get_attribute("src")]
    for _ in range(2):  # the picture changes while the cell runs
        page.wait_for_function(
            "s => [...document.querySelectorAll('img')].every(i => i.src !== s)", arg=seen[-1]
        )
        seen.append(live.get_attribute("src"))
    picture(page, "live")
    assert len(set(seen)) == 3
    handle = page.locator(".noUi-handle")
    handle.scroll_into_view_if_needed()
    idle(page)
    cell = page.locator(".jp-CodeCell", has=handle)
    before = cell.locator("img").get_attribute("src")
    assert cell.locator(".widget-readout").inner_text() == "0.20"
    handle.focus()
    for _ in range(2):
        page.keyboard.press("ArrowRight")
    page.wait_for_function("s => [...document.querySelectorAll('img')].every(i => i.src !== s)", arg=before)
    page.wait_for_function("() => document.querySelector('.widget-readout').textContent === '0.30'")
    assert live.count() == 1, "the plot leaves one figure"
    picture(page, "clip")
    page.close()


# --- the site and the slides --------------------------------------------------------------------------------------


def made(script, folder, *needed):
    for module in needed:
        pytest.importorskip(module, reason="what builds the site is missing: pip install -e '.[dev]'")
    command = [sys.executable, ROOT / "site" / script, folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return made(
        "make.py", tmp_path_factory.mktemp("site"), "sphinx", "myst_nb", "furo", "sphinxcontrib.katex"
    )


def watched(browser, problems, **more):
    """A page that collects errors, and whatever it asks a network for."""
    page = browser.new_page(**more)
    page.set_default_timeout(PATIENCE)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda r: problems.append(r.url) if not r.url.startswith(("file:", "data:")) else None)
    return page


BROKEN_MATH = """() => [...document.querySelectorAll("math")].filter(m => {
    const children = {mfrac: 2, msub: 2, msup: 2, msubsup: 3, munder: 2, mover: 2, munderover: 3};
    return [...m.querySelectorAll("*")].some(e => e.localName in children && e.children.length !== children[e.localName]);
}).map(m => m.textContent)"""


@pytest.mark.parametrize(("size", "scheme"), [((1280, 900), "light"), ((390, 844), "dark")])
def test_every_page_of_the_site_fits_and_asks_no_network(browser, built, size, scheme):
    problems = []
    width, height = size
    page = watched(browser, problems, viewport={"width": width, "height": height}, color_scheme=scheme)
    for path in sorted([*built.glob("*.html"), *(built / "notebooks").glob("*.html")]):
        page.goto(path.as_uri())
        page.wait_for_load_state("load")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{path.name} is too wide"
        assert page.locator(".katex-error").count() == 0, path.name
        assert page.evaluate(BROKEN_MATH) == [], path.name
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
        assert dark == (scheme == "dark"), path.name
    assert not problems, problems[:5]
    page.goto((built / "notebooks" / "07_simpo_and_length.html").as_uri())
    assert page.locator("math").count() > 30 and page.locator("img").count() >= 4
    picture(page, f"site_{width}_{scheme}")
    page.close()


def test_search_finds_a_word_without_a_network(browser, built):
    problems = []
    page = watched(browser, problems)
    page.goto((built / "search.html").as_uri() + "?q=gold+proxy")
    page.wait_for_selector("ul.search li a")
    assert any("03_ppo" in a.get_attribute("href") for a in page.locator("ul.search li a").all())
    assert not problems, problems[:5]
    page.close()


def test_every_slide_can_be_read_from_the_last_row(browser, tmp_path):
    decks, problems = made("slides.py", tmp_path, "markdown_it", "sphinxcontrib.katex"), []
    page = watched(browser, problems, viewport={"width": 1120, "height": 700})
    for deck in sorted(decks.glob("*.html")):
        page.goto(deck.as_uri())
        page.wait_for_load_state("load")
        assert page.evaluate(BROKEN_MATH) == [] and page.locator(".katex-error").count() == 0, deck.stem
        count = page.evaluate("slides.length")
        assert 15 <= count <= 60, (deck.stem, count)
        for number in range(count):
            page.evaluate(f"go({number})")
            height, scale, text, images = page.evaluate("""() => {
                const fit = slides[now].querySelector(".fit"), box = fit.getBoundingClientRect();
                return [box.height, box.width / fit.offsetWidth, fit.innerText.trim(), fit.querySelectorAll("img").length];
            }""")
            where = f"{deck.stem}, slide {number + 1}: {text[:60]!r}"
            assert height <= 640 and scale >= 0.6, f"too full ({height:.0f} px, {scale:.2f}): {where}"
            assert len(text) > 40 or images, f"nearly empty: {where}"
        picture(page, deck.stem)
    assert not problems, problems[:5]
    page.close()
