"""Live plots, sliders and coloured tokens: what is displayed, how often, and what a saved notebook keeps."""

import base64
import html.parser
import sys
import time

import ipywidgets
import nbformat
import numpy as np
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from IPython.display import display
from IPython.utils.capture import capture_output
from nbclient import NotebookClient

from rlhf_edu import figures, widgets
from rlhf_edu.training import TrainConfig, train
from rlhf_edu.widgets import LivePlot, colour_tokens, slider_figure

PNG = b"\x89PNG\r\n\x1a\n"
VIEW = "application/vnd.jupyter.widget-view+json"


@pytest.fixture
def notebook(monkeypatch):
    """Code that believes to run in a notebook where somebody sits; what it displays can be captured."""
    shell = InteractiveShell.instance()
    monkeypatch.setattr(widgets, "get_ipython", lambda: shell)
    monkeypatch.setattr(widgets, "in_notebook", lambda: True)
    monkeypatch.setattr(widgets, "someone_is_there", lambda: True)
    yield shell
    InteractiveShell.clear_instance()


def displayed(captured) -> list[dict]:
    return [output.data for output in captured.outputs]


def updates(captured) -> list[bool]:
    return [output.update for output in captured.outputs]


def row(step, **metrics):
    return {"step": step, "loss": 1 / (step + 1), **metrics}


# --- the live plot ----------------------------------------------------------------------------------------------


def test_a_live_plot_is_one_picture_that_is_drawn_again(notebook):
    with capture_output() as captured, LivePlot(["loss", "reward"], every=0, share=1e9) as live:
        for step in range(4):
            live(row(step))
    outputs = displayed(captured)
    assert updates(captured) == [False] + [True] * 5  # at first, four rows, at last
    assert len({o.transient["display_id"] for o in captured.outputs}) == 1
    for data in outputs:
        assert set(data) == {"image/png", "text/plain"}
        assert base64.b64decode(data["image/png"]).startswith(PNG)
    assert outputs[-1]["text/plain"] == "live plot, 4 rows: loss 1 -> 0.25"
    assert outputs[0]["image/png"] != outputs[-1]["image/png"]


def test_the_curves_are_the_metrics_where_they_were_measured(notebook):
    live = LivePlot(["loss", ("chosen", "rejected")])
    with capture_output():
        for step in range(6):
            live(row(step, **({"chosen": -2.0 * step} if step % 5 == 0 else {}), rejected=float("nan")))
        live.finish()
    figure = live.figure()
    lines = {line.get_label(): line for axes in figure.axes for line in axes.lines}
    np.testing.assert_allclose(lines["loss"].get_xydata(), [[s, 1 / (s + 1)] for s in range(6)])
    np.testing.assert_allclose(lines["chosen"].get_xydata(), [[0, 0], [5, -10]])
    assert len(lines["rejected"].get_xydata()) == 0
    assert lines["chosen"].get_marker() == "o" and lines["loss"].get_marker() == ""
    assert len(figure.axes) == 2 and [a.get_xlabel() for a in figure.axes] == ["update"] * 2


