"""The course's figures: pandas records in, a matplotlib `Figure` out that says it is ours and which scale."""

import io
import math

import numpy as np
import pandas as pd
from matplotlib import figure as mpl_figure
from scipy import stats

from .errors import UserError

METHOD_COLOURS = {  # Okabe and Ito's, told apart by colour-blind readers; the markers differ too
    "SFT": "#000000", "Preferred-FT": "#CC79A7", "Unlikelihood": "#56B4E9",
    "PPO": "#D55E00", "PPO-GT": "#E69F00", "DPO": "#0072B2",
    "SimPO": "#009E73", "SimPO w/o LN": "#882255", "Best-of-N": "#595959",
    "your loss": "#332288",
}  # fmt: skip
MARKERS = dict(zip(METHOD_COLOURS, "pPv^XosDx*", strict=True))
OTHER = "#999999"


class Figure(mpl_figure.Figure):
    """A figure outside pyplot's state: nothing leaks, and a notebook shows it without importing pyplot."""

    def _repr_png_(self) -> bytes:
        return png(self, dpi=110)


def png(figure: mpl_figure.Figure, dpi: int = 150) -> bytes:
    figure.savefig(buffer := io.BytesIO(), format="png", dpi=dpi)
    return buffer.getvalue()


def seed_interval(values) -> tuple[float, float, float]:
    """(mean, low, high): the mean over seeds with its 95 % t interval; one seed has no interval (NaN)."""
    values = [float(value) for value in values]
    if not values:
        raise UserError("an interval over seeds needs at least one value, there is none")
    mean, half = math.fsum(values) / len(values), math.nan
    if len(values) > 1:
        half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    return mean, mean - half, mean + half


def bin_margins(margins: pd.DataFrame, edges=None) -> pd.DataFrame:
    """Mean margin and its standard error in bins of length difference, by seed and method, no empty bins.

    A bin holds low <= difference < high; what lies outside `edges` is left out. Without `edges` bins are 5
    tokens wide and centred on multiples of 5, whatever the data, so that several seeds have the same bins.
    The error takes pairs as independent; pairs of one prompt share responses, so it is a bit too small.
    """
    differences = margins["length_difference"].to_numpy(float)
    if edges is None:
        lowest, highest = (math.floor((d + 2.5) / 5) for d in (differences.min(), differences.max()))
        edges = 5 * np.arange(lowest, highest + 2) - 2.5
    edges = np.asarray(edges, dtype=float)
    place = np.searchsorted(edges, differences, side="right") - 1
    inside = (place >= 0) & (place < len(edges) - 1)
    table = margins[inside].assign(bin_low=edges[place[inside]], bin_high=edges[place[inside] + 1])
    bins = table.groupby(["seed", "method", "bin_low", "bin_high"])
    means = bins[["length_difference", "margin"]].mean()
    return means.assign(margin_se=bins["margin"].sem(), n=bins.size()).reset_index()


