"""What moves in a notebook, and what stays of it in the file: live training plots, sliders, coloured tokens.

Each leaves a plain picture or HTML in the saved notebook and needs no account. Outside a notebook nothing is shown
and nothing fails. A slider appears only where somebody can move it; the picture of its start is always there.
"""

import base64
import html
import math
import time
from collections.abc import Callable, Sequence

from IPython import get_ipython
from IPython.display import display
from matplotlib.ticker import MaxNLocator

from .errors import UserError
from .figures import Figure, png

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # Okabe and Ito's, told apart by colour-blind readers
STYLES = ("-", "--", "-.", ":")
GREEK = {"beta": "β", "gamma": "γ", "tau": "τ", "alpha": "α", "epsilon": "ε", "lam": "λ", "delta": "δ"}


def in_notebook() -> bool:
    """Whether what is displayed reaches a notebook; a terminal, even IPython's, would print it as a line."""
    return getattr(get_ipython(), "kernel", None) is not None


def someone_is_there() -> bool:
    """Whether a person can answer: programs that execute notebooks say that they cannot."""
    return in_notebook() and bool(getattr(get_ipython().kernel, "_allow_stdin", True))


class Picture:
    """One image output of a cell that can be drawn again: a saved notebook holds the last drawing."""

    def __init__(self):
        self._handle = None

    def show(self, figure: Figure, text: str, dpi: int = 110) -> None:
        """text: what a reader without images gets."""
        data = {"image/png": base64.b64encode(png(figure, dpi=dpi)).decode(), "text/plain": text}
        if self._handle is None:
            self._handle = display(data, raw=True, display_id=True)
        else:
            self._handle.update(data, raw=True)