def test_drawing_waits_for_its_share_of_the_time(notebook, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(widgets.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(widgets.time, "perf_counter", lambda: clock[0])
    takes = lambda *_, **__: clock.__setitem__(0, clock[0] + 0.1)
    monkeypatch.setattr(widgets.Picture, "show", takes)
    live = LivePlot(["loss"], every=1.0, share=0.02)
    for step in range(6000):  # ten minutes of updates of 0.1 s
        clock[0] += 0.1
        live(row(step))
    assert 0.015 * 600 < live.seconds <= 0.02 * (clock[0] - 100) + 0.1
    live.finish()


def test_the_end_of_the_cell_draws_what_is_missing(notebook):
    live = LivePlot(["loss"], every=1e9)
    with capture_output() as captured:
        for step in range(3):
            live(row(step))
        notebook.events.trigger("post_run_cell", None)
        notebook.events.trigger("post_run_cell", None)  # the next cell's end
    assert [d["text/plain"] for d in displayed(captured)][1:] == ["live plot, 3 rows: loss 1 -> 0.3333"]
    assert live.finish not in notebook.events.callbacks["post_run_cell"]


def test_an_interrupted_training_leaves_its_curves(notebook):
    with (
        capture_output() as captured,
        pytest.raises(KeyboardInterrupt),
        LivePlot(["loss"], every=1e9) as live,
    ):
        live(row(0))
        live(row(1))
        raise KeyboardInterrupt
    assert displayed(captured)[-1]["text/plain"].startswith("live plot, 2 rows")


def test_a_second_training_has_a_picture_of_its_own(notebook):
    live = LivePlot(["loss"], every=1e9)
    with capture_output() as captured:
        for _ in range(2):
            for step in range(1, 4):
                live(row(step))
        live.finish()
    assert updates(captured) == [False, True, False, True]
    assert len({o.transient["display_id"] for o in captured.outputs}) == 2
    assert len(live.rows) == 3


def test_a_training_is_watched_and_its_numbers_are_those_of_one_that_is_not(notebook):
    def run(**loop):
        torch.manual_seed(0)
        model = torch.nn.Linear(2, 1)
        loss_of = lambda x: ((model(x) - 1).square().mean(), {"accuracy": torch.tensor(0.5)})
        batch_of = lambda step: torch.full((3, 2), float(step))
        return train(model, batch_of, loss_of, TrainConfig(steps=5, learning_rate=0.1), **loop)

    live = LivePlot(["loss", "accuracy"])
    with capture_output():
        watched = run(watch=live)
        live.finish()
    assert watched.equals(run()) and live.rows == watched.to_dict("records")


def test_outside_a_notebook_a_live_plot_shows_nothing_and_keeps_the_rows(capsys):
    live = LivePlot(["loss"])
    with live:
        for step in range(3):
            live(row(step))
    live.finish()
    assert capsys.readouterr() == ("", "") and len(live.rows) == 3 and live.seconds == 0


def test_a_live_plot_without_columns_is_refused(one_sentence):
    with one_sentence("at least one column"):
        LivePlot([])


# --- sliders ----------------------------------------------------------------------------------------------------


def curve(*values) -> figures.Figure:
    figure = figures.Figure(figsize=(2, 1))
    figure.subplots().plot([0, 1], values if len(values) == 2 else [0, *values])
    return figure


def test_a_slider_stands_above_the_figure_and_redraws_it_in_place(notebook):
    seen = []

    def draw(beta):
        seen.append(beta)
        return curve(beta)

    with capture_output() as captured:
        shown = slider_figure(draw, beta=(0.1, 2.0, 0.1, 0.5))
        display(shown)
        slider = shown.sliders["beta"]
        slider.value = 1.5
    first, *pictures = displayed(captured)
    assert first[VIEW]["model_id"] == slider.model_id and "run this cell" in first["text/plain"]
    assert [p["text/plain"] for p in pictures] == ["figure at beta = 0.5", "figure at beta = 1.5"]
    assert updates(captured) == [False, False, True]
    assert pictures[0]["image/png"] != pictures[1]["image/png"]
    assert seen == [0.5, 1.5] and shown.values == {"beta": 1.5}
    assert isinstance(slider, ipywidgets.FloatSlider) and slider.description == "β"
    assert (slider.min, slider.max, slider.step, slider.readout_format) == (0.1, 2.0, 0.1, ".1f")


def test_several_sliders_of_several_kinds(notebook):
    with capture_output() as captured:
        shown = slider_figure(curve, clip=([0.01, 0.1, 1.0], 0.1), steps=(1, 9, 2, 3))
        display(shown)
        shown.sliders["steps"].value = 5
        shown.sliders["clip"].value = 1.0
    assert [type(s) for s in shown.sliders.values()] == [ipywidgets.SelectionSlider, ipywidgets.IntSlider]
    texts = [d["text/plain"] for d in displayed(captured) if "image/png" in d]
    assert texts == [f"figure at clip = {c}, steps = {n}" for c, n in ((0.1, 3), (0.1, 5), (1, 5))]


def test_where_nobody_can_move_a_slider_there_is_the_figure_alone(notebook, monkeypatch):
    monkeypatch.setattr(widgets, "someone_is_there", lambda: False)
    with capture_output() as captured:
        display(slider_figure(curve, beta=(0.1, 2.0, 0.1, 0.5)))
    (data,) = displayed(captured)
    assert set(data) == {"image/png", "text/plain"}


def test_without_ipywidgets_there_is_the_figure_alone(notebook, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with capture_output() as captured:
        display(slider_figure(curve, beta=(0.1, 2.0, 0.1, 0.5)))
    (data,) = displayed(captured)
    assert "image/png" in data


def test_outside_a_notebook_a_slider_figure_is_a_figure(capsys):
    shown = slider_figure(curve, beta=(0.1, 2.0, 0.1, 0.5))
    assert shown.figure.axes[0].lines[0].get_ydata()[-1] == 0.5
    shown._ipython_display_()
    assert capsys.readouterr().out == "<figure at beta = 0.5>\n"


@pytest.mark.parametrize("given", [(0.1, 2.0, 0.1, 3.0), (0, 1), (0.1, 2.0, 0, 1.0), ([1, 2], 3)])
def test_a_range_that_cannot_be_is_explained(given, one_sentence):
    with one_sentence("beta", "step, start"):
        slider_figure(curve, beta=given)


def test_what_draws_must_return_a_figure_and_have_a_slider(one_sentence):
    with one_sentence("NoneType", "Figure"):
        slider_figure(lambda beta: None, beta=(0, 1, 1, 0))
    with one_sentence("needs a range"):
        slider_figure(curve)


@pytest.mark.parametrize("step, digits", [(0.1, 1), (0.05, 2), (1.0, 0), (0.25, 2), (1e-9, 6)])
def test_digits_of_a_step(step, digits):
    assert widgets._digits(step) == digits


# --- coloured tokens --------------------------------------------------------------------------------------------


class Spans(html.parser.HTMLParser):
    """The (style, title, text) of each token, and the plain text of the whole."""

    def __init__(self, source):
        super().__init__()
        self.spans, self.text, self._open = [], "", None
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self._open = dict(attributes) if tag == "span" else None

    def handle_data(self, data):
        self.text += data
        if self._open:
            self.spans.append((self._open["style"], self._open.get("title"), data))

    def handle_endtag(self, tag):
        self._open = None


def test_tokens_carry_colour_number_and_legend():
    tokens, ratios = [" a", " <b>", "'s\n", " good"], torch.tensor([0.0, -1.0, 0.25, 2.0])
    shown = colour_tokens(tokens, ratios)
    page = Spans(shown._repr_html_())
    spans = [s for s in page.spans if s[1]]
    assert [text for *_, text in spans] == tokens, "a token was lost, joined or taken for a tag"
    assert spans[0][1] == "log-ratio +0.000, 1 times as likely"
    assert spans[3][1] == "log-ratio +2.000, 7.39 times as likely"
    assert "background:rgb(255,255,255)" in spans[0][0]
    assert "rgb(86,180,233)" in spans[3][0] and "solid" in spans[3][0]
    legend = [text for _, title, text in page.spans if title is None]
    assert legend == ["-2.0", "-1.0", "+0.0", "+1.0", "+2.0"]
    assert "reference likelier" in page.text and "policy likelier" in page.text and "sum +1.25" in page.text
    assert repr(shown) == " a[+0.00] <b>[-1.00]'s\n[+0.25] good[+2.00]  (sum +1.25 nats)"


def test_black_text_is_readable_on_every_background():
    shown = colour_tokens(["x"], [1.0])
    for ratio in np.linspace(-2, 2, 41):
        style = shown.style(ratio)
        rgb = [int(c) / 255 for c in style.split("rgb(")[1].split(")")[0].split(",")]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
        contrast = (np.dot(linear, [0.2126, 0.7152, 0.0722]) + 0.05) / 0.05
        assert contrast >= 7 and "color:#000" in style


def test_tokens_of_one_scale_and_names_of_the_models():
    half = colour_tokens(["x"], [1.0], limit=2.0, labels=("DPO", "<SFT>"))
    assert half.style(1.0) != colour_tokens(["x"], [1.0]).style(1.0)
    assert "DPO likelier" in half._repr_html_() and "&lt;SFT&gt; likelier" in half._repr_html_()
    assert "rgb(255,255,255)" in colour_tokens(["x"], [float("nan")], limit=1.0)._repr_html_()
    assert colour_tokens(["x", "y"], [0.0, 0.0])._repr_html_()


@pytest.mark.parametrize("tokens, ratios", [(["a"], [0.0, 1.0]), ([], [])])
def test_as_many_tokens_as_ratios(tokens, ratios, one_sentence):
    with one_sentence("one log-ratio for each token"):
        colour_tokens(tokens, ratios)


# --- in a real kernel -------------------------------------------------------------------------------------------

CELLS = [
    """
from rlhf_edu.widgets import LivePlot, colour_tokens, slider_figure
from rlhf_edu.figures import Figure
live = LivePlot(["loss"], every=0, share=1e9)
for step in range(5):
    live({"step": step, "loss": 1.0 / (step + 1)})
""",
    """
with LivePlot(["loss"]) as live:
    live({"step": 0, "loss": 1.0})
    raise KeyboardInterrupt
""",
    """
def draw(beta):
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([0, beta])
    return figure
slider_figure(draw, beta=(0.1, 2.0, 0.1, 0.5))
""",
    "get_ipython().kernel._allow_stdin = True\nslider_figure(draw, beta=(0.1, 2.0, 0.1, 0.5))",
    "colour_tokens(['a'], [0.5])",
]


def test_a_saved_notebook_holds_one_picture_of_each_and_no_widget_state():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    client = NotebookClient(notebook, timeout=120, kernel_name="python3", allow_errors=True)
    client.store_widget_state = False
    client.execute()
    live, interrupted, slider, moved, tokens = (cell.outputs for cell in notebook.cells)
    (output,) = live
    assert output["data"]["text/plain"] == "live plot, 5 rows: loss 1 -> 0.2"
    assert base64.b64decode(output["data"]["image/png"]).startswith(PNG)
    picture, error = interrupted
    assert picture["data"]["text/plain"] == "live plot, 1 rows: loss 1 -> 1"
    assert error["ename"] == "KeyboardInterrupt"
    (output,) = slider  # a program executes this notebook: no widget in it
    assert set(output["data"]) == {"image/png", "text/plain"}
    assert [VIEW in o["data"] for o in moved] == [True, False]
    assert "text/html" in tokens[0]["data"] and "a[+0.50]" in tokens[0]["data"]["text/plain"]
    assert "widgets" not in notebook.metadata


def test_drawing_is_quick(notebook):
    """Two seconds of the processor are many times what it takes: four panels of a hundred updates."""
    live = LivePlot(["loss", "accuracy", "margin", ("chosen_logps", "rejected_logps")], every=1e9)
    with capture_output():
        for step in range(100):
            live(row(step, accuracy=0.5, margin=0.1, chosen_logps=-70.0, rejected_logps=-72.0))
        started = time.process_time()
        live.draw()
        assert time.process_time() - started < 2
        live.finish()
