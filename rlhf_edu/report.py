"""A run's folder becomes `report.html`: one file that opens offline, light or dark, on a phone too."""

import base64
import json
import math
import re
from html import escape
from pathlib import Path

import pandas as pd

from . import figures
from .errors import UserError, explained
from .figures import in_order, interval_text, seeds, shipped_rho
from .tables import AGAIN, COLUMNS, read_csv
from .training import replacing

BAND_COLUMNS = {name: COLUMNS[name] for name in ("frontier", "best_of_n", "correlations")}
BAND_COLUMNS["margins_binned"] = "seed method bin_low bin_high length_difference margin margin_se n"
PAPER_RHO = {"SimPO": "0.34", "SimPO w/o LN": "0.82", "DPO": "0.59"}  # SimPO paper, Figures 2 and 4
KL_GRID = (0.5, 1, 2, 3, 4, 6, 8, 10, 15, 20)
FRONTIER_CAPTION = """Ours: a small model trained from scratch, judged by its own oracle. The paper (DPO,
arXiv 2305.18290, Figure 2 left) has GPT-2-large, 22 runs and a KL axis to about 20; there DPO lies above all
others, near 0.95 at 5 nats as read off the figure. Best-of-N stands at its KL bound, log N − (N − 1)/N."""
LENGTH_CAPTION = """Ours, on a small model's comparisons. The paper (SimPO, arXiv 2405.14734, Figures 2, 4a)
has 7B models: SimPO's margin is positive at all length differences, without length normalization it is
negative where the chosen response is shorter. All margins are in SimPO's reward, as in the paper; theirs are of
training pairs, ours of held-out pairs. Pairs share responses: errors are a bit too small."""
HEAD = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">"""
CSS = """:root{color-scheme:light dark;--ink:#1b1b1b;--page:#fff;--line:#d8d8d8}
@media(prefers-color-scheme:dark){:root{--ink:#e6e6e6;--page:#16181b;--line:#3a3d42}}
body{font:16px/1.55 system-ui,sans-serif;color:var(--ink);background:var(--page);max-width:62rem;
margin:0 auto;padding:1rem}figure{margin:1rem 0}.wide{overflow-x:auto}img{max-width:100%;background:#fff;
border-radius:6px}table{border-collapse:collapse;font-size:.88rem}td,th{border-bottom:1px solid var(--line);
padding:.3rem .6rem;text-align:left;vertical-align:top;white-space:pre-line}.samples td{min-width:13rem}"""


def load(folder: Path, band_folder: Path | None = None) -> tuple[dict, dict, dict, dict]:
    """(tables, shipped tables, configuration, figures); a table that this run did not make is None."""

    def tables(folder, columns, advice=AGAIN):
        paths = {name: Path(folder) / f"{name}.csv" for name in columns}
        return {n: read_csv(p, columns[n].split(), advice) if p.exists() else None for n, p in paths.items()}

    run, band, config, drawn = tables(folder, COLUMNS), dict.fromkeys(BAND_COLUMNS), {}, {}
    if band_folder is not None:
        band = tables(band_folder, BAND_COLUMNS, f"restore it with: git checkout -- {band_folder}")
    if (path := Path(folder) / "config.json").exists():
        with explained(f"reading {path}", AGAIN):
            config = dict(json.loads(path.read_text(encoding="utf-8")))
    scale = str(dict(config.get("scale") or {}).get("name", "mini"))
    if run["frontier"] is not None:
        parts = (run["frontier"], run["best_of_n"], band["frontier"], band["best_of_n"])
        drawn["frontier"] = figures.frontier(*parts, scale=scale)
    if run["margins"] is not None or run["lengths"] is not None:
        parts = [read_csv(Path(folder) / f"{n}.csv", ()) for n in ("margins", "lengths")]  # is one lost?
        parts += [run["correlations"], band["margins_binned"], band["correlations"]]
        drawn["length"] = figures.length(*parts, scale=scale)
    if not drawn:
        raise UserError(f"{folder} holds no frontier.csv and no margins.csv; name a folder that a run wrote")
    return run, band, config, drawn


def write(path: Path, content: bytes) -> Path:
    advice = "the run's tables are untouched, free some space and start again"
    with explained(f"writing {path}", advice), replacing(path) as temporary:
        temporary.write_bytes(content)
    return path


def write_figures(folder: Path, band_folder: Path | None = None) -> list[Path]:
    """frontier.png and length.png, each if its part was run."""
    drawn = load(folder, band_folder)[-1]
    return [write(Path(folder) / f"{name}.png", figures.png(figure)) for name, figure in drawn.items()]