def frontier(frontier, best_of_n=None, band=None, band_best_of_n=None, *, scale="mini") -> Figure:
    """Oracle reward against sequence KL, all runs and steps: our version of the DPO paper's Figure 2, left.

    Large points with one standard error are the ends of runs. `band`: the shipped runs of several seeds,
    pale, behind. A run that leaves the KL axis has a triangle at its right edge and its KL in the legend.
    """
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel("sequence KL from the SFT policy (nats)")
    axes.set_ylabel("oracle reward, p(positive)")
    about = f"{frontier['prompts'].min():.0f} held-out prompts a point, {seeds(frontier)}; large: end of run"
    finish(axes, f"Reward against KL on IMDb: ours, {scale} scale", f"{about}, ± 1 standard error")
    # The paper's KL axis ends near 20. Unlikelihood can reach hundreds of nats and would squeeze the rest.
    kl = frontier["kl"] if band is None else pd.concat([frontier["kl"], band["kl"]])
    limit = max(1.0, 1.06 * kl[kl <= np.clip(kl.quantile(0.95), 10, 25)].max())
    dashed = {"ls": "--", "color": METHOD_COLOURS["Best-of-N"]}
    clear = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
    small = {"textcoords": "offset points", "ha": "center", "fontsize": 8, "bbox": clear, "zorder": 8}
    for _, table in [] if best_of_n is None else best_of_n.groupby("seed"):
        x, y = table["kl"], table["reward"]
        axes.errorbar(x, y, table["reward_se"], elinewidth=0.8, zorder=4, **dashed)
        axes.plot(x, y, marker="x", ms=4, label="Best-of-N (KL bound)", zorder=4, **dashed)
        axes.annotate(f"N={table['n'].max():.0f}", (x.max(), y.max()), (0, 6), color=dashed["color"], **small)
    for _, table in [] if band_best_of_n is None else band_best_of_n.groupby("seed"):
        axes.plot(table["kl"], table["reward"], lw=0.8, alpha=0.35, zorder=1, **dashed)
    if band is not None:
        for method, table in band.groupby("method"):
            axes.plot(table["kl"], table["reward"], ls="", ms=4, mew=0, alpha=0.28, zorder=1, **style(method))
        out = (band["kl"] > limit).sum()
        label = f"shipped, {seeds(band)}" + (
            f"\n({out} point{'s' if out > 1 else ''} off scale)" if out else ""
        )
        axes.plot([], [], ls="", marker="o", ms=4, mew=0, alpha=0.6, color=OTHER, label=label)
    labelled, off_scale = [], {}
    for (method, _, _), run in frontier.sort_values("step").groupby(["method", "run", "seed"], sort=False):
        axes.plot(run["kl"], run["reward"], lw=1, alpha=0.4, ms=3, mew=0, zorder=2, **style(method))
        end, far = run.iloc[-1], run.iloc[run["kl"].argmax()]
        look = style(method) | {"ms": 8.5, "mec": "white", "mew": 0.8, "elinewidth": 1, "ls": "", "zorder": 5}
        axes.errorbar(end["kl"], end["reward"], end["reward_se"], end["kl_se"], label=method, **look)
        if far["kl"] > limit:
            off_scale.setdefault(method, []).append((far["kl"], far["reward"]))
        if method == "DPO" and all(abs(end["kl"] - kl) > 0.07 * limit for kl in labelled):
            knob = str(end["knob"]).replace("beta", "β")  # where it is not too close to another
            axes.annotate(knob, (end["kl"], end["reward"]), (0, 9), color=look["color"], **small)
            labelled.append(end["kl"])
    for method, points in off_scale.items():
        kls, rewards = zip(*sorted(points), strict=True)
        look = style(method) | {"marker": ">", "ms": 7, "ls": "", "clip_on": False, "zorder": 7}
        text = f"{method}: off scale,\nKL {', '.join(f'{kl:.0f}' for kl in kls)}"
        axes.plot([limit] * len(kls), rewards, label=text, **look)
    axes.set_xlim(-0.02 * limit, limit)
    axes.set_ylim(top=min(1.03, axes.get_ylim()[1] + 0.02))
    legend(figure, loc="outside right upper", fontsize=9)
    return figure


def length(margins, lengths, correlations=None, band_margins=None, band_correlations=None, *, scale="mini"):
    """Margin against length difference, log-prob a token against length: our version of SimPO's Figure 2.

    `margins` are pairs, `band_margins` bins (`bin_margins`) of several seeds, both in SimPO's reward for all
    methods. Bins of fewer than 5 pairs are not drawn. Without `correlations` the rank correlations are computed
    from `lengths`.
    """
    figure = Figure(figsize=(10.4, 5.8), layout="constrained")
    names = in_order(lengths["method"])[:4]
    a, b, c, d = (names + ["."] * 3)[:4]  # "." leaves a place empty
    panels = figure.subplot_mosaic([["margin", a, b], ["margin", c, d]], width_ratios=[1.35, 1, 1])
    axes = panels["margin"]
    for (method, _), table in bin_margins(margins).groupby(["method", "seed"]):
        table = table[table["n"] >= 5]
        axes.errorbar(table["length_difference"], table["margin"], table["margin_se"], lw=1.5, ms=5, mew=0,
                      elinewidth=1, zorder=3, label=method, **style(method))  # fmt: skip
    if band_margins is not None:
        for method, table in band_margins.groupby("method"):
            bins = table[table["n"] >= 5].groupby("bin_low")
            axes.fill_between(bins["length_difference"].mean(), bins["margin"].min(), bins["margin"].max(),
                              color=style(method)["color"], alpha=0.18, lw=0, zorder=1)  # fmt: skip
        label = f"shipped, {seeds(band_margins)} (range)"
        axes.fill_between([], [], [], color=OTHER, alpha=0.35, lw=0, label=label)
    axes.axhline(0, color="black", lw=0.8, zorder=2)
    axes.set_xlabel("length difference, chosen − rejected (tokens)")
    axes.set_ylabel("margin in SimPO's reward, chosen − rejected (β = 2; nats)")
    finish(axes, "Margin in SimPO's reward", "means in 5-token bins, ± 1 standard error", size=10)
    for method in names:
        axes, table = panels[method], lengths[lengths["method"] == method]
        axes.plot(table["length"], table["logp_per_token"], ls="", marker="o", ms=2.2, mew=0,
                  color=style(method)["color"], alpha=min(0.6, max(0.12, 150 / len(table))))  # fmt: skip
        if correlations is not None and method in set(correlations["method"]):
            rho = correlations.loc[correlations["method"] == method, "rho"].mean()
        else:
            rho = stats.spearmanr(table["length"], table["logp_per_token"]).statistic
        finish(axes, f"{method}: ρ = {rho:.2f}", shipped_rho(band_correlations, method), size=10)
        axes.set_xlabel("length (tokens)")
        axes.set_ylabel("log-prob a token (nats)")
    heading = f"Length and likelihood: ours, {scale} scale, {seeds(margins)}; ρ is Spearman's"
    figure.suptitle(heading, x=0.01, ha="left", weight="bold", fontsize=12)
    legend(figure, loc="outside lower left", ncols=6, fontsize=9)
    return figure


