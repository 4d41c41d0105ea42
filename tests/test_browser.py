"""From end to end in a browser: JupyterLab, notebook 02, labels by keyboard, a slider, a killed kernel, labels there.

Needs a Chromium and playwright (`pip install -e '.[browser]'`); without them it is skipped.
"""

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
playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -e '.[browser]'")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt install chromium")

FLAGS = "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync"
PATIENCE = 1000 * int(
    os.environ.get("RLHF_EDU_BROWSER_SECONDS") or 300
)  # milliseconds; models load on a busy machine
LABELLER = """
annotator = "browser"
from rlhf_edu.labelling import LabelFile, LabelPanel, Pair
file = LabelFile("browser.jsonl", [Pair("The film", f" was good {i}.", f" was bad {i}.") for i in range(5)])
LabelPanel(file, "Which text speaks more positively about the film?", settle=0.0)
"""
SLIDER = """
import ipywidgets
from IPython.display import display
from rlhf_edu import figures
slider, out = ipywidgets.IntSlider(value=3, min=1, max=9), ipywidgets.Output()
def draw(change=None):
    figure = figures.Figure(figsize=(3, 2))
    figure.subplots().plot(range(slider.value))
    out.clear_output(wait=True)
    with out:
        display(figure)
slider.observe(draw, "value")
draw()
display(slider, out)
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """(address, folder) of a JupyterLab on a copy of notebook 02 and a small notebook with a panel and a slider."""
    from nbformat import v4, write

    folder = tmp_path_factory.mktemp("lab")
    shutil.copy(next((ROOT / "notebooks").glob("02_*.ipynb")), folder / "02.ipynb")
    kernel = {"kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}}
    cells = [v4.new_code_cell(LABELLER), v4.new_code_cell(SLIDER)]
    write(v4.new_notebook(cells=cells, metadata=kernel), folder / "panel.ipynb")
    log = open(folder / "lab.log", "wb")
    env = {**os.environ, "HOME": str(folder), "RLHF_EDU_SCALE": "smoke", "PYTHONPATH": str(ROOT)}
    command = "-m jupyterlab --no-browser --allow-root --ip=127.0.0.1 --port=0 --IdentityProvider.token=t"
    process = subprocess.Popen(
        [sys.executable, *command.split(), str(folder)], env=env, stdout=log, stderr=log, cwd=folder
    )
    address, end = None, time.monotonic() + PATIENCE / 1000
    while address is None and time.monotonic() < end:
        for path in folder.rglob("jpserver-*.json"):
            try:
                address = json.loads(path.read_text())["url"]
                urllib.request.urlopen(address + "api?token=t", timeout=5).close()
            except (OSError, ValueError, KeyError):
                address = None
        time.sleep(0.3)
    assert address, (folder / "lab.log").read_text()
    yield address, folder
    process.terminate()
    process.wait(30)
    log.close()


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


def idle(page):
    """The toolbar's dot says idle before there is a session; the status bar knows."""
    page.wait_for_selector("text=Python 3 (ipykernel) | Idle")


def menu(page, *names):
    page.get_by_role("menuitem", name=names[0], exact=True).click()
    page.get_by_role("menuitem", name=names[1], exact=True).click()


def test_labels_by_keyboard_a_slider_and_a_killed_kernel(browser, lab):
    page = open_notebook(browser, lab, "panel.ipynb")
    menu(page, "Run", "Run All Cells")
    keys = page.get_by_placeholder("keys: click here")
    for number, key in enumerate("abt", 1):
        keys.press_sequentially(key)
        page.wait_for_selector(f"text={number} of 5 done")
    labels = lab[1] / "browser.jsonl"
    assert len(labels.read_text().splitlines()) == 3
    image = page.locator(".jp-OutputArea img").last
    before = image.get_attribute("src")
    page.locator(".noUi-handle").focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function(
        "b => [...document.querySelectorAll('.jp-OutputArea img')].at(-1)?.src !== b", arg=before
    )
    page.screenshot(path=str(lab[1] / "panel.png"))
    menu(page, "Kernel", "Shut Down Kernel")
    page.close()
    page = open_notebook(browser, lab, "panel.ipynb")
    menu(page, "Run", "Run All Cells")
    page.wait_for_selector("text=3 of 5 done")
    page.close()


def test_notebook_02_runs_from_top_to_bottom(browser, lab):
    page = open_notebook(browser, lab, "02.ipynb")
    menu(page, "Run", "Run All Cells")
    page.wait_for_function("() => !document.querySelector('.jp-InputPrompt')?.textContent.includes('*')")
    page.get_by_placeholder("keys: click here").wait_for()
    idle(page)
    assert page.locator("text=Traceback").count() == 0
    page.close()