def reward_at_kl(frontier: pd.DataFrame, method: str, kl_grid) -> pd.DataFrame:
    """The best reward of `method` at KL <= x over its runs and steps, one row for each x that has a point.

    A maximum over noisy points is biased upwards: of k equally good points with standard error s the best
    reads about 1.2 s too high for k = 5, 1.5 s for 10, 1.9 s for 20 and 2.2 s for 50 (`points` gives k), and
    s falls with the root of the number of prompts n: rewards that spread by 0.35 have s = 0.022 for n = 256,
    0.011 for 1,024, so 20 points gain up to 0.04 or 0.02. Compare methods with alike numbers of points.
    """
    table = frontier[frontier["method"] == method]
    inside = [(x, table[table["kl"] <= x]) for x in kl_grid]
    rows = [{"kl_at_most": x, **t.iloc[t["reward"].argmax()], "points": len(t)} for x, t in inside if len(t)]
    columns = ["kl_at_most", "reward", "reward_se", "kl", "run", "points"]
    return pd.DataFrame(rows, columns=columns)


def seed_gains(frontier: pd.DataFrame | None, x: float) -> list[float]:
    """DPO's best reward at KL <= x minus PPO's, for each seed that has both."""
    gains = []
    for _, table in [] if frontier is None else frontier.groupby("seed"):
        dpo, ppo = (reward_at_kl(table, method, [x])["reward"].tolist() for method in ("DPO", "PPO"))
        gains += [a - b for a, b in zip(dpo, ppo, strict=False)]
    return gains


def pm(value: float, error: float, places: int = 3) -> str:
    return f"{value:.{places}f}" + ("" if math.isnan(error) else f" ± {error:.{places}f}")


def summary(run: dict, band: dict) -> str:
    """What the tables say, in plain words, with errors and numbers of seeds."""
    said = ""
    if (points := run["frontier"]) is not None:
        start = points.sort_values("step", kind="stable").iloc[0]
        said += f"The SFT policy starts at a mean oracle reward of {pm(start.reward, start.reward_se)} "
        said += f"({start.prompts:.0f} held-out prompts, {seeds(points)}). "
        for dpo in reward_at_kl(points[points["step"] > 0], "DPO", [10]).itertuples():
            said += f"The best DPO point at a sequence KL of 10 nats or less is {dpo.run}: "
            said += f"{pm(dpo.reward, dpo.reward_se)} at {dpo.kl:.1f} nats. "
            for ppo in reward_at_kl(points, "PPO", [dpo.kl]).itertuples():
                said += f"PPO, at no more KL, is at {pm(ppo.reward, ppo.reward_se)}: DPO minus PPO is "
                said += pm(dpo.reward - ppo.reward, math.hypot(dpo.reward_se, ppo.reward_se)) + ". "
    if gains := seed_gains(band["frontier"], 10):
        said += f"Shipped, {len(gains)} seeds: DPO minus PPO within 10 nats is {interval_text(gains)}. "
    for rho, who in ((run["correlations"], ""), (band["correlations"], "shipped, ")):
        both = None if rho is None else rho.pivot(index="seed", columns="method", values="rho")
        if both is not None and len(both := both.reindex(columns=["SimPO", "SimPO w/o LN"]).dropna()):
            ln, raw = both["SimPO"], both["SimPO w/o LN"]
            said += f"Rank correlation of log-prob a token with length ({who}{seeds(rho)}): "
            said += f"SimPO {ln.mean():.2f}, without length normalization {raw.mean():.2f}, "
            said += f"difference {interval_text(raw - ln)}. "
    return said + "Brackets: 95 % interval over seeds; one seed alone is an example, not a proof."


def table(headers, rows, kind: str = "") -> str:
    """Every cell is escaped here, so that no model text reaches the page as markup."""
    lines = [("th", headers), *(("td", row) for row in rows)]
    cells = ("".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in row) for tag, row in lines)
    return f'<div class="wide"><table class="{kind}"><tr>{"</tr><tr>".join(cells)}</tr></table></div>'


def picture(figure, caption: str, dpi: int = 150) -> str:
    image, text = base64.b64encode(figures.png(figure, dpi)).decode(), escape(caption)
    image = f'<img alt="{text}" src="data:image/png;base64,{image}">'
    return f"<figure>{image}<figcaption>{text}</figcaption></figure>"


def equal_kl(points: pd.DataFrame, band: pd.DataFrame | None) -> str:
    """DPO against PPO within the KL that both reach."""
    reach = points.groupby("method")["kl"].agg(["min", "max"]).reindex(["DPO", "PPO"])
    if reach.isna().any(axis=None):
        return "<p>Left out: DPO or PPO was not run.</p>"
    rows = []
    for x in (x for x in KL_GRID if reach["min"].max() <= x <= reach["max"].min()):
        found = [b for m in ("DPO", "PPO", "PPO-GT") for b in reward_at_kl(points, m, [x]).itertuples()]
        cells = [f"{pm(b.reward, b.reward_se)}\n{b.run}, best of {b.points}" for b in found]
        gain = pm(found[0].reward - found[1].reward, math.hypot(found[0].reward_se, found[1].reward_se))
        gains = seed_gains(band, x)
        rows.append([f"≤ {x:g}", *(cells + ["–"])[:3], gain, interval_text(gains) if gains else "–"])
    heads = ["KL (nats)", "DPO", "PPO", "PPO-GT (true reward)", "DPO − PPO", "the same, shipped"]
    return "<p>The best of several noisy points reads high, the more points the more.</p>" + table(
        heads, rows
    )