def training_curves(tables: dict[str, pd.DataFrame], columns=("loss", "accuracy", "margin", "kl")) -> Figure:
    """One panel a column, one line a run, as moving means over 1/40 of the updates; no panel without data."""
    present = [c for c in columns if any(c in t and t[c].notna().any() for t in tables.values())]
    if not present:
        raise UserError(f"no training table has a column {', '.join(columns)}: there is nothing to draw")
    figure = Figure((max(4.4, 2.9 * len(present)), 2.9 + 0.07 * len(tables)), layout="constrained")
    styles = [{"color": c, "ls": dash} for dash in ("-", "--", ":") for c in METHOD_COLOURS.values()]
    for axes, column in zip(figure.subplots(1, len(present), squeeze=False)[0], present, strict=True):
        for index, (run, table) in enumerate(tables.items()):
            line = table.reindex(columns=["step", column]).dropna()
            means = line[column].rolling(max(1, len(line) // 40), min_periods=1, center=True).mean()
            axes.plot(line["step"], means, label=run, lw=1.2, **styles[index % len(styles)])
        axes.set_xlabel("step")
        finish(axes, column, size=10)
    legend(figure, loc="outside lower left", ncols=3, fontsize=8)
    return figure


def style(method: str) -> dict:
    return {"color": METHOD_COLOURS.get(method, OTHER), "marker": MARKERS.get(method, "o")}


def in_order(names) -> list[str]:
    """Distinct names, methods in the palette's order, others last."""
    order = list(METHOD_COLOURS)
    return sorted(dict.fromkeys(names), key=lambda n: order.index(n) if n in order else len(order))


def interval_text(values) -> str:
    """0.82 [0.74, 0.90]: mean over seeds and its 95 % t interval; the mean alone for one seed."""
    mean, low, high = seed_interval(values)
    return f"{mean:.2f}" if math.isnan(low) else f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def shipped_rho(correlations: pd.DataFrame | None, method: str) -> str:
    rhos = correlations[correlations["method"] == method] if correlations is not None else ()
    return f"shipped, {seeds(rhos)}: {interval_text(rhos['rho'])}" if len(rhos) else ""


def seeds(table: pd.DataFrame) -> str:
    count = table["seed"].nunique()
    return f"{count} seeds" if count > 1 else f"seed {table['seed'].iloc[0]:.0f}"


def finish(axes, bold: str, plain: str = "", size: float = 12) -> None:
    """A bold title with a plain line under it, both from the left edge; a quiet grid."""
    axes.set_title(bold, loc="left", weight="bold", fontsize=size, pad=16 if plain else 5)
    axes.annotate(plain, (0, 1), (0, 4), xycoords="axes fraction", textcoords="offset points", fontsize=8.5)
    axes.grid(color="#e6e6e6", lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def legend(figure: Figure, **where) -> None:
    """One entry a name, methods in the palette's order, outside the axes, so that it covers no data."""
    found = [axes.get_legend_handles_labels() for axes in figure.axes]
    handles = {label: handle for both in found for handle, label in zip(*both, strict=True)}
    figure.legend([handles[name] for name in in_order(handles)], in_order(handles), frameon=False, **where)