class LivePlot:
    """Curves that grow while a training runs: `train(..., watch=LivePlot(["loss", "accuracy"]))`.

    columns: one panel each: the name of a metric, or a tuple of names that share a panel. A name that a row lacks
      is skipped there, so that numbers measured now and then are drawn as points.
    every: seconds between two drawings at least; `share`: the part of the time that drawing may take.
    The last drawing is made when the cell ends, interrupted or not, or at the end of `with LivePlot(...) as live`.
    A second training watched by the same plot, seen by its steps that start again, gets a picture of its own.
    """

    def __init__(self, columns: Sequence[str | tuple[str, ...]], *, every: float = 1.0, share: float = 0.015):
        self.panels = [(c,) if isinstance(c, str) else tuple(c) for c in columns]
        if not self.panels or not all(self.panels):
            raise UserError("a live plot needs at least one column a panel, such as ['loss', 'accuracy']")
        self.every, self.share = every, share
        self.rows: list[dict] = []
        self.seconds = 0.0  # spent drawing
        self._picture: Picture | None = None
        self._figure: Figure | None = None
        self._lines: dict[str, object] = {}
        self._last = self._started = 0.0
        self._drawn = 0

    def __call__(self, row: dict) -> None:
        """Take a row of metrics with its "step"; draw if it is time."""
        if self.rows and row.get("step", math.inf) <= self.rows[-1].get("step", -math.inf):
            self.finish()  # another training: curves and a picture of its own
            self.rows.clear()
        self.rows.append(dict(row))
        if not in_notebook():
            return
        if self._picture is None:
            self._begin()
        now = time.monotonic()
        a_drawing = self.seconds / max(1, self._drawn)
        if now - self._last >= self.every and self.seconds + a_drawing <= self.share * (now - self._started):
            self.draw()

    def __enter__(self):
        if in_notebook():
            self._begin()
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.finish()

    def _begin(self) -> None:
        self._picture, self._started = Picture(), time.monotonic()
        self.draw()
        get_ipython().events.register("post_run_cell", self.finish)

    def finish(self, _result=None) -> None:
        """Draw what came since the last drawing, for good."""
        if self._picture is None:
            return
        self.draw()
        self._picture = None
        get_ipython().events.unregister("post_run_cell", self.finish)

    def draw(self) -> None:
        started = time.perf_counter()
        self._picture.show(self.figure(), self.text(), dpi=90)
        self.seconds += time.perf_counter() - started
        self._drawn += 1
        self._last = time.monotonic()

    def text(self) -> str:
        parts = []
        for name in (n for panel in self.panels for n in panel):
            if values := self.values(name)[1]:
                parts.append(f"{name} {values[0]:.4g} -> {values[-1]:.4g}")
        return f"live plot, {len(self.rows)} rows" + (f": {', '.join(parts)}" if parts else "")

    def values(self, name: str) -> tuple[list, list]:
        """(steps, values) of a metric where it was measured."""
        pairs = [
            (row.get("step", place), float(row[name]))
            for place, row in enumerate(self.rows)
            if row.get(name) is not None and math.isfinite(float(row[name]))
        ]
        return [s for s, _ in pairs], [v for _, v in pairs]

    def figure(self) -> Figure:
        """The curves so far. The figure is made once: a layout at every drawing would cost the most."""
        if self._figure is None:
            count = len(self.panels)
            width = min(11.0, 3.1 * count + 0.6)
            self._figure = Figure(figsize=(width, 2.5))
            margins = {
                "left": 0.6 / width,
                "right": 1 - 0.15 / width,
                "wspace": 0.3,
                "bottom": 0.2,
                "top": 0.87,
            }
            self._figure.subplots_adjust(**margins)
            for axes, names in zip(
                self._figure.subplots(1, count, squeeze=False)[0], self.panels, strict=True
            ):
                for place, name in enumerate(names):
                    look = {"color": COLOURS[place % 4], "ls": STYLES[place % 4], "lw": 1.4, "label": name}
                    self._lines[name] = axes.plot([], [], **look)[0]
                axes.set_title(names[0].replace("_", " ") if len(names) == 1 else "", loc="left", fontsize=10)
                if len(names) > 1:
                    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.97), ncols=len(names), fontsize=8.5,
                                frameon=False, handlelength=1.6, columnspacing=1, borderpad=0)  # fmt: skip
                axes.set_xlabel("update", fontsize=9)
                axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
                axes.yaxis.set_major_locator(MaxNLocator(5))
                axes.tick_params(labelsize=8.5)
                axes.grid(color="#e6e6e6", lw=0.7)
                axes.spines[["top", "right"]].set_visible(False)
        for name, line in self._lines.items():
            steps, values = self.values(name)
            line.set_data(steps, values)
            line.set_marker("o" if len(values) <= max(1, len(self.rows) // 2) else "")
            line.set_markersize(4)
            line.axes.relim()
            line.axes.autoscale_view()
        return self._figure


class SliderFigure:
    """A figure and the sliders that redraw it; shows itself as the last expression of a cell."""

    def __init__(self, draw: Callable[..., Figure], ranges: dict[str, tuple]):
        self.draw_one, self.ranges = draw, ranges
        self.values = {name: _start(name, given) for name, given in ranges.items()}
        self.figure = self._drawn()
        self.sliders: dict[str, object] = {}
        self._picture = Picture()

    def _drawn(self) -> Figure:
        figure = self.draw_one(*self.values.values())
        if not hasattr(figure, "savefig"):
            raise UserError(
                f"the function that draws returned a {type(figure).__name__}: it must return a Figure"
            )
        return figure

    def text(self) -> str:
        return "figure at " + ", ".join(f"{name} = {value:g}" for name, value in self.values.items())

    def __repr__(self) -> str:
        return f"<{self.text()}>"

    def _ipython_display_(self) -> None:
        if not in_notebook():
            print(repr(self))
            return
        if someone_is_there():
            self._show_sliders()
        self._picture = Picture()
        self._picture.show(self.figure, self.text())

    def _show_sliders(self) -> None:
        try:
            import ipywidgets
        except ImportError:
            return  # the figure alone
        for name, given in self.ranges.items():
            look = {"description": GREEK.get(name, name), "value": self.values[name]}
            look |= {"layout": ipywidgets.Layout(width="420px"), "style": {"description_width": "initial"}}
            if len(given) == 2:
                options = [(f"{value:g}", value) for value in given[0]]
                slider = ipywidgets.SelectionSlider(options=options, **look)
            else:
                whole = all(isinstance(number, int) for number in given)
                kind = ipywidgets.IntSlider if whole else ipywidgets.FloatSlider
                low, high, step, _ = given
                look |= {} if whole else {"readout_format": f".{_digits(step)}f"}
                slider = kind(min=low, max=high, step=step, **look)
            slider.observe(lambda change, name=name: self.move(name, change["new"]), names="value")
            self.sliders[name] = slider
            view = {"version_major": 2, "version_minor": 0, "model_id": slider.model_id}
            text = f"slider for {name}: run this cell to move it"  # what a saved notebook shows in its place
            display({"application/vnd.jupyter.widget-view+json": view, "text/plain": text}, raw=True)

    def move(self, name: str, value) -> None:
        """What a slider does: draw again, in place."""
        self.values[name] = value
        self.figure = self._drawn()
        self._picture.show(self.figure, self.text())


def slider_figure(draw: Callable[..., Figure], **ranges: tuple) -> SliderFigure:
    """A figure under one slider for each keyword: `slider_figure(draw, beta=(0.1, 2.0, 0.1, 0.5))`.

    draw: takes the sliders' values in the order of the keywords and returns a `figures.Figure`.
    ranges: (low, high, step, start), whole numbers for a slider of whole numbers; or ([values], start), for steps
      that are not equal. The saved notebook holds the figure of the start.
    Write it as the last expression of a cell, or `display(...)` it.
    """
    if not ranges:
        raise UserError("a slider figure needs a range, such as beta=(0.1, 2.0, 0.1, 0.5)")
    return SliderFigure(draw, ranges)


def _start(name: str, given: tuple):
    if len(given) == 2 and hasattr(given[0], "__len__") and given[1] in given[0]:
        return given[1]
    if len(given) == 4 and given[0] <= given[3] <= given[1] and given[2] > 0:
        return given[3]
    raise UserError(
        f"the range of {name} is {given!r}: give (low, high, step, start) with the start inside, "
        "or ([values], start) with the start among them"
    )


def _digits(step: float) -> int:
    return next((n for n in range(6) if math.isclose(round(step, n), step, rel_tol=1e-6)), 6)


class ColouredTokens:
    """Tokens on a background that says which of two models finds each more likely; numbers in the tool tips."""

    def __init__(self, tokens: Sequence[str], log_ratios, limit: float | None = None, labels=None):
        self.tokens, self.log_ratios = list(tokens), [float(r) for r in log_ratios]
        if len(self.tokens) != len(self.log_ratios) or not self.tokens:
            raise UserError(
                f"{len(self.tokens)} tokens and {len(self.log_ratios)} log-ratios: give one log-ratio for each token"
            )
        self.limit = limit or max(max(map(abs, self.log_ratios)), 1e-9)
        self.up, self.down = labels or ("policy", "reference")

    def __repr__(self) -> str:
        parts = "".join(f"{token}[{ratio:+.2f}]" for token, ratio in self._pairs())
        return f"{parts}  (sum {math.fsum(self.log_ratios):+.2f} nats)"

    def _repr_html_(self) -> str:
        spans = "".join(
            f"<span style='{self.style(ratio)}' title='{html.escape(self.tip(ratio), quote=True)}'>"
            f"{html.escape(token)}</span>"
            for token, ratio in self._pairs()
        )
        legend = "".join(
            f"<span style='{self.style(ratio)};padding:0 4px'>{ratio:+.1f}</span>"
            for ratio in (-self.limit, -self.limit / 2, 0.0, self.limit / 2, self.limit)
        )
        small = "font-size:85%;margin-top:4px"
        return (
            f"<div style='line-height:1.9;white-space:pre-wrap'>{spans}</div><div style='{small}'>"
            f"{html.escape(self.down)} likelier {legend} {html.escape(self.up)} likelier "
            f"(log-ratio in nats; sum {math.fsum(self.log_ratios):+.2f})</div>"
        )

    def _pairs(self):
        return zip(self.tokens, self.log_ratios, strict=True)

    def tip(self, ratio: float) -> str:
        times = f", {math.exp(min(ratio, 50)):.3g} times as likely" if math.isfinite(ratio) else ""
        return f"log-ratio {ratio:+.3f}{times}"

    def style(self, ratio: float) -> str:
        """Blue where the policy finds the token likelier, orange where the reference does: black text on both.

        Tokens with a ratio beyond half the limit also have a line below, solid or dotted, for readers in grey.
        """
        share = 0.0 if math.isnan(ratio) else max(-1.0, min(1.0, ratio / self.limit))
        strong = (86, 180, 233) if share > 0 else (230, 159, 0)  # Okabe and Ito's sky blue and orange
        red, green, blue = (round(255 - abs(share) * (255 - c)) for c in strong)
        line = f"border-bottom:2px {'solid' if share > 0 else 'dotted'} #333;" if abs(share) > 0.5 else ""
        return f"background:rgb({red},{green},{blue});{line}color:#000"


def colour_tokens(
    tokens: Sequence[str], log_ratios, *, limit: float | None = None, labels: tuple[str, str] | None = None
) -> ColouredTokens:
    """Tokens coloured by log π(token) - log π_ref(token): blue the policy likes more, orange the reference.

    tokens: texts, as they follow each other; log_ratios: one number a token (list, array or tensor), in nats.
    limit: the log-ratio of full colour, by default the largest here; give one to compare several texts.
    labels: names of the two models, by default ("policy", "reference").
    """
    return ColouredTokens(tokens, log_ratios, limit, labels)