def sample_table(samples: pd.DataFrame, ends: pd.DataFrame | None) -> str:
    """Prompts down, up to seven runs across: of each method the run that ended with the highest reward."""
    runs = list(dict.fromkeys(samples["run"]))
    if ends is not None and set(runs) & set(ends["run"]):
        best = ends[ends["run"].isin(runs)].sort_values("reward").groupby("method")["run"].last()
        runs = [best[method] for method in in_order(best.index)]
    cells = {(s.prompt, s.run): f"{s.response}\np(positive) {s.reward:.2f}" for s in samples.itertuples()}
    rows = [[p, *(cells.get((p, run), "–") for run in runs[:7])] for p in dict.fromkeys(samples["prompt"])]
    return table(["prompt", *runs[:7]], rows, "samples")


def write_report(folder: Path, band_folder: Path | None = None) -> Path:
    """`report.html` in the run's folder. What was not run is left out, with a sentence."""
    folder = Path(folder)
    run, band, config, drawn = load(folder, band_folder)
    parts: dict[str, str] = {}  # heading: HTML
    if (points := run["frontier"]) is not None:
        ends = points.sort_values("step").groupby(["seed", "run"], sort=False).last().reset_index()
        ends = ends.sort_values("method", key=lambda m: m.map(in_order(m).index), kind="stable")
        parts["Reward against KL"] = picture(drawn["frontier"], FRONTIER_CAPTION)
        heads = ["run", "reward ± se", "KL ± se (nats)", "length (tokens)", "ended"]
        rows = [[e.run, pm(e.reward, e.reward_se), pm(e.kl, e.kl_se, 2), f"{e.length:.1f}", f"{e.ended:.0%}"]
                for e in ends.itertuples()]  # fmt: skip
        parts["Where each run ended"] = table(heads, rows)
        parts["DPO against PPO at equal KL"] = equal_kl(points, band["frontier"])
    if (best := run["best_of_n"]) is not None:
        rows = [[f"{b.n:.0f}", pm(b.reward, b.reward_se), f"{b.kl:.2f}"] for b in best.itertuples()]
        parts["Best-of-N"] = table(["N", "reward ± se", "KL bound (nats)"], rows)
    if "length" in drawn:
        parts["Length"] = picture(drawn["length"], LENGTH_CAPTION)
    if (today := run["correlations"]) is not None:
        found = [(m, f"{rho:.2f}") for m, rho in today.groupby("method", sort=False)["rho"].mean().items()]
        rows = [[*f, shipped_rho(band["correlations"], f[0]), PAPER_RHO.get(f[0], "–")] for f in found]
        heads = ["method", "Spearman's rho, this run", "mean [95 % interval over seeds]", "paper"]
        parts["Log-prob a token against length"] = table(heads, rows)
    if run["samples"] is not None:
        parts["Samples side by side"] = sample_table(run["samples"], None if points is None else ends)
    methods: dict[str, dict] = {}  # one figure a method: its runs share the unit of their loss
    for path in sorted((folder / "training").glob("*.csv")):
        method = re.match("[A-Za-z-]*", path.stem)[0]
        methods.setdefault(method, {})[path.stem.replace("_", " ")] = read_csv(path, ["step"])
    for method, curves in methods.items():
        figure = figures.training_curves(curves, ("loss", "accuracy", "margin", "score", "kl"))
        parts[f"Training: {method}"] = picture(figure, "moving means over 1/40 of the updates", 80)
    if config:
        parts["Configuration"] = table(["setting", "value"], pd.json_normalize(config).iloc[0].items())
    if (seconds := run["seconds"]) is not None:
        rows = [*seconds[["stage", "seconds"]].values, ["together", f"{seconds['seconds'].sum():.1f}"]]
        parts["Seconds"] = table(["stage", "seconds"], rows)
    page = f"<h1>Reward, KL and length: {escape(folder.name)}</h1><p>{escape(summary(run, band))}</p>"
    page += "".join(f"<h2>{heading}</h2>{part}" for heading, part in parts.items() if part)
    if absent := [f"{name}.csv" for name in run if run[name] is None]:
        page += f"<p>Left out, because this run has not made them: {', '.join(absent)}.</p>"
    head = f"{HEAD}<title>{escape(folder.name)}</title><style>{CSS}</style></head>"
    return write(folder / "report.html", f"{head}<body>{page}</body></html>".encode())
